//! The node's disk: what waits for a lane, what the gRPC lane carries, and the dead letters.
//!
//! One thread owns the files. It takes all orders that have come while it synced the last ones, and one sync per queue makes
//! all of them durable (group commit): the more load, the more records share a sync. Nobody else blocks.
//!
//! A record that lies here survives the end of the process and a power cut. A damaged entry is set aside and named, and costs
//! no other. While the disk fails, [`Spool::put`] fails, and works again when the disk does.

mod done;
mod entry;
mod frame;
mod log;
mod scan;

use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, warn};

pub use self::entry::{Entry, Letter};
use self::log::{Log, SEGMENT_MAX};
use crate::{
    delivery::LaneId,
    record::{Origin, unix_us},
};

/// Files of frames, for what else is kept beside the queues.
pub(crate) mod frames {
    pub use super::{
        frame::write as write_frame,
        scan::{Item, Scanner},
    };
}

/// How many orders share a commit at most.
const BATCH: usize = 8192;
/// Dead letters may go beyond the spool's size by this part of it.
const RESERVE: u64 = 16;
/// Where less than this part of the spool's size is left, it is about to refuse.
const NEARLY_FULL: u64 = 256;
/// How often a disk that has failed is tried.
const PROBE: Duration = Duration::from_secs(1);

/// One of the queues on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For whichever lane is up.
    Waiting,
    /// For the lane that the client has named.
    Pinned(LaneId),
    /// Taken from the gRPC lane, not yet taken by the API.
    Carried,
    /// Dead letters.
    Dead,
}

impl Queue {
    const COUNT: usize = 3 + LaneId::ALL.len();

    fn all() -> impl Iterator<Item = Self> {
        [Self::Waiting, Self::Carried, Self::Dead].into_iter().chain(LaneId::ALL.map(Self::Pinned))
    }

    const fn at(self) -> usize {
        match self {
            Self::Waiting => 0,
            Self::Carried => 1,
            Self::Dead => 2,
            Self::Pinned(lane) => 3 + lane as usize,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Waiting => "waiting".into(),
            Self::Pinned(lane) => format!("waiting_{lane}"),
            Self::Carried => "carried".into(),
            Self::Dead => "dead".into(),
        }
    }
}

/// Where an entry lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    queue: usize,
    place: log::Key,
}

/// What lies on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    records: [u64; Queue::COUNT],
    /// What an earlier run has left to the gRPC lane, and is still there.
    pub found_carried: u64,
    /// All files together.
    pub bytes: u64,
    /// Syncs since the start that made records safe, each of one queue.
    pub commits: u64,
    /// Records that they made safe.
    pub committed: u64,
    /// The last attempt to write failed, or there is no room: nothing can be put.
    pub refuses: bool,
}

impl Held {
    #[must_use]
    pub const fn records(&self, queue: Queue) -> u64 {
        self.records[queue.at()]
    }

    /// What waits for a lane.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        let pinned: u64 = LaneId::ALL.map(|lane| self.records(Queue::Pinned(lane))).iter().sum();
        self.records(Queue::Waiting) + pinned
    }
}

/// Why a record is not safe on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSafe {
    #[error("the spool is full")]
    Full,
    #[error("the spool's disk fails: {0}")]
    Disk(String),
    #[error("the spool is closed")]
    Closed,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another process uses {}", .0.display())]
    InUse(PathBuf),
    #[error("{}: {source}", .folder.display())]
    Folder { folder: PathBuf, source: io::Error },
}

/// Which dead letters.
#[derive(Clone, Debug)]
pub enum Which {
    All,
    Ids(HashSet<String>),
}

impl Which {
    fn contains(&self, id: &str) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => ids.contains(id),
        }
    }
}

enum Order {
    Put {
        queue: Queue,
        payload: Vec<u8>,
        held: bool,
        answer: oneshot::Sender<Result<Key, NotSafe>>,
    },
    Settle(Key),
    Take {
        queue: Queue,
        max: usize,
        answer: oneshot::Sender<Vec<(Key, Entry)>>,
    },
    Rewind(Queue),
    Oldest(oneshot::Sender<Option<Entry>>),
    List {
        max: usize,
        answer: oneshot::Sender<Vec<Entry>>,
    },
    Replay {
        which: Which,
        answer: oneshot::Sender<Result<u64, NotSafe>>,
    },
    Forget {
        which: Which,
        answer: oneshot::Sender<Result<u64, NotSafe>>,
    },
    /// Answered when all that came before is written down.
    Close(oneshot::Sender<()>),
}

