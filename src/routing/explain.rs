//! Why a record took its lane: as JSON for `GET /api/explain`, as text for `check --explain`.

use std::{collections::VecDeque, fmt, sync::Arc};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use tracing_mutex::parkinglot::Mutex;

use super::{
    choose::{Choice, Reason, unmeasured},
    policy::Policy,
    rules::{CompiledRoute, Scalar},
    scores::Factors,
};
use crate::{lane_id::LaneId, record::PassedId};

/// Records that are explained: the last ones that came to the router.
pub const EXPLAINED_MAX: usize = 10_000;
/// The width of texts.
const COLUMNS: usize = 80;
/// Each record has a choice for each lane that gives it back, and one for the spool.
const CHOICES_MAX: usize = EXPLAINED_MAX * (LaneId::ALL.len() + 1);

/// One choice, with what was known at that moment.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Microseconds since the Unix epoch.
    pub at_us: u64,
    pub route: Arc<CompiledRoute>,
    /// `None` if no lane could take the record in time: then the spool did.
    pub choice: Option<Choice>,
    /// No lane has given the record back before.
    pub is_first: bool,
}

/// The choices for the last [`EXPLAINED_MAX`] records. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Explanations(Arc<Mutex<KeptExplanations>>);

#[derive(Debug, Default)]
struct KeptExplanations {
    choices: VecDeque<(PassedId, Explanation)>,
    /// The number of those that are the first of their record.
    records: usize,
}

impl Explanations {
    /// Keeps the explanation of the records `ids`, and forgets the oldest records.
    pub fn push<'i>(&self, ids: impl Iterator<Item = &'i Arc<str>>, explanation: Explanation) {
        let mut kept = self.0.lock();
        for id in ids {
            kept.push((&**id).into(), explanation.clone());
        }
    }

    /// The choices for the record `id`, or for its copies, one per try, in their order.
    pub fn of(&self, id: &str) -> Vec<Explanation> {
        let kept = self.0.lock();
        let is_copy = |known: &PassedId, explanation: &Explanation| {
            let lane = known.name_behind(id).and_then(LaneId::from_name);
            explanation.is_of_copies() && lane.is_some()
        };
        let of_id = kept.choices.iter();
        let of_id = of_id.filter(|(known, choice)| known.is(id) || is_copy(known, choice));
        of_id.map(|(_, choice)| choice.clone()).collect()
    }
}

impl Explanation {
    /// The record has a copy for each lane, whose id ends with the name of the lane.
    pub fn is_of_copies(&self) -> bool {
        self.route.policy == Policy::Broadcast
    }
}

impl KeptExplanations {
    fn push(&mut self, id: PassedId, explanation: Explanation) {
        self.records += usize::from(explanation.is_first);
        self.choices.push_back((id, explanation));
        let is_over =
            |kept: &Self| kept.records > EXPLAINED_MAX || kept.choices.len() > CHOICES_MAX;
        // The first choice of a record goes first, and the others with it.
        let is_left = |kept: &Self| {
            let oldest = kept.choices.front();
            oldest.is_some_and(|(_, oldest)| !oldest.is_first)
        };
        while is_over(self) || is_left(self) {
            let Some((_, oldest)) = self.choices.pop_front() else {
                return;
            };
            self.records -= usize::from(oldest.is_first);
        }
    }
}

impl Reason {
    const fn text(self) -> &'static str {
        match self {
            Self::Pinned => "the request names it",
            Self::Turn => "its turn",
            Self::WeightedTurn => "its turn, by the weights",
            Self::WeightZero => "only lanes of weight 0 can take it",
            Self::FirstSteady => "the first that is steady",
            Self::UpLongest => "up longest, since none is steady",
            Self::Key => "the first for its key",
            Self::LowestScore => "the lowest score",
            Self::AllEjected => "the lowest score, since all are ejected",
            Self::Probe => "a probe: unused for a second, it may be well again",
        }
    }
}

/// An explanation in words and numbers.
#[derive(Serialize, JsonSchema)]
pub struct ToldChoice<'e> {
    /// Milliseconds since the Unix epoch.
    at_ms: u64,
    /// The rule that the record takes.
    rule: &'e str,
    /// The condition of the rule.
    when: Option<String>,
    policy: &'static str,
    lane: Option<LaneId>,
    reason: &'static str,
    runner_up: Option<LaneId>,
    /// The section of the configuration that has the API.
    api: String,
    /// The lanes that were compared by their scores, the lowest score first.
    lanes: Vec<WeighedLane>,
}

