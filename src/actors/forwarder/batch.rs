//! Many records in one POST: a JSON array, with the records' ids in their order as its `Idempotency-Key`.
//!
//! A batch has the deliveries that are there when a POST may begin, and those of the next two milliseconds: an idle lane hardly
//! waits, a busy one fills its batches. It is settled record by record. If the API refuses a batch, or fails at it again and
//! again, each half is POSTed by itself, until the record that the API refuses is alone and becomes a dead letter.

use std::{collections::HashSet, ops::Range, rc::Rc, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::{LocalBoxFuture, join_all};
use percent_encoding::{AsciiSet, CONTROLS, PercentEncode, utf8_percent_encode};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, timeout_at},
};
use tracing::debug;

use super::{HOLD_MAX, HOLD_REST, Limits, Payload, PostEnd, Poster, RetryLimits};
use crate::{
    actors::tasks::{Task, Underway},
    config::CONCURRENCY_MAX,
    delivery::Delivery,
    spool::DeathReason,
};

/// How long the first record of a batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// Bytes of the ids in one header: many servers take no line over 8 KiB.
const IDS_MAX: usize = 6 << 10;
/// Bytes of the records in one POST, unless one alone has more: many servers take no body over 1 MiB.
const BODY_MAX: usize = 1 << 20;
/// A batch that has failed so often is halved: the API may fail at one of its records, or at so many together.
const FAILURES_MAX: u32 = 5;
/// Characters of an id that are escaped in a list of ids.
const IN_LIST: &AsciiSet = &CONTROLS.add(b',').add(b'%');

/// A delivery that waits for its POST, with the permit of its lane.
pub struct QueuedDelivery {
    pub delivery: Delivery,
    pub permit: OwnedSemaphorePermit,
    pub underway: Underway,
}

/// The batches of a forwarder.
pub struct Batches {
    incoming: mpsc::Sender<QueuedDelivery>,
    batcher: Task,
}

impl Batches {
    /// Deliveries that wait for their POST when `drain` changes are given back.
    pub fn new(
        poster: Rc<Poster>,
        Limits { posts, batch }: Limits,
        drain: watch::Receiver<u64>,
    ) -> Self {
        // Each delivery holds a permit of the lane, and the lane has no more of them.
        let (incoming, inbox) = mpsc::channel(CONCURRENCY_MAX);
        let batcher = Batcher {
            inbox,
            waiting: Vec::new(),
            slots: Arc::new(Semaphore::new(posts)),
            batch,
        };
        Self {
            incoming,
            batcher: Task::spawn(batcher.run(poster, drain)),
        }
    }

    /// Adds a delivery to the next batch. If the batcher has ended, it is dropped, and so given back.
    pub fn add(&self, delivery: QueuedDelivery) {
        if self.incoming.try_send(delivery).is_err() {
            debug!("batches are not POSTed any more; a delivery goes back to the broker");
        }
    }

    /// The batcher has panicked.
    pub fn have_ended(&self) -> bool {
        self.batcher.has_ended()
    }
}

/// The state of the task that makes batches of deliveries.
struct Batcher {
    inbox: mpsc::Receiver<QueuedDelivery>,
    /// Deliveries for the next batch, those that did not fit into the last one included.
    waiting: Vec<QueuedDelivery>,
    /// One for each POST that may be in flight.
    slots: Arc<Semaphore>,
    batch: usize,
}

impl Batcher {
    async fn run(mut self, poster: Rc<Poster>, mut drain: watch::Receiver<u64>) {
        loop {
            let slot = tokio::select! {
                biased;
                drains = drain.changed() => match drains {
                    Ok(()) => {
                        self.waiting.clear();
                        while self.inbox.try_recv().is_ok() {}
                        continue;
                    }
                    // The forwarder is gone.
                    Err(_) => return,
                },
                slot = self.fill() => slot,
            };
            let Some(slot) = slot else { return };
            let rest = self.waiting.split_off(fitting(&self.waiting));
            let batch = std::mem::replace(&mut self.waiting, rest);
            let poster = Rc::clone(&poster);
            let slots = PostSlots {
                all: Arc::clone(&self.slots),
                own: slot,
            };
            let drain = drain.clone();
            actix_rt::spawn(async move {
                poster
                    .deliver_all(batch, DeathReason::default(), slots, drain)
                    .await;
            });
        }
    }

