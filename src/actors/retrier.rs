//! The retrier: POSTs each parked record when its pause is over.
//!
//! A record that fails again is parked for a longer pause, until it is given up. The retrier POSTs
//! few records at a time, and reads each from the disk only when its turn has come: a hundred
//! thousand parked records take no memory. Records of one queue have about the same pause, so the
//! oldest is due first; one that is due earlier than the one before waits for it.

use std::{rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use futures_util::FutureExt as _;
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing::debug;

use super::{
    Drain, Ping, Supervised,
    apis::{Apis, SharedApi},
    dead_letters::add_attempt,
    forwarder::{Payload, UNWRITTEN_REST, array_of_one, not_an_object, post},
    parking::{Failing, PAUSES},
    supervisor::SupervisorHandle,
};
use crate::{
    api::{
        Api,
        answer::{Answer, Outcome},
        content::PostContent,
    },
    breaker::{Denied, Pass, Trial},
    clock::{age, unix_us},
    delivery::Verdict,
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, Tag},
    spool::{DeathReason, Entry, EntryKey, Queue, Spool},
    tap::Tap,
    trace::Tracer,
};

/// Parked records of one queue that are POSTed at the same time, or read ahead.
const WINDOW: usize = 8;
/// How long a drain waits for POSTs in flight. The records are on disk.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);

/// The parts of the retrier.
#[derive(Clone)]
pub struct RetrierParams {
    pub apis: Apis,
    pub ledger: Arc<Ledger>,
    pub tap: Tap,
    pub tracer: Tracer,
}

/// One per node.
pub struct Retrier {
    /// One for each API.
    posters: Vec<Rc<ParkedPoster>>,
    supervisor: SupervisorHandle,
    queues: Vec<AbortOnDropHandle<()>>,
    in_flight: TaskTracker,
    /// Changes when it drains.
    drains: watch::Sender<()>,
}

struct ParkedPoster {
    client: Api,
    api: SharedApi,
    ledger: Arc<Ledger>,
    tap: Tap,
    tracer: Tracer,
}

/// A parked record whose turn has come.
struct Due {
    key: EntryKey,
    record: Record,
    lane: LaneId,
    tag: Tag,
    pauses: u32,
    trial: Trial,
    reason: DeathReason,
}

impl Due {
    fn new(key: EntryKey, entry: &Entry) -> Self {
        let reason = entry.reason.clone().unwrap_or_default();
        let parked = entry.parked.clone().unwrap_or_default();
        Self {
            key,
            record: entry.record(),
            // A version with other lanes may have written it: it counts for any of ours.
            lane: LaneId::from_name(&reason.lane).unwrap_or(LaneId::Grpc),
            tag: Tag::new(&parked.tag),
            pauses: parked.pauses,
            trial: Trial::parked(parked.proven, age(reason.at_us)),
            reason,
        }
    }
}

impl Retrier {
    pub fn new(params: RetrierParams, supervisor: SupervisorHandle) -> Self {
        let RetrierParams {
            apis,
            ledger,
            tap,
            tracer,
        } = params;
        let posters = apis.all().iter().map(|api| {
            Rc::new(ParkedPoster {
                client: Api::new(&api.settings),
                api: api.clone(),
                ledger: Arc::clone(&ledger),
                tap: tap.clone(),
                tracer: tracer.clone(),
            })
        });
        Self {
            posters: posters.collect(),
            supervisor,
            queues: Vec::new(),
            in_flight: TaskTracker::new(),
            drains: watch::Sender::new(()),
        }
    }

