//! The records that have come in and are not settled: they wait for the forwarder, are being
//! forwarded, or wait for a retry.
//!
//! This lane has no broker, so the node's disk keeps a record that the API does not take soon. Once
//! a record is on disk, its sender gets its receipt. A record goes to disk at once while memory is
//! full or the API is known to be down; it returns to memory when there is room.

use std::{
    mem,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until},
};
use tracing::{info, warn};
use tracing_mutex::parkinglot::Mutex;

use crate::{
    breaker::ApiBreakers,
    delivery::Verdict,
    record::Record,
    spool::{Entry, EntryKey, NotSafe, Queue, Spool},
    transport::{Incoming, Message},
};

/// Capacity in memory, in units of [`UNIT`] bytes: at most 1024 records or 64 MiB. A record takes
/// at least one unit.
const CAPACITY: usize = 1024;
const UNIT: usize = 64 << 10;
/// Units that may be on their way to the disk because memory is full.
const OVERFLOW: u32 = 128;
/// Delay before a delivery that was dropped unsettled is redelivered.
const UNSETTLED_DELAY: Duration = Duration::from_millis(100);
/// The longest retry delay: far above any delay in use, and safe to add to a clock.
const DELAY_MAX: Duration = Duration::from_hours(24);

/// The outcome of one record of a stream.
#[derive(Clone, Copy)]
pub(super) struct OutcomeEvent {
    /// The record's number within its stream.
    pub number: usize,
    /// False if the record was given up: its sender must send it again.
    pub is_safe: bool,
}

/// Carries the outcomes of one stream's records. Each buffered record sends one event, so the
/// buffer bounds the channel.
pub(super) type OutcomeSender = mpsc::UnboundedSender<OutcomeEvent>;

/// Reports one record's outcome to its stream when it is dropped: given up, unless it was marked
/// safe.
pub(super) struct Reporter {
    event: OutcomeEvent,
    outcomes: OutcomeSender,
}

impl Reporter {
    pub(super) fn new(number: usize, outcomes: &OutcomeSender) -> Self {
        Self {
            event: OutcomeEvent {
                number,
                is_safe: false,
            },
            outcomes: outcomes.clone(),
        }
    }

    fn report_safe(mut self) {
        self.event.is_safe = true;
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        // This fails when the stream has ended. A safe record is safe all the same.
        self.outcomes.send(self.event).ok();
    }
}

/// A record in memory. The task that settles it and the task that writes it to disk share it.
pub(super) struct BufferedRecord {
    record: Record,
    state: Mutex<State>,
    buffer: BufferIn,
    _capacity: OwnedSemaphorePermit,
}

enum State {
    Memory {
        reporter: Reporter,
        /// The write to disk has begun.
        is_writing: bool,
    },
    Disk(EntryKey),
    Settled,
}

impl BufferedRecord {
    /// Writes the record to disk unless it is settled first. Its sender learns that it is safe in
    /// both cases.
    pub(super) async fn write_to_disk(&self) {
        match &mut *self.state.lock() {
            State::Memory { is_writing, .. } if !*is_writing => *is_writing = true,
            _ => return,
        }
        let spool = &self.buffer.0.spool;
        let entry = Entry::new(&self.record, None);
        let put = spool.put_held(Queue::Carried, &entry).await;
        self.buffer.tell_disk(put.as_ref().err());
        let mut state = self.state.lock();
        match (put, &mut *state) {
            // It was settled during the write.
            (Ok(key), State::Settled) => spool.settle(key),
            (Ok(key), _) => {
                if let State::Memory { reporter, .. } = mem::replace(&mut *state, State::Disk(key))
                {
                    reporter.report_safe();
                }
            }
            // It is tried again soon.
            (Err(_), State::Memory { is_writing, .. }) => *is_writing = false,
            (Err(_), _) => {}
        }
    }

    fn settle(&self) {
        let state = mem::replace(&mut *self.state.lock(), State::Settled);
        match state {
            State::Memory { reporter, .. } => reporter.report_safe(),
            State::Disk(key) => self.buffer.0.spool.settle(key),
            State::Settled => {}
        }
    }
}

