//! One queue on disk: entries in the order in which they came, in segments of a bounded size. A
//! segment is deleted when all of its entries are settled.
//!
//! `NAME-NUMBER-SALT.log` holds entries as [`frame`]s. The last frame of a full segment is a seal
//! with their count, so that a start reads the last segment only. `NAME-NUMBER-SALT.done` holds
//! runs of settled ordinals, each with its own checksum. Everything here blocks.

mod active;
mod files;
mod place;
mod reader;

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use self::active::Active;
use super::{
    disk::{self, sync, write},
    frame,
    settled::{RUN, SettledSet, append_runs, runs},
};

pub use self::{
    place::{FileIdentity, check_place},
    reader::Reading,
};

/// A segment that has grown past this is sealed, unless [`Log::open`] gets a smaller size.
pub const SEGMENT_MAX: u64 = 16 << 20;
/// The disk space that the active segment may keep though all of its entries are settled.
const SETTLED_KEPT: u64 = 1 << 20;
/// The tries to read a file: a flood of connections may have taken all descriptors for a while.
const READ_TRIES: u32 = 10;
/// The ordinal of a seal.
const SEAL: u32 = u32::MAX;
/// A seal's frame: the count of entries.
const SEAL_SIZE: usize = frame::HEAD + 4;

/// The place of an entry in its queue. Places are in the order of their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    segment: u32,
    ordinal: u32,
}

impl Position {
    /// Comes after all places, and is none: a seal has no entry.
    pub const NONE: Self = Self {
        segment: u32::MAX,
        ordinal: SEAL,
    };

    pub const fn of(segment: u32, ordinal: u32) -> Self {
        Self { segment, ordinal }
    }
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

#[derive(Default)]
struct Segment {
    /// The path of its files without their endings.
    base: PathBuf,
    salt: u32,
    /// Entries have the ordinals below this.
    count: u32,
    /// Bytes of whole, synced frames.
    size: u64,
    settled: SettledSet,
    /// Its file, while that is not where the next start would look for it.
    adrift: Option<File>,
    /// It has damage that could not be copied. It stays until a start that can.
    stays: bool,
}

impl Segment {
    fn file(&self, ending: &str) -> PathBuf {
        self.base.with_added_extension(ending)
    }

    fn len(&self) -> u64 {
        u64::from(self.count - self.settled.count)
    }
}

/// One queue. Dropping it closes its files. Entries that were not committed are lost.
#[derive(Default)]
pub struct Log {
    folder: PathBuf,
    name: String,
    segments: BTreeMap<u32, Segment>,
    next_number: u32,
    /// The number of the first segment of this run.
    first_own: u32,
    active: Option<Active>,
    reading: Reading,
    /// Entries that [`Log::next`] skips.
    held: HashSet<Position>,
    /// Tries in a row that could not read the next entry.
    failures: u32,
    /// [`Log::next`] has left out a segment.
    left_out: bool,
    segment_max: u64,
    /// [`Log::next`] ends before this segment, if there is one.
    read_end: Option<u32>,
    damages: Vec<Damage>,
    /// Files that say what is settled in segments that are deleted. They go once that is durable.
    ended: Vec<PathBuf>,
}

impl Log {
    /// Opens the queue `name` in `folder` with the entries of an earlier run, in segments of about
    /// `segment_max` bytes. Damage is not an error: see [`Log::damages`].
    pub fn open(folder: &Path, name: &str, segment_max: u64) -> io::Result<Self> {
        let mut log = Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            segment_max: segment_max.min(SEGMENT_MAX),
            ..Self::default()
        };
        let mut same_number = Vec::new();
        for entry in fs::read_dir(folder)? {
            let file = entry?.file_name();
            let Some((number, salt)) = file.to_str().and_then(|file| log.parse(file)) else {
                continue;
            };
            log.next_number = log.next_number.max(number + 1);
            let mut segment = log.new_segment(number, salt);
            match log.load(&mut segment) {
                Ok(()) => same_number.extend(log.segments.insert(number, segment)),
                Err(why) => segment.log_unreadable(&why),
            }
        }
        // A folder that is put in the place of another, or restored from a copy, may have both.
        for segment in same_number {
            tracing::warn!(
                file = %segment.file("log").display(),
                entries = segment.len(),
                "another file of the queue has the same number, as if the folders of two nodes had \
                 been put together: both are read"
            );
            log.segments.insert(log.next_number, segment);
            log.next_number += 1;
        }
        log.first_own = log.next_number;
        if let Err(why) = log.delete_settled() {
            tracing::warn!(folder = %folder.display(), reason = %why, "cannot delete what is settled: it is tried again");
        }
        Ok(log)
    }

