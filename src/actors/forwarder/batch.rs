//! Many records in one POST: a JSON array, with the records' ids in their order as its
//! `Idempotency-Key`.
//!
//! A batch has the deliveries that are there when a POST may begin, and those of the next two
//! milliseconds: an idle lane hardly waits, a busy one fills its batches. It is settled record by
//! record. If the API refuses a batch, or fails at it while it is up, the batch is POSTed in
//! smaller parts, until the record that is to blame is alone: it becomes a dead letter, or is
//! parked. The more often that happens, the smaller are the next batches.

use std::{borrow::Cow, collections::HashSet, mem, ops::Range, rc::Rc, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::{Instant, timeout_at},
};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    post::{HOLD_REST, Payload, PostEnd, Poster, RetryLimits, held_until, not_an_object},
    slots::PostSlot,
};
use crate::{
    api::{Limits, content::PostForm},
    config::CONCURRENCY_MAX,
    delivery::Delivery,
    record::{Record, Tag, TraceHeaders},
    spool::DeathReason,
};

/// How long the first record of a batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// Bytes of the ids in one header: many servers take no line over 8 KiB.
const IDS_MAX: usize = 6 << 10;
/// Bytes of the records in one POST, unless one alone has more: many servers take no body over
/// 1 MiB.
const BODY_MAX: usize = 1 << 20;
/// Characters of an id that are escaped in a list of ids.
const IN_LIST: &AsciiSet = &CONTROLS.add(b',').add(b'%');

/// A delivery that waits for its POST, with the permit of its lane.
pub struct QueuedDelivery {
    pub delivery: Delivery,
    /// `None` once it is POSTed alone: then it goes with the slot of that POST.
    pub permit: Option<OwnedSemaphorePermit>,
    pub _in_flight: TaskTrackerToken,
}

/// The state of the task that makes batches of deliveries.
struct Batcher {
    poster: Rc<Poster>,
    inbox: mpsc::Receiver<QueuedDelivery>,
    /// Deliveries for the next batch, those that did not fit into the last one included.
    waiting: Vec<QueuedDelivery>,
    batch: usize,
}

/// Starts a batcher, which ends with the forwarder. When `drain` changes, it naks the
/// deliveries that wait for their POST.
pub fn start(
    poster: Rc<Poster>,
    limits: Limits,
    drain: watch::Receiver<()>,
) -> mpsc::Sender<QueuedDelivery> {
    // Each delivery holds a permit of the lane, and the lane has no more of them.
    let (deliveries, inbox) = mpsc::channel(CONCURRENCY_MAX);
    let batcher = Batcher {
        poster,
        inbox,
        waiting: Vec::new(),
        batch: limits.batch,
    };
    actix_rt::spawn(batcher.run(drain));
    deliveries
}

impl Batcher {
    async fn run(mut self, mut drain: watch::Receiver<()>) {
        loop {
            let slot = tokio::select! {
                biased;
                drained = drain.changed() => {
                    if drained.is_err() {
                        // The forwarder is gone.
                        return;
                    }
                    self.waiting.clear();
                    while self.inbox.try_recv().is_ok() {}
                    continue;
                }
                slot = self.fill() => slot,
            };
            let Some(slot) = slot else { return };
            let most = fitting(&self.waiting).min(self.batch_now());
            let rest = self.waiting.split_off(most);
            let batch = mem::replace(&mut self.waiting, rest);
            let poster = Rc::clone(&self.poster);
            let drain = drain.clone();
            actix_rt::spawn(async move {
                poster.deliver_all(batch, slot, drain).await;
            });
        }
    }

    /// Waits for a batch and a slot for its POST. `None` if there will be no more. Dropping the
    /// future loses nothing.
    async fn fill(&mut self) -> Option<OwnedSemaphorePermit> {
        if self.waiting.is_empty() && self.inbox.recv_many(&mut self.waiting, self.batch).await == 0
        {
            return None;
        }
        let posts = Arc::clone(&self.poster.params.slots.posts);
        let slot = posts.acquire_owned().await.ok()?;
        // Under a low limit, batches would wait for their POST with few records each.
        self.poster.params.gate.has_room().await;
        let until = Instant::now() + LINGER;
        let batch = self.batch_now();
        while self.waiting.len() < batch {
            let room = batch - self.waiting.len();
            match timeout_at(until, self.inbox.recv_many(&mut self.waiting, room)).await {
                Ok(1..) => {}
                // No more will come, or the time is over.
                _ => break,
            }
        }
        Some(slot)
    }

    /// The most records of the next batch.
    fn batch_now(&self) -> usize {
        self.poster.batch_size.borrow().get()
    }
}

/// How many of the first deliveries fit into one POST.
fn fitting(waiting: &[QueuedDelivery]) -> usize {
    let mut ids = 0;
    let mut bytes = 0;
    let fit = waiting.iter().take_while(|queued| {
        let record = &queued.delivery.record;
        ids += listed(&record.id).len() + 1;
        bytes += record.body.len() + record.event.as_ref().map_or(0, |text| text.len()) + 1;
        ids <= IDS_MAX && bytes <= BODY_MAX
    });
    fit.count().max(1)
}

