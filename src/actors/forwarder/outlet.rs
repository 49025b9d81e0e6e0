//! The way of a lane's deliveries to one API.
//!
//! If there are several APIs, each has places of its own in a lane. A delivery that finds none waits
//! for a moment. Then its record goes to the disk of its API, and the broker may forget it: an API
//! that hangs holds up no record of another, even if both use the same lane.

use std::{rc::Rc, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::debug;

use super::{
    batch::{self, QueuedDelivery},
    mover::Mover,
    post::{Poster, PosterParams},
};
use crate::{
    actors::held::{HeldRecord, HeldRecords, MovedRecord},
    delivery::{Acker, Delivery, HeldEntry, MovableMessage, Verdict},
    lane_id::LaneId,
    record::Record,
    spool::NotSafe,
};

/// How long a delivery may wait in the lane for a place. With the number of those that may wait, it
/// says how slow an API may be before its records go to disk.
const PLACE_PATIENCE: Duration = Duration::from_millis(50);
/// The pause before a record goes to disk that could not.
const HOLD_AGAIN: Duration = Duration::from_secs(1);
/// The pause of a record on disk that was given back without a reason.
const UNSETTLED_REST: Duration = Duration::from_millis(100);

/// One per lane and API.
pub struct Outlet {
    poster: Rc<Poster>,
    /// Only if a POST may have many records.
    batcher: Option<mpsc::Sender<QueuedDelivery>>,
    /// Changes with each drain of the lane, and of the records on disk.
    drain: watch::Receiver<()>,
    drain_held: watch::Receiver<()>,
    mover: Mover,
}

impl Outlet {
    pub fn new(
        params: PosterParams,
        drain: watch::Receiver<()>,
        drain_held: watch::Receiver<()>,
    ) -> Self {
        let limits = params.api.limits;
        let poster = Rc::new(Poster::new(params));
        let batcher =
            (limits.batch > 1).then(|| batch::start(Rc::clone(&poster), limits, drain.clone()));
        Self {
            poster,
            batcher,
            drain,
            drain_held,
            mover: Mover::default(),
        }
    }

    /// The name of the API, as in [`Record::api`](crate::record::Record::api).
    pub fn api(&self) -> Option<&str> {
        self.poster.params.api.name.as_deref()
    }

    pub fn poster(&self) -> Rc<Poster> {
        Rc::clone(&self.poster)
    }

    /// A place for one delivery, if one is free.
    pub fn place(&self) -> Option<OwnedSemaphorePermit> {
        let places = Arc::clone(&self.poster.params.slots.deliveries);
        places.try_acquire_owned().ok()
    }

    /// Whether records of the API may be on disk.
    pub fn holds(&self) -> bool {
        self.poster.params.api.held.is_some()
    }

    /// Whether the task that makes batches has panicked.
    pub fn is_broken(&self) -> bool {
        let batcher = self.batcher.as_ref();
        batcher.is_some_and(mpsc::Sender::is_closed)
    }

    /// POSTs `delivery`, which has `place`, until it is settled.
    pub fn deliver(
        &self,
        delivery: Delivery,
        place: OwnedSemaphorePermit,
        token: TaskTrackerToken,
    ) {
        let delivery = if self.holds() && delivery.held.is_none() {
            self.mover.watch(delivery)
        } else {
            delivery
        };
        if let Some(batcher) = &self.batcher {
            let queued = QueuedDelivery {
                delivery,
                permit: Some(place),
                _in_flight: token,
            };
            if batcher.try_send(queued).is_err() {
                debug!("there is no batcher: a delivery is nakked");
            }
            return;
        }
        let poster = Rc::clone(&self.poster);
        let drain = match delivery.held {
            None => next_change(&self.drain),
            Some(_) => next_change(&self.drain_held),
        };
        // Boxed: a task is moved several times before it runs, and its future is large.
        actix_rt::spawn(Box::pin(async move {
            poster.deliver(delivery, place, drain).await;
            drop(token);
        }));
    }

    /// Changes with the next drain of what came out of the lane.
    pub fn next_drain(&self) -> watch::Receiver<()> {
        next_change(&self.drain)
    }

    /// Waits a moment for a place, or lets the disk keep the record. `waiting` is the permit of the
    /// lane, which pulls no more than those. `drain` is the one that is next when the delivery comes.
    pub async fn deliver_or_hold(
        &self,
        delivery: Delivery,
        waiting: OwnedSemaphorePermit,
        token: TaskTrackerToken,
        mut drain: watch::Receiver<()>,
    ) {
        let params = &self.poster.params;
        let Some(held) = &params.api.held else { return };
        // Those on disk would wait for longer than this one.
        let is_behind = held.has_waiting(params.lane) || params.api.breaker.is_open();
        let mut patience = if is_behind {
            Duration::ZERO
        } else {
            PLACE_PATIENCE
        };
        loop {
            let place = Arc::clone(&params.slots.deliveries).acquire_owned();
            let place = tokio::select! {
                biased;
                // A drain frees places. An error means that the forwarder is gone, which gives the
                // delivery back too.
                _ = drain.changed() => return,
                place = timeout(patience, place) => place,
            };
            match place {
                Ok(Ok(place)) => {
                    drop(waiting);
                    return self.deliver(delivery, place, token);
                }
                Ok(Err(_)) => return,
                Err(_) => {}
            }
            if hold(held, &self.poster.params, &delivery).await {
                held.tell(params.lane);
                return delivery.ack();
            }
            patience = HOLD_AGAIN;
        }
    }

    /// POSTs the records on disk that came out of `lane`, for ever.
    pub async fn deliver_held(
        self: Rc<Self>,
        lane: LaneId,
        tracker: TaskTracker,
        stopping: CancellationToken,
    ) {
        let slots = &self.poster.params.slots;
        let Some(held) = &self.poster.params.api.held else {
            return;
        };
        let window = Arc::clone(&slots.deliveries);
        let mut tail = held.tail(lane, slots.read_at_once(), window);
        // Each has a place.
        let mut delivering = JoinSet::new();
        loop {
            let next = tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                next = tail.next() => next,
            };
            let Some(next) = next else { return };
            while delivering.try_join_next().is_some() {}
            let record = HeldRecord::new(next);
            delivering.spawn_local(Rc::clone(&self).until_settled(record, tracker.clone()));
        }
    }

    async fn until_settled(self: Rc<Self>, next: HeldRecord, tracker: TaskTracker) {
        let HeldRecord {
            record,
            held,
            permit,
        } = next;
        let verdict = self.deliver_entry(&record, &held, permit, &tracker);
        self.repeat(record, held, verdict, &tracker).await;
    }

    /// POSTs a record on disk until it is settled. `verdict` is that of the last time.
    async fn repeat(
        &self,
        record: Record,
        held: HeldEntry,
        mut verdict: oneshot::Receiver<Verdict>,
        tracker: &TaskTracker,
    ) {
        loop {
            let rest = match verdict.await {
                Ok(Verdict::Ack | Verdict::Reject) => return,
                Ok(Verdict::RetryAfter(rest)) => rest,
                Ok(Verdict::Unsettled) | Err(_) => UNSETTLED_REST,
            };
            sleep(rest).await;
            let places = Arc::clone(&self.poster.params.slots.deliveries);
            // They are never closed.
            let Ok(place) = places.acquire_owned().await else {
                return;
            };
            verdict = self.deliver_entry(&record, &held, place, tracker);
        }
    }

    /// POSTs a record on disk, and gives its verdict.
    fn deliver_entry(
        &self,
        record: &Record,
        held: &HeldEntry,
        place: OwnedSemaphorePermit,
        tracker: &TaskTracker,
    ) -> oneshot::Receiver<Verdict> {
        let (acker, verdict) = acker();
        let delivery = Delivery {
            record: record.clone(),
            redelivered: false,
            since: Instant::now(),
            held: Some(held.clone()),
            span: self.poster.params.tracer.process(record),
            acker,
        };
        self.deliver(delivery, place, tracker.token());
        verdict
    }

    /// Moves the messages of deliveries that take long to disk, for ever.
    pub async fn move_late(self: Rc<Self>, tracker: TaskTracker, stopping: CancellationToken) {
        let params = &self.poster.params;
        let Some(held) = &params.api.held else {
            return;
        };
        let mut moving = JoinSet::new();
        loop {
            let late = tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                late = self.mover.next(|| held.has_waiting(params.lane)) => late,
            };
            while moving.try_join_next().is_some() {}
            moving.spawn_local(Rc::clone(&self).move_message(late, tracker.clone()));
        }
    }

    /// Moves a message to disk unless its record reaches its end before. Then sees to the record.
    async fn move_message(self: Rc<Self>, message: Arc<MovableMessage>, tracker: TaskTracker) {
        // On its own: it must not stop between the disk and the broker.
        let moving = actix_rt::spawn(Rc::clone(&self).try_move(message));
        let Ok(Some(moved)) = moving.await else {
            return;
        };
        let MovedMessage {
            record,
            entry,
            verdict,
            _moved,
        } = moved;
        self.repeat(record, entry, verdict, &tracker).await;
    }

    /// `None` if the record has reached its end before.
    async fn try_move(self: Rc<Self>, message: Arc<MovableMessage>) -> Option<MovedMessage> {
        let params = &self.poster.params;
        let held = params.api.held.as_ref()?;
        // At no time does it count as one that waits.
        let moved = held.moved(params.lane);
        let (key, record) = loop {
            if !message.is_movable() || params.ledger.is_delivered(&message.record) {
                return None;
            }
            let put = held.put_moved(params.lane, &params.tag, &message.record);
            match put.await {
                Ok(put) => break put,
                Err(NotSafe::Closed) => return None,
                Err(_) => sleep(HOLD_AGAIN).await,
            }
        };
        let entry = HeldEntry {
            key,
            tag: params.tag.clone(),
        };
        let (acker, verdict) = acker();
        let Some(in_broker) = message.move_to(entry.clone(), acker) else {
            held.spool().settle(key);
            return None;
        };
        params.ledger.parked(params.lane, &record);
        params.copies.release(&record);
        in_broker.settle(Verdict::Ack);
        held.tell(params.lane);
        Some(MovedMessage {
            record,
            entry,
            verdict,
            _moved: moved,
        })
    }
}