    /// Waits for a batch and a slot for its POST. `None` if there will be no more. Dropping the future loses nothing.
    async fn fill(&mut self) -> Option<OwnedSemaphorePermit> {
        if self.waiting.is_empty() && self.inbox.recv_many(&mut self.waiting, self.batch).await == 0
        {
            return None;
        }
        // Only now: halves of batches wait for slots too.
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        let until = Instant::now() + LINGER;
        while self.waiting.len() < self.batch {
            let room = self.batch - self.waiting.len();
            match timeout_at(until, self.inbox.recv_many(&mut self.waiting, room)).await {
                Ok(1..) => {}
                // No more will come, or the time is over.
                _ => break,
            }
        }
        Some(slot)
    }
}

/// How many of the first deliveries fit into one POST.
fn fitting(waiting: &[QueuedDelivery]) -> usize {
    let (mut ids, mut bytes) = (0, 0);
    let fit = waiting.iter().take_while(|queued| {
        let id = &queued.delivery.record.id;
        ids += if is_plain(id) {
            id.len()
        } else {
            listed(id).map(str::len).sum()
        } + 1;
        bytes += queued.delivery.record.body.len() + 1;
        ids <= IDS_MAX && bytes <= BODY_MAX
    });
    fit.count().max(1)
}

/// Whether an id needs no escape in a list. An id has visible characters only.
fn is_plain(id: &str) -> bool {
    memchr::memchr2(b',', b'%', id.as_bytes()).is_none()
}

/// An id as an element of a list.
fn listed(id: &str) -> PercentEncode<'_> {
    utf8_percent_encode(id, IN_LIST)
}

/// The body and the key of a POST of many records.
struct JsonArray {
    body: BytesMut,
    /// Where each record lies in the body.
    records: Vec<Range<usize>>,
    key: String,
}

/// The slot of a POST, and where its halves get theirs.
struct PostSlots {
    all: Arc<Semaphore>,
    own: OwnedSemaphorePermit,
}

impl Poster {
    /// Settles each delivery of `batch`, or gives it back. `reason` tells of earlier POSTs of the same records.
    fn deliver_all(
        &self,
        batch: Vec<QueuedDelivery>,
        reason: DeathReason,
        slots: PostSlots,
        mut drain: watch::Receiver<u64>,
    ) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let (mut batch, array) = self.array(batch).await;
            let Some(limits) = self.limits(&batch) else {
                return;
            };
            let (body, places, key) = array.end();
            let payload = Payload {
                body: body.clone(),
                key: &key,
                traceparent: common_traceparent(&batch),
            };
            let end = self.post_with_retries(payload, limits, reason, &mut drain);
            let reason = match end.await {
                PostEnd::Delivered { status } => {
                    return self.delivered(batch, &body, &places, status);
                }
                PostEnd::HeldTooLong => {
                    return batch
                        .into_iter()
                        .for_each(|queued| queued.delivery.retry_after(HOLD_REST));
                }
                PostEnd::Drained => return,
                PostEnd::Dead(reason) if batch.len() == 1 || reason.given_up => {
                    let dead_letters = &self.params.dead_letters;
                    for queued in batch.extract_if(.., |queued| {
                        !reason.given_up || dead_letters.is_overdue(&queued.delivery.record)
                    }) {
                        self.dead_letter(queued.delivery, reason.clone()).await;
                    }
                    DeathReason {
                        given_up: false,
                        ..reason
                    }
                }
                PostEnd::Dead(reason) | PostEnd::Failed(reason) => reason,
            };
            drop(slots.own);
            let later = batch.split_off(batch.len() / 2);
            let halves = [batch, later].map(|half| {
                self.deliver_in_turn(half, reason.clone(), Arc::clone(&slots.all), drain.clone())
            });
            join_all(halves).await;
        })
    }

    /// Delivers `batch` once there is a slot for its POST.
    async fn deliver_in_turn(
        &self,
        batch: Vec<QueuedDelivery>,
        reason: DeathReason,
        all: Arc<Semaphore>,
        mut drain: watch::Receiver<u64>,
    ) {
        let slot = tokio::select! {
            biased;
            _ = drain.changed() => return,
            slot = Arc::clone(&all).acquire_owned() => slot,
        };
        if let (Ok(own), false) = (slot, batch.is_empty()) {
            self.deliver_all(batch, reason, PostSlots { all, own }, drain)
                .await;
        }
    }

    /// The strictest limits of the records; `None` if there are none.
    fn limits(&self, batch: &[QueuedDelivery]) -> Option<RetryLimits> {
        let oldest = batch.iter().map(|queued| queued.delivery.since).min()?;
        let dead_letters = &self.params.dead_letters;
        let give_up_at = batch
            .iter()
            .filter_map(|queued| dead_letters.give_up_at(&queued.delivery.record))
            .min();
        Some(RetryLimits {
            held_until: oldest + HOLD_MAX,
            give_up_at,
            failures: (batch.len() > 1).then_some(FAILURES_MAX),
        })
    }

    /// Acks the deliveries of a batch that the API has taken.
    fn delivered(
        &self,
        batch: Vec<QueuedDelivery>,
        body: &Bytes,
        places: &[Range<usize>],
        status: u16,
    ) {
        let records = batch.iter().map(|queued| &queued.delivery.record);
        self.params.ledger.delivered(self.lane, records);
        let mut permits: Option<OwnedSemaphorePermit> = None;
        for (queued, place) in batch.into_iter().zip(places) {
            let QueuedDelivery {
                delivery, permit, ..
            } = queued;
            self.show(&delivery.record, || body.slice(place.clone()), status);
            delivery.ack();
            // One release for all: each would wake the lane.
            match &mut permits {
                Some(permits) => permits.merge(permit),
                None => permits = Some(permit),
            }
        }
    }

    /// Puts the deliveries that can be POSTed into one array. The others are settled.
    async fn array(&self, deliveries: Vec<QueuedDelivery>) -> (Vec<QueuedDelivery>, JsonArray) {
        let mut batch = Vec::with_capacity(deliveries.len());
        let mut array = JsonArray::new();
        let mut ids = HashSet::new();
        for queued in deliveries {
            let QueuedDelivery {
                delivery,
                permit,
                underway,
            } = queued;
            let Some(delivery) = self.skip_if_delivered(delivery) else {
                continue;
            };
            let record = &delivery.record;
            if !ids.insert(Arc::clone(&record.id)) {
                // An array has each id once. The other copy is in this one.
                delivery.retry_after(HOLD_REST);
            } else if array.add(|body| self.tag.splice_onto(&record.body, body), &record.id) {
                batch.push(QueuedDelivery {
                    delivery,
                    permit,
                    underway,
                });
            } else {
                self.dead_letter_foreign(delivery).await;
            }
        }
        (batch, array)
    }
}

