//! The ledger in the text format of Prometheus, version 0.0.4.
//!
//! Each scrape reads the same counts as `GET /api/status`. The encoder ends each help with a full
//! stop, and the name of each counter with `_total`.

mod each_api;

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text},
    metrics::{MetricType, TypedMetric, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::status::LaneStatus;
use crate::{
    actors::apis::Apis,
    api::answer::FailureClass,
    clock::unix_us,
    control::{ReloadOutcome, ReloadReport},
    ledger::{Counts, LaneLedger, Latency, Ledger},
    secrets::FileHealth,
    spool::{Queue, SpoolStats},
    transport::Durability,
};

/// Upper bounds of all histograms, in seconds: from a confirm in memory to a record that waited for
/// an hour.
const BOUNDS_S: [f64; 20] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];

/// The values of one scrape.
pub struct Scrape<'s> {
    pub ledger: &'s Ledger,
    pub lanes: Vec<LaneStatus<'s>>,
    pub stats: SpoolStats,
    pub apis: &'s Apis,
    pub reload: Option<ReloadReport>,
    /// Of each API, over all lanes.
    pub api_limits: Vec<usize>,
    pub files: &'s [Arc<FileHealth>],
    /// The time at which the oldest record in the spool was accepted, in µs since the Unix epoch.
    pub oldest_us: Option<u64>,
}

