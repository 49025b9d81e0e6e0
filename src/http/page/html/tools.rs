//! What needs the script: orders, the way of one record, the dead letters.

use maud::{Markup, html};

use super::StatusPage;

/// The orders to a lane, each with its button.
const ORDERS: [(&str, &str); 5] = [
    ("pause", "Pause"),
    ("drain", "Drain"),
    ("resume", "Resume"),
    ("restart", "Restart"),
    ("weight", "Weight"),
];

/// The buttons of the orders to a lane, or to all.
pub(super) fn orders_to(lane: Option<&str>) -> Markup {
    let to = lane.unwrap_or("all lanes");
    let orders = ORDERS.iter();
    // A weight is of one lane.
    let orders = orders.filter(|(order, _)| lane.is_some() || *order != "weight");
    html! {
        span.orders-to {
            @for (order, title) in orders {
                button type="button" data-order=(order) data-lane=[lane]
                    aria-label=(format!("{title} {to}")) {
                    (title) @if lane.is_none() { " all" }
                }
            }
        }
    }
}

/// The way of a record, by its id.
pub(super) fn find() -> Markup {
    html! {
        section.tool aria-labelledby="find-title" {
            h2 id="find-title" { "Find a record" }
            form #find role="search" {
                label for="find-id" { "Record id" }
                input #find-id type="search" autocomplete="off" spellcheck="false" size="46"
                    title="Shortcut: /";
                button type="submit" { "Find" }
                button #find-next type="button" { "Show the next that pass" }
            }
            div #found aria-live="polite" tabindex="0" role="region" aria-label="The way of the record" {
                p.note { "The way of one of the last 10,000 records with its times, why it took it, and whether it waits on disk." }
            }
        }
    }
}

/// One question before an order, and the help.
pub(super) fn dialogs() -> Markup {
    html! {
        dialog #question aria-labelledby="question-title" {
            h2 id="question-title" {}
            p id="question-text" {}
            p #question-field hidden {
                label for="question-number" { "Weight, 0 to 1000" }
                input #question-number type="number" min="0" max="1000" step="1";
            }
            div.buttons {
                button #question-yes type="button" {}
                button #question-no type="button" { "Cancel" }
            }
        }
        dialog #help aria-labelledby="help-title" {
            h2 id="help-title" { "Keys" }
            dl.keys {
                div { dt { kbd { "/" } } dd { "find a record" } }
                div { dt { kbd { "w" } } dd { "warnings" } }
                div { dt { kbd { "d" } } dd { "dead letters" } }
                div { dt { kbd { "c" } } dd { "cursor of the charts: " kbd { "←" } " " kbd { "→" } } }
                div { dt { kbd { "↑" } " " kbd { "↓" } } dd { "from letter to letter" } }
                div { dt { kbd { "?" } } dd { "this help" } }
                div { dt { kbd { "Esc" } } dd { "close" } }
            }
            div.buttons { button #help-close type="button" { "Close" } }
        }
        div #said role="status" hidden {
            span #said-text {}
            button #said-undo type="button" { "Undo" }
            button #said-close type="button" aria-label="Close the message" { "✕" }
        }
    }
}

impl StatusPage<'_> {
    /// The dead letters and parked records: a query, its plan, and its run.
    pub(super) fn letters(&self) -> Markup {
        let apis: Vec<_> = self.api_names().map(|(_, name)| name).collect();
        html! {
            section.tool #letters aria-labelledby="letters-title" {
                h2 id="letters-title" { "Dead letters and parked records" }
                form #query {
                    label { "Records "
                        select name="parked" {
                            option value="false" { "dead letters" }
                            option value="true" { "parked" }
                        }
                    }
                    @if apis.len() > 1 {
                        label { "API "
                            select name="api" {
                                option value="" { "any" }
                                @for name in &apis { option { (name) } }
                            }
                        }
                    }
                    label { "Lane "
                        select name="lane" {
                            option value="" { "any" }
                            @for (_, name) in self.lane_names() { option { (name) } }
                        }
                    }
                    label { "Reason "
                        select name="given_up" {
                            option value="" { "any" }
                            option value="false" { "refused" }
                            option value="true" { "given up" }
                        }
                    }
                    label { "Status " input name="status" type="number" min="0" max="599" placeholder="any"; }
                    label { "Since " input name="since_ms" type="datetime-local"; }
                    label { "Text " input name="text" type="search" autocomplete="off" placeholder="in id, record or answer"; }
                    button type="submit" { "Show" }
                }
                div.plan {
                    p #plan role="status" { "Nothing was asked for yet." }
                    @if !self.read_only {
                        button #replay type="button" disabled { "Replay" }
                        button #drop type="button" disabled { "Drop" }
                    }
                    progress #progress max="1" value="0" aria-label="Records done" hidden {}
                    button #cancel type="button" hidden { "Cancel" }
                }
                div.letter-head aria-hidden="true" {
                    span { "record" } span { "lane" } span { "status" }
                    span #letter-time { "dead since" } span.answer { "answer of the API" }
                }
                ol #letter-list tabindex="0" aria-label="Records found" {}
            }
        }
    }
}
