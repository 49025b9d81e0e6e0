//! The folder that is written is the folder that the next start will read.

use std::{
    fmt::Display,
    fs::{self, File, TryLockError},
    io, mem,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use tracing::{error, info};

use super::Store;
use crate::spool::{
    NotSafe, OpenError, disk,
    log::{Log, check_place},
};

const LOCK: &str = "lock";

/// The folder as it was when the spool was opened.
pub struct FolderPlace {
    /// The open file also marks the folder: another folder does not have it.
    lock: File,
    was_mount: bool,
    /// Why the next start would not find what is written now.
    lost: Option<String>,
}

impl FolderPlace {
    /// Takes the folder for this process.
    pub fn lock(folder: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Folder {
            folder: folder.to_owned(),
            source,
        };
        let lock = File::create(folder.join(LOCK)).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(folder.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        Ok(Self {
            lock,
            was_mount: is_mount(folder).map_err(failed)?,
            lost: None,
        })
    }

    pub(super) fn check_not_lost(&self) -> Result<(), NotSafe> {
        let lost = self.lost.clone();
        lost.map_or(Ok(()), |why| Err(NotSafe::Disk(why)))
    }

    /// Takes the folder again. Fails while its volume is not mounted: the folder under the mount
    /// point is on another disk.
    fn lock_again(&mut self, folder: &Path) -> io::Result<()> {
        if self.was_mount && !is_mount(folder)? {
            return Err(io::Error::other("the folder's volume is not mounted"));
        }
        let path = folder.join(LOCK);
        if check_place(&self.lock, &path).is_err() {
            let lock = File::create(path)?;
            lock.try_lock()?;
            self.lock = lock;
        }
        Ok(())
    }
}

/// Whether a volume is mounted at `folder`.
fn is_mount(folder: &Path) -> io::Result<bool> {
    let above = fs::metadata(folder.join(".."))?;
    Ok(fs::metadata(folder)?.dev() != above.dev())
}

impl Store {
    /// Finds out whether the disk works again. A node that is not ready gets no records, and so no
    /// other sign.
    pub(super) fn probe(&mut self) {
        let path = self.folder.join("probe");
        let probe = fs::write(&path, [0; 4096]).and_then(|()| File::open(&path)?.sync_all());
        let works = probe.and_then(|()| self.restore());
        if works.is_ok() && !disk::is_failing() {
            self.works();
        }
        // The next probe overwrites a file that stays.
        fs::remove_file(&path).ok();
    }

    /// Logs the first failure of an episode.
    pub(super) fn fails(&mut self, why: &dyn Display) {
        if !mem::replace(&mut self.failing, true) {
            let folder = self.folder.display();
            error!(%folder, reason = %why, "the spool takes no records until its folder works again");
        }
    }

    pub(super) fn works(&mut self) {
        if mem::take(&mut self.failing) {
            info!(folder = %self.folder.display(), "the spool takes records again");
        }
    }

    /// Takes no more entries if the next start would not find them.
    pub(super) fn check_place(&mut self) {
        let folder = self.check_lock().err();
        let files = self.logs.iter_mut().map(|log| log.check_place().err());
        let why = files.fold(folder, Option::or).map(|why| why.to_string());
        // A commit may have found it.
        let is_adrift = self.logs.iter().any(Log::is_adrift);
        let why = why.or_else(|| is_adrift.then(|| "a file is not in its place".into()));
        if let Some(why) = why
            && self.place.lost.is_none()
        {
            self.fails(&why);
            self.place.lost = Some(why);
        }
    }

    /// The same, but only if the folder is another one. Each queue looks after the file that it
    /// writes.
    pub(super) fn check_folder(&mut self) {
        if self.check_lock().is_err() {
            self.check_place();
        }
    }

    fn check_lock(&self) -> io::Result<()> {
        check_place(&self.place.lock, &self.folder.join(LOCK))
    }

    /// Goes on in the folder, with the files that were open when they were lost.
    fn restore(&mut self) -> io::Result<()> {
        if self.place.lost.is_none() {
            return Ok(());
        }
        self.place.lock_again(&self.folder)?;
        let mut entries = 0;
        for log in &mut self.logs {
            entries += log.put_back()?;
        }
        self.place.lost = None;
        info!(folder = %self.folder.display(), entries, "the spool's files are in place again");
        Ok(())
    }
}