/// An id as an element of the list that is the `Idempotency-Key` of a batch. An id has visible
/// characters only, and few need an escape.
pub fn listed(id: &str) -> Cow<'_, str> {
    match memchr::memchr2(b',', b'%', id.as_bytes()) {
        None => id.into(),
        Some(_) => utf8_percent_encode(id, IN_LIST).into(),
    }
}

impl Poster {
    /// Settles each delivery of `batch`, or gives it back. If the batch cannot be delivered as a
    /// whole, its parts are POSTed, each in a slot of its own: none waits for another's retries.
    async fn deliver_all(
        &self,
        batch: Vec<QueuedDelivery>,
        slot: OwnedSemaphorePermit,
        drain: watch::Receiver<()>,
    ) {
        let deliver_one = async |part, reason| {
            let mut drained = drain.clone();
            let posts = Arc::clone(&self.params.slots.posts);
            let slot = tokio::select! {
                biased;
                // An error means that the forwarder is gone, which gives the part back too.
                _ = drained.changed() => return None,
                slot = posts.acquire_owned() => slot.ok()?,
            };
            self.deliver_part(part, slot, reason, drain.clone()).await
        };
        let whole = self.deliver_part(batch, slot, DeathReason::default(), drain.clone());
        let mut left = whole.await;
        if left.is_some() {
            self.batch_size.borrow_mut().split();
        }
        let mut parts = FuturesUnordered::new();
        loop {
            if let Some((mut rest, reason)) = left {
                // As many parts as each has records: few POSTs find the one that is to blame.
                let size = rest.len().isqrt();
                while !rest.is_empty() {
                    let next = rest.split_off(size.min(rest.len()));
                    parts.push(deliver_one(mem::replace(&mut rest, next), reason.clone()));
                }
            }
            match parts.next().await {
                Some(of_part) => left = of_part,
                None => return,
            }
        }
    }

    /// Settles the deliveries, or gives them back. Returns those that must be POSTed in smaller
    /// parts, and the last answer. `reason` has the earlier attempts for the same records.
    async fn deliver_part(
        &self,
        deliveries: Vec<QueuedDelivery>,
        slot: OwnedSemaphorePermit,
        reason: DeathReason,
        mut drain: watch::Receiver<()>,
    ) -> Option<(Vec<QueuedDelivery>, DeathReason)> {
        let (mut batch, array) = self.array(deliveries).await;
        let permit = match &mut *batch {
            [only] => only.permit.take(),
            _ => None,
        };
        let mut slot = PostSlot::new(&self.params.slots, slot, permit);
        let (body, places, key) = array.end();
        let spans = batch.iter();
        let spans = spans.filter_map(|queued| queued.delivery.span.as_ref());
        let payload = Payload {
            body,
            headers: self.params.api.form.batch_headers(),
            records: batch.len(),
            key: &key,
            trace: common_trace(&batch),
            spans: spans.collect(),
        };
        let limits = self.limits(&batch)?;
        let end = self
            .post_with_retries(&payload, limits, reason, &mut slot, &mut drain)
            .await;
        let body = payload.body;
        match end {
            PostEnd::Delivered { status, at_once } => {
                self.count_batch(&batch, at_once).await;
                self.delivered(batch, &body, &places, status);
                None
            }
            PostEnd::HeldTooLong | PostEnd::Denied => {
                for queued in batch {
                    queued.delivery.retry_after(HOLD_REST);
                }
                None
            }
            PostEnd::Drained => None,
            PostEnd::Parked(key) => {
                for queued in batch {
                    self.parked(queued.delivery, key).await;
                }
                None
            }
            PostEnd::Split(reason) => Some((batch, reason)),
            PostEnd::Dead(reason) if batch.len() > 1 => Some((batch, reason)),
            PostEnd::Dead(reason) => {
                for queued in batch {
                    self.dead_letter(queued.delivery, reason.clone()).await;
                }
                None
            }
        }
    }

