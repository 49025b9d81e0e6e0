//! The router: chooses one of the lanes that are up for the records of each request, and the next
//! one when a lane gives them back. Records that no lane confirms in time go to the spool, unless no
//! lane will ever carry them. The router never waits for the network.

use std::{mem, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, dev::SendError};
use tokio::time::Instant;
use tracing_mutex::parkinglot::RwLockReadGuard;

use super::{
    Drain, FED_MAX, Job, Ping, Publish, RECORDS_MAX, Route, Source, Supervised,
    fallback::DiskFallback,
    live_lanes::{LaneEntry, LiveLanes},
    receipts::{PendingRecord, Refused},
    supervisor::SupervisorHandle,
};
use crate::{
    clock::unix_us,
    lane_id::{LaneId, PerLane},
    routing::{
        choose::{Candidates, Choice, Chooser},
        explain::{Explanation, Explanations},
        hash::KeyHash,
        policy::Policy,
        rules::Routes,
        settings::CurrentRouting,
    },
};

/// The parts and settings of a router; each restart uses the same ones.
#[derive(Clone)]
pub struct RouterParams {
    pub routing: CurrentRouting,
    pub live_lanes: LiveLanes,
    pub fallback: DiskFallback,
    pub explanations: Explanations,
    /// After this long without a confirm, a record goes to the spool.
    pub publish_timeout: Duration,
}

/// Reads the table of live lanes at each choice, so it knows nothing that a restart could lose.
pub struct Router {
    params: RouterParams,
    /// The routes whose turns `chooser` remembers.
    routes: Arc<Routes>,
    chooser: Chooser,
    supervisor: SupervisorHandle,
}

impl Router {
    pub fn new(params: RouterParams, supervisor: SupervisorHandle) -> Self {
        Self {
            chooser: chooser(),
            routes: params.routing.get(),
            params,
            supervisor,
        }
    }

    /// Hands `job` to a lane, or to the spool. Its records stay together, unless each has a lane of
    /// its own.
    fn route(&mut self, mut job: Job) {
        if let Some(new) = self.params.routing.newer_than(&self.routes) {
            self.chooser = chooser();
            self.routes = new;
        }
        job.sent = None;
        job.retain_waited_for();
        if job.records.len() > 1 && is_by_key(&job) {
            for job in self.split(job) {
                self.route_together(job);
            }
        } else if !job.records.is_empty() {
            self.route_together(job);
        }
    }

    fn route_together(&mut self, job: Job) {
        let size = job.largest_message();
        let Err(job) = self.send_to_lane(job, size) else {
            return;
        };
        let lanes = job.lanes().iter().copied();
        if let Some(why) = self.params.live_lanes.refusal(size, lanes) {
            return job.refuse(&why);
        }
        if job.source != Source::Client {
            return job.refuse(&Refused::NoLane);
        }
        self.params.explain(&job, &job.records, None);
        self.params.fallback.store_job(job);
    }

    /// The records of `job` by the lanes that their keys choose, and those that no lane takes.
    fn split(&mut self, mut job: Job) -> Vec<Job> {
        let lanes = LaneView::new(&self.params, Instant::now());
        let mut parts: Vec<(Option<LaneId>, Job)> = Vec::new();
        for pending in mem::take(&mut job.records) {
            let size = pending.record.message_size();
            let choice = lanes.choose(&mut self.chooser, &job, pending.key, size);
            let lane = choice.map(|choice| choice.lane);
            match parts.iter_mut().find(|(other, _)| *other == lane) {
                Some((_, part)) => part.records.push(pending),
                None => parts.push((lane, part_of(&job, vec![pending]))),
            }
        }
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// Gives `job`, whose largest message has `size` bytes, back if no lane takes it, or if it is too
    /// late for a lane.
    fn send_to_lane(&mut self, mut job: Job, size: usize) -> Result<(), Job> {
        let now = Instant::now();
        if now - job.began >= self.params.publish_timeout {
            return Err(job);
        }
        let lanes = LaneView::new(&self.params, now);
        let scores = &self.params.live_lanes.scores;
        while let Some(first) = job.records.first()
            && let Some(choice) = lanes.choose(&mut self.chooser, &job, first.key, size)
        {
            let lane = choice.lane;
            lanes.explain(&mut self.chooser, &job, choice, size);
            job.tried.insert(lane);
            let Some(publisher) = lanes.live[lane as usize].publisher(size) else {
                continue;
            };
            job.sent = scores.sent(lane, count(&job), lanes.now);
            match publisher.try_send(Publish(job)) {
                Ok(()) => return Ok(()),
                // A lane that has just died is in the table until the supervisor is notified.
                Err(SendError::Full(Publish(back)) | SendError::Closed(Publish(back))) => {
                    job = back;
                }
            }
        }
        job.sent = None;
        Err(job)
    }
}

/// A chooser that has chosen nothing yet.
fn chooser() -> Chooser {
    Chooser::new(fastrand::u64(..))
}

/// The records of `job` may take different lanes, each by its key.
fn is_by_key(job: &Job) -> bool {
    job.pinned.is_none() && job.route.policy == Policy::Hash
}

/// The lanes at one moment.
struct LaneView<'a> {
    params: &'a RouterParams,
    live: RwLockReadGuard<'a, PerLane<LaneEntry>>,
    now: Duration,
}

