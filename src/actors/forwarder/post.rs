//! One POST with its retries, and the settlement of its delivery.

use std::{cell::RefCell, future::pending, mem, pin::pin, sync::Arc, time::Duration};

use awc::http::header::HeaderMap;
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use super::{
    batch_size::BatchSize,
    slots::{PostSlot, PostSlots},
};
use crate::{
    actors::{
        apis::SharedApi,
        copies::Copies,
        dead_letters::{add_attempt, not_posted},
        parking::Failing,
    },
    api::{
        Api,
        answer::{Answer, Outcome},
        gate::{Gate, PostPlace},
    },
    backoff::Backoff,
    breaker::{Denied, Pass, Trial},
    clock::unix_us,
    delivery::{Delivery, HeldEntry},
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, Tag, TraceHeaders},
    routing::scores::Scores,
    spool::{DeathReason, EntryKey},
    tap::Tap,
    trace::{LaneTracer, OpenSpan},
};

/// The first retry waits at most this: a record that the API fails at holds up others meanwhile.
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// Retries wait longer by this factor if the API has too much to do.
const OVERLOAD_FACTOR: u32 = 10;
/// No retry waits longer unless the API asks for it, so that an API that is back is used soon.
const RETRY_CAP: Duration = Duration::from_secs(3);
/// How long a record rests if its dead letter could not be written.
pub const UNWRITTEN_REST: Duration = Duration::from_secs(30);
/// A delivery is nakked after this time and redelivered: brokers end a consumer that holds a
/// message for much longer.
const HOLD_MAX: Duration = Duration::from_mins(10);
/// How long it then rests.
pub const HOLD_REST: Duration = Duration::from_secs(1);

/// The way of a lane to one API; each restart of the forwarder uses the same one.
#[derive(Clone)]
pub struct PosterParams {
    pub lane: LaneId,
    pub tag: Tag,
    pub api: SharedApi,
    pub ledger: Arc<Ledger>,
    pub scores: Arc<Scores>,
    pub copies: Copies,
    pub tap: Tap,
    pub slots: PostSlots,
    pub gate: Arc<Gate>,
    pub tracer: LaneTracer,
}

/// POSTs the deliveries of a lane and settles them.
pub struct Poster {
    api: Api,
    pub params: PosterParams,
    pub batch_size: RefCell<BatchSize>,
}

/// The content of a POST.
pub struct Payload<'a> {
    pub body: Bytes,
    /// See [`PostContent::headers`](crate::api::content::PostContent::headers).
    pub headers: HeaderMap,
    /// Records in the body.
    pub records: usize,
    pub key: &'a str,
    pub trace: Option<&'a TraceHeaders>,
    /// The spans of the records whose traces are recorded.
    pub spans: Vec<&'a OpenSpan>,
}

/// How long a failed POST is retried here.
pub struct RetryLimits<'a> {
    /// The end of the longest hold that a broker allows; `None` if no broker holds the records.
    pub held_until: Option<Instant>,
    /// When the record, or the oldest of a batch, is to be given up, if ever.
    pub give_up_at: Option<Instant>,
    /// The only delivery of the payload; `None` if it has several.
    pub only: Option<&'a Delivery>,
}

/// How the POSTs of a record, or of a batch, have ended.
pub enum PostEnd {
    Delivered {
        status: u16,
        /// The first POST was.
        at_once: bool,
    },
    /// The API has refused it, or has not taken it for too long.
    Dead(DeathReason),
    /// The API fails at it while it answers others: this is on disk, with its next try.
    Parked(EntryKey),
    /// The same for one of the records of a batch, perhaps: they are POSTed in smaller parts.
    Split(DeathReason),
    HeldTooLong,
    /// The API denies everything: the record is not to blame.
    Denied,
    /// The lane drains, or the node.
    Drained,
}

impl Poster {
    pub fn new(params: PosterParams) -> Self {
        Self {
            api: Api::new(&params.api.settings),
            batch_size: RefCell::new(BatchSize::new(params.api.limits.batch)),
            params,
        }
    }

