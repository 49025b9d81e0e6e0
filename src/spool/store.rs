//! What the spool's thread does: it takes orders, commits what they put, and answers.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::{error, warn};

use super::{
    Entry, EntryKey, NotSafe, Queue, SpoolRequest, SpoolStats, Which, frame,
    log::{self, Log, Position},
};
use crate::{clock::unix_us, record::Origin};

/// How many orders share a commit at most.
const BATCH: usize = 8192;
/// Dead letters may go beyond the spool's size by this part of it.
const RESERVE: u64 = 16;
/// Where less than this part of the spool's size is left, it is about to refuse.
const NEARLY_FULL: u64 = 256;
/// A sync waits for as many records as shared the last one, at most for the time of so many syncs, and no longer than this: whoever
/// was answered by the last one is about to put its next.
const COMPANY_SYNCS: u32 = 4;
const COMPANY_MAX: Duration = Duration::from_millis(1);
/// The grain of that wait. Where a sync takes less, there is nothing to be saved.
const COMPANY_STEP: Duration = Duration::from_micros(50);
/// How often a disk that has failed is tried.
const PROBE: Duration = Duration::from_secs(1);

/// What the thread owns.
pub(super) struct Store {
    folder: PathBuf,
    /// By [`Queue::at`].
    logs: Vec<Log>,
    max: u64,
    /// The last write failed.
    failing: bool,
    /// Records that shared the last sync, and what it took.
    company: usize,
    sync_took: Duration,
    /// See [`SpoolStats`].
    commits: u64,
    committed: u64,
    held: watch::Sender<SpoolStats>,
    _lock: File,
}

/// A put that waits for its commit.
struct Pending {
    key: EntryKey,
    answer: oneshot::Sender<Result<EntryKey, NotSafe>>,
}

impl Store {
    pub fn new(folder: PathBuf, logs: Vec<Log>, max: u64, lock: File) -> Self {
        let mut store = Self {
            folder,
            logs,
            max,
            failing: false,
            company: 0,
            sync_took: Duration::ZERO,
            commits: 0,
            committed: 0,
            held: watch::Sender::new(SpoolStats::default()),
            _lock: lock,
        };
        store.tell();
        store
    }

    /// What lies on disk, as it changes.
    pub fn watch_stats(&self) -> watch::Receiver<SpoolStats> {
        self.held.subscribe()
    }

