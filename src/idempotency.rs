//! The table of `Idempotency-Key`s: a key that comes again within ten minutes gets its first
//! receipt, also after the process was killed.
//!
//! The table is in memory, in two generations: it rotates when the younger one is ten minutes old
//! or full. Its own thread writes each entry to a file before the receipt leaves. The file is not
//! synced: a power cut may cost keys, and the API still recognises the record by its id.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, info, warn};

use crate::{
    clock::{age, unix_us},
    delivery::Receipt,
    lane_id::LaneId,
    recent::{Fingerprint, Hasher128, Recent},
    spool::frames::{Item, Scanner, write_frame},
};

/// A key is known for at least this time, unless more than [`KEYS_MAX`] come meanwhile.
pub const KNOWN_FOR: Duration = Duration::from_mins(10);
/// Keys of one generation: the load factor of a table of 2^19 slots, less the keys that may come
/// before the rotation. If more come within ten minutes, the oldest are forgotten early. The API
/// still keeps such a record once, by its id.
pub const KEYS_MAX: usize = (1 << 19) / 8 * 7 - (1 << 14);
/// A receipt waits for its key to be written for at most this time.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Entries that may wait to be written. Keys beyond them do not outlive the process.
const UNWRITTEN_MAX: usize = 1 << 16;
/// Entries that are written at once.
const BATCH: usize = 4096;
/// The files have no salt: a client that forges an entry forges its own keys only.
const SALT: u32 = 0;

/// An entry of the file.
#[derive(Clone, PartialEq, Message)]
struct KeyLine {
    #[prost(string, tag = "1")]
    key: String,
    /// The lane's name; empty for the spool.
    #[prost(string, tag = "2")]
    lane: String,
    #[prost(uint64, tag = "3")]
    at_us: u64,
}

/// The state of a key.
enum State {
    /// Its first request is under way. Others with the same key wait for the end of that one.
    Pending(watch::Receiver<Option<Receipt>>),
    Done {
        receipt: Receipt,
        at_us: u64,
    },
}

#[derive(Default)]
struct KeyTable {
    hasher: Hasher128,
    keys: Recent<State>,
    /// The begin of the younger generation, in microseconds since the Unix epoch.
    began_us: u64,
    /// The last entry was not written in time.
    is_failing: bool,
}

impl KeyTable {
    fn rotate_if_due(&mut self) -> bool {
        let is_due = age(self.began_us) >= KNOWN_FOR || self.keys.young_len() >= KEYS_MAX;
        if is_due {
            self.keys.rotate();
            self.began_us = unix_us();
        }
        is_due
    }

    fn load(&mut self, file: &Path) -> io::Result<()> {
        self.began_us = unix_us();
        read(file, |line| {
            self.began_us = self.began_us.min(line.at_us);
            if age(line.at_us) < KNOWN_FOR
                && let Some(receipt) = line.receipt()
            {
                let at_us = line.at_us;
                let key = self.hasher.fingerprint(&*line.key);
                self.keys.insert(key, State::Done { receipt, at_us });
            }
        })
    }

