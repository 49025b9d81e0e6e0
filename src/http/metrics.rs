//! The ledger as metrics, in the text format of Prometheus, version 0.0.4, or as OpenMetrics 1.0.
//!
//! Each scrape reads the same counts as `GET /api/status`. The encoder ends each help with a full
//! stop, and the name of each counter with `_total`.

mod each_api;
mod each_lane;
mod early_ends;
#[cfg(target_os = "linux")]
mod process;
mod runs;
mod samples;
mod spool;
mod traces;

use std::{fmt, sync::Arc};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{StatusCode, header},
    web,
};
use prometheus_client::{
    encoding::{prometheus_text, text},
    metrics::{counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::Registry,
};
use tokio::time::error::Elapsed;

use self::samples::Samples;
use super::{
    accept,
    early_ends::EarlyEnds,
    problem::{Problem, ProblemKind},
    status::{AdminState, LaneStatus},
};
use crate::{
    actors::apis::Apis,
    api::answer::FailureClass,
    build_info::BUILD_INFO,
    clock,
    control::{ReloadOutcome, ReloadReport},
    ledger::{Counts, LaneLedger, Ledger},
    log,
    secrets::FileHealth,
    spool::{Queue, SpoolStats},
    trace::Exporter,
};

/// With exemplars, which the text format of Prometheus has no place for.
pub(super) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `GET /metrics`.
pub async fn scrape(
    state: web::Data<AdminState>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let views = state.views().await?;
    let oldest_us = state.oldest_us().await;
    let apis = state.apis.all().iter();
    let lanes: Vec<_> = state.lane_statuses(&views).collect();
    let scrape = Scrape {
        ledger: &state.ledger,
        full_in_s: state.disk_full_in_s(&lanes),
        lanes,
        stats: state.apis.spools().stats(),
        apis: &state.apis,
        reload: state.control.last_reload(),
        api_limits: apis.map(|api| state.limit_of(api)).collect(),
        files: &state.files,
        exporter: &state.exporter,
        early_ends: &state.early_ends,
        spool_bytes: state.spool.stats().bytes,
        spool_max: state.spool_max,
        oldest_us,
    };
    let registry = scrape.registry();
    let mut body = String::new();
    let (content_type, encoded) =
        if accept::prefers(&request, "application/openmetrics-text", "text/plain") {
            (OPEN_METRICS, text::encode(&mut body, &registry))
        } else {
            let encoded = prometheus_text::encode(&mut body, &registry);
            (prometheus_text::CONTENT_TYPE, encoded)
        };
    encoded.map_err(cannot_encode)?;
    Ok(HttpResponse::Ok()
        .content_type(content_type)
        .append_header((header::VARY, "accept"))
        .body(body))
}

fn cannot_encode(why: fmt::Error) -> Problem {
    let detail = format!("The metrics cannot be encoded: {why}");
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    Problem::new(status, ProblemKind::Metrics, detail)
}

/// The values of one scrape.
struct Scrape<'s> {
    ledger: &'s Ledger,
    lanes: Vec<LaneStatus<'s>>,
    stats: SpoolStats,
    apis: &'s Apis,
    reload: Option<ReloadReport>,
    /// Of each API, over all lanes.
    api_limits: Vec<usize>,
    files: &'s [Arc<FileHealth>],
    exporter: &'s Exporter,
    early_ends: &'s [(&'static str, EarlyEnds)],
    /// The bytes of the node's own spool, and the most of its records.
    spool_bytes: u64,
    spool_max: u64,
    full_in_s: Option<f64>,
    /// See [`AdminState::oldest_us`].
    oldest_us: Result<Option<u64>, Elapsed>,
}

impl Scrape<'_> {
    fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        register_build(&mut registry);
        #[cfg(target_os = "linux")]
        process::register(&mut registry);
        self.register_counters(&mut registry);
        each_lane::register(self, &mut registry);
        self.register_node_gauges(&mut registry);
        spool::register(self, &mut registry);
        runs::register(self, &mut registry);
        self.register_files(&mut registry);
        traces::register(self, &mut registry);
        register_log(&mut registry);
        early_ends::register(self, &mut registry);
        self.register_api(&mut registry);
        each_api::register(self, &mut registry);
        self.register_histograms(&mut registry);
        registry
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
    }

    fn register_node_gauges(&self, registry: &mut Registry) {
        let oldest = self.oldest_us.iter();
        let oldest = oldest.map(|at_us| (Vec::new(), at_us.map_or(ConstGauge::new(0.0), age)));
        registry.register(
            "waypost_oldest_waiting_seconds",
            "Age of the oldest record on disk that waits for a lane; 0 if none does",
            Samples(oldest.collect()),
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
                "Records on disk between two tries, held until their API has a place, or for no API",
                self.stats.parked(),
            ),
            (
                "waypost_spool_bytes",
                "Size of the node's own spool on disk, without those of the APIs",
                self.spool_bytes,
            ),
            (
                "waypost_spool_max_bytes",
                "Size at which the spool takes no more records",
                self.spool_max,
            ),
            (
                "waypost_spool_refuses",
                "1 while the spool takes no records: its disk fails, stalls or is full, or its folder is gone",
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
        // Copied, so that no answer waits for the rest of the scrape.
        let requests: Vec<_> = self
            .ledger
            .requests()
            .iter()
            .map(|(code, times)| (vec![("code", code.to_string())], times.clone()))
            .collect();
        for (name, help, samples) in [
            (
                "waypost_ingest_seconds",
                "From a request's head to its answer",
                Samples(requests),
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
        ] {
            registry.register(name, help, samples);
        }
        registry.register(
            "waypost_delivery_seconds",
            "From accepted to delivered",
            self.by_path(|lane| lane.delivery.histogram.clone()),
        );
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
}

/// The encoder ends the name with `_info`.
fn register_build(registry: &mut Registry) {
    let mut labels = vec![("version", BUILD_INFO.version)];
    labels.extend(BUILD_INFO.commit.map(|commit| ("commit", commit)));
    registry.register(
        "waypost_build",
        "The build of this program",
        Info::new(labels),
    );
}

fn register_log(registry: &mut Registry) {
    registry.register(
        "waypost_log_lines_lost",
        "Lines of the log that were lost because the standard error did not take them",
        ConstCounter::new(log::status().lost),
    );
}

/// The time since `at_us`, in µs since the Unix epoch.
fn age(at_us: u64) -> ConstGauge<f64> {
    ConstGauge::new(clock::age(at_us).as_secs_f64())
}
