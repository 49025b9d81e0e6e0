//! Many records in one POST: a JSON array, with the records' ids in their order as its `Idempotency-Key`.
//!
//! A batch is what has come when a POST may begin, and a moment later: an idle lane waits for nobody, a busy one fills its
//! batches. It is settled record by record. If the API refuses it, or fails at it again and again, each half is POSTed by itself,
//! until the record that the API will not have is alone, and alone becomes a dead letter.

use std::{collections::HashSet, ops::Range, rc::Rc, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use foldhash::fast::RandomState;
use futures_util::future::{LocalBoxFuture, join_all};
use percent_encoding::{AsciiSet, CONTROLS, PercentEncode, utf8_percent_encode};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, timeout_at},
};
use tracing::debug;

use super::{End, HOLD_MAX, HOLD_REST, Limits, Patience, Post, not_posted};
use crate::{
    actors::tasks::{Task, Underway},
    config::CONCURRENCY_MAX,
    delivery::Delivery,
    record::Record,
    spool::DeathReason,
};

/// How long the first record of a batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// Bytes of the ids in one header: many servers take no line over 8 KiB.
const IDS_MAX: usize = 6 << 10;
/// Bytes of the records in one POST, unless one alone has more: many servers take no body over 1 MiB.
const BODY_MAX: usize = 1 << 20;
/// A batch that has failed so often is halved: one of its records may be what the API fails at, or all together too much for it.
const FAILURES_MAX: u32 = 5;
/// What an id's characters must not be taken for.
const IN_LIST: &AsciiSet = &CONTROLS.add(b',').add(b'%');

/// A delivery with its place among the POSTs of the lane.
pub struct Held {
    pub delivery: Delivery,
    pub permit: OwnedSemaphorePermit,
    pub underway: Underway,
}

/// The batches of a forwarder.
pub struct Batches {
    incoming: mpsc::Sender<Held>,
    gathering: Task,
}

impl Batches {
    /// What waits for its POST when `drain` changes is given back.
    pub fn new(
        post: Rc<Post>,
        Limits { posts, batch }: Limits,
        drain: watch::Receiver<u64>,
    ) -> Self {
        // Each holds a permit of the lane, and there are no more of them.
        let (incoming, inbox) = mpsc::channel(CONCURRENCY_MAX);
        let gathering = Gathering {
            inbox,
            waiting: Vec::new(),
            slots: Arc::new(Semaphore::new(posts)),
            batch,
        };
        Self {
            incoming,
            gathering: Task::spawn(gathering.run(post, drain)),
        }
    }

    /// POSTs it with others. One that cannot be taken is dropped, and so given back.
    pub fn take(&self, held: Held) {
        if self.incoming.try_send(held).is_err() {
            debug!("batches are not POSTed any more; a delivery goes back to the broker");
        }
    }

    /// Nobody gathers any more: it has panicked.
    pub fn have_ended(&self) -> bool {
        self.gathering.has_ended()
    }
}

/// What the task owns that makes batches of deliveries.
struct Gathering {
    inbox: mpsc::Receiver<Held>,
    /// What goes into the next batch, and what did not fit into the last one.
    waiting: Vec<Held>,
    /// One for each POST that may be in flight.
    slots: Arc<Semaphore>,
    batch: usize,
}

impl Gathering {
    async fn run(mut self, post: Rc<Post>, mut drain: watch::Receiver<u64>) {
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
            let together = std::mem::replace(&mut self.waiting, rest);
            let (post, slots, drain) = (Rc::clone(&post), Arc::clone(&self.slots), drain.clone());
            actix_rt::spawn(async move {
                post.until_all_settled(together, not_posted(), (slots, slot), drain)
                    .await
            });
        }
    }

    /// Resolves when there is a batch and room for its POST; with nothing when there will be no more. Dropping the future loses nothing.
    async fn fill(&mut self) -> Option<OwnedSemaphorePermit> {
        if self.waiting.is_empty() && self.inbox.recv_many(&mut self.waiting, self.batch).await == 0
        {
            return None;
        }
        // Not before there is something to POST: halves of batches wait for their turn as well.
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        let until = Instant::now() + LINGER;
        while self.waiting.len() < self.batch {
            let room = self.batch - self.waiting.len();
            match timeout_at(until, self.inbox.recv_many(&mut self.waiting, room)).await {
                Ok(1..) => {}
                // Nobody sends any more, or the moment is over.
                _ => break,
            }
        }
        Some(slot)
    }
}

/// How many of the first fit into one POST.
fn fitting(waiting: &[Held]) -> usize {
    let (mut ids, mut bytes) = (0, 0);
    let fit = waiting.iter().take_while(|held| {
        let id = &held.delivery.record.id;
        ids += if is_plain(id) {
            id.len()
        } else {
            listed(id).map(str::len).sum()
        } + 1;
        bytes += held.delivery.record.body.len() + 1;
        ids <= IDS_MAX && bytes <= BODY_MAX
    });
    fit.count().max(1)
}

