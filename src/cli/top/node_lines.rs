//! The lines about a node as a whole, below its lanes.

use bytesize::ByteSize;
use ratatui::{style::Style, text::Line};

use super::{
    state::{NodeView, TopState},
    theme::QUIET,
};
use crate::summary::format::{age, count, one_line, wrapped};

/// Ledger, what waits, and the APIs of the node that is chosen.
pub fn node_lines(state: &TopState, width: u16) -> Vec<Line<'static>> {
    let Some(node) = state.nodes.get(state.chosen_node()) else {
        return Vec::new();
    };
    let Some(status) = node.history.last() else {
        return Vec::new();
    };
    let ledger = &status.ledger;
    let parts = [
        ("delivered", ledger.delivered),
        ("handed over", ledger.handed_over),
        ("dead", ledger.dead),
        ("dropped", ledger.dropped),
        ("on disk", ledger.spooled),
        ("parked", ledger.parked),
        ("in flight", ledger.in_flight),
        ("MISSING", ledger.missing),
    ];
    // Zeros say nothing in a sum.
    let parts = parts.into_iter().enumerate();
    let parts = parts.filter(|(at, (_, number))| *at == 0 || *number > 0);
    let parts: Vec<_> = parts
        .map(|(_, (name, number))| format!("{} {name}", count(number)))
        .collect();
    let balance = if status.balanced {
        ""
    } else {
        "; it did NOT balance at rest"
    };
    let came = format!(
        "{} accepted + {} recovered = {}{balance}",
        count(ledger.accepted),
        count(ledger.recovered),
        parts.join(" + ")
    );
    let mut lines = wrapped("Ledger   ", "         ", &came, width.into());
    lines.extend(wrapped(
        "Waiting  ",
        "         ",
        &waiting(node),
        width.into(),
    ));
    for (name, api) in status.all_apis() {
        let is_down = api.state != "up";
        let why = api.last_error.as_deref().filter(|_| is_down).map(one_line);
        let next = api.retry_in_s.filter(|_| is_down);
        let told = [
            Some(format!("{} for {}", one_line(&api.state), age(api.since_s))),
            next.map(|seconds| format!("next try in {}", age(seconds))),
            Some(format!(
                "{} of {} POSTs in flight",
                count(api.in_flight),
                count(api.limit)
            )),
            Some(one_line(&api.url)),
            why,
        ];
        let told: Vec<_> = told.into_iter().flatten().collect();
        let first = if name == "default" {
            "API      ".into()
        } else {
            format!("API {}: ", one_line(name))
        };
        lines.extend(wrapped(&first, "         ", &told.join(", "), width.into()));
    }
    let is_old = node.lost.is_some();
    let style = if is_old { QUIET } else { Style::new() };
    let rule = Line::styled("-".repeat(width.into()), QUIET);
    let lines = lines.into_iter().map(|line| Line::styled(line, style));
    [rule].into_iter().chain(lines).collect()
}

/// The waiting records, since when they wait, and where that leads.
fn waiting(node: &NodeView) -> String {
    let Some(status) = node.history.last() else {
        return String::new();
    };
    let ledger = &status.ledger;
    let spooled = node.history.trend(|status| status.ledger.spooled);
    let parked = node.history.trend(|status| status.ledger.parked);
    let with = |number: u64, name: &str, trend: String| {
        let trend = if number == 0 || trend.is_empty() {
            String::new()
        } else {
            format!(" ({trend})")
        };
        format!("{} {name}{trend}", count(number))
    };
    let disk = status.spool.as_ref();
    let oldest = status.oldest_s.or_else(|| disk?.oldest_s);
    let told = [
        Some(with(ledger.spooled, "on disk", spooled)),
        Some(with(ledger.parked, "parked", parked)),
        oldest.map(|seconds| format!("the oldest was accepted {} ago", age(seconds))),
        disk.map(|disk| {
            format!(
                "{} of {} of disk in use",
                ByteSize(disk.bytes),
                ByteSize(disk.max)
            )
        }),
    ];
    told.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