impl Scrape<'_> {
    /// The whole answer to a scrape.
    ///
    /// # Errors
    /// None: a string takes all that is written.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        self.register_counters(&mut registry);
        self.register_lane_gauges(&mut registry);
        self.register_node_gauges(&mut registry);
        self.register_runs(&mut registry);
        self.register_files(&mut registry);
        self.register_api(&mut registry);
        each_api::register(self, &mut registry);
        self.register_histograms(&mut registry);
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry)?;
        Ok(text)
    }

    fn register_counters(&self, registry: &mut Registry) {
        let by_path =
            |pick: fn(&Counts) -> u64| self.by_path(|lane| ConstCounter::new(pick(&lane.counts)));
        let handed_over = |lane: &LaneLedger| ConstCounter::new(lane.handed_over_ever());
        let spooled = ConstCounter::new(self.ledger.node().spooled);
        let mut accepted = by_path(|counts| counts.accepted);
        accepted.0.push((vec![("path", "spool".into())], spooled));
        for (name, help, samples) in [
            (
                "waypost_records_accepted",
                "Records answered with a 2xx, by the path of the receipt",
                accepted,
            ),
            (
                "waypost_records_recovered",
                "Records that came out of a lane, and that this run had not accepted",
                by_path(|counts| counts.recovered),
            ),
            (
                "waypost_records_delivered",
                "Records that the API has taken",
                by_path(|counts| counts.delivered),
            ),
            (
                "waypost_records_dead",
                "Records that became dead letters",
                by_path(|counts| counts.dead),
            ),
            (
                "waypost_handed_over",
                "Records with a receipt of the lane that were found to be with another node",
                self.by_path(handed_over),
            ),
            (
                "waypost_redeliveries",
                "Records that a lane delivered again after the API's 2xx. They were not POSTed again",
                by_path(|counts| counts.redelivered),
            ),
            (
                "waypost_lane_refusals",
                "Records that the lane's broker has refused for a time: it was full, or over a quota",
                self.by_lane(|_, lane| ConstCounter::new(lane.refusals.records)),
            ),
            (
                "waypost_lane_restarts",
                "Restarts of the lane's actors, failed attempts to connect apart",
                self.by_lane(|lane, _| ConstCounter::new(lane.restarts)),
            ),
            (
                "waypost_lane_ejections",
                "Times that the lane was ejected because its publishes failed",
                self.by_lane(|lane, _| ConstCounter::new(lane.routing.ejections)),
            ),
            (
                "waypost_lane_attempts",
                "Attempts of the lane to connect",
                self.by_lane(|lane, _| ConstCounter::new(lane.attempts)),
            ),
        ] {
            registry.register(name, help, samples);
        }
        registry.register(
            "waypost_spool_commits",
            "Syncs of the disk that made records safe",
            ConstCounter::new(self.stats.commits),
        );
        registry.register(
            "waypost_spool_committed_records",
            "Records that these syncs made safe",
            ConstCounter::new(self.stats.committed),
        );
        registry.register(
            "waypost_spool_commit_seconds",
            "Time that these syncs took",
            ConstCounter::new(self.stats.commit_time.as_secs_f64()),
        );
    }

    fn register_lane_gauges(&self, registry: &mut Registry) {
        registry.register(
            "waypost_lane_up",
            "1 while the lane takes records",
            self.by_lane(|lane, _| ConstGauge::new(u64::from(lane.takes_records))),
        );
        registry.register(
            "waypost_lane_paused_seconds",
            "Time since an operator paused or drained the lane; 0 if none did, or it was resumed",
            self.by_lane(|lane, _| ConstGauge::new(lane.paused_s())),
        );
        registry.register(
            "waypost_in_flight",
            "Records that a lane has confirmed and the API has not taken",
            self.by_lane(|lane, _| ConstGauge::new(lane.in_flight)),
        );
        registry.register(
            "waypost_kept_copies",
            "Copies on this disk of records whose confirm a power cut could take",
            self.by_lane(|lane, _| ConstGauge::new(lane.kept)),
        );
        registry.register(
            "waypost_lane_outlives_power_cut",
            "1 if a confirm of the lane survives a power cut of its broker; 0 if not, or unknown",
            self.by_lane(|lane, _| {
                let is_durable = lane.broker.outlives_power_cut == Durability::Yes;
                ConstGauge::new(u64::from(is_durable))
            }),
        );
        registry.register(
            "waypost_last_delivery_seconds",
            "Time since the API took a record of the lane",
            self.by_lane::<ConstGauge<f64>, _>(|_, lane| {
                let at_us = Some(lane.last_delivery_us);
                at_us.filter(|at_us| *at_us > 0).map(age)
            }),
        );
    }

    /// The records that nodes on one broker have taken of each other.
    fn register_runs(&self, registry: &mut Registry) {
        for (name, help, samples) in [
            (
                "waypost_ledger_handed_over",
                "Records of this run that another node took from the broker",
                self.by_run(|lane| vec![(None, lane.counts.handed_over())]),
            ),
            (
                "waypost_ledger_taken_over",
                "Records of other runs, by run, that ended at this node",
                self.by_run(|lane| {
                    let runs = lane.taken_over.by_run();
                    runs.map(|(run, taken)| (Some(run.to_owned()), taken.records))
                        .collect()
                }),
            ),
            (
                "waypost_ledger_uncounted_max",
                "Records that may have been taken over and not counted as such, by run: a node was killed",
                self.by_run(|lane| {
                    let runs = lane.taken_over.by_run();
                    let runs = runs.filter(|(_, taken)| taken.uncounted_max > 0);
                    runs.map(|(run, taken)| (Some(run.to_owned()), taken.uncounted_max))
                        .chain([(None, lane.readopted)])
                        .collect()
                }),
            ),
        ] {
            registry.register(name, help, samples);
        }
    }

    fn register_node_gauges(&self, registry: &mut Registry) {
        registry.register(
            "waypost_oldest_waiting_seconds",
            "Age of the oldest record in the spool; 0 if none waits",
            self.oldest_us.map_or(ConstGauge::new(0.0), age),
        );
        let reload = self.reload.as_ref();
        let is_rejected = reload.is_some_and(|last| last.outcome == ReloadOutcome::Rejected);
        let needs_restart = reload.map_or(0, |last| last.needs_restart.len() as u64);
        for (name, help, value) in [
            (
                "waypost_missing_records",
                "Records that a broker has lost after its confirm, and that no other node has taken",
                self.ledger.totals().missing(),
            ),
            (
                "waypost_spool_records",
                "Records in the spool that wait for a lane",
                self.stats.waiting(),
            ),
            (
                "waypost_parked_records",
                "Records on disk between two tries: the API fails at them while it answers others",
                self.stats.parked(),
            ),
            (
                "waypost_spool_bytes",
                "Size of the spool on disk",
                self.stats.bytes,
            ),
            (
                "waypost_spool_refuses",
                "1 while the spool takes no records: its disk fails or is full, or its folder is gone",
                self.stats.refuses.into(),
            ),
            (
                "waypost_dead_letters",
                "Dead letters on disk",
                self.stats.records(Queue::Dead),
            ),
            (
                "waypost_reload_rejected",
                "1 while the last reload of the configuration is one that was rejected",
                is_rejected.into(),
            ),
            (
                "waypost_reload_needs_restart",
                "Settings of the configuration that was reloaded which take effect at the next start",
                needs_restart,
            ),
            (
                "waypost_unclaimed_records",
                "Records on disk for APIs that are not configured",
                self.apis.unclaimed_records(),
            ),
            (
                "waypost_ledger_imbalanced",
                "1 if the ledger did not balance when nothing moved: an error of this program",
                self.ledger.is_imbalanced().into(),
            ),
        ] {
            registry.register(name, help, ConstGauge::new(value));
        }
    }

    fn register_files(&self, registry: &mut Registry) {
        let files = self.files.iter().map(|file| {
            let file = file.status();
            let is_unusable = u64::from(file.last_error.is_some());
            let label = ("key", file.key.to_owned());
            (vec![label], ConstGauge::new(is_unusable))
        });
        registry.register(
            "waypost_file_unusable",
            "1 while a file of the configuration cannot be used, so that what was read last stays",
            Samples(files.collect()),
        );
    }

    fn register_api(&self, registry: &mut Registry) {
        let api = self.apis.default_api();
        registry.register(
            "waypost_api_up",
            "0 while records wait because the API fails or denies every POST",
            ConstGauge::new(u64::from(!api.breaker.is_open())),
        );
        registry.register(
            "waypost_api_concurrency_limit",
            "POSTs to the API that may be in flight now, over all lanes",
            ConstGauge::new(self.api_limits[0] as u64),
        );
        let waiting = api.rate.status().map_or(0, |rate| rate.waiting);
        registry.register(
            "waypost_api_rate_waiting",
            "POSTs to the API that wait for their turn because its rate binds",
            ConstGauge::new(waiting as u64),
        );
        let failures = FailureClass::ALL.map(|class| {
            let count = ConstCounter::new(api.counts.failures(class));
            (vec![("class", class.name().to_owned())], count)
        });
        registry.register(
            "waypost_api_failures",
            "POSTs that the API has not taken",
            Samples(failures.into()),
        );
    }

    fn register_histograms(&self, registry: &mut Registry) {
        let requests = self.ledger.requests();
        let requests = requests.iter();
        let requests =
            requests.map(|(code, times)| (vec![("code", code.to_string())], times.clone()));
        for (name, help, samples) in [
            (
                "waypost_ingest_seconds",
                "From a request's head to its answer",
                Samples(requests.collect()),
            ),
            (
                "waypost_publish_seconds",
                "From handing a record to the lane to its confirm",
                self.by_lane(|_, lane| lane.publish.clone()),
            ),
            (
                "waypost_post_seconds",
                "From a POST to the API's answer or its failure",
                self.by_lane(|_, lane| lane.post.clone()),
            ),
            (
                "waypost_delivery_seconds",
                "From accepted to delivered",
                self.by_path(|lane| lane.delivery.clone()),
            ),
        ] {
            registry.register(name, help, samples);
        }
    }

    fn by_lane<M, O: Into<Option<M>>>(
        &self,
        sample: impl Fn(&LaneStatus<'_>, &LaneLedger) -> O,
    ) -> Samples<M> {
        let samples = self.lanes.iter().filter_map(|lane| {
            let sample = sample(lane, &self.ledger.lane(lane.lane)).into()?;
            Some((vec![("lane", lane.lane.to_string())], sample))
        });
        Samples(samples.collect())
    }

    fn by_path<M>(&self, sample: impl Fn(&LaneLedger) -> M) -> Samples<M> {
        let samples = self.lanes.iter().map(|lane| {
            let label = ("path", lane.tag.to_owned());
            (vec![label], sample(&self.ledger.lane(lane.lane)))
        });
        Samples(samples.collect())
    }

    /// Counts of records by the run that accepted them; `None` is this run.
    fn by_run(
        &self,
        counts: impl Fn(&LaneLedger) -> Vec<(Option<String>, u64)>,
    ) -> Samples<ConstGauge<u64>> {
        let mut samples = Vec::new();
        for lane in &self.lanes {
            for (run, records) in counts(&self.ledger.lane(lane.lane)) {
                let run = run.unwrap_or_else(|| self.ledger.run.to_string());
                let labels = vec![("path", lane.tag.to_owned()), ("run", run)];
                samples.push((labels, ConstGauge::new(records)));
            }
        }
        Samples(samples)
    }
}

/// The samples of a metric, each with its labels.
#[derive(Debug)]
struct Samples<M>(Vec<(Vec<(&'static str, String)>, M)>);

impl<M: EncodeMetric + TypedMetric> EncodeMetric for Samples<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, sample) in &self.0 {
            sample.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TypedMetric for Latency {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let mut below = 0;
        let buckets = BOUNDS_S.map(|bound| {
            let bound_us = Duration::from_secs_f64(bound).as_micros();
            let bound_us = u64::try_from(bound_us).unwrap_or(u64::MAX);
            // To two significant digits: a time just above a bound may be counted below it.
            let up_to = self.times.count_between(0, bound_us);
            let count = up_to - below;
            below = up_to;
            (bound, count)
        });
        let sum_s = seconds(self.sum_us);
        encoder.encode_histogram::<NoLabelSet>(sum_s, self.times.len(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The time since `at_us`, in µs since the Unix epoch.
fn age(at_us: u64) -> ConstGauge<f64> {
    ConstGauge::new(seconds(unix_us().saturating_sub(at_us)))
}

fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}
