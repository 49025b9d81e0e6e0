//! `GET /api/status`, and the state that the admin side's handlers share.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use actix::Addr;
use actix_web::http::StatusCode;
use serde::Serialize;
use tokio::time::Instant;

use super::problem::Problem;
use crate::{
    actors::supervisor::{ChildId, Snapshot, State, Supervisor, View},
    breaker::Breaker,
    config::Ack,
    lane_id::LaneId,
    ledger::{Balance, Ledger, Quantiles},
    spool::Spool,
};

/// Shared by all HTTP workers of the admin side.
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
pub struct LaneStatus {
    lane: &'static str,
    tag: String,
    pub state: &'static str,
    since_s: f64,
    pub restarts: u64,
    last_error: Option<String>,
    retry_in_s: Option<f64>,
    accepted: u64,
    delivered: u64,
    dead: u64,
    in_flight: u64,
    redelivered: u64,
    publish_ms: Quantiles,
    delivery_ms: Quantiles,
    broker: BrokerStatus,
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

pub fn no_supervisor() -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "supervisor",
        "The supervisor does not answer",
    )
}

impl AdminState {
    pub async fn views(&self) -> Result<Vec<View>, Problem> {
        self.supervisor
            .send(Snapshot)
            .await
            .map_err(|_| no_supervisor())
    }

    pub fn status(&self, views: &[View]) -> Status {
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

    pub fn lane_status(&self, lane: LaneId, views: &[View]) -> Option<LaneStatus> {
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
            publish_ms: self.ledger.publish_times(lane).quantiles_ms(),
            delivery_ms: self.ledger.delivery_times(lane).quantiles_ms(),
            broker: BrokerStatus {
                version: view.broker.version.clone(),
                warnings: view.broker.warnings.clone(),
            },
        })
    }
}
