//! Routing in simulated time: the policies, rules and scores of a node, with lanes that behave as a
//! plan says.
//!
//! One router, as in a node. A record that a lane does not take goes to the next one, as long as
//! `publish_timeout` allows, and then to the disk, where the simulation ends for it. All lanes have
//! been up for ten seconds when the first record comes.

mod plan;
mod report;
#[cfg(test)]
mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::Arc,
    time::Duration,
};

pub use self::{
    plan::{LaneLatency, LaneOutage, SimulatedLane, SimulationPlan},
    report::{LaneTally, SimulationReport},
};
use super::{
    choose::{Candidates, Choice, Chooser},
    rules::{Assignment, Routes},
    scores::{Scores, SentRecords},
};
use crate::{
    lane_id::{LaneId, LaneSet, PerLane},
    record::pointer::Values,
};

/// The first record comes when lanes that came up at the beginning have their whole weight.
const WARM: Duration = Duration::from_secs(10);
/// A lane connects again within this time after its broker is back.
const RECONNECT_MAX: Duration = Duration::from_secs(1);

/// The settings of the node.
pub struct RoutedNode<'c> {
    pub routes: &'c Routes,
    /// The lanes that are on, in the order of the configuration, with their weights.
    pub lanes: &'c [(LaneId, u32)],
    pub publish_timeout: Duration,
}

/// A time of the scores, and the order of events at that time.
type EventTime = (Duration, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum SimulatedEvent {
    /// A lane connects, or loses its broker.
    LaneUp(LaneId),
    LaneDown(LaneId),
    /// The lane has an answer for the record of this number.
    Answer(u64),
}

/// A record that a lane has.
struct Flight {
    came: Duration,
    assignment: Assignment,
    tried: LaneSet,
    lane: LaneId,
    sent_at: Duration,
    fails: bool,
    sent: Option<SentRecords>,
}

struct RoutingRun<'s> {
    node: &'s RoutedNode<'s>,
    plan: &'s SimulationPlan,
    scores: Arc<Scores>,
    chooser: Chooser,
    random: fastrand::Rng,
    events: BinaryHeap<Reverse<(EventTime, SimulatedEvent)>>,
    /// By their numbers; a record that another lane takes gets a new one.
    flights: BTreeMap<u64, Flight>,
    next_number: u64,
    is_up: PerLane<bool>,
    /// When each lane is done with the records before it, if it has a rate.
    free_at: PerLane<Duration>,
    report: SimulationReport,
}