    /// Retries the records of `queue`, none of which waits for longer than `longest`.
    fn retry(
        &self,
        poster: &Rc<ParkedPoster>,
        queue: Queue,
        longest: Duration,
    ) -> AbortOnDropHandle<()> {
        let poster = Rc::clone(poster);
        let in_flight = self.in_flight.clone();
        let drain = self.drains.subscribe();
        AbortOnDropHandle::new(actix_rt::spawn(async move {
            let window = Arc::new(Semaphore::new(WINDOW));
            let mut tail = poster.spool().tail_one_by_one(queue, window);
            while let Some((key, entry, permit)) = tail.next().await {
                fail::fail_point!("retrier");
                let due_us = entry.parked.as_ref().map_or(0, |parked| parked.due_us);
                let pause = Duration::from_micros(due_us.saturating_sub(unix_us()));
                // The clock may have been set back across a restart.
                sleep(pause.min(longest)).await;
                let poster = Rc::clone(&poster);
                let drain = drain.clone();
                in_flight.spawn_local(async move {
                    poster.deliver(Due::new(key, &entry), drain).await;
                    drop(permit);
                });
            }
        }))
    }
}

impl ParkedPoster {
    fn spool(&self) -> &Spool {
        &self.api.dead_letters.spool
    }

    /// Ends when the record is delivered, dead, or parked again. Also ends when the node drains:
    /// then it stays on disk as it is.
    async fn deliver(&self, mut due: Due, mut drain: watch::Receiver<()>) {
        let ledger = &self.ledger;
        // An operator may have taken it, or another copy of it may have arrived.
        if !self.spool().contains(due.key).await.unwrap_or(false) {
            return;
        }
        if ledger.is_delivered(&due.record) {
            return self.take_out(&due, || ledger.parked_twice(), || {}).await;
        }
        loop {
            let is_settled = tokio::select! {
                biased;
                // An error means that the retrier is gone.
                _ = drain.changed() => return,
                pass = self.admit(&due.trial) => self.post(&mut due, pass).await,
            };
            if is_settled {
                return;
            }
            // The disk does not take its end, or the API denies everything.
            tokio::select! {
                () = sleep(UNWRITTEN_REST) => {}
                _ = drain.changed() => return,
            }
        }
    }

