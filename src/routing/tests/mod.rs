//! Properties of the policies and the scores together.

mod adaptive;
mod explain;
mod hash;
mod policies;

use std::{sync::Arc, time::Duration};

use super::{
    choose::{Candidates, Choice, Chooser},
    policy::Policy,
    scores::Scores,
};
use crate::lane_id::{LaneId, PerLane};

pub const GRPC: LaneId = LaneId::Grpc;
pub const NATS: LaneId = LaneId::Nats;
pub const RABBITMQ: LaneId = LaneId::Rabbitmq;
pub const PUBSUB: LaneId = LaneId::Pubsub;
/// The order of the configuration, which is not that of their declaration.
pub const LANES: [LaneId; 4] = [NATS, RABBITMQ, PUBSUB, GRPC];

pub const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A time at which the lanes of [`warm`] have their whole weight.
pub const WARM: Duration = s(20);

/// Scores of lanes that are all up since the start.
pub fn warm(weights: [u32; 4]) -> Arc<Scores> {
    let scores = Scores::new(Policy::Adaptive, PUBLISH_TIMEOUT);
    for (lane, weight) in LANES.into_iter().zip(weights) {
        scores.lane_up(lane, s(0));
        scores.set_weight(lane, weight);
    }
    Arc::new(scores)
}

pub fn chooser(policy: Policy, seed: u64) -> Chooser {
    Chooser::new(policy, LANES.into(), seed)
}

/// Chooses for one record, among the lanes that `may_take` it.
pub fn choose(
    chooser: &mut Chooser,
    id: &str,
    scores: &Scores,
    now: Duration,
    may_take: impl Fn(LaneId) -> bool,
) -> Option<LaneId> {
    let choice = choose_and_explain(chooser, id, scores, now, may_take);
    choice.map(|choice| choice.lane)
}

/// The same, with the reason.
pub fn choose_and_explain(
    chooser: &mut Chooser,
    id: &str,
    scores: &Scores,
    now: Duration,
    may_take: impl Fn(LaneId) -> bool,
) -> Option<Choice> {
    let candidates = Candidates {
        may_take: &may_take,
        scores,
        undelivered: &|_| 0,
        now,
    };
    chooser.choose(id, 1, &candidates)
}

/// How often each lane is chosen for `records`, in the order of [`LANES`].
pub fn chosen(policy: Policy, scores: &Scores, records: usize) -> [usize; 4] {
    let mut chooser = chooser(policy, 1);
    let mut counts = PerLane::<usize>::default();
    for number in 0..records {
        let lane = choose(&mut chooser, &id(number), scores, WARM, |_| true);
        counts[lane.unwrap() as usize] += 1;
    }
    LANES.map(|lane| counts[lane as usize])
}

/// The id of a record by its number.
pub fn id(number: usize) -> String {
    format!("record-{number}")
}
