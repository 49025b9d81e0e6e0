//! The page as HTML. All text goes through `maud`, which escapes it.

mod charts;
mod counts;
mod glance;
mod map;
mod tables;
mod tools;

use maud::{DOCTYPE, Markup, html};
use serde_json::Value;

use super::format::{Format, NONE, value_at};
use crate::summary::shown_state;

/// A record on its way, in the colours of the page.
const ICON: &str = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 \
                    16'%3E%3Cpath d='M1 8h9M7 4l4 4-4 4' fill='none' stroke='%230a7d5a' \
                    stroke-width='2.5'/%3E%3Ccircle cx='14' cy='8' r='2' \
                    fill='%230a7d5a'/%3E%3C/svg%3E";

/// The page of a node with this status.
pub fn page(status: &Value, read_only: bool) -> Markup {
    let page = StatusPage { status, read_only };
    let node = status["node"].as_str().unwrap_or_default();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (node) " · Waypost" }
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                link rel="icon" href=(ICON);
                link rel="stylesheet" href="page.css";
                // Painted in pieces, tables and charts would move as their last columns come.
                link rel="expect" href="#end" blocking="render";
                script type="module" src="page.js" {}
            }
            body data-layout=(page.layout()) {
                a.skip href="#warnings" { "Skip to the warnings" }
                (page.head())
                main {
                    (page.glance())
                    (page.warnings())
                    (page.map())
                    (page.over_time())
                    (page.lanes())
                    div.pair { (page.ledger()) (page.waiting()) }
                    (page.apis())
                    div.side-by-side { (page.letters()) (tools::find()) }
                    div.pair { (page.orders()) (changes()) }
                }
                (tools::dialogs())
                span #end hidden {}
            }
        }
    }
}

/// The changes that the script hears of.
fn changes() -> Markup {
    html! {
        section aria-labelledby="changes-title" {
            h2 id="changes-title" { "Changes" }
            ol #changes tabindex="0" aria-labelledby="changes-title" {
                li { "The changes since this page was opened, the newest first." }
            }
        }
    }
}

/// How fast a counter grows. Only the script knows: it takes two statuses.
fn rate(pointers: &str) -> Markup {
    html! { span.rate data-r=(pointers) { (NONE) "/s" } }
}

/// The link behind a number of records. Only the script follows it.
fn trend(pointers: &str) -> Markup {
    html! { span.trend data-trend=(pointers) { (NONE) } }
}

/// The state of a lane for people.
pub(super) fn shown_lane_state(lane: &Value) -> String {
    let draining = lane["draining"].as_bool().unwrap_or_default();
    let in_flight = lane["in_flight"].as_u64().unwrap_or_default();
    match lane["state"].as_str() {
        Some(state) if !state.is_empty() => shown_state(state, draining, in_flight).to_owned(),
        _ => NONE.to_owned(),
    }
}

struct StatusPage<'s> {
    status: &'s Value,
    /// The node takes no orders.
    read_only: bool,
}

