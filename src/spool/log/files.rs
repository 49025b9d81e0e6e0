//! The files of a queue: their seals, their ends, and the entries that a start finds in them.

use std::{fs::File, io, ops::Range, path::Path};

use super::{Damage, Log, SEAL, SEAL_SIZE, SETTLED_KEPT, Segment};
use crate::spool::{
    disk::{self, sync},
    frame,
    scan::{Item, Scanner},
    settled::{append_runs, runs},
};

impl Log {
    /// Loads a segment of an earlier run: by its seal, or else by reading the whole file.
    pub(super) fn load(&mut self, segment: &mut Segment) -> io::Result<()> {
        let file = File::open(segment.file("log"))?;
        segment.size = file.metadata()?.len();
        match read_seal(&file, segment) {
            Some(count) => segment.count = count,
            None => self.scan(segment, file)?,
        }
        let settled = segment.file("done");
        segment.settled.read(&settled, segment.salt, segment.count)
    }

    fn scan(&mut self, segment: &mut Segment, file: File) -> io::Result<()> {
        let mut scanner = Scanner::new(file, segment.salt);
        let mut missing = Vec::new();
        while let Some(item) = scanner.next(segment.size)? {
            match item {
                Item::Frame { ordinal: SEAL, .. } => {}
                Item::Frame { ordinal, .. } => {
                    missing.push(segment.count..ordinal);
                    segment.count = ordinal + 1;
                }
                Item::Damage { at, mut size } => {
                    if at + size == segment.size {
                        // Zeros that were written ahead are no damage.
                        let bytes = scanner.bytes(at, size)?;
                        let last = bytes.iter().rposition(|byte| *byte != 0);
                        size = last.map_or(0, |last| last as u64 + 1);
                        segment.size = at + size;
                    }
                    if size > 0 {
                        self.damages.push(segment.set_aside(at, size, &scanner));
                    }
                }
            }
        }
        // Without a copy, missing entries stay counted.
        if !segment.stays {
            for ordinal in missing.into_iter().flatten() {
                segment.settled.insert(ordinal);
            }
        }
        Ok(())
    }

    /// Deletes the segments whose entries are all settled.
    pub(super) fn delete_settled(&mut self) -> io::Result<()> {
        let active = self.active.as_ref();
        let active = active.map(|active| (active.number, active.buffered));
        let is_over = |number: u32, segment: &Segment| {
            segment.settled.count == segment.count
                && !segment.stays
                && active.is_none_or(|(active, buffered)| {
                    active != number || buffered == 0 && segment.size > SETTLED_KEPT
                })
        };
        let over = self.segments.iter();
        let over = over.filter(|(number, segment)| is_over(**number, segment));
        for number in over.map(|(number, _)| *number).collect::<Vec<_>>() {
            if self.is_active(number) {
                self.active = None;
            }
            remove(&self.segments[&number].file("log"))?;
            let segment = self.segments.remove(&number);
            self.ended
                .extend(segment.map(|segment| segment.file("done")));
        }
        self.sync_ended()
    }

    /// Makes the end of deleted segments durable.
    pub(super) fn sync_ended(&mut self) -> io::Result<()> {
        if self.ended.is_empty() {
            return Ok(());
        }
        // A power cut must not bring entries back without the file that says that they are settled.
        sync(&File::open(&self.folder)?)?;
        while let Some(done) = self.ended.last() {
            remove(done)?;
            self.ended.pop();
        }
        Ok(())
    }

    pub(super) fn is_active(&self, number: u32) -> bool {
        let active = self.active.as_ref();
        active.is_some_and(|active| active.number == number)
    }
}

impl Segment {
    /// Settles entries on disk that could not be cut off. If this fails too, the next start may
    /// find them. Then they are sent though their clients were refused, which the guarantee allows.
    pub(super) fn settle_on_disk(&self, ordinals: Range<u32>) {
        let runs = runs(&ordinals.collect::<Vec<_>>(), self.salt);
        if let Err(why) = append_runs(&self.file("done"), &runs) {
            tracing::warn!(reason = %why, "cannot remove entries whose clients were refused");
        }
    }

    /// Copies damaged bytes to a file of their own. If that fails, the segment stays.
    pub(super) fn set_aside(&mut self, at: u64, size: u64, scanner: &Scanner) -> Damage {
        let copy = self.file(&format!("{at}.damaged"));
        let bytes = scanner.bytes(at, size);
        let kept = bytes.and_then(|bytes| write_durably(&copy, &bytes));
        self.stays |= kept.is_err();
        Damage {
            file: self.file("log"),
            at,
            size,
            kept: kept.is_ok().then_some(copy),
        }
    }

    pub(super) fn log_unreadable(&self, why: &io::Error) {
        let file = self.file("log");
        tracing::error!(file = %file.display(), reason = %why, "cannot read a file of the spool: its entries wait there");
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> io::Result<()> {
    match disk::remove(path) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    disk::replace(path, bytes)?;
    sync(&File::open(path)?)?;
    sync(&File::open(path.parent().unwrap_or(path))?)
}

/// The count of entries, if the file ends with a seal.
fn read_seal(file: &File, segment: &Segment) -> Option<u32> {
    let mut end = [0; SEAL_SIZE];
    let at = segment.size.checked_sub(SEAL_SIZE as u64)?;
    disk::read(file, &mut end, at).ok()?;
    match frame::read(&end, segment.salt) {
        frame::Read::Frame {
            ordinal: SEAL,
            payload,
            ..
        } => payload.try_into().ok().map(u32::from_le_bytes),
        _ => None,
    }
}
