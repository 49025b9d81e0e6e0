//! One POST with its retries, and the settlement of its delivery.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use crate::{
    actors::{
        copies::Copies,
        dead_letters::{DeadLetters, add_attempt, not_posted},
    },
    api::{
        Api, Settings,
        answer::{Answer, Outcome},
    },
    backoff::Backoff,
    breaker::{Breaker, Denied, Pass},
    clock::unix_us,
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
/// A delivery is nakked after this time and redelivered: brokers end a consumer that holds a
/// message for much longer.
pub const HOLD_MAX: Duration = Duration::from_mins(10);
/// How long it then rests.
pub const HOLD_REST: Duration = Duration::from_secs(1);

/// The parts of a forwarder; each restart uses the same ones.
#[derive(Clone)]
pub struct ForwarderParams {
    pub lane: LaneId,
    pub tag: Tag,
    pub api: Settings,
    pub ledger: Arc<Ledger>,
    pub breaker: Arc<Breaker>,
    pub dead_letters: DeadLetters,
    pub copies: Copies,
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
        let batched = self.posts.saturating_mul(self.batch).min(BATCHED_MAX);
        self.posts.max(batched)
    }
}

/// POSTs the deliveries of a lane and settles them.
pub struct Poster {
    api: Api,
    pub params: ForwarderParams,
}

/// The content of a POST.
pub struct Payload<'a> {
    pub body: Bytes,
    pub key: &'a str,
    pub traceparent: Option<&'a str>,
}

/// How long, and how often, a failed POST is retried.
pub struct RetryLimits {
    /// The end of the longest hold that a broker allows.
    pub held_until: Instant,
    pub give_up_at: Option<Instant>,
    /// The most failures that may be due to the payload, rather than to an overloaded API.
    pub failures: Option<u32>,
}

/// How the POSTs of a record, or of a batch, have ended.
pub enum PostEnd {
    Delivered {
        status: u16,
    },
    /// The API has refused it, or has not taken it for too long.
    Dead(DeathReason),
    /// It has failed as often as it may.
    Failed(DeathReason),
    HeldTooLong,
    /// The API denies everything: the record is not to blame.
    Denied,
    /// The node drains.
    Drained,
}

impl Poster {
    pub fn new(params: ForwarderParams) -> Self {
        Self {
            api: Api::new(&params.api),
            params,
        }
    }

    /// Settles `delivery` by the API's answer. A drain gives it back if it waits.
    pub async fn deliver(&self, delivery: Delivery, mut drain: watch::Receiver<()>) {
        let Some(delivery) = self.skip_if_delivered(delivery) else {
            return;
        };
        let record = &delivery.record;
        // Dead letters are rare: boxed, they do not make the future of every record larger.
        let Some(body) = self.params.tag.splice(&record.body) else {
            return Box::pin(self.dead_letter(delivery, not_an_object())).await;
        };
        let payload = Payload {
            body,
            key: &record.id,
            traceparent: record.traceparent.as_deref(),
        };
        let limits = RetryLimits {
            held_until: delivery.since + HOLD_MAX,
            give_up_at: self.params.dead_letters.give_up_at(record),
            failures: None,
        };
        match self
            .post_with_retries(&payload, limits, DeathReason::default(), &mut drain)
            .await
        {
            PostEnd::Delivered { status } => {
                self.params.ledger.delivered(self.params.lane, [record]);
                self.params.copies.release(record);
                self.show(record, || payload.body, status);
                delivery.ack();
            }
            PostEnd::Dead(reason) => Box::pin(self.dead_letter(delivery, reason)).await,
            // Another record is the next to probe the API.
            PostEnd::HeldTooLong | PostEnd::Failed(_) | PostEnd::Denied => {
                delivery.retry_after(HOLD_REST);
            }
            PostEnd::Drained => {}
        }
    }

    /// Acks a delivery that the API is known to have, and returns any other.
    pub fn skip_if_delivered(&self, delivery: Delivery) -> Option<Delivery> {
        let ledger = &self.params.ledger;
        if ledger.is_delivered(&delivery.record) {
            ledger.redelivered(self.params.lane);
            delivery.ack();
            return None;
        }
        Some(delivery)
    }

