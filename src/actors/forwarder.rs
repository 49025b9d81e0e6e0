//! The forwarder of a lane: tags a delivery with the path that it took, POSTs it to the API, and settles it by the answer.
//!
//! A POST that may succeed later is tried again here, with back-off, while the transport holds the message; the lane pulls
//! no more than the POSTs in flight allow, so an API that is away, and its open circuit breaker, stop the pulling by
//! themselves. What the API will never take, or has not taken for too long, goes to the dead letters, and only then leaves
//! the broker.

mod batch;

use std::{rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, error, warn};

use self::batch::{Batches, Held};
use super::{Drain, Forward, Ping, Supervised, supervisor::SupervisorHandle, tasks::InFlight};
use crate::{
    api::Api,
    api::answer::{Answer, Outcome},
    backoff::Backoff,
    breaker::Breaker,
    clock::{age, unix_us},
    config::CONCURRENCY_MAX,
    delivery::Delivery,
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, Tag},
    spool::{DeathReason, Entry, Queue, Spool},
    tap::{Passage, Tap},
};

/// The most deliveries that a lane hands over because a POST has many.
const BATCHED_MAX: usize = 1024;
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
    supervisor: SupervisorHandle,
    /// Counts drains: a retry that sees it change gives its delivery back.
    drains: watch::Sender<u64>,
    in_flight: InFlight,
    /// There where a POST may have many records.
    batches: Option<Batches>,
}

/// What a forwarder is wired to; the same for each of its lives.
#[derive(Clone)]
pub struct ForwarderParams {
    pub ledger: Arc<Ledger>,
    pub breaker: Arc<Breaker>,
    /// Where dead letters go.
    pub spool: Spool,
    pub tap: Tap,
    /// A record that is older than this is given up; `None` for never.
    pub give_up_after: Option<Duration>,
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
    #[must_use]
    pub fn deliveries(self) -> usize {
        self.posts
            .max(self.posts.saturating_mul(self.batch).min(BATCHED_MAX))
    }
}

/// What every POST of a lane needs.
struct Post {
    lane: LaneId,
    tag: Tag,
    api: Api,
    params: ForwarderParams,
}

/// How the POSTs of a record, or of a batch, have ended.
enum End {
    Delivered {
        status: u16,
    },
    /// The API will never take it, or has not for too long.
    Dead(DeathReason),
    /// It has failed as often as it may.
    Failed(DeathReason),
    /// It was held for as long as a broker bears.
    Held,
    /// The node drains.
    Drained,
}

/// How long, and how often, POSTs that fail are tried again.
struct Patience {
    /// The broker bears no longer hold.
    held_until: Instant,
    give_up_at: Option<Instant>,
    /// Failures that are about what was sent, not about an API that has too much to do.
    failures: Option<u32>,
}

impl Forwarder {
    #[must_use]
    pub fn new(
        lane: LaneId,
        tag: &str,
        api: Api,
        params: ForwarderParams,
        supervisor: SupervisorHandle,
    ) -> Self {
        let limits = params.limits;
        let post = Rc::new(Post {
            lane,
            tag: Tag::new(tag),
            api,
            params,
        });
        let drains = watch::Sender::new(0);
        let batches =
            (limits.batch > 1).then(|| Batches::new(Rc::clone(&post), limits, drains.subscribe()));
        Self {
            post,
            supervisor,
            drains,
            in_flight: InFlight::default(),
            batches,
        }
    }
}

impl Post {
    /// Ends with `delivery` settled, or given back if `drain` comes while it waits.
    async fn until_settled(&self, delivery: Delivery, mut drain: watch::Receiver<u64>) {
        let Some(delivery) = self.unless_delivered(delivery) else {
            return;
        };
        let record = &delivery.record;
        let Some(body) = self.tag.splice(&record.body) else {
            return Box::pin(self.bury_foreign(delivery)).await;
        };
        let patience = Patience {
            held_until: delivery.since + HOLD_MAX,
            give_up_at: self.give_up_at(record),
            failures: None,
        };
        let sent = (body.clone(), &*record.id, record.traceparent.as_deref());
        match self
            .until_it_ends(sent, patience, not_posted(), &mut drain)
            .await
        {
            End::Delivered { status } => {
                self.params.ledger.delivered(self.lane, [record]);
                self.show(record, || body, status);
                delivery.ack();
            }
            // Rare, and not to make the future of every record larger.
            End::Dead(letter) => Box::pin(self.bury(delivery, letter)).await,
            End::Held | End::Failed(_) => delivery.retry_after(HOLD_REST),
            End::Drained => {}
        }
    }

    /// Settles what the API is known to have.
    fn unless_delivered(&self, delivery: Delivery) -> Option<Delivery> {
        let ledger = &self.params.ledger;
        if ledger.is_delivered(&delivery.record) {
            ledger.redelivered(self.lane);
            delivery.ack();
            return None;
        }
        Some(delivery)
    }

