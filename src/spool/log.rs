//! One queue on disk: entries in the order in which they came, in segments of a bounded size. A segment is deleted when all of
//! its entries are settled.
//!
//! `NAME-NUMBER-SALT.log` holds entries as [`frame`]s, the last one of a full segment a seal with their count, so that a
//! start need not read what lies before the last segment. `NAME-NUMBER-SALT.done` holds runs of settled ordinals, each with its
//! own checksum. Everything here blocks.

mod files;
mod reader;

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    hash::{BuildHasher as _, RandomState},
    io,
    path::{Path, PathBuf},
};

use self::{
    files::{file_name, sync, write},
    reader::Cursor,
};
use super::{
    frame,
    settled::{RUN, SettledSet, append_runs, runs},
};

pub use self::files::is_failing;

/// A segment that has grown past this is sealed, unless [`Log::open`] is told a lesser size.
pub const SEGMENT_MAX: u64 = 16 << 20;
/// The disk space that the active segment may keep though all of its entries are settled.
const SETTLED_KEPT: u64 = 1 << 20;
/// How often a file that cannot be read is tried: a flood of connections may have taken all descriptors for a while.
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

/// Bytes that are not a whole entry any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub file: PathBuf,
    pub at: u64,
    pub size: u64,
    /// The file with a copy of them; `None` if it could not be written.
    pub kept: Option<PathBuf>,
}

struct Segment {
    salt: u32,
    /// Entries have the ordinals below this.
    count: u32,
    /// Bytes of whole, synced frames.
    size: u64,
    settled: SettledSet,
    /// It has damage that could not be copied. It stays until a start that can.
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
    /// Frames that are not on disk yet, and their count.
    buffer: Vec<u8>,
    buffered: u32,
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
    /// The last segment that [`Log::next`] has read to its end, if any.
    passed: Option<u32>,
    /// How often in a row the next entry could not be read.
    failures: u32,
    segment_max: u64,
    /// Entries that [`Log::next`] skips.
    held: HashSet<Position>,
    damages: Vec<Damage>,
}

impl Log {
    /// Opens the queue `name` in `folder` with the entries of an earlier run, in segments of about `segment_max` bytes. Damage is not
    /// an error: see [`Log::damages`].
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

    /// Unsettled entries that were there when the queue was opened.
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

    /// Adds an entry, which is durable after the next [`Log::commit`]. [`Log::next`] skips an entry that is `held` until
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
    /// Nothing that was appended since the last commit is there, nor will be. The next entry begins another file: after a failed
    /// sync, the content of this one's pages is unknown.
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
                // These entries were refused, so no later start may find them.
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

    /// Marks an entry as settled: it is not read any more. The next [`Log::flush`] writes that down.
    pub fn settle(&mut self, key: Position) {
        self.held.remove(&key);
        let Some(segment) = self.segments.get_mut(&key.segment) else {
            return;
        };
        if key.ordinal < segment.count && segment.settled.insert(key.ordinal) {
            segment.settled.fresh.push(key.ordinal);
        }
    }

    /// Writes down which entries are settled, and deletes segments that are wholly settled. Only if `durable` this outlives a power
    /// cut; else the entries settled last may come again after one.
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

    /// Reads again from the oldest unsettled entry on. Nothing is held any more.
    pub fn rewind(&mut self) {
        self.held.clear();
        (self.cursor, self.passed) = (None, None);
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

    /// Ends the active segment. If the seal cannot be written, the next start reads the whole segment.
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

    /// Logs a segment that cannot be read.
    fn leave_out(&self, number: u32, why: &io::Error) {
        let file = self.path(number, "log");
        tracing::error!(file = %file.display(), %why, "cannot read a file of the spool: its entries wait there");
    }
}

#[cfg(test)]
mod tests;
