//! The ledger in the text format of Prometheus, version 0.0.4.
//!
//! Each scrape reads the same counts as `GET /api/status`.

use std::collections::HashMap;

use prometheus::{
    TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use crate::{
    clock::unix_us,
    lane_id::LaneId,
    ledger::{Counts, Latency, Ledger},
    spool::{Queue, SpoolStats},
};

/// Upper bounds of all histograms, in µs: from a confirm in memory to a record that waited for an hour.
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
/// The path of a record that no lane has confirmed.
const SPOOL: &str = "spool";

/// The values of one scrape, beside the ledger's own counts.
pub struct Scrape<'s> {
    /// The lanes of the node, with their tags.
    pub lanes: &'s [(LaneId, String)],
    /// Whether each lane is up, and how often it was restarted.
    pub states: HashMap<LaneId, (bool, u64)>,
    pub held: SpoolStats,
    /// The time at which the oldest record in the spool was accepted, in µs since the Unix epoch.
    pub oldest_us: Option<u64>,
}

/// The whole answer to a scrape.
///
/// # Errors
/// If the encoder refuses a family. It does not: none is empty or without a name.
pub fn text(ledger: &Ledger, scrape: &Scrape<'_>) -> prometheus::Result<String> {
    let exposition = Exposition { ledger, scrape };
    let mut families = [
        exposition.counters(),
        exposition.gauges(),
        exposition.times(),
    ]
    .concat();
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families)
}

struct Exposition<'p> {
    ledger: &'p Ledger,
    scrape: &'p Scrape<'p>,
}

