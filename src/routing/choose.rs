//! The policies: which lane of its route takes a record.
//!
//! A choice is made among the lanes that may take the record, so each policy is its own failover:
//! a record that a lane gives back goes to the next one. What a policy remembers between choices is
//! in the [`Chooser`], one per router; what it knows of the lanes is in [`Scores`], shared by all.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use super::{
    hash::KeyHash,
    policy::Policy,
    rules::CompiledRoute,
    scores::{Factors, Scores},
};
use crate::lane_id::{LaneId, PerLane};

/// One record of so many may be a probe: under 1 %, so that probes do not show in the 99th
/// percentile.
const PROBE_ONE_OF: u32 = 125;

/// The lanes that may take records, and what is known of them at this moment.
pub struct Candidates<'a> {
    pub may_take: &'a dyn Fn(LaneId) -> bool,
    pub scores: &'a Scores,
    /// Records that the lane has confirmed, and that the API has not taken.
    pub undelivered: &'a dyn Fn(LaneId) -> u64,
    /// By [`Scores::at`].
    pub now: Duration,
}

/// The lane for a record, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    pub lane: LaneId,
    /// The lane that would take it without this one.
    pub runner_up: Option<LaneId>,
    pub reason: Reason,
    /// The factors of each lane, if they were compared by their scores.
    pub weighed: Option<Arc<PerLane<Option<Factors>>>>,
}

/// Why a lane takes a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The request names the lane.
    Pinned,
    Turn,
    WeightedTurn,
    /// Only lanes of weight 0 may take it.
    WeightZero,
    FirstSteady,
    /// No lane is steady.
    UpLongest,
    Key,
    LowestScore,
    /// Each lane that may take it is ejected.
    AllEjected,
    Probe,
}

impl Choice {
    /// The request names `lane`.
    pub const fn pinned(lane: LaneId) -> Self {
        Self::of((lane, None), Reason::Pinned)
    }

    const fn of((lane, runner_up): (LaneId, Option<LaneId>), reason: Reason) -> Self {
        Self {
            lane,
            runner_up,
            reason,
            weighed: None,
        }
    }
}

/// The seconds that a lane without a latency counts as: the fastest of those that were `weighed`.
pub fn unmeasured(weighed: &PerLane<Option<Factors>>) -> f64 {
    let measured = weighed.iter().flatten();
    let measured = measured.filter_map(|factors| factors.latency);
    measured.min_by(f64::total_cmp).unwrap_or(1.0)
}

/// The memory of one router for the routes in effect.
#[derive(Clone, Debug)]
pub struct Chooser {
    /// By [`CompiledRoute::index`].
    routes: Vec<RouteMemory>,
    /// Breaks ties.
    random: fastrand::Rng,
}

#[derive(Clone, Debug, Default)]
struct RouteMemory {
    /// The index of the lane where the next turn of `round-robin` begins.
    turn: usize,
    /// The debt of `weighted` to each lane, by these weights.
    credits: PerLane<i64>,
    weights: PerLane<u32>,
    /// Records of `adaptive` since the last probe.
    since_probe: u32,
}