/// A score, and its factors.
#[derive(Serialize, JsonSchema)]
struct WeighedLane {
    lane: LaneId,
    /// `None` for a lane of weight 0, whose score is infinite.
    score: Option<f64>,
    /// `None` before the first delivery: then it counts as the fastest.
    latency_ms: Option<f64>,
    in_flight: u64,
    weight: u32,
    success_ratio: f64,
    slow_start: f64,
}

impl Explanation {
    fn told(&self) -> ToldChoice<'_> {
        let choice = self.choice.as_ref();
        ToldChoice {
            at_ms: self.at_us / 1000,
            rule: &self.route.name,
            when: self.route.when.as_ref().map(ToString::to_string),
            policy: self.route.policy.name(),
            lane: choice.map(|choice| choice.lane),
            reason: match choice.map(|choice| choice.reason) {
                Some(Reason::Pinned) if self.route.policy == Policy::Broadcast => {
                    "each lane of the rule takes a copy"
                }
                Some(reason) => reason.text(),
                None => "no lane could take it in time: the spool did",
            },
            runner_up: choice.and_then(|choice| choice.runner_up),
            api: match &self.route.api {
                Some(name) => format!("apis.{name}"),
                None => "api".into(),
            },
            lanes: choice.map_or_else(Vec::new, weighed_lanes),
        }
    }
}

fn weighed_lanes(choice: &Choice) -> Vec<WeighedLane> {
    let Some(weighed) = &choice.weighed else {
        return Vec::new();
    };
    let unmeasured = unmeasured(weighed);
    let weigh = |lane: LaneId| {
        let factors = weighed[lane as usize]?;
        let Factors {
            latency,
            in_flight,
            weight,
            success_ratio,
            slow_start,
        } = factors;
        let score = factors.score(unmeasured);
        let lane = WeighedLane {
            lane,
            score: Some(score).filter(|score| score.is_finite()),
            latency_ms: latency.map(|seconds| seconds * 1000.0),
            in_flight,
            weight,
            success_ratio,
            slow_start,
        };
        Some((score, lane))
    };
    let mut lanes: Vec<_> = LaneId::ALL.into_iter().filter_map(weigh).collect();
    lanes.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    lanes.into_iter().map(|(_, lane)| lane).collect()
}

impl Serialize for Explanation {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        self.told().serialize(output)
    }
}

/// Lines of up to 80 columns.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.told();
        let name = |lane: Option<LaneId>| lane.map_or("none", LaneId::name);
        let when = told.when.map_or(String::new(), |when| format!(": {when}"));
        writeln!(f, "rule       {}{when}", told.rule)?;
        writeln!(f, "policy     {}", told.policy)?;
        writeln!(f, "lane       {}: {}", name(told.lane), told.reason)?;
        writeln!(f, "runner-up  {}", name(told.runner_up))?;
        write!(f, "API        [{}]", told.api)?;
        if !told.lanes.is_empty() {
            write!(f, "\n\n{}", WeighedLane::HEAD)?;
        }
        for lane in told.lanes {
            write!(f, "\n{lane}")?;
        }
        Ok(())
    }
}

impl WeighedLane {
    const HEAD: &str = "lane          score   latency ms  in flight  weight  success  slow start";
}

/// A line below [`WeighedLane::HEAD`].
impl fmt::Display for WeighedLane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f64>, digits, none: &str| {
            value.map_or_else(|| none.to_owned(), |value| format!("{value:.digits$}"))
        };
        let Self {
            lane,
            in_flight,
            weight,
            success_ratio,
            slow_start,
            ..
        } = self;
        let score = number(self.score, 6, "infinite");
        let latency = number(self.latency_ms, 3, "unknown");
        write!(
            f,
            "{:8}{score:>11}{latency:>13}{in_flight:>11}{weight:>8}{success_ratio:>9.3}\
             {slow_start:>12.2}",
            lane.name(),
        )
    }
}

/// A line, or two, for each of the routes that [`Routes::trace`](super::rules::Routes::trace)
/// returns: the condition, and the value that it tested.
pub fn trace_lines(trace: &[(Arc<CompiledRoute>, Option<Scalar<'_>>)]) -> Vec<String> {
    let last = trace.len().saturating_sub(1);
    let lines = trace.iter().enumerate().map(|(at, (route, value))| {
        let name = &route.name;
        let verdict = if at == last { "takes it" } else { "does not" };
        let Some(when) = &route.when else {
            return format!("{name:<10} {verdict}: it takes every record");
        };
        let found = value.as_ref();
        let found = found.map_or("missing".into(), Scalar::to_string);
        let line = format!("{name:<10} {verdict}: {when}");
        let found = format!("; the value is {found}");
        if line.chars().count() + found.chars().count() > COLUMNS {
            return format!("{line}\n{:<10}{}", "", &found[1..]);
        }
        line + &found
    });
    lines.collect()
}
