//! The tables of the lanes and of the APIs. On a narrow screen each row is a card.

use maud::{Markup, html};

use super::{StatusPage, rate, tools::orders_to};
use crate::http::page::format::Format;

/// A column: its title, and the label on a card.
type Column = (&'static str, &'static str);

/// Behind name and state.
const LANES: [Column; 15] = [
    ("since", "since"),
    ("next try", "next try"),
    ("in", "records in"),
    ("out", "records out"),
    ("in flight", "in flight"),
    ("publish p50", "publish p50"),
    ("p99", "publish p99"),
    ("over time", "publish over time"),
    ("delivery p50", "delivery p50"),
    ("p99", "delivery p99"),
    ("over time", "delivery over time"),
    ("share", "share"),
    ("weight", "weight"),
    ("score", "score"),
    ("restarts", "restarts"),
];
/// The same of an API, with the member of each.
const APIS: [(&str, &str, Format); 7] = [
    ("since", "since_s", Format::Time),
    ("next try", "retry_in_s", Format::Time),
    ("in flight", "in_flight", Format::Count),
    ("limit", "limit", Format::Count),
    ("held", "held", Format::Count),
    ("parked", "parked", Format::Count),
    ("dead", "dead", Format::Count),
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

/// Two lines over time.
fn chart(name: &str, at: &str, what: &str) -> Markup {
    let pointers = format!("{at}/{what}_ms/p50 {at}/{what}_ms/p99");
    let label = format!("{name}: {what} p50 and p99");
    html! {
        svg data-chart=(pointers) data-name=(label) role="img" aria-label=(label)
            viewBox="0 0 120 24" preserveAspectRatio="none" {}
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
                        tbody role="rowgroup" {
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
        let cells = [
            value("since_s", Format::Time),
            value("retry_in_s", Format::Time),
            rate(&format!("{at}/accepted")),
            rate(&format!("{at}/delivered")),
            value("in_flight", Format::Count),
            value("publish_ms/p50", Format::Milliseconds),
            value("publish_ms/p99", Format::Milliseconds),
            chart(name, at, "publish"),
            value("delivery_ms/p50", Format::Milliseconds),
            value("delivery_ms/p99", Format::Milliseconds),
            chart(name, at, "delivery"),
            value("share", Format::Percent),
            value("weight", Format::Count),
            value("score", Format::Score),
            value("restarts", Format::Count),
        ];
        html! {
            tr role="row" {
                (self.row_head(at, name))
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
                                (self.row_head(&at, name))
                                @for (label, member, format) in APIS {
                                    td role="cell" data-label=(label) {
                                        (self.value(&format!("{at}/{member}"), format))
                                    }
                                }
                            }
                            tr.note role="row" {
                                td.note role="cell" colspan=(APIS.len() + 2) {
                                    (self.long(&format!("{at}/url")))
                                    span.label { " last error " }
                                    (self.long(&format!("{at}/last_error")))
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Name and state.
    fn row_head(&self, at: &str, name: &str) -> Markup {
        html! {
            th.name role="rowheader" scope="row" { (name) }
            td.name role="cell" data-label="state" { (self.state(&format!("{at}/state"))) }
        }
    }
}
