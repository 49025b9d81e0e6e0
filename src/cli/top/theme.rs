//! Colours and weights of the text.

use std::env;

use ratatui::style::{Color, Modifier, Style};

use super::state::severity;

/// The styles of one terminal.
#[derive(Clone, Copy, Debug)]
pub struct Theme {
    has_colour: bool,
}

impl Theme {
    /// Without colours if `NO_COLOR` is set.
    pub fn of_environment() -> Self {
        Self {
            has_colour: env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }

    /// Bad news is bold without colours, too.
    pub fn level(self, level: &str) -> Style {
        let (colour, modifier) = match severity(level) {
            0 => (Color::Red, Modifier::BOLD),
            1 => (Color::Yellow, Modifier::BOLD),
            2 => (Color::Cyan, Modifier::empty()),
            _ => return Style::new(),
        };
        let style = Style::new().add_modifier(modifier);
        if self.has_colour {
            style.fg(colour)
        } else {
            style
        }
    }

    pub fn good(self) -> Style {
        if self.has_colour {
            Style::new().fg(Color::Green)
        } else {
            Style::new()
        }
    }
}

pub const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
pub const QUIET: Style = Style::new().add_modifier(Modifier::DIM);
pub const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);