    /// Resolves when a POST may be made.
    async fn admit(&self, trial: &Trial) -> Pass<'_> {
        let SharedApi { breaker, rate, .. } = &self.api;
        loop {
            let pass = breaker.pass(trial).await;
            if pass.is_probe() {
                rate.turn().await;
                return pass;
            }
            // The breaker may open meanwhile, and a pass counts from its POST on.
            if rate.turn_unless(|| breaker.is_open()).await
                && let Some(pass) = breaker.pass(trial).now_or_never()
            {
                return pass;
            }
        }
    }

    /// POSTs the record once. Returns whether it is settled.
    async fn post(&self, due: &mut Due, pass: Pass<'_>) -> bool {
        let Self {
            client,
            api,
            ledger,
            tap,
            tracer,
        } = self;
        let Some(content) = api.form.content(&due.record, &due.tag) else {
            return self.dead_letter(due, not_an_object()).await;
        };
        let PostContent {
            body: tagged,
            headers,
        } = content;
        let array = match api.limits.batch {
            1 => None,
            _ => array_of_one(api.form, &due.record, &due.tag),
        };
        let (body, key, headers) = match array {
            Some((body, key)) => (body, key, api.form.batch_headers()),
            None => (tagged.clone(), due.record.id.to_string(), headers),
        };
        let span = tracer.lane(due.lane).process(&due.record);
        let payload = Payload {
            body,
            headers,
            records: 1,
            key: &key,
            trace: due.record.trace.as_ref(),
            spans: span.iter().collect(),
        };
        let answer = post(client, api, ledger, due.lane, &payload).await;
        let end = |verdict| {
            if let Some(span) = span {
                span.ended(verdict);
            }
        };
        add_attempt(&mut due.reason, &answer);
        let waiting = || api.parking.waiting(ledger);
        match (answer.outcome(), &answer) {
            (Outcome::Delivered, &Answer::Status { status, .. }) => {
                pass.succeeded(waiting);
                let (lane, record) = (due.lane, &due.record);
                let counted = || ledger.delivered_parked(lane, record);
                let twice = || {
                    ledger.delivered(lane, [record]);
                };
                self.take_out(due, counted, twice).await;
                end(Verdict::Ack);
                tap.show_delivered(lane, record, || tagged, status);
                true
            }
            (Outcome::Retry { at_least }, _) => {
                pass.failed(&answer, &mut due.trial);
                // The API was there, or has taken others since the last try.
                let is_reached =
                    answer.is_reached() || api.counts.last_delivery_us() > due.reason.at_us;
                let left = api.dead_letters.time_left(&due.record);
                if is_reached && left == Some(Duration::ZERO) {
                    due.reason.given_up = true;
                    let is_settled = self.dead_letter(due, due.reason.clone()).await;
                    end(Verdict::Reject);
                    return is_settled;
                }
                let is_settled = self.park_again(due, at_least).await;
                end(Verdict::RetryAfter(at_least.unwrap_or_default()));
                is_settled
            }
            (Outcome::Denied, _) => {
                let denied = pass.denied(&answer).await;
                if denied != Denied::TheRecord {
                    end(Verdict::RetryAfter(Duration::ZERO));
                    return false;
                }
                let is_settled = self.dead_letter(due, due.reason.clone()).await;
                end(Verdict::Reject);
                is_settled
            }
            (Outcome::Delivered | Outcome::Refused, _) => {
                pass.succeeded(waiting);
                let is_settled = self.dead_letter(due, due.reason.clone()).await;
                end(Verdict::Reject);
                is_settled
            }
        }
    }

    async fn park_again(&self, due: &Due, at_least: Option<Duration>) -> bool {
        let failing = Failing {
            record: &due.record,
            lane: due.lane,
            tag: &due.tag,
            reason: &due.reason,
            // A failure in an outage is not the record's: it makes no pause longer.
            pauses: due.pauses.saturating_sub(u32::from(!due.trial.is_api_up())),
            is_proven: due.trial.is_proven(),
            at_least,
        };
        let Ok(key) = self.api.parking.park(&failing).await else {
            return false;
        };
        // If an operator has taken the record, it must not come back.
        self.take_out(due, || {}, || self.spool().settle(key)).await;
        true
    }

    async fn dead_letter(&self, due: &Due, reason: DeathReason) -> bool {
        let Self { api, ledger, .. } = self;
        let written = api
            .dead_letters
            .write(due.lane.name(), &due.record, reason)
            .await;
        if written.is_err() {
            return false;
        }
        let twice = || ledger.dead(due.lane, &due.record);
        self.take_out(due, || ledger.dead_parked(due.lane), twice)
            .await;
        true
    }

    /// Removes the record from the parked ones. Calls `gone` instead of `taken` if an operator has
    /// replayed or dropped it meanwhile: then it counts elsewhere.
    async fn take_out(&self, due: &Due, taken: impl FnOnce(), gone: impl FnOnce()) {
        match self.spool().remove(due.key).await {
            Ok(true) => taken(),
            Ok(false) => gone(),
            // The spool is closed: the next run finds the record again.
            Err(why) => debug!(id = &*due.record.id, reason = %why, "a parked record stays"),
        }
    }
}

impl Actor for Retrier {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        let queues = self.posters.iter().flat_map(|poster| {
            let queues = Queue::parked().zip(PAUSES);
            queues.map(|(queue, longest)| self.retry(poster, queue, longest))
        });
        self.queues = queues.collect();
        self.supervisor.ready(None);
    }
}

impl Supervised for Retrier {
    /// Control messages only.
    const MAILBOX: usize = 64;
}

impl Handler<Drain> for Retrier {
    type Result = ResponseFuture<()>;

    /// Begins no further POST. POSTs in flight end, or their records stay parked.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.queues.clear();
        self.drains.send_replace(());
        let in_flight = self.in_flight.clone();
        in_flight.close();
        Box::pin(async move {
            if timeout(DRAIN_PATIENCE, in_flight.wait()).await.is_err() {
                debug!("parked records are left on disk in the middle of their POSTs");
            }
        })
    }
}

impl Handler<Ping> for Retrier {
    type Result = Result<(), String>;

    /// Fails if a queue is no longer read: its records would stay parked for ever.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        if self.queues.iter().any(AbortOnDropHandle::is_finished) {
            Err("parked records are not tried any more".into())
        } else {
            Ok(())
        }
    }
}