/// Plays `plan`. Records take the `values` of `routes` in turn; there is at least one.
pub fn simulate(
    node: &RoutedNode<'_>,
    plan: &SimulationPlan,
    values: &[Values<'_>],
) -> SimulationReport {
    let mut simulation = RoutingRun::new(node, plan);
    let samples = values.iter().cycle();
    for (number, values) in (0..plan.records()).zip(samples) {
        let now = WARM + plan.comes_at(number);
        simulation.run_until(now);
        simulation.come(number, values, now);
    }
    simulation.run_until(Duration::MAX);
    simulation.report
}

impl<'s> RoutingRun<'s> {
    fn new(node: &'s RoutedNode<'s>, plan: &'s SimulationPlan) -> Self {
        let scores = Scores::new(node.routes.measure(), node.publish_timeout);
        let mut is_up = PerLane::default();
        let mut random = fastrand::Rng::with_seed(plan.seed);
        let mut events = BinaryHeap::new();
        for &(lane, weight) in node.lanes {
            scores.set_weight(lane, weight);
            scores.lane_up(lane, Duration::ZERO);
            is_up[lane as usize] = true;
            let outages = plan.lanes.get(lane.name()).map(|lane| &lane.outages);
            let mut outages = outages.into_iter().flatten().peekable();
            while let Some(outage) = outages.next() {
                let connected = outage.to + RECONNECT_MAX.mul_f64(random.f64());
                // A lane that has not connected by the next outage is away all the time.
                let next = outages.peek().map_or(Duration::MAX, |next| next.from);
                let down = (WARM + outage.from, 0);
                let up = (WARM + connected.min(next), 0);
                events.push(Reverse((down, SimulatedEvent::LaneDown(lane))));
                events.push(Reverse((up, SimulatedEvent::LaneUp(lane))));
            }
        }
        let routes = node.routes.all().iter();
        Self {
            node,
            plan,
            scores: Arc::new(scores),
            chooser: Chooser::new(plan.seed),
            random,
            events,
            flights: BTreeMap::new(),
            next_number: 1,
            is_up,
            free_at: PerLane::default(),
            report: SimulationReport {
                policy: node.routes.policy().name(),
                duration: plan.duration,
                seed: plan.seed,
                lanes: node
                    .lanes
                    .iter()
                    .map(|(lane, _)| LaneTally::new(*lane))
                    .collect(),
                spooled: 0,
                routes: routes.map(|route| (route.name.clone(), 0)).collect(),
            },
        }
    }

    /// Plays all events up to `until`, and those of no later record.
    fn run_until(&mut self, until: Duration) {
        while let Some(Reverse(((now, _), event))) = self.events.peek().copied()
            && now <= until
        {
            self.events.pop();
            match event {
                SimulatedEvent::LaneUp(lane) => {
                    self.is_up[lane as usize] = true;
                    self.scores.lane_up(lane, now);
                }
                SimulatedEvent::LaneDown(lane) => self.fall(lane, now),
                SimulatedEvent::Answer(number) => {
                    if let Some(flight) = self.flights.remove(&number) {
                        self.answer(flight, now);
                    }
                }
            }
        }
    }

    /// A record comes.
    fn come(&mut self, number: u64, values: &Values<'_>, now: Duration) {
        let id = number.to_string();
        let assignment = self.node.routes.assign(&id, values, |_| None);
        self.report.routes[assignment.route.index].1 += 1;
        if assignment.is_broadcast() {
            for (_, copy) in assignment.copies(&id) {
                self.route(copy, now, LaneSet::default(), now);
            }
        } else {
            self.route(assignment, now, LaneSet::default(), now);
        }
    }

    /// Hands a record to a lane that has not had it, or to the disk.
    fn route(&mut self, assignment: Assignment, came: Duration, mut tried: LaneSet, now: Duration) {
        let spent = now.saturating_sub(came);
        let choice = if spent < self.node.publish_timeout {
            self.choose(&assignment, tried, now)
        } else {
            None
        };
        let Some(lane) = choice.map(|choice| choice.lane) else {
            self.report.spooled += 1;
            return;
        };
        let Some(behaviour) = self.plan.lanes.get(lane.name()) else {
            // The plan has each lane of the node.
            return;
        };
        tried.insert(lane);
        let free_at = &mut self.free_at[lane as usize];
        let begins = now.max(*free_at);
        if let Some(rate) = behaviour.records_per_second {
            *free_at = begins + Duration::from_secs(1) / rate;
        }
        let mut answers = begins + behaviour.latency.draw(&mut self.random);
        let mut fails = self.random.f64() < behaviour.failures;
        let patience = now + self.node.publish_timeout.saturating_sub(spent);
        if answers > patience {
            (answers, fails) = (patience, true);
        }
        let number = self.next_number;
        self.next_number += 1;
        self.events
            .push(Reverse(((answers, number), SimulatedEvent::Answer(number))));
        let flight = Flight {
            came,
            assignment,
            tried,
            lane,
            sent_at: now,
            fails,
            sent: self.scores.sent(lane, 1, now),
        };
        self.flights.insert(number, flight);
    }

    fn choose(&mut self, assignment: &Assignment, tried: LaneSet, now: Duration) -> Option<Choice> {
        let is_up = &self.is_up;
        let may_take = |lane: LaneId| is_up[lane as usize] && !tried.contains(lane);
        if let Some(lane) = assignment.pinned {
            return may_take(lane).then(|| Choice::pinned(lane));
        }
        let candidates = Candidates {
            may_take: &may_take,
            scores: &self.scores,
            // A record is in flight from the router until it is delivered.
            undelivered: &|_| 0,
            now,
        };
        self.chooser
            .choose(&assignment.route, assignment.key, 1, &candidates)
    }

    fn answer(&mut self, flight: Flight, now: Duration) {
        if flight.fails {
            return self.fail(flight, now);
        }
        let Flight { lane, .. } = flight;
        let published = now.saturating_sub(flight.sent_at);
        let took = now.saturating_sub(flight.came);
        self.scores.confirmed(lane, 1, published, now);
        self.scores.delivered(lane, took, now);
        if let Some(tally) = self.tally(lane) {
            tally.deliver(took);
        }
    }

    /// The lane gives the record back.
    fn fail(&mut self, flight: Flight, now: Duration) {
        let lane = flight.lane;
        let is_ejected = self.scores.failed(lane, 1, now).is_some();
        if let Some(tally) = self.tally(lane) {
            tally.failed += 1;
            tally.ejections += u64::from(is_ejected);
        }
        drop(flight.sent);
        self.route(flight.assignment, flight.came, flight.tried, now);
    }

    /// The lane has lost its broker, and gives its records back.
    fn fall(&mut self, lane: LaneId, now: Duration) {
        self.is_up[lane as usize] = false;
        self.free_at[lane as usize] = Duration::ZERO;
        let lost = self.flights.extract_if(.., |_, flight| flight.lane == lane);
        let lost: Vec<_> = lost.map(|(_, flight)| flight).collect();
        for flight in lost {
            self.fail(flight, now);
        }
        self.scores.lane_down(lane, now);
    }

    fn tally(&mut self, lane: LaneId) -> Option<&mut LaneTally> {
        let mut tallies = self.report.lanes.iter_mut();
        tallies.find(|tally| tally.lane == lane)
    }
}
