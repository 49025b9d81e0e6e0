//! `GET /api/status`, and the state that the admin side's handlers share.

mod apis;
mod oldest;
mod warnings;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use actix::Addr;
use actix_web::http::StatusCode;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::Instant;

use self::{
    apis::{ApiStatus, NamedApiStatus},
    warnings::{NodeWarning, warnings},
};
use super::{
    early_ends::EarlyEnds,
    events::EventHub,
    ingest::BodyLimits,
    problem::{Problem, ProblemKind},
    tap::TapStreams,
    tokens::Tokens,
};
use crate::{
    actors::{
        apis::Apis,
        copies,
        supervisor::{Action, ChildId, Snapshot, State, Supervisor, View},
    },
    clock::age,
    config::Ack,
    control::{Control, Order, ReloadReport},
    history::{Columns, History},
    lane_id::{LaneId, PerLane},
    ledger::{Balance, Ledger, Quantiles},
    log::{self, LogStatus},
    routing::{
        explain::Explanations,
        scores::{LaneRouting, Scores},
    },
    secrets::{FileHealth, FileStatus},
    spool::Spool,
    trace::{Exporter, TraceStatus},
    transport::BrokerInfo,
};

/// Shared by all HTTP workers of the admin side.
#[derive(Clone)]
pub struct AdminState {
    pub supervisor: Addr<Supervisor>,
    pub ledger: Arc<Ledger>,
    pub scores: Arc<Scores>,
    pub control: Control,
    pub explanations: Explanations,
    pub spool: Spool,
    /// The most bytes of its records.
    pub spool_max: u64,
    pub publish_timeout: Duration,
    pub apis: Apis,
    pub node: Arc<str>,
    /// The lanes of this node, with their tags.
    pub lanes: Arc<[(LaneId, String)]>,
    pub draining: Arc<AtomicBool>,
    pub ack: Ack,
    /// The tokens of operators; `None` if everybody who reaches the address is one.
    pub tokens: Option<Tokens>,
    /// Operators need a certificate.
    pub needs_certificate: bool,
    /// The files that are read again while the node runs.
    pub files: Arc<[Arc<FileHealth>]>,
    /// The connections that each side ended early.
    pub early_ends: [(&'static str, EarlyEnds); 2],
    pub order_limits: BodyLimits,
    /// The gRPC lane carries records to this node itself.
    pub is_own_peer: bool,
    /// The names that the admin side may be asked by: see `foreign`.
    pub hosts: Arc<[String]>,
    /// No order is taken.
    pub read_only: bool,
    pub events: Arc<EventHub>,
    pub tap: TapStreams,
    pub history: History,
    pub exporter: Exporter,
}

impl AdminState {
    /// The lane of that name, if it is this node's.
    pub fn lane_named(&self, name: &str) -> Result<LaneId, Problem> {
        let mut lanes = self.lanes.iter().map(|(lane, _)| *lane);
        lanes.find(|lane| lane.name() == name).ok_or_else(|| {
            let lanes: Vec<_> = self.lanes.iter().map(|(lane, _)| lane.name()).collect();
            let detail = format!("This node has no lane {name}; it has {}", lanes.join(", "));
            Problem::new(StatusCode::NOT_FOUND, ProblemKind::NotFound, detail)
        })
    }
}

/// `GET /api/status`, as the contract fixes it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Status<'s> {
    version: &'static str,
    node: &'s str,
    uptime_s: f64,
    draining: bool,
    ledger: Balance,
    /// The ledger balanced the last time that nothing moved, and no record is missing.
    balanced: bool,
    lanes: Vec<LaneStatus<'s>>,
    api: ApiStatus<'s>,
    /// Each API, `[api]` as `default`; empty if there is no other.
    apis: BTreeMap<&'s str, NamedApiStatus<'s>>,
    /// Records on disk for APIs that are not configured.
    unclaimed: u64,
    /// Age of the oldest record that waits, in a lane or for one; null if none does.
    oldest_s: Option<f64>,
    spool: SpoolStatus,
    /// Restarts of the router, which is of no lane.
    router_restarts: u64,
    policy: &'static str,
    /// The counts of the last second: see [`crate::history`].
    #[schemars(description = "The counts of the last second.")]
    recent: Columns<f64>,
    /// The last one; null if there was none.
    reload: Option<ReloadReport>,
    /// The files that are read again while the node runs.
    files: Vec<FileStatus<'s>>,
    /// Null if traces are off.
    traces: Option<TraceStatus>,
    log: LogStatus,
    /// What is wrong, the worst first.
    warnings: Vec<NodeWarning>,
}

/// What the supervisor and the disk tell for a status.
pub struct StatusSource {
    views: Vec<View>,
    /// When the oldest record on disk that waits was accepted, in microseconds since the Unix
    /// epoch; `None` if none waits, or the disk is slow.
    oldest_us: Option<u64>,
}

/// The disk of the node.
#[derive(Debug, Serialize, JsonSchema)]
struct SpoolStatus {
    bytes: u64,
    max: u64,
    /// It takes no records.
    refuses: bool,
    /// The time until it is full, if it goes on filling as in the last seconds, in coarse steps; null
    /// if it does not fill, or that takes more than a day.
    full_in_s: Option<f64>,
    /// Age of the oldest record that waits; null if none waits, or the disk is slow.
    oldest_s: Option<f64>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct LaneStatus<'s> {
    pub lane: LaneId,
    pub tag: &'s str,
    pub state: &'static str,
    /// An operator lets it deliver what it has, and take nothing new.
    draining: bool,
    /// It is up, and no operator drains it.
    #[serde(skip)]
    pub takes_records: bool,
    since_s: f64,
    pub restarts: u64,
    /// Attempts to connect.
    pub attempts: u64,
    last_error: Option<&'s str>,
    retry_in_s: Option<f64>,
    #[serde(flatten)]
    pub routing: LaneRouting,
    /// The order that set the weight; null for the configuration's.
    weight_set: Option<OrderStatus>,
    /// The last order of another kind; null if there was none.
    ordered: Option<OrderStatus>,
    accepted: u64,
    delivered: u64,
    dead: u64,
    pub in_flight: u64,
    /// Age of the oldest of them; null if there is none.
    lag_s: Option<f64>,
    handed_over: u64,
    missing: u64,
    redelivered: u64,
    /// Copies on this node's disk of records that the lane has confirmed.
    pub kept: u64,
    publish_ms: Quantiles,
    delivery_ms: Quantiles,
    /// The median of the last ten seconds that have ended; 0 if nothing was published.
    #[serde(skip)]
    recent_publish: Duration,
    pub broker: &'s BrokerInfo,
    /// Why the broker refuses records, while it does.
    refusing: Option<String>,
}

/// The last order of its kind.
#[derive(Debug, Serialize, JsonSchema)]
struct OrderStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<Action>,
    /// The operator's address.
    by: String,
    since_s: f64,
    /// The next start of the node knows it.
    kept: bool,
}

