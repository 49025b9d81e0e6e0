//! The page as plain text, for a terminal.

use serde_json::Value;

use super::{
    format::{Format, value_at},
    html::shown_lane_state,
};

/// A column: its title, the member, and the member's format.
type TextColumn = (&'static str, &'static str, Format);

/// The place of the state among them.
const STATE_COLUMN: usize = 1;
const LANES: [TextColumn; 14] = [
    ("lane", "lane", Format::Text),
    ("state", "state", Format::Text),
    ("since", "since_s", Format::Time),
    ("next try", "retry_in_s", Format::Time),
    ("accepted", "accepted", Format::Count),
    ("delivered", "delivered", Format::Count),
    ("in flight", "in_flight", Format::Count),
    ("publish p50", "publish_ms/p50", Format::Milliseconds),
    ("p99", "publish_ms/p99", Format::Milliseconds),
    ("delivery p50", "delivery_ms/p50", Format::Milliseconds),
    ("p99", "delivery_ms/p99", Format::Milliseconds),
    ("share", "share", Format::Percent),
    ("restarts", "restarts", Format::Count),
    ("last error", "last_error", Format::Text),
];
const APIS: [TextColumn; 6] = [
    ("state", "state", Format::Text),
    ("since", "since_s", Format::Time),
    ("next try", "retry_in_s", Format::Time),
    ("in flight", "in_flight", Format::Count),
    ("url", "url", Format::Text),
    ("last error", "last_error", Format::Text),
];

/// The page of a node with this status.
pub fn page(status: &Value) -> String {
    let text = |pointer: &str, format: Format| format.text(&value_at(status, pointer));
    let mut page = TextPage::default();
    page.line(&format!(
        "waypost {} on {}, up {}, policy {}",
        text("/version", Format::Text),
        text("/node", Format::Text),
        text("/uptime_s", Format::Time),
        text("/policy", Format::Text),
    ));
    page.warnings(&status["warnings"]);
    let lanes = status["lanes"].as_array().into_iter().flatten();
    let lanes = lanes.map(|lane| {
        let mut cells = cells(lane, &LANES);
        cells[STATE_COLUMN] = shown_lane_state(lane);
        cells
    });
    let lanes = lanes.collect();
    page.table("LANES", titles(&LANES), lanes);
    page.apis(status);
    page.heading("LEDGER");
    for (name, count) in status["ledger"].as_object().into_iter().flatten() {
        page.line(&format!("{name:12} {:>15}", Format::Count.text(count)));
    }
    let balanced = text("/balanced", Format::Text);
    page.line(&format!("balanced     {balanced:>15}"));
    page.heading("DISK");
    page.line(&format!(
        "{} of {} in use, oldest record waits {}",
        text("/spool/bytes", Format::Bytes),
        text("/spool/max", Format::Bytes),
        text("/spool/oldest_s", Format::Time),
    ));
    page.0
}

fn titles(columns: &[TextColumn]) -> Vec<String> {
    let titles = columns.iter().map(|(title, ..)| (*title).to_owned());
    titles.collect()
}

fn cells(of: &Value, columns: &[TextColumn]) -> Vec<String> {
    let cells = columns
        .iter()
        .map(|(_, member, format)| format.text(&value_at(of, &format!("/{member}"))));
    cells.collect()
}

#[derive(Default)]
struct TextPage(String);

impl TextPage {
    /// A line. What is no text, such as an escape that a terminal would obey, is replaced.
    fn line(&mut self, line: &str) {
        let is_text = |letter: char| !letter.is_control();
        let line = line.trim_end().chars();
        self.0
            .extend(line.map(|letter| if is_text(letter) { letter } else { '\u{fffd}' }));
        self.0.push('\n');
    }

    fn heading(&mut self, title: &str) {
        self.0.push('\n');
        self.line(title);
    }

    fn warnings(&mut self, warnings: &Value) {
        self.heading("WARNINGS");
        let none = Vec::new();
        let warnings = warnings.as_array().unwrap_or(&none);
        if warnings.is_empty() {
            self.line("Nothing is wrong.");
        }
        for warning in warnings {
            let text = |name: &str| warning[name].as_str().unwrap_or_default();
            self.line(&format!(
                "{:8} {}: {}",
                text("level"),
                text("about"),
                text("what")
            ));
            self.line(&format!("{:8} -> {}", "", text("remedy")));
        }
    }

    fn apis(&mut self, status: &Value) {
        let several = status["apis"].as_object().into_iter().flatten();
        let mut rows: Vec<_> = several.map(|(name, api)| (name.as_str(), api)).collect();
        if rows.is_empty() {
            rows.push(("default", &status["api"]));
        }
        let rows = rows
            .into_iter()
            .map(|(name, api)| [vec![name.to_owned()], cells(api, &APIS)].concat());
        let titles = [vec!["API".to_owned()], titles(&APIS)].concat();
        self.table("APIS", titles, rows.collect());
    }

    /// Aligned columns. The last one is as long as it is.
    fn table(&mut self, heading: &str, titles: Vec<String>, rows: Vec<Vec<String>>) {
        self.heading(heading);
        let all: Vec<_> = [vec![titles], rows].concat();
        let columns = all.iter().map(Vec::len).max().unwrap_or_default();
        let widths: Vec<_> = (0..columns)
            .map(|at| {
                let cells = all.iter().filter_map(|row| row.get(at));
                cells
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or_default()
            })
            .collect();
        for row in &all {
            let cells = row.iter().zip(&widths);
            let cells: Vec<_> = cells
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            self.line(&cells.join("  "));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::page;

    #[test]
    fn a_terminal_gets_aligned_lines_and_no_escapes() {
        let status = json!({
            "version": "1", "node": "\u{1b}[31mred\u{9b}\r\n", "policy": "hash",
            "lanes": [
                {"lane": "nats", "state": "up", "in_flight": 7},
                {"lane": "rabbitmq", "state": "backoff", "last_error": "line\nline"},
            ],
            "ledger": {"accepted": 1234},
            "warnings": [],
        });
        let page = page(&status);
        let is_plain = |letter: char| letter == '\n' || !letter.is_control();
        assert!(page.chars().all(is_plain), "{page:?}");
        assert!(
            page.contains("on \u{fffd}[31mred\u{fffd}\u{fffd}\u{fffd},"),
            "{page}"
        );
        assert!(page.contains("Nothing is wrong."), "{page}");
        let line = |begin: &str| {
            let mut lines = page.lines();
            lines.find(|line| line.starts_with(begin)).expect(begin)
        };
        assert_eq!(line("lane ").find("state"), line("nats").find("up"));
        assert_eq!(
            line("lane ").find("state"),
            line("rabbitmq").find("backoff")
        );
        assert!(line("rabbitmq").ends_with("line\u{fffd}line"), "{page}");
        assert!(line("accepted").ends_with("1,234"), "{page}");
    }
}
