//! The pages of `top` that are read and left, as lines: a lane, the dead letters, the keys.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use super::state::{NodeView, TopState};
use crate::{
    cli::dead::listed,
    ledger::Quantiles,
    summary::{
        LaneSummary, NodeSummary, OrderSummary, WarningSummary,
        format::{age, count, ms, one_line, percent, wrapped},
    },
};

const KEYS: [(&str, &str); 15] = [
    ("Up, Down, k, j", "choose a lane, or scroll a page"),
    ("Enter", "all about the lane that is chosen; Esc goes back"),
    (
        "/",
        "only rows with a text: of node, lane, state, error or warning",
    ),
    ("Esc", "remove the filter"),
    ("s", "sort by the next column; v or ^ marks it"),
    (
        "1 to 9",
        "sort by a column: 1 warning, 2 node, 3 lane, 4 state, ...",
    ),
    ("r", "reverse the order"),
    ("p", "pause the lane, or resume it; asks first"),
    ("R", "restart the lane; asks first"),
    ("d", "the dead letters of the node"),
    ("w", "all warnings of all nodes"),
    ("?", "this page"),
    ("q, Ctrl-C", "quit"),
    ("", ""),
    (
        "warn",
        "ERROR: a record needs a person; WARN: nothing is lost yet",
    ),
];

const WORDS: [&str; 8] = [
    "note   an operator's wish, or a weakness that is covered",
    "for    how long the lane has been in its state",
    "in     records that the lane takes, by the second",
    "out    records that the API has taken from the lane, by the second",
    "pub    p50 and p99 of a publish with its confirm, in ms",
    "p50    and p99 from accepted to delivered, in ms",
    "share  of the records that the router gives to the lane",
    "why    the worst warning about the lane",
];

pub fn help() -> Vec<String> {
    let keys = KEYS.iter();
    let keys = keys.map(|(key, does)| format!("{key:<15} {does}").trim_end().to_owned());
    let words = WORDS.iter().map(|word| (*word).to_owned());
    keys.chain(words).collect()
}

/// All about the lane that is chosen.
pub fn details(state: &TopState, width: u16) -> Vec<String> {
    let width = usize::from(width.saturating_sub(2));
    let chosen = state.chosen.as_ref();
    let node = chosen.and_then(|key| state.nodes.get(key.node));
    let status = node.and_then(|node| node.history.last());
    let found = status.zip(chosen).and_then(|(status, key)| {
        let mut lanes = status.lanes.iter();
        let lane = lanes.find(|lane| lane.lane == key.lane)?;
        Some((status, lane))
    });
    let (Some(node), Some((status, lane))) = (node, found) else {
        return vec!["The node has this lane no more".into()];
    };
    let mut lines = vec![format!(
        "Lane {} of {}, tag {}",
        one_line(&lane.lane),
        node.name(),
        one_line(&lane.tag)
    )];
    lines.push(String::new());
    lines.extend(warnings_of(status, lane, width));
    lines.push(String::new());
    for (name, value) in members(lane) {
        lines.extend(wrapped(
            &format!("{name:<15}"),
            &" ".repeat(15),
            &value,
            width,
        ));
    }
    let changes = changes(node, lane);
    if !changes.is_empty() {
        lines.extend([String::new(), "Last changes, the newest first".to_owned()]);
        let changes = changes.iter();
        lines.extend(changes.flat_map(|change| wrapped("  ", "    ", change, width)));
    }
    lines
}

/// All warnings of all nodes.
pub fn warnings(state: &TopState, width: u16) -> Vec<String> {
    let width = usize::from(width.saturating_sub(2));
    let lines = state.nodes.iter().flat_map(|node| {
        let name = format!("{} ({})", node.name(), node.address());
        let all = node.warnings();
        let told = all.iter().flat_map(|warning| {
            let about = format!("{}: ", one_line(&warning.about));
            in_lines(warning, &about, width)
        });
        let told: Vec<_> = told.collect();
        let nothing = told.is_empty().then(|| "Nothing is wrong.".to_owned());
        [name].into_iter().chain(told).chain(nothing)
    });
    lines.collect()
}

/// A warning and its remedy.
fn in_lines(warning: &WarningSummary, about: &str, width: usize) -> Vec<String> {
    let first = format!("{:<8}{about}", warning.level.to_uppercase());
    let what = wrapped(&first, "        ", &one_line(&warning.what), width);
    let remedy = wrapped("     -> ", "        ", &one_line(&warning.remedy), width);
    [what, remedy].concat()
}

