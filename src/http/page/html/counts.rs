//! The ledger, what waits, and who has ordered what.

use maud::{Markup, html};

use super::{StatusPage, trend};
use crate::http::page::format::Format;

/// What came in.
const CAME: [(&str, &str); 2] = [("accepted", "accepted"), ("recovered", "recovered")];
/// What has become of it.
const BECAME: [(&str, &str); 8] = [
    ("delivered", "delivered"),
    ("handed_over", "handed over"),
    ("dead", "dead letters"),
    ("dropped", "dropped"),
    ("spooled", "waiting on disk"),
    ("parked", "parked"),
    ("in_flight", "in flight"),
    ("missing", "missing"),
];
/// Who has ordered what.
const ORDERS: [(&str, Format); 5] = [
    ("ordered/action", Format::Text),
    ("ordered/by", Format::Text),
    ("ordered/since_s", Format::Time),
    ("weight_set/by", Format::Text),
    ("weight_set/since_s", Format::Time),
];

/// The end of the last reload of the configuration.
const RELOAD: [(&str, &str, Format); 3] = [
    ("last reload", "/reload/outcome", Format::Text),
    ("ago", "/reload/since_s", Format::Time),
    ("by", "/reload/by", Format::Text),
];

impl StatusPage<'_> {
    pub(super) fn ledger(&self) -> Markup {
        html! {
            section aria-labelledby="ledger-title" {
                h2 id="ledger-title" { "Ledger" }
                div.pair {
                    (self.sum_of("Came in", &CAME))
                    (self.sum_of("Became of it", &BECAME))
                }
                p.note {
                    "The sums are the same at rest. Balanced and nothing missing at the last one: "
                    (self.value("/balanced", Format::Text))
                }
            }
        }
    }

    fn sum_of(&self, caption: &str, parts: &[(&str, &str)]) -> Markup {
        let pointer = |member: &str| format!("/ledger/{member}");
        let all: Vec<_> = parts.iter().map(|(member, _)| pointer(member)).collect();
        html! {
            table.balance {
                caption { (caption) }
                tbody {
                    @for (member, title) in parts {
                        tr {
                            th.name scope="row" { (title) }
                            td { (self.count(&pointer(member))) }
                        }
                    }
                }
                tfoot {
                    tr {
                        th.name scope="row" { "together" }
                        td { (self.count(&all.join(" "))) }
                    }
                }
            }
        }
    }

    pub(super) fn waiting(&self) -> Markup {
        let counted = |title, pointer: &str| (title, self.count(pointer), trend(pointer));
        let other = |title, pointer: &str, format| (title, self.value(pointer, format));
        let (oldest, age) = other("oldest on disk", "/spool/oldest_s", Format::Time);
        let (used, bytes) = other("disk in use", "/spool/bytes", Format::Bytes);
        let (most, max) = other("disk at most", "/spool/max", Format::Bytes);
        let (full, left) = other("disk is full in", "/spool/full_in_s", Format::Time);
        html! {
            section aria-labelledby="waiting-title" {
                h2 id="waiting-title" { "Waiting" }
                table.balance {
                    tbody {
                        @for (title, value, trend) in [
                            counted("in flight", "/ledger/in_flight"),
                            counted("waiting on disk", "/ledger/spooled"),
                            counted("parked", "/ledger/parked"),
                            (oldest, age, html! {}),
                            (used, bytes, html! {}),
                            (most, max, html! {}),
                            (full, left, html! {}),
                        ] {
                            tr {
                                th.name scope="row" { (title) }
                                td { (value) }
                                td.trend { (trend) }
                            }
                        }
                    }
                }
            }
        }
    }

    pub(super) fn orders(&self) -> Markup {
        html! {
            section aria-labelledby="orders-title" {
                h2 id="orders-title" { "Last orders" }
                table.balance.orders {
                    thead {
                        tr {
                            @for title in ["lane", "order", "by", "ago", "weight by", "ago"] {
                                th scope="col" { (title) }
                            }
                        }
                    }
                    tbody {
                        @for (at, name) in self.lane_names() {
                            tr {
                                th.name scope="row" { (name) }
                                @for (member, format) in ORDERS {
                                    td { (self.value(&format!("{at}/{member}"), format)) }
                                }
                            }
                        }
                    }
                }
                dl.facts.note {
                    @for (title, pointer, format) in RELOAD {
                        div { dt { (title) } dd { (self.value(pointer, format)) } }
                    }
                }
            }
        }
    }
}
