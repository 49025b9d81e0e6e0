//! The spool's thread: it takes requests, commits the entries that they put, and answers.

mod commit;
mod dead;
mod kept;
mod place;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, warn};

pub use self::place::FolderPlace;
use super::{
    BusySince, Confirmer, Entry, EntryKey, Queue, SettledKeys, SpoolRequest, SpoolStats,
    kept::read_broker,
    log::{self, Log, Reading},
};
use crate::lane_id::LaneId;

/// The most requests that share a commit.
const BATCH: usize = 8192;
/// With less than this part of its size left, the spool is about to refuse.
const NEARLY_FULL: u64 = 256;
/// Settled entries wait this long for others before they are written, unless something else is.
const SETTLE_PAUSE: Duration = Duration::from_millis(5);
/// A power cut may bring back what was settled in this time, or in the time of so many syncs.
const SETTLED_SYNC: Duration = Duration::from_millis(10);
const SETTLED_SYNCS: u32 = 8;
/// The time between probes of a disk that has failed, and between looks at one that works.
const PROBE: Duration = Duration::from_secs(1);

/// The state of the thread.
pub(super) struct Store {
    folder: PathBuf,
    /// By [`Queue::at`].
    logs: Vec<Log>,
    max: u64,
    settled: SettledKeys,
    /// When settled entries are to be written, and when they are to be synced.
    settle_at: Option<Instant>,
    sync_settled_at: Option<Instant>,
    /// The last write of settled entries failed.
    flush_failed: bool,
    /// The last write failed.
    failing: bool,
    /// Records that shared the last sync, and its duration.
    last_group: usize,
    sync_took: Duration,
    /// Of each lane, the broker that the disk names.
    named_brokers: [Option<Confirmer>; LaneId::ALL.len()],
    /// Of each lane, whether that name is still to be removed.
    stale_brokers: [bool; LaneId::ALL.len()],
    /// Of each lane, the broker whose name is to be written once no copies are to be read.
    next_brokers: [Option<Confirmer>; LaneId::ALL.len()],
    /// See [`SpoolStats`].
    commits: u64,
    committed: u64,
    commit_time: Duration,
    stats: watch::Sender<SpoolStats>,
    /// [`SpoolStats::refuses`], which changes seldom.
    refuses: watch::Sender<bool>,
    /// By [`Queue::at`]. Each has its own, so that only the reader of a queue with more is woken.
    readable: Vec<watch::Sender<Readable>>,
    place: FolderPlace,
    pub(super) busy: BusySince,
}

/// The readable part of a queue.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Readable {
    pub records: u64,
    end: (u32, u32),
}

impl Store {
    pub fn new(
        folder: PathBuf,
        logs: Vec<Log>,
        max: u64,
        settled: SettledKeys,
        place: FolderPlace,
    ) -> Self {
        let named_brokers = LaneId::ALL.map(|lane| read_broker(&folder, lane));
        let mut store = Self {
            folder,
            logs,
            max,
            settled,
            settle_at: None,
            sync_settled_at: None,
            flush_failed: false,
            failing: false,
            last_group: 0,
            sync_took: Duration::ZERO,
            named_brokers,
            stale_brokers: Default::default(),
            next_brokers: Default::default(),
            commits: 0,
            committed: 0,
            commit_time: Duration::ZERO,
            stats: watch::Sender::default(),
            refuses: watch::Sender::default(),
            readable: Queue::all().map(|_| watch::Sender::default()).collect(),
            place,
            busy: BusySince::default(),
        };
        store.report();
        store
    }

    /// The contents of the disk, as they change.
    pub fn watch_stats(&self) -> watch::Receiver<SpoolStats> {
        self.stats.subscribe()
    }

    /// Whether the disk takes nothing, as it changes.
    pub fn watch_refuses(&self) -> watch::Receiver<bool> {
        self.refuses.subscribe()
    }

