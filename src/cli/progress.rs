//! The progress of a command on the standard error: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(super) struct Progress {
    bar: ProgressBar,
    /// The things that are counted, as "requests".
    unit: &'static str,
    total: u64,
    on_terminal: bool,
}

impl Progress {
    pub fn new(total: u64, unit: &'static str) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        let target = if on_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) =
            ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} {unit} {{msg}}"))
        {
            bar.set_style(style);
        }
        Self {
            bar,
            unit,
            total,
            on_terminal,
        }
    }

    /// Shows that `count` are done. Without a terminal, prints a line for each quarter of the total.
    pub fn reached(&self, count: u64) {
        let quarter = |count: u64| {
            if self.total >= 4 {
                count * 4 / self.total
            } else {
                0
            }
        };
        let before = self.bar.position();
        self.bar.set_position(count);
        if !self.on_terminal && quarter(count) > quarter(before) {
            eprintln!("{count} of {} {}", self.total, self.unit);
        }
    }

    pub fn one_more(&self) {
        self.reached(self.bar.position() + 1);
    }

    pub fn note(&self, note: String) {
        self.bar.set_message(note);
    }

    pub fn end(&self) {
        self.bar.finish();
    }
}
