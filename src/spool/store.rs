//! The spool's thread: it takes requests, commits the entries that they put, and answers.

mod dead;
mod kept;
mod place;

use std::{
    path::PathBuf,
    sync::Arc,
    thread,
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
    Entry, EntryKey, NotSafe, Queue, SettledKeys, SpoolRequest, SpoolStats, frame,
    log::{self, Log},
    put::{PutAnswer, PutKind, PutResult},
};
use crate::lane_id::LaneId;

/// The most requests that share a commit.
const BATCH: usize = 8192;
/// Dead letters and moved entries may go beyond the spool's size by this part of it.
const RESERVE: u64 = 16;
/// With less than this part of its size left, the spool is about to refuse.
const NEARLY_FULL: u64 = 256;
/// Group commit: a sync waits until as many puts have come as shared the last one. It waits for at
/// most the time of this many syncs, and at most [`GROUP_WAIT_MAX`]. Clients that were just
/// answered are about to send again.
const GROUP_SYNCS: u32 = 4;
const GROUP_WAIT_MAX: Duration = Duration::from_millis(1);
/// The step of that wait. A faster sync is not worth a wait.
const GROUP_STEP: Duration = Duration::from_micros(50);
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
    /// Of each lane, the broker whose name is to be written once no copies are to be read.
    brokers: [Option<String>; LaneId::ALL.len()],
    /// See [`SpoolStats`].
    commits: u64,
    committed: u64,
    stats: watch::Sender<SpoolStats>,
    /// By [`Queue::at`]. Each has its own, so that only the reader of a queue with more is woken.
    readable: Vec<watch::Sender<Readable>>,
    place: FolderPlace,
}

