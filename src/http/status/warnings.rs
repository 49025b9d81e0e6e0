//! What is wrong at the node, in words, each with what to do about it.
//!
//! A text holds nothing that changes with every status, such as an age: a page that reads warnings
//! aloud reads each one once.

mod slow;

use schemars::JsonSchema;
use serde::Serialize;

use super::{
    LaneStatus, Status,
    apis::{ApiStatus, NamedApiStatus},
};
use crate::{
    actors::supervisor::Action, config::Ack, control::ReloadOutcome, summary::format::age,
    transport::Durability,
};

/// A disk that is full sooner is worth a warning.
const FULL_SOON_S: f64 = 3_600.0;

/// How bad a warning is, as the levels of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WarningLevel {
    /// A record needs a person.
    Error,
    /// Nothing is lost, and something is wrong.
    Warning,
    /// An operator's wish, or a weakness that is covered.
    Notice,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct NodeWarning {
    level: WarningLevel,
    /// The lane, or the part of the node.
    about: String,
    what: String,
    remedy: String,
}

/// The warnings of a status, the worst first.
pub fn warnings(status: &Status<'_>, ack: Ack) -> Vec<NodeWarning> {
    let mut found = WarningList::default();
    found.ledger(status);
    found.disk(status);
    // One API that is down stops all lanes.
    if status.apis.is_empty() {
        found.api("api", &status.api);
    }
    for (name, api) in &status.apis {
        found.named_api(&format!("api {name}"), api);
    }
    for lane in &status.lanes {
        found.lane(lane);
    }
    slow::add(&mut found, status);
    if !status.lanes.iter().any(|lane| lane.takes_records) {
        let what = "No lane takes records: new ones wait on disk";
        found.warn("lanes", what, "Mend or resume a lane");
    }
    found.node(status);
    // The last of their level: they are as they were when the node was set up.
    for lane in status.lanes.iter().filter(|lane| lane.state == "up") {
        found.broker(lane, ack);
    }
    let WarningList(mut list) = found;
    // Stable: those of a level stay in their order.
    list.sort_by_key(|warning| warning.level);
    list
}

#[derive(Default)]
struct WarningList(Vec<NodeWarning>);

impl WarningList {
    fn add(&mut self, level: WarningLevel, about: &str, what: impl Into<String>, remedy: &str) {
        self.0.push(NodeWarning {
            level,
            about: about.into(),
            what: what.into(),
            remedy: remedy.into(),
        });
    }

    fn warn(&mut self, about: &str, what: impl Into<String>, remedy: &str) {
        self.add(WarningLevel::Warning, about, what, remedy);
    }

    fn notice(&mut self, about: &str, what: impl Into<String>, remedy: &str) {
        self.add(WarningLevel::Notice, about, what, remedy);
    }

    fn ledger(&mut self, status: &Status<'_>) {
        let mut error = |about, what: &str, remedy| {
            self.add(WarningLevel::Error, about, what, remedy);
        };
        if status.ledger.missing > 0 {
            let lanes = status.lanes.iter().filter(|lane| lane.missing > 0);
            let lanes: Vec<_> = lanes.map(|lane| lane.lane.name()).collect();
            let brokers = match &*lanes.join(", ") {
                "" => "a broker".into(),
                lanes => format!("the broker of {lanes}"),
            };
            let what =
                format!("Records are missing: {brokers} had confirmed them, and has them no more");
            error(
                "ledger",
                &what,
                "Look who has purged or deleted there; the log has when and how many",
            );
        } else if !status.balanced {
            let what = "The ledger does not balance";
            error(
                "ledger",
                what,
                "Report it as a bug, with the line of the log",
            );
        }
        if status.ledger.dead > 0 {
            let what = "There are dead letters: the API has refused records, or they were given up";
            let remedy = "Read why (waypost dead list), mend it, then replay or drop them";
            error("dead letters", what, remedy);
        }
        if status.unclaimed > 0 {
            let what = "The disk has records for an API that is not configured any more";
            self.warn("disk", what, "Configure it again and restart the node");
        }
        // The ledger counts those that wait for a place, or for their API, as parked too.
        let held: u64 = status.apis.values().map(|api| api.held).sum();
        if status.ledger.parked > held + status.unclaimed {
            let what = "Records are parked: the API fails at them while it takes others";
            let remedy = "Read its answers (waypost dead list --parked), and mend the API";
            self.notice("parked", what, remedy);
        }
    }

