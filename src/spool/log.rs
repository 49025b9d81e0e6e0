//! One queue on disk: entries in the order in which they came, in segments of a bounded size. A segment goes when all of its
//! entries are settled, and with it its disk space.
//!
//! `NAME-NUMBER-SALT.log` holds entries as [`frame`]s, the last one of a full segment a seal with their count, so that a
//! start need not read what lies before the last segment. `NAME-NUMBER-SALT.done` holds runs of settled ordinals, each with its
//! own checksum. Everything here blocks.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    hash::{BuildHasher as _, RandomState},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::{
    frame,
    scan::{Item, Scanner},
    settled::{RUN, SettledSet, append_runs, runs},
};

/// A segment that has grown past this is sealed, unless [`Log::open`] is told a lesser size.
pub const SEGMENT_MAX: u64 = 16 << 20;
/// What the active segment may keep of the disk while all of its entries are settled.
const SETTLED_KEPT: u64 = 1 << 20;
/// How often a file that the disk does not give is tried: a flood of connections may have taken all descriptors for a while.
const READ_TRIES: u32 = 10;
/// The ordinal of a seal.
const SEAL: u32 = u32::MAX;
/// A seal's frame: the count of entries.
const SEAL_SIZE: usize = frame::HEAD + 4;

/// Where an entry lies. Keys of one queue are in the order of their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    segment: u32,
    ordinal: u32,
}

/// Bytes that are no whole entry any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub file: PathBuf,
    pub at: u64,
    pub size: u64,
    /// Where a copy of them lies; `None` if it could not be made.
    pub kept: Option<PathBuf>,
}

struct Segment {
    salt: u32,
    /// Entries have the ordinals below this.
    count: u32,
    /// Bytes of whole, synced frames.
    size: u64,
    settled: SettledSet,
    /// It has damage that could not be copied, and stays until a start that can.
    stays: bool,
}

impl Segment {
    fn new(salt: u32) -> Self {
        Self {
            salt,
            count: 0,
            size: 0,
            settled: SettledSet::default(),
            stays: false,
        }
    }

    fn len(&self) -> u64 {
        u64::from(self.count - self.settled.count)
    }
}

/// The segment that is appended to.
struct Active {
    number: u32,
    file: File,
    /// Frames that are not on disk yet, and how many they are.
    buffer: Vec<u8>,
    buffered: u32,
}

struct Cursor {
    segment: u32,
    scanner: Scanner,
    /// The ordinal that comes next if nothing is damaged.
    expected: u32,
    /// Damage since the last entry: where, and how many bytes.
    damage: Option<(u64, u64)>,
}

/// What one step of a reading has met.
enum Read {
    Entry(u32, Vec<u8>),
    /// Something that does not come out.
    Nothing,
    /// The end of what is written, where more may follow.
    UpToDate,
    /// The end of a segment that is not appended to.
    End,
}

/// One queue. Dropping it closes its files; what was not committed is not there.
pub struct Log {
    folder: PathBuf,
    name: String,
    segments: BTreeMap<u32, Segment>,
    next_number: u32,
    /// The number of the first segment of this run.
    first_own: u32,
    active: Option<Active>,
    cursor: Option<Cursor>,
    /// The last segment that [`Log::next`] is through with, if any.
    passed: Option<u32>,
    /// How often in a row the disk did not give what comes next.
    failures: u32,
    segment_max: u64,
    /// Entries that [`Log::next`] leaves out.
    held: HashSet<Position>,
    damages: Vec<Damage>,
}