    /// The readable part of each queue, by [`Queue::at`].
    pub fn watch_readable(&self) -> Arc<[watch::Receiver<Readable>]> {
        self.readable.iter().map(watch::Sender::subscribe).collect()
    }

    /// Serves requests until one closes the spool, or all senders are gone.
    pub fn run(mut self, mut inbox: mpsc::UnboundedReceiver<SpoolRequest>) {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
        else {
            return error!("the spool's thread cannot wait for requests");
        };
        let mut requests = Vec::new();
        let mut probed = Instant::now();
        loop {
            let times = [Some(probed + PROBE), self.settle_at, self.sync_settled_at];
            let patience = times
                .into_iter()
                .flatten()
                .min()
                .map_or(Duration::MAX, |at| {
                    at.saturating_duration_since(Instant::now())
                });
            self.busy.set(None);
            let received = runtime
                .block_on(async { timeout(patience, inbox.recv_many(&mut requests, BATCH)).await });
            self.busy.set(Some(Instant::now()));
            if received == Ok(0) {
                break;
            }
            let only_settled = !requests.is_empty()
                && (requests.iter()).all(|request| matches!(request, SpoolRequest::Settle));
            if only_settled {
                requests.clear();
                self.settle_at = Some(Instant::now() + SETTLE_PAUSE);
                continue;
            }
            if probed.elapsed() >= PROBE {
                if self.failing {
                    self.probe();
                }
                self.check_place();
                probed = Instant::now();
            }
            self.check_folder();
            self.commit_group(&mut inbox, &mut requests);
            if let Some(close) = self.serve(requests.drain(..)) {
                self.flush(true);
                // The caller may have given up.
                close.send(()).ok();
                return;
            }
        }
        self.settle();
        self.flush(true);
    }

    /// Returns the sender of the answer to a request to close, if there is one.
    fn serve(
        &mut self,
        requests: impl Iterator<Item = SpoolRequest>,
    ) -> Option<oneshot::Sender<()>> {
        self.settle();
        let mut room = self.room();
        let mut puts = Vec::new();
        let mut jobs = Vec::new();
        let mut close = None;
        for request in requests {
            match request {
                SpoolRequest::Put {
                    queue,
                    payload,
                    kind,
                    answer,
                } => {
                    let appended = self.append(queue, &payload, kind, &mut room);
                    puts.push((appended, answer));
                }
                SpoolRequest::Settle => {}
                SpoolRequest::Rewind(queue) => self.logs[queue.at()].rewind(),
                SpoolRequest::ReadKept { lane, broker } => {
                    // What is put later is not among them.
                    self.commit(std::mem::take(&mut puts));
                    self.read_kept(lane, broker);
                }
                SpoolRequest::Run(job) => jobs.push(job),
                SpoolRequest::Close(answer) => close = Some(answer),
            }
        }
        self.commit(puts);
        for job in jobs {
            job(self);
        }
        let sync_settled = self.sync_settled_at.is_some_and(|at| at <= Instant::now());
        self.flush(sync_settled);
        self.name_brokers();
        self.report();
        close
    }

    fn settle(&mut self) {
        self.settle_at = None;
        // Not locked meanwhile.
        let settled = std::mem::take(&mut *self.settled.lock());
        for key in settled {
            self.logs[key.queue].settle(key.position);
        }
    }

    pub fn contains(&self, key: EntryKey) -> bool {
        self.logs[key.queue].contains(key.position)
    }

    /// Returns whether the entry was there.
    pub fn remove(&mut self, key: EntryKey) -> bool {
        self.logs[key.queue].settle(key.position)
    }

    /// Reads up to `max` entries of `queue`. If the caller is gone, they are read again.
    pub fn take(
        &mut self,
        queue: Queue,
        max: usize,
        answer: oneshot::Sender<Vec<(EntryKey, Entry)>>,
    ) {
        let name = queue.name();
        let queue = queue.at();
        let log = &mut self.logs[queue];
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some((position, payload)) = log.next()
        {
            match Entry::decode(&*payload) {
                Ok(entry) => taken.push((EntryKey { queue, position }, entry)),
                Err(why) => {
                    error!(queue = name, reason = %why, "an entry of a later version stays on disk");
                }
            }
        }
        if answer.send(taken).is_err_and(|taken| !taken.is_empty()) {
            log.rewind();
        }
    }

