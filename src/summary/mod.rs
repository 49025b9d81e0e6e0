//! `GET /api/status` as a command reads it. A member that an older node does not have is as if it
//! had nothing to tell.

pub mod format;
pub mod history;

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::ledger::{Balance, Quantiles};

/// The status of a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeSummary {
    pub version: String,
    pub node: String,
    pub uptime_s: f64,
    pub draining: bool,
    pub policy: String,
    pub ledger: Balance,
    pub balanced: bool,
    /// The age of the oldest record that waits, in a lane or for one.
    pub oldest_s: Option<f64>,
    pub lanes: Vec<LaneSummary>,
    pub api: ApiSummary,
    /// Empty if there is `api` alone.
    pub apis: BTreeMap<String, ApiSummary>,
    pub spool: Option<SpoolSummary>,
    /// The worst first; `None` if the node does not tell.
    pub warnings: Option<Vec<WarningSummary>>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct LaneSummary {
    pub lane: String,
    pub tag: String,
    pub state: String,
    /// An operator lets it take no new records.
    pub draining: bool,
    pub since_s: f64,
    pub restarts: u64,
    pub last_error: Option<String>,
    pub retry_in_s: Option<f64>,
    pub weight: u32,
    pub share: f64,
    pub score: Option<f64>,
    pub ejected: Option<EjectionSummary>,
    /// The last order but for a weight.
    pub ordered: Option<OrderSummary>,
    pub weight_set: Option<OrderSummary>,
    pub accepted: u64,
    pub delivered: u64,
    pub dead: u64,
    pub in_flight: u64,
    pub redelivered: u64,
    pub kept: u64,
    pub publish_ms: Quantiles,
    pub delivery_ms: Quantiles,
    pub broker: BrokerSummary,
    pub refusing: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EjectionSummary {
    pub retry_in_s: f64,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct OrderSummary {
    pub action: Option<String>,
    pub by: String,
    pub since_s: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct BrokerSummary {
    pub version: Option<String>,
    pub outlives_power_cut: String,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ApiSummary {
    pub url: String,
    pub state: String,
    pub since_s: f64,
    pub last_error: Option<String>,
    pub retry_in_s: Option<f64>,
    pub in_flight: u64,
    pub limit: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SpoolSummary {
    pub bytes: u64,
    pub max: u64,
    pub refuses: bool,
    /// The age of the oldest record that waits.
    pub oldest_s: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct WarningSummary {
    /// `error`, `warning` or `notice`.
    pub level: String,
    /// A lane, or a part of the node.
    pub about: String,
    pub what: String,
    pub remedy: String,
}

impl LaneSummary {
    /// The state for people: see [`shown_state`].
    pub fn shown_state(&self) -> &str {
        shown_state(&self.state, self.draining, self.in_flight)
    }
}

/// The state of a lane for people. One that drains stays up, and is drained once it has nothing left.
pub fn shown_state(state: &str, draining: bool, in_flight: u64) -> &str {
    match (draining && state != "paused", in_flight) {
        (false, _) => state,
        (true, 0) => "drained",
        (true, _) => "draining",
    }
}

impl NodeSummary {
    /// Each API with its name, `[api]` as `default`.
    pub fn all_apis(&self) -> Vec<(&str, &ApiSummary)> {
        if self.apis.is_empty() {
            vec![("default", &self.api)]
        } else {
            let apis = self.apis.iter();
            apis.map(|(name, api)| (name.as_str(), api)).collect()
        }
    }

    /// The warnings, the worst first.
    pub fn all_warnings(&self) -> &[WarningSummary] {
        self.warnings.as_deref().unwrap_or_default()
    }

    /// The worst level of the warnings about this lane.
    pub fn level_of(&self, lane: &str) -> Option<&str> {
        let mut warnings = self.all_warnings().iter();
        let worst = warnings.find(|warning| warning.about == lane);
        worst.map(|warning| warning.level.as_str())
    }
}
