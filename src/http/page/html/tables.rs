//! The tables of the lanes and of the APIs. On a narrow screen each row is a card.

use maud::{Markup, html};

use super::{StatusPage, charts::sparkline, rate, tools::orders_to};
use crate::http::page::format::Format;

/// A column: its title, and the label on a card.
type TableColumn = (&'static str, &'static str);

/// Behind name and state.
const LANES: [TableColumn; 15] = [
    ("since", "since"),
    ("next try", "next try"),
    ("in", "records in"),
    ("out", "records out"),
    ("in flight", "in flight"),
    ("publish p50", "publish p50"),
    ("p99", "publish p99"),
    ("over time", "publish times"),
    ("delivery p50", "delivery p50"),
    ("p99", "delivery p99"),
    ("over time", "delivery times"),
    ("share", "share"),
    ("weight", "weight"),
    ("score", "score"),
    ("restarts", "restarts"),
];
/// The same of an API: the member of each, and where the node has it if there is one API alone.
const APIS: [(&str, &str, &str, Format); 9] = [
    ("since", "since_s", "/api/since_s", Format::Time),
    ("next try", "retry_in_s", "/api/retry_in_s", Format::Time),
    ("in flight", "in_flight", "/api/in_flight", Format::Count),
    ("limit", "limit", "/api/limit", Format::Count),
    (
        "a POST takes",
        "post_ms",
        "/api/post_ms",
        Format::Milliseconds,
    ),
    // One API alone parks what it does not take.
    ("held", "held", "/api/held", Format::Count),
    ("parked", "parked", "/ledger/parked", Format::Count),
    ("dead", "dead", "/ledger/dead", Format::Count),
    ("on disk", "disk_bytes", "/spool/bytes", Format::Bytes),
];

/// The head of a table.
fn titles<'t>(name: &str, others: impl Iterator<Item = &'t str>) -> Markup {
    html! {
        thead role="rowgroup" {
            tr role="row" {
                @for title in [name, "state"] {
                    th.name role="columnheader" scope="col" { (title) }
                }
                @for title in others {
                    th.chart[title == "over time"] role="columnheader" scope="col" { (title) }
                }
            }
        }
    }
}

impl StatusPage<'_> {
    pub(super) fn lanes(&self) -> Markup {
        html! {
            section aria-labelledby="lanes-title" {
                div.title {
                    h2 id="lanes-title" { "Lanes" }
                    @if !self.read_only { (orders_to(None)) }
                }
                table.wide role="table" aria-labelledby="lanes-title" {
                    (titles("lane", LANES.iter().map(|(title, _)| *title)))
                    @for (at, name) in self.lane_names() {
                        tbody role="rowgroup" data-about=(name) data-level=(self.warned(&name)) {
                            (self.lane(&at, &name))
                            tr.note role="row" {
                                td.note role="cell" colspan=(LANES.len() + 2) {
                                    div.note {
                                        span.label { "last error " }
                                        (self.long(&format!("{at}/last_error")))
                                        @if !self.read_only { (orders_to(Some(&name))) }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn lane(&self, at: &str, name: &str) -> Markup {
        let value = |member: &str, format| self.value(&format!("{at}/{member}"), format);
        let recent = |member: &str| self.recent(&format!("{at}/{member}"), Format::Milliseconds);
        let cells = [
            value("since_s", Format::Time),
            value("retry_in_s", Format::Time),
            rate(&format!("{at}/accepted")),
            rate(&format!("{at}/delivered")),
            value("in_flight", Format::Count),
            recent("publish_ms/p50"),
            recent("publish_ms/p99"),
            sparkline(name, at, "publish"),
            recent("delivery_ms/p50"),
            recent("delivery_ms/p99"),
            sparkline(name, at, "delivery"),
            value("share", Format::Percent),
            value("weight", Format::Count),
            value("score", Format::Score),
            value("restarts", Format::Count),
        ];
        html! {
            tr role="row" {
                (row_head(name, &self.lane_state(at)))
                @for ((_, label), cell) in LANES.iter().zip(cells) {
                    td role="cell" data-label=(label) { (cell) }
                }
            }
        }
    }

    pub(super) fn apis(&self) -> Markup {
        html! {
            section aria-labelledby="apis-title" {
                h2 id="apis-title" { "APIs" }
                table.wide role="table" aria-labelledby="apis-title" {
                    (titles("API", APIS.iter().map(|(title, ..)| *title)))
                    @for (at, name) in self.api_names() {
                        tbody role="rowgroup" {
                            tr role="row" {
                                (row_head(name, &self.state(&format!("{at}/state"))))
                                @for (label, member, only, format) in APIS {
                                    td role="cell" data-label=(label) {
                                        @if at == "/api" { (self.value(only, format)) }
                                        @else { (self.value(&format!("{at}/{member}"), format)) }
                                    }
                                }
                            }
                            tr.note role="row" {
                                td.note role="cell" colspan=(APIS.len() + 2) {
                                    div.note {
                                        span.url { (self.long(&format!("{at}/url"))) }
                                        span.label { "last error " }
                                        (self.long(&format!("{at}/last_error")))
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Name and state.
fn row_head(name: &str, state: &Markup) -> Markup {
    html! {
        th.name role="rowheader" scope="row" { (name) }
        td.name role="cell" data-label="state" { (state) }
    }
}
