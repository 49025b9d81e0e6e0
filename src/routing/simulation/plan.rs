//! The file of a simulation: how many records come, and how each lane behaves.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de::Error};

use crate::lane_id::LaneId;

/// The most records of a simulation: some seconds of work.
const RECORDS_MAX: u64 = 2_000_000;
/// The longest time in a plan, and the longest latency that is drawn.
const TIME_MAX: Duration = Duration::from_hours(24);
/// The quantile of the normal distribution that 99 % are under.
const NORMAL_P99: f64 = 2.326_347_9;

/// The records that come, and the lanes that they may take.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulationPlan {
    /// They come at even intervals.
    pub records_per_second: u32,
    #[serde(deserialize_with = "time")]
    pub duration: Duration,
    /// Another seed is another run; the same seed is the same run.
    #[serde(default)]
    pub seed: u64,
    /// A file of records that come in turn.
    pub records: Option<PathBuf>,
    /// By their names.
    #[serde(default)]
    pub lanes: BTreeMap<String, SimulatedLane>,
}

/// How a lane behaves.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimulatedLane {
    /// The time from handing it a record to the API's 2xx, without a queue before it.
    pub latency: LaneLatency,
    /// It takes no more, and others wait before it; absent for any number.
    pub records_per_second: Option<u32>,
    /// The share of publishes that fail.
    #[serde(default)]
    pub failures: f64,
    /// When its broker is away.
    #[serde(default)]
    pub outages: Vec<LaneOutage>,
}

/// How long a lane takes.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "allowed is a time, as in \"5ms\", or { p50 = \"5ms\", p99 = \"40ms\" }"
)]
pub enum LaneLatency {
    Constant(#[serde(deserialize_with = "time")] Duration),
    /// Log-normal with these quantiles.
    Spread {
        #[serde(deserialize_with = "time")]
        p50: Duration,
        #[serde(deserialize_with = "time")]
        p99: Duration,
    },
}

/// A time without the lane's broker, from the start of the simulation on.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneOutage {
    #[serde(deserialize_with = "time")]
    pub from: Duration,
    #[serde(deserialize_with = "time")]
    pub to: Duration,
}

fn time<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(input)?;
    let time = humantime::parse_duration(&text).ok();
    time.filter(|time| *time <= TIME_MAX).ok_or_else(|| {
        Error::custom(format!(
            "{text:?} is no time up to 24 hours; allowed is \"5ms\" or \"10s\""
        ))
    })
}

impl SimulationPlan {
    /// The first mistake in it for a node with `lanes`, if there is one.
    pub fn mistake(&self, lanes: &[LaneId]) -> Option<String> {
        if self.records() == 0 || self.records() > RECORDS_MAX {
            return Some(format!(
                "records_per_second and duration: {} records come; allowed are 1 to {RECORDS_MAX}",
                self.records()
            ));
        }
        let names: Vec<_> = lanes.iter().map(|lane| lane.name()).collect();
        if let Some(other) = self
            .lanes
            .keys()
            .find(|name| !names.contains(&name.as_str()))
        {
            return Some(format!(
                "lanes.{other}: the configuration has no such lane; allowed are {}",
                names.join(", ")
            ));
        }
        if let Some(missing) = names.iter().find(|name| !self.lanes.contains_key(**name)) {
            return Some(format!(
                "lanes.{missing}: is missing; the configuration has that lane"
            ));
        }
        let mut lanes = self.lanes.iter();
        lanes.find_map(|(name, lane)| Some(format!("lanes.{name}.{}", lane.mistake()?)))
    }

    /// How many records come.
    pub fn records(&self) -> u64 {
        let millis = u64::try_from(self.duration.as_millis()).unwrap_or(u64::MAX);
        millis.saturating_mul(self.records_per_second.into()) / 1000
    }

    /// When the record of this number comes, from 0.
    pub fn comes_at(&self, number: u64) -> Duration {
        Duration::from_nanos(
            number.saturating_mul(1_000_000_000) / u64::from(self.records_per_second),
        )
    }
}

impl SimulatedLane {
    fn mistake(&self) -> Option<String> {
        if let LaneLatency::Spread { p50, p99 } = self.latency
            && (p50.is_zero() || p99 < p50)
        {
            return Some("latency: p50 is over zero, and p99 is not under it".into());
        }
        if self.records_per_second == Some(0) {
            return Some("records_per_second: is 0; allowed is at least 1".into());
        }
        if !(0.0..=1.0).contains(&self.failures) {
            return Some(format!(
                "failures: {} does not fit; allowed is 0.0 to 1.0",
                self.failures
            ));
        }
        let mut before = Duration::ZERO;
        for LaneOutage { from, to } in &self.outages {
            if *from < before || to <= from {
                return Some("outages: each ends after it begins, and before the next".into());
            }
            before = *to;
        }
        None
    }
}

impl LaneLatency {
    pub fn draw(self, random: &mut fastrand::Rng) -> Duration {
        match self {
            Self::Constant(latency) => latency,
            Self::Spread { p50, p99 } => {
                let sigma = (p99.as_secs_f64() / p50.as_secs_f64()).ln() / NORMAL_P99;
                let drawn = p50.as_secs_f64() * (sigma * normal(random)).exp();
                Duration::from_secs_f64(drawn.min(TIME_MAX.as_secs_f64()))
            }
        }
    }
}

/// A draw from the standard normal distribution (Box and Muller, 1958).
fn normal(random: &mut fastrand::Rng) -> f64 {
    // Over zero, so that its logarithm is finite.
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.f64()).cos()
}
