//! The map: the way of the records, with their pace.

use maud::{Markup, html};

use super::{StatusPage, rate, trend};
use crate::http::page::format::Format;

impl StatusPage<'_> {
    pub(super) fn map(&self) -> Markup {
        html! {
            section aria-labelledby="map-title" {
                h2 id="map-title" { "Way of the records" }
                div.map {
                    div.box {
                        h3 { "Ingest" }
                        p { "accepted " (self.count("/ledger/accepted")) }
                    }
                    div.edge { (rate("/ledger/accepted")) }
                    div.box {
                        h3 { "Router" }
                        p { (self.value("/policy", Format::Text)) }
                    }
                    ul.ways aria-label="Lanes" {
                        @for (at, name) in self.lane_names() { (self.way(&at, &name)) }
                    }
                    ul.ends aria-label="APIs" {
                        @for (at, name) in self.api_names() { (self.end(&at, name)) }
                    }
                }
                (self.stores())
            }
        }
    }

    /// The way over a lane.
    fn way(&self, at: &str, name: &str) -> Markup {
        let level = self.warned(name);
        html! {
            li {
                div.edge { (rate(&format!("{at}/accepted"))) }
                div.box data-about=(name) data-level=(level) {
                    h3 { (name) " " (self.lane_state(at)) }
                    p { "in flight " (self.count(&format!("{at}/in_flight"))) }
                }
                div.edge { (rate(&format!("{at}/delivered"))) }
            }
        }
    }

    fn end(&self, at: &str, name: &str) -> Markup {
        let title = if name == "default" { "API" } else { name };
        let about = if at == "/api" {
            "api".to_owned()
        } else {
            format!("api {name}")
        };
        html! {
            li.box data-about=(about) data-level=(self.warned(&about)) {
                h3 { (title) " " (self.state(&format!("{at}/state"))) }
                p { "in flight " (self.count(&format!("{at}/in_flight"))) }
            }
        }
    }

    /// Where records stay.
    fn stores(&self) -> Markup {
        let lanes = || self.lane_names().map(|(at, _)| at);
        // The rest of what was accepted.
        let by_lanes = lanes().map(|at| format!("-{at}/accepted"));
        let to_disk: Vec<_> = ["/ledger/accepted".into()]
            .into_iter()
            .chain(by_lanes)
            .collect();
        let dead: Vec<_> = lanes().map(|at| format!("{at}/dead")).collect();
        let parked = trend("/ledger/parked");
        html! {
            div.stores {
                @for (edge, title, what, pointer, level) in [
                    (rate(&to_disk.join(" ")), "Spool", "waiting", "/ledger/spooled", "warning"),
                    (parked, "Parked", "between two tries", "/ledger/parked", "warning"),
                    (rate(&dead.join(" ")), "Dead letters", "for a person", "/ledger/dead", "error"),
                ] {
                    div.store {
                        div.edge { (edge) }
                        div.box data-some=(pointer) data-is=(self.some(pointer)) data-level=(level) {
                            h3 { (title) }
                            p { (what) " " (self.count(pointer)) }
                        }
                    }
                }
            }
        }
    }
}
