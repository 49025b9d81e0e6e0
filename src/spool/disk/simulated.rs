//! A disk that a test can cut from its power. The files lie in a real folder, best in memory. For
//! each the disk keeps what the last sync has made durable. A power cut mixes that with what is
//! there:
//!
//! - Each sector that was not synced has its old bytes, its new ones, or a part of each. Beyond the
//!   old end of the file it may be zero. Sectors reach the disk in any order.
//! - A file has any size between the old and the new one.
//! - A name that was made since the last sync of the folder may be gone, one that was removed may
//!   be back.
//! - A sync that fails has written some sectors. The others stay as they were, even if a later sync
//!   succeeds, unless they are written again: their pages count as clean.
//!
//! Bytes that were synced stay, also in a sector that is written again: disks with a capacitor or
//! a journal hold that, and every database relies on it.
//!
//! Calls may also fail: a write after a part of its bytes.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Write as _},
    os::fd::AsRawFd as _,
    os::unix::fs::{DirEntryExt as _, FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use fastrand::Rng;

const SECTOR: usize = 512;

/// A call that is about to happen.
pub enum Call<'c> {
    /// At the end of the file if there is no offset.
    Write(&'c File, &'c [u8], Option<u64>),
    Sync(&'c File),
    /// To the names of a folder, or to the size of a file.
    Change,
    Read,
}

/// What fails, each in this percentage of its calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub writes: u8,
    pub syncs: u8,
    pub changes: u8,
    pub reads: u8,
}

/// How the next life of the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// What is written stays, as the kernel has it.
    Kill,
    PowerCut,
}

struct Synced {
    /// Open, so that no other file gets the inode.
    _file: File,
    bytes: Vec<u8>,
    /// Sectors that a failed sync has not written, and their bytes in memory.
    clean: BTreeMap<usize, Vec<u8>>,
}

pub struct Disk {
    folder: PathBuf,
    pub rng: Rng,
    /// Of its own, so that a salt changes nothing else.
    salts: Rng,
    /// By inode: what outlives a power cut for certain.
    files: HashMap<u64, Synced>,
    /// The same, of the folder.
    names: BTreeMap<String, u64>,
    pub faults: Faults,
    /// Calls that failed since the last look.
    pub failed: u32,
    /// The end comes before the call after so many.
    end: Option<(u32, End)>,
    has_ended: bool,
}

thread_local! {
    static DISK: RefCell<Option<Disk>> = const { RefCell::new(None) };
}

/// Begins to watch this thread's calls in `folder`, which is empty.
pub fn watch(folder: &Path, seed: u64) {
    let disk = Disk {
        folder: folder.to_owned(),
        rng: Rng::with_seed(seed),
        salts: Rng::with_seed(!seed),
        files: HashMap::new(),
        names: BTreeMap::new(),
        faults: Faults::default(),
        failed: 0,
        end: None,
        has_ended: false,
    };
    DISK.set(Some(disk));
}

pub fn with<T>(act: impl FnOnce(&mut Disk) -> T) -> T {
    DISK.with_borrow_mut(|disk| act(disk.as_mut().expect("a disk is watched")))
}

pub(super) fn see(call: Call<'_>) -> io::Result<()> {
    DISK.with_borrow_mut(|disk| disk.as_mut().map_or(Ok(()), |disk| disk.see(call)))
}

/// The salt of a file that this thread is about to create on a watched disk.
pub(super) fn salt() -> Option<u32> {
    DISK.with_borrow_mut(|disk| disk.as_mut().map(|disk| disk.salts.u32(..)))
}

impl Disk {
    /// Ends the program before the call after `calls` others, if it has not ended by then.
    pub fn end_after(&mut self, calls: u32, end: End) {
        self.end = Some((calls, end));
    }

    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Ends the program at once if it still runs. Then it may start again.
    pub fn end_now(&mut self) {
        if !self.has_ended
            && let Some((_, end)) = self.end
        {
            self.end(end);
        }
        self.end = None;
        self.has_ended = false;
    }

    /// Changes the files as they are durable, as if the medium had lost a bit.
    pub fn flip_bit_of(&mut self, name: &str, bit: usize) {
        let Some(file) = self
            .names
            .get(name)
            .and_then(|file| self.files.get_mut(file))
        else {
            panic!("no such file: {name}")
        };
        file.bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(self.folder.join(name), &file.bytes).unwrap();
    }

