//! What the node holds: the records that have come in and are not settled yet, whether they wait for the forwarder, lie in its
//! hands, or wait for another try.
//!
//! There is no broker behind this lane, so the node's disk is what keeps a record that the API does not take soon: it is
//! [`Held::carry`]ed, and then its sender has its receipt. Where there is no room left in memory, or while the API is known to be
//! away, a record goes to disk at once, and comes back when there is room.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::{
    breaker::Breaker,
    delivery::{Delivery, Verdict},
    record::Record,
    spool::{Entry, Key, Queue, Spool},
};

/// What the node holds in memory at most: 1024 records and 64 MiB, since a record takes one unit of room per [`UNIT`] bytes or
/// part of it.
const ROOM: usize = 1024;
const UNIT: usize = 64 << 10;
/// What may be on its way to the disk because there is no room, in the same units.
const OVERFLOW: u32 = 128;
/// How many records are brought back from disk at once.
const BATCH: u32 = 64;
/// After how long a delivery that nobody settled comes again.
const UNSETTLED_DELAY: Duration = Duration::from_millis(100);
/// The longest that a delivery waits for another try: far past any delay in use, and safe to add to a clock.
const DELAY_MAX: Duration = Duration::from_hours(24);

/// Whether the record of that number is safe, or given up.
pub(super) type News = (usize, bool);
/// Where the news of a stream arrives. Bounded by what is held, and on its way to the disk: each record brings one piece of news.
pub(super) type Desk = mpsc::UnboundedSender<News>;

/// A sender that waits to hear that its record is safe. Dropped before, it hears that the record is given up.
struct Waiting {
    number: usize,
    desk: Option<Desk>,
}

impl Waiting {
    fn new(number: usize, desk: &Desk) -> Self {
        Self {
            number,
            desk: Some(desk.clone()),
        }
    }

    fn tell_safe(mut self) {
        self.tell(true);
    }

    fn tell(&mut self, is_safe: bool) {
        if let Some(desk) = self.desk.take() {
            // Fails when the sender waits no longer: what is safe is safe all the same.
            desk.send((self.number, is_safe)).ok();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.tell(false);
    }
}

/// A record in memory. Its place is shared by whoever settles it, and whoever puts it on disk meanwhile.
pub(super) struct Held {
    record: Record,
    state: StdMutex<State>,
    /// Who waits to hear that it is safe.
    waiting: StdMutex<Option<Waiting>>,
    intake: Intake,
    _room: OwnedSemaphorePermit,
}

enum State {
    Memory,
    /// On its way to the disk.
    Writing,
    Disk(Key),
    Settled,
}

impl Held {
    /// Puts the record on disk, unless it is settled first. Either way its sender then knows it to be safe.
    pub(super) async fn carry(&self) {
        match &mut *self.state() {
            state @ State::Memory => *state = State::Writing,
            State::Writing | State::Disk(_) | State::Settled => return,
        }
        let put = self
            .intake
            .0
            .spool
            .put(Queue::Carried, &Entry::new(&self.record, None), true)
            .await;
        let mut state = self.state();
        match (put, mem::replace(&mut *state, State::Memory)) {
            (Ok(key), State::Settled) => {
                *state = State::Settled;
                self.intake.0.spool.settle(key);
            }
            (Ok(key), _) => {
                *state = State::Disk(key);
                drop(state);
                self.is_safe();
            }
            (Err(_), State::Settled) => *state = State::Settled,
            (Err(why), _) => {
                warn!(id = &*self.record.id, %why, "a record stays in memory, unconfirmed")
            }
        }
    }

    fn settle(&self) {
        if let State::Disk(key) = mem::replace(&mut *self.state(), State::Settled) {
            self.intake.0.spool.settle(key);
        }
        self.is_safe();
    }

