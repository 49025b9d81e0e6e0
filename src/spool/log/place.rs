//! The file that is written is the file that the next start will read.
//!
//! An operator may remove or replace the folder or its files, or unmount it. Then the bytes go to a
//! file without a name, or with another one. The file stays open, so it can be written again.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use super::{Log, files::write_durably};
use crate::spool::settled::{append_runs, runs};

/// The device and the inode of an open file. They name it as long as it is open.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
}

impl FileIdentity {
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|found| Self::new(&found))
    }

    fn new(found: &Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
        }
    }

    /// Fails if `path` does not name the file.
    pub fn check_place(self, path: &Path) -> io::Result<()> {
        let found = fs::metadata(path).map_err(|why| {
            let what = format!("{}: {why}", path.display());
            io::Error::new(why.kind(), what)
        })?;
        if Self::new(&found) == self {
            Ok(())
        } else {
            let what = format!("{} is another file than the open one", path.display());
            Err(io::Error::other(what))
        }
    }
}

/// Fails if `path` does not name `file`.
pub fn check_place(file: &File, path: &Path) -> io::Result<()> {
    FileIdentity::of(file)?.check_place(path)
}

impl Log {
    /// Fails if the next start would not find the file that is appended to. The next entry begins
    /// another file then.
    pub fn check_place(&mut self) -> io::Result<()> {
        self.take_active_if_adrift().map_or(Ok(()), Err)
    }

    /// A file waits for [`Log::put_back`].
    pub fn is_adrift(&self) -> bool {
        let mut segments = self.segments.values();
        segments.any(|segment| segment.adrift.is_some())
    }

    /// Ends appending to a file that is not in its place. Returns what is wrong.
    pub(super) fn take_active_if_adrift(&mut self) -> Option<io::Error> {
        let active = self.active.take_if(|active| active.buffered == 0)?;
        let segment = self.segments.get_mut(&active.number)?;
        match check_place(&active.file, &segment.file("log")) {
            Ok(()) => {
                self.active = Some(active);
                None
            }
            Err(why) => {
                segment.adrift = Some(active.file);
                Some(why)
            }
        }
    }

    /// Writes the files that are not in their places again. Returns the number of unsettled entries
    /// in them.
    pub fn put_back(&mut self) -> io::Result<u64> {
        let mut entries = 0;
        for segment in self.segments.values_mut() {
            let path = segment.file("log");
            let Some(file) = &segment.adrift else {
                // It was not open, so nothing can bring it back.
                if segment.len() > 0
                    && let Err(why) = fs::metadata(&path)
                {
                    segment.log_unreadable(&why);
                }
                continue;
            };
            // The folder itself may be back.
            if check_place(file, &path).is_err() {
                let mut bytes = vec![0; usize::try_from(segment.size).unwrap_or(usize::MAX)];
                file.read_exact_at(&mut bytes, 0)?;
                write_durably(&path, &bytes)?;
                let settled = (0..segment.count).filter(|at| segment.settled.contains(*at));
                let settled: Vec<_> = settled.collect();
                append_runs(&segment.file("done"), &runs(&settled, segment.salt))?;
                segment.settled.unsynced = true;
                entries += segment.len();
            }
            segment.adrift = None;
        }
        if std::mem::take(&mut self.left_out) {
            self.rewind();
        }
        Ok(entries)
    }
}