/// The trace context of a batch, if all of its records have the same: a request has only one.
fn common_traceparent(batch: &[QueuedDelivery]) -> Option<&str> {
    let mut all = batch
        .iter()
        .map(|queued| queued.delivery.record.traceparent.as_deref());
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

impl JsonArray {
    fn new() -> Self {
        Self {
            body: BytesMut::from(&b"["[..]),
            records: Vec::new(),
            key: String::new(),
        }
    }

    /// Adds the record that `write` writes, unless it cannot.
    fn add(&mut self, write: impl FnOnce(&mut BytesMut) -> bool, id: &str) -> bool {
        let before = self.body.len();
        if before > 1 {
            self.body.put_u8(b',');
            self.key.push(',');
        }
        let from = self.body.len();
        let is_written = write(&mut self.body);
        if is_written {
            self.records.push(from..self.body.len());
            if is_plain(id) {
                self.key.push_str(id);
            } else {
                self.key.extend(listed(id));
            }
        } else {
            self.body.truncate(before);
            self.key.truncate(self.key.len() - usize::from(before > 1));
        }
        is_written
    }

    fn end(mut self) -> (Bytes, Vec<Range<usize>>, String) {
        self.body.put_u8(b']');
        (self.body.freeze(), self.records, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_has_its_records_and_their_ids_in_order_and_leaves_out_what_cannot_be_written() {
        let mut array = JsonArray::new();
        let write = |text: &'static str| {
            move |body: &mut BytesMut| {
                body.put_slice(text.as_bytes());
                true
            }
        };
        assert!(!array.add(|_| false, "x"));
        assert!(array.add(write("{\"a\":1}"), "a,1"));
        assert!(!array.add(|_| false, "y"));
        assert!(array.add(write("{}"), "50%"));
        let (body, places, key) = array.end();
        assert_eq!((&*body, &*key), (&b"[{\"a\":1},{}]"[..], "a%2C1,50%25"));
        assert_eq!(
            places
                .into_iter()
                .map(|at| body.slice(at))
                .collect::<Vec<_>>(),
            ["{\"a\":1}", "{}"]
        );
    }
}