impl Chooser {
    /// A chooser that has chosen nothing yet. The same seed breaks ties in the same way.
    pub fn new(seed: u64) -> Self {
        Self {
            routes: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// The lane of `route` for `records` that go together, the first of which has `key`; `None` if
    /// no lane may take them.
    pub fn choose(
        &mut self,
        route: &CompiledRoute,
        key: KeyHash,
        records: u32,
        candidates: &Candidates<'_>,
    ) -> Option<Choice> {
        let lanes = &*route.lanes;
        if self.routes.len() <= route.index {
            self.routes.resize_with(route.index + 1, Default::default);
        }
        let memory = &mut self.routes[route.index];
        match route.policy {
            // A copy is for one lane, and is not chosen for. A dead letter that is replayed is no
            // copy any more, and takes any lane.
            Policy::RoundRobin | Policy::Broadcast => memory.round_robin(lanes, candidates),
            Policy::Weighted => memory.weighted(lanes, records, candidates),
            Policy::Failover => failover(lanes, candidates),
            Policy::Hash => {
                let weights = candidates.scores.weights();
                let ranked = candidates.among(lanes);
                let ranked = ranked.map(|lane| (key.rank(lane, weights[lane as usize]), lane));
                Some(Choice::of(two_least(ranked)?, Reason::Key))
            }
            Policy::Adaptive => memory.adaptive(lanes, records, candidates, &mut self.random),
        }
    }
}

impl RouteMemory {
    /// The first lane that may take it, from the one behind the last.
    fn round_robin(&mut self, lanes: &[LaneId], candidates: &Candidates<'_>) -> Option<Choice> {
        let count = lanes.len();
        // Routes that are not in effect any more share one memory, with lists of any length.
        let turn = self.turn.min(count);
        let order = (turn..count).chain(0..turn);
        let mut able = order.filter(|&at| (candidates.may_take)(lanes[at]));
        let first = able.next()?;
        let second = able.next().map(|at| lanes[at]);
        self.turn = (first + 1) % count;
        Some(Choice::of((lanes[first], second), Reason::Turn))
    }

    /// Smooth weighted round-robin, as nginx has it: each lane is given its weight, and the one
    /// that is owed most pays for all. So a lane's records are spread evenly among the others'.
    fn weighted(
        &mut self,
        lanes: &[LaneId],
        records: u32,
        candidates: &Candidates<'_>,
    ) -> Option<Choice> {
        let weights = candidates.scores.weights();
        if self.weights != weights {
            // A debt by other weights would be paid with many records by these.
            self.credits = PerLane::default();
            self.weights = weights;
        }
        let weight = |lane: LaneId| i64::from(weights[lane as usize]) * i64::from(records);
        let owed = candidates.among(lanes).filter(|&lane| weight(lane) > 0);
        for lane in owed.clone() {
            self.credits[lane as usize] += weight(lane);
        }
        let total: i64 = owed.clone().map(weight).sum();
        let by_credit = owed.map(|lane| (Reverse(self.credits[lane as usize]), lane));
        let Some((chosen, runner_up)) = two_least(by_credit) else {
            let any = candidates.among(lanes).map(|lane| ((), lane));
            return Some(Choice::of(two_least(any)?, Reason::WeightZero));
        };
        self.credits[chosen as usize] -= total;
        Some(Choice::of((chosen, runner_up), Reason::WeightedTurn))
    }

    /// The lane with the lowest score; ties at random. Ejected lanes come last. Now and then, one
    /// that was not used for a second is probed instead.
    fn adaptive(
        &mut self,
        lanes: &[LaneId],
        records: u32,
        candidates: &Candidates<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Choice> {
        let Candidates { scores, now, .. } = candidates;
        let mut weighed = PerLane::<Option<Factors>>::default();
        for lane in candidates.among(lanes) {
            let factors = scores.factors(lane, (candidates.undelivered)(lane), *now);
            weighed[lane as usize] = Some(factors);
        }
        let unmeasured = unmeasured(&weighed);
        let keys = candidates.among(lanes).filter_map(|lane| {
            let score = weighed[lane as usize]?.score(unmeasured);
            let is_ejected = scores.is_ejected(lane, *now);
            // Scores are never negative: their bits are in their order.
            Some(((is_ejected, score.to_bits(), random.u32(..)), lane))
        });
        let (best, runner_up) = two_least(keys)?;
        let choice = |lanes, reason| Choice {
            weighed: Some(Arc::new(weighed)),
            ..Choice::of(lanes, reason)
        };
        let reason = if scores.is_ejected(best, *now) {
            Reason::AllEjected
        } else {
            Reason::LowestScore
        };
        self.since_probe = self.since_probe.saturating_add(records);
        if self.since_probe < PROBE_ONE_OF.saturating_mul(records) {
            return Some(choice((best, runner_up), reason));
        }
        let others = candidates.among(lanes).filter(|&lane| {
            let factors = &weighed[lane as usize];
            lane != best && factors.is_some_and(|factors| factors.weight > 0)
        });
        let Some(probed) = scores.claim_probe(others, *now) else {
            return Some(choice((best, runner_up), reason));
        };
        self.since_probe = 0;
        Some(choice((probed, Some(best)), Reason::Probe))
    }
}

/// The first lane that is steady. If none is, the one that is up longest, so that lanes which
/// come and go do not take turns. Ejected lanes come last.
fn failover(lanes: &[LaneId], candidates: &Candidates<'_>) -> Option<Choice> {
    let Candidates { scores, now, .. } = candidates;
    let lanes = two_least(candidates.among(lanes).map(|lane| {
        let rank = if scores.is_steady(lane, *now) {
            (0, 0)
        } else {
            (
                1 + u8::from(scores.is_ejected(lane, *now)),
                scores.up_since(lane),
            )
        };
        (rank, lane)
    }))?;
    let reason = if scores.is_steady(lanes.0, *now) {
        Reason::FirstSteady
    } else {
        Reason::UpLongest
    };
    Some(Choice::of(lanes, reason))
}

impl Candidates<'_> {
    /// Those of `lanes` that may take it.
    fn among(&self, lanes: &[LaneId]) -> impl Iterator<Item = LaneId> + Clone {
        let lanes = lanes.iter().copied();
        lanes.filter(|&lane| (self.may_take)(lane))
    }
}

/// The lanes with the two least keys; of equal ones, the first.
fn two_least<K: Ord>(lanes: impl Iterator<Item = (K, LaneId)>) -> Option<(LaneId, Option<LaneId>)> {
    let mut least: Option<(K, LaneId)> = None;
    let mut second: Option<(K, LaneId)> = None;
    for next in lanes {
        if least.as_ref().is_none_or(|(key, _)| next.0 < *key) {
            second = least.replace(next);
        } else if second.as_ref().is_none_or(|(key, _)| next.0 < *key) {
            second = Some(next);
        }
    }
    Some((least?.1, second.map(|(_, lane)| lane)))
}
