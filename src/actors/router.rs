//! The router: chooses one of the lanes that are up for the records of each request, and the next
//! one when a lane gives them back. Records that no lane confirms in time go to the spool, unless no
//! lane will ever carry them. The router never waits for the network.

use std::{sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, dev::SendError};

use super::{
    Drain, FED_MAX, Job, Ping, Publish, RECORDS_MAX, Route, Source, Supervised,
    fallback::DiskFallback, live_lanes::LiveLanes, receipts::Refused, supervisor::SupervisorHandle,
};
use crate::{config::Policy, lane_id::LaneId};

/// The parts and settings of a router; each restart uses the same ones.
#[derive(Clone)]
pub struct RouterParams {
    pub policy: Policy,
    /// The lanes, in configuration order.
    pub lanes: Arc<[LaneId]>,
    pub live_lanes: LiveLanes,
    pub fallback: DiskFallback,
    /// After this long without a confirm, a record goes to the spool.
    pub publish_timeout: Duration,
}

/// Reads the table of live lanes at each choice, so it knows nothing that a restart could lose.
pub struct Router {
    params: RouterParams,
    /// The index of the lane where the next turn of round-robin begins.
    turn: usize,
    supervisor: SupervisorHandle,
}

impl Router {
    pub fn new(params: RouterParams, supervisor: SupervisorHandle) -> Self {
        Self {
            params,
            turn: 0,
            supervisor,
        }
    }

    /// Hands `job` to a lane, or to the spool.
    fn route(&mut self, mut job: Job) {
        job.retain_waited_for();
        if job.records.is_empty() {
            return;
        }
        let size = job.largest_message();
        let Err(job) = self.send_to_lane(job, size) else {
            return;
        };
        let lanes = self.params.lanes.iter().copied();
        let allowed = lanes.filter(|&lane| job.may_take(lane));
        if let Some(why) = self.params.live_lanes.refusal(size, allowed) {
            return job.refuse(&why);
        }
        if job.source != Source::Client {
            return job.refuse(&Refused::NoLane);
        }
        self.params.fallback.store_job(job);
    }

    /// Gives `job`, whose largest message has `size` bytes, back if no lane takes it, or if it is too
    /// late for a lane.
    fn send_to_lane(&mut self, mut job: Job, size: usize) -> Result<(), Job> {
        if job.began.elapsed() >= self.params.publish_timeout {
            return Err(job);
        }
        let lanes = &self.params.lanes;
        let live = self.params.live_lanes.read();
        let may_take = |at: usize, job: &Job| {
            let lane = lanes[at];
            live[lane as usize].publisher(size).is_some()
                && !job.tried.contains(lane)
                && job.may_take(lane)
        };
        while let Some(at) = choose(self.params.policy, lanes.len(), self.turn, |at| {
            may_take(at, &job)
        }) {
            if job.pinned.is_none() {
                self.turn = (at + 1) % lanes.len();
            }
            let lane = lanes[at];
            job.tried.insert(lane);
            let Some(publisher) = live[lane as usize].publisher(size) else {
                continue;
            };
            match publisher.try_send(Publish(job)) {
                Ok(()) => return Ok(()),
                // A lane that has just died is in the table until the supervisor is notified.
                Err(SendError::Full(Publish(back)) | SendError::Closed(Publish(back))) => {
                    job = back;
                }
            }
        }
        Err(job)
    }
}

/// The index of the lane to take out of `count`, among those that may take the record. Pure.
pub fn choose(
    policy: Policy,
    count: usize,
    turn: usize,
    may_take: impl Fn(usize) -> bool,
) -> Option<usize> {
    match policy {
        Policy::RoundRobin => (turn..count)
            .chain(0..turn.min(count))
            .find(|&at| may_take(at)),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_robin_takes_each_lane_in_its_turn_and_skips_those_that_cannot() {
        let rr = |turn, up: &[bool]| choose(Policy::RoundRobin, up.len(), turn, |at| up[at]);
        assert_eq!(rr(0, &[true, true, true]), Some(0));
        assert_eq!(rr(1, &[true, true, true]), Some(1));
        assert_eq!(rr(1, &[true, false, true]), Some(2));
        assert_eq!(rr(2, &[true, true, false]), Some(0));
        assert_eq!(rr(2, &[false, true, false]), Some(1));
        assert_eq!(rr(1, &[false, false, false]), None);
        assert_eq!(rr(0, &[]), None);
    }
}