/// The way to the thread. Clones lead to the same one; it ends when it is closed, or when the last of them is dropped.
#[derive(Clone)]
pub struct Spool {
    /// Bounded by what it is about: each put belongs to a record that holds its permit or its place until the answer, each settled key
    /// to a put, and who takes waits for what was taken before.
    orders: mpsc::UnboundedSender<Order>,
    held: watch::Receiver<Held>,
    /// Closed when the thread has ended, however that came.
    lives: watch::Receiver<()>,
}

impl Spool {
    /// Opens the spool in `folder`, which is made if it is absent, with what an earlier run has left there. It never takes more
    /// than about `max` bytes.
    pub fn open(folder: &Path, max: u64) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Folder { folder: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(failed)?;
        // The folder is as durable as its name in the one above.
        let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if let Err(why) = File::open(above).and_then(|above| above.sync_all()) {
            warn!(folder = %folder.display(), %why, "the folder's name cannot be synced");
        }
        let lock = File::create(folder.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(folder.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let mut logs = Vec::with_capacity(Queue::COUNT);
        for queue in Queue::all() {
            // A record that stays long keeps its segment: no more than a small part of the room.
            logs.push(Log::open(folder, &queue.name(), (max / 16).min(SEGMENT_MAX)).map_err(failed)?);
        }
        let (orders, inbox) = mpsc::unbounded_channel();
        let folder = folder.to_owned();
        let held = watch::Sender::new(Held::default());
        let mut store = Store { folder, logs, max, failing: false, commits: 0, committed: 0, held, _lock: lock };
        store.tell();
        let held = store.held.subscribe();
        let (alive, lives) = watch::channel(());
        let run = move || {
            let _alive = alive;
            store.run(inbox);
        };
        thread::Builder::new().name("spool".into()).spawn(run).map_err(failed)?;
        Ok(Self { orders, held, lives })
    }

    /// Resolves when `entry` is durable in `queue`. One that is `held` is not taken out again before a
    /// [`Spool::rewind`]: the caller has it in memory.
    pub async fn put(&self, queue: Queue, entry: &Entry, held: bool) -> Result<Key, NotSafe> {
        let payload = entry.encode_to_vec();
        self.ask(|answer| Order::Put { queue, payload, held, answer }).await?
    }

    /// Strikes out an entry. After a power cut it may come again.
    pub fn settle(&self, key: Key) {
        // The thread has ended with the node; the entry comes again at the next start.
        self.orders.send(Order::Settle(key)).ok();
    }

    /// Up to `max` entries that were not taken before, oldest first; what is taken and not settled comes again after a restart.
    pub async fn take(&self, queue: Queue, max: usize) -> Vec<(Key, Entry)> {
        self.ask(|answer| Order::Take { queue, max, answer }).await.unwrap_or_default()
    }

    /// The record that was taken in first of those that are for a lane, or that the gRPC lane carries.
    pub async fn oldest(&self) -> Option<Entry> {
        self.ask(Order::Oldest).await.ok().flatten()
    }

    /// Everything in `queue` that is not settled can be taken again.
    pub fn rewind(&self, queue: Queue) {
        self.orders.send(Order::Rewind(queue)).ok();
    }

    /// The oldest dead letters.
    pub async fn dead(&self, max: usize) -> Result<Vec<Entry>, NotSafe> {
        self.ask(|answer| Order::List { max, answer }).await
    }

    /// Lets dead letters wait for a lane again; how many. Cut short by a crash, some may be in both places.
    pub async fn replay(&self, which: Which) -> Result<u64, NotSafe> {
        self.ask(|answer| Order::Replay { which, answer }).await?
    }

    /// Removes dead letters for good; how many.
    pub async fn forget(&self, which: Which) -> Result<u64, NotSafe> {
        self.ask(|answer| Order::Forget { which, answer }).await?
    }

    /// Writes everything down and ends the thread: what comes later is refused with [`NotSafe::Closed`].
    pub async fn close(&self) {
        // An error says that it has ended already.
        self.ask(Order::Close).await.ok();
    }

    /// What lies on disk. A copy: whoever kept the lock behind it while asking again could wait for ever.
    #[must_use]
    pub fn holds(&self) -> Held {
        // Without its thread it takes nothing more.
        let has_ended = self.held.has_changed().is_err();
        let held = *self.held.borrow();
        Held { refuses: held.refuses || has_ended, ..held }
    }

    /// What lies on disk, as it changes.
    #[must_use]
    pub fn held(&self) -> watch::Receiver<Held> {
        self.held.clone()
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, NotSafe> {
        let (answer, mut answered) = oneshot::channel();
        self.orders.send(order(answer)).map_err(|_| NotSafe::Closed)?;
        let mut lives = self.lives.clone();
        tokio::select! {
            biased;
            answer = &mut answered => answer.map_err(|_| NotSafe::Closed),
            // An order that is sent just when the thread ends may stay in the channel for as long as anybody can send.
            _ = lives.changed() => answered.try_recv().map_err(|_| NotSafe::Closed),
        }
    }
}

/// What the thread owns.
struct Store {
    folder: PathBuf,
    /// By [`Queue::at`].
    logs: Vec<Log>,
    max: u64,
    /// The last write failed.
    failing: bool,
    /// See [`Held`].
    commits: u64,
    committed: u64,
    held: watch::Sender<Held>,
    _lock: File,
}

/// A put that waits for its commit.
struct Pending {
    key: Key,
    answer: oneshot::Sender<Result<Key, NotSafe>>,
}

impl Store {
    fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else {
            return error!("the spool's thread cannot wait for orders");
        };
        let mut orders = Vec::new();
        let mut probed = Instant::now();
        loop {
            let patience = if self.failing { PROBE.saturating_sub(probed.elapsed()) } else { Duration::MAX };
            let received = runtime.block_on(async { timeout(patience, inbox.recv_many(&mut orders, BATCH)).await });
            if received == Ok(0) {
                break;
            }
            if self.failing && probed.elapsed() >= PROBE {
                self.probe();
                probed = Instant::now();
            }
            let close = self.serve(orders.drain(..));
            if let Some(close) = close {
                self.flush(true);
                // Who asked may have given up waiting.
                close.send(()).ok();
                return;
            }
        }
        self.flush(true);
    }

    /// Finds out whether the disk works again, so that a node that nobody sends to because it is not ready becomes ready.
    fn probe(&mut self) {
        let path = self.folder.join("probe");
        let probe = fs::write(&path, [0; 4096]).and_then(|()| File::open(&path)?.sync_all());
        self.failing = probe.is_err() || log::is_failing();
        fs::remove_file(&path).ok();
    }

    /// The answer to the order that closes, if there is one.
    fn serve(&mut self, orders: impl Iterator<Item = Order>) -> Option<oneshot::Sender<()>> {
        let mut room = self.room();
        let (mut puts, mut readers, mut close) = (Vec::new(), Vec::new(), None);
        for order in orders {
            match order {
                Order::Put { queue, payload, held, answer } => match self.append(queue, &payload, held, &mut room) {
                    Ok(key) => puts.push(Pending { key, answer }),
                    Err(why) => refuse(answer, why),
                },
                Order::Settle(key) => self.logs[key.queue].settle(key.place),
                Order::Rewind(queue) => self.logs[queue.at()].rewind(),
                Order::Close(answer) => close = Some(answer),
                reader => readers.push(reader),
            }
        }
        self.commit(puts);
        for order in readers {
            self.read(order);
        }
        self.flush(false);
        self.tell();
        close
    }

    fn room(&self) -> u64 {
        self.max.saturating_sub(self.logs.iter().map(Log::bytes).sum())
    }

    fn append(&mut self, queue: Queue, payload: &[u8], held: bool, room: &mut u64) -> Result<Key, NotSafe> {
        let size = (frame::HEAD + payload.len()) as u64;
        // A full spool of records must not keep those that the API refuses from leaving it.
        let reserve = if queue == Queue::Dead { self.max / RESERVE } else { 0 };
        if size > *room + reserve || payload.len() > frame::PAYLOAD_MAX {
            return Err(NotSafe::Full);
        }
        let appended = self.logs[queue.at()].append(payload, held);
        self.failing |= appended.is_err();
        let place = appended.map_err(|why| NotSafe::Disk(why.to_string()))?;
        *room = room.saturating_sub(size);
        Ok(Key { queue: queue.at(), place })
    }

    fn commit(&mut self, puts: Vec<Pending>) {
        let failures: Vec<_> = self.logs.iter_mut().map(|log| log.commit().err()).collect();
        if !puts.is_empty() {
            self.failing = failures.iter().any(Option::is_some);
        }
        let mut safe = [0; Queue::COUNT];
        for Pending { key, answer } in puts {
            match &failures[key.queue] {
                None => {
                    safe[key.queue] += 1;
                    // Who asked may be gone: then the entry waits to be taken like any other.
                    drop(answer.send(Ok(key)));
                }
                Some(why) => refuse(answer, NotSafe::Disk(why.to_string())),
            }
        }
        self.commits += safe.iter().map(|records| u64::from(*records > 0)).sum::<u64>();
        self.committed += safe.iter().sum::<u64>();
    }

    /// What reads entries sees those that were put before.
    fn read(&mut self, order: Order) {
        match order {
            Order::Take { queue, max, answer } => {
                let taken = self.take(queue, max);
                if let Err(taken) = answer.send(taken)
                    && !taken.is_empty()
                {
                    // Whoever wanted them is gone.
                    self.logs[queue.at()].rewind();
                }
            }
            Order::Oldest(answer) => drop(answer.send(self.oldest())),
            Order::List { max, answer } => drop(answer.send(self.list(max))),
            Order::Replay { which, answer } => drop(answer.send(self.replay(&which))),
            Order::Forget { which, answer } => drop(answer.send(Ok(self.forget(&which)))),
            Order::Put { .. } | Order::Settle(_) | Order::Rewind(_) | Order::Close(_) => {}
        }
    }

    fn take(&mut self, queue: Queue, max: usize) -> Vec<(Key, Entry)> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some((place, payload)) = self.logs[queue.at()].next() else { break };
            match Entry::decode(&*payload) {
                Ok(entry) => taken.push((Key { queue: queue.at(), place }, entry)),
                Err(why) => error!(?queue, %why, "an entry of a later version stays on disk"),
            }
        }
        taken
    }

