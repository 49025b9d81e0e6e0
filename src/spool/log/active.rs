//! The segment that a queue appends to.

use std::{fs::File, io};

use super::{Log, SEAL, SEAL_SIZE};
use crate::spool::{
    disk::{self, sync, write},
    frame,
};

/// The active segment is written ahead with zeros by as much as it has, and at most this. A sync of
/// what lies within does not change the file's size, which would cost another write of the disk.
const AHEAD_MAX: u64 = 256 << 10;

/// The segment that is appended to.
pub(super) struct Active {
    pub number: u32,
    pub file: File,
    /// The size of the file: there are zeros behind the frames.
    size: u64,
    /// Frames that are not on disk yet, and their count.
    pub buffer: Vec<u8>,
    pub buffered: u32,
}

impl Log {
    pub(super) fn begin_segment(&mut self) -> io::Result<Active> {
        let number = self.next_number;
        let segment = self.new_segment(number, disk::salt());
        if number == self.first_own {
            // A power cut must not bring back a file of an earlier run that has this number.
            sync(&File::open(&self.folder)?)?;
        }
        let file = disk::create(&segment.file("log"))?;
        self.next_number += 1;
        self.segments.insert(number, segment);
        sync(&File::open(&self.folder)?)?;
        Ok(Active {
            number,
            file,
            size: 0,
            buffer: Vec::new(),
            buffered: 0,
        })
    }

    /// Ends the active segment. If the seal cannot be written, the next start reads the whole
    /// segment.
    pub(super) fn seal(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        let Some(segment) = self.segments.get_mut(&active.number) else {
            return;
        };
        let mut seal = Vec::with_capacity(SEAL_SIZE);
        frame::write(&mut seal, segment.salt, SEAL, &segment.count.to_le_bytes());
        let end = segment.size + seal.len() as u64;
        let written = write(&active.file, &seal, segment.size);
        if written
            .and_then(|()| disk::shorten(&active.file, end))
            .is_ok()
        {
            segment.size = end;
        }
    }
}

impl Active {
    /// Writes zeros behind the buffer's frames, which begin `at` there, if they are the first
    /// beyond the zeros that are there.
    pub fn write_ahead(&mut self, at: u64) {
        let end = at + self.buffer.len() as u64;
        if end <= self.size {
            return;
        }
        self.size = end;
        let ahead = at.min(AHEAD_MAX);
        let zeros = vec![0; usize::try_from(ahead).unwrap_or_default()];
        // Without them there was room for the frames, which is all that these need.
        if write(&self.file, &zeros, end).is_ok() {
            self.size += ahead;
        }
    }
}
