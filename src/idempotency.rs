//! The table of `Idempotency-Key`s: a key that comes again within ten minutes gets the receipt that it got first, also after the
//! process was killed.
//!
//! The table is in memory, in two generations: when the younger is ten minutes old or full, the older is forgotten. Each entry is
//! written to a file, on a thread of its own, before the receipt leaves; it is not synced, since a power cut may cost what a
//! killed process must not: the API knows the record by its id all the same.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prost::Message;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, warn};

use crate::{
    clock::{age, unix_us},
    delivery::Receipt,
    fingerprint::{ByFingerprint, Fingerprint, Fingerprints},
    lane_id::LaneId,
    spool::frames::{Item, Scanner, write_frame},
};

/// How long a key is known at least, unless more than [`KEYS_MAX`] come meanwhile.
pub const KNOWN_FOR: Duration = Duration::from_mins(10);
/// Keys of one generation: what a table of 2^19 places has room for, with some that come before it is turned over. Beyond so many
/// in ten minutes, the oldest are forgotten early: the API still keeps such a record once, by its id.
pub const KEYS_MAX: usize = (1 << 19) / 8 * 7 - (1 << 14);
/// How long a receipt waits for its key to be written.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Entries that may wait to be written; beyond them, keys do not outlive the process.
const UNWRITTEN_MAX: usize = 1 << 16;
/// Entries that are written at once.
const BATCH: usize = 4096;
/// The files carry no salt: a client that forges an entry forges its own keys only.
const SALT: u32 = 0;

/// What lies in the file.
#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(string, tag = "1")]
    key: String,
    /// The lane's name; empty for the spool.
    #[prost(string, tag = "2")]
    lane: String,
    #[prost(uint64, tag = "3")]
    at_us: u64,
}

/// What is known of a key.
enum State {
    /// Its first request is under way; whoever else has the key waits for its end.
    Underway(watch::Receiver<Option<Receipt>>),
    Done {
        receipt: Receipt,
        at_us: u64,
    },
}

#[derive(Default)]
struct Table {
    fingerprints: Fingerprints,
    young: ByFingerprint<State>,
    old: ByFingerprint<State>,
    /// When the younger generation began, in microseconds since the Unix epoch.
    began_us: u64,
}

impl Table {
    fn turn_if_due(&mut self) -> bool {
        let due = age(self.began_us) >= KNOWN_FOR || self.young.len() >= KEYS_MAX;
        if due {
            self.old = std::mem::take(&mut self.young);
            self.began_us = unix_us();
        }
        due
    }
}

struct Order {
    line: Line,
    written: oneshot::Sender<()>,
}

/// The table. Clones are one.
#[derive(Clone)]
pub struct Keys {
    table: Arc<Mutex<Table>>,
    orders: mpsc::Sender<Order>,
}

/// What to do with a request that has a key.
pub enum Claim {
    /// It was taken before, with this receipt.
    Taken(Receipt),
    /// It is the first: try, and say what came of it.
    First(First),
}

/// The first request of its key. Dropped without a receipt, the next one is the first.
pub struct First {
    keys: Keys,
    key: Box<str>,
    fingerprint: Fingerprint,
    outcome: watch::Sender<Option<Receipt>>,
}

