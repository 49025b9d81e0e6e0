//! The node's disk: records that wait for a lane, records that the gRPC lane carries, copies of what a
//! broker may lose, records that are parked between two tries or held for their API, and the dead
//! letters.
//!
//! One thread owns the files, and nobody else blocks. The thread takes all requests that came
//! during the last sync, and one sync per queue makes them durable (group commit): the higher the
//! load, the more records share a sync. If fewer requests have come than shared the last sync, the
//! thread waits a moment for more.
//!
//! An entry survives the end of the process and a power cut. A damaged entry is set aside and
//! logged, and costs no other. While the disk fails, [`Spool::put`] fails. So it does while the
//! folder or a file that is written is not where the next start would look for it; what is still
//! open is written again there.

mod busy;
mod disk;
mod entry;
mod filter;
mod frame;
mod kept;
mod letters;
mod log;
mod put;
mod queue;
mod scan;
mod set;
mod settled;
mod stats;
mod store;
mod tail;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::SystemTime,
};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::warn;
use tracing_mutex::parkinglot::Mutex;

pub(crate) use self::disk::replace_durably;
pub use self::{
    busy::BusySince,
    entry::{DeathReason, Entry, EntryRoute, Parked},
    filter::LetterFilter,
    kept::{Confirmer, FoundCopies},
    letters::{FoundLetters, LetterAction, LetterOrdering, LetterQuery, Which},
    log::Position,
    put::CopyWriter,
    queue::{Queue, Undelivered},
    set::Spools,
    stats::SpoolStats,
    tail::Tail,
};
use self::{
    log::{Log, SEGMENT_MAX},
    put::{PutAnswer, PutKind},
    store::{FolderPlace, Readable, Store},
};
use crate::{clock, lane_id::LaneId};

/// Files of frames, for other tables beside the queues.
pub(crate) mod frames {
    pub use super::{
        frame::write as write_frame,
        log::FileIdentity,
        scan::{Item, Scanner},
    };
}

/// The place of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EntryKey {
    queue: usize,
    position: Position,
}

impl EntryKey {
    pub fn new(queue: Queue, position: Position) -> Self {
        Self {
            queue: queue.at(),
            position,
        }
    }

    pub const fn position(self) -> Position {
        self.position
    }
}

/// Why a record is not safe on disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSafe {
    #[error("the spool is full")]
    Full,
    #[error("it is larger, with what goes with it, than the 16 MiB of an entry of the spool")]
    TooLarge,
    #[error("the spool's disk fails: {0}")]
    Disk(String),
    #[error("the spool is closed")]
    Closed,
    #[error("another search reads the spool")]
    Busy,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another process uses {}", .0.display())]
    InUse(PathBuf),
    #[error("{}: {source}", .folder.display())]
    Folder { folder: PathBuf, source: io::Error },
}

/// The entries that are to be settled: at most those that are on disk.
type SettledKeys = Arc<Mutex<Vec<EntryKey>>>;

/// A request to the thread.
enum SpoolRequest {
    Put {
        queue: Queue,
        payload: Vec<u8>,
        kind: PutKind,
        answer: PutAnswer,
    },
    /// There are settled entries.
    Settle,
    Rewind(Queue),
    /// Lets the copies that were put before be read.
    ReadKept {
        lane: LaneId,
        broker: Option<Confirmer>,
    },
    /// Runs once everything that was put before is durable.
    Run(Box<dyn FnOnce(&mut Store) + Send>),
    /// Answered when everything that came before is written.
    Close(oneshot::Sender<()>),
}

/// The sender of requests to the thread. Clones share the thread. It ends when it is closed, or
/// when the last clone is dropped.
#[derive(Clone)]
pub struct Spool {
    folder: Arc<Path>,
    /// Bounded by its senders: each put belongs to a record that holds its permit or its place
    /// until the answer, each settled key to a put, and a reader waits for its last answer.
    requests: mpsc::UnboundedSender<SpoolRequest>,
    settled: SettledKeys,
    stats: watch::Receiver<SpoolStats>,
    refuses: watch::Receiver<bool>,
    readable: Arc<[watch::Receiver<Readable>]>,
    found_copies: Arc<[FoundCopies; LaneId::ALL.len()]>,
    max: u64,
    /// One search at a time reads all letters.
    search_turn: Arc<Semaphore>,
    /// Closed when the thread has ended, whatever the cause.
    running: watch::Receiver<()>,
    busy: BusySince,
}