    fn oldest(&mut self) -> Option<Entry> {
        let queues = Queue::all().filter(|queue| *queue != Queue::Dead);
        let firsts = queues.filter_map(|queue| {
            let mut first = None;
            self.logs[queue.at()].visit(|_, payload| {
                first = Entry::decode(&*payload).ok();
                first.is_none()
            });
            first
        });
        firsts.min_by_key(|entry| entry.record().origin.map_or(u64::MAX, |origin| origin.at_us))
    }

    /// The dead letters that `which` names, with their keys.
    fn find(&mut self, which: &Which, max: usize) -> Vec<(log::Key, Entry)> {
        let mut found = Vec::new();
        self.logs[Queue::Dead.at()].visit(|key, payload| {
            if let Ok(entry) = Entry::decode(&*payload)
                && which.contains(&entry.id)
            {
                found.push((key, entry));
            }
            found.len() < max
        });
        found
    }

    fn list(&mut self, max: usize) -> Vec<Entry> {
        self.find(&Which::All, max).into_iter().map(|(_, entry)| entry).collect()
    }

    fn replay(&mut self, which: &Which) -> Result<u64, NotSafe> {
        let disk = |why: io::Error| NotSafe::Disk(why.to_string());
        let mut replayed = 0;
        loop {
            let found = self.find(which, BATCH);
            if found.is_empty() {
                return Ok(replayed);
            }
            let waiting = &mut self.logs[Queue::Waiting.at()];
            for (_, entry) in &found {
                // To the ledger it is another record: what is known of the one that died does not hold for it.
                let origin = Some(Origin { run: "replay".into(), at_us: unix_us() }.to_text());
                let entry = Entry { letter: None, origin, ..entry.clone() };
                waiting.append(&entry.encode_to_vec(), false).map_err(disk)?;
            }
            waiting.commit().map_err(disk)?;
            self.commits += 1;
            self.committed += found.len() as u64;
            fail::fail_point!("spool-replay");
            replayed += self.strike_out(found);
        }
    }

