//! The records that have come in and are not settled: they wait for the forwarder, are being
//! forwarded, or wait for a retry.
//!
//! This lane has no broker, so the node's disk keeps a record that the API does not take soon. Once
//! a record is on disk, its sender gets its receipt. A record goes to disk at once while memory is
//! full or the API is known to be down; it returns to memory when there is room.

use std::{mem, pin::Pin, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::{
    breaker::Breaker,
    delivery::Verdict,
    record::Record,
    spool::{Entry, EntryKey, Queue, Spool},
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
pub(super) struct OutcomeEvent {
    /// The record's number within its stream.
    pub number: usize,
    /// False if the record was given up: its sender must send it again.
    pub is_safe: bool,
}

/// Carries the outcomes of one stream's records. Each buffered record sends one event, so the
/// buffer bounds the channel.
pub(super) type OutcomeSender = mpsc::UnboundedSender<OutcomeEvent>;

/// Reports one record's outcome to its stream. Dropped unused, it reports that the record was given
/// up.
struct Reporter {
    number: usize,
    outcomes: Option<OutcomeSender>,
}

impl Reporter {
    fn new(number: usize, outcomes: &OutcomeSender) -> Self {
        Self {
            number,
            outcomes: Some(outcomes.clone()),
        }
    }

    fn report_safe(mut self) {
        self.report(true);
    }

    fn report(&mut self, is_safe: bool) {
        if let Some(outcomes) = self.outcomes.take() {
            let number = self.number;
            // This fails when the stream has ended. The record is safe all the same.
            outcomes.send(OutcomeEvent { number, is_safe }).ok();
        }
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.report(false);
    }
}

/// A record in memory. The task that settles it and the task that writes it to disk share it.
pub(super) struct BufferedRecord {
    record: Record,
    state: parking_lot::Mutex<State>,
    /// `None` once the outcome is reported, or for a record reloaded from disk.
    reporter: parking_lot::Mutex<Option<Reporter>>,
    buffer: BufferIn,
    _capacity: OwnedSemaphorePermit,
}

enum State {
    Memory,
    /// The write to disk has begun.
    Writing,
    Disk(EntryKey),
    Settled,
}

impl BufferedRecord {
    /// Writes the record to disk unless it is settled first. Its sender learns that it is safe in
    /// both cases.
    pub(super) async fn write_to_disk(&self) {
        match &mut *self.state.lock() {
            state @ State::Memory => *state = State::Writing,
            State::Writing | State::Disk(_) | State::Settled => return,
        }
        let put = self
            .buffer
            .0
            .spool
            .put_held(Queue::Carried, &Entry::new(&self.record, None))
            .await;
        let mut state = self.state.lock();
        match (put, mem::replace(&mut *state, State::Memory)) {
            (Ok(key), State::Settled) => {
                *state = State::Settled;
                self.buffer.0.spool.settle(key);
            }
            (Ok(key), _) => {
                *state = State::Disk(key);
                drop(state);
                self.report_safe();
            }
            (Err(_), State::Settled) => *state = State::Settled,
            (Err(why), _) => {
                warn!(id = &*self.record.id, %why, "a record stays in memory, unconfirmed");
            }
        }
    }

    fn settle(&self) {
        if let State::Disk(key) = mem::replace(&mut *self.state.lock(), State::Settled) {
            self.buffer.0.spool.settle(key);
        }
        self.report_safe();
    }

    fn report_safe(&self) {
        let reporter = self.reporter.lock().take();
        if let Some(reporter) = reporter {
            reporter.report_safe();
        }
    }
}

/// A buffered record on its way to [`BufferOut::next`].
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
    breaker: Arc<Breaker>,
}

impl BufferIn {
    /// Buffers `record` in memory if there is room and the API is not known to be down. The outcome
    /// goes to `outcomes`.
    pub(super) fn try_admit(
        &self,
        record: &Record,
        number: usize,
        outcomes: &OutcomeSender,
    ) -> Option<Arc<BufferedRecord>> {
        if self.0.breaker.is_open() {
            return None;
        }
        let capacity = Arc::clone(&self.0.capacity)
            .try_acquire_many_owned(units(record))
            .ok()?;
        let reporter = Reporter::new(number, outcomes);
        Some(self.insert(record.clone(), State::Memory, Some(reporter), capacity))
    }

    /// Buffers `record` in memory, or on disk if memory is full or the API is down. If the disk
    /// fails too, the record enters memory once there is room. Waits while too many records are on
    /// their way to the disk.
    ///
    /// Dropping the future before it resolves leaves the record out, without an outcome.
    pub(super) async fn admit(
        &self,
        record: &Record,
        number: usize,
        outcomes: &OutcomeSender,
    ) -> Option<Arc<BufferedRecord>> {
        if let Some(buffered) = self.try_admit(record, number, outcomes) {
            return Some(buffered);
        }
        let permit = Arc::clone(&self.0.overflow)
            .acquire_many_owned(units(record).min(OVERFLOW))
            .await;
        let reporter = Reporter::new(number, outcomes);
        // Nobody closes the semaphore. If it were closed, the dropped reporter would give the
        // record up.
        let permit = permit.ok()?;
        let buffer = self.clone();
        let record = record.clone();
        tokio::spawn(async move {
            buffer.overflow(record, reporter).await;
            drop(permit);
        });
        None
    }

    async fn overflow(&self, record: Record, reporter: Reporter) {
        let entry = Entry::new(&record, None);
        if self.0.spool.put(Queue::Carried, &entry).await.is_ok() {
            return reporter.report_safe();
        }
        let capacity = Arc::clone(&self.0.capacity).acquire_many_owned(units(&record));
        if let Ok(capacity) = capacity.await {
            self.insert(record, State::Memory, Some(reporter), capacity);
        }
    }

    fn insert(
        &self,
        record: Record,
        state: State,
        reporter: Option<Reporter>,
        capacity: OwnedSemaphorePermit,
    ) -> Arc<BufferedRecord> {
        let buffered = Arc::new(BufferedRecord {
            record,
            state: parking_lot::Mutex::new(state),
            reporter: parking_lot::Mutex::new(reporter),
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
            let missing = units(&record).saturating_sub(1);
            if missing > 0 {
                match Arc::clone(capacity).acquire_many_owned(missing).await {
                    Ok(more) => own.merge(more),
                    // Nobody closes the semaphore.
                    Err(_) => return,
                }
            }
            self.insert(record, State::Disk(key), None, own);
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

fn units(record: &Record) -> u32 {
    let units = record.body.len().div_ceil(UNIT).clamp(1, CAPACITY);
    u32::try_from(units).unwrap_or(u32::MAX)
}

async fn after(due: Instant, queued: Queued) -> Queued {
    sleep_until(due).await;
    queued
}

/// The receiving half.
pub(super) struct BufferOut(AsyncMutex<Inbox>);

struct Inbox {
    queued: mpsc::Receiver<Queued>,
    delayed: FuturesUnordered<Pin<Box<dyn Future<Output = Queued> + Send>>>,
}

pub(super) fn new(spool: Spool, breaker: Arc<Breaker>) -> (BufferIn, BufferOut) {
    let (queued, inbox) = mpsc::channel(CAPACITY);
    let shared = BufferShared {
        capacity: Arc::new(Semaphore::new(CAPACITY)),
        overflow: Arc::new(Semaphore::new(OVERFLOW as usize)),
        queued,
        spool,
        breaker,
    };
    let inbox = Inbox {
        queued: inbox,
        delayed: FuturesUnordered::new(),
    };
    (
        BufferIn(Arc::new(shared)),
        BufferOut(AsyncMutex::new(inbox)),
    )
}

impl BufferOut {
    /// The next record that is due. Dropping the future loses nothing.
    pub(super) async fn next(&self) -> Incoming {
        let mut inbox = self.0.lock().await;
        let Inbox { queued, delayed } = &mut *inbox;
        loop {
            let next = tokio::select! {
                biased;
                Some(next) = delayed.next(), if !delayed.is_empty() => Queued { due: None, ..next },
                Some(next) = queued.recv() => next,
                // No sender is left.
                else => std::future::pending().await,
            };
            match next.due {
                None => return Self::deliver(next),
                Some(due) => delayed.push(Box::pin(after(due, next))),
            }
        }
    }

    /// The next record in the channel that needs no delay, if there is one. Delayed records come
    /// out of [`Self::next`].
    pub(super) fn try_next(&self) -> Option<Incoming> {
        let mut inbox = self.0.try_lock().ok()?;
        loop {
            let next = inbox.queued.try_recv().ok()?;
            match next.due {
                None => return Some(Self::deliver(next)),
                Some(due) => inbox.delayed.push(Box::pin(after(due, next))),
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
}
