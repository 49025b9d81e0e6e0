//! The node's disk: what waits for a lane, what the gRPC lane carries, and the dead letters.
//!
//! One thread owns the files. It takes all orders that have come while it synced the last ones, and one sync per queue makes
//! all of them durable (group commit): the more load, the more records share a sync. Where fewer have come than shared the last one, it
//! waits a moment for more. Nobody else blocks.
//!
//! A record that lies here survives the end of the process and a power cut. A damaged entry is set aside and named, and costs
//! no other. While the disk fails, [`Spool::put`] fails, and works again when the disk does.

mod entry;
mod frame;
mod log;
mod scan;
mod settled;
mod store;
mod tail;

use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use prost::Message as _;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::warn;

pub use self::{
    entry::{DeathReason, Entry},
    tail::Tail,
};
use self::{
    log::{Log, Position, SEGMENT_MAX},
    store::Store,
};
use crate::lane_id::LaneId;

/// Files of frames, for what else is kept beside the queues.
pub(crate) mod frames {
    pub use super::{
        frame::write as write_frame,
        scan::{Item, Scanner},
    };
}

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
        [Self::Waiting, Self::Carried, Self::Dead]
            .into_iter()
            .chain(LaneId::ALL.map(Self::Pinned))
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
pub struct EntryKey {
    queue: usize,
    position: Position,
}

/// What lies on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolStats {
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

impl SpoolStats {
    pub const fn records(&self, queue: Queue) -> u64 {
        self.records[queue.at()]
    }

    /// What waits for a lane.
    pub fn waiting(&self) -> u64 {
        let pinned: u64 = LaneId::ALL
            .map(|lane| self.records(Queue::Pinned(lane)))
            .iter()
            .sum();
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

enum SpoolRequest {
    Put {
        queue: Queue,
        payload: Vec<u8>,
        held: bool,
        answer: oneshot::Sender<Result<EntryKey, NotSafe>>,
    },
    Settle(EntryKey),
    Take {
        queue: Queue,
        max: usize,
        answer: oneshot::Sender<Vec<(EntryKey, Entry)>>,
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
    requests: mpsc::UnboundedSender<SpoolRequest>,
    held: watch::Receiver<SpoolStats>,
    /// Closed when the thread has ended, however that came.
    lives: watch::Receiver<()>,
}

impl Spool {
    /// Opens the spool in `folder`, which is made if it is absent, with what an earlier run has left there. It never takes more
    /// than about `max` bytes.
    pub fn open(folder: &Path, max: u64) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Folder {
            folder: folder.to_owned(),
            source,
        };
        fs::create_dir_all(folder).map_err(failed)?;
        // The folder is as durable as its name in the one above.
        let above = folder
            .parent()
            .filter(|above| !above.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
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
            logs.push(
                Log::open(folder, &queue.name(), (max / 16).min(SEGMENT_MAX)).map_err(failed)?,
            );
        }
        let (requests, inbox) = mpsc::unbounded_channel();
        let folder = folder.to_owned();
        let store = Store::new(folder, logs, max, lock);
        let held = store.watch_stats();
        let (alive, lives) = watch::channel(());
        let run = move || {
            let _alive = alive;
            store.run(inbox);
        };
        thread::Builder::new()
            .name("spool".into())
            .spawn(run)
            .map_err(failed)?;
        Ok(Self {
            requests,
            held,
            lives,
        })
    }

    /// Resolves when `entry` is durable in `queue`.
    pub async fn put(&self, queue: Queue, entry: &Entry) -> Result<EntryKey, NotSafe> {
        self.append(queue, entry, false).await
    }

    /// The same, but the entry does not come out of a [`Tail`] that is reading the queue: the caller has it in memory.
    pub async fn put_held(&self, queue: Queue, entry: &Entry) -> Result<EntryKey, NotSafe> {
        self.append(queue, entry, true).await
    }

    async fn append(&self, queue: Queue, entry: &Entry, held: bool) -> Result<EntryKey, NotSafe> {
        let payload = entry.encode_to_vec();
        self.ask(|answer| SpoolRequest::Put {
            queue,
            payload,
            held,
            answer,
        })
        .await?
    }

    /// Strikes out an entry. After a power cut it may come again.
    pub fn settle(&self, key: EntryKey) {
        // The thread has ended with the node; the entry comes again at the next start.
        self.requests.send(SpoolRequest::Settle(key)).ok();
    }

    /// Reads the unsettled entries of `queue`, oldest first, each with a permit of `window`.
    pub fn tail(&self, queue: Queue, window: Arc<Semaphore>) -> Tail {
        Tail::new(self.clone(), queue, window)
    }

    /// Up to `max` entries that were not taken since the last rewind, oldest first.
    async fn take(&self, queue: Queue, max: usize) -> Vec<(EntryKey, Entry)> {
        self.ask(|answer| SpoolRequest::Take { queue, max, answer })
            .await
            .unwrap_or_default()
    }

    /// Lets everything in `queue` that is not settled be taken again.
    fn rewind(&self, queue: Queue) {
        self.requests.send(SpoolRequest::Rewind(queue)).ok();
    }

    /// The record that was taken in first of those that are for a lane, or that the gRPC lane carries.
    pub async fn oldest(&self) -> Option<Entry> {
        self.ask(SpoolRequest::Oldest).await.ok().flatten()
    }

    /// The oldest dead letters.
    pub async fn dead(&self, max: usize) -> Result<Vec<Entry>, NotSafe> {
        self.ask(|answer| SpoolRequest::List { max, answer }).await
    }

    /// Lets dead letters wait for a lane again; how many. Cut short by a crash, some may be in both places.
    pub async fn replay(&self, which: Which) -> Result<u64, NotSafe> {
        self.ask(|answer| SpoolRequest::Replay { which, answer })
            .await?
    }

    /// Removes dead letters for good; how many.
    pub async fn forget(&self, which: Which) -> Result<u64, NotSafe> {
        self.ask(|answer| SpoolRequest::Forget { which, answer })
            .await?
    }

    /// Writes everything down and ends the thread: what comes later is refused with [`NotSafe::Closed`].
    pub async fn close(&self) {
        // An error says that it has ended already.
        self.ask(SpoolRequest::Close).await.ok();
    }

    /// What lies on disk. A copy: whoever kept the lock behind it while asking again could wait for ever.
    pub fn stats(&self) -> SpoolStats {
        // Without its thread it takes nothing more.
        let has_ended = self.held.has_changed().is_err();
        let held = *self.held.borrow();
        SpoolStats {
            refuses: held.refuses || has_ended,
            ..held
        }
    }

    /// What lies on disk, as it changes.
    pub fn watch_stats(&self) -> watch::Receiver<SpoolStats> {
        self.held.clone()
    }

    async fn ask<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<T>) -> SpoolRequest,
    ) -> Result<T, NotSafe> {
        let (answer, mut answered) = oneshot::channel();
        self.requests
            .send(order(answer))
            .map_err(|_| NotSafe::Closed)?;
        let mut lives = self.lives.clone();
        tokio::select! {
            biased;
            answer = &mut answered => answer.map_err(|_| NotSafe::Closed),
            // An order that is sent just when the thread ends may stay in the channel for as long as anybody can send.
            _ = lives.changed() => answered.try_recv().map_err(|_| NotSafe::Closed),
        }
    }
}

#[cfg(test)]
mod tests;