impl Keys {
    /// Opens the table with what an earlier run has left in `folder`. A disk that fails or is full costs keys, which the log
    /// says, and not the start.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let files = Files {
            young: folder.join("keys.young"),
            old: folder.join("keys.old"),
        };
        let mut table = Table {
            began_us: unix_us(),
            ..Table::default()
        };
        for (file, is_young) in [(&files.old, false), (&files.young, true)] {
            let known = read(file, |line| {
                if is_young {
                    table.began_us = table.began_us.min(line.at_us);
                }
                if age(line.at_us) < KNOWN_FOR
                    && let Some(receipt) = line.receipt()
                {
                    let key = table.fingerprints.of(&line.key);
                    let generation = if is_young {
                        &mut table.young
                    } else {
                        &mut table.old
                    };
                    generation.insert(
                        key,
                        State::Done {
                            receipt,
                            at_us: line.at_us,
                        },
                    );
                }
            });
            if let Err(why) = known {
                error!(file = %file.display(), %why, "the key table cannot be read: its keys are taken for new");
            }
        }
        let (orders, inbox) = mpsc::channel(UNWRITTEN_MAX);
        let table = Arc::new(Mutex::new(table));
        let writer = Writer {
            files,
            file: None,
            table: Arc::clone(&table),
        };
        thread::Builder::new()
            .name("keys".into())
            .spawn(move || writer.run(inbox))?;
        Ok(Self { table, orders })
    }

    /// Takes `key`, or waits for the end of the request that has it.
    pub async fn claim(&self, key: &str) -> Claim {
        loop {
            let mut underway = {
                let mut table = self.lock();
                let found = table.fingerprints.of(key);
                match table.young.get(&found).or_else(|| table.old.get(&found)) {
                    Some(State::Done { receipt, at_us }) if age(*at_us) < KNOWN_FOR => {
                        return Claim::Taken(*receipt);
                    }
                    Some(State::Underway(outcome)) => outcome.clone(),
                    Some(State::Done { .. }) | None => {
                        let (outcome, waiting) = watch::channel(None);
                        table.old.remove(&found);
                        table.young.insert(found, State::Underway(waiting));
                        return Claim::First(First {
                            keys: self.clone(),
                            key: key.into(),
                            fingerprint: found,
                            outcome,
                        });
                    }
                }
            };
            // An error is the end of a request that was not taken: then this one may be the first.
            if let Ok(outcome) = underway.wait_for(Option::is_some).await
                && let Some(receipt) = *outcome
            {
                return Claim::Taken(receipt);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl First {
    /// Remembers the receipt. Resolves when it survives the end of the process.
    pub async fn taken(self, receipt: Receipt) {
        let (written, done) = oneshot::channel();
        let line = Line::new(&self.key, receipt);
        let at_us = line.at_us;
        // The record is safe whatever becomes of its key, and its receipt may leave.
        if self.keys.orders.try_send(Order { line, written }).is_err()
            || timeout(WRITE_PATIENCE, done).await.is_err()
        {
            warn!(
                "the key table's disk hangs, or the node ends: after a restart, this key is taken for new"
            );
        }
        let mut table = self.keys.lock();
        table.old.remove(&self.fingerprint);
        table
            .young
            .insert(self.fingerprint, State::Done { receipt, at_us });
        drop(table);
        self.outcome.send_replace(Some(receipt));
    }
}

impl Drop for First {
    fn drop(&mut self) {
        let mut table = self.keys.lock();
        let Table { young, old, .. } = &mut *table;
        for generation in [young, old] {
            if matches!(generation.get(&self.fingerprint), Some(State::Underway(_))) {
                generation.remove(&self.fingerprint);
            }
        }
    }
}

impl Line {
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

fn append(bytes: &mut Vec<u8>, line: &Line) {
    write_frame(bytes, SALT, 0, &line.encode_to_vec());
}

struct Files {
    young: PathBuf,
    old: PathBuf,
}

fn read(path: &Path, mut each: impl FnMut(Line)) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    let size = file.metadata()?.len();
    let mut scanner = Scanner::new(file, SALT);
    while let Some(item) = scanner.next(size)? {
        match item {
            Item::Frame { payload, .. } => match Line::decode(&*payload) {
                Ok(line) => each(line),
                Err(why) => warn!(%why, "a line of the key table cannot be read"),
            },
            Item::Damage { at, size } => {
                warn!(file = %path.display(), at, size, "damage in the key table")
            }
        }
    }
    Ok(())
}

/// What the thread owns.
struct Writer {
    files: Files,
    /// `None` until it can be opened.
    file: Option<File>,
    table: Arc<Mutex<Table>>,
}

impl Writer {
    fn run(mut self, mut inbox: mpsc::Receiver<Order>) {
        let mut orders = Vec::new();
        let mut bytes = Vec::new();
        while inbox.blocking_recv_many(&mut orders, BATCH) > 0 {
            if self
                .table
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .turn_if_due()
            {
                self.turn();
            }
            bytes.clear();
            for order in &orders {
                append(&mut bytes, &order.line);
            }
            if let Err(why) = self.write(&bytes) {
                error!(%why, "the key table cannot be written: after a restart, these keys are taken for new");
            }
            for order in orders.drain(..) {
                // Whoever waits may be gone.
                order.written.send(()).ok();
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            // What lies there is not lost yet.
            none => none.insert(
                File::options()
                    .append(true)
                    .create(true)
                    .open(&self.files.young)?,
            ),
        };
        file.write_all(bytes)
    }

    /// The younger file becomes the older one.
    fn turn(&mut self) {
        let turned = match fs::rename(&self.files.young, &self.files.old) {
            // Nothing was written yet.
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(()),
            turned => turned,
        };
        let turned = turned.and_then(|()| File::create(&self.files.young));
        match turned {
            Ok(file) => self.file = Some(file),
            Err(why) => error!(%why, "the key table cannot be turned over; it grows"),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tempfile::TempDir;

    use super::*;

    const NATS: Receipt = Receipt::Lane(LaneId::Nats);

    async fn first(keys: &Keys, key: &str) -> First {
        match keys.claim(key).await {
            Claim::First(first) => first,
            Claim::Taken(receipt) => panic!("taken: {receipt:?}"),
        }
    }

    async fn taken(keys: &Keys, key: &str) -> Receipt {
        match keys.claim(key).await {
            Claim::First(_) => panic!("not taken"),
            Claim::Taken(receipt) => receipt,
        }
    }

    #[tokio::test]
    async fn a_key_that_comes_again_gets_its_first_receipt_also_after_a_restart() {
        let folder = TempDir::new().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        first(&keys, "a").await.taken(NATS).await;
        first(&keys, "b").await.taken(Receipt::Spool).await;
        assert_eq!(taken(&keys, "a").await, NATS);
        for _ in 0..3 {
            // As after a kill: nothing is closed.
            let keys = Keys::open(folder.path()).unwrap();
            assert_eq!(
                (taken(&keys, "a").await, taken(&keys, "b").await),
                (NATS, Receipt::Spool)
            );
        }
    }

    #[tokio::test]
    async fn a_key_whose_request_is_under_way_waits_for_its_end() {
        let folder = TempDir::new().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        let one = first(&keys, "a").await;
        assert!(keys.claim("a").now_or_never().is_none());
        let (again, ()) = tokio::join!(taken(&keys, "a"), one.taken(NATS));
        assert_eq!(again, NATS);
    }

    #[tokio::test]
    async fn a_key_whose_request_was_not_taken_is_free_again() {
        let folder = TempDir::new().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        let one = first(&keys, "a").await;
        let (again, ()) = tokio::join!(first(&keys, "a"), async { drop(one) });
        again.taken(NATS).await;
        assert_eq!(taken(&keys, "a").await, NATS);
    }

    #[tokio::test]
    async fn memory_is_bounded_and_the_last_keys_are_known() {
        let folder = TempDir::new().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        let all: Vec<_> = (0..2 * KEYS_MAX + 10).map(|key| key.to_string()).collect();
        for some in all.chunks(BATCH) {
            futures_util::future::join_all(
                some.iter()
                    .map(async |key| first(&keys, key).await.taken(NATS).await),
            )
            .await;
        }
        let known = {
            let table = keys.lock();
            table.young.len() + table.old.len()
        };
        assert!(known <= 2 * KEYS_MAX + BATCH, "{known}");
        for known in [all.len() - 1, all.len() - KEYS_MAX] {
            assert_eq!(taken(&keys, &all[known]).await, NATS);
        }
        first(&keys, &all[0]).await;
    }

    #[tokio::test]
    async fn a_folder_that_takes_nothing_costs_no_start_and_no_key_that_is_there() {
        let folder = TempDir::new().unwrap();
        first(&Keys::open(folder.path()).unwrap(), "a")
            .await
            .taken(NATS)
            .await;
        fs::rename(
            folder.path().join("keys.young"),
            folder.path().join("keys.old"),
        )
        .unwrap();
        // It can be neither read nor written.
        fs::create_dir(folder.path().join("keys.young")).unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        assert_eq!(taken(&keys, "a").await, NATS);
        first(&keys, "b").await.taken(NATS).await;
        assert_eq!(taken(&keys, "b").await, NATS);
    }

    #[tokio::test]
    async fn what_is_too_old_does_not_pile_up_over_restarts() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("keys.young");
        let mut bytes = Vec::new();
        append(
            &mut bytes,
            &Line {
                at_us: 1,
                ..Line::new("old", NATS)
            },
        );
        fs::write(&file, &bytes).unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        first(&keys, "old").await;
        first(&keys, "new").await.taken(NATS).await;
        let mut lines = Vec::new();
        read(&file, |line| lines.push(line.key)).unwrap();
        assert_eq!(lines, ["new"]);
    }

    #[tokio::test]
    async fn damage_costs_the_keys_that_it_hits() {
        let folder = TempDir::new().unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        for key in ["a", "b", "c"] {
            first(&keys, key).await.taken(NATS).await;
        }
        let file = folder.path().join("keys.young");
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&file, bytes).unwrap();
        let keys = Keys::open(folder.path()).unwrap();
        assert_eq!(
            (taken(&keys, "a").await, taken(&keys, "c").await),
            (NATS, NATS)
        );
        first(&keys, "b").await;

        // The last entry was half written when the process was killed; the next run goes on behind it.
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
        first(&Keys::open(folder.path()).unwrap(), "d")
            .await
            .taken(NATS)
            .await;
        let keys = Keys::open(folder.path()).unwrap();
        assert_eq!(
            (taken(&keys, "a").await, taken(&keys, "d").await),
            (NATS, NATS)
        );
        first(&keys, "c").await;
    }
}
