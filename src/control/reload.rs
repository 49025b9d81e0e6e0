//! The configuration is read again while the node runs. It is applied as far as a running node can,
//! or rejected as a whole.

use std::{mem, sync::Arc};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use tracing::{error, info, warn};

use super::Control;
use crate::{
    changes::Change,
    clock::{age, unix_us},
    config::{Config, ConfigError},
    file_work::{FILE_PATIENCE, with_a_file},
    lane_id::LaneId,
};

/// Reads the sources of the configuration, as at the start.
pub type ConfigSource = Arc<dyn Fn() -> Result<Config, Vec<ConfigError>> + Send + Sync>;

/// The result of a reload, in `GET /api/status` and in the answer to `POST /api/reload`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ReloadReport {
    /// The operator's address, or the signal.
    pub by: String,
    #[serde(rename = "since_s", serialize_with = "seconds_since")]
    #[schemars(with = "f64")]
    pub at_us: u64,
    pub outcome: ReloadOutcome,
    /// The keys whose new values are in effect.
    pub applied: Vec<String>,
    /// The keys whose values in the last valid configuration take effect at the next start.
    pub needs_restart: Vec<String>,
    /// All mistakes of a configuration that was rejected.
    pub reasons: Vec<ConfigError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReloadOutcome {
    Applied,
    /// Nothing has changed.
    Rejected,
}

impl ReloadOutcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Rejected => "rejected",
        }
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn seconds_since<S: Serializer>(at_us: &u64, output: S) -> Result<S::Ok, S::Error> {
    output.serialize_f64(age(*at_us).as_secs_f64())
}

impl Control {
    /// The last reload, if there was one.
    pub fn last_reload(&self) -> Option<ReloadReport> {
        self.0.last_reload.lock().clone()
    }

    /// Reads the configuration again. Applies what a running node can take, if all of it is valid.
    pub async fn reload(&self, by: &str) -> ReloadReport {
        let mut config = self.0.config.lock().await;
        let source = Arc::clone(&self.0.source);
        let read = with_a_file(move || source()).await.unwrap_or_else(|| {
            Err(vec![ConfigError {
                place: "configuration".into(),
                key: String::new(),
                what: format!("is not read within {FILE_PATIENCE:?}"),
            }])
        });
        let mut report = ReloadReport {
            by: by.into(),
            at_us: unix_us(),
            outcome: ReloadOutcome::Rejected,
            applied: Vec::new(),
            needs_restart: Vec::new(),
            reasons: Vec::new(),
        };
        match read {
            Ok(new) => {
                let in_effect = config.with_run_time_settings(&new);
                report.outcome = ReloadOutcome::Applied;
                report.applied = config.changes(&in_effect);
                report.needs_restart = in_effect.changes(&new);
                let old = mem::replace(&mut *config, in_effect);
                self.apply(&old, &config).await;
            }
            Err(reasons) => {
                report.reasons = reasons;
                let last = self.last_reload();
                report.needs_restart = last.map(|last| last.needs_restart).unwrap_or_default();
            }
        }
        report.log();
        self.0.change_log.add(Change::Reload {
            outcome: report.outcome.name(),
            by,
        });
        *self.0.last_reload.lock() = Some(report.clone());
        report
    }

    /// Puts the run-time settings of `new` into effect. A weight that has changed replaces the one
    /// that an operator has set.
    async fn apply(&self, old: &Config, new: &Config) {
        let changes = new.routes != old.routes || new.router != old.router;
        if changes {
            match new.routes() {
                Ok(routes) => {
                    self.0.scores.set_measures(routes.measure());
                    self.0.routing.replace(routes);
                }
                // `with_run_time_settings` takes no rules that have mistakes.
                Err(mistakes) => {
                    let mistakes = mistakes.iter().map(|mistake| &*mistake.what);
                    let reason = mistakes.collect::<Vec<_>>().join("; ");
                    error!(reason, "the rules before stay in effect");
                }
            }
        }
        let mut replaces_orders = false;
        for lane in LaneId::ALL {
            if let Some(weight) = new.lanes.weight(lane)
                && old.lanes.weight(lane) != Some(weight)
            {
                self.0.scores.set_weight(lane, weight);
                replaces_orders |= self.0.orders.forget_weight(lane);
            }
        }
        if replaces_orders {
            self.0.orders.keep().await;
        } else {
            self.0.orders.keep_again().await;
        }
    }
}

impl ReloadReport {
    fn log(&self) {
        let Self { by, .. } = self;
        let (applied, needs_restart) = (self.applied.join(", "), self.needs_restart.join(", "));
        match self.outcome {
            ReloadOutcome::Applied if needs_restart.is_empty() => {
                info!(by, applied, "the configuration is reloaded");
            }
            ReloadOutcome::Applied => warn!(
                by,
                applied,
                needs_restart,
                "the configuration is reloaded, but for what needs a restart"
            ),
            ReloadOutcome::Rejected => {
                let reasons: Vec<_> = self.reasons.iter().map(ToString::to_string).collect();
                let reason = reasons.join("; ");
                warn!(
                    by,
                    reason, "the configuration is rejected, and nothing has changed"
                );
            }
        }
    }
}