impl<'a> LaneView<'a> {
    fn new(params: &'a RouterParams, now: Instant) -> Self {
        Self {
            params,
            live: params.live_lanes.read(),
            now: params.live_lanes.scores.at(now),
        }
    }

    /// The lane for the records of `job`, the first of which has `key`, and the largest of which is
    /// a message of `size` bytes.
    fn choose(
        &self,
        chooser: &mut Chooser,
        job: &Job,
        key: KeyHash,
        size: usize,
    ) -> Option<Choice> {
        let may_take = |lane: LaneId| {
            let publisher = self.live[lane as usize].publisher(size);
            publisher.is_some() && !job.tried.contains(lane)
        };
        if let Some(lane) = job.pinned {
            return may_take(lane).then(|| Choice::pinned(lane));
        }
        let ledger = &self.params.fallback.ledger;
        let candidates = Candidates {
            may_take: &may_take,
            scores: &self.params.live_lanes.scores,
            undelivered: &|lane| ledger.lane(lane).counts.in_flight(),
            now: self.now,
        };
        chooser.choose(&job.route, key, count(job), &candidates)
    }

    /// Keeps why the records of `job` take the lane of `choice`. Where each record has its own lane,
    /// those of a job have that lane in common, and each its own runner-up.
    fn explain(&self, chooser: &mut Chooser, job: &Job, choice: Choice, size: usize) {
        if job.records.len() == 1 || !is_by_key(job) {
            return self.params.explain(job, &job.records, Some(choice));
        }
        for pending in &job.records {
            let choice = self.choose(chooser, job, pending.key, size);
            self.params.explain(job, [pending], choice);
        }
    }
}

impl RouterParams {
    /// Keeps why `records`, which are a part of `job`, take the lane of `choice`, or the spool.
    fn explain<'j>(
        &self,
        job: &Job,
        records: impl IntoIterator<Item = &'j PendingRecord>,
        choice: Option<Choice>,
    ) {
        let explanation = Explanation {
            at_us: unix_us(),
            route: Arc::clone(&job.route),
            choice,
            is_first: job.tried.is_empty(),
        };
        let ids = records.into_iter().map(|pending| &pending.record.id);
        self.explanations.push(ids, explanation);
    }
}

/// A job of `records` that were a part of `job`.
fn part_of(job: &Job, records: Vec<PendingRecord>) -> Job {
    Job {
        records,
        route: Arc::clone(&job.route),
        pinned: job.pinned,
        tried: job.tried,
        sent: None,
        source: job.source,
        began: job.began,
        permit: Arc::clone(&job.permit),
    }
}

fn count(job: &Job) -> u32 {
    u32::try_from(job.records.len()).unwrap_or(u32::MAX)
}

impl Actor for Router {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.supervisor.ready(None);
    }
}

impl Supervised for Router {
    /// Each admitted record may be here twice (coming in, and coming back), beside control
    /// messages.
    const MAILBOX: usize = 2 * (RECORDS_MAX + FED_MAX) + 64;
}

impl Handler<Route> for Router {
    type Result = ();

    fn handle(&mut self, Route(job): Route, _: &mut Self::Context) {
        fail::fail_point!("router");
        self.route(job);
    }
}

impl Handler<Drain> for Router {
    type Result = ();

    /// It holds no record between two messages, so there is nothing to finish.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) {}
}

impl Handler<Ping> for Router {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        Ok(())
    }
}
