//! The operator's side: health, readiness, status, and orders to lanes.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use actix::Addr;
use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::Serialize;
use tokio::time::Instant;

use super::problem::Problem;
use crate::{
    actors::supervisor::{Action, ChildId, Order, Snapshot, State, Supervisor, View},
    delivery::LaneId,
    ledger::{Counts, Ledger, Quantiles},
};

/// What the handlers need; shared by all HTTP workers.
#[derive(Clone)]
pub struct Desk {
    pub supervisor: Addr<Supervisor>,
    pub ledger: Arc<Ledger>,
    pub node: Arc<str>,
    /// The lanes of this node, with their tags.
    pub lanes: Arc<[(LaneId, String)]>,
    pub api_url: Arc<str>,
    /// POSTs that may be in flight per lane.
    pub api_limit: usize,
    pub draining: Arc<AtomicBool>,
}

/// `GET /api/status`, as the contract fixes it.
#[derive(Debug, Serialize)]
pub struct Status {
    version: &'static str,
    node: String,
    uptime_s: f64,
    draining: bool,
    ledger: Totals,
    lanes: Vec<LaneStatus>,
    api: ApiStatus,
    /// Restarts of the router, which is of no lane.
    router_restarts: u64,
}

#[derive(Debug, Serialize)]
struct Totals {
    accepted: u64,
    recovered: u64,
    delivered: u64,
    dead: u64,
    spooled: u64,
    in_flight: u64,
    redelivered: u64,
}

#[derive(Debug, Serialize)]
struct LaneStatus {
    lane: &'static str,
    tag: String,
    state: &'static str,
    since_s: f64,
    restarts: u64,
    last_error: Option<String>,
    retry_in_s: Option<f64>,
    accepted: u64,
    delivered: u64,
    dead: u64,
    in_flight: u64,
    redelivered: u64,
    publish_ms: QuantilesMs,
    delivery_ms: QuantilesMs,
    broker: BrokerStatus,
}

#[derive(Debug, Serialize)]
struct QuantilesMs {
    p50: f64,
    p99: f64,
}

#[derive(Debug, Serialize)]
struct BrokerStatus {
    version: Option<String>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ApiStatus {
    url: String,
    state: &'static str,
    in_flight: u64,
    limit: usize,
}

impl From<Quantiles> for QuantilesMs {
    fn from(Quantiles { p50, p99 }: Quantiles) -> Self {
        Self { p50, p99 }
    }
}

/// Adds the routes of `[admin].listen`.
pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/healthz", web::get().to(async || HttpResponse::Ok().body("ok\n")))
        .route("/readyz", web::get().to(ready))
        .route("/api/status", web::get().to(status))
        .route("/api/lanes/{lane}/{action}", web::post().to(order))
        .default_service(web::to(async |request: HttpRequest| Problem::not_found(request.path())));
}

async fn ready(desk: web::Data<Desk>) -> Result<HttpResponse, Problem> {
    let unready = |why: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unready", why);
    if desk.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let views = desk.views().await?;
    let is_up = |view: &View| view.state == State::Up;
    if !views.iter().any(|view| view.child == ChildId::Router && is_up(view)) {
        return Err(unready("The router is being restarted"));
    }
    if !views.iter().any(|view| matches!(view.child, ChildId::Lane(_)) && is_up(view)) {
        return Err(unready("No lane is up"));
    }
    Ok(HttpResponse::Ok().body("ready\n"))
}

async fn status(desk: web::Data<Desk>) -> Result<HttpResponse, Problem> {
    let views = desk.views().await?;
    Ok(HttpResponse::Ok().json(desk.status(&views)))
}

async fn order(desk: web::Data<Desk>, path: web::Path<(String, String)>) -> Result<HttpResponse, Problem> {
    let (lane, action) = path.into_inner();
    let action = match action.as_str() {
        "pause" => Action::Pause,
        "resume" => Action::Resume,
        "restart" => Action::Restart,
        _ => return Err(Problem::not_found(&action)),
    };
    if desk.draining.load(Relaxed) {
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "The node is stopping"));
    }
    let unknown = || Problem::not_found(&lane);
    let lane = LaneId::from_name(&lane).ok_or_else(unknown)?;
    if !desk.supervisor.send(Order { lane, action }).await.map_err(|_| no_supervisor())? {
        return Err(unknown());
    }
    let views = desk.views().await?;
    Ok(HttpResponse::Accepted().json(desk.lane_status(lane, &views)))
}

fn no_supervisor() -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "supervisor", "The supervisor does not answer")
}

impl Desk {
    async fn views(&self) -> Result<Vec<View>, Problem> {
        self.supervisor.send(Snapshot).await.map_err(|_| no_supervisor())
    }

    fn status(&self, views: &[View]) -> Status {
        let Counts { accepted, recovered, delivered, redelivered } = self.ledger.totals();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            node: self.node.to_string(),
            uptime_s: self.ledger.started.elapsed().as_secs_f64(),
            draining: self.draining.load(Relaxed),
            ledger: Totals {
                accepted,
                recovered,
                delivered,
                dead: 0,
                spooled: 0,
                in_flight: self.ledger.totals().in_flight(),
                redelivered,
            },
            lanes: self.lanes.iter().filter_map(|&(lane, _)| self.lane_status(lane, views)).collect(),
            api: ApiStatus {
                url: self.api_url.to_string(),
                state: if self.ledger.api.is_failing() { "down" } else { "up" },
                in_flight: self.ledger.api.in_flight(),
                limit: self.api_limit * self.lanes.len(),
            },
            router_restarts: views.iter().find(|view| view.child == ChildId::Router).map_or(0, |view| view.restarts),
        }
    }

    fn lane_status(&self, lane: LaneId, views: &[View]) -> Option<LaneStatus> {
        let (_, tag) = self.lanes.iter().find(|(known, _)| *known == lane)?;
        let view = views.iter().find(|view| view.child == ChildId::Lane(lane))?;
        let forwarder = views.iter().find(|view| view.child == ChildId::Forwarder(lane));
        let counts = self.ledger.counts(lane);
        Some(LaneStatus {
            lane: lane.name(),
            tag: tag.clone(),
            state: view.state.name(),
            since_s: view.since.elapsed().as_secs_f64(),
            restarts: view.restarts + forwarder.map_or(0, |forwarder| forwarder.restarts),
            last_error: view.last_error.clone().or_else(|| forwarder?.last_error.clone()),
            retry_in_s: match view.state {
                State::Backoff { until } => Some(until.saturating_duration_since(Instant::now()).as_secs_f64()),
                _ => None,
            },
            accepted: counts.accepted,
            delivered: counts.delivered,
            dead: 0,
            in_flight: counts.in_flight(),
            redelivered: counts.redelivered,
            publish_ms: self.ledger.publish_ms(lane).into(),
            delivery_ms: self.ledger.delivery_ms(lane).into(),
            broker: BrokerStatus { version: view.broker.version.clone(), warnings: view.broker.warnings.clone() },
        })
    }
}