/// A buffered record on its way to [`BufferOut::receive`].
struct Queued {
    buffered: Arc<BufferedRecord>,
    redelivered: bool,
    /// `None` if it may come out at once.
    due: Option<Instant>,
}

/// The sending half. Clones share the buffer.
#[derive(Clone)]
pub(super) struct BufferIn(Arc<BufferShared>);

struct BufferShared {
    capacity: Arc<Semaphore>,
    overflow: Arc<Semaphore>,
    queued: mpsc::Sender<Queued>,
    spool: Spool,
    breakers: ApiBreakers,
    /// The disk did not take the last record.
    disk_refuses: AtomicBool,
}

impl BufferIn {
    /// Tells once that the disk takes no records, and once that it takes them again: each of them is
    /// tried again and again.
    fn tell_disk(&self, failure: Option<&NotSafe>) {
        if !self.is_news(failure.is_some()) {
            return;
        }
        match failure {
            Some(why) => warn!(
                reason = %why,
                "the disk takes no carried records; those that the API has not taken stay unconfirmed"
            ),
            None => info!("the disk takes carried records again"),
        }
    }

    fn is_news(&self, refuses: bool) -> bool {
        self.0.disk_refuses.swap(refuses, Relaxed) != refuses
    }

    /// The most records that are in memory or on disk.
    pub(super) fn records(&self) -> u64 {
        // A record takes one unit of memory at least, and may be on disk, too.
        let in_memory = CAPACITY - self.0.capacity.available_permits();
        in_memory as u64 + self.0.spool.stats().records(Queue::Carried)
    }

    /// Buffers `record` in memory. Gives it back if memory has no room, or the API is known to be
    /// down.
    pub(super) fn try_admit(
        &self,
        record: Record,
        reporter: impl FnOnce() -> Reporter,
    ) -> Result<Arc<BufferedRecord>, Record> {
        if self.0.breakers.is_open(record.api.as_deref()) {
            return Err(record);
        }
        let capacity = Arc::clone(&self.0.capacity).try_acquire_many_owned(units(&record));
        match capacity {
            Ok(capacity) => Ok(self.insert(record, State::memory(reporter()), capacity)),
            Err(_) => Err(record),
        }
    }

    /// Waits while too many records are on their way to the disk. `None` never happens, because
    /// nobody closes the semaphore.
    pub(super) async fn overflow_room(&self, record: &Record) -> Option<OwnedSemaphorePermit> {
        let overflow = Arc::clone(&self.0.overflow);
        let permit = overflow.acquire_many_owned(units(record).min(OVERFLOW));
        permit.await.ok()
    }

    /// Buffers `record` on disk. If the disk fails, the record enters memory once there is room.
    pub(super) fn overflow(
        &self,
        record: Record,
        reporter: Reporter,
        permit: OwnedSemaphorePermit,
    ) {
        let buffer = self.clone();
        tokio::spawn(async move {
            let entry = Entry::new(&record, None);
            if buffer.0.spool.put(Queue::Carried, &entry).await.is_ok() {
                reporter.report_safe();
            } else {
                let capacity = Arc::clone(&buffer.0.capacity);
                if let Ok(capacity) = capacity.acquire_many_owned(units(&record)).await {
                    buffer.insert(record, State::memory(reporter), capacity);
                }
            }
            drop(permit);
        });
    }

    fn insert(
        &self,
        record: Record,
        state: State,
        capacity: OwnedSemaphorePermit,
    ) -> Arc<BufferedRecord> {
        let buffered = Arc::new(BufferedRecord {
            record,
            state: Mutex::new(state),
            buffer: self.clone(),
            _capacity: capacity,
        });
        self.enqueue(Queued {
            buffered: Arc::clone(&buffered),
            redelivered: false,
            due: None,
        });
        buffered
    }