/// What a queue's reader may read.
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
            brokers: Default::default(),
            commits: 0,
            committed: 0,
            stats: watch::Sender::default(),
            readable: Queue::all().map(|_| watch::Sender::default()).collect(),
            place,
        };
        store.report();
        store
    }

    /// The contents of the disk, as they change.
    pub fn watch_stats(&self) -> watch::Receiver<SpoolStats> {
        self.stats.subscribe()
    }

    /// What can be read of each queue, by [`Queue::at`].
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
            let received = runtime
                .block_on(async { timeout(patience, inbox.recv_many(&mut requests, BATCH)).await });
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

    /// Adds the requests of the next moment, while fewer puts wait than shared the last sync.
    fn commit_group(
        &self,
        inbox: &mut mpsc::UnboundedReceiver<SpoolRequest>,
        requests: &mut Vec<SpoolRequest>,
    ) {
        let puts = |requests: &[SpoolRequest]| {
            requests
                .iter()
                .filter(|request| matches!(request, SpoolRequest::Put { .. }))
                .count()
        };
        let mut waiting = puts(requests);
        let patience = (GROUP_SYNCS * self.sync_took).min(GROUP_WAIT_MAX);
        let began = Instant::now();
        while (1..self.last_group).contains(&waiting) && began.elapsed() + GROUP_STEP < patience {
            thread::sleep(GROUP_STEP);
            let before = requests.len();
            requests.extend(
                std::iter::from_fn(|| inbox.try_recv().ok()).take(BATCH.saturating_sub(before)),
            );
            waiting += puts(&requests[before..]);
        }
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
        for key in std::mem::take(&mut *self.settled.lock()) {
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

    fn room(&self) -> u64 {
        self.max
            .saturating_sub(self.logs.iter().map(Log::bytes).sum())
    }

    fn append(
        &mut self,
        queue: Queue,
        payload: &[u8],
        kind: PutKind,
        room: &mut u64,
    ) -> Result<EntryKey, NotSafe> {
        self.place.check_not_lost()?;
        let size = (frame::HEAD + payload.len()) as u64;
        // A dead letter makes room: its record leaves the spool. So does what replaces an entry.
        let reserve = if queue == Queue::Dead || kind == PutKind::Moved {
            self.max / RESERVE
        } else {
            0
        };
        if size > *room + reserve || payload.len() > frame::PAYLOAD_MAX {
            return Err(NotSafe::Full);
        }
        let appended = self.logs[queue.at()].append(payload, kind == PutKind::Held);
        let position = appended.map_err(|why| {
            self.fails(&why);
            NotSafe::Disk(why.to_string())
        })?;
        *room = room.saturating_sub(size);
        Ok(EntryKey {
            queue: queue.at(),
            position,
        })
    }

    /// Makes what was appended durable, and answers all puts.
    fn commit(&mut self, mut puts: Vec<(PutResult, PutAnswer)>) {
        let began = Instant::now();
        let failures: Vec<_> = self.logs.iter_mut().map(|log| log.commit().err()).collect();
        let group = puts.iter().filter(|(appended, _)| appended.is_ok()).count();
        if group > 0 {
            match failures.iter().flatten().next() {
                Some(why) => self.fails(why),
                None => self.works(),
            }
            self.last_group = group;
            self.sync_took = began.elapsed();
            if self.failing {
                self.check_place();
            }
        }
        let mut safe = [0; Queue::COUNT];
        for (put, _) in &mut puts {
            let Ok(key) = put else { continue };
            match &failures[key.queue] {
                None => safe[key.queue] += 1,
                Some(why) => *put = Err(NotSafe::Disk(why.to_string())),
            }
        }
        for records in safe.into_iter().filter(|records| *records > 0) {
            self.commits += 1;
            self.committed += records;
        }
        if puts.iter().any(|(put, _)| put.is_err()) {
            // Who is refused, and asks why, finds it in the stats.
            self.report();
        }
        self.answer(puts);
    }

    fn answer(&mut self, puts: Vec<(PutResult, PutAnswer)>) {
        let mut copies: Vec<(_, Vec<_>)> = Vec::new();
        for (put, answer) in puts {
            match answer {
                // The caller may be gone. What was put waits to be read like any other entry.
                PutAnswer::One(answer) => drop(answer.send(put)),
                PutAnswer::Copies(answers) => {
                    let mut writers = copies.iter_mut();
                    match writers.find(|(writer, _)| answers.same_channel(writer)) {
                        Some((_, puts)) => puts.push(put),
                        None => copies.push((answers, vec![put])),
                    }
                }
            }
        }
        for (answers, puts) in copies {
            // Nobody else would ever remove a copy whose caller is gone.
            if let Err(unheard) = answers.send(puts) {
                for key in unheard.0.into_iter().flatten() {
                    self.remove(key);
                }
            }
        }
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
                    error!(queue = name, %why, "an entry of a later version stays on disk");
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
        let queues = Queue::all().filter(|queue| !matches!(queue, Queue::Dead | Queue::Parked(_)));
        let firsts = queues.filter_map(|queue| {
            let mut first = None;
            self.logs[queue.at()].visit(|_, payload| {
                first = Entry::decode(&*payload).ok();
                first.is_none()
            });
            first
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
        let flushed = self.logs.iter_mut().map(|log| flush(log).err());
        let failure = flushed.fold(None, Option::or);
        if let Some(why) = &failure
            && !self.flush_failed
        {
            warn!(%why, "cannot write which entries are settled: they may come again");
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
            commits: self.commits,
            committed: self.committed,
            ..SpoolStats::default()
        };
        let logs = self.logs.iter_mut().zip(&mut stats.records);
        for ((log, records), readable) in logs.zip(&self.readable) {
            *records = log.readable();
            let now = Readable {
                records: *records,
                end: log.end(),
            };
            readable.send_if_modified(|before| std::mem::replace(before, now) != now);
            stats.bytes += log.bytes();
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
        stats.refuses =
            self.failing || self.max.saturating_sub(stats.bytes) <= self.max / NEARLY_FULL;
        self.stats
            .send_if_modified(|before| std::mem::replace(before, stats) != stats);
    }
}
