//! The operator's side: health, readiness, status, metrics, dead letters, and orders to lanes.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use actix::Addr;
use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use super::{
    metrics::{self, Scrape},
    problem::Problem,
};
use crate::{
    actors::supervisor::{Action, ChildId, LaneCommand, Snapshot, State, Supervisor, View},
    breaker::Breaker,
    config::Ack,
    lane_id::LaneId,
    ledger::{Balance, Ledger, Quantiles},
    spool::{DeathReason, Entry, NotSafe, Queue, Spool, Which},
};

/// How many dead letters are listed, and how many may be asked for.
const DEAD_DEFAULT: usize = 100;
const DEAD_MAX: usize = 10_000;

/// What the handlers need; shared by all HTTP workers.
#[derive(Clone)]
pub struct AdminState {
    pub supervisor: Addr<Supervisor>,
    pub ledger: Arc<Ledger>,
    pub spool: Spool,
    pub breaker: Arc<Breaker>,
    pub node: Arc<str>,
    /// The lanes of this node, with their tags.
    pub lanes: Arc<[(LaneId, String)]>,
    pub api_url: Arc<str>,
    /// POSTs that may be in flight per lane.
    pub api_limit: usize,
    pub draining: Arc<AtomicBool>,
    pub ack: Ack,
}

/// `GET /api/status`, as the contract fixes it.
#[derive(Debug, Serialize)]
pub struct Status {
    version: &'static str,
    node: String,
    uptime_s: f64,
    draining: bool,
    ledger: Balance,
    /// The ledger balanced the last time that nothing moved.
    balanced: bool,
    lanes: Vec<LaneStatus>,
    api: ApiStatus,
    /// Restarts of the router, which is of no lane.
    router_restarts: u64,
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
    app.app_data(web::JsonConfig::default().error_handler(|why, _| {
        Problem::new(StatusCode::BAD_REQUEST, "json", why.to_string()).into()
    }))
    .route(
        "/healthz",
        web::get().to(async || HttpResponse::Ok().body("ok\n")),
    )
    .route("/readyz", web::get().to(ready))
    .route("/metrics", web::get().to(scrape))
    .route("/api/status", web::get().to(status))
    .route("/api/lanes/{lane}/{action}", web::post().to(order))
    .route("/api/dead", web::get().to(dead))
    .route("/api/dead/replay", web::post().to(replay))
    .route("/api/dead/drop", web::post().to(forget))
    .default_service(web::to(async |request: HttpRequest| {
        Problem::not_found(request.path())
    }));
}

async fn ready(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let unready = |why: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unready", why);
    if state.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let views = state.views().await?;
    let is_up = |view: &View| view.state == State::Up;
    if !views
        .iter()
        .any(|view| view.child == ChildId::Router && is_up(view))
    {
        return Err(unready("The router is being restarted"));
    }
    let a_lane_is_up = views
        .iter()
        .any(|view| matches!(view.child, ChildId::Lane(_)) && is_up(view));
    let refuses = state.spool.stats().refuses;
    if refuses && (state.ack == Ack::Disk || !a_lane_is_up) {
        return Err(unready(
            "The spool takes no records, and no lane may or can take them instead",
        ));
    }
    Ok(HttpResponse::Ok().body("ready\n"))
}

async fn status(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let views = state.views().await?;
    Ok(HttpResponse::Ok().json(state.status(&views)))
}

async fn scrape(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let views = state.views().await?;
    let states = state.lanes.iter().filter_map(|&(lane, _)| {
        let status = state.lane_status(lane, &views)?;
        Some((lane, (status.state == State::Up.name(), status.restarts)))
    });
    let oldest = state.spool.oldest().await;
    let scrape = Scrape {
        lanes: &state.lanes,
        states: states.collect(),
        held: state.spool.stats(),
        oldest_us: oldest.and_then(|entry| Some(entry.record().origin?.at_us)),
    };
    let text = metrics::text(&state.ledger, &scrape).map_err(|why| {
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics",
            format!("The metrics cannot be encoded: {why}"),
        )
    })?;
    Ok(HttpResponse::Ok()
        .content_type(prometheus::TEXT_FORMAT)
        .body(text))
}

async fn order(
    state: web::Data<AdminState>,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    let (lane, action) = path.into_inner();
    let action = match action.as_str() {
        "pause" => Action::Pause,
        "resume" => Action::Resume,
        "restart" => Action::Restart,
        _ => return Err(Problem::not_found(&action)),
    };
    if state.draining.load(Relaxed) {
        return Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "The node is stopping",
        ));
    }
    let unknown = || Problem::not_found(&lane);
    let lane = LaneId::from_name(&lane).ok_or_else(unknown)?;
    if !state
        .supervisor
        .send(LaneCommand { lane, action })
        .await
        .map_err(|_| no_supervisor())?
    {
        return Err(unknown());
    }
    let views = state.views().await?;
    Ok(HttpResponse::Accepted().json(state.lane_status(lane, &views)))
}

/// A dead letter, as `GET /api/dead` lists it.
#[derive(Debug, Serialize)]
struct DeadLetter {
    id: String,
    lane: String,
    /// The API's last answer; `null` if there was none.
    status: Option<u32>,
    answer: String,
    attempts: u32,
    /// Given up, rather than refused.
    given_up: bool,
    /// Milliseconds since the Unix epoch: taken in, and dead.
    accepted_ms: Option<u64>,
    dead_ms: u64,
    record: String,
}

