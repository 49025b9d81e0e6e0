//! The columns of the table of lanes. A narrow screen has the first ones by their rank.

use super::state::{NodeView, severity};
use crate::summary::{
    LaneSummary, NodeSummary,
    format::{age, ms, one_line, percent, rate, short_count},
};

/// A column: its title, its width, the rank by which it stays on a narrow screen, its text, and the
/// number by which rows are sorted, the least first.
#[derive(Debug)]
pub struct Column {
    pub title: &'static str,
    pub width: u16,
    /// The least stays longest.
    rank: u8,
    pub is_number: bool,
    text: Text,
    key: Key,
}

impl Column {
    pub fn text(&self, node: &NodeView, status: &NodeSummary, lane: &LaneSummary) -> String {
        (self.text)(node, status, lane)
    }

    pub fn key(&self, node: &NodeView, status: &NodeSummary, lane: &LaneSummary) -> f64 {
        (self.key)(node, status, lane)
    }
}

/// By name: its first letters as a number.
fn alphabetical(text: &str) -> f64 {
    let letters = text.bytes().chain(std::iter::repeat(0)).take(6);
    letters.fold(0.0, |number, letter| number * 256.0 + f64::from(letter))
}

/// The level of the worst warning about the lane.
pub fn level<'s>(status: &'s NodeSummary, lane: &LaneSummary) -> &'s str {
    status.level_of(&lane.lane).unwrap_or_default()
}

/// How fast a counter of the lane grows.
fn pace(node: &NodeView, lane: &LaneSummary, counter: fn(&LaneSummary) -> u64) -> Option<f64> {
    node.history.rate(|status| {
        let lanes = &status.lanes;
        let same = lanes.iter().find(|other| other.lane == lane.lane);
        same.map_or(0, counter)
    })
}

fn paced(node: &NodeView, lane: &LaneSummary, counter: fn(&LaneSummary) -> u64) -> String {
    pace(node, lane, counter).map_or_else(String::new, rate)
}

/// The largest first.
fn down(number: f64) -> f64 {
    -number
}

#[expect(clippy::cast_precision_loss, reason = "no counter reaches 2^52")]
fn count_key(number: u64) -> f64 {
    down(number as f64)
}

/// A quantile; zero is none.
fn quantile(value: f64) -> String {
    if value == 0.0 {
        String::new()
    } else {
        ms(value)
    }
}

fn in_time(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, age)
}

type Text = fn(&NodeView, &NodeSummary, &LaneSummary) -> String;
type Key = fn(&NodeView, &NodeSummary, &LaneSummary) -> f64;

const fn column(
    title: &'static str,
    width: u16,
    rank: u8,
    is_number: bool,
    text: Text,
    key: Key,
) -> Column {
    Column {
        title,
        width,
        rank,
        is_number,
        text,
        key,
    }
}

/// From left to right.
static ALL: [Column; 18] = [
    column(
        "warn",
        5,
        0,
        false,
        |_, status, lane| match level(status, lane) {
            "error" => "ERROR".into(),
            "warning" => "WARN".into(),
            "notice" => "note".into(),
            _ => String::new(),
        },
        |_, status, lane| f64::from(severity(level(status, lane))),
    ),
    column(
        "node",
        16,
        2,
        false,
        |node, _, _| node.address(),
        |node, _, _| alphabetical(&node.address()),
    ),
    column(
        "lane",
        8,
        0,
        false,
        |_, _, lane| one_line(&lane.lane),
        |_, _, lane| alphabetical(&lane.lane),
    ),
    column(
        "state",
        10,
        0,
        false,
        |_, _, lane| one_line(lane.shown_state()),
        |_, _, lane| alphabetical(lane.shown_state()),
    ),
    column(
        "for",
        6,
        5,
        true,
        |_, _, lane| age(lane.since_s),
        |_, _, lane| lane.since_s,
    ),
    column(
        "next try",
        8,
        8,
        true,
        |_, _, lane| in_time(lane.retry_in_s),
        |_, _, lane| lane.retry_in_s.unwrap_or(f64::INFINITY),
    ),
    column(
        "in",
        8,
        1,
        true,
        |node, _, lane| paced(node, lane, |lane| lane.accepted),
        |node, _, lane| down(pace(node, lane, |lane| lane.accepted).unwrap_or_default()),
    ),
    column(
        "out",
        8,
        1,
        true,
        |node, _, lane| paced(node, lane, |lane| lane.delivered),
        |node, _, lane| down(pace(node, lane, |lane| lane.delivered).unwrap_or_default()),
    ),
    column(
        "in flight",
        9,
        3,
        true,
        |_, _, lane| short_count(lane.in_flight),
        |_, _, lane| count_key(lane.in_flight),
    ),
    column(
        "pub p50",
        7,
        10,
        true,
        |_, _, lane| quantile(lane.publish_ms.p50),
        |_, _, lane| down(lane.publish_ms.p50),
    ),
    column(
        "pub p99",
        7,
        9,
        true,
        |_, _, lane| quantile(lane.publish_ms.p99),
        |_, _, lane| down(lane.publish_ms.p99),
    ),
    column(
        "p50 ms",
        7,
        6,
        true,
        |_, _, lane| quantile(lane.delivery_ms.p50),
        |_, _, lane| down(lane.delivery_ms.p50),
    ),
    column(
        "p99 ms",
        7,
        4,
        true,
        |_, _, lane| quantile(lane.delivery_ms.p99),
        |_, _, lane| down(lane.delivery_ms.p99),
    ),
    column(
        "share",
        5,
        11,
        true,
        |_, _, lane| format!("{} %", percent(lane.share)),
        |_, _, lane| down(lane.share),
    ),
    column(
        "weight",
        6,
        13,
        true,
        |_, _, lane| lane.weight.to_string(),
        |_, _, lane| down(lane.weight.into()),
    ),
    column(
        "restarts",
        8,
        12,
        true,
        |_, _, lane| lane.restarts.to_string(),
        |_, _, lane| count_key(lane.restarts),
    ),
    column(
        "dead",
        9,
        7,
        true,
        |_, _, lane| short_count(lane.dead),
        |_, _, lane| count_key(lane.dead),
    ),
    column(
        "why",
        30,
        14,
        false,
        |_, status, lane| {
            let mut about = status.all_warnings().iter();
            let worst = about.find(|warning| warning.about == lane.lane);
            worst.map_or_else(String::new, |warning| one_line(&warning.what))
        },
        |_, status, lane| f64::from(severity(level(status, lane))),
    ),
];

/// The column that rows are sorted by at first.
pub fn first() -> &'static Column {
    &ALL[0]
}

/// The column at this place from the left.
pub fn at(at: usize) -> Option<&'static Column> {
    ALL.get(at)
}

/// The next column to sort by.
pub fn after(column: &Column) -> &'static Column {
    let at = ALL.iter().position(|other| other.title == column.title);
    &ALL[at.map_or(0, |at| (at + 1) % ALL.len())]
}

/// The columns that a screen has room for. One node needs no name in each row.
pub fn that_fit(width: u16, is_one_node: bool) -> Vec<&'static Column> {
    let mut columns: Vec<_> = ALL
        .iter()
        .filter(|column| !is_one_node || column.title != "node")
        .collect();
    let needed = |columns: &[&Column]| columns.iter().map(|column| column.width + 1).sum::<u16>();
    while needed(&columns) > width + 1 && columns.len() > 1 {
        let ranks = columns.iter().enumerate();
        let Some((at, _)) = ranks.max_by_key(|(_, column)| column.rank) else {
            break;
        };
        columns.remove(at);
    }
    columns
}
