//! The router: chooses a lane for the records of each request among those that are up, and tries the next one when a lane gives
//! them back. What no lane has confirmed in time goes to the spool. It never waits for the network.

use std::time::Duration;

use actix::{Actor, Context, Handler, Recipient, dev::SendError};
use tracing::debug;

use super::{
    Drain, FED_MAX, Introduced, Job, LaneDown, LaneUp, Ping, Publish, RECORDS_MAX, Refused,
    Returned, Route, Supervised, fallback::DiskFallback, supervisor::SupervisorHandle,
};
use crate::{config::Policy, lane_id::LaneId};

/// What the router is wired to; the same for each of its lives.
#[derive(Clone)]
pub struct RouterParams {
    pub disk: DiskFallback,
    /// After this long without a confirm, a record goes to the spool.
    pub publish_timeout: Duration,
}

/// One per node. A restart begins with no lane up; the supervisor tells it of those that are.
pub struct Router {
    params: RouterParams,
    policy: Policy,
    /// In the order of the configuration.
    lanes: Vec<Way>,
    /// Where the next turn of round-robin begins.
    turn: usize,
    /// What has come before the supervisor has told of the lanes; no more than was admitted.
    early: Option<Vec<Job>>,
    supervisor: SupervisorHandle,
}

struct Way {
    lane: LaneId,
    /// There while the lane is up.
    publisher: Option<Recipient<Publish>>,
}

impl Router {
    #[must_use]
    pub fn new(
        policy: Policy,
        lanes: &[LaneId],
        params: RouterParams,
        supervisor: SupervisorHandle,
    ) -> Self {
        let lanes = lanes
            .iter()
            .map(|&lane| Way {
                lane,
                publisher: None,
            })
            .collect();
        Self {
            params,
            policy,
            lanes,
            turn: 0,
            early: Some(Vec::new()),
            supervisor,
        }
    }

    /// Hands `job` to a lane, or to the spool.
    fn place(&mut self, mut job: Job) {
        job.retain_waited_for();
        if job.records.is_empty() {
            return;
        }
        if let Some(early) = &mut self.early {
            return early.push(job);
        }
        let is_late = job.began.elapsed() >= self.params.publish_timeout;
        let may_take = |way: &Way, job: &Job| {
            way.publisher.is_some()
                && !is_late
                && !job.tried.contains(way.lane)
                && job.pinned.is_none_or(|lane| lane == way.lane)
        };
        while let Some(at) = choose(self.policy, self.lanes.len(), self.turn, |at| {
            may_take(&self.lanes[at], &job)
        }) {
            if job.pinned.is_none() {
                self.turn = (at + 1) % self.lanes.len();
            }
            let way = &mut self.lanes[at];
            let Some(publisher) = &way.publisher else {
                break;
            };
            match publisher.try_send(Publish(job)) {
                Ok(()) => return,
                Err(SendError::Full(Publish(back))) => job = back,
                Err(SendError::Closed(Publish(back))) => {
                    // The lane has died; the supervisor's message is on its way.
                    way.publisher = None;
                    job = back;
                }
            }
            job.tried.insert(way.lane);
        }
        if job.on_disk {
            return job.refuse(&Refused::NoLane);
        }
        let disk = self.params.disk.clone();
        actix_rt::spawn(async move {
            disk.store(&job.records, job.pinned).await;
            drop(job);
        });
    }

    fn way(&mut self, lane: LaneId) -> Option<&mut Way> {
        self.lanes.iter_mut().find(|way| way.lane == lane)
    }
}

/// The lane to take out of `count`, among those that may take the record. Pure.
#[must_use]
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
    /// Each record that may be in hand, twice (on its way in, and coming back), and control messages.
    const MAILBOX: usize = 2 * (RECORDS_MAX + FED_MAX) + 64;
}

impl Handler<Route> for Router {
    type Result = ();

    fn handle(&mut self, Route(job): Route, _: &mut Self::Context) {
        fail::fail_point!("router");
        self.place(job);
    }
}

impl Handler<Returned> for Router {
    type Result = ();

    fn handle(&mut self, Returned { mut job, lane }: Returned, _: &mut Self::Context) {
        debug!(records = job.records.len(), %lane, "records came back");
        job.tried.insert(lane);
        self.place(job);
    }
}

impl Handler<LaneUp> for Router {
    type Result = ();

    fn handle(&mut self, LaneUp { lane, publisher }: LaneUp, _: &mut Self::Context) {
        if let Some(way) = self.way(lane) {
            way.publisher = Some(publisher);
        }
    }
}

impl Handler<LaneDown> for Router {
    type Result = ();

    fn handle(&mut self, LaneDown(lane): LaneDown, _: &mut Self::Context) {
        if let Some(way) = self.way(lane) {
            way.publisher = None;
        }
    }
}

impl Handler<Introduced> for Router {
    type Result = ();

    fn handle(&mut self, _: Introduced, _: &mut Self::Context) {
        for job in self.early.take().into_iter().flatten() {
            self.place(job);
        }
    }
}

impl Handler<Drain> for Router {
    type Result = ();

    /// What it holds waits for the lanes to be told of, not for the network: there is nothing to finish.
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
