//! The first thing that a person looks for: what comes and goes, what waits, and what is lost.

use maud::{Markup, html};

use super::{StatusPage, rate, trend};
use crate::http::page::format::Format;

/// Records in a lane, and those that wait for one.
const WAITING: &str = "/ledger/in_flight /ledger/spooled";

impl StatusPage<'_> {
    pub(super) fn glance(&self) -> Markup {
        html! {
            section.glance aria-label="At a glance" {
                div.tile {
                    h2 { "In and out" }
                    p.figure.both { (rate("/ledger/accepted")) (rate("/ledger/delivered")) }
                    p.both { span { "accepted" } span { "delivered" } }
                }
                div.tile {
                    h2 { "Waiting" }
                    p.figure { (self.count(WAITING)) }
                    p { "oldest " (self.value("/oldest_s", Format::Time)) (trend(WAITING)) }
                }
                div.tile data-some="/ledger/parked" data-is=(self.some("/ledger/parked"))
                    data-level="warning" {
                    h2 { "Parked" }
                    p.figure { (self.count("/ledger/parked")) }
                    p { "the API fails at them; tried again" }
                }
                div.tile data-some="/ledger/dead" data-is=(self.some("/ledger/dead")) data-level="error" {
                    h2 { "Dead letters" }
                    p.figure { (self.count("/ledger/dead")) }
                    p { "for a person to replay or drop" }
                }
                div.tile data-some="/ledger/missing" data-is=(self.some("/ledger/missing"))
                    data-level="error" {
                    h2 { "Lost" }
                    p.figure { (self.count("/ledger/missing")) }
                    p { "gone from a broker" }
                }
            }
        }
    }
}
