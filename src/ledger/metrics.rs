//! The ledger in the text format of Prometheus, version 0.0.4.
//!
//! Everything is read at the time of the scrape from the same counts as `GET /api/status`.

use std::{collections::HashMap, sync::PoisonError};

use prometheus::{
    TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use super::{Latency, Ledger, Relaxed};
use crate::{
    delivery::LaneId,
    record::unix_us,
    spool::{Held, Queue},
};

/// Upper bounds of all histograms, in microseconds: from a confirm in memory to a record that has waited for an hour.
const BOUNDS_US: [u64; 20] = [
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    900_000_000,
    3_600_000_000,
];
/// The path of what no lane has confirmed.
const SPOOL: &str = "spool";

/// What is told beside the ledger's own counts.
pub struct Scene<'s> {
    /// The lanes of the node, with their tags.
    pub lanes: &'s [(LaneId, String)],
    /// Whether each lane is up, and how often it was restarted.
    pub states: HashMap<LaneId, (bool, u64)>,
    pub held: Held,
    /// When the oldest record that waits in the spool was taken in, in microseconds since the Unix epoch.
    pub oldest_us: Option<u64>,
}

/// The whole answer to a scrape.
///
/// # Errors
/// When the encoder refuses a family; none is empty or without a name, so it does not.
pub fn text(ledger: &Ledger, scene: &Scene<'_>) -> prometheus::Result<String> {
    let Scene { lanes, states, held, oldest_us } = scene;
    let by_lane = |label: &str, value: &dyn Fn(LaneId) -> Value| -> Vec<Metric> {
        let of = |(lane, tag): &(LaneId, String)| {
            let name = if label == "path" { tag } else { lane.name() };
            metric(&[(label, name)], value(*lane))
        };
        lanes.iter().map(of).collect()
    };
    let count = |pick: fn(&super::Counts) -> u64| move |lane| Value::Count(pick(&ledger.counts(lane)));
    let state = |lane| states.get(&lane).copied().unwrap_or_default();
    let age = |at_us: u64| Value::Gauge(seconds(unix_us().saturating_sub(at_us)));

    let mut accepted = by_lane("path", &count(|counts| counts.accepted));
    accepted.push(metric(&[("path", SPOOL)], Value::Count(ledger.spooled.load(Relaxed))));
    let ages = lanes.iter().filter_map(|(lane, _)| {
        let at_us = ledger.lane(*lane).last_delivery_us.load(Relaxed);
        (at_us > 0).then(|| metric(&[("lane", lane.name())], age(at_us)))
    });
    let requests = {
        let requests = ledger.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |(code, times): (&u16, &Latency)| metric(&[("code", &code.to_string())], times.into());
        requests.iter().map(of).collect()
    };

    let mut families = vec![
        family(
            MetricType::COUNTER,
            "waypost_records_accepted_total",
            "Records answered with a 2xx, by the path of the receipt.",
            accepted,
        ),
        family(
            MetricType::COUNTER,
            "waypost_records_recovered_total",
            "Records of an earlier run that came out of a lane.",
            by_lane("path", &count(|counts| counts.recovered)),
        ),
        family(
            MetricType::COUNTER,
            "waypost_records_delivered_total",
            "Records that the API has taken.",
            by_lane("path", &count(|counts| counts.delivered)),
        ),
        family(
            MetricType::COUNTER,
            "waypost_records_dead_total",
            "Records that became dead letters.",
            by_lane("path", &count(|counts| counts.dead)),
        ),
        family(
            MetricType::COUNTER,
            "waypost_redeliveries_total",
            "Records that came out of a lane again though the API had them, and were not sent again.",
            by_lane("path", &count(|counts| counts.redelivered)),
        ),
        family(
            MetricType::GAUGE,
            "waypost_lane_up",
            "1 while the lane takes records.",
            by_lane("lane", &|lane| Value::Gauge(f64::from(u8::from(state(lane).0)))),
        ),
        family(
            MetricType::COUNTER,
            "waypost_lane_restarts_total",
            "Restarts of the lane's actors.",
            by_lane("lane", &|lane| Value::Count(state(lane).1)),
        ),
        family(
            MetricType::GAUGE,
            "waypost_in_flight",
            "Records that a lane has confirmed and the API has not taken.",
            by_lane("lane", &|lane| Value::Gauge(float(ledger.in_flight(lane, held)))),
        ),
        family(
            MetricType::GAUGE,
            "waypost_spool_records",
            "Records in the spool that wait for a lane.",
            vec![metric(&[], Value::Gauge(float(held.waiting())))],
        ),
        family(
            MetricType::GAUGE,
            "waypost_spool_bytes",
            "Size of the spool on disk.",
            vec![metric(&[], Value::Gauge(float(held.bytes)))],
        ),
        family(
            MetricType::GAUGE,
            "waypost_dead_letters",
            "Dead letters on disk.",
            vec![metric(&[], Value::Gauge(float(held.records(Queue::Dead))))],
        ),
        family(
            MetricType::GAUGE,
            "waypost_oldest_waiting_seconds",
            "Age of the oldest record in the spool; 0 if none waits.",
            vec![metric(&[], oldest_us.map_or(Value::Gauge(0.0), age))],
        ),
        family(
            MetricType::GAUGE,
            "waypost_last_delivery_seconds",
            "Since the API took a record of the lane.",
            ages.collect(),
        ),
        family(
            MetricType::GAUGE,
            "waypost_ledger_imbalanced",
            "1 if the ledger did not balance when nothing moved: an error of this program.",
            vec![metric(&[], Value::Gauge(f64::from(u8::from(ledger.is_imbalanced()))))],
        ),
        family(MetricType::HISTOGRAM, "waypost_ingest_seconds", "From a request's head to its answer.", requests),
        family(
            MetricType::HISTOGRAM,
            "waypost_publish_seconds",
            "From handing a record to the lane to its confirm.",
            by_lane("lane", &|lane| (&ledger.lane(lane).publish).into()),
        ),
        family(
            MetricType::HISTOGRAM,
            "waypost_post_seconds",
            "From a POST to the API's answer or its failure.",
            by_lane("lane", &|lane| (&ledger.lane(lane).post).into()),
        ),
        family(
            MetricType::HISTOGRAM,
            "waypost_delivery_seconds",
            "From accepted to delivered.",
            by_lane("path", &|lane| (&ledger.lane(lane).delivery).into()),
        ),
    ];
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families)
}

