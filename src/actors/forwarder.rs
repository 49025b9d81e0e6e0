//! The forwarder of a lane: tags a delivery with the path that it took, POSTs it to the API, and settles it by the answer.
//!
//! A POST that may succeed later is tried again here, with back-off, while the transport holds the message; the lane pulls
//! no more than the POSTs in flight allow, so an API that is away stops the pulling by itself.

use std::{rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use bytes::Bytes;
use tokio::sync::watch;
use tracing::{debug, error};

use super::{Drain, Forward, InFlight, Member, Ping, supervisor::Life};
use crate::{
    backoff::Backoff,
    delivery::{Answer, Delivery, LaneId, Outcome, Passage, Tap},
    http::api::Api,
    ledger::Ledger,
    record::{Record, Tag, unix_us},
};

/// The most POSTs that a lane may be configured to have in flight.
pub const CONCURRENCY_MAX: usize = 4096;
/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// No retry waits longer, unless the API asks for it: an API that is back is found soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// How long a record that the API refuses rests before it is tried again.
const REFUSED_REST: Duration = Duration::from_secs(30);

/// One per lane.
pub struct Forwarder {
    post: Rc<Post>,
    life: Life,
    /// Counts drains: a retry that sees it change gives its delivery back.
    drains: watch::Sender<u64>,
    in_flight: InFlight,
}

/// What every POST of a lane needs.
struct Post {
    lane: LaneId,
    tag: Tag,
    api: Api,
    ledger: Arc<Ledger>,
    tap: Tap,
}

impl Forwarder {
    #[must_use]
    pub fn new(lane: LaneId, tag: &str, api: Api, ledger: Arc<Ledger>, tap: Tap, life: Life) -> Self {
        let post = Rc::new(Post { lane, tag: Tag::new(tag), api, ledger, tap });
        Self { post, life, drains: watch::Sender::new(0), in_flight: InFlight::default() }
    }
}

impl Post {
    /// Ends with `delivery` settled, or given back if `drain` comes while a retry waits.
    async fn until_settled(&self, delivery: Delivery, mut drain: watch::Receiver<u64>) {
        let record = &delivery.record;
        if self.ledger.is_delivered(record) {
            self.ledger.redelivered(self.lane);
            return delivery.ack();
        }
        let Some(body) = self.tag.splice(&record.body) else {
            error!(lane = %self.lane, id = &*record.id, "message is not a JSON object; it stays in the broker");
            return delivery.retry_after(REFUSED_REST);
        };
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        loop {
            let answer = {
                let _underway = self.ledger.api.begin();
                self.api.post(body.clone(), &record.id, record.traceparent.as_deref()).await
            };
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    self.ledger.api.succeeded();
                    self.ledger.delivered(self.lane, record);
                    self.show(record, body, status);
                    return delivery.ack();
                }
                (Outcome::Retry { at_least }, _) => {
                    self.ledger.api.failed();
                    let delay = backoff.next_delay().max(at_least.unwrap_or_default());
                    debug!(lane = %self.lane, id = &*record.id, %answer, ?delay, "POST failed");
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        // An error means that the forwarder is gone: given back all the same.
                        _ = drain.changed() => return,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    self.ledger.api.succeeded();
                    error!(lane = %self.lane, id = &*record.id, %answer, "API refuses the record; it stays in the broker");
                    return delivery.retry_after(REFUSED_REST);
                }
            }
        }
    }

    fn show(&self, record: &Record, body: Bytes, status: u16) {
        if self.tap.receiver_count() > 0 {
            let passage =
                Passage { lane: self.lane, id: Arc::clone(&record.id), body, status, at_ms: unix_us() / 1000 };
            // The last watcher may have left since; passages are for watching only.
            self.tap.send(passage).ok();
        }
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