    /// Whether it has files. Without any there is nothing to count or to write. Most queues
    /// have none, and each commit asks.
    pub fn has_files(&self) -> bool {
        !self.segments.is_empty() || !self.ended.is_empty()
    }

    /// Unsettled entries on disk.
    pub fn len(&self) -> u64 {
        self.segments.values().map(Segment::len).sum()
    }

    /// Unsettled entries that [`Log::next`] returns, once all before them are read.
    pub fn readable(&self) -> u64 {
        let end = self.read_end.unwrap_or(u32::MAX);
        let readable = self.segments.range(..end);
        readable.map(|(_, segment)| segment.len()).sum()
    }

    /// The end of the entries that [`Log::next`] returns at present: a segment, and an ordinal.
    pub fn end(&self) -> (u32, u32) {
        let last = self.segments.last_key_value();
        let end = last.map_or((0, 0), |(number, segment)| (*number, segment.count));
        self.read_end.map_or(end, |number| (number, 0))
    }

    /// Lets [`Log::next`] return nothing until [`Log::read_present`].
    pub fn read_nothing(&mut self) {
        self.read_end = Some(0);
    }

    /// Lets [`Log::next`] go on to the entries that are there, and to none that comes later.
    pub fn read_present(&mut self) {
        self.seal();
        self.read_end = Some(self.next_number);
    }