    /// Settles `delivery` by the API's answer. A drain gives it back if it waits.
    pub async fn deliver(
        &self,
        delivery: Delivery,
        permit: OwnedSemaphorePermit,
        mut drain: watch::Receiver<()>,
    ) {
        if self.is_delivered(&delivery).await {
            return delivery.ack();
        }
        let record = &delivery.record;
        // Dead letters are rare: boxed, they do not make the future of every record larger.
        let Some(content) = self.params.api.form.content(record, self.tag(&delivery)) else {
            return Box::pin(self.dead_letter(delivery, not_an_object())).await;
        };
        let payload = Payload {
            body: content.body,
            headers: content.headers,
            records: 1,
            key: &record.id,
            trace: record.trace.as_ref(),
            spans: delivery.span.iter().collect(),
        };
        let limits = RetryLimits {
            held_until: held_until(&delivery),
            give_up_at: self.params.api.dead_letters.give_up_at(record),
            only: Some(&delivery),
        };
        let mut slot = PostSlot::new(&self.params.slots, permit, None);
        let reason = DeathReason::default();
        match self
            .post_with_retries(&payload, limits, reason, &mut slot, &mut drain)
            .await
        {
            PostEnd::Delivered { status, at_once } => {
                match delivery.last_place() {
                    None => self.count_delivered([record], delivery.since, at_once),
                    Some(held) => Box::pin(self.count_delivered_held(&held, record)).await,
                }
                self.params.copies.release(record);
                self.show(record, || payload.body, status);
                delivery.ack();
            }
            PostEnd::Dead(reason) => Box::pin(self.dead_letter(delivery, reason)).await,
            PostEnd::Parked(key) => Box::pin(self.parked(delivery, key)).await,
            // Another record is the next to probe the API.
            PostEnd::HeldTooLong | PostEnd::Split(_) | PostEnd::Denied => {
                delivery.retry_after(HOLD_REST);
            }
            PostEnd::Drained => {}
        }
    }

    /// The tag of the lane that `delivery` came out of.
    pub fn tag<'t>(&'t self, delivery: &'t Delivery) -> &'t Tag {
        let held = delivery.held.as_ref();
        held.map_or(&self.params.tag, |held| &held.tag)
    }

    /// Whether the API is known to have the record of `delivery`. Then that is counted, and it may be
    /// acked.
    pub async fn is_delivered(&self, delivery: &Delivery) -> bool {
        let ledger = &self.params.ledger;
        if !ledger.is_delivered(&delivery.record) {
            return false;
        }
        if let Some(held) = delivery.last_place() {
            let removed = Box::pin(self.take_out(&held)).await;
            if removed == Some(true) {
                ledger.parked_twice();
            }
        } else {
            ledger.redelivered(self.params.lane);
            // Another lane has delivered it, and this one may have kept a copy.
            self.params.copies.release(&delivery.record);
        }
        true
    }

