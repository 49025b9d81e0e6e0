//! The forwarder of a lane: tags a delivery with the lane's path, POSTs it to the API, and settles it by the answer.
//!
//! A POST that may succeed later is retried here with back-off, while the transport holds the message. The lane pulls no more
//! deliveries than there are POSTs in flight, so an API that is away, and its open circuit breaker, stop the pulling. A record
//! that the API will never take, or has not taken for too long, becomes a dead letter, and only then leaves the broker.

mod batch;

use std::{rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use self::batch::{Batches, QueuedDelivery};
use super::{
    Drain, Forward, Ping, Supervised,
    dead_letters::{DeadLetters, add_attempt},
    supervisor::SupervisorHandle,
    tasks::InFlight,
};
use crate::{
    api::Api,
    api::answer::{Answer, Outcome},
    backoff::Backoff,
    breaker::Breaker,
    clock::unix_us,
    config::CONCURRENCY_MAX,
    delivery::Delivery,
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, Tag},
    spool::DeathReason,
    tap::{Passage, Tap},
};

/// The most deliveries that a lane hands over, however many records a POST may have.
const BATCHED_MAX: usize = 1024;
/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// No retry waits longer unless the API asks for it, so that an API that is back is used soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// How long a record rests if its dead letter could not be written.
const UNWRITTEN_REST: Duration = Duration::from_secs(30);
/// A record that was held for so long is given back and comes again: brokers end a consumer that holds one for much longer.
const HOLD_MAX: Duration = Duration::from_mins(10);
/// How long it then rests.
const HOLD_REST: Duration = Duration::from_secs(1);

/// One per lane.
pub struct Forwarder {
    poster: Rc<Poster>,
    supervisor: SupervisorHandle,
    /// Counts drains: a retry that sees it change gives its delivery back.
    drains: watch::Sender<u64>,
    in_flight: InFlight,
    /// Only if a POST may have many records.
    batches: Option<Batches>,
}

/// The parts of a forwarder; each restart uses the same ones.
#[derive(Clone)]
pub struct ForwarderParams {
    pub ledger: Arc<Ledger>,
    pub breaker: Arc<Breaker>,
    pub dead_letters: DeadLetters,
    pub tap: Tap,
    pub limits: Limits,
}

/// How much a lane sends to the API at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// POSTs in flight.
    pub posts: usize,
    /// Records of a POST; with more than one, its body is a JSON array.
    pub batch: usize,
}

impl Limits {
    /// Deliveries that the lane may hand over.
    pub fn deliveries(self) -> usize {
        self.posts
            .max(self.posts.saturating_mul(self.batch).min(BATCHED_MAX))
    }
}

/// POSTs the deliveries of a lane and settles them.
struct Poster {
    lane: LaneId,
    tag: Tag,
    api: Api,
    params: ForwarderParams,
}

/// The content of a POST.
struct Payload<'a> {
    body: Bytes,
    key: &'a str,
    traceparent: Option<&'a str>,
}

/// How long, and how often, a failed POST is retried.
struct RetryLimits {
    /// The broker bears no longer hold.
    held_until: Instant,
    give_up_at: Option<Instant>,
    /// The most failures that may be due to the payload, rather than to an overloaded API.
    failures: Option<u32>,
}

/// How the POSTs of a record, or of a batch, have ended.
enum PostEnd {
    Delivered {
        status: u16,
    },
    /// The API will never take it, or has not for too long.
    Dead(DeathReason),
    /// It has failed as often as it may.
    Failed(DeathReason),
    /// It was held for as long as a broker bears.
    HeldTooLong,
    /// The node drains.
    Drained,
}

impl Forwarder {
    pub fn new(
        lane: LaneId,
        tag: &str,
        api: Api,
        params: ForwarderParams,
        supervisor: SupervisorHandle,
    ) -> Self {
        let limits = params.limits;
        let poster = Rc::new(Poster {
            lane,
            tag: Tag::new(tag),
            api,
            params,
        });
        let drains = watch::Sender::new(0);
        let batches = (limits.batch > 1)
            .then(|| Batches::new(Rc::clone(&poster), limits, drains.subscribe()));
        Self {
            poster,
            supervisor,
            drains,
            in_flight: InFlight::default(),
            batches,
        }
    }
}

impl Poster {
    /// Settles `delivery` by the API's answer. If a drain comes while it waits, it is given back.
    async fn deliver(&self, delivery: Delivery, mut drain: watch::Receiver<u64>) {
        let Some(delivery) = self.skip_if_delivered(delivery) else {
            return;
        };
        let record = &delivery.record;
        // Dead letters are rare: boxed, they do not make the future of every record larger.
        let Some(body) = self.tag.splice(&record.body) else {
            return Box::pin(self.dead_letter_foreign(delivery)).await;
        };
        let limits = RetryLimits {
            held_until: delivery.since + HOLD_MAX,
            give_up_at: self.params.dead_letters.give_up_at(record),
            failures: None,
        };
        let payload = Payload {
            body: body.clone(),
            key: &record.id,
            traceparent: record.traceparent.as_deref(),
        };
        match self
            .post_with_retries(payload, limits, DeathReason::default(), &mut drain)
            .await
        {
            PostEnd::Delivered { status } => {
                self.params.ledger.delivered(self.lane, [record]);
                self.show(record, || body, status);
                delivery.ack();
            }
            PostEnd::Dead(reason) => Box::pin(self.dead_letter(delivery, reason)).await,
            PostEnd::HeldTooLong | PostEnd::Failed(_) => delivery.retry_after(HOLD_REST),
            PostEnd::Drained => {}
        }
    }

