//! The forwarder of a lane: tags a delivery with the path that it took, POSTs it to the API, and settles it by the answer.
//!
//! A POST that may succeed later is tried again here, with back-off, while the transport holds the message; the lane pulls
//! no more than the POSTs in flight allow, so an API that is away, and its open circuit breaker, stop the pulling by
//! themselves. What the API will never take, or has not taken for too long, goes to the dead letters, and only then leaves
//! the broker.

use std::{rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, error, warn};

use super::{Drain, Forward, InFlight, Member, Ping, supervisor::Life};
use crate::{
    backoff::Backoff,
    breaker::Breaker,
    delivery::{Answer, Delivery, LaneId, Outcome, Passage, Tap},
    http::api::Api,
    ledger::Ledger,
    record::{Record, Tag, unix_us},
    spool::{Entry, Letter, Queue, Spool},
};

/// The most POSTs that a lane may be configured to have in flight.
pub const CONCURRENCY_MAX: usize = 4096;
/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// No retry waits longer, unless the API asks for it: an API that is back is found soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// How long a record rests whose dead letter could not be written.
const UNWRITTEN_REST: Duration = Duration::from_secs(30);
/// A record that was held for so long is given back and comes again: brokers end a consumer that holds one for much longer.
const HOLD_MAX: Duration = Duration::from_mins(10);
/// How long it then rests.
const HOLD_REST: Duration = Duration::from_secs(1);

/// One per lane.
pub struct Forwarder {
    post: Rc<Post>,
    life: Life,
    /// Counts drains: a retry that sees it change gives its delivery back.
    drains: watch::Sender<u64>,
    in_flight: InFlight,
}

/// What a forwarder is wired to; the same for each of its lives.
#[derive(Clone)]
pub struct Wiring {
    pub ledger: Arc<Ledger>,
    pub breaker: Arc<Breaker>,
    /// Where dead letters go.
    pub spool: Spool,
    pub tap: Tap,
    /// A record that is older than this is given up; `None` for never.
    pub give_up_after: Option<Duration>,
}

/// What every POST of a lane needs.
struct Post {
    lane: LaneId,
    tag: Tag,
    api: Api,
    wiring: Wiring,
}

impl Forwarder {
    #[must_use]
    pub fn new(lane: LaneId, tag: &str, api: Api, wiring: Wiring, life: Life) -> Self {
        let post = Rc::new(Post { lane, tag: Tag::new(tag), api, wiring });
        Self { post, life, drains: watch::Sender::new(0), in_flight: InFlight::default() }
    }
}

impl Post {
    /// Ends with `delivery` settled, or given back if `drain` comes while it waits.
    async fn until_settled(&self, delivery: Delivery, mut drain: watch::Receiver<u64>) {
        let record = &delivery.record;
        let Wiring { ledger, breaker, .. } = &self.wiring;
        if ledger.is_delivered(record) {
            ledger.redelivered(self.lane);
            return delivery.ack();
        }
        let Some(body) = self.tag.splice(&record.body) else {
            let answer = "not POSTed: it is not a JSON object".to_owned();
            return self.bury(delivery, Letter { answer, ..Letter::default() }).await;
        };
        let held_until = Instant::now() + HOLD_MAX;
        let give_up_at = self.give_up_at(record);
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut letter = Letter { answer: "not POSTed".to_owned(), ..Letter::default() };
        loop {
            let pass = tokio::select! {
                biased;
                () = at(give_up_at) => return self.bury(delivery, Letter { given_up: true, ..letter }).await,
                pass = breaker.pass() => pass,
                () = sleep_until(held_until) => return delivery.retry_after(HOLD_REST),
                // An error means that the forwarder is gone: given back all the same.
                _ = drain.changed() => return,
            };
            let answer = {
                let (_underway, began) = (ledger.api.begin(), std::time::Instant::now());
                let answer = self.api.post(body.clone(), &record.id, record.traceparent.as_deref()).await;
                ledger.posted(self.lane, began);
                answer
            };
            letter.heard(&answer);
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    pass.succeeded();
                    ledger.delivered(self.lane, record);
                    self.show(record, body, status);
                    return delivery.ack();
                }
                (Outcome::Retry { at_least }, _) => {
                    pass.failed(at_least);
                    let delay = backoff.next_delay().max(at_least.unwrap_or_default());
                    debug!(lane = %self.lane, id = &*record.id, %answer, ?delay, "POST failed");
                    tokio::select! {
                        () = sleep(delay) => {}
                        _ = drain.changed() => return,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    pass.succeeded();
                    return self.bury(delivery, letter).await;
                }
            }
        }
    }

    /// When `record` has waited long enough, if ever.
    fn give_up_at(&self, record: &Record) -> Option<Instant> {
        let patience = self.wiring.give_up_after?;
        let age = record.origin.as_ref().map_or(0, |origin| unix_us().saturating_sub(origin.at_us));
        Instant::now().checked_add(patience.saturating_sub(Duration::from_micros(age)))
    }

    /// Makes a dead letter of `delivery`, and lets the broker forget it once that is on disk.
    async fn bury(&self, delivery: Delivery, letter: Letter) {
        let record = &delivery.record;
        let letter = Letter { lane: self.lane.to_string(), at_us: unix_us(), ..letter };
        warn!(lane = %self.lane, id = &*record.id, status = letter.status, answer = letter.answer, "dead letter");
        match self.wiring.spool.put(Queue::Dead, &Entry::new(record, Some(letter)), false).await {
            Ok(_) => {
                self.wiring.ledger.dead(self.lane, record);
                delivery.reject();
            }
            Err(why) => {
                error!(lane = %self.lane, id = &*record.id, %why, "a dead letter cannot be kept; the record stays in the broker");
                delivery.retry_after(UNWRITTEN_REST);
            }
        }
    }

    fn show(&self, record: &Record, body: Bytes, status: u16) {
        let tap = &self.wiring.tap;
        if tap.receiver_count() > 0 {
            let passage =
                Passage { lane: self.lane, id: Arc::clone(&record.id), body, status, at_ms: unix_us() / 1000 };
            // The last watcher may have left since; passages are for watching only.
            tap.send(passage).ok();
        }
    }
}

/// Resolves then; never for `None`.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl Actor for Forwarder {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.life.risen(None);
    }
}

impl Member for Forwarder {
    /// Deliveries, one per POST that may be in flight, and control messages.
    const MAILBOX: usize = CONCURRENCY_MAX + 64;
}

impl Handler<Forward> for Forwarder {
    type Result = ();

    fn handle(&mut self, Forward { delivery, permit }: Forward, _: &mut Self::Context) {
        fail::fail_point!("forwarder");
        let (post, drain, underway) = (Rc::clone(&self.post), self.drains.subscribe(), self.in_flight.begin());
        actix_rt::spawn(async move {
            post.until_settled(delivery, drain).await;
            drop((permit, underway));
        });
    }
}

impl Handler<Drain> for Forwarder {
    type Result = ResponseFuture<()>;

    /// Lets POSTs under way end; retries that wait give their deliveries back. Takes new deliveries afterwards.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.drains.send_modify(|drains| *drains += 1);
        let in_flight = self.in_flight.clone();
        Box::pin(async move { in_flight.idle().await })
    }
}

impl Handler<Ping> for Forwarder {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        Ok(())
    }
}
