//! The charts over time. The script draws them, from the history of the node.

use maud::{Markup, html};

use super::StatusPage;
use crate::http::page::format::{Format, NONE};

/// How far back the charts go, and the name that the node knows.
const RANGES: [(&str, &str); 3] = [("5m", "5 minutes"), ("1h", "1 hour"), ("all", "All")];

/// A line: its name, its place in the history, and what it counts.
type ChartLine = (&'static str, &'static str, Format);

const FLOW: [ChartLine; 2] = [
    ("in", "/node/accepted_per_s", Format::Rate),
    ("out", "/node/delivered_per_s", Format::Rate),
];
const WAITING: [ChartLine; 2] = [
    ("in flight", "/node/in_flight", Format::Count),
    ("on disk", "/node/waiting", Format::Count),
];
const DEAD: [ChartLine; 1] = [("dead letters", "/node/dead", Format::Count)];

/// Lines over time, without a text but for those who do not see them.
fn chart(name: &str, pointers: &str, format: Format) -> Markup {
    html! {
        svg data-chart=(pointers) data-name=(name) data-f=(format.name()) role="img"
            aria-label=(name) viewBox="0 0 120 24" preserveAspectRatio="none" {}
    }
}

/// The times of a lane, in a cell.
pub(super) fn sparkline(lane: &str, at: &str, what: &str) -> Markup {
    let pointers = format!("{at}/{what}_ms/p50 {at}/{what}_ms/p99");
    chart(
        &format!("{lane}: {what} p50 and p99"),
        &pointers,
        Format::Milliseconds,
    )
}

impl StatusPage<'_> {
    pub(super) fn over_time(&self) -> Markup {
        html! {
            section.tool aria-labelledby="over-time-title" {
                div.title {
                    h2 id="over-time-title" { "Over time" }
                    div.ranges role="group" aria-label="Range of all charts" {
                        @for (range, title) in RANGES {
                            button type="button" data-range=(range) aria-pressed=(range == "5m") {
                                (title)
                            }
                        }
                    }
                }
                div.over-time {
                    (self.figure("Records in and out", &FLOW))
                    (self.figure("Records on their way", &WAITING))
                    (self.figure("Dead letters", &DEAD))
                }
                label.cursor {
                    span { "Cursor " b #cursor-time { "now" } }
                    input #cursor type="range" min="0" max="299" value="299" title="Shortcut: c";
                }
            }
        }
    }

    /// A chart, and each of its lines in words.
    fn figure(&self, name: &str, lines: &[ChartLine]) -> Markup {
        let pointers: Vec<_> = lines.iter().map(|(_, pointer, _)| *pointer).collect();
        let format = lines.first().map_or(Format::Count, |(.., format)| *format);
        html! {
            figure {
                figcaption {
                    @for (title, pointer, format) in lines {
                        span.line { (title) " " (self.recent(pointer, *format)) }
                    }
                    span.peak { "peak " span data-peak { (NONE) } }
                }
                (chart(name, &pointers.join(" "), format))
            }
        }
    }
}