    fn is_safe(&self) {
        if let Some(waiting) = self
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            waiting.tell_safe();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A held record on its way to [`Hold::next`], and when it may come out.
struct Ready {
    held: Arc<Held>,
    redelivered: bool,
    due: Option<Instant>,
}

/// The way in. Clones are one.
#[derive(Clone)]
pub(super) struct Intake(Arc<Way>);

struct Way {
    room: Arc<Semaphore>,
    overflow: Arc<Semaphore>,
    ready: mpsc::Sender<Ready>,
    spool: Spool,
    breaker: Arc<Breaker>,
}

impl Intake {
    /// Holds `record` in memory, if there is room and the API is not known to be away. The news comes to `desk`.
    pub(super) fn try_admit(
        &self,
        record: &Record,
        number: usize,
        desk: &Desk,
    ) -> Option<Arc<Held>> {
        if self.0.breaker.is_open() {
            return None;
        }
        let room = Arc::clone(&self.0.room)
            .try_acquire_many_owned(units(record))
            .ok()?;
        Some(self.hold(
            record.clone(),
            State::Memory,
            Some(Waiting::new(number, desk)),
            room,
        ))
    }

    /// Holds `record`: in memory, or on disk where there is no room or the API is away, or where the disk fails as well, once there
    /// is room. Waits while too many are on their way to the disk. Dropped before it resolves, the record is not held, and there is no news.
    pub(super) async fn admit(
        &self,
        record: &Record,
        number: usize,
        desk: &Desk,
    ) -> Option<Arc<Held>> {
        if let Some(held) = self.try_admit(record, number, desk) {
            return Some(held);
        }
        let place = Arc::clone(&self.0.overflow)
            .acquire_many_owned(units(record).min(OVERFLOW))
            .await;
        let (intake, record, waiting) = (self.clone(), record.clone(), Waiting::new(number, desk));
        // The semaphore is never closed; were it, the drop of `waiting` would say that the record is not held.
        let place = place.ok()?;
        tokio::spawn(async move {
            intake.overflow(record, waiting).await;
            drop(place);
        });
        None
    }

    async fn overflow(&self, record: Record, waiting: Waiting) {
        if self
            .0
            .spool
            .put(Queue::Carried, &Entry::new(&record, None), false)
            .await
            .is_ok()
        {
            waiting.tell_safe();
        } else if let Ok(room) = Arc::clone(&self.0.room)
            .acquire_many_owned(units(&record))
            .await
        {
            self.hold(record, State::Memory, Some(waiting), room);
        }
    }

    fn hold(
        &self,
        record: Record,
        state: State,
        waiting: Option<Waiting>,
        room: OwnedSemaphorePermit,
    ) -> Arc<Held> {
        let held = Arc::new(Held {
            record,
            state: StdMutex::new(state),
            waiting: StdMutex::new(waiting),
            intake: self.clone(),
            _room: room,
        });
        put(
            &self.0.ready,
            Ready {
                held: Arc::clone(&held),
                redelivered: false,
                due: None,
            },
        );
        held
    }

    /// Brings what is carried on disk back into memory as there is room, for ever.
    pub(super) async fn bring_back(self) {
        let mut on_disk = self.0.spool.held();
        // What an earlier life has taken and not settled.
        self.0.spool.rewind(Queue::Carried);
        loop {
            // The semaphore is never closed.
            let Ok(mut room) = Arc::clone(&self.0.room).acquire_many_owned(BATCH).await else {
                return;
            };
            on_disk.borrow_and_update();
            let taken = self.0.spool.take(Queue::Carried, room.num_permits()).await;
            if taken.is_empty() {
                drop(room);
                if Spool::until_more(&mut on_disk, Queue::Carried).await {
                    continue;
                }
                return;
            }
            for (key, entry) in taken {
                let record = entry.record();
                // A long record takes more than its place in the batch.
                let missing = units(&record).saturating_sub(1);
                let Some(mut place) = room.split(1) else {
                    return;
                };
                if missing > 0 {
                    match Arc::clone(&self.0.room).acquire_many_owned(missing).await {
                        Ok(more) => place.merge(more),
                        Err(_) => return,
                    }
                }
                self.hold(record, State::Disk(key), None, place);
            }
        }
    }
}

fn units(record: &Record) -> u32 {
    u32::try_from(record.body.len().div_ceil(UNIT).clamp(1, ROOM)).unwrap_or(u32::MAX)
}

/// A held record lies in the channel at most once and the channel is as long as there is room, so it is never full. It is closed
/// once the hold is gone: the record is then given up, which its sender learns, or lies on disk.
fn put(ready: &mpsc::Sender<Ready>, entry: Ready) {
    if let Err(mpsc::error::TrySendError::Full(entry)) = ready.try_send(entry) {
        tracing::error!(id = %entry.held.record.id, "the hold is full: the record goes back to its sender");
    }
}

async fn after(due: Instant, entry: Ready) -> Ready {
    sleep_until(due).await;
    entry
}

/// The way out.
pub(super) struct Hold {
    inbox: Mutex<Inbox>,
}

struct Inbox {
    ready: mpsc::Receiver<Ready>,
    delayed: FuturesUnordered<Pin<Box<dyn Future<Output = Ready> + Send>>>,
}

impl Hold {
    pub(super) fn new(spool: Spool, breaker: Arc<Breaker>) -> (Intake, Self) {
        let (ready, inbox) = mpsc::channel(ROOM);
        let (room, overflow) = (
            Arc::new(Semaphore::new(ROOM)),
            Arc::new(Semaphore::new(OVERFLOW as usize)),
        );
        let intake = Intake(Arc::new(Way {
            room,
            overflow,
            ready,
            spool,
            breaker,
        }));
        (
            intake,
            Self {
                inbox: Mutex::new(Inbox {
                    ready: inbox,
                    delayed: FuturesUnordered::new(),
                }),
            },
        )
    }

    /// The next record that is due. Dropping the future loses nothing.
    pub(super) async fn next(&self) -> Delivery {
        let mut inbox = self.inbox.lock().await;
        let Inbox { ready, delayed } = &mut *inbox;
        loop {
            let entry = tokio::select! {
                biased;
                Some(entry) = delayed.next(), if !delayed.is_empty() => Ready { due: None, ..entry },
                Some(entry) = ready.recv() => entry,
                // Nobody is left who could send.
                else => std::future::pending().await,
            };
            match entry.due {
                None => return Self::deliver(entry),
                Some(due) => delayed.push(Box::pin(after(due, entry))),
            }
        }
    }

    /// The next record, if one is due and came for the first time.
    pub(super) fn try_next(&self) -> Option<Delivery> {
        let mut inbox = self.inbox.try_lock().ok()?;
        loop {
            let entry = inbox.ready.try_recv().ok()?;
            match entry.due {
                None => return Some(Self::deliver(entry)),
                Some(due) => inbox.delayed.push(Box::pin(after(due, entry))),
            }
        }
    }

    fn deliver(
        Ready {
            held, redelivered, ..
        }: Ready,
    ) -> Delivery {
        let record = held.record.clone();
        Delivery::new(record, redelivered, move |verdict| {
            let delay = match verdict {
                Verdict::Ack | Verdict::Reject => return held.settle(),
                Verdict::RetryAfter(delay) => delay.min(DELAY_MAX),
                Verdict::Unsettled => UNSETTLED_DELAY,
            };
            let ready = Ready {
                held: Arc::clone(&held),
                redelivered: true,
                due: Some(Instant::now() + delay),
            };
            put(&held.intake.0.ready, ready);
        })
    }
}