impl Spool {
    /// Opens the spool in `folder` with the entries of an earlier run. Makes the folder if it is
    /// absent. The spool never takes more than about `max` bytes.
    pub fn open(folder: &Path, max: u64) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Folder {
            folder: folder.to_owned(),
            source,
        };
        fs::create_dir_all(folder).map_err(failed)?;
        // The folder is as durable as its name in the one above.
        let above = folder.parent().filter(|above| *above != Path::new(""));
        let above = above.unwrap_or(Path::new("."));
        if let Err(why) = File::open(above).and_then(|above| above.sync_all()) {
            warn!(folder = %folder.display(), reason = %why, "the folder's name cannot be synced");
        }
        let place = FolderPlace::lock(folder)?;
        // The entries are not of the future, whatever the machine's clock says now.
        if let Some(newest) = newest(folder) {
            clock::not_before(newest);
        }
        let segment_max = segment_max(max);
        let open = |queue: Queue| {
            let mut log = Log::open(folder, &queue.name(), segment_max)?;
            if let Queue::Kept(_) = queue {
                log.read_nothing();
            }
            Ok(log)
        };
        let logs = Queue::all().map(open);
        let logs: Vec<_> = logs.collect::<Result<_, _>>().map_err(failed)?;
        let (requests, inbox) = mpsc::unbounded_channel();
        let (at, folder) = (folder.into(), folder.to_owned());
        let settled = SettledKeys::default();
        let store = Store::new(folder, logs, max, Arc::clone(&settled), place);
        let found_copies = LaneId::ALL.map(|lane| store.found_copies(lane));
        let busy = store.busy.clone();
        let stats = store.watch_stats();
        let refuses = store.watch_refuses();
        let readable = store.watch_readable();
        let (is_running, running) = watch::channel(());
        let run = move || {
            let _is_running = is_running;
            store.run(inbox);
        };
        let thread = thread::Builder::new().name("spool".into());
        thread.spawn(run).map_err(failed)?;
        Ok(Self {
            folder: at,
            requests,
            settled,
            stats,
            refuses,
            readable,
            found_copies: found_copies.into(),
            max,
            search_turn: Arc::new(Semaphore::new(1)),
            running,
            busy,
        })
    }

    /// The bytes that it takes at most, about.
    pub const fn max(&self) -> u64 {
        self.max
    }

    /// Removes an entry. After a power cut within the next moment it may come again.
    pub fn settle(&self, key: EntryKey) {
        let mut settled = self.settled.lock();
        settled.push(key);
        // The thread takes all of them at once.
        if settled.len() == 1 {
            // The thread has ended with the node; the entry comes again at the next start.
            self.requests.send(SpoolRequest::Settle).ok();
        }
    }

    /// Removes the entries of `queue` up to this one. Copies that are to be published again stay.
    pub fn settle_through(&self, queue: Queue, last: Position) {
        let settle = move |store: &mut Store| store.settle_through(queue, last);
        // The thread has ended with the node.
        self.requests.send(SpoolRequest::Run(Box::new(settle))).ok();
    }

    /// The copies of `lane` that were here when the spool was opened.
    pub fn found_copies(&self, lane: LaneId) -> &FoundCopies {
        &self.found_copies[lane as usize]
    }

    /// Lets the copies of `lane` that are on disk come out of their [`Tail`]; otherwise none does.
    /// Once they are settled, `broker` is the one that has confirmed those that are left: see
    /// [`FoundCopies`].
    pub fn read_kept(&self, lane: LaneId, broker: Option<Confirmer>) {
        let read = SpoolRequest::ReadKept { lane, broker };
        // The thread has ended with the node.
        self.requests.send(read).ok();
    }

    /// The broker that has confirmed the copies of `lane` has had the message of this number. The
    /// next start learns it: see [`FoundCopies`].
    pub fn broker_had(&self, lane: LaneId, last_message: u64) {
        let note = move |store: &mut Store| store.broker_had(lane, last_message);
        // The thread has ended with the node.
        self.requests.send(SpoolRequest::Run(Box::new(note))).ok();
    }

    /// Whether an entry is there still.
    ///
    /// # Errors
    /// If the spool is closed.
    pub async fn contains(&self, key: EntryKey) -> Result<bool, NotSafe> {
        self.run(move |store| store.contains(key)).await
    }

    /// Removes an entry. Returns whether it was still there.
    ///
    /// # Errors
    /// If the spool is closed.
    pub async fn remove(&self, key: EntryKey) -> Result<bool, NotSafe> {
        self.run(move |store| store.remove(key)).await
    }

    /// Reads the unsettled entries of `queue`, oldest first, each with a permit of `window`.
    pub fn tail(&self, queue: Queue, window: Arc<Semaphore>) -> Tail {
        Tail::new(self.clone(), queue, window, tail::BATCH)
    }

    /// The same, but reads one entry at a time from the disk, so that few are in memory.
    pub fn tail_one_by_one(&self, queue: Queue, window: Arc<Semaphore>) -> Tail {
        Tail::new(self.clone(), queue, window, 1)
    }

    /// The same, with a number of entries that are read at once. The window has as many permits.
    pub fn tail_by(&self, batch: u32, queue: Queue, window: Arc<Semaphore>) -> Tail {
        Tail::new(self.clone(), queue, window, batch)
    }

    /// Up to `max` entries that were not read since the last rewind, oldest first.
    async fn take(&self, queue: Queue, max: usize) -> Vec<(EntryKey, Entry)> {
        let taken = self
            .ask(|answer| SpoolRequest::Run(Box::new(move |store| store.take(queue, max, answer))));
        taken.await.unwrap_or_default()
    }

    /// Lets all unsettled entries of `queue` be read again.
    fn rewind(&self, queue: Queue) {
        // The thread has ended with the node.
        self.requests.send(SpoolRequest::Rewind(queue)).ok();
    }

    /// The record that was accepted first of those that wait for a lane.
    pub async fn oldest(&self) -> Option<Entry> {
        self.run(Store::oldest).await.ok().flatten()
    }

    /// Writes everything and ends the thread. Later requests are refused with [`NotSafe::Closed`].
    pub async fn close(&self) {
        // An error says that it has ended already.
        self.ask(SpoolRequest::Close).await.ok();
    }

    /// The contents of the disk. A copy: a caller that kept the lock behind it and asked again
    /// could wait for ever.
    pub fn stats(&self) -> SpoolStats {
        // Without its thread it takes nothing more.
        let has_ended = self.stats.has_changed().is_err();
        let stats = *self.stats.borrow();
        SpoolStats {
            refuses: stats.refuses || has_ended || self.busy.is_stalled(),
            ..stats
        }
    }

    /// Whether nothing can be put, as it changes. It ends with the spool.
    pub fn watch_refuses(&self) -> watch::Receiver<bool> {
        self.refuses.clone()
    }

    /// The contents of the disk, as they change.
    pub fn watch_stats(&self) -> watch::Receiver<SpoolStats> {
        self.stats.clone()
    }

    /// How long the thread has been at what it does.
    pub fn busy_since(&self) -> BusySince {
        self.busy.clone()
    }

    /// Logs each stall of the disk, until the spool has ended. The future keeps no spool alive.
    pub fn tell_of_stalls(&self) -> impl Future<Output = ()> + use<> {
        let (busy, running) = (self.busy.clone(), self.running.clone());
        busy::tell_of_stalls(Arc::clone(&self.folder), busy, running)
    }

    /// Runs `job` on the thread.
    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> T + Send + 'static,
    ) -> Result<T, NotSafe> {
        self.ask(|answer| {
            // The caller may be gone.
            SpoolRequest::Run(Box::new(move |store| drop(answer.send(job(store)))))
        })
        .await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> SpoolRequest,
    ) -> Result<T, NotSafe> {
        let (answer, mut answered) = oneshot::channel();
        let sent = self.requests.send(request(answer));
        sent.map_err(|_| NotSafe::Closed)?;
        let mut running = self.running.clone();
        tokio::select! {
            biased;
            answer = &mut answered => answer.map_err(|_| NotSafe::Closed),
            // A request that is sent just when the thread ends may stay in the channel for as long
            // as anybody can send.
            _ = running.changed() => answered.try_recv().map_err(|_| NotSafe::Closed),
        }
    }
}

/// The bytes of a file of a spool that has at most `max`. A record that stays long keeps its file: no
/// more than a small part of the room.
pub fn segment_max(max: u64) -> u64 {
    (max / 16).min(SEGMENT_MAX)
}

/// When a file in `folder` was last written.
fn newest(folder: &Path) -> Option<SystemTime> {
    let files = fs::read_dir(folder).ok()?;
    let written = files.filter_map(|file| file.ok()?.metadata().ok()?.modified().ok());
    written.max()
}

#[cfg(test)]
mod tests;