/// An id that stands in a list as it is: an id has visible characters only.
fn is_plain(id: &str) -> bool {
    memchr::memchr2(b',', b'%', id.as_bytes()).is_none()
}

/// An id as it stands in a list.
fn listed(id: &str) -> PercentEncode<'_> {
    utf8_percent_encode(id, IN_LIST)
}

/// A POST of many records.
struct Array {
    body: BytesMut,
    /// Where each record lies in the body.
    records: Vec<Range<usize>>,
    key: String,
}

impl Post {
    /// Ends with each of `together` settled, or given back. `slot` is the place of its POST among those of the lane.
    fn until_all_settled(
        &self,
        together: Vec<Held>,
        letter: DeathReason,
        (slots, slot): (Arc<Semaphore>, OwnedSemaphorePermit),
        mut drain: watch::Receiver<u64>,
    ) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let (mut batch, array) = self.array(together).await;
            let records = || batch.iter().map(|held| &held.delivery.record);
            let Some(first) = records().next() else {
                return;
            };
            // A request has one trace context: theirs, if all have the same.
            let traceparent = first.traceparent.as_deref();
            let traceparent = traceparent
                .filter(|it| records().all(|record| record.traceparent.as_deref() == Some(it)));
            let patience = Patience {
                held_until: batch
                    .iter()
                    .map(|held| held.delivery.since)
                    .min()
                    .unwrap_or_else(Instant::now)
                    + HOLD_MAX,
                give_up_at: records().filter_map(|record| self.give_up_at(record)).min(),
                failures: (batch.len() > 1).then_some(FAILURES_MAX),
            };
            let (body, places, key) = array.end();
            let sent = (body.clone(), &*key, traceparent);
            let letter = match self.until_it_ends(sent, patience, letter, &mut drain).await {
                End::Delivered { status } => {
                    self.params.ledger.delivered(self.lane, records());
                    let mut permits: Option<OwnedSemaphorePermit> = None;
                    for (
                        Held {
                            delivery, permit, ..
                        },
                        place,
                    ) in batch.into_iter().zip(places)
                    {
                        self.show(&delivery.record, || body.slice(place), status);
                        delivery.ack();
                        // Giving them back one by one would wake the lane for each.
                        match &mut permits {
                            Some(permits) => permits.merge(permit),
                            None => permits = Some(permit),
                        }
                    }
                    return;
                }
                End::Held => {
                    return batch
                        .into_iter()
                        .for_each(|held| held.delivery.retry_after(HOLD_REST));
                }
                End::Drained => return,
                End::Dead(letter) if batch.len() == 1 || letter.given_up => {
                    for held in batch.extract_if(.., |held| {
                        !letter.given_up || self.is_given_up(&held.delivery.record)
                    }) {
                        self.bury(held.delivery, letter.clone()).await;
                    }
                    DeathReason {
                        given_up: false,
                        ..letter
                    }
                }
                End::Dead(letter) | End::Failed(letter) => letter,
            };
            drop(slot);
            let later = batch.split_off(batch.len() / 2);
            let halves = [batch, later].map(|half| {
                self.in_its_turn(half, letter.clone(), Arc::clone(&slots), drain.clone())
            });
            join_all(halves).await;
        })
    }

    /// The same, once there is room for the POST.
    async fn in_its_turn(
        &self,
        together: Vec<Held>,
        letter: DeathReason,
        slots: Arc<Semaphore>,
        mut drain: watch::Receiver<u64>,
    ) {
        let slot = tokio::select! {
            biased;
            _ = drain.changed() => return,
            slot = Arc::clone(&slots).acquire_owned() => slot,
        };
        if let (Ok(slot), false) = (slot, together.is_empty()) {
            self.until_all_settled(together, letter, (slots, slot), drain)
                .await;
        }
    }

    /// Those of `together` that can be POSTed, as one array. The others are settled.
    async fn array(&self, together: Vec<Held>) -> (Vec<Held>, Array) {
        let (mut batch, mut array, mut ids) = (
            Vec::with_capacity(together.len()),
            Array::new(),
            HashSet::<_, RandomState>::default(),
        );
        for held in together {
            let Held {
                delivery,
                permit,
                underway,
            } = held;
            let Some(delivery) = self.unless_delivered(delivery) else {
                continue;
            };
            let record = &delivery.record;
            if !ids.insert(Arc::clone(&record.id)) {
                // Its other copy is on its way: one array has each id once.
                delivery.retry_after(HOLD_REST);
            } else if array.add(|body| self.tag.splice_onto(&record.body, body), &record.id) {
                batch.push(Held {
                    delivery,
                    permit,
                    underway,
                });
            } else {
                self.bury_foreign(delivery).await;
            }
        }
        (batch, array)
    }

    fn is_given_up(&self, record: &Record) -> bool {
        self.give_up_at(record)
            .is_some_and(|at| at <= Instant::now())
    }
}

impl Array {
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
        let mut array = Array::new();
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
