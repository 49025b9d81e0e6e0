//! The table of `Idempotency-Key`s: a key that comes again within a window with the same record
//! gets its first receipt, also after the process was killed. With another record it gets none.
//!
//! The same record means the same bytes at the API ([`Record::body`]): white space around a record
//! and its top-level `path` members do not count, and neither do the lane that was asked for, the
//! trace context and the form of the request.
//!
//! The table is in memory, in two generations: it rotates when the younger one is as old as the
//! window, or full. Its own thread writes each entry to a file before the receipt leaves. The file is not
//! synced: a power cut may cost keys, and the API still recognises the record by its id.

mod file;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use ring::digest::{SHA256, digest};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, info};
use tracing_mutex::parkinglot::Mutex;

use self::file::{KeyLine, append, read};
use crate::{
    clock::{age, unix_us},
    delivery::Receipt,
    recent::{Fingerprint, FingerprintMap, Hasher128, Recent},
    record::Record,
    spool::frames::FileIdentity,
};

/// The keys that a table of 2^19 slots takes before it grows.
const YOUNG_MAX: usize = (1 << 19) / 8 * 7;
/// Keys of one generation, less those that may come before the rotation. If more come within a
/// window, the oldest are forgotten early. The API still keeps such a record once, by its id.
pub const KEYS_MAX: usize = YOUNG_MAX - (1 << 14);
/// A receipt waits for its key to be written for at most this time.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Entries that may wait to be written. Keys beyond them do not outlive the process.
const UNWRITTEN_MAX: usize = 1 << 16;
/// Entries that are written at once.
const BATCH: usize = 4096;

/// Half of the SHA-256 of a record's body. It needs no secret that would have to outlive the
/// process, and no client can make two records of one digest.
#[derive(Clone, Copy, PartialEq, Eq)]
struct RecordDigest([u8; 16]);

/// The first request of a key is under way. Others with the same record wait for its end.
struct PendingKey {
    digest: RecordDigest,
    outcome: watch::Receiver<Option<Receipt>>,
}

/// A key with a receipt. There may be a million of them, so it is small.
#[derive(Clone, Copy)]
struct CompletedKey {
    digest: RecordDigest,
    /// In seconds since the Unix epoch, rounded up.
    at_s: u32,
    receipt: Receipt,
}

struct KeyTable {
    /// A key is known for this time, unless more than [`KEYS_MAX`] come meanwhile.
    window: Duration,
    hasher: Hasher128,
    pending: FingerprintMap<PendingKey>,
    completed: Recent<CompletedKey>,
    /// The begin of the younger generation, in microseconds since the Unix epoch.
    began_us: u64,
    /// The last entry was not written in time.
    is_failing: bool,
}

impl KeyTable {
    fn new(window: Duration) -> Self {
        Self {
            window,
            hasher: Hasher128::default(),
            pending: FingerprintMap::default(),
            completed: Recent::default(),
            began_us: 0,
            is_failing: false,
        }
    }

    fn rotate_if_due(&mut self) -> bool {
        let is_due = age(self.began_us) >= self.window || self.completed.young_len() >= KEYS_MAX;
        if is_due {
            self.completed.rotate();
            self.began_us = unix_us();
        }
        is_due
    }

    /// Remembers a key. The thread rotates the table with its file; while its disk hangs, keys come all
    /// the same.
    fn insert(&mut self, key: Fingerprint, completed: CompletedKey) {
        if self.completed.young_len() >= YOUNG_MAX {
            self.completed.rotate();
            self.began_us = unix_us();
        }
        self.completed.insert(key, completed);
    }

    fn load(&mut self, file: &Path) -> io::Result<()> {
        self.began_us = unix_us();
        read(file, |line| {
            self.began_us = self.began_us.min(line.at_us);
            if age(line.at_us) < self.window
                && let Some(completed) = line.completed()
            {
                let key = self.hasher.fingerprint(&*line.key);
                self.insert(key, completed);
            }
        })
    }