    /// Reloads records from disk as memory has room, for ever.
    pub(super) async fn reload(self) {
        let capacity = &self.0.capacity;
        // Begins with the records that an earlier connection took in and did not settle.
        let mut tail = self.0.spool.tail(Queue::Carried, Arc::clone(capacity));
        while let Some((key, entry, mut own)) = tail.next().await {
            let record = entry.record();
            // A large record needs more than its one unit.
            let missing = Arc::clone(capacity).acquire_many_owned(units(&record) - 1);
            // Nobody closes the semaphore.
            let Ok(missing) = missing.await else { return };
            own.merge(missing);
            self.insert(record, State::Disk(key), own);
        }
    }

    /// The channel holds a buffered record at most once and has a place for each, so it is never
    /// full. It is closed once [`BufferOut`] is gone: the record is then given up, and its sender
    /// learns that, or it is on disk.
    fn enqueue(&self, queued: Queued) {
        if let Err(mpsc::error::TrySendError::Full(queued)) = self.0.queued.try_send(queued) {
            tracing::error!(
                id = %queued.buffered.record.id,
                "the buffer is full: the record goes back to its sender"
            );
        }
    }
}

impl State {
    const fn memory(reporter: Reporter) -> Self {
        Self::Memory {
            reporter,
            is_writing: false,
        }
    }
}

/// At least 1.
fn units(record: &Record) -> u32 {
    let units = record.body.len().div_ceil(UNIT).clamp(1, CAPACITY);
    u32::try_from(units).unwrap_or(u32::MAX)
}

/// The receiving half.
pub(super) struct BufferOut(AsyncMutex<Inbox>);

struct Inbox {
    queued: mpsc::Receiver<Queued>,
    /// Received and not handed out. Empty between two calls, but keeps its memory.
    received: Vec<Queued>,
    delayed: FuturesUnordered<Pin<Box<dyn Future<Output = Queued> + Send>>>,
}

pub(super) fn new(spool: Spool, breakers: ApiBreakers) -> (BufferIn, BufferOut) {
    let (queued, inbox) = mpsc::channel(CAPACITY);
    let shared = BufferShared {
        capacity: Arc::new(Semaphore::new(CAPACITY)),
        overflow: Arc::new(Semaphore::new(OVERFLOW as usize)),
        queued,
        spool,
        breakers,
        disk_refuses: AtomicBool::new(false),
    };
    let inbox = Inbox {
        queued: inbox,
        received: Vec::new(),
        delayed: FuturesUnordered::new(),
    };
    (
        BufferIn(Arc::new(shared)),
        BufferOut(AsyncMutex::new(inbox)),
    )
}

impl BufferOut {
    /// Waits for records that are due and appends them to `into`, `max` at most. Dropping the
    /// future loses nothing.
    pub(super) async fn receive(&self, into: &mut Vec<Incoming>, max: usize) {
        let mut inbox = self.0.lock().await;
        let Inbox {
            queued,
            received,
            delayed,
        } = &mut *inbox;
        let before = into.len();
        while into.len() == before {
            tokio::select! {
                biased;
                Some(due) = delayed.next(), if !delayed.is_empty() => into.push(deliver(due)),
                1.. = queued.recv_many(received, max) => {
                    for next in received.drain(..) {
                        match next.due {
                            None => into.push(deliver(next)),
                            Some(due) => delayed.push(Box::pin(async move {
                                sleep_until(due).await;
                                next
                            })),
                        }
                    }
                }
                // No sender is left.
                else => std::future::pending().await,
            }
        }
    }
}

fn deliver(queued: Queued) -> Incoming {
    let Queued {
        buffered,
        redelivered,
        ..
    } = queued;
    let message = Message::from(&buffered.record);
    Incoming::new(message, redelivered, move |verdict| {
        let delay = match verdict {
            Verdict::Ack | Verdict::Reject => return buffered.settle(),
            Verdict::RetryAfter(delay) => delay.min(DELAY_MAX),
            Verdict::Unsettled => UNSETTLED_DELAY,
        };
        buffered.buffer.enqueue(Queued {
            buffered: Arc::clone(&buffered),
            redelivered: true,
            due: Some(Instant::now() + delay),
        });
    })
}

#[cfg(test)]
mod tests;
