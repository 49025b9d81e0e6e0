//! The policies: which lane takes a record.
//!
//! A choice is made among the lanes that may take the record, so each policy is its own failover:
//! a record that a lane gives back goes to the next one. What a policy remembers between choices is
//! in the [`Chooser`], one per router; what it knows of the lanes is in [`Scores`], shared by all.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use super::{
    hash::KeyHash,
    scores::{Factors, Scores},
};
use crate::{
    config::Policy,
    lane_id::{LaneId, PerLane},
};

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

/// The memory of one router for one list of lanes.
#[derive(Debug)]
pub struct Chooser {
    policy: Policy,
    /// In the order of the configuration.
    lanes: Arc<[LaneId]>,
    /// The index of the lane where the next turn of `round-robin` begins.
    turn: usize,
    /// The debt of `weighted` to each lane.
    credits: PerLane<i64>,
    /// Records of `adaptive` since the last probe.
    since_probe: u32,
    /// Breaks ties.
    random: fastrand::Rng,
}

impl Chooser {
    /// A chooser that has chosen nothing yet. The same seed breaks ties in the same way.
    pub fn new(policy: Policy, lanes: Arc<[LaneId]>, seed: u64) -> Self {
        Self {
            policy,
            lanes,
            turn: 0,
            credits: PerLane::default(),
            since_probe: 0,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// Records of one request may take different lanes, each by its id.
    pub fn is_by_id(&self) -> bool {
        self.policy == Policy::Hash
    }

    /// The lane for `records` that go together, the first of which is `id`; `None` if no lane may
    /// take them.
    pub fn choose(
        &mut self,
        id: &str,
        records: u32,
        candidates: &Candidates<'_>,
    ) -> Option<LaneId> {
        match self.policy {
            Policy::RoundRobin => self.round_robin(candidates),
            Policy::Weighted => self.weighted(records, candidates),
            Policy::Failover => self.failover(candidates),
            Policy::Hash => {
                let weights = candidates.scores.weights();
                KeyHash::of(id.as_bytes()).first(candidates.among(&self.lanes), &weights)
            }
            Policy::Adaptive => self.adaptive(records, candidates),
        }
    }

    /// The first lane that may take it, from the one behind the last.
    fn round_robin(&mut self, candidates: &Candidates<'_>) -> Option<LaneId> {
        let count = self.lanes.len();
        let mut order = (self.turn..count).chain(0..self.turn);
        let at = order.find(|&at| (candidates.may_take)(self.lanes[at]))?;
        self.turn = (at + 1) % count;
        Some(self.lanes[at])
    }

    /// Smooth weighted round-robin, as nginx has it: each lane is given its weight, and the one
    /// that is owed most pays for all. So a lane's records are spread evenly among the others'.
    fn weighted(&mut self, records: u32, candidates: &Candidates<'_>) -> Option<LaneId> {
        let weights = candidates.scores.weights();
        let weight = |lane: LaneId| i64::from(weights[lane as usize]) * i64::from(records);
        let lanes = Arc::clone(&self.lanes);
        let owed = candidates.among(&lanes).filter(|&lane| weight(lane) > 0);
        for lane in owed.clone() {
            self.credits[lane as usize] += weight(lane);
        }
        let total: i64 = owed.clone().map(weight).sum();
        let Some(chosen) = owed.min_by_key(|&lane| Reverse(self.credits[lane as usize])) else {
            // Only lanes of weight 0 may take it.
            return candidates.among(&lanes).next();
        };
        self.credits[chosen as usize] -= total;
        Some(chosen)
    }

    /// The first lane that is steady. If none is, the one that is up longest, so that lanes which
    /// come and go do not take turns. Ejected lanes come last.
    fn failover(&self, candidates: &Candidates<'_>) -> Option<LaneId> {
        let Candidates { scores, now, .. } = candidates;
        candidates.among(&self.lanes).min_by_key(|&lane| {
            if scores.is_steady(lane, *now) {
                (0, 0)
            } else {
                (
                    1 + u8::from(scores.is_ejected(lane, *now)),
                    scores.up_since(lane),
                )
            }
        })
    }

    /// The lane with the lowest score; ties at random. Ejected lanes come last. Now and then, one
    /// that was not used for a second is probed instead.
    fn adaptive(&mut self, records: u32, candidates: &Candidates<'_>) -> Option<LaneId> {
        let Candidates { scores, now, .. } = candidates;
        let mut weighed = PerLane::<Option<Factors>>::default();
        for lane in candidates.among(&self.lanes) {
            let factors = scores.factors(lane, (candidates.undelivered)(lane), *now);
            weighed[lane as usize] = Some(factors);
        }
        let measured = weighed
            .iter()
            .flatten()
            .filter_map(|factors| factors.latency);
        // A lane that was not measured counts as the fastest.
        let unmeasured = measured.min_by(f64::total_cmp).unwrap_or(1.0);
        let lanes = candidates.among(&self.lanes);
        let keys = lanes.filter_map(|lane| {
            let score = weighed[lane as usize]?.score(unmeasured);
            let is_ejected = scores.is_ejected(lane, *now);
            // Scores are never negative: their bits are in their order.
            Some(((is_ejected, score.to_bits(), self.random.u32(..)), lane))
        });
        let (_, best) = keys.min()?;
        self.since_probe = self.since_probe.saturating_add(records);
        if self.since_probe < PROBE_ONE_OF.saturating_mul(records) {
            return Some(best);
        }
        let others = candidates.among(&self.lanes).filter(|&lane| {
            let factors = &weighed[lane as usize];
            lane != best && factors.is_some_and(|factors| factors.weight > 0)
        });
        let Some(probed) = scores.claim_probe(others, *now) else {
            return Some(best);
        };
        self.since_probe = 0;
        Some(probed)
    }
}

impl Candidates<'_> {
    /// Those of `lanes` that may take it.
    fn among(&self, lanes: &[LaneId]) -> impl Iterator<Item = LaneId> + Clone {
        let lanes = lanes.iter().copied();
        lanes.filter(|&lane| (self.may_take)(lane))
    }
}