    /// POSTs `payload` until it is delivered, refused or parked, or a limit is reached. `reason` has
    /// the earlier attempts for the same records. Each POST is made in `slot`.
    pub async fn post_with_retries(
        &self,
        payload: &Payload<'_>,
        limits: RetryLimits<'_>,
        mut reason: DeathReason,
        slot: &mut PostSlot<'_>,
        drain: &mut watch::Receiver<()>,
    ) -> PostEnd {
        let Self { api, params, .. } = self;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut trial = Trial::default();
        loop {
            // Usually the breaker is closed, and no timer is needed.
            let (pass, place) = tokio::select! {
                biased;
                admitted = self.admit(&trial) => admitted,
                () = sleep_if(limits.held_until) => return PostEnd::HeldTooLong,
                // An error means that the forwarder is gone, which gives the delivery back too.
                _ = drain.changed() => return PostEnd::Drained,
            };
            let answer = post(api, &params.api, &params.ledger, params.lane, payload).await;
            if let Some(place) = place {
                place.end(&answer, payload.records);
            }
            add_attempt(&mut reason, &answer);
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    pass.succeeded(|| self.waiting());
                    let at_once = reason.attempts == 1;
                    return PostEnd::Delivered { status, at_once };
                }
                (Outcome::Retry { at_least }, _) => {
                    pass.failed(&answer, &mut trial);
                    if limits.only.is_some() && may_be_a_record(&answer, &trial) {
                        slot.leave();
                    }
                    // Boxed like the other rare ends: the future of every record stays small.
                    let end = self.end_failing(&limits, &trial, &answer, &mut reason);
                    if let Some(end) = Box::pin(end).await {
                        return end;
                    }
                    let delay = delay(&mut backoff, &answer, at_least);
                    debug!(
                        lane = %params.lane,
                        id = payload.key,
                        %answer,
                        retry_in_s = delay.as_secs_f64(),
                        "POST failed"
                    );
                    let next_try = sleep(delay).then(|()| slot.enter());
                    tokio::select! {
                        () = Box::pin(next_try) => {}
                        () = sleep_if(limits.held_until) => return PostEnd::HeldTooLong,
                        _ = drain.changed() => return PostEnd::Drained,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    pass.succeeded(|| self.waiting());
                    return PostEnd::Dead(reason);
                }
                (Outcome::Denied, _) => {
                    let is_batch = limits.only.is_none();
                    let denied = Box::pin(denied(pass, &answer, is_batch, drain)).await;
                    return denied.unwrap_or(PostEnd::Dead(reason));
                }
            }
        }
    }

    /// Resolves when a POST may be made, in its place under the API's limit. A probe needs none.
    async fn admit(&self, trial: &Trial) -> (Pass<'_>, Option<PostPlace<'_>>) {
        let PosterParams { api, gate, .. } = &self.params;
        let breaker = &api.breaker;
        loop {
            let pass = breaker.pass(trial).await;
            if pass.is_probe() {
                gate.admit_probe().await;
                return (pass, None);
            }
            let Some(place) = gate.enter(|| breaker.is_open()).await else {
                continue;
            };
            // The breaker may have opened meanwhile, and a pass counts from its POST on.
            if let Some(pass) = breaker.pass(trial).now_or_never() {
                return (pass, Some(place));
            }
        }
    }

    /// The end of POSTs whose last has failed; `None` if they go on.
    async fn end_failing(
        &self,
        limits: &RetryLimits<'_>,
        trial: &Trial,
        answer: &Answer,
        reason: &mut DeathReason,
    ) -> Option<PostEnd> {
        // No record dies of its age alone: the API was there, and did not take it.
        let is_reached = answer.is_reached() || trial.others_succeeded();
        let is_overdue = is_reached && limits.give_up_at.is_some_and(|at| at <= Instant::now());
        let Some(delivery) = limits.only else {
            let splits = is_overdue || may_be_a_record(answer, trial) || trial.is_guilty();
            return splits.then(|| PostEnd::Split(mem::take(reason)));
        };
        if is_overdue {
            reason.given_up = true;
            return Some(PostEnd::Dead(mem::take(reason)));
        }
        let at_least = answer.pause();
        // It would hold up others for too long.
        let waits_long = at_least > Some(RETRY_CAP) && trial.others_succeeded();
        if !waits_long && !trial.is_guilty() {
            return None;
        }
        let failing = Failing {
            record: &delivery.record,
            lane: self.params.lane,
            tag: self.tag(delivery),
            reason,
            pauses: 0,
            is_proven: trial.is_proven(),
            at_least,
        };
        // If the disk does not take it, it is retried here.
        let parked = self.params.api.parking.park(&failing).await;
        parked.ok().map(PostEnd::Parked)
    }

    /// Counts records that the API has taken, `at_once` or after retries. They came out of the lane
    /// at `since` or later. A time that contains retries, or an outage of the API, says nothing about
    /// the lane. Nor does the time that one of several APIs takes: it would pass for the lane's.
    pub fn count_delivered<'r>(
        &self,
        records: impl IntoIterator<Item = &'r Record>,
        since: Instant,
        at_once: bool,
    ) {
        let PosterParams {
            lane, scores, api, ..
        } = &self.params;
        let longest = self.params.ledger.delivered(*lane, records);
        if let Some(took) = longest
            && at_once
            && scores.measures()
            && api.breaker.health().since.elapsed() > took
        {
            let took = match api.held {
                None => took,
                Some(_) => took.saturating_sub(since.elapsed()),
            };
            scores.delivered(*lane, took, scores.at(Instant::now()));
        }
    }

    /// Counts a record from the disk that the API has taken.
    pub async fn count_delivered_held(&self, held: &HeldEntry, record: &Record) {
        let PosterParams { lane, ledger, .. } = &self.params;
        match self.take_out(held).await {
            Some(true) => ledger.delivered_parked(*lane, record),
            // An operator has replayed or dropped it meanwhile: it counts elsewhere.
            Some(false) => {
                ledger.delivered(*lane, [record]);
            }
            None => {}
        }
    }

    /// Removes a record from the disk. Returns whether it was there; `None` if the spool is closed:
    /// then the next run finds it again.
    async fn take_out(&self, entry: &HeldEntry) -> Option<bool> {
        let held = self.params.api.held.as_ref()?;
        held.remove(entry).await.ok()
    }

    fn waiting(&self) -> u64 {
        self.params.api.parking.waiting(&self.params.ledger)
    }

    /// Makes a dead letter of `delivery`. The broker may forget the message once that is on disk.
    pub async fn dead_letter(&self, delivery: Delivery, reason: DeathReason) {
        let lane = self.params.lane;
        let record = &delivery.record;
        let dead_letters = &self.params.api.dead_letters;
        if dead_letters
            .write(lane.name(), record, reason)
            .await
            .is_ok()
        {
            let ledger = &self.params.ledger;
            let removed = match delivery.last_place() {
                Some(held) => self.take_out(&held).await,
                None => Some(false),
            };
            match removed {
                Some(true) => ledger.dead_parked(lane),
                Some(false) => ledger.dead(lane, record),
                None => {}
            }
            self.params.copies.release(record);
            delivery.reject();
        } else {
            delivery.retry_after(UNWRITTEN_REST);
        }
    }

    /// Acks a delivery whose record is parked on disk, as `key`.
    pub async fn parked(&self, delivery: Delivery, key: EntryKey) {
        let Self { params, .. } = self;
        match delivery.last_place() {
            None => params.ledger.parked(params.lane, &delivery.record),
            Some(held) => {
                // If an operator has taken the record, it must not come back.
                if self.take_out(&held).await == Some(false) {
                    params.api.dead_letters.spool.settle(key);
                }
            }
        }
        params.copies.release(&delivery.record);
        delivery.ack();
    }

    /// Shows the tap that the API has taken the record as `body`.
    pub fn show(&self, record: &Record, body: impl FnOnce() -> Bytes, status: u16) {
        let Self { params, .. } = self;
        params.tap.show_delivered(params.lane, record, body, status);
    }
}

