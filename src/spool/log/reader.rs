//! Reading a queue: one entry at a time from where the last reading ended, with its damage set aside.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use super::{Damage, Log, Position, READ_TRIES, files::sync};
use crate::spool::scan::{Item, Scanner};

pub(super) struct Cursor {
    segment: u32,
    scanner: Scanner,
    /// The ordinal that comes next if nothing is damaged.
    expected: u32,
    /// Damage since the last entry: its offset and size in bytes.
    damage: Option<(u64, u64)>,
}

/// What one step of the reading has found.
enum ReadStep {
    Entry(u32, Vec<u8>),
    /// Damage, or an entry that is settled or held.
    Nothing,
    /// The end of the active segment. More may follow.
    UpToDate,
    /// The end of another segment.
    End,
}

impl Log {
    /// The oldest entry that was neither read, nor settled, nor held. A segment that cannot be read, call after call, is logged and
    /// left out until the next [`Log::rewind`].
    pub fn next(&mut self) -> Option<(Position, Vec<u8>)> {
        loop {
            let (number, item) = match self.cursor.take() {
                Some(cursor) => self.read(cursor),
                None => match self.cursor_after_passed()? {
                    (_, Ok(cursor)) => self.read(cursor),
                    (number, Err(why)) => (number, Err(why)),
                },
            };
            match item {
                Ok(ReadStep::Entry(ordinal, payload)) => {
                    self.failures = 0;
                    return Some((
                        Position {
                            segment: number,
                            ordinal,
                        },
                        payload,
                    ));
                }
                Ok(ReadStep::Nothing) => {}
                Ok(ReadStep::UpToDate) => return None,
                Ok(ReadStep::End) => self.passed = Some(number),
                Err(why) if self.failures < READ_TRIES => {
                    self.failures += 1;
                    tracing::warn!(file = %self.path(number, "log").display(), %why, "cannot read the spool at present");
                    return None;
                }
                Err(why) => {
                    self.leave_out(number, &why);
                    self.passed = Some(number);
                    self.failures = 0;
                    if self
                        .active
                        .as_ref()
                        .is_some_and(|active| active.number == number && active.buffered == 0)
                    {
                        // Later entries go to a file that can be read.
                        self.active = None;
                    }
                }
            }
        }
    }

    /// Reads one item at `cursor`, and moves on unless the segment ends there.
    fn read(&mut self, mut cursor: Cursor) -> (u32, io::Result<ReadStep>) {
        let number = cursor.segment;
        // A segment whose entries are all settled is gone.
        let Some(segment) = self.segments.get(&number) else {
            return (number, Ok(ReadStep::End));
        };
        let read = match cursor.scanner.next(segment.size) {
            Ok(Some(Item::Frame { ordinal, payload })) if ordinal < segment.count => {
                let key = Position {
                    segment: number,
                    ordinal,
                };
                let is_live = !segment.settled.contains(ordinal) && !self.held.contains(&key);
                self.miss(&mut cursor, ordinal);
                cursor.expected = ordinal + 1;
                if is_live {
                    ReadStep::Entry(ordinal, payload)
                } else {
                    ReadStep::Nothing
                }
            }
            Ok(Some(Item::Frame { .. })) => ReadStep::Nothing,
            Ok(Some(Item::Damage { at, size })) => {
                cursor.damage = Some((at, size));
                ReadStep::Nothing
            }
            Ok(None)
                if self
                    .active
                    .as_ref()
                    .is_some_and(|active| active.number == number) =>
            {
                ReadStep::UpToDate
            }
            Ok(None) => {
                let end = segment.count;
                self.miss(&mut cursor, end);
                return (number, Ok(ReadStep::End));
            }
            Err(why) => return (number, Err(why)),
        };
        self.cursor = Some(cursor);
        (number, Ok(read))
    }

    /// Every unsettled entry, oldest first, for as long as `visit` returns true.
    pub fn visit(&mut self, mut visit: impl FnMut(Position, Vec<u8>) -> bool) {
        let place = (self.cursor.take(), self.passed.take());
        let held = std::mem::take(&mut self.held);
        while let Some((key, payload)) = self.next()
            && visit(key, payload)
        {}
        (self.cursor, self.passed) = place;
        self.held = held;
    }

    /// The first segment that was not read to its end, and a cursor at its beginning.
    fn cursor_after_passed(&self) -> Option<(u32, io::Result<Cursor>)> {
        let from = self.passed.map_or(0, |number| number + 1);
        let (&number, segment) = self.segments.range(from..).next()?;
        let file = File::open(self.path(number, "log"));
        let cursor = |file| Cursor {
            segment: number,
            scanner: Scanner::new(file, segment.salt),
            expected: 0,
            damage: None,
        };
        Some((number, file.map(cursor)))
    }

    /// The cursor has come to entry `found`: the unsettled entries that it should have met before are damaged. They are set aside,
    /// and count no longer.
    fn miss(&mut self, cursor: &mut Cursor, found: u32) {
        let (number, damage) = (cursor.segment, cursor.damage.take());
        let Some(segment) = self.segments.get(&number) else {
            return;
        };
        let missed: Vec<_> = (cursor.expected..found)
            .filter(|&ordinal| !segment.settled.contains(ordinal))
            .collect();
        if missed.is_empty() {
            return;
        }
        let (at, size) = damage.unwrap_or_default();
        if !self.set_aside(number, at, size, &cursor.scanner) {
            return;
        }
        for ordinal in missed {
            self.settle(Position {
                segment: number,
                ordinal,
            });
        }
    }

    /// Copies damaged bytes to a file of their own. Whether that was possible.
    pub(super) fn set_aside(&mut self, number: u32, at: u64, size: u64, scanner: &Scanner) -> bool {
        let file = self.path(number, "log");
        let copy = self.path(number, &format!("{at}.damaged"));
        let kept = scanner
            .bytes(at, size)
            .and_then(|bytes| self.keep(&copy, &bytes))
            .is_ok()
            .then_some(copy);
        let is_kept = kept.is_some();
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.stays |= !is_kept;
        }
        self.damages.push(Damage {
            file,
            at,
            size,
            kept,
        });
        is_kept
    }

    /// Writes the copy so that it outlives a power cut: the segment may go then.
    fn keep(&self, copy: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(copy, bytes)?;
        sync(&File::open(copy)?)?;
        sync(&File::open(&self.folder)?)
    }
}
