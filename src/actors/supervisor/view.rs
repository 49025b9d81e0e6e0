//! The supervised actors as others see them.

use std::fmt;

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::{lane_id::LaneId, transport::BrokerInfo};

/// The name of a supervised actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildId {
    Router,
    Feeder,
    Lane(LaneId),
    Forwarder(LaneId),
}

impl fmt::Display for ChildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::Feeder => f.write_str("feeder"),
            Self::Lane(lane) => write!(f, "lane {lane}"),
            Self::Forwarder(lane) => write!(f, "forwarder {lane}"),
        }
    }
}

/// The state of an actor; a lane's is shown to operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Connecting,
    Up,
    Backoff {
        until: Instant,
    },
    Paused,
    /// Given up after repeated crashes.
    Down,
}

impl State {
    /// The name in `/api/status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Backoff { .. } => "backoff",
            Self::Paused => "paused",
            Self::Down => "down",
        }
    }
}

/// An actor as its supervisor sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub child: ChildId,
    pub state: State,
    pub since: Instant,
    pub restarts: u64,
    pub last_error: Option<String>,
    pub broker: BrokerInfo,
}

impl View {
    pub(super) fn new(child: ChildId) -> Self {
        Self {
            child,
            state: State::Connecting,
            since: Instant::now(),
            restarts: 0,
            last_error: None,
            broker: BrokerInfo::default(),
        }
    }

    /// Logs the state, just after it has changed.
    pub(super) fn log(&self) {
        let reason = self.last_error.as_deref().unwrap_or_default();
        match (self.child, self.state) {
            (ChildId::Lane(lane), State::Up) => info!(%lane, "lane is up"),
            (ChildId::Lane(lane), State::Backoff { until }) => {
                let retry_in_ms = (until - self.since).as_millis();
                warn!(%lane, reason, retry_in_ms, "lane is away");
            }
            (ChildId::Lane(lane), State::Paused) => info!(%lane, "lane is paused"),
            (ChildId::Lane(lane), State::Down) => {
                error!(%lane, reason, "lane is given up after repeated crashes");
            }
            (actor, State::Backoff { .. } | State::Down) => {
                error!(%actor, reason, state = self.state.name(), "actor ended");
            }
            (_, State::Connecting | State::Up | State::Paused) => {}
        }
    }
}
