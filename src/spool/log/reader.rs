//! Reading a queue: one entry at a time from the end of the last reading. Damage is set aside.

use std::{fs::File, io};

use super::{Log, Position, READ_TRIES};
use crate::spool::scan::{Item, Scanner};

/// The progress of [`Log::next`], or of a [visit](Log::visit).
#[derive(Default)]
pub struct Reading {
    cursor: Option<Cursor>,
    /// The last segment that was read to its end, if any.
    passed: Option<u32>,
}

impl Reading {
    /// A visit that begins in the file of this place.
    pub fn from(place: Position) -> Self {
        Self {
            cursor: None,
            passed: place.segment.checked_sub(1),
        }
    }
}

/// The numbers of a place: its file, and its order there.
impl From<Position> for [u32; 2] {
    fn from(place: Position) -> Self {
        [place.segment, place.ordinal]
    }
}

struct Cursor {
    segment: u32,
    scanner: Scanner,
    /// The ordinal that comes next if nothing is damaged.
    expected: u32,
    /// Damage since the last entry: its offset and size in bytes.
    damage: Option<(u64, u64)>,
}

/// An entry, if there is one more.
type NextEntry = Option<(Position, Vec<u8>)>;

/// The result of one step.
enum ReadStep {
    Entry(Position, Vec<u8>),
    /// Damage, or an entry that is settled or held.
    Nothing,
    /// The end of the active segment. More may follow.
    UpToDate,
    /// The end of another segment.
    End,
}

impl Log {
    /// The oldest entry that was neither read, nor settled, nor held. A segment that cannot be
    /// read, call after call, is logged and left out until the next [`Log::rewind`].
    pub fn next(&mut self) -> NextEntry {
        loop {
            match self.try_next() {
                Ok(None) => return None,
                Ok(found) => {
                    self.failures = 0;
                    return found;
                }
                Err((number, why)) if self.failures < READ_TRIES => {
                    self.failures += 1;
                    self.warn_unread(number, &why);
                    return None;
                }
                Err((number, why)) => {
                    self.segments[&number].log_unreadable(&why);
                    self.reading.passed = Some(number);
                    self.left_out = true;
                    self.failures = 0;
                    // Later entries go to a file that can be read.
                    self.active
                        .take_if(|it| it.number == number && it.buffered == 0);
                }
            }
        }
    }

    /// The same, or the number of the segment that cannot be read.
    fn try_next(&mut self) -> Result<NextEntry, (u32, io::Error)> {
        loop {
            let number = match &self.reading.cursor {
                Some(cursor) => cursor.segment,
                None => {
                    let from = self.reading.passed.map_or(0, |number| number + 1);
                    let end = self.read_end.unwrap_or(u32::MAX).max(from);
                    let Some((number, _)) = self.segments.range(from..end).next() else {
                        return Ok(None);
                    };
                    *number
                }
            };
            match self.read(number).map_err(|why| (number, why))? {
                ReadStep::Entry(position, payload) => return Ok(Some((position, payload))),
                ReadStep::Nothing => {}
                ReadStep::UpToDate => return Ok(None),
                ReadStep::End => self.reading.passed = Some(number),
            }
        }
    }

    fn warn_unread(&self, number: u32, why: &io::Error) {
        let file = self.segments[&number].file("log");
        tracing::warn!(file = %file.display(), reason = %why, "cannot read the spool at present");
    }

    /// Reads one item of segment `number`. Moves the cursor on unless the segment ends there.
    fn read(&mut self, number: u32) -> io::Result<ReadStep> {
        let cursor = self.reading.cursor.take();
        // A segment whose entries are all settled is gone.
        let Some(segment) = self.segments.get(&number) else {
            return Ok(ReadStep::End);
        };
        let mut cursor = match cursor {
            Some(cursor) => cursor,
            None => Cursor {
                segment: number,
                scanner: Scanner::new(File::open(segment.file("log"))?, segment.salt),
                expected: 0,
                damage: None,
            },
        };
        let step = match cursor.scanner.next(segment.size)? {
            Some(Item::Frame { ordinal, payload }) if ordinal < segment.count => {
                let position = Position {
                    segment: number,
                    ordinal,
                };
                let is_live = !segment.settled.contains(ordinal) && !self.held.contains(&position);
                self.miss(&mut cursor, ordinal);
                cursor.expected = ordinal + 1;
                if is_live {
                    ReadStep::Entry(position, payload)
                } else {
                    ReadStep::Nothing
                }
            }
            Some(Item::Frame { .. }) => ReadStep::Nothing,
            Some(Item::Damage { at, size }) => {
                cursor.damage = Some((at, size));
                ReadStep::Nothing
            }
            None if self.is_active(number) => ReadStep::UpToDate,
            None => {
                let end = segment.count;
                self.miss(&mut cursor, end);
                return Ok(ReadStep::End);
            }
        };
        self.reading.cursor = Some(cursor);
        Ok(step)
    }

    /// Every unsettled entry after those of `reading`, oldest first, for as long as `visit` returns
    /// true. The next visit with `reading` goes on from there.
    ///
    /// # Errors
    /// If a segment cannot be read. The next visit reads that one again from its start.
    pub fn visit(
        &mut self,
        reading: &mut Reading,
        mut visit: impl FnMut(Position, Vec<u8>) -> bool,
    ) -> io::Result<()> {
        let own = std::mem::replace(&mut self.reading, std::mem::take(reading));
        let held = std::mem::take(&mut self.held);
        let visited = loop {
            match self.try_next() {
                Ok(Some((position, payload))) => {
                    if !visit(position, payload) {
                        break Ok(());
                    }
                }
                Ok(None) => break Ok(()),
                Err((number, why)) => {
                    self.warn_unread(number, &why);
                    break Err(why);
                }
            }
        };
        *reading = std::mem::replace(&mut self.reading, own);
        self.held = held;
        visited
    }

    /// The cursor has come to entry `found`. The unsettled entries that it should have met before
    /// are damaged: they are set aside, and count no longer.
    fn miss(&mut self, cursor: &mut Cursor, found: u32) {
        let damage = cursor.damage.take();
        let Some(segment) = self.segments.get_mut(&cursor.segment) else {
            return;
        };
        let missed = cursor.expected..found;
        let missed = missed.filter(|ordinal| !segment.settled.contains(*ordinal));
        let missed: Vec<_> = missed.collect();
        if missed.is_empty() {
            return;
        }
        let (at, size) = damage.unwrap_or_default();
        let damage = segment.set_aside(at, size, &cursor.scanner);
        let is_kept = damage.kept.is_some();
        self.damages.push(damage);
        for ordinal in missed.into_iter().filter(|_| is_kept) {
            self.settle(Position {
                segment: cursor.segment,
                ordinal,
            });
        }
    }
}
