//! Properties of the policies and the scores together.

mod adaptive;
mod explain;
mod hash;
mod policies;
mod rules;

use std::{sync::Arc, time::Duration};

use super::{
    choose::{Candidates, Choice, Chooser},
    hash::KeyHash,
    policy::{HashOn, Policy},
    rules::{Assignment, CompiledRoute, RouteDefaults, RouteError, RouteRule, Routes},
    scores::Scores,
};
use crate::{
    lane_id::{LaneId, PerLane},
    record::pointer::Values,
};

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
    let scores = Scores::new(true, PUBLISH_TIMEOUT);
    for (lane, weight) in LANES.into_iter().zip(weights) {
        scores.lane_up(lane, s(0));
        scores.set_weight(lane, weight);
    }
    Arc::new(scores)
}

#[derive(serde::Deserialize)]
struct RuleFile {
    routes: Vec<RouteRule>,
}

/// The routes of a configuration whose default policy is `policy`.
pub fn try_routes(policy: Policy, toml: &str) -> Result<Routes, Vec<RouteError>> {
    let rules = match toml {
        "" => Vec::new(),
        toml => toml::from_str::<RuleFile>(toml).unwrap().routes,
    };
    let defaults = RouteDefaults {
        policy,
        hash_on: &HashOn::Id,
        lanes: &LANES,
        apis: &["billing"],
    };
    Routes::new(&rules, &defaults)
}

pub fn routes(policy: Policy, toml: &str) -> Routes {
    try_routes(policy, toml).unwrap()
}

/// A router's memory of a route of all lanes.
#[derive(Clone)]
pub struct RouteChooser {
    pub chooser: Chooser,
    pub route: Arc<CompiledRoute>,
}

pub fn chooser(policy: Policy, seed: u64) -> RouteChooser {
    let routes = routes(policy, "");
    RouteChooser {
        chooser: Chooser::new(seed),
        route: routes.assign("", &Values::default(), |_| None).route,
    }
}

/// Chooses for one record, among the lanes that `may_take` it.
pub fn choose(
    chooser: &mut RouteChooser,
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
    chooser: &mut RouteChooser,
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
    let RouteChooser { chooser, route } = chooser;
    chooser.choose(route, KeyHash::of(id.as_bytes()), 1, &candidates)
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