impl Exposition<'_> {
    fn counters(&self) -> Vec<MetricFamily> {
        let count = |pick: fn(&Counts) -> u64| {
            self.by_path(|lane| MetricSample::Count(pick(&self.ledger.counts(lane))))
        };
        let mut accepted = count(|counts| counts.accepted);
        accepted.push(metric(
            &[("path", SPOOL)],
            MetricSample::Count(self.ledger.receipts_of_spool()),
        ));
        let restarts = self.by_lane(|lane| MetricSample::Count(self.state(lane).1));
        let counter = |name, help, metrics| family(MetricType::COUNTER, name, help, metrics);
        let one =
            |name, help, count| counter(name, help, vec![metric(&[], MetricSample::Count(count))]);
        let held = self.scrape.held;
        vec![
            counter(
                "waypost_records_accepted_total",
                "Records answered with a 2xx, by the path of the receipt.",
                accepted,
            ),
            counter(
                "waypost_records_recovered_total",
                "Records of an earlier run that came out of a lane.",
                count(|counts| counts.recovered),
            ),
            counter(
                "waypost_records_delivered_total",
                "Records that the API has taken.",
                count(|counts| counts.delivered),
            ),
            counter(
                "waypost_records_dead_total",
                "Records that became dead letters.",
                count(|counts| counts.dead),
            ),
            counter(
                "waypost_redeliveries_total",
                "Records that came out of a lane again though the API had them, and were not sent again.",
                count(|counts| counts.redelivered),
            ),
            counter(
                "waypost_lane_restarts_total",
                "Restarts of the lane's actors.",
                restarts,
            ),
            one(
                "waypost_spool_commits_total",
                "Syncs of the disk that made records safe.",
                held.commits,
            ),
            one(
                "waypost_spool_committed_records_total",
                "Records that these syncs made safe; how many share one, with the count of syncs.",
                held.committed,
            ),
        ]
    }

    fn gauges(&self) -> Vec<MetricFamily> {
        let Scrape {
            lanes,
            held,
            oldest_us,
            ..
        } = self.scrape;
        let since = |at_us: u64| seconds(unix_us().saturating_sub(at_us));
        let deliveries = lanes.iter().filter_map(|(lane, _)| {
            let at_us = self.ledger.last_delivery_us(*lane);
            (at_us > 0).then(|| metric(&[("lane", lane.name())], MetricSample::Gauge(since(at_us))))
        });
        let up = self.by_lane(|lane| MetricSample::Gauge(flag(self.state(lane).0)));
        let in_flight =
            self.by_lane(|lane| MetricSample::Gauge(float(self.ledger.in_flight(lane, held))));
        let gauge = |name, help, metrics| family(MetricType::GAUGE, name, help, metrics);
        let one =
            |name, help, value| gauge(name, help, vec![metric(&[], MetricSample::Gauge(value))]);
        vec![
            gauge("waypost_lane_up", "1 while the lane takes records.", up),
            gauge(
                "waypost_in_flight",
                "Records that a lane has confirmed and the API has not taken.",
                in_flight,
            ),
            gauge(
                "waypost_last_delivery_seconds",
                "Since the API took a record of the lane.",
                deliveries.collect(),
            ),
            one(
                "waypost_spool_records",
                "Records in the spool that wait for a lane.",
                float(held.waiting()),
            ),
            one(
                "waypost_spool_bytes",
                "Size of the spool on disk.",
                float(held.bytes),
            ),
            one(
                "waypost_dead_letters",
                "Dead letters on disk.",
                float(held.records(Queue::Dead)),
            ),
            one(
                "waypost_oldest_waiting_seconds",
                "Age of the oldest record in the spool; 0 if none waits.",
                oldest_us.map_or(0.0, since),
            ),
            one(
                "waypost_ledger_imbalanced",
                "1 if the ledger did not balance when nothing moved: an error of this program.",
                flag(self.ledger.is_imbalanced()),
            ),
        ]
    }

    fn times(&self) -> Vec<MetricFamily> {
        let mut requests = Vec::new();
        self.ledger.for_each_status(|code, times| {
            requests.push(metric(&[("code", &code.to_string())], times.into()));
        });
        let histogram = |name, help, metrics| family(MetricType::HISTOGRAM, name, help, metrics);
        vec![
            histogram(
                "waypost_ingest_seconds",
                "From a request's head to its answer.",
                requests,
            ),
            histogram(
                "waypost_publish_seconds",
                "From handing a record to the lane to its confirm.",
                self.by_lane(|lane| self.ledger.publish_times(lane).into()),
            ),
            histogram(
                "waypost_post_seconds",
                "From a POST to the API's answer or its failure.",
                self.by_lane(|lane| self.ledger.post_times(lane).into()),
            ),
            histogram(
                "waypost_delivery_seconds",
                "From accepted to delivered.",
                self.by_path(|lane| self.ledger.delivery_times(lane).into()),
            ),
        ]
    }

    fn by_lane(&self, value: impl Fn(LaneId) -> MetricSample) -> Vec<Metric> {
        self.scrape
            .lanes
            .iter()
            .map(|(lane, _)| metric(&[("lane", lane.name())], value(*lane)))
            .collect()
    }

    fn by_path(&self, value: impl Fn(LaneId) -> MetricSample) -> Vec<Metric> {
        self.scrape
            .lanes
            .iter()
            .map(|(lane, tag)| metric(&[("path", tag)], value(*lane)))
            .collect()
    }

    fn state(&self, lane: LaneId) -> (bool, u64) {
        self.scrape.states.get(&lane).copied().unwrap_or_default()
    }
}

enum MetricSample {
    Count(u64),
    Gauge(f64),
    Times(Histogram),
}

impl From<&Latency> for MetricSample {
    fn from(times: &Latency) -> Self {
        times.read(|times, sum_us| {
            let buckets = BOUNDS_US.map(|bound| {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(seconds(bound));
                // To two significant digits: a time just above a bound may be counted below it.
                bucket.set_cumulative_count(times.count_between(0, bound));
                bucket
            });
            let mut histogram = Histogram::default();
            histogram.set_sample_count(times.len());
            histogram.set_sample_sum(seconds(sum_us));
            histogram.set_bucket(buckets.into());
            Self::Times(histogram)
        })
    }
}

fn metric(labels: &[(&str, &str)], value: MetricSample) -> Metric {
    let label = |(name, value): &(&str, &str)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value((*value).to_owned());
        label
    };
    let mut metric = Metric::from_label(labels.iter().map(label).collect());
    match value {
        MetricSample::Count(count) => {
            let mut counter = Counter::default();
            counter.set_value(float(count));
            metric.set_counter(counter);
        }
        MetricSample::Gauge(value) => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        MetricSample::Times(histogram) => metric.set_histogram(histogram),
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

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

fn seconds(us: u64) -> f64 {
    float(us) / 1e6
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a count beyond 2^53 may be off by one"
)]
const fn float(count: u64) -> f64 {
    count as f64
}
