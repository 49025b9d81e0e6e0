//! The progress of a command on the standard error: a bar on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};

use super::output::tell;

pub(super) struct Progress {
    bar: ProgressBar,
    /// The things that are counted, as "requests".
    unit: &'static str,
    total: u64,
}

impl Progress {
    pub fn new(total: u64, unit: &'static str) -> Self {
        // It draws nothing if the standard error is no terminal.
        let bar = ProgressBar::new(total);
        let template = format!("{{bar:30}} {{pos}}/{{len}} {unit} {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Self { bar, unit, total }
    }

    /// Shows that `count` are done. Without a terminal, prints a line for each quarter of the
    /// total.
    pub fn reached(&self, count: u64) {
        let quarter = |count: u64| (4 * count).checked_div(self.total);
        let before = self.bar.position();
        self.bar.set_position(count);
        if self.bar.is_hidden() && quarter(count) > quarter(before) {
            tell(format_args!("{count} of {} {}", self.total, self.unit));
        }
    }

    pub fn note(&self, note: String) {
        self.bar.set_message(note);
    }

    /// The bar stays as it is: one that was stopped is not full.
    pub fn end(&self) {
        self.bar.abandon();
    }
}
