//! The history as JSON.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::intervals::{Interval, Intervals, LaneInterval};
use crate::lane_id::LaneId;

/// How far back, and so how long an interval is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum HistoryRange {
    #[default]
    #[serde(rename = "5m")]
    FiveMinutes,
    #[serde(rename = "1h")]
    Hour,
    #[serde(rename = "all")]
    All,
}

/// Each value of one interval, or each value of several, oldest first.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Columns<T> {
    /// The end of the last interval, in milliseconds since the Unix epoch.
    at_ms: u64,
    /// How long an interval is.
    step_s: u32,
    node: NodeColumns<T>,
    lanes: Vec<LaneColumns<T>>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct NodeColumns<T> {
    accepted_per_s: T,
    delivered_per_s: T,
    in_flight: T,
    waiting: T,
    dead: T,
}

#[derive(Debug, Serialize, JsonSchema)]
struct LaneColumns<T> {
    lane: LaneId,
    accepted_per_s: T,
    delivered_per_s: T,
    publish_ms: QuantileColumns<T>,
    delivery_ms: QuantileColumns<T>,
}

/// Zero where no record passed.
#[derive(Debug, Serialize, JsonSchema)]
struct QuantileColumns<T> {
    p50: T,
    p99: T,
}

impl Columns<Vec<f64>> {
    pub(super) fn of_all(
        at_ms: u64,
        step_s: u32,
        lanes: &[LaneId],
        intervals: Intervals<'_>,
    ) -> Self {
        Self::new(at_ms, step_s, lanes, |value| {
            intervals.clone().map(value).map(short).collect()
        })
    }
}

impl Columns<f64> {
    pub(super) fn of_one(at_ms: u64, lanes: &[LaneId], interval: &Interval) -> Self {
        Self::new(at_ms, 1, lanes, |value| short(value(interval)))
    }
}

impl<T> Columns<T> {
    fn new(
        at_ms: u64,
        step_s: u32,
        lanes: &[LaneId],
        read: impl Fn(&dyn Fn(&Interval) -> f64) -> T,
    ) -> Self {
        let lane = |lane: &LaneId| {
            let of = |value: fn(&LaneInterval) -> f64| {
                read(&|interval| value(&interval.lanes[*lane as usize]))
            };
            let rate = |count: fn(&LaneInterval) -> u64| {
                read(&|interval| per_second(count(&interval.lanes[*lane as usize]), interval))
            };
            LaneColumns {
                lane: *lane,
                accepted_per_s: rate(|lane| lane.accepted),
                delivered_per_s: rate(|lane| lane.delivered),
                publish_ms: QuantileColumns {
                    p50: of(|lane| lane.publish.p50),
                    p99: of(|lane| lane.publish.p99),
                },
                delivery_ms: QuantileColumns {
                    p50: of(|lane| lane.delivery.p50),
                    p99: of(|lane| lane.delivery.p99),
                },
            }
        };
        let delivered =
            |interval: &Interval| interval.lanes.iter().map(|lane| lane.delivered).sum();
        Self {
            at_ms,
            step_s,
            node: NodeColumns {
                accepted_per_s: read(&|interval| per_second(interval.accepted, interval)),
                delivered_per_s: read(&|interval| per_second(delivered(interval), interval)),
                in_flight: read(&|interval| float(interval.in_flight)),
                waiting: read(&|interval| float(interval.waiting)),
                dead: read(&|interval| float(interval.dead)),
            },
            lanes: lanes.iter().map(lane).collect(),
        }
    }
}

fn per_second(count: u64, interval: &Interval) -> f64 {
    if interval.seconds > 0.0 {
        float(count) / f64::from(interval.seconds)
    } else {
        0.0
    }
}

#[expect(clippy::cast_precision_loss, reason = "a chart shows fewer digits")]
const fn float(count: u64) -> f64 {
    count as f64
}

/// To a thousandth.
fn short(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
