//! A disk whose power can be cut: ext4 on a loop device that is shut down without a flush of data or
//! journal. Afterwards only what was synced is there.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;

use super::eventually;

/// The image is sparse.
const SIZE: u64 = 4 << 30;
/// How long a mount stays busy after its last process was killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A mounted disk.
pub struct Disk {
    /// Holds the image and the mount point.
    folder: TempDir,
}

impl Disk {
    /// `None`, with a message, where no disk can be mounted: it takes root and loop devices.
    pub fn new() -> Option<Self> {
        let is_root = fs::metadata("/proc/self")
            .is_ok_and(|process| std::os::unix::fs::MetadataExt::uid(&process) == 0);
        if !is_root || !Path::new("/dev/loop-control").exists() {
            super::did_not_run("it takes root and loop devices to cut the power of a disk");
            return None;
        }
        let disk = Self {
            folder: tempfile::tempdir().expect("a temporary folder"),
        };
        let image = File::create(disk.image()).expect("the folder is ours");
        image.set_len(SIZE).expect("a sparse file");
        fs::create_dir(disk.path()).expect("the folder is ours");
        let image = disk.image();
        assert!(run(
            "mkfs.ext4",
            ["-q".as_ref(), "-F".as_ref(), image.as_os_str()]
        ));
        // A container may be root and not allowed to mount.
        if !disk.try_mount() {
            super::did_not_run("this system does not let us mount a loop device");
            return None;
        }
        Some(disk)
    }

    /// The mount point.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    /// A new folder on the disk, as durable as its name.
    pub fn folder(&self, name: &str) -> String {
        let folder = self.path().join(name);
        fs::create_dir_all(&folder).expect("the disk is ours");
        File::open(self.path())
            .and_then(|parent| parent.sync_all())
            .expect("the disk can sync");
        folder.to_str().expect("a plain path").to_owned()
    }

    /// Cuts the power. Everything that was not synced is gone, and each later write fails. The
    /// processes on the disk do not know yet, so they are to be killed, and what they say meanwhile does
    /// not count: ext4 lets a sync succeed that waits for the journal while that is shut down, though its
    /// data are gone. A disk without power tells nobody anything.
    pub fn cut(&self) {
        let path = self.path();
        let shutdown = ["-x", "-c", "shutdown"].map(OsStr::new);
        let [expert, command, shutdown] = shutdown;
        assert!(run("xfs_io", [expert, command, shutdown, path.as_os_str()]));
    }

    /// Mounts the disk again, once the processes on it have ended.
    pub async fn restore(&self) {
        let path = self.path();
        eventually("the disk is unmounted", PATIENCE, async || {
            run("umount", [path.as_os_str()]).then_some(())
        })
        .await;
        assert!(self.try_mount(), "it was mounted before");
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn try_mount(&self) -> bool {
        let image = self.image();
        let path = self.path();
        let options = ["-o".as_ref(), "loop".as_ref()];
        run(
            "mount",
            [options[0], options[1], image.as_os_str(), path.as_os_str()],
        )
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a test that panics leaves processes on it, which end with the test binary.
        run("umount", ["-l".as_ref(), self.path().as_os_str()]);
    }
}

fn run<'a>(program: &str, arguments: impl IntoIterator<Item = &'a OsStr>) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    Command::new(program)
        .args(arguments)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