impl Log {
    /// Opens the queue `name` in `folder`, with what an earlier run has left in it, in segments of about `segment_max` bytes. Damage
    /// is no error: see [`Log::damages`].
    pub fn open(folder: &Path, name: &str, segment_max: u64) -> io::Result<Self> {
        let mut log = Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            segments: BTreeMap::new(),
            next_number: 0,
            first_own: 0,
            active: None,
            cursor: None,
            passed: None,
            failures: 0,
            segment_max: segment_max.min(SEGMENT_MAX),
            held: HashSet::new(),
            damages: Vec::new(),
        };
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            let Some((number, salt)) = name.to_str().and_then(|name| log.parse(name)) else {
                continue;
            };
            log.segments.insert(number, Segment::new(salt));
        }
        log.next_number = log
            .segments
            .last_key_value()
            .map_or(0, |(number, _)| number + 1);
        log.first_own = log.next_number;
        for number in log.segments.keys().copied().collect::<Vec<_>>() {
            if let Err(why) = log.find(number) {
                log.leave_out(number, &why);
                log.segments.remove(&number);
            }
        }
        log.give_back()?;
        Ok(log)
    }

    /// Unsettled entries on disk.
    pub fn len(&self) -> u64 {
        self.segments.values().map(Segment::len).sum()
    }

    /// Those of them that were there when the queue was opened.
    pub fn found(&self) -> u64 {
        self.segments
            .range(..self.first_own)
            .map(|(_, segment)| segment.len())
            .sum()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        let settled = |segment: &Segment| u64::from(segment.settled.count) * RUN as u64;
        self.segments
            .values()
            .map(|segment| segment.size + settled(segment))
            .sum()
    }

    /// The damages found since the last call.
    pub fn damages(&mut self) -> Vec<Damage> {
        std::mem::take(&mut self.damages)
    }

    /// Adds an entry; it is there after the next [`Log::commit`]. One that is `held` is left out by [`Log::next`] until
    /// [`Log::rewind`].
    pub fn append(&mut self, payload: &[u8], held: bool) -> io::Result<Position> {
        if self.active.is_none() {
            self.active = Some(self.begin_segment()?);
        }
        let Some(active) = &mut self.active else {
            unreachable!("it was made above")
        };
        let segment = &self.segments[&active.number];
        let key = Position {
            segment: active.number,
            ordinal: segment.count + active.buffered,
        };
        frame::write(&mut active.buffer, segment.salt, key.ordinal, payload);
        active.buffered += 1;
        if held {
            self.held.insert(key);
        }
        Ok(key)
    }

    /// Makes what was appended durable.
    ///
    /// # Errors
    /// None of what was appended since the last commit is there, nor will be. The next entry begins another file: after a
    /// failed sync, nobody knows what the pages of this one hold.
    pub fn commit(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|active| active.buffered > 0) else {
            return Ok(());
        };
        let Some(segment) = self.segments.get_mut(&active.number) else {
            unreachable!("an active segment is known")
        };
        let written =
            write(&active.file, &active.buffer, segment.size).and_then(|()| sync(&active.file));
        let (count, bytes) = (active.buffered, active.buffer.len() as u64);
        active.buffer.clear();
        active.buffered = 0;
        match written {
            Ok(()) => {
                segment.count += count;
                segment.size += bytes;
                if segment.size >= self.segment_max {
                    self.seal();
                }
                Ok(())
            }
            Err(why) => {
                let void = segment.count..segment.count + count;
                let number = active.number;
                // Neither a start that reads this file nor anyone else may find what nobody was told is safe.
                let cut = active
                    .file
                    .set_len(segment.size)
                    .and_then(|()| active.file.sync_data());
                self.active = None;
                self.held
                    .retain(|key| key.segment != number || !void.contains(&key.ordinal));
                if cut.is_err() {
                    self.disown(number, void);
                }
                Err(why)
            }
        }
    }

    /// Marks an entry as settled: it is not read any more. On disk this is after the next [`Log::flush`].
    pub fn settle(&mut self, key: Position) {
        self.held.remove(&key);
        let Some(segment) = self.segments.get_mut(&key.segment) else {
            return;
        };
        if key.ordinal < segment.count && segment.settled.insert(key.ordinal) {
            segment.settled.fresh.push(key.ordinal);
        }
    }

    /// Writes down what was settled, and gives back the disk space of what is wholly settled. Only if `durable` it also
    /// outlives a power cut; without, what was settled last may come again after one.
    pub fn flush(&mut self, durable: bool) -> io::Result<()> {
        self.give_back()?;
        for (number, segment) in &mut self.segments {
            if segment.settled.fresh.is_empty() {
                continue;
            }
            segment.settled.fresh.sort_unstable();
            let runs = runs(&segment.settled.fresh, segment.salt);
            let path = self
                .folder
                .join(file_name(&self.name, *number, segment.salt, "done"));
            let file = append_runs(&path, &runs)?;
            if durable {
                sync(&file)?;
            }
            segment.settled.fresh.clear();
        }
        // A new file, or the end of one, is as durable as its folder.
        if durable {
            sync(&File::open(&self.folder)?)
        } else {
            Ok(())
        }
    }

    /// The oldest entry that was neither read, nor settled, nor held. A segment that the disk does not give, call after call, is left out,
    /// and named, until the next [`Log::rewind`].
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
                Ok(Read::Entry(ordinal, payload)) => {
                    self.failures = 0;
                    return Some((
                        Position {
                            segment: number,
                            ordinal,
                        },
                        payload,
                    ));
                }
                Ok(Read::Nothing) => {}
                Ok(Read::UpToDate) => return None,
                Ok(Read::End) => self.passed = Some(number),
                Err(why) if self.failures < READ_TRIES => {
                    self.failures += 1;
                    tracing::warn!(file = %self.path(number, "log").display(), %why, "the spool cannot be read just now");
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
                        // What comes later can be read.
                        self.active = None;
                    }
                }
            }
        }
    }

    /// Reads one item at `cursor`, and moves on unless the segment ends there.
    fn read(&mut self, mut cursor: Cursor) -> (u32, io::Result<Read>) {
        let number = cursor.segment;
        // One that was settled whole is gone.
        let Some(segment) = self.segments.get(&number) else {
            return (number, Ok(Read::End));
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
                    Read::Entry(ordinal, payload)
                } else {
                    Read::Nothing
                }
            }
            Ok(Some(Item::Frame { .. })) => Read::Nothing,
            Ok(Some(Item::Damage { at, size })) => {
                cursor.damage = Some((at, size));
                Read::Nothing
            }
            Ok(None)
                if self
                    .active
                    .as_ref()
                    .is_some_and(|active| active.number == number) =>
            {
                Read::UpToDate
            }
            Ok(None) => {
                let end = segment.count;
                self.miss(&mut cursor, end);
                return (number, Ok(Read::End));
            }
            Err(why) => return (number, Err(why)),
        };
        self.cursor = Some(cursor);
        (number, Ok(read))
    }

    /// Begins to read again with the oldest unsettled entry. Nothing is held any more.
    pub fn rewind(&mut self) {
        self.held.clear();
        (self.cursor, self.passed) = (None, None);
    }

    /// Every unsettled entry, oldest first, until `visit` says that it is enough.
    pub fn visit(&mut self, mut visit: impl FnMut(Position, Vec<u8>) -> bool) {
        let place = (self.cursor.take(), self.passed.take());
        let held = std::mem::take(&mut self.held);
        while let Some((key, payload)) = self.next()
            && visit(key, payload)
        {}
        (self.cursor, self.passed) = place;
        self.held = held;
    }

    fn parse(&self, file: &str) -> Option<(u32, u32)> {
        let rest = file
            .strip_prefix(&self.name)?
            .strip_prefix('-')?
            .strip_suffix(".log")?;
        let (number, salt) = rest.split_once('-')?;
        Some((number.parse().ok()?, u32::from_str_radix(salt, 16).ok()?))
    }

    fn path(&self, number: u32, ending: &str) -> PathBuf {
        let salt = self.segments.get(&number).map_or(0, |segment| segment.salt);
        self.folder
            .join(file_name(&self.name, number, salt, ending))
    }

    fn begin_segment(&mut self) -> io::Result<Active> {
        let number = self.next_number;
        #[expect(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
        let salt = RandomState::new().hash_one(number) as u32;
        let path = self.folder.join(file_name(&self.name, number, salt, "log"));
        let file = OpenOptions::new().create_new(true).write(true).open(path)?;
        self.next_number += 1;
        self.segments.insert(number, Segment::new(salt));
        sync(&File::open(&self.folder)?)?;
        Ok(Active {
            number,
            file,
            buffer: Vec::new(),
            buffered: 0,
        })
    }

    /// Ends the active segment. Without its seal, it is read whole at the next start.
    fn seal(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        let Some(segment) = self.segments.get_mut(&active.number) else {
            return;
        };
        let mut seal = Vec::with_capacity(SEAL_SIZE);
        frame::write(&mut seal, segment.salt, SEAL, &segment.count.to_le_bytes());
        if write(&active.file, &seal, segment.size).is_ok() {
            segment.size += seal.len() as u64;
        }
    }

    /// Reads what an earlier run has left of a segment.
    fn find(&mut self, number: u32) -> io::Result<()> {
        let file = File::open(self.path(number, "log"))?;
        let size = file.metadata()?.len();
        let Some(segment) = self.segments.get_mut(&number) else {
            return Ok(());
        };
        let salt = segment.salt;
        segment.size = size;
        if let Some(count) = read_seal(&file, size, salt) {
            segment.count = count;
        } else {
            let mut scanner = Scanner::new(file, salt);
            let (mut count, mut missing, mut damages) = (0, Vec::new(), Vec::new());
            while let Some(item) = scanner.next(size)? {
                match item {
                    Item::Frame { ordinal: SEAL, .. } => {}
                    Item::Frame { ordinal, .. } => {
                        missing.push(count..ordinal);
                        count = ordinal + 1;
                    }
                    Item::Damage { at, size } => damages.push((at, size)),
                }
            }
            segment.count = count;
            let mut is_kept = true;
            for (at, size) in damages {
                is_kept &= self.set_aside(number, at, size, &scanner);
            }
            let Some(segment) = self.segments.get_mut(&number) else {
                return Ok(());
            };
            // Without a copy, what is missing counts on.
            for ordinal in missing.into_iter().flatten().filter(|_| is_kept) {
                segment.settled.insert(ordinal);
            }
        }
        let runs = self.path(number, "done");
        let Some(segment) = self.segments.get_mut(&number) else {
            return Ok(());
        };
        segment.settled.read(&runs, salt, segment.count)
    }

    /// The first segment that is not passed, and a cursor at its beginning.
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

    /// Names a segment that the disk does not give.
    fn leave_out(&self, number: u32, why: &io::Error) {
        let file = self.path(number, "log");
        tracing::error!(file = %file.display(), %why, "a file of the spool cannot be read: what it holds waits there");
    }

    /// The cursor has come to the entry `found`: those that it should have met before are damaged, and count no longer. What was
    /// settled, or told at the start, costs nothing.
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

    /// Whether there is a copy of the damage now.
    fn set_aside(&mut self, number: u32, at: u64, size: u64, scanner: &Scanner) -> bool {
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

    /// The copy outlives a power cut before the segment goes.
    fn keep(&self, copy: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(copy, bytes)?;
        sync(&File::open(copy)?)?;
        sync(&File::open(&self.folder)?)
    }

    /// Settles entries on disk that could not be cut off it. If this fails as well, a start may find them: then they go
    /// out though their senders were refused, which the guarantee allows.
    fn disown(&mut self, number: u32, ordinals: std::ops::Range<u32>) {
        let Some(segment) = self.segments.get(&number) else {
            return;
        };
        let runs = runs(&ordinals.collect::<Vec<_>>(), segment.salt);
        if let Err(why) = append_runs(&self.path(number, "done"), &runs) {
            tracing::warn!(%why, "entries that were refused cannot be struck out");
        }
    }

    /// Removes the segments whose entries are all settled.
    fn give_back(&mut self) -> io::Result<()> {
        let active = self
            .active
            .as_ref()
            .map(|active| (active.number, active.buffered));
        let is_over = |number: u32, segment: &Segment| {
            segment.settled.count == segment.count
                && !segment.stays
                && active.is_none_or(|(active, buffered)| {
                    active != number || buffered == 0 && segment.size > SETTLED_KEPT
                })
        };
        let over: Vec<_> = self
            .segments
            .iter()
            .filter(|(number, segment)| is_over(**number, segment))
            .map(|(&n, _)| n)
            .collect();
        for number in over {
            if active.is_some_and(|(active, _)| active == number) {
                self.active = None;
            }
            for ending in ["log", "done"] {
                match fs::remove_file(self.path(number, ending)) {
                    Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
                    _ => {}
                }
            }
            self.segments.remove(&number);
        }
        Ok(())
    }
}

fn file_name(name: &str, number: u32, salt: u32, ending: &str) -> String {
    format!("{name}-{number:010}-{salt:08x}.{ending}")
}

/// Writes `bytes` at `at`, where a test may make the disk fail.
fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    fail::fail_point!("spool-write", |_| Err(io::ErrorKind::StorageFull.into()));
    file.write_all_at(bytes, at)
}

/// Whether a test makes the disk fail.
pub fn is_failing() -> bool {
    fail::fail_point!("spool-write", |_| true);
    false
}

fn sync(file: &File) -> io::Result<()> {
    fail::fail_point!("spool-sync", |_| Err(io::Error::other("injected")));
    file.sync_data()
}

/// The count of entries, if the file ends with a seal.
fn read_seal(file: &File, size: u64, salt: u32) -> Option<u32> {
    let mut end = [0; SEAL_SIZE];
    file.read_exact_at(&mut end, size.checked_sub(SEAL_SIZE as u64)?)
        .ok()?;
    match frame::read(&end, salt) {
        frame::Read::Frame {
            ordinal: SEAL,
            payload,
            ..
        } => payload.try_into().ok().map(u32::from_le_bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