enum Value {
    Count(u64),
    Gauge(f64),
    Times(Histogram),
}

impl From<&Latency> for Value {
    fn from(times: &Latency) -> Self {
        let (times, sum_us) = &*times.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = BOUNDS_US.map(|bound| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(seconds(bound));
            // To two significant digits: a time just above a bound may be counted below it.
            bucket.set_cumulative_count(times.count_between(0, bound));
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_sample_count(times.len());
        histogram.set_sample_sum(seconds(*sum_us));
        histogram.set_bucket(buckets.into());
        Self::Times(histogram)
    }
}

fn metric(labels: &[(&str, &str)], value: Value) -> Metric {
    let label = |(name, value): &(&str, &str)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value((*value).to_owned());
        label
    };
    let mut metric = Metric::from_label(labels.iter().map(label).collect());
    match value {
        Value::Count(count) => {
            let mut counter = Counter::default();
            counter.set_value(float(count));
            metric.set_counter(counter);
        }
        Value::Gauge(value) => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        Value::Times(histogram) => metric.set_histogram(histogram),
    }
    metric
}

fn family(kind: MetricType, name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn seconds(us: u64) -> f64 {
    float(us) / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "a count beyond 2^53 may be off by one")]
const fn float(count: u64) -> f64 {
    count as f64
}