    /// The strictest limits of the records; `None` if there are none.
    fn limits<'a>(&self, batch: &'a [QueuedDelivery]) -> Option<RetryLimits<'a>> {
        if batch.is_empty() {
            return None;
        }
        let held_until = batch.iter().filter_map(|one| held_until(&one.delivery));
        let dead_letters = &self.params.api.dead_letters;
        let give_up_at = batch
            .iter()
            .filter_map(|queued| dead_letters.give_up_at(&queued.delivery.record));
        Some(RetryLimits {
            held_until: held_until.min(),
            give_up_at: give_up_at.min(),
            only: match batch {
                [only] => Some(&only.delivery),
                _ => None,
            },
        })
    }

    /// Counts the records of a batch that the API has taken.
    async fn count_batch(&self, batch: &[QueuedDelivery], at_once: bool) {
        let all = batch.iter().map(|queued| &queued.delivery);
        let (held, fresh): (Vec<_>, Vec<_>) = all
            .map(|delivery| (delivery.last_place(), delivery))
            .partition(|(place, _)| place.is_some());
        let fresh = || fresh.iter().map(|(_, delivery)| delivery);
        if let Some(since) = fresh().map(|delivery| delivery.since).min() {
            let records = fresh().map(|delivery| &delivery.record);
            self.count_delivered(records, since, at_once);
        }
        let held = held.iter().filter_map(|(place, delivery)| {
            Some(self.count_delivered_held(place.as_ref()?, &delivery.record))
        });
        join_all(held).await;
    }

    /// Acks the deliveries of a batch that the API has taken.
    fn delivered(
        &self,
        batch: Vec<QueuedDelivery>,
        body: &Bytes,
        places: &[Range<usize>],
        status: u16,
    ) {
        self.batch_size.borrow_mut().delivered(batch.len());
        let mut permits: Option<OwnedSemaphorePermit> = None;
        for (queued, place) in batch.into_iter().zip(places) {
            let record = &queued.delivery.record;
            self.params.copies.release(record);
            self.show(record, || body.slice(place.clone()), status);
            queued.delivery.ack();
            // One release for all: each would wake the lane.
            match (&mut permits, queued.permit) {
                (Some(permits), Some(permit)) => permits.merge(permit),
                (_, permit) => permits = permit,
            }
        }
    }

    /// Puts the deliveries that can be POSTed into one array. The others are settled.
    async fn array(&self, deliveries: Vec<QueuedDelivery>) -> (Vec<QueuedDelivery>, JsonArray) {
        let mut batch = Vec::with_capacity(deliveries.len());
        let mut array = JsonArray::new(self.params.api.form);
        let mut ids = HashSet::new();
        for queued in deliveries {
            let delivery = &queued.delivery;
            if self.is_delivered(delivery).await {
                queued.delivery.ack();
            } else if !ids.insert(Arc::clone(&delivery.record.id)) {
                // An array has each id once. The other copy is in this one.
                queued.delivery.retry_after(HOLD_REST);
            } else if array.add(&delivery.record, self.tag(delivery)) {
                batch.push(queued);
            } else {
                self.dead_letter(queued.delivery, not_an_object()).await;
            }
        }
        (batch, array)
    }
}

/// The trace context of a batch, if all of its records have the same: a request has only one.
fn common_trace(batch: &[QueuedDelivery]) -> Option<&TraceHeaders> {
    let mut all = batch
        .iter()
        .map(|queued| queued.delivery.record.trace.as_ref());
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

/// The body and the key of a POST of many records.
struct JsonArray {
    form: PostForm,
    body: BytesMut,
    /// The place of each record in the body.
    places: Vec<Range<usize>>,
    key: String,
}

impl JsonArray {
    fn new(form: PostForm) -> Self {
        Self {
            form,
            body: BytesMut::new(),
            places: Vec::new(),
            key: String::new(),
        }
    }

    /// Adds `record` with its tag. False if it is no JSON object: then nothing is added.
    fn add(&mut self, record: &Record, tag: &Tag) -> bool {
        let is_first = self.places.is_empty();
        let before = self.body.len();
        self.body.put_u8(if is_first { b'[' } else { b',' });
        if !self.form.write(record, tag, &mut self.body) {
            self.body.truncate(before);
            return false;
        }
        self.places.push(before + 1..self.body.len());
        if !is_first {
            self.key.push(',');
        }
        self.key.push_str(&listed(&record.id));
        true
    }

    /// The body, the place of each record in it, and the key.
    fn end(mut self) -> (Bytes, Vec<Range<usize>>, String) {
        self.body.put_u8(b']');
        (self.body.freeze(), self.places, self.key)
    }
}

/// The body and the key of a POST of `record` alone, where a POST may have many. `None` if it is no
/// JSON object.
pub fn array_of_one(form: PostForm, record: &Record, tag: &Tag) -> Option<(Bytes, String)> {
    let mut array = JsonArray::new(form);
    array.add(record, tag).then(|| {
        let (body, _, key) = array.end();
        (body, key)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud_events::EventMode;

    #[test]
    fn an_array_has_its_records_and_their_ids_in_order_and_leaves_out_what_cannot_be_written() {
        let mut array = JsonArray::new(PostForm::new(EventMode::Off));
        let mut add = |id: &str, body: &'static str| {
            let record = Record {
                id: id.into(),
                body: Bytes::from_static(body.as_bytes()),
                trace: None,
                origin: None,
                api: None,
                event: None,
            };
            array.add(&record, &Tag::new("T"))
        };
        assert!(!add("x", "null"));
        assert!(add("a,1", r#"{"a":1}"#));
        assert!(!add("y", "[]"));
        assert!(add("50%", "{}"));
        let (body, places, key) = array.end();
        assert_eq!(body, r#"[{"a":1,"path":"T"},{"path":"T"}]"#);
        assert_eq!(key, "a%2C1,50%25");
        let records: Vec<_> = places.into_iter().map(|at| body.slice(at)).collect();
        assert_eq!(records, [r#"{"a":1,"path":"T"}"#, r#"{"path":"T"}"#]);
    }
}