impl From<Entry> for DeadLetter {
    fn from(entry: Entry) -> Self {
        let record = String::from_utf8_lossy(&entry.body).into_owned();
        let accepted_ms = entry.record().origin.map(|origin| origin.at_us / 1000);
        let DeathReason {
            lane,
            status,
            answer,
            attempts,
            at_us,
            given_up,
        } = entry.letter.unwrap_or_default();
        let status = Some(status).filter(|status| *status > 0);
        Self {
            id: entry.id,
            lane,
            status,
            answer,
            attempts,
            given_up,
            accepted_ms,
            dead_ms: at_us / 1000,
            record,
        }
    }
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn dead(
    state: web::Data<AdminState>,
    query: web::Query<Limit>,
) -> Result<HttpResponse, Problem> {
    let letters = state
        .spool
        .dead(query.limit.unwrap_or(DEAD_DEFAULT).min(DEAD_MAX))
        .await
        .map_err(spool_fails)?;
    let letters: Vec<_> = letters.into_iter().map(DeadLetter::from).collect();
    Ok(HttpResponse::Ok()
        .json(json!({"total": state.spool.stats().records(Queue::Dead), "dead": letters})))
}

/// Which dead letters: `{"ids":[…]}` or `{"all":true}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Selection {
    ids: Option<HashSet<String>>,
    #[serde(default)]
    all: bool,
}

impl Selection {
    fn which(self) -> Result<Which, Problem> {
        match (self.ids, self.all) {
            (Some(ids), false) => Ok(Which::Ids(ids)),
            (None, true) => Ok(Which::All),
            _ => Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "selection",
                "Either ids or all, as in {\"all\":true}",
            )),
        }
    }
}

async fn replay(
    state: web::Data<AdminState>,
    selection: web::Json<Selection>,
) -> Result<HttpResponse, Problem> {
    let replayed = state
        .spool
        .replay(selection.into_inner().which()?)
        .await
        .map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"replayed": replayed})))
}

async fn forget(
    state: web::Data<AdminState>,
    selection: web::Json<Selection>,
) -> Result<HttpResponse, Problem> {
    let which = selection.into_inner().which()?;
    let (spool, ledger) = (state.spool.clone(), Arc::clone(&state.ledger));
    // Counted though the operator has hung up.
    let counted = actix_rt::spawn(async move {
        spool
            .forget(which)
            .await
            .inspect(|&dropped| ledger.dropped(dropped))
    });
    let dropped = counted
        .await
        .unwrap_or(Err(NotSafe::Closed))
        .map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"dropped": dropped})))
}

fn spool_fails(why: NotSafe) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "spool", why.to_string()).retry_after(1)
}

fn no_supervisor() -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "supervisor",
        "The supervisor does not answer",
    )
}

impl AdminState {
    async fn views(&self) -> Result<Vec<View>, Problem> {
        self.supervisor
            .send(Snapshot)
            .await
            .map_err(|_| no_supervisor())
    }

    fn status(&self, views: &[View]) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION"),
            node: self.node.to_string(),
            uptime_s: self.ledger.started.elapsed().as_secs_f64(),
            draining: self.draining.load(Relaxed),
            ledger: self.ledger.balance(&self.spool.stats()),
            balanced: !self.ledger.is_imbalanced(),
            lanes: self
                .lanes
                .iter()
                .filter_map(|&(lane, _)| self.lane_status(lane, views))
                .collect(),
            api: ApiStatus {
                url: self.api_url.to_string(),
                state: if self.breaker.is_open() { "down" } else { "up" },
                in_flight: self.ledger.api.in_flight(),
                limit: self.api_limit * self.lanes.len(),
            },
            router_restarts: views
                .iter()
                .find(|view| view.child == ChildId::Router)
                .map_or(0, |view| view.restarts),
        }
    }

    fn lane_status(&self, lane: LaneId, views: &[View]) -> Option<LaneStatus> {
        let (_, tag) = self.lanes.iter().find(|(known, _)| *known == lane)?;
        let view = views
            .iter()
            .find(|view| view.child == ChildId::Lane(lane))?;
        let forwarder = views
            .iter()
            .find(|view| view.child == ChildId::Forwarder(lane));
        let counts = self.ledger.counts(lane);
        Some(LaneStatus {
            lane: lane.name(),
            tag: tag.clone(),
            state: view.state.name(),
            since_s: view.since.elapsed().as_secs_f64(),
            restarts: view.restarts + forwarder.map_or(0, |forwarder| forwarder.restarts),
            last_error: view
                .last_error
                .clone()
                .or_else(|| forwarder?.last_error.clone()),
            retry_in_s: match view.state {
                State::Backoff { until } => Some(
                    until
                        .saturating_duration_since(Instant::now())
                        .as_secs_f64(),
                ),
                _ => None,
            },
            accepted: counts.accepted,
            delivered: counts.delivered,
            dead: counts.dead,
            in_flight: self.ledger.in_flight(lane, &self.spool.stats()),
            redelivered: counts.redelivered,
            publish_ms: self.ledger.publish_times(lane).quantiles_ms().into(),
            delivery_ms: self.ledger.delivery_times(lane).quantiles_ms().into(),
            broker: BrokerStatus {
                version: view.broker.version.clone(),
                warnings: view.broker.warnings.clone(),
            },
        })
    }
}