    /// The place of the last entry, settled or not.
    pub fn last(&self) -> Option<Position> {
        let segments = self.segments.iter().rev();
        let mut last = segments.filter_map(|(&segment, it)| {
            let ordinal = it.count.checked_sub(1)?;
            Some(Position { segment, ordinal })
        });
        last.next()
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

    /// About the bytes of unsettled entries. The others leave the disk by whole segments.
    pub fn live_bytes(&self) -> u64 {
        let live =
            |segment: &Segment| segment.size * segment.len() / u64::from(segment.count.max(1));
        self.segments.values().map(live).sum()
    }

    /// The damages found since the last call.
    pub fn damages(&mut self) -> Vec<Damage> {
        std::mem::take(&mut self.damages)
    }

    /// Adds an entry, which is durable after the next [`Log::commit`]. Until [`Log::rewind`],
    /// [`Log::next`] skips an entry that is `held`.
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

    /// Makes the appended entries durable.
    ///
    /// # Errors
    /// None of the entries appended since the last commit is there, nor will be. The next entry
    /// begins another file: after a failed sync, the content of this one's pages is unknown.
    pub fn commit(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut().filter(|active| active.buffered > 0) else {
            return Ok(());
        };
        let Some(segment) = self.segments.get_mut(&active.number) else {
            unreachable!("an active segment is known")
        };
        let written = write(&active.file, &active.buffer, segment.size)
            .inspect(|()| active.write_ahead(segment.size))
            .and_then(|()| sync(&active.file))
            // Synced bytes are safe only where the next start looks for them.
            .and_then(|()| check_place(&active.file, &segment.file("log")));
        let count = std::mem::take(&mut active.buffered);
        let bytes = active.buffer.len() as u64;
        active.buffer.clear();
        if let Err(why) = written {
            // These entries were refused, so no later start may find them.
            let refused = segment.count..segment.count + count;
            if disk::cut_off(&active.file, segment.size).is_err() {
                segment.settle_on_disk(refused.clone());
            }
            let number = active.number;
            self.take_active_if_adrift();
            self.active = None;
            self.held
                .retain(|key| key.segment != number || !refused.contains(&key.ordinal));
            return Err(why);
        }
        segment.count += count;
        segment.size += bytes;
        if segment.size >= self.segment_max {
            self.seal();
        }
        Ok(())
    }

    /// Whether the entry is there, and not settled.
    pub fn contains(&self, key: Position) -> bool {
        let segment = self.segments.get(&key.segment);
        segment.is_some_and(|segment| {
            key.ordinal < segment.count && !segment.settled.contains(key.ordinal)
        })
    }

    /// Marks an entry as settled: it is not read any more. The next [`Log::flush`] writes that.
    /// Returns whether the entry was there.
    pub fn settle(&mut self, key: Position) -> bool {
        self.held.remove(&key);
        let Some(segment) = self.segments.get_mut(&key.segment) else {
            return false;
        };
        let is_there = key.ordinal < segment.count && segment.settled.insert(key.ordinal);
        if is_there {
            segment.settled.fresh.push(key.ordinal);
        }
        is_there
    }

    /// Marks the entries up to `last` as settled, except those that [`Log::read_present`] has let
    /// out.
    pub fn settle_through(&mut self, last: Position) {
        let first = self.read_end.unwrap_or(0);
        if last.segment < first {
            return;
        }
        for (number, segment) in self.segments.range_mut(first..=last.segment) {
            let end = if *number == last.segment {
                segment.count.min(last.ordinal + 1)
            } else {
                segment.count
            };
            for ordinal in 0..end {
                if segment.settled.insert(ordinal) {
                    segment.settled.fresh.push(ordinal);
                }
            }
        }
    }

    /// Writes which entries are settled, and deletes segments that are wholly settled. If it is not
    /// `durable`, the entries settled last may come again after a power cut.
    pub fn flush(&mut self, durable: bool) -> io::Result<()> {
        // A file that cannot go does not keep the other entries from being settled.
        let deleted = self.delete_settled();
        for segment in self.segments.values_mut() {
            if segment.settled.fresh.is_empty() {
                continue;
            }
            segment.settled.fresh.sort_unstable();
            let runs = runs(&segment.settled.fresh, segment.salt);
            append_runs(&segment.file("done"), &runs)?;
            segment.settled.fresh.clear();
            segment.settled.unsynced = true;
        }
        deleted?;
        if durable {
            self.sync_settled()?;
            // The end of a file is as durable as its folder.
            sync(&File::open(&self.folder)?)?;
        }
        Ok(())
    }

    /// Whether a power cut would bring settled entries back.
    pub fn has_unsynced(&self) -> bool {
        let mut segments = self.segments.values();
        !self.ended.is_empty() || segments.any(|segment| segment.settled.unsynced)
    }

    /// Makes what was flushed durable.
    pub fn sync_settled(&mut self) -> io::Result<()> {
        self.sync_ended()?;
        let mut has_new_file = false;
        let segments = self.segments.values_mut();
        for segment in segments.filter(|segment| segment.settled.unsynced) {
            match File::open(segment.file("done")) {
                // Somebody has removed it: the entries may come again.
                Err(why) if why.kind() == io::ErrorKind::NotFound => {}
                file => sync(&file?)?,
            }
            has_new_file |= !segment.settled.is_in_folder;
        }
        if has_new_file {
            sync(&File::open(&self.folder)?)?;
        }
        for segment in self.segments.values_mut() {
            segment.settled.is_in_folder |= segment.settled.unsynced;
            segment.settled.unsynced = false;
        }
        Ok(())
    }

    /// Reads again from the oldest unsettled entry on. Nothing is held any more.
    pub fn rewind(&mut self) {
        self.held.clear();
        self.reading = Reading::default();
    }

    fn parse(&self, file: &str) -> Option<(u32, u32)> {
        let rest = file
            .strip_prefix(&self.name)?
            .strip_prefix('-')?
            .strip_suffix(".log")?;
        let (number, salt) = rest.split_once('-')?;
        Some((number.parse().ok()?, u32::from_str_radix(salt, 16).ok()?))
    }

    fn new_segment(&self, number: u32, salt: u32) -> Segment {
        let name = format!("{}-{number:010}-{salt:08x}", self.name);
        Segment {
            base: self.folder.join(name),
            salt,
            ..Segment::default()
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod simulation;