impl StatusPage<'_> {
    /// The parts of which the page has as many as the node. With others, it is loaded again.
    fn layout(&self) -> String {
        let lanes = self.lane_names().map(|(_, lane)| lane);
        let apis = self.api_names().map(|(_, api)| api.to_owned());
        let version = self.status["version"].as_str().map(str::to_owned);
        let parts: Vec<_> = version.into_iter().chain(lanes).chain(apis).collect();
        parts.join(" ")
    }

    /// The pointer of each lane, and its name.
    fn lane_names(&self) -> impl Iterator<Item = (String, String)> {
        let lanes = self.status["lanes"].as_array().into_iter().flatten();
        lanes.enumerate().map(|(at, lane)| {
            let name = lane["lane"].as_str().unwrap_or_default();
            (format!("/lanes/{at}"), name.to_owned())
        })
    }

    /// The pointer of each API, and its name.
    fn api_names(&self) -> impl Iterator<Item = (String, &str)> {
        let several = self.status["apis"].as_object().into_iter().flatten();
        let mut several = several
            .map(|(name, _)| (format!("/apis/{name}"), name.as_str()))
            .peekable();
        let only = several
            .peek()
            .is_none()
            .then(|| ("/api".to_owned(), "default"));
        several.chain(only)
    }

    /// The value at a pointer, or the sum of several.
    fn value(&self, pointers: &str, format: Format) -> Markup {
        let text = format.text(&value_at(self.status, pointers));
        html! { span data-v=(pointers) data-f=(format.name()) { (text) } }
    }

    /// A value of the history: of its last interval, or of the one at the cursor.
    fn recent(&self, pointer: &str, format: Format) -> Markup {
        let text = format.text(&value_at(self.status, &format!("/recent{pointer}")));
        html! { span data-h=(pointer) data-f=(format.name()) { (text) } }
    }

    fn count(&self, pointers: &str) -> Markup {
        self.value(pointers, Format::Count)
    }

    /// Whether a count is more than zero.
    fn some(&self, pointer: &str) -> &'static str {
        let is_some = value_at(self.status, pointer).as_u64() > Some(0);
        if is_some { "some" } else { "none" }
    }

    /// The level of the worst warning about a lane or an API, which is the first; empty if there is
    /// none, or a notice alone.
    fn warned(&self, about: &str) -> &str {
        let mut list = self.status["warnings"].as_array().into_iter().flatten();
        let worst = list.find(|warning| warning["about"] == about);
        let level = worst.and_then(|warning| warning["level"].as_str());
        level.filter(|level| *level != "notice").unwrap_or_default()
    }

    /// A text that may be long: all of it is in the title too.
    fn long(&self, pointers: &str) -> Markup {
        let text = Format::Text.text(&value_at(self.status, pointers));
        html! { span.long title=(text) data-v=(pointers) data-f="text" data-title { (text) } }
    }

    /// A state, which has a colour.
    fn state(&self, pointer: &str) -> Markup {
        let text = Format::Text.text(&value_at(self.status, pointer));
        html! {
            span.state data-state=(text) data-v=(pointer) data-f="text" data-colour { (text) }
        }
    }

    /// The state of a lane.
    fn lane_state(&self, at: &str) -> Markup {
        let text = shown_lane_state(&value_at(self.status, at));
        html! {
            span.state data-state=(text) data-v=(format!("{at}/state")) data-f="text" data-colour
                data-lane-state=(at) { (text) }
        }
    }

    fn head(&self) -> Markup {
        html! {
            header {
                h1 { "Waypost " span.node { (self.value("/node", Format::Text)) } }
                dl.facts {
                    div { dt { "version" } dd { (self.value("/version", Format::Text)) } }
                    div { dt { "up" } dd { (self.value("/uptime_s", Format::Time)) } }
                    div { dt { "policy" } dd { (self.value("/policy", Format::Text)) } }
                }
                p #live role="status" { "As it was when loaded" }
                noscript { p { "Scripts would keep it current; without them, load it again." } }
            }
        }
    }

    fn warnings(&self) -> Markup {
        let none = Vec::new();
        let list = self.status["warnings"].as_array().unwrap_or(&none);
        html! {
            section #warnings aria-labelledby="warnings-title" {
                h2 id="warnings-title" {
                    "Warnings " span #count { (list.len()) } span #more aria-hidden="true" {}
                }
                ul #list tabindex="0" aria-live="polite" aria-labelledby="warnings-title" {
                    @for warning in list {
                        @let text = |name: &str| warning[name].as_str().unwrap_or_default();
                        li data-level=(text("level")) {
                            span.level { (text("level")) }
                            b { (text("about")) }
                            p {
                                span.what { (text("what")) } ". "
                                span.remedy { (text("remedy")) }
                            }
                        }
                    }
                    @if list.is_empty() {
                        li data-level="none" { "Nothing is wrong." }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HOSTILE: &str = "<script>alert(1)</script>\"'&";

    /// Each text of the status is hostile.
    fn spoil(value: &mut Value) {
        match value {
            Value::String(text) => *text = HOSTILE.into(),
            Value::Array(values) => values.iter_mut().for_each(spoil),
            Value::Object(members) => members.values_mut().for_each(spoil),
            _ => {}
        }
    }

    #[test]
    fn what_others_have_written_is_text() {
        let lane = json!({
            "lane": "", "state": "", "last_error": "", "in_flight": 1,
            "ordered": {"action": "", "by": ""}, "weight_set": {"by": ""},
        });
        let mut status = json!({
            "version": "", "node": "", "policy": "", "lanes": [lane],
            "apis": {"other": {"state": "", "url": "", "last_error": ""}},
            "reload": {"outcome": "", "by": ""},
            "warnings": [{"level": "", "about": "", "what": "", "remedy": ""}],
        });
        spoil(&mut status);
        let page = page(&status, false).into_string();
        assert!(!page.contains("<script>alert"), "{page}");
        let escaped = "&lt;script&gt;alert(1)&lt;/script&gt;&quot;";
        // Version, node (and title), policy (twice), 3 of the warning and its level and attribute,
        // lane, state and the others: each is there.
        assert!(page.matches(escaped).count() > 20, "{page}");
        assert!(!page.contains("alert(1)</script>\""), "{page}");
    }
}