/// The end of the longest hold of `delivery` that its broker allows; `None` if it is on this node's
/// disk.
pub fn held_until(delivery: &Delivery) -> Option<Instant> {
    delivery.held.is_none().then(|| delivery.since + HOLD_MAX)
}

/// Sleeps until `at`, or for ever.
async fn sleep_if(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Whether a record may be the reason of the last failure. Otherwise the API has too much to do, or
/// is away, and is not to get more.
fn may_be_a_record(answer: &Answer, trial: &Trial) -> bool {
    answer.is_reached() && !answer.is_overloaded() && trial.is_api_up()
}

/// The pause after a failed POST. An overloaded API gets more time.
fn delay(backoff: &mut Backoff, answer: &Answer, at_least: Option<Duration>) -> Duration {
    let factor = if answer.is_overloaded() {
        OVERLOAD_FACTOR
    } else {
        1
    };
    let delay = (backoff.next_delay() * factor).min(RETRY_CAP);
    delay.max(at_least.unwrap_or_default())
}

/// POSTs `payload` once, and counts that.
pub async fn post(
    client: &Api,
    api: &SharedApi,
    ledger: &Ledger,
    lane: LaneId,
    payload: &Payload<'_>,
) -> Answer {
    let counts = &api.counts;
    let _in_flight = counts.begin();
    let began_us = unix_us();
    let body = payload.body.clone();
    let Payload {
        key,
        trace,
        headers,
        records,
        spans,
        ..
    } = payload;
    let span = OpenSpan::post(spans, *records, &api.url);
    let own = span.as_ref().and_then(OpenSpan::headers);
    let trace = own.as_ref().or(*trace);
    let answer = client.post_with(body, key, trace, headers).await;
    if let Some(span) = span {
        span.answered(&answer);
    }
    let now_us = unix_us();
    ledger.posted(lane, key, [began_us, now_us], answer.status());
    match answer.failure() {
        Some(class) => counts.failed(class),
        None => counts.delivered(now_us),
    }
    answer
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
