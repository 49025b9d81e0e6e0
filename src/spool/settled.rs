//! The settled entries of a segment, in memory and on disk: runs of ordinals, each with its own
//! checksum.

use std::{fs::OpenOptions, io, path::Path};

use super::{
    disk,
    frame::{checksum, words},
};

/// The bytes of a run of settled ordinals: first, length, checksum.
pub const RUN: usize = 12;

/// The settled ordinals of a segment, a bit each.
#[derive(Default)]
pub struct SettledSet {
    bits: Vec<u64>,
    pub count: u32,
    /// Settled since the last flush.
    pub fresh: Vec<u32>,
    /// Written by a flush, and not synced yet.
    pub unsynced: bool,
    /// The file's name is durable.
    pub is_in_folder: bool,
}

impl SettledSet {
    pub fn contains(&self, ordinal: u32) -> bool {
        self.bits
            .get(ordinal as usize / 64)
            .is_some_and(|word| word & (1 << (ordinal % 64)) != 0)
    }

    /// Returns whether `ordinal` is new.
    pub fn insert(&mut self, ordinal: u32) -> bool {
        let at = ordinal as usize / 64;
        if self.bits.len() <= at {
            self.bits.resize(at + 1, 0);
        }
        let bit = 1 << (ordinal % 64);
        let new = self.bits[at] & bit == 0;
        self.bits[at] |= bit;
        self.count += u32::from(new);
        new
    }

    /// Adds the runs of `file`, which belongs to a segment of `count` entries. Without a file
    /// nothing is settled.
    pub fn read(&mut self, file: &Path, salt: u32, count: u32) -> io::Result<()> {
        let runs = match disk::read_all(file) {
            Ok(runs) => runs,
            Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(why) => return Err(why),
        };
        for run in runs.as_chunks::<RUN>().0 {
            let [first, length, crc] = words(run);
            // The entries of a damaged run come again.
            if checksum(salt, first, length, &[]) == crc {
                for ordinal in first..first.saturating_add(length).min(count) {
                    self.insert(ordinal);
                }
            }
        }
        Ok(())
    }
}

/// Sorted ordinals as runs.
pub fn runs(ordinals: &[u32], salt: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for run in ordinals.chunk_by(|before, after| before + 1 == *after) {
        let first = run[0];
        let length = u32::try_from(run.len()).unwrap_or(u32::MAX);
        for word in [first, length, checksum(salt, first, length, &[])] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// Appends whole runs only: half of one, as a full disk leaves it, would shift all later ones.
pub fn append_runs(path: &Path, runs: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let size = file.metadata()?.len();
    let whole = size - size % RUN as u64;
    if whole < size {
        file.set_len(whole)?;
    }
    disk::append(&file, runs)
}
