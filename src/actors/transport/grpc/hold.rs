//! What the node holds: the records that have come in and are not settled yet, whether they wait for the forwarder, lie in its
//! hands, or wait for another try.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    delivery::{Delivery, Verdict},
    record::Record,
};

/// What the node holds at most: 1024 records and 64 MiB, since a record takes one unit of room per [`UNIT`] bytes or part of it.
const ROOM: usize = 1024;
const UNIT: usize = 64 << 10;
/// After how long a delivery that nobody settled comes again.
const UNSETTLED_DELAY: Duration = Duration::from_millis(100);
/// The longest that a delivery waits for another try: far past any delay in use, and safe to add to a clock.
const DELAY_MAX: Duration = Duration::from_hours(24);

/// Resolves once its record is settled for good; fails if the node gives the record up.
pub(super) type Settled = oneshot::Receiver<()>;

struct Held {
    record: Record,
    redelivered: bool,
    settled: oneshot::Sender<()>,
    _room: OwnedSemaphorePermit,
}

/// A held record on its way to [`Hold::next`], and when it may come out.
struct Ready {
    held: Held,
    due: Option<Instant>,
}

/// The way in.
#[derive(Clone)]
pub(super) struct Intake {
    room: Arc<Semaphore>,
    ready: mpsc::Sender<Ready>,
}

impl Intake {
    /// Waits for room, then holds `record`. Dropped before it resolves, the record is not held.
    pub(super) async fn admit(&self, record: &Record) -> Settled {
        let (settled, outcome) = oneshot::channel();
        let units = u32::try_from(record.body.len().div_ceil(UNIT).clamp(1, ROOM)).unwrap_or(u32::MAX);
        // The semaphore is never closed; were it, dropping `settled` would say that the record is not held.
        if let Ok(room) = Arc::clone(&self.room).acquire_many_owned(units).await {
            let held = Held { record: record.clone(), redelivered: false, settled, _room: room };
            put(&self.ready, Ready { held, due: None });
        }
        outcome
    }
}

/// A held record lies in the channel at most once and the channel is as long as there is room, so it is never full. It is closed
/// once the hold is gone: the record is then given up, which its sender learns.
fn put(ready: &mpsc::Sender<Ready>, entry: Ready) {
    if let Err(mpsc::error::TrySendError::Full(entry)) = ready.try_send(entry) {
        tracing::error!(id = %entry.held.record.id, "the hold is full: the record goes back to its sender");
    }
}

/// The way out.
pub(super) struct Hold {
    ready: mpsc::Sender<Ready>,
    inbox: Mutex<Inbox>,
}

struct Inbox {
    ready: mpsc::Receiver<Ready>,
    delayed: FuturesUnordered<Pin<Box<dyn Future<Output = Held> + Send>>>,
}

impl Hold {
    pub(super) fn new() -> (Intake, Self) {
        let (ready, inbox) = mpsc::channel(ROOM);
        let intake = Intake { room: Arc::new(Semaphore::new(ROOM)), ready: ready.clone() };
        (intake, Self { ready, inbox: Mutex::new(Inbox { ready: inbox, delayed: FuturesUnordered::new() }) })
    }

    /// The next record that is due. Dropping the future loses nothing.
    pub(super) async fn next(&self) -> Delivery {
        let mut inbox = self.inbox.lock().await;
        let Inbox { ready, delayed } = &mut *inbox;
        loop {
            let Ready { held, due } = tokio::select! {
                biased;
                Some(held) = delayed.next(), if !delayed.is_empty() => Ready { held, due: None },
                Some(entry) = ready.recv() => entry,
                // Not reached: `self` keeps a sender, so the channel is open.
                else => std::future::pending().await,
            };
            match due {
                None => return self.deliver(held),
                Some(due) => delayed.push(Box::pin(async move {
                    sleep_until(due).await;
                    held
                })),
            }
        }
    }

    fn deliver(&self, mut held: Held) -> Delivery {
        let ready = self.ready.clone();
        let record = held.record.clone();
        let redelivered = std::mem::replace(&mut held.redelivered, true);
        Delivery::new(record, redelivered, move |verdict| {
            let delay = match verdict {
                Verdict::Ack | Verdict::Reject => {
                    // Fails when the sender no longer waits: the record is settled all the same.
                    held.settled.send(()).ok();
                    return;
                }
                Verdict::RetryAfter(delay) => delay.min(DELAY_MAX),
                Verdict::Unsettled => UNSETTLED_DELAY,
            };
            put(&ready, Ready { held, due: Some(Instant::now() + delay) });
        })
    }
}
