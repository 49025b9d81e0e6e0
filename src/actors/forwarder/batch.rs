//! Many records in one POST: a JSON array, with the records' ids in their order as its `Idempotency-Key`.
//!
//! A batch is what has come when a POST may begin, and a moment later: an idle lane waits for nobody, a busy one fills its
//! batches. It is settled record by record. If the API refuses it, each half is POSTed by itself, until the record that the API
//! will not have is alone, and becomes a dead letter.

use std::{ops::Range, rc::Rc, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::future::{LocalBoxFuture, join_all};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, timeout_at},
};
use tracing::debug;

use super::{CONCURRENCY_MAX, End, HOLD_MAX, HOLD_REST, Limits, Post};
use crate::{
    actors::{Task, Underway},
    delivery::Delivery,
};

/// How long the first record of a batch waits for more.
const LINGER: Duration = Duration::from_millis(2);
/// Bytes of the ids in one header: many servers take no line over 8 KiB.
const IDS_MAX: usize = 6 << 10;
/// Bytes of the records in one POST, unless one alone has more: many servers take no body over 1 MiB.
const BODY_MAX: usize = 1 << 20;
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
    pub fn new(post: Rc<Post>, Limits { posts, batch }: Limits, drain: watch::Receiver<u64>) -> Self {
        // Each holds a permit of the lane, and there are no more of them.
        let (incoming, inbox) = mpsc::channel(CONCURRENCY_MAX);
        let gathering = Gathering { inbox, waiting: Vec::new(), slots: Arc::new(Semaphore::new(posts)), batch };
        Self { incoming, gathering: Task::spawn(gathering.run(post, drain)) }
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
            let (post, drain) = (Rc::clone(&post), drain.clone());
            actix_rt::spawn(async move {
                post.until_all_settled(together, Instant::now() + HOLD_MAX, drain).await;
                drop(slot);
            });
        }
    }

    /// Resolves when there is a batch and room for its POST; with nothing when there will be no more. Dropping the future loses nothing.
    async fn fill(&mut self) -> Option<OwnedSemaphorePermit> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok()?;
        if self.waiting.is_empty() && self.inbox.recv_many(&mut self.waiting, self.batch).await == 0 {
            return None;
        }
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
        ids += held.delivery.record.id.len() + 1;
        bytes += held.delivery.record.body.len() + 1;
        ids <= IDS_MAX && bytes <= BODY_MAX
    });
    fit.count().max(1)
}

/// A POST of many records.
struct Array {
    body: BytesMut,
    /// Where each record lies in the body.
    records: Vec<Range<usize>>,
    key: String,
}

impl Post {
    /// Ends with each of `together` settled, or given back.
    fn until_all_settled(
        &self,
        together: Vec<Held>,
        held_until: Instant,
        mut drain: watch::Receiver<u64>,
    ) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let (mut batch, mut array) = (Vec::with_capacity(together.len()), Array::new());
            for Held { delivery, permit, underway } in together {
                let Some(delivery) = self.unless_delivered(delivery) else { continue };
                if array.add(|body| self.tag.splice_onto(&delivery.record.body, body), &delivery.record.id) {
                    batch.push(Held { delivery, permit, underway });
                } else {
                    self.bury_foreign(delivery).await;
                }
            }
            let records = || batch.iter().map(|held| &held.delivery.record);
            let Some(first) = records().next() else { return };
            // A request has one trace context: theirs, if all have the same.
            let traceparent = first.traceparent.as_deref();
            let traceparent =
                traceparent.filter(|it| records().all(|record| record.traceparent.as_deref() == Some(it)));
            let give_up_at = records().filter_map(|record| self.give_up_at(record)).min();
            let (body, places, key) = array.end();
            let sent = (body.clone(), &*key, traceparent);
            match self.until_it_ends(sent, held_until, give_up_at, &mut drain).await {
                End::Delivered { status } => {
                    for (held, place) in batch.into_iter().zip(places) {
                        self.delivered(held.delivery, body.slice(place), status);
                    }
                }
                End::Dead(letter) if batch.len() == 1 => {
                    for held in batch {
                        self.bury(held.delivery, letter.clone()).await;
                    }
                }
                End::Dead(_) => {
                    let later = batch.split_off(batch.len() / 2);
                    let halves = [(batch, drain.clone()), (later, drain)];
                    join_all(halves.map(|(half, drain)| self.until_all_settled(half, held_until, drain))).await;
                }
                End::Held => batch.into_iter().for_each(|held| held.delivery.retry_after(HOLD_REST)),
                End::Drained => {}
            }
        })
    }
}

impl Array {
    fn new() -> Self {
        Self { body: BytesMut::from(&b"["[..]), records: Vec::new(), key: String::new() }
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
            self.key.extend(utf8_percent_encode(id, IN_LIST));
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
        assert_eq!(places.into_iter().map(|at| body.slice(at)).collect::<Vec<_>>(), ["{\"a\":1}", "{}"]);
    }
}