impl OrderStatus {
    fn new<T>(order: Order<T>, action: Option<Action>) -> Self {
        Self {
            action,
            by: order.by,
            since_s: age(order.at_us).as_secs_f64(),
            kept: order.is_kept,
        }
    }
}

impl LaneStatus<'_> {
    /// Since when an operator lets the lane take no records; 0 if none does.
    pub fn paused_s(&self) -> f64 {
        let ordered = self.ordered.as_ref();
        let stopped =
            ordered.filter(|order| matches!(order.action, Some(Action::Pause | Action::Drain)));
        stopped.map_or(0.0, |order| order.since_s)
    }
}

/// The view of one actor.
pub fn view_of(views: &[View], child: ChildId) -> Option<&View> {
    views.iter().find(|view| view.child == child)
}

pub fn no_supervisor() -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        ProblemKind::Supervisor,
        "The supervisor does not answer",
    )
}

impl AdminState {
    pub async fn views(&self) -> Result<Vec<View>, Problem> {
        let views = self.supervisor.send(Snapshot).await;
        views.map_err(|_| no_supervisor())
    }

    pub async fn status_source(&self) -> Result<StatusSource, Problem> {
        let views = self.views().await?;
        let oldest_us = self.oldest_us().await.ok().flatten();
        Ok(StatusSource { views, oldest_us })
    }