    /// Logs the first failure to write an entry, and the first success after it.
    fn report(&mut self, failure: Option<String>) {
        let was_failing = mem::replace(&mut self.is_failing, failure.is_some());
        match failure {
            Some(why) if !was_failing => {
                error!(reason = %why, "cannot write the key table: after a restart its newest keys count as new");
            }
            None if was_failing => info!("the key table is written again"),
            _ => {}
        }
    }
}

/// Asks the thread to write an entry. The answer is the failure, if there is one.
struct KeyWrite {
    line: KeyLine,
    answer: oneshot::Sender<Option<String>>,
}

/// The table. Clones share it.
#[derive(Clone)]
pub struct IdempotencyStore {
    table: Arc<Mutex<KeyTable>>,
    writes: mpsc::Sender<KeyWrite>,
}

/// The answer to a record with a key.
pub enum Claim {
    /// The record got this receipt under this key.
    Duplicate(Receipt),
    /// Another record has this key, or waits for its receipt under it.
    Reused,
    /// The key is new: the request goes on, and reports its receipt.
    New(Reservation),
}

/// Reserves a key for its first request. If it is dropped without a receipt, the next request with
/// the key is the first.
pub struct Reservation {
    store: IdempotencyStore,
    key: Box<str>,
    fingerprint: Fingerprint,
    digest: RecordDigest,
    outcome: watch::Sender<Option<Receipt>>,
}

impl IdempotencyStore {
    /// Opens the table with the entries that an earlier run has left in `folder`. It knows a key for
    /// `window`. A disk that fails or is full costs keys, which is logged, but not the start.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn open(folder: &Path, window: Duration) -> io::Result<Self> {
        let young = folder.join("keys.young");
        let old = folder.join("keys.old");
        let mut table = KeyTable::new(window);
        for file in [&old, &young] {
            table.completed.rotate();
            if let Err(why) = table.load(file) {
                error!(file = %file.display(), reason = %why, "cannot read the key table: its keys count as new");
            }
        }
        let (writes, inbox) = mpsc::channel(UNWRITTEN_MAX);
        let table = Arc::new(Mutex::new(table));
        let key_writer = KeyWriter {
            young,
            old,
            file: None,
            table: Arc::clone(&table),
        };
        let thread = thread::Builder::new().name("keys".into());
        thread.spawn(move || key_writer.run(inbox))?;
        Ok(Self { table, writes })
    }

    /// Reserves the id of `record` as its key, or waits for the end of the request that has
    /// reserved it for the same record.
    pub async fn claim(&self, record: &Record) -> Claim {
        let digest = RecordDigest::of(&record.body);
        self.claim_key(&record.id, digest).await
    }

    /// Whether the signed request `id` is one of this form: the first one that comes settles it, for
    /// as long as its key is known. No signature covers what tells the form, and in another one the
    /// same body would be other records.
    pub async fn settle_form(&self, id: &str, form: &str) -> bool {
        // No record has this key: theirs have no space.
        let key = format!("signed {id}");
        match self
            .claim_key(&key, RecordDigest::of(form.as_bytes()))
            .await
        {
            Claim::New(reservation) => {
                // It has no receipt of its own.
                reservation.complete(Receipt::Spool).await;
                true
            }
            Claim::Duplicate(_) => true,
            Claim::Reused => false,
        }
    }

    async fn claim_key(&self, key: &str, digest: RecordDigest) -> Claim {
        loop {
            let mut outcome = {
                let mut table = self.table.lock();
                let fingerprint = table.hasher.fingerprint(key);
                let completed = table.completed.get(&fingerprint);
                if let Some(completed) = completed.filter(|key| key.is_known(table.window)) {
                    return if completed.digest == digest {
                        Claim::Duplicate(completed.receipt)
                    } else {
                        Claim::Reused
                    };
                }
                match table.pending.get(&fingerprint) {
                    Some(pending) if pending.digest != digest => return Claim::Reused,
                    Some(pending) => pending.outcome.clone(),
                    None => {
                        let (sender, outcome) = watch::channel(None);
                        let pending = PendingKey { digest, outcome };
                        table.pending.insert(fingerprint, pending);
                        return Claim::New(Reservation {
                            store: self.clone(),
                            key: key.into(),
                            fingerprint,
                            digest,
                            outcome: sender,
                        });
                    }
                }
            };
            // An error means that the other request was refused. This one may be the first now.
            if let Ok(outcome) = outcome.wait_for(Option::is_some).await
                && let Some(receipt) = *outcome
            {
                return Claim::Duplicate(receipt);
            }
        }
    }
}