    /// Acks a delivery that the API is known to have, and returns any other.
    fn skip_if_delivered(&self, delivery: Delivery) -> Option<Delivery> {
        let ledger = &self.params.ledger;
        if ledger.is_delivered(&delivery.record) {
            ledger.redelivered(self.lane);
            delivery.ack();
            return None;
        }
        Some(delivery)
    }

    /// POSTs `payload` until it is delivered, refused, or a limit is reached. `reason` tells of earlier POSTs of the same records.
    async fn post_with_retries(
        &self,
        payload: Payload<'_>,
        limits: RetryLimits,
        mut reason: DeathReason,
        drain: &mut watch::Receiver<u64>,
    ) -> PostEnd {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut failed = 0;
        loop {
            if limits.give_up_at.is_some_and(|at| at <= Instant::now()) {
                return PostEnd::give_up(reason);
            }
            if limits.held_until <= Instant::now() {
                return PostEnd::HeldTooLong;
            }
            // Usually the breaker is closed, and no timer is needed.
            let pass = tokio::select! {
                biased;
                pass = self.params.breaker.pass() => pass,
                () = at(limits.give_up_at) => return PostEnd::give_up(reason),
                () = sleep_until(limits.held_until) => return PostEnd::HeldTooLong,
                // An error means that the forwarder is gone, which gives the delivery back too.
                _ = drain.changed() => return PostEnd::Drained,
            };
            let answer = self.post(&payload).await;
            add_attempt(&mut reason, &answer);
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    pass.succeeded();
                    return PostEnd::Delivered { status };
                }
                (Outcome::Retry { at_least }, _) => {
                    pass.failed(at_least);
                    failed += u32::from(!is_overload(&answer));
                    if limits.failures.is_some_and(|most| failed >= most) {
                        return PostEnd::Failed(reason);
                    }
                    let delay = backoff.next_delay().max(at_least.unwrap_or_default());
                    debug!(lane = %self.lane, key = payload.key, %answer, ?delay, "POST failed");
                    tokio::select! {
                        () = sleep(delay) => {}
                        _ = drain.changed() => return PostEnd::Drained,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    pass.succeeded();
                    return PostEnd::Dead(reason);
                }
            }
        }
    }

    async fn post(&self, payload: &Payload<'_>) -> Answer {
        let ledger = &self.params.ledger;
        let _in_flight = ledger.api.begin();
        let began = std::time::Instant::now();
        let body = payload.body.clone();
        let answer = self.api.post(body, payload.key, payload.traceparent).await;
        ledger.posted(self.lane, began);
        answer
    }

    /// Makes a dead letter of a message that is not a JSON object. Another publisher has put it into the broker.
    async fn dead_letter_foreign(&self, delivery: Delivery) {
        let reason = DeathReason {
            answer: "not POSTed: it is not a JSON object".to_owned(),
            ..DeathReason::default()
        };
        self.dead_letter(delivery, reason).await;
    }

    /// Makes a dead letter of `delivery`. The broker may forget the message once that is on disk.
    async fn dead_letter(&self, delivery: Delivery, reason: DeathReason) {
        let record = &delivery.record;
        let reason = DeathReason {
            lane: self.lane.to_string(),
            ..reason
        };
        if self.params.dead_letters.write(record, reason).await.is_ok() {
            self.params.ledger.dead(self.lane, record);
            delivery.reject();
        } else {
            delivery.retry_after(UNWRITTEN_REST);
        }
    }

    /// Shows the tap that the API has taken the record as `body`.
    fn show(&self, record: &Record, body: impl FnOnce() -> Bytes, status: u16) {
        self.params.tap.show(|| Passage {
            lane: self.lane,
            id: Arc::clone(&record.id),
            body: body(),
            status,
            at_ms: unix_us() / 1000,
        });
    }
}

impl PostEnd {
    fn give_up(mut reason: DeathReason) -> Self {
        if reason.attempts == 0 {
            "not POSTed".clone_into(&mut reason.answer);
        }
        reason.given_up = true;
        Self::Dead(reason)
    }
}

/// Whether the API says that it has too much to do, and nothing about the payload.
fn is_overload(answer: &Answer) -> bool {
    matches!(
        answer,
        Answer::Status {
            status: 429 | 503,
            ..
        }
    )
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
        self.supervisor.ready(None);
    }
}

impl Supervised for Forwarder {
    /// Deliveries, as many as the lane may hand over, and control messages.
    const MAILBOX: usize = CONCURRENCY_MAX + 64;
}

impl Handler<Forward> for Forwarder {
    type Result = ();

    fn handle(
        &mut self,
        Forward {
            deliveries,
            mut permits,
        }: Forward,
        _: &mut Self::Context,
    ) {
        fail::fail_point!("forwarder");
        for delivery in deliveries {
            // There is one for each. Without one, the delivery is dropped and so given back.
            let Some(permit) = permits.split(1) else {
                return;
            };
            let underway = self.in_flight.begin();
            if let Some(batches) = &self.batches {
                batches.add(QueuedDelivery {
                    delivery,
                    permit,
                    underway,
                });
                continue;
            }
            let poster = Rc::clone(&self.poster);
            let drain = self.drains.subscribe();
            actix_rt::spawn(async move {
                poster.deliver(delivery, drain).await;
                drop((permit, underway));
            });
        }
    }
}

impl Handler<Drain> for Forwarder {
    type Result = ResponseFuture<()>;

    /// Waits for the POSTs in flight. Retries that wait give their deliveries back. New deliveries are taken afterwards.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.drains.send_modify(|drains| *drains += 1);
        let in_flight = self.in_flight.clone();
        Box::pin(async move { in_flight.idle().await })
    }
}

impl Handler<Ping> for Forwarder {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        match &self.batches {
            Some(batches) if batches.have_ended() => Err("batches are not POSTed any more".into()),
            _ => Ok(()),
        }
    }
}