    /// Serves orders until one says close, or nobody is left who could give one.
    pub fn run(mut self, mut inbox: mpsc::UnboundedReceiver<SpoolRequest>) {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
        else {
            return error!("the spool's thread cannot wait for orders");
        };
        let mut orders = Vec::new();
        let mut probed = Instant::now();
        loop {
            let patience = if self.failing {
                PROBE.saturating_sub(probed.elapsed())
            } else {
                Duration::MAX
            };
            let received = runtime
                .block_on(async { timeout(patience, inbox.recv_many(&mut orders, BATCH)).await });
            if received == Ok(0) {
                break;
            }
            if self.failing && probed.elapsed() >= PROBE {
                self.probe();
                probed = Instant::now();
            }
            self.gather(&mut inbox, &mut orders);
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

    /// Adds orders that come within a moment, while fewer records wait than shared the last sync.
    fn gather(
        &self,
        inbox: &mut mpsc::UnboundedReceiver<SpoolRequest>,
        orders: &mut Vec<SpoolRequest>,
    ) {
        let puts = |orders: &[SpoolRequest]| {
            orders
                .iter()
                .filter(|order| matches!(order, SpoolRequest::Put { .. }))
                .count()
        };
        let mut waiting = puts(orders);
        let patience = (COMPANY_SYNCS * self.sync_took).min(COMPANY_MAX);
        let began = Instant::now();
        while (1..self.company).contains(&waiting) && began.elapsed() + COMPANY_STEP < patience {
            thread::sleep(COMPANY_STEP);
            let before = orders.len();
            orders.extend(
                std::iter::from_fn(|| inbox.try_recv().ok()).take(BATCH.saturating_sub(before)),
            );
            waiting += puts(&orders[before..]);
        }
    }

    /// Finds out whether the disk works again, so that a node that nobody sends to because it is not ready becomes ready.
    fn probe(&mut self) {
        let path = self.folder.join("probe");
        let probe = fs::write(&path, [0; 4096]).and_then(|()| File::open(&path)?.sync_all());
        self.failing = probe.is_err() || log::is_failing();
        fs::remove_file(&path).ok();
    }

    /// The answer to the order that closes, if there is one.
    fn serve(&mut self, orders: impl Iterator<Item = SpoolRequest>) -> Option<oneshot::Sender<()>> {
        let mut room = self.room();
        let (mut puts, mut readers, mut close) = (Vec::new(), Vec::new(), None);
        for order in orders {
            match order {
                SpoolRequest::Put {
                    queue,
                    payload,
                    held,
                    answer,
                } => match self.append(queue, &payload, held, &mut room) {
                    Ok(key) => puts.push(Pending { key, answer }),
                    Err(why) => refuse(answer, why),
                },
                SpoolRequest::Settle(key) => self.logs[key.queue].settle(key.position),
                SpoolRequest::Rewind(queue) => self.logs[queue.at()].rewind(),
                SpoolRequest::Close(answer) => close = Some(answer),
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
        self.max
            .saturating_sub(self.logs.iter().map(Log::bytes).sum())
    }

    fn append(
        &mut self,
        queue: Queue,
        payload: &[u8],
        held: bool,
        room: &mut u64,
    ) -> Result<EntryKey, NotSafe> {
        let size = (frame::HEAD + payload.len()) as u64;
        // A full spool of records must not keep those that the API refuses from leaving it.
        let reserve = if queue == Queue::Dead {
            self.max / RESERVE
        } else {
            0
        };
        if size > *room + reserve || payload.len() > frame::PAYLOAD_MAX {
            return Err(NotSafe::Full);
        }
        let appended = self.logs[queue.at()].append(payload, held);
        self.failing |= appended.is_err();
        let position = appended.map_err(|why| NotSafe::Disk(why.to_string()))?;
        *room = room.saturating_sub(size);
        Ok(EntryKey {
            queue: queue.at(),
            position,
        })
    }

    fn commit(&mut self, puts: Vec<Pending>) {
        let began = Instant::now();
        let failures: Vec<_> = self.logs.iter_mut().map(|log| log.commit().err()).collect();
        if !puts.is_empty() {
            self.failing = failures.iter().any(Option::is_some);
            (self.company, self.sync_took) = (puts.len(), began.elapsed());
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
        self.commits += safe
            .iter()
            .map(|records| u64::from(*records > 0))
            .sum::<u64>();
        self.committed += safe.iter().sum::<u64>();
    }

    /// What reads entries sees those that were put before.
    fn read(&mut self, order: SpoolRequest) {
        match order {
            SpoolRequest::Take { queue, max, answer } => {
                let taken = self.take(queue, max);
                if let Err(taken) = answer.send(taken)
                    && !taken.is_empty()
                {
                    // Whoever wanted them is gone.
                    self.logs[queue.at()].rewind();
                }
            }
            SpoolRequest::Oldest(answer) => drop(answer.send(self.oldest())),
            SpoolRequest::List { max, answer } => drop(answer.send(self.list(max))),
            SpoolRequest::Replay { which, answer } => drop(answer.send(self.replay(&which))),
            SpoolRequest::Forget { which, answer } => drop(answer.send(Ok(self.forget(&which)))),
            SpoolRequest::Put { .. }
            | SpoolRequest::Settle(_)
            | SpoolRequest::Rewind(_)
            | SpoolRequest::Close(_) => {}
        }
    }

    fn take(&mut self, queue: Queue, max: usize) -> Vec<(EntryKey, Entry)> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some((position, payload)) = self.logs[queue.at()].next() else {
                break;
            };
            match Entry::decode(&*payload) {
                Ok(entry) => taken.push((
                    EntryKey {
                        queue: queue.at(),
                        position,
                    },
                    entry,
                )),
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
        firsts.min_by_key(|entry| {
            entry
                .record()
                .origin
                .map_or(u64::MAX, |origin| origin.at_us)
        })
    }

    /// The dead letters that `which` names, with their keys.
    fn find(&mut self, which: &Which, max: usize) -> Vec<(Position, Entry)> {
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
        self.find(&Which::All, max)
            .into_iter()
            .map(|(_, entry)| entry)
            .collect()
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
                let origin = Some(
                    Origin {
                        run: "replay".into(),
                        at_us: unix_us(),
                    }
                    .to_text(),
                );
                let entry = Entry {
                    letter: None,
                    origin,
                    ..entry.clone()
                };
                waiting
                    .append(&entry.encode_to_vec(), false)
                    .map_err(disk)?;
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
    fn strike_out(&mut self, found: Vec<(Position, Entry)>) -> u64 {
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
        let mut held = SpoolStats {
            commits: self.commits,
            committed: self.committed,
            ..SpoolStats::default()
        };
        for (log, records) in self.logs.iter_mut().zip(&mut held.records) {
            *records = log.len();
            held.bytes += log.bytes();
            for damage in log.damages() {
                error!(
                    ?damage,
                    "damage in the spool: these bytes are no whole entry any more"
                );
            }
        }
        held.found_carried = self.logs[Queue::Carried.at()].found();
        held.refuses =
            self.failing || self.max.saturating_sub(held.bytes) <= self.max / NEARLY_FULL;
        self.held
            .send_if_modified(|told| std::mem::replace(told, held) != held);
    }
}

fn refuse(answer: oneshot::Sender<Result<EntryKey, NotSafe>>, why: NotSafe) {
    // Who asked may be gone; nothing was promised.
    answer.send(Err(why)).ok();
}