    /// POSTs body, key and trace context, again and again while that may help. `letter` tells of earlier POSTs of the same.
    async fn until_it_ends(
        &self,
        (body, key, traceparent): (Bytes, &str, Option<&str>),
        Patience {
            held_until,
            give_up_at,
            failures,
        }: Patience,
        mut letter: DeathReason,
        drain: &mut watch::Receiver<u64>,
    ) -> End {
        let ForwarderParams {
            ledger, breaker, ..
        } = &self.params;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let mut failed = 0;
        loop {
            let give_up = |letter| {
                End::Dead(DeathReason {
                    given_up: true,
                    ..letter
                })
            };
            if give_up_at.is_some_and(|at| at <= Instant::now()) {
                return give_up(letter);
            }
            if held_until <= Instant::now() {
                return End::Held;
            }
            // Most often there is nothing to wait for, and no timer is needed.
            let pass = tokio::select! {
                biased;
                pass = breaker.pass() => pass,
                () = at(give_up_at) => return give_up(letter),
                () = sleep_until(held_until) => return End::Held,
                // An error means that the forwarder is gone: given back all the same.
                _ = drain.changed() => return End::Drained,
            };
            let answer = {
                let (_underway, began) = (ledger.api.begin(), std::time::Instant::now());
                let answer = self.api.post(body.clone(), key, traceparent).await;
                ledger.posted(self.lane, began);
                answer
            };
            letter.heard(&answer);
            match (answer.outcome(), &answer) {
                (Outcome::Delivered, &Answer::Status { status, .. }) => {
                    pass.succeeded();
                    return End::Delivered { status };
                }
                (Outcome::Retry { at_least }, _) => {
                    pass.failed(at_least);
                    failed += u32::from(!matches!(
                        answer,
                        Answer::Status {
                            status: 429 | 503,
                            ..
                        }
                    ));
                    if failures.is_some_and(|most| failed >= most) {
                        return End::Failed(letter);
                    }
                    let delay = backoff.next_delay().max(at_least.unwrap_or_default());
                    debug!(lane = %self.lane, key, %answer, ?delay, "POST failed");
                    tokio::select! {
                        () = sleep(delay) => {}
                        _ = drain.changed() => return End::Drained,
                    }
                }
                (Outcome::Delivered | Outcome::Refused, _) => {
                    pass.succeeded();
                    return End::Dead(letter);
                }
            }
        }
    }

    /// When `record` has waited long enough, if ever.
    fn give_up_at(&self, record: &Record) -> Option<Instant> {
        let patience = self.params.give_up_after?;
        let age = record
            .origin
            .as_ref()
            .map_or(Duration::ZERO, |origin| age(origin.at_us));
        Instant::now().checked_add(patience.saturating_sub(age))
    }

    /// Makes a dead letter of what is no record: something else has put it into the broker.
    async fn bury_foreign(&self, delivery: Delivery) {
        let answer = "not POSTed: it is not a JSON object".to_owned();
        self.bury(
            delivery,
            DeathReason {
                answer,
                ..DeathReason::default()
            },
        )
        .await;
    }

    /// Makes a dead letter of `delivery`, and lets the broker forget it once that is on disk.
    async fn bury(&self, delivery: Delivery, letter: DeathReason) {
        let record = &delivery.record;
        let letter = DeathReason {
            lane: self.lane.to_string(),
            at_us: unix_us(),
            ..letter
        };
        warn!(lane = %self.lane, id = &*record.id, status = letter.status, answer = letter.answer, "dead letter");
        match self
            .params
            .spool
            .put(Queue::Dead, &Entry::new(record, Some(letter)))
            .await
        {
            Ok(_) => {
                self.params.ledger.dead(self.lane, record);
                delivery.reject();
            }
            Err(why) => {
                error!(lane = %self.lane, id = &*record.id, %why, "a dead letter cannot be kept; the record stays in the broker");
                delivery.retry_after(UNWRITTEN_REST);
            }
        }
    }

    /// The API has it, as `body`.
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

/// What is told of a record that was not POSTed yet.
fn not_posted() -> DeathReason {
    DeathReason {
        answer: "not POSTed".to_owned(),
        ..DeathReason::default()
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
            // There is one for each; without, a delivery would go back to its broker.
            let Some(permit) = permits.split(1) else {
                return;
            };
            let underway = self.in_flight.begin();
            if let Some(batches) = &self.batches {
                batches.take(Held {
                    delivery,
                    permit,
                    underway,
                });
                continue;
            }
            let (post, drain) = (Rc::clone(&self.post), self.drains.subscribe());
            actix_rt::spawn(async move {
                post.until_settled(delivery, drain).await;
                drop((permit, underway));
            });
        }
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
        match &self.batches {
            Some(batches) if batches.have_ended() => Err("batches are not POSTed any more".into()),
            _ => Ok(()),
        }
    }
}