    /// Logs the first failure to write an entry, and the first success after it.
    fn report(&mut self, failure: Option<String>) {
        let was_failing = mem::replace(&mut self.is_failing, failure.is_some());
        match failure {
            Some(why) if !was_failing => {
                error!(%why, "cannot write the key table: after a restart its newest keys count as new");
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

/// The answer to a request with a key.
pub enum Claim {
    /// A request with this key got this receipt.
    Duplicate(Receipt),
    /// The key is new: the request goes on, and reports its receipt.
    New(Reservation),
}

/// Reserves a key for its first request. If it is dropped without a receipt, the next request with
/// the key is the first.
pub struct Reservation {
    store: IdempotencyStore,
    key: Box<str>,
    fingerprint: Fingerprint,
    outcome: watch::Sender<Option<Receipt>>,
}

impl IdempotencyStore {
    /// Opens the table with the entries that an earlier run has left in `folder`. A disk that fails
    /// or is full costs keys, which is logged, but not the start.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let young = folder.join("keys.young");
        let old = folder.join("keys.old");
        let mut table = KeyTable::default();
        for file in [&old, &young] {
            table.keys.rotate();
            if let Err(why) = table.load(file) {
                error!(file = %file.display(), %why, "cannot read the key table: its keys count as new");
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

    /// Reserves `key`, or waits for the end of the request that has reserved it.
    pub async fn claim(&self, key: &str) -> Claim {
        loop {
            let mut pending = {
                let mut table = self.table.lock();
                let fingerprint = table.hasher.fingerprint(key);
                match table.keys.get(&fingerprint) {
                    Some(State::Done { receipt, at_us }) if age(*at_us) < KNOWN_FOR => {
                        return Claim::Duplicate(*receipt);
                    }
                    Some(State::Pending(outcome)) => outcome.clone(),
                    Some(State::Done { .. }) | None => {
                        let (outcome, pending) = watch::channel(None);
                        table.keys.insert(fingerprint, State::Pending(pending));
                        return Claim::New(Reservation {
                            store: self.clone(),
                            key: key.into(),
                            fingerprint,
                            outcome,
                        });
                    }
                }
            };
            // An error means that the other request was refused. This one may be the first now.
            if let Ok(outcome) = pending.wait_for(Option::is_some).await
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
        let line = KeyLine::new(&self.key, receipt);
        let at_us = line.at_us;
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
        let done = State::Done { receipt, at_us };
        table.keys.insert(self.fingerprint, done);
        table.report(failure);
        drop(table);
        self.outcome.send_replace(Some(receipt));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut table = self.store.table.lock();
        let is_pending = |state: &State| matches!(state, State::Pending(_));
        table.keys.remove_if(&self.fingerprint, is_pending);
    }
}

impl KeyLine {
    fn new(key: &str, receipt: Receipt) -> Self {
        let lane = match receipt {
            Receipt::Lane(lane) => lane.name(),
            Receipt::Spool => "",
        };
        Self {
            key: key.into(),
            lane: lane.into(),
            at_us: unix_us(),
        }
    }

    fn receipt(&self) -> Option<Receipt> {
        if self.lane.is_empty() {
            Some(Receipt::Spool)
        } else {
            LaneId::from_name(&self.lane).map(Receipt::Lane)
        }
    }
}

fn append(bytes: &mut Vec<u8>, line: &KeyLine) {
    write_frame(bytes, SALT, 0, &line.encode_to_vec());
}

fn read(path: &Path, mut each: impl FnMut(KeyLine)) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    let size = file.metadata()?.len();
    let mut scanner = Scanner::new(file, SALT);
    while let Some(item) = scanner.next(size)? {
        match item {
            Item::Frame { payload, .. } => match KeyLine::decode(&*payload) {
                Ok(line) => each(line),
                Err(why) => warn!(%why, "cannot read an entry of the key table"),
            },
            Item::Damage { at, size } => {
                warn!(file = %path.display(), at, size, "damage in the key table");
            }
        }
    }
    Ok(())
}

/// The state of the thread.
struct KeyWriter {
    young: PathBuf,
    old: PathBuf,
    /// `None` until it can be opened.
    file: Option<File>,
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
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(options.open(&self.young)?),
        };
        file.write_all(bytes)
    }

    /// Makes the younger file the older one.
    fn rotate(&mut self) {
        let renamed = match fs::rename(&self.young, &self.old) {
            // Nothing was written yet.
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed,
        };
        match renamed.and_then(|()| File::create(&self.young)) {
            Ok(file) => self.file = Some(file),
            Err(why) => error!(%why, "cannot rotate the key table's file: it grows"),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tempfile::TempDir;

    use super::*;

    const NATS: Receipt = Receipt::Lane(LaneId::Nats);

    async fn first(store: &IdempotencyStore, key: &str) -> Reservation {
        match store.claim(key).await {
            Claim::New(reservation) => reservation,
            Claim::Duplicate(receipt) => panic!("duplicate: {receipt:?}"),
        }
    }

    async fn duplicate(store: &IdempotencyStore, key: &str) -> Receipt {
        match store.claim(key).await {
            Claim::New(_) => panic!("new"),
            Claim::Duplicate(receipt) => receipt,
        }
    }

    #[tokio::test]
    async fn a_key_that_comes_again_gets_its_first_receipt_also_after_a_restart() {
        let folder = TempDir::new().unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        first(&store, "a").await.complete(NATS).await;
        first(&store, "b").await.complete(Receipt::Spool).await;
        assert_eq!(duplicate(&store, "a").await, NATS);
        for _ in 0..3 {
            // As after a kill: nothing is closed.
            let store = IdempotencyStore::open(folder.path()).unwrap();
            assert_eq!(
                (duplicate(&store, "a").await, duplicate(&store, "b").await),
                (NATS, Receipt::Spool)
            );
        }
    }

    #[tokio::test]
    async fn a_key_whose_request_is_under_way_waits_for_its_end() {
        let folder = TempDir::new().unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        let one = first(&store, "a").await;
        assert!(store.claim("a").now_or_never().is_none());
        let (again, ()) = tokio::join!(duplicate(&store, "a"), one.complete(NATS));
        assert_eq!(again, NATS);
    }

    #[tokio::test]
    async fn a_key_whose_request_was_not_taken_is_free_again() {
        let folder = TempDir::new().unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        let one = first(&store, "a").await;
        let (again, ()) = tokio::join!(first(&store, "a"), async { drop(one) });
        again.complete(NATS).await;
        assert_eq!(duplicate(&store, "a").await, NATS);
    }

    #[tokio::test]
    async fn memory_is_bounded_and_the_last_keys_are_known() {
        let folder = TempDir::new().unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        let all: Vec<_> = (0..2 * KEYS_MAX + 10).map(|key| key.to_string()).collect();
        for some in all.chunks(BATCH) {
            futures_util::future::join_all(
                some.iter()
                    .map(async |key| first(&store, key).await.complete(NATS).await),
            )
            .await;
        }
        let known = {
            let table = store.table.lock();
            table.keys.len()
        };
        assert!(known <= 2 * KEYS_MAX + BATCH, "{known}");
        for known in [all.len() - 1, all.len() - KEYS_MAX] {
            assert_eq!(duplicate(&store, &all[known]).await, NATS);
        }
        first(&store, &all[0]).await;
    }

    #[tokio::test]
    async fn a_folder_that_takes_nothing_costs_no_start_and_no_key_that_is_there() {
        let folder = TempDir::new().unwrap();
        first(&IdempotencyStore::open(folder.path()).unwrap(), "a")
            .await
            .complete(NATS)
            .await;
        fs::rename(
            folder.path().join("keys.young"),
            folder.path().join("keys.old"),
        )
        .unwrap();
        // It can be neither read nor written.
        fs::create_dir(folder.path().join("keys.young")).unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        assert_eq!(duplicate(&store, "a").await, NATS);
        first(&store, "b").await.complete(NATS).await;
        assert_eq!(duplicate(&store, "b").await, NATS);
    }

    #[tokio::test]
    async fn what_is_too_old_does_not_pile_up_over_restarts() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("keys.young");
        let mut bytes = Vec::new();
        append(
            &mut bytes,
            &KeyLine {
                at_us: 1,
                ..KeyLine::new("old", NATS)
            },
        );
        fs::write(&file, &bytes).unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        first(&store, "old").await;
        first(&store, "new").await.complete(NATS).await;
        let mut lines = Vec::new();
        read(&file, |line| lines.push(line.key)).unwrap();
        assert_eq!(lines, ["new"]);
    }

    #[tokio::test]
    async fn damage_costs_the_keys_that_it_hits() {
        let folder = TempDir::new().unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        for key in ["a", "b", "c"] {
            first(&store, key).await.complete(NATS).await;
        }
        let file = folder.path().join("keys.young");
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        let store = IdempotencyStore::open(folder.path()).unwrap();
        assert_eq!(
            (duplicate(&store, "a").await, duplicate(&store, "c").await),
            (NATS, NATS)
        );
        first(&store, "b").await;

        // The last entry was half written when the process was killed; the next run goes on behind
        // it.
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
        first(&IdempotencyStore::open(folder.path()).unwrap(), "d")
            .await
            .complete(NATS)
            .await;
        let store = IdempotencyStore::open(folder.path()).unwrap();
        assert_eq!(
            (duplicate(&store, "a").await, duplicate(&store, "d").await),
            (NATS, NATS)
        );
        first(&store, "c").await;
    }
}