    fn forget(&mut self, which: &Which) -> u64 {
        let mut forgotten = 0;
        loop {
            let found = self.find(which, BATCH);
            if found.is_empty() {
                return forgotten;
            }
            forgotten += self.strike_out(found);
        }
    }

    /// They are gone, so they count, though a disk that fails may bring them back at a later start.
    fn strike_out(&mut self, found: Vec<(log::Key, Entry)>) -> u64 {
        let dead = &mut self.logs[Queue::Dead.at()];
        let count = found.len() as u64;
        for (key, _) in found {
            dead.settle(key);
        }
        if let Err(why) = dead.flush(true) {
            warn!(%why, "dead letters that are gone may come again");
        }
        count
    }

    fn flush(&mut self, durable: bool) {
        for log in &mut self.logs {
            if let Err(why) = log.flush(durable) {
                warn!(%why, "what was settled cannot be written down; it may come again");
            }
        }
    }

    fn tell(&mut self) {
        let mut held = Held { commits: self.commits, committed: self.committed, ..Held::default() };
        for (log, records) in self.logs.iter_mut().zip(&mut held.records) {
            *records = log.len();
            held.bytes += log.bytes();
            for damage in log.damages() {
                error!(?damage, "damage in the spool: these bytes are no whole entry any more");
            }
        }
        held.found_carried = self.logs[Queue::Carried.at()].found();
        held.refuses = self.failing || self.max.saturating_sub(held.bytes) <= self.max / NEARLY_FULL;
        self.held.send_if_modified(|told| std::mem::replace(told, held) != held);
    }
}

fn refuse(answer: oneshot::Sender<Result<Key, NotSafe>>, why: NotSafe) {
    // Who asked may be gone; nothing was promised.
    answer.send(Err(why)).ok();
}

#[cfg(test)]
mod tests;