/// Changes with the next drain. A clone alone would also tell of those that are over.
fn next_change(drain: &watch::Receiver<()>) -> watch::Receiver<()> {
    let mut next = drain.clone();
    next.mark_unchanged();
    next
}

/// A record that is on disk, and is being POSTed.
struct MovedMessage {
    record: Record,
    entry: HeldEntry,
    verdict: oneshot::Receiver<Verdict>,
    _moved: MovedRecord,
}

/// An acker, and the verdict that it gets.
fn acker() -> (Acker, oneshot::Receiver<Verdict>) {
    let (sender, verdict) = oneshot::channel();
    let acker = Acker::new(move |verdict| {
        // The task that waits for it ends with the forwarder.
        sender.send(verdict).ok();
    });
    (acker, verdict)
}

/// Puts the record of `delivery` on disk, and counts that. Returns whether it is there.
async fn hold(held: &HeldRecords, params: &PosterParams, delivery: &Delivery) -> bool {
    let PosterParams {
        lane, tag, ledger, ..
    } = params;
    let record = &delivery.record;
    let is_held = held.put(*lane, tag, record).await.is_ok();
    if is_held {
        ledger.parked(*lane, record);
        params.copies.release(record);
    }
    is_held
}

/// Lets the disk keep a record for an API that is not configured: `held` has those. `params` are of
/// any API in the lane.
pub async fn hold_unclaimed(
    held: HeldRecords,
    poster: Rc<Poster>,
    delivery: Delivery,
    waiting: OwnedSemaphorePermit,
) {
    let params = &poster.params;
    held.tell_unclaimed(params.lane, &delivery.record);
    if hold(&held, params, &delivery).await {
        delivery.ack();
    } else {
        delivery.retry_after(super::UNWRITTEN_REST);
    }
    drop(waiting);
}