fn warnings_of(status: &NodeSummary, lane: &LaneSummary, width: usize) -> Vec<String> {
    let about = status.all_warnings().iter();
    let about = about.filter(|warning| warning.about == lane.lane);
    let lines: Vec<_> = about
        .flat_map(|warning| in_lines(warning, "", width))
        .collect();
    if lines.is_empty() {
        vec!["No warnings about this lane".into()]
    } else {
        lines
    }
}

fn order(order: &OrderSummary) -> String {
    let action = order.action.as_deref().unwrap_or("weight");
    let (by, ago) = (one_line(&order.by), age(order.since_s));
    format!("{} by {by}, {ago} ago", one_line(action))
}

/// The facts of a lane, by name.
fn members(lane: &LaneSummary) -> Vec<(&'static str, String)> {
    let quantiles = |of: &Quantiles| format!("p50 {}, p99 {} ms", ms(of.p50), ms(of.p99));
    let measured = |of: &Quantiles| (of.p50 > 0.0).then(|| quantiles(of));
    let broker = &lane.broker;
    let version = broker.version.as_deref().map(one_line);
    let durability = one_line(&broker.outlives_power_cut);
    let members = [
        (
            "state",
            Some(format!(
                "{} for {}",
                one_line(lane.shown_state()),
                age(lane.since_s)
            )),
        ),
        ("last error", lane.last_error.as_deref().map(one_line)),
        ("next try in", lane.retry_in_s.map(age)),
        ("refusing", lane.refusing.as_deref().map(one_line)),
        (
            "ejected",
            lane.ejected.as_ref().map(|ejected| {
                let back = age(ejected.retry_in_s);
                format!("{}; next try in {back}", one_line(&ejected.reason))
            }),
        ),
        ("last order", lane.ordered.as_ref().map(order)),
        ("weight set", lane.weight_set.as_ref().map(order)),
        ("accepted", Some(count(lane.accepted))),
        ("delivered", Some(count(lane.delivered))),
        ("in flight", Some(count(lane.in_flight))),
        ("dead", Some(count(lane.dead))),
        ("redelivered", Some(count(lane.redelivered))),
        ("copies on disk", Some(count(lane.kept))),
        ("publish", measured(&lane.publish_ms)),
        ("delivery", measured(&lane.delivery_ms)),
        (
            "share",
            Some(format!("{} %, weight {}", percent(lane.share), lane.weight)),
        ),
        ("score", lane.score.map(|score| format!("{score:.2}"))),
        ("restarts", Some(count(lane.restarts))),
        ("broker", version),
        (
            "a power cut",
            Some(format!("what it confirms outlives one: {durability}")),
        ),
    ];
    let members = members.into_iter();
    members
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

/// The last changes of a lane in words.
fn changes(node: &NodeView, lane: &LaneSummary) -> Vec<String> {
    let is_about = |change: &&Value| {
        let lanes = change["lanes"].as_array();
        change["lane"] == *lane.lane
            || lanes.is_some_and(|lanes| lanes.iter().any(|one| *one == *lane.lane))
    };
    node.changes.iter().filter(is_about).map(told).collect()
}

fn told(change: &Value) -> String {
    let at_ms = change["at_ms"].as_u64().unwrap_or_default();
    let at = UNIX_EPOCH + Duration::from_millis(at_ms);
    let members = change.as_object().into_iter().flatten();
    let words = members.filter_map(|(name, value)| match value {
        _ if matches!(name.as_str(), "at_ms" | "what" | "lane" | "lanes") => None,
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) => Some(name.replace('_', " ")),
        Value::String(text) => Some(format!("{} {}", name.replace('_', " "), one_line(text))),
        value => Some(format!("{} {value}", name.replace('_', " "))),
    });
    let words: Vec<_> = words.collect();
    let what = one_line(change["what"].as_str().unwrap_or_default());
    let at = humantime::format_rfc3339_seconds(at);
    format!("{at} {what}: {}", words.join(", "))
}

/// The dead letters of the node `of`: the title, and the lines.
pub fn letters(
    state: &TopState,
    of: usize,
    shown: Option<&Result<Value, String>>,
    width: u16,
) -> (String, Vec<String>) {
    let width = usize::from(width.saturating_sub(2));
    let node = state.nodes.get(of);
    let name = node.map(NodeView::name).unwrap_or_default();
    let lines = match shown {
        None => vec!["Asking the node".into()],
        Some(Ok(answer)) => {
            let table = listed(answer, false, Some(width));
            let more = "`waypost dead` shows more, replays and drops them.";
            let lines = table.lines().map(str::to_owned);
            lines.chain([String::new(), more.into()]).collect()
        }
        Some(Err(why)) => wrapped("", "", &one_line(why), width),
    };
    (format!(" Dead letters of {name} "), lines)
}