    pub fn settle_through(&mut self, queue: Queue, last: log::Position) {
        self.logs[queue.at()].settle_through(last);
    }

    pub fn oldest(&mut self) -> Option<Entry> {
        // Those of `SpoolStats::waiting`.
        let queues = Queue::all()
            .filter(|queue| matches!(queue, Queue::Waiting | Queue::Pinned(_) | Queue::Routed(_)));
        let firsts = queues.filter_map(|queue| {
            let mut first = None;
            let log = &mut self.logs[queue.at()];
            let visited = log.visit(&mut Reading::default(), |_, payload| {
                first = Entry::decode(&*payload).ok();
                first.is_none()
            });
            // What cannot be read is logged.
            visited.ok().and(first)
        });
        firsts.min_by_key(|entry| {
            entry
                .record()
                .origin
                .map_or(u64::MAX, |origin| origin.at_us)
        })
    }

    fn flush(&mut self, durable: bool) {
        let flush = |log: &mut Log| {
            log.flush(false)?;
            if durable && log.has_unsynced() {
                return log.sync_settled();
            }
            Ok(())
        };
        let logs = self.logs.iter_mut().filter(|log| log.has_files());
        let flushed = logs.map(|log| flush(log).err());
        let failure = flushed.fold(None, Option::or);
        if let Some(why) = &failure
            && !self.flush_failed
        {
            warn!(reason = %why, "cannot write which entries are settled: they may come again");
        }
        self.flush_failed = failure.is_some();
        let is_due = self.logs.iter().any(Log::has_unsynced);
        self.sync_settled_at = match self.sync_settled_at {
            _ if !is_due => None,
            Some(at) if !durable => Some(at),
            _ => {
                let pause = (SETTLED_SYNCS * self.sync_took).max(SETTLED_SYNC);
                Some(Instant::now() + pause)
            }
        };
    }

    /// Updates the stats, and logs damage that was found.
    fn report(&mut self) {
        let mut stats = SpoolStats {
            found_carried: self.logs[Queue::Carried.at()].found(),
            kept: LaneId::ALL.map(|lane| self.logs[Queue::Kept(lane).at()].len()),
            kept_bytes: LaneId::ALL.map(|lane| self.logs[Queue::Kept(lane).at()].live_bytes()),
            commits: self.commits,
            committed: self.committed,
            commit_time: self.commit_time,
            ..SpoolStats::default()
        };
        let logs = self.logs.iter_mut().zip(&mut stats.records);
        for ((log, records), readable) in logs.zip(&self.readable) {
            if log.has_files() {
                *records = log.readable();
                stats.bytes += log.bytes();
                stats.live_bytes += log.live_bytes();
            }
            let now = Readable {
                records: *records,
                end: log.end(),
            };
            readable.send_if_modified(|before| std::mem::replace(before, now) != now);
            for damage in log.damages() {
                error!(
                    file = %damage.file.display(),
                    at = damage.at,
                    size = damage.size,
                    kept = damage.kept.as_ref().map(|file| file.display().to_string()),
                    "damage in the spool: these bytes are not a whole entry any more"
                );
            }
        }
        stats.live_bytes -= stats.kept_bytes.iter().sum::<u64>();
        stats.refuses =
            self.failing || self.max.saturating_sub(stats.bytes) <= self.max / NEARLY_FULL;
        self.stats
            .send_if_modified(|before| std::mem::replace(before, stats) != stats);
        let refuses = stats.refuses;
        self.refuses
            .send_if_modified(|before| std::mem::replace(before, refuses) != refuses);
    }
}
