//! The supervised actors as others see them.

use std::fmt;

use tokio::time::Instant;
use tracing::error;

use crate::{lane_id::LaneId, transport::BrokerInfo};

/// The name of a supervised actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildId {
    Router,
    Feeder,
    Retrier,
    Lane(LaneId),
    Forwarder(LaneId),
}

impl fmt::Display for ChildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::Feeder => f.write_str("feeder"),
            Self::Retrier => f.write_str("retrier"),
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
    /// It is away from its broker, and tries to connect.
    pub(super) const fn is_away(self) -> bool {
        matches!(self, Self::Connecting | Self::Backoff { .. })
    }

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
    /// When the state began. An outage is one state, however many attempts to connect it has.
    pub since: Instant,
    /// An operator lets the lane deliver what it has, and take nothing new.
    pub is_draining: bool,
    /// Restarts of an actor that was up, that crashed, or that an operator restarted.
    pub restarts: u64,
    /// Starts. A lane connects at each.
    pub attempts: u64,
    pub last_error: Option<String>,
    pub broker: BrokerInfo,
}

impl View {
    pub(super) fn new(child: ChildId) -> Self {
        Self {
            child,
            state: State::Connecting,
            since: Instant::now(),
            is_draining: false,
            restarts: 0,
            attempts: 0,
            last_error: None,
            broker: BrokerInfo::default(),
        }
    }

    /// A lane that takes records.
    pub fn takes_records(&self) -> bool {
        self.state == State::Up && !self.is_draining
    }

    /// Logs the state, just after it has changed. A lane's outages and the orders to it are logged
    /// elsewhere.
    pub(super) fn log(&self) {
        let reason = self.last_error.as_deref().unwrap_or_default();
        match (self.child, self.state) {
            (ChildId::Lane(lane), State::Down) => {
                error!(%lane, reason, "lane is given up after repeated crashes");
            }
            (ChildId::Lane(_), State::Backoff { .. })
            | (_, State::Connecting | State::Up | State::Paused) => {}
            (actor, State::Backoff { .. } | State::Down) => {
                error!(%actor, reason, state = self.state.name(), "actor ended");
            }
        }
    }
}
