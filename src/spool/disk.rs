//! The calls that reach a queue's files. Tests make them fail here, or watch them: see
//! `simulated`.

use std::{
    fs::{self, File},
    hash::{BuildHasher as _, RandomState},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

#[cfg(test)]
pub mod simulated;
#[cfg(test)]
use self::simulated::{Call, see};

/// A number that nobody outside this process can guess.
pub fn salt() -> u32 {
    #[cfg(test)]
    if let Some(salt) = simulated::salt() {
        return salt;
    }
    #[expect(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
    let salt = RandomState::new().hash_one(0) as u32;
    salt
}

/// Creates a file that is not there yet.
pub fn create(path: &Path) -> io::Result<File> {
    #[cfg(test)]
    see(Call::Change)?;
    File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(path)
}

/// Writes `bytes` at `at`.
pub fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    fail::fail_point!("spool-write", |_| Err(io::ErrorKind::StorageFull.into()));
    #[cfg(test)]
    see(Call::Write(file, bytes, Some(at)))?;
    file.write_all_at(bytes, at)
}

/// Writes `bytes` at the end of a file that was opened for that.
pub fn append(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Write(file, bytes, None))?;
    file.write_all(bytes)
}

/// Makes a file of `bytes`, in the place of one that is there.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Change)?;
    fs::write(path, bytes)
}

/// Gives a file another name, in the place of one that has it.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Change)?;
    fs::rename(from, to)
}

/// Makes a file of `bytes`, in the place of one that is there: after a power cut, one of the two is
/// whole.
pub fn replace_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_added_extension("new");
    replace(&draft, bytes)?;
    sync(&File::open(&draft)?)?;
    rename(&draft, path)?;
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    sync(&File::open(folder.unwrap_or(Path::new(".")))?)
}

/// Makes the content of a file or a folder durable.
pub fn sync(file: &File) -> io::Result<()> {
    fail::fail_point!("spool-sync", |_| Err(io::Error::other("injected")));
    #[cfg(test)]
    see(Call::Sync(file))?;
    file.sync_data()
}

/// Shortens a file. A power cut may undo that.
pub fn shorten(file: &File, size: u64) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Change)?;
    file.set_len(size)
}

/// Shortens a file, durably.
pub fn cut_off(file: &File, size: u64) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Change)?;
    file.set_len(size)?;
    #[cfg(test)]
    see(Call::Sync(file))?;
    file.sync_data()
}

pub fn remove(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Change)?;
    fs::remove_file(path)
}

/// Fills `bytes` from `at` on.
pub fn read(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    #[cfg(test)]
    see(Call::Read)?;
    file.read_exact_at(bytes, at)
}

pub fn read_all(path: &Path) -> io::Result<Vec<u8>> {
    #[cfg(test)]
    see(Call::Read)?;
    fs::read(path)
}

/// Whether a test makes the disk fail at present.
pub fn is_failing() -> bool {
    fail::fail_point!("spool-write", |_| true);
    false
}