    fn see(&mut self, call: Call<'_>) -> io::Result<()> {
        if self.has_ended {
            return Err(io::Error::other("the program has ended"));
        }
        match &mut self.end {
            Some((0, end)) => {
                let end = *end;
                self.end(end);
                return Err(io::Error::other("the program has ended"));
            }
            Some((calls, _)) => *calls -= 1,
            None => {}
        }
        let percentage = match call {
            Call::Write(..) => self.faults.writes,
            Call::Sync(_) => self.faults.syncs,
            Call::Change => self.faults.changes,
            Call::Read => self.faults.reads,
        };
        let fails = self.rng.u8(0..100) < percentage;
        self.failed += u32::from(fails);
        match call {
            Call::Sync(file) => self.sync(file, fails),
            Call::Write(file, bytes, at) if fails => {
                let part = &bytes[..self.rng.usize(0..=bytes.len())];
                match at {
                    Some(at) => file.write_all_at(part, at).unwrap(),
                    None => (&*file).write_all(part).unwrap(),
                }
            }
            _ => {}
        }
        if fails {
            return Err(io::Error::other("the disk fails"));
        }
        Ok(())
    }

    fn sync(&mut self, file: &File, fails: bool) {
        let meta = file.metadata().unwrap();
        if meta.is_dir() {
            if !fails {
                self.names = present(&self.folder);
            }
            return;
        }
        let now = read(file);
        let synced = self.files.entry(meta.ino()).or_insert_with(|| Synced {
            _file: file.try_clone().unwrap(),
            bytes: Vec::new(),
            clean: BTreeMap::new(),
        });
        let mut durable = now.clone();
        if fails {
            durable = mix(&synced.bytes, &now, &mut self.rng);
            for sector in 0..now.len().div_ceil(SECTOR) {
                if part(&durable, sector) != part(&now, sector) {
                    synced.clean.insert(sector, part(&now, sector).to_vec());
                }
            }
        } else {
            synced
                .clean
                .retain(|&sector, bytes| part(&now, sector) == bytes);
            for &sector in synced.clean.keys() {
                let old = part(&synced.bytes, sector);
                let place = &mut durable[sector * SECTOR..];
                let size = place.len().min(SECTOR);
                place[..size].fill(0);
                let size = size.min(old.len());
                place[..size].copy_from_slice(&old[..size]);
            }
        }
        synced.bytes = durable;
    }

    fn end(&mut self, end: End) {
        self.has_ended = true;
        if end == End::Kill {
            return;
        }
        let present = present(&self.folder);
        let all: Vec<_> = self.names.keys().chain(present.keys()).cloned().collect();
        let mut left = BTreeMap::new();
        for name in all {
            if left.contains_key(&name) {
                continue;
            }
            let (old, new) = (self.names.get(&name), present.get(&name));
            let stays = old.is_some() && old == new || self.rng.bool();
            let inode = new.or(old).filter(|_| stays);
            let bytes = inode.map(|inode| {
                let synced = self.files.get(inode);
                let old = synced.map_or(&[][..], |synced| &synced.bytes);
                match new {
                    Some(_) => {
                        let new = fs::read(self.folder.join(&name)).unwrap();
                        mix(old, &new, &mut self.rng)
                    }
                    None => old.to_vec(),
                }
            });
            left.insert(name, bytes);
        }
        self.files.clear();
        for name in present.keys() {
            fs::remove_file(self.folder.join(name)).unwrap();
        }
        for (name, bytes) in left {
            let Some(bytes) = bytes else { continue };
            let path = self.folder.join(&name);
            fs::write(&path, &bytes).unwrap();
            let file = File::open(&path).unwrap();
            let clean = BTreeMap::new();
            let inode = file.metadata().unwrap().ino();
            self.files.insert(
                inode,
                Synced {
                    _file: file,
                    bytes,
                    clean,
                },
            );
        }
        self.names = self::present(&self.folder);
    }
}

fn present(folder: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.ino()))
        .collect()
}

/// Of a file that may be open for writing only.
fn read(file: &File) -> Vec<u8> {
    fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

fn part(bytes: &[u8], sector: usize) -> &[u8] {
    let from = (sector * SECTOR).min(bytes.len());
    &bytes[from..bytes.len().min(from + SECTOR)]
}

/// What a power cut leaves of a file that was `old` at its last sync and is `new` now.
fn mix(old: &[u8], new: &[u8], rng: &mut Rng) -> Vec<u8> {
    match rng.u8(0..4) {
        0 => return old.to_vec(),
        1 => return new.to_vec(),
        _ => {}
    }
    let (short, long) = (old.len().min(new.len()), old.len().max(new.len()));
    let mut size = rng.usize(short..=long);
    if rng.bool() {
        size = long;
    }
    // Beyond the old end there were zeros; beyond the new one, the old bytes are still there.
    let mut mixed = old.to_vec();
    mixed.resize(size, 0);
    for sector in 0..size.div_ceil(SECTOR) {
        let mut range = sector * SECTOR..new.len().min(size).min((sector + 1) * SECTOR);
        if range.is_empty() {
            break;
        }
        let tear = rng.usize(range.clone());
        match rng.u8(0..5) {
            0 | 1 => {}
            2 => range.end = tear,
            3 => range.start = tear,
            _ => continue,
        }
        mixed[range.clone()].copy_from_slice(&new[range]);
    }
    mixed
}