    fn disk(&mut self, status: &Status<'_>) {
        let disk = &status.spool;
        let remedy = "Mend what its records wait for, or raise [spool].max";
        if disk.refuses {
            let what = "The disk takes no records: it is full, stalls, or fails";
            self.warn("disk", what, "The log says why; free or repair the disk");
        } else if let Some(full) = disk.full_in_s.filter(|full| *full <= FULL_SOON_S) {
            let what = format!("At this pace it is full in {}", age(full));
            self.warn("disk", what, remedy);
        } else if disk.bytes / 9 >= disk.max / 10 {
            let what = "More than nine tenths of [spool].max are in use";
            self.warn("disk", what, remedy);
        }
    }

    fn lane(&mut self, lane: &LaneStatus<'_>) {
        let name = lane.lane.name();
        let ordered = lane.ordered.as_ref();
        let by = ordered.map_or("an operator", |order| &order.by);
        match lane.state {
            "down" => {
                let why = lane.last_error.unwrap_or("the log says why");
                let what = format!("Given up after repeated crashes: {why}");
                self.warn(name, what, "Restart the lane; report the crash as a bug");
            }
            "paused" => self.notice(name, format!("Paused by {by}"), "Resume the lane"),
            "up" => {}
            // Not before the first attempt has failed.
            _ => {
                if let Some(why) = lane.last_error {
                    let what = format!("Away, and tries again by itself: {why}");
                    self.warn(
                        name,
                        what,
                        "Mend what it names; its records go by other lanes or wait on disk",
                    );
                }
            }
        }
        if lane.draining && lane.state != "paused" {
            // A restart ends no drain.
            let by = match ordered.and_then(|order| order.action) {
                Some(Action::Drain) => by,
                _ => "an operator",
            };
            let what = format!("Drained by {by}: it takes no new records");
            self.notice(name, what, "Resume the lane");
        }
        if let Some(reason) = &lane.refusing {
            let what = format!("The broker refuses records: {reason}");
            self.warn(name, what, "Make room or raise the limit on the broker");
        }
        if let Some(reason) = lane.routing.ejection_reason() {
            let what = format!("Ejected, so other lanes take its records: {reason}");
            self.warn(name, what, "Mend its broker; the lane comes back by itself");
        }
    }

    fn broker(&mut self, lane: &LaneStatus<'_>, ack: Ack) {
        let name = lane.lane.name();
        let is_durable = lane.broker.outlives_power_cut == Durability::Yes;
        for warning in &lane.broker.warnings {
            let remedy = "docs/operate.md has the remedy of each";
            self.notice(name, warning.as_str(), remedy);
        }
        match ack {
            Ack::Lane if !is_durable => {
                let what = "A power cut of the broker may take records that have their 2xx";
                self.warn(
                    name,
                    what,
                    "Set [ingest].ack = \"durable\", or mend the broker",
                );
            }
            Ack::Durable if !is_durable && lane.broker.warnings.is_empty() => {
                let what = "Its confirm may not outlive a power cut: copies on this disk cover it";
                self.notice(name, what, "None is needed");
            }
            _ => {}
        }
    }

    fn api(&mut self, about: &str, api: &ApiStatus<'_>) {
        if api.state != "up" {
            let why = api.last_error.as_deref().unwrap_or("the log says why");
            let what = format!("{} is down, its records wait: {why}", api.url);
            self.warn(about, what, "Mend the API; the node tries it by itself");
        }
    }

    fn named_api(&mut self, about: &str, api: &NamedApiStatus<'_>) {
        self.api(about, &api.api);
        if api.refuses {
            let what = "New records for it are refused: its room on disk is nearly full";
            self.warn(about, what, "Mend the API, or raise its spool_max");
        }
    }

    fn node(&mut self, status: &Status<'_>) {
        if let Some(reload) = &status.reload {
            if reload.outcome == ReloadOutcome::Rejected {
                let reasons: Vec<_> = reload.reasons.iter().map(ToString::to_string).collect();
                let what = format!("The last reload was rejected: {}", reasons.join("; "));
                self.warn("configuration", what, "Correct it, and reload again");
            }
            if !reload.needs_restart.is_empty() {
                let keys = reload.needs_restart.join(", ");
                let what = format!("Settings that wait for the next start: {keys}");
                self.notice("configuration", what, "Restart the node when it suits");
            }
        }
        for file in &status.files {
            if let Some(why) = &file.last_error {
                let what = format!("{} cannot be used, its last content stays: {why}", file.key);
                self.warn(
                    "files",
                    what,
                    "Mend the file; it is read again every second",
                );
            }
        }
        if status.log.refuses {
            let what = "Lines of the log are lost: the standard error does not take them";
            let remedy = "Mend what reads it (a pipe, a terminal), or free the disk under it";
            self.warn("log", what, remedy);
        }
        if status.draining {
            self.notice("node", "The node is stopping", "None is needed");
        }
    }
}

#[cfg(test)]
mod tests;