    /// POSTs `payload` until it is delivered, refused, or a limit is reached. `reason` has the
    /// earlier attempts for the same records.
    pub async fn post_with_retries(
        &self,
        payload: &Payload<'_>,
        limits: RetryLimits,
        mut reason: DeathReason,
        drain: &mut watch::Receiver<()>,
    ) -> PostEnd {
        let give_up_at = limits.give_up_at.unwrap_or(limits.held_until);
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut failed = 0;
        loop {
            let now = Instant::now();
            if limits.give_up_at.is_some_and(|at| at <= now) {
                return PostEnd::give_up(reason);
            }
            if limits.held_until <= now {
                return PostEnd::HeldTooLong;
            }
            // Usually the breaker is closed, and no timer is needed.
            let pass = tokio::select! {
                biased;
                pass = self.params.breaker.pass() => pass,
                () = sleep_until(give_up_at.min(limits.held_until)) => continue,
                // An error means that the forwarder is gone, which gives the delivery back too.
                _ = drain.changed() => return PostEnd::Drained,
            };
            let answer = self.post(payload).await;
            add_attempt(&mut reason, &answer);
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    pass.succeeded(|| self.waiting());
                    return PostEnd::Delivered { status };
                }
                (Outcome::Retry { at_least }, _) => {
                    pass.failed(&answer, at_least);
                    failed += u32::from(!is_overload(&answer));
                    if limits.failures.is_some_and(|most| failed >= most) {
                        return PostEnd::Failed(reason);
                    }
                    let delay = backoff.next_delay().max(at_least.unwrap_or_default());
                    let lane = self.params.lane;
                    let delay_ms = delay.as_millis();
                    debug!(%lane, key = payload.key, %answer, delay_ms, "POST failed");
                    tokio::select! {
                        () = sleep(delay) => {}
                        _ = drain.changed() => return PostEnd::Drained,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    pass.succeeded(|| self.waiting());
                    return PostEnd::Dead(reason);
                }
                (Outcome::Denied, _) => {
                    let is_batch = limits.failures.is_some();
                    // Boxed, because it is rare: the future of every record stays small.
                    let denied = Box::pin(denied(pass, &answer, is_batch, drain)).await;
                    return denied.unwrap_or(PostEnd::Dead(reason));
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
        ledger.posted(self.params.lane, began);
        if let Some(class) = answer.failure() {
            ledger.api.failed(class);
        }
        answer
    }

    /// Records in the lanes that the API has not taken yet.
    fn waiting(&self) -> u64 {
        self.params.ledger.totals().in_flight()
    }

    /// Makes a dead letter of `delivery`. The broker may forget the message once that is on disk.
    pub async fn dead_letter(&self, delivery: Delivery, reason: DeathReason) {
        let lane = self.params.lane;
        let record = &delivery.record;
        let dead_letters = &self.params.dead_letters;
        if dead_letters
            .write(lane.name(), record, reason)
            .await
            .is_ok()
        {
            self.params.ledger.dead(lane, record);
            self.params.copies.release(record);
            delivery.reject();
        } else {
            delivery.retry_after(UNWRITTEN_REST);
        }
    }

    /// Shows the tap that the API has taken the record as `body`.
    pub fn show(&self, record: &Record, body: impl FnOnce() -> Bytes, status: u16) {
        self.params.tap.show(|| Passage {
            lane: self.params.lane,
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

/// The end of POSTs whose last was denied, unless it is the record that the API denies. A batch
/// waits for no verdict: its halves are POSTed.
async fn denied(
    pass: Pass<'_>,
    answer: &Answer,
    is_batch: bool,
    drain: &mut watch::Receiver<()>,
) -> Option<PostEnd> {
    let mut denied = pin!(pass.denied(answer));
    let denied = if is_batch {
        denied.now_or_never()
    } else {
        tokio::select! {
            denied = &mut denied => Some(denied),
            _ = drain.changed() => return Some(PostEnd::Drained),
        }
    };
    (denied == Some(Denied::Everything)).then_some(PostEnd::Denied)
}

/// The reason for a dead letter of a message that another publisher has put into the broker.
pub fn not_an_object() -> DeathReason {
    not_posted("it is not a JSON object")
}

/// Whether the API says that it has too much to do, and nothing about the payload.
fn is_overload(answer: &Answer) -> bool {
    let Answer::Status { status, .. } = answer else {
        return false;
    };
    matches!(status, 429 | 503)
}
