//! The table of `waypost dead list`.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;
use textwrap::core::display_width;

use super::what;
use crate::summary::format::{count, one_line, wrapped};

/// The records as a table. If a line does not fit a terminal of `width`, the reasons have lines of
/// their own.
pub(in crate::cli) fn listed(answer: &Value, parked: bool, width: Option<usize>) -> String {
    let name = if parked { "parked" } else { "dead" };
    let records = answer[name].as_array().map_or(&[][..], Vec::as_slice);
    let (time_name, when) = if parked {
        ("next_try_ms", "next try")
    } else {
        ("dead_ms", "dead since")
    };
    let head = ["id", when, "lane", "tries", "reason"].map(str::to_owned);
    let rows = records.iter().map(|record| {
        let text = |name: &str| one_line(record[name].as_str().unwrap_or_default());
        let time = record[time_name].as_u64().unwrap_or_default();
        let time = UNIX_EPOCH + Duration::from_millis(time);
        [
            text("id"),
            humantime::format_rfc3339_seconds(time).to_string(),
            text("lane"),
            record["attempts"].to_string(),
            reason(record, &text("answer")),
        ]
    });
    let rows: Vec<_> = [head].into_iter().chain(rows).collect();
    let widest = |column: usize| {
        let widths = rows.iter().map(|row| display_width(&row[column]));
        widths.max().unwrap_or_default()
    };
    let widths: [usize; 5] = std::array::from_fn(widest);
    let line_width = widths.iter().sum::<usize>() + 2 * (widths.len() - 1);
    let apart = width.filter(|width| *width < line_width);
    let mut lines: Vec<_> = rows.iter().map(|row| line(row, widths, apart)).collect();
    if records.is_empty() {
        lines.clear();
    }
    let total = answer["matching"].as_u64().or(answer["total"].as_u64());
    let total = total.unwrap_or_default();
    let shown = records.len() as u64;
    lines.push(if shown < total {
        let (shown, total) = (count(shown), count(total));
        format!(
            "{shown} of {total} {}s shown; --limit N shows more",
            what(parked)
        )
    } else {
        let s = if total == 1 { "" } else { "s" };
        format!("{} {}{s}", count(total), what(parked))
    });
    lines.join("\n")
}

/// A record. `apart` is the width for its reason, if that has lines of its own.
fn line(row: &[String; 5], widths: [usize; 5], apart: Option<usize>) -> String {
    let [id, when, lane, tries, reason] = row;
    let pad = |text: &str, width: usize| " ".repeat(width - display_width(text));
    let first = format!(
        "{id}{}  {when}{}  {lane}{}  {}{tries}",
        pad(id, widths[0]),
        pad(when, widths[1]),
        pad(lane, widths[2]),
        pad(tries, widths[3]),
    );
    let Some(width) = apart else {
        return format!("{first}  {reason}");
    };
    let reason = wrapped("    ", "    ", reason, width);
    [vec![first], reason].concat().join("\n")
}

/// Why the record is there: the API's last status and answer, and whether it was given up.
fn reason(record: &Value, answer: &str) -> String {
    let given_up = record["given_up"].as_bool() == Some(true);
    let parts = [
        given_up.then(|| "given up:".to_owned()),
        record["status"].as_u64().map(|status| status.to_string()),
        (!answer.is_empty()).then(|| answer.to_owned()),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        "no answer".into()
    } else {
        parts.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_is_aligned_for_ids_of_any_length_and_says_how_many_there_are() {
        let letter = |id: &str, answer: &str| {
            json!({
                "id": id, "lane": "rabbitmq", "status": 422, "answer": answer, "attempts": 1,
                "given_up": false, "dead_ms": 1_796_000_000_123_u64,
            })
        };
        let long = "order-".repeat(20);
        let letters = [letter("é", "no\u{1b}[2J\n name"), letter(&long, "no name")];
        let answer = json!({"total": 1000, "dead": letters});
        let text = listed(&answer, false, None);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[1].ends_with("422 no[2J name"), "{text}");
        assert_eq!(
            lines[3],
            "2 of 1,000 dead letters shown; --limit N shows more"
        );
        let times = [1, 2].map(|at| display_width(lines[at].split("2026-").next().unwrap()));
        assert_eq!(times, [122, 122], "{text}");

        let narrow = listed(&answer, false, Some(80));
        assert!(narrow.contains("\n    422 no name\n"), "{narrow}");
        let nothing = listed(&json!({"total": 0, "parked": []}), true, Some(80));
        assert_eq!(nothing, "0 parked records");
        let one = json!({"total": 1, "dead": [letter("a", "")]});
        assert!(listed(&one, false, None).ends_with("\n1 dead letter"));
    }
}
