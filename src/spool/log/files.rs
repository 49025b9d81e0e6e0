//! The files of a queue: their names, their seals, and what a start finds in them.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt as _,
};

use super::{Log, SEAL, SEAL_SIZE, SETTLED_KEPT, Segment};
use crate::spool::{
    frame,
    scan::{Item, Scanner},
    settled::{append_runs, runs},
};

impl Log {
    /// Reads what an earlier run has left of a segment: from its seal, or else the whole file.
    pub(super) fn find(&mut self, number: u32) -> io::Result<()> {
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
            // Without a copy, missing entries stay counted.
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

    /// Removes the segments whose entries are all settled.
    pub(super) fn give_back(&mut self) -> io::Result<()> {
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

    /// Settles entries on disk that could not be cut off. If this fails too, the next start may find them: then they are sent though
    /// their clients were refused, which the guarantee allows.
    pub(super) fn disown(&mut self, number: u32, ordinals: Range<u32>) {
        let Some(segment) = self.segments.get(&number) else {
            return;
        };
        let runs = runs(&ordinals.collect::<Vec<_>>(), segment.salt);
        if let Err(why) = append_runs(&self.path(number, "done"), &runs) {
            tracing::warn!(%why, "cannot strike out entries whose clients were refused");
        }
    }
}

pub(super) fn file_name(name: &str, number: u32, salt: u32, ending: &str) -> String {
    format!("{name}-{number:010}-{salt:08x}.{ending}")
}

/// Writes `bytes` at `at`. A test may make the disk fail here.
pub(super) fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    fail::fail_point!("spool-write", |_| Err(io::ErrorKind::StorageFull.into()));
    file.write_all_at(bytes, at)
}

/// Whether a test makes the disk fail at present.
pub fn is_failing() -> bool {
    fail::fail_point!("spool-write", |_| true);
    false
}

pub(super) fn sync(file: &File) -> io::Result<()> {
    fail::fail_point!("spool-sync", |_| Err(io::Error::other("injected")));
    file.sync_data()
}

/// The count of entries, if the file ends with a seal.
pub(super) fn read_seal(file: &File, size: u64, salt: u32) -> Option<u32> {
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