impl Reservation {
    /// Remembers the receipt. Resolves when it survives the end of the process, or cannot in time.
    pub async fn complete(self, receipt: Receipt) {
        let line = KeyLine::new(&self.key, self.digest, receipt);
        let completed = CompletedKey::new(self.digest, receipt, line.at_us);
        let (answer, answered) = oneshot::channel();
        // The record is safe whatever becomes of its key, so its receipt leaves even so.
        let failure = if self
            .store
            .writes
            .try_send(KeyWrite { line, answer })
            .is_ok()
            && let Ok(Ok(failure)) = timeout(WRITE_PATIENCE, answered).await
        {
            failure
        } else {
            Some("its disk hangs, or the node stops".into())
        };
        let mut table = self.store.table.lock();
        table.insert(self.fingerprint, completed);
        table.report(failure);
        drop(table);
        self.outcome.send_replace(Some(receipt));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.store.table.lock().pending.remove(&self.fingerprint);
    }
}

impl RecordDigest {
    fn of(body: &[u8]) -> Self {
        let mut half = [0; 16];
        half.copy_from_slice(&digest(&SHA256, body).as_ref()[..16]);
        Self(half)
    }
}

impl CompletedKey {
    fn new(digest: RecordDigest, receipt: Receipt, at_us: u64) -> Self {
        let seconds = at_us.div_ceil(1_000_000);
        Self {
            digest,
            at_s: u32::try_from(seconds).unwrap_or(u32::MAX),
            receipt,
        }
    }

    /// It may be older than its generation.
    fn is_known(&self, window: Duration) -> bool {
        age(u64::from(self.at_s) * 1_000_000) < window
    }
}

/// The state of the thread.
struct KeyWriter {
    young: PathBuf,
    old: PathBuf,
    /// `None` until it can be opened.
    file: Option<(File, FileIdentity)>,
    table: Arc<Mutex<KeyTable>>,
}

impl KeyWriter {
    fn run(mut self, mut inbox: mpsc::Receiver<KeyWrite>) {
        let mut writes = Vec::new();
        let mut bytes = Vec::new();
        while inbox.blocking_recv_many(&mut writes, BATCH) > 0 {
            let is_rotated = self.table.lock().rotate_if_due();
            if is_rotated {
                self.rotate();
            }
            bytes.clear();
            for write in &writes {
                append(&mut bytes, &write.line);
            }
            let failure = self.write(&bytes).err().map(|why| why.to_string());
            for write in writes.drain(..) {
                // The request may be gone.
                write.answer.send(failure.clone()).ok();
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Appends: the entries of an earlier run stay.
        let mut options = File::options();
        let options = options.append(true).create(true);
        // A file that was removed is no use to the next start.
        self.file
            .take_if(|(_, identity)| identity.check_place(&self.young).is_err());
        let (file, _) = match &mut self.file {
            Some(open) => open,
            none => none.insert(identified(options.open(&self.young)?)?),
        };
        let written = file.write_all(bytes);
        if written.is_err() {
            // The handle may be stale: the next write opens the file anew.
            self.file = None;
        }
        written
    }

    /// Makes the younger file the older one.
    fn rotate(&mut self) {
        let renamed = match fs::rename(&self.young, &self.old) {
            // Nothing was written yet.
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed,
        };
        let created = renamed.and_then(|()| File::create(&self.young));
        match created.and_then(identified) {
            Ok(open) => self.file = Some(open),
            Err(why) => error!(reason = %why, "cannot rotate the key table's file: it grows"),
        }
    }
}

fn identified(file: File) -> io::Result<(File, FileIdentity)> {
    let identity = FileIdentity::of(&file)?;
    Ok((file, identity))
}