    pub fn status<'s>(&'s self, source: &'s StatusSource) -> Status<'s> {
        let StatusSource { views, oldest_us } = source;
        let ledger = self.ledger.balance(&self.apis.spools().stats());
        let disk = self.spool.stats();
        let lanes: Vec<_> = self.lane_statuses(views).collect();
        let full_in_s = self.disk_full_in_s(&lanes);
        let on_disk = oldest_us.map(|at_us| age(at_us).as_secs_f64());
        let ages = lanes.iter().filter_map(|lane| lane.lag_s).chain(on_disk);
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION"),
            node: &self.node,
            uptime_s: self.ledger.started.elapsed().as_secs_f64(),
            draining: self.draining.load(Relaxed),
            balanced: ledger.missing == 0 && !self.ledger.is_imbalanced(),
            ledger,
            oldest_s: ages.reduce(f64::max),
            lanes,
            api: self.api_status(self.apis.default_api()),
            apis: self.several_apis().map(|api| self.named(api)).collect(),
            unclaimed: self.apis.unclaimed_records(),
            spool: SpoolStatus {
                bytes: disk.bytes,
                max: self.spool_max,
                refuses: disk.refuses,
                full_in_s,
                oldest_s: on_disk,
            },
            router_restarts: view_of(views, ChildId::Router).map_or(0, |router| router.restarts),
            policy: self.control.policy().name(),
            recent: self.history.last_second(),
            reload: self.control.last_reload(),
            files: self.files.iter().map(|file| file.status()).collect(),
            traces: self.exporter.status(),
            log: log::status(),
            warnings: Vec::new(),
        };
        status.warnings = warnings(&status, self.ack);
        status
    }

    /// The seconds until the node's own disk is full; see [`History::disk_full_in_s`].
    pub fn disk_full_in_s(&self, lanes: &[LaneStatus<'_>]) -> Option<f64> {
        let mut copies_stay = PerLane::default();
        for lane in lanes {
            let durable_after = lane.broker.outlives_power_cut.after();
            copies_stay[lane.lane as usize] = copies::stay_max(durable_after, self.publish_timeout);
        }
        self.history.disk_full_in_s(self.spool_max, &copies_stay)
    }

    /// The lanes that are supervised, in the order of the configuration.
    pub fn lane_statuses<'s>(&'s self, views: &'s [View]) -> impl Iterator<Item = LaneStatus<'s>> {
        let lanes = self.lanes.iter();
        lanes.filter_map(|(lane, tag)| self.lane_status(*lane, tag, views))
    }

    fn lane_status<'s>(
        &self,
        lane: LaneId,
        tag: &'s str,
        views: &'s [View],
    ) -> Option<LaneStatus<'s>> {
        let view = view_of(views, ChildId::Lane(lane))?;
        let forwarder = view_of(views, ChildId::Forwarder(lane));
        let retry_in = match view.state {
            State::Backoff { until } => Some(until.saturating_duration_since(Instant::now())),
            _ => None,
        };
        let last_error = view.last_error.as_deref();
        // The lane is locked last, and nothing else meanwhile: the history locks lanes while it is
        // locked itself.
        let stats = self.spool.stats();
        let in_flight = self.ledger.in_flight(lane, &stats);
        let now = self.scores.at(Instant::now());
        let orders = self.control.orders(lane);
        let recent_publish = self.history.recent_publish(lane);
        let undelivered = self.ledger.lane(lane).counts.in_flight();
        let routing = self.scores.status(lane, undelivered, now);
        let ledger = self.ledger.lane(lane);
        Some(LaneStatus {
            lane,
            tag,
            state: view.state.name(),
            draining: view.is_draining,
            takes_records: view.takes_records(),
            since_s: view.since.elapsed().as_secs_f64(),
            restarts: view.restarts + forwarder.map_or(0, |forwarder| forwarder.restarts),
            attempts: view.attempts,
            last_error: last_error.or_else(|| forwarder?.last_error.as_deref()),
            retry_in_s: retry_in.map(|time| time.as_secs_f64()),
            routing,
            weight_set: orders.weight.map(|order| OrderStatus::new(order, None)),
            ordered: orders.action.map(|order| {
                let action = Some(order.what);
                OrderStatus::new(order, action)
            }),
            accepted: ledger.counts.accepted,
            delivered: ledger.counts.delivered,
            dead: ledger.counts.dead,
            in_flight,
            lag_s: (in_flight > 0).then(|| ledger.progress.lag().as_secs_f64()),
            handed_over: ledger.counts.handed_over(),
            missing: ledger.counts.missing(),
            redelivered: ledger.counts.redelivered,
            kept: stats.kept(lane),
            publish_ms: ledger.publish.quantiles_ms(),
            delivery_ms: ledger.delivery.quantiles_ms(),
            recent_publish,
            broker: &view.broker,
            refusing: ledger
                .refusals
                .reason()
                .filter(|_| view.state == State::Up)
                .map(|reason| reason.to_string()),
        })
    }
}
