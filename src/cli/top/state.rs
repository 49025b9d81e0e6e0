//! The state that `top` shows: the nodes, the operator's choice, and what keys do to them. It draws
//! nothing and asks nobody.

use std::collections::VecDeque;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    columns::{self, Column},
    feed::NodeNews,
};
use crate::summary::{
    LaneSummary, NodeSummary, WarningSummary, format::one_line, history::StatusHistory,
};

/// The last changes of a node that are kept.
const CHANGES_MAX: usize = 50;

/// A node that is followed.
#[derive(Debug)]
pub struct NodeView {
    pub url: String,
    pub history: StatusHistory,
    /// Why the last status is old, and since when.
    pub lost: Option<(String, Instant)>,
    /// The newest first.
    pub changes: VecDeque<Value>,
}

impl NodeView {
    /// The name that the node gives itself, or its address before it is known.
    pub fn name(&self) -> String {
        let status = self.history.last();
        let named = status.map(|status| one_line(&status.node));
        let named = named.filter(|name| !name.is_empty());
        named.unwrap_or_else(|| self.address())
    }

    /// Nodes of one machine have one name, and each its own address.
    pub fn address(&self) -> String {
        let address = one_line(&self.url);
        let short = address.strip_prefix("http://").unwrap_or(&address);
        short.trim_end_matches('/').to_owned()
    }

    /// All warnings, the worst first.
    pub fn warnings(&self) -> Vec<WarningSummary> {
        let lost = self.lost.iter().map(|(why, _)| WarningSummary {
            level: "error".into(),
            about: "node".into(),
            what: format!("{} gives no answer: {why}", self.address()),
            remedy: "Look whether it runs; it is asked again and again".into(),
        });
        let told = self.history.last().into_iter();
        let told = told.flat_map(|status| status.all_warnings().iter().cloned());
        let mut all: Vec<_> = lost.chain(told).collect();
        all.sort_by_key(|warning| severity(&warning.level));
        all
    }
}

/// The worst level is the least.
pub fn severity(level: &str) -> u8 {
    match level {
        "error" => 0,
        "warning" => 1,
        "notice" => 2,
        _ => 3,
    }
}

/// A lane of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneKey {
    pub node: usize,
    pub lane: String,
}

/// The contents of the screen.
#[derive(Clone, Debug, PartialEq)]
pub enum Screen {
    Lanes,
    /// All about the lane that is chosen.
    Details,
    /// All warnings of all nodes.
    Warnings,
    Help,
    /// The dead letters of the node `of`, once they are there.
    Letters {
        of: usize,
        shown: Option<Result<Value, String>>,
    },
    /// An order waits for its confirmation.
    Confirm(LaneOrder),
}

/// An order to a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneOrder {
    pub of: LaneKey,
    pub action: &'static str,
}

/// A task beyond the screen that a key asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Wanted {
    Nothing,
    Quit,
    Order(LaneOrder),
    Letters(usize),
}

#[derive(Debug)]
pub struct TopState {
    pub nodes: Vec<NodeView>,
    pub screen: Screen,
    /// The lane that is chosen: the first one until a key is pressed.
    pub chosen: Option<LaneKey>,
    is_own_choice: bool,
    pub sort: &'static Column,
    pub is_reversed: bool,
    /// Only rows with this text.
    pub filter: String,
    pub is_typing: bool,
    /// Lines that are scrolled away.
    pub scroll: u16,
    /// The outcome of the last order.
    pub told: Option<Result<String, String>>,
}

impl TopState {
    pub fn new(urls: Vec<String>) -> Self {
        let node = |url| NodeView {
            url,
            history: StatusHistory::default(),
            lost: None,
            changes: VecDeque::new(),
        };
        Self {
            nodes: urls.into_iter().map(node).collect(),
            screen: Screen::Lanes,
            chosen: None,
            is_own_choice: false,
            sort: columns::first(),
            is_reversed: false,
            filter: String::new(),
            is_typing: false,
            scroll: 0,
            told: None,
        }
    }

    pub fn hear(&mut self, at: usize, news: NodeNews) {
        let Some(node) = self.nodes.get_mut(at) else {
            return;
        };
        match news {
            NodeNews::Status(status) => {
                node.lost = None;
                node.history.add(*status);
            }
            NodeNews::Change(change) => {
                node.changes.push_front(change);
                node.changes.truncate(CHANGES_MAX);
            }
            NodeNews::Lost(why) => {
                let since = node
                    .lost
                    .take()
                    .map_or_else(Instant::now, |(_, since)| since);
                node.lost = Some((why, since));
            }
            NodeNews::Told(outcome) => self.told = Some(outcome),
            NodeNews::Letters(letters) => {
                // An answer may come when those of another node are asked for.
                if let Screen::Letters { of, shown } = &mut self.screen
                    && *of == at
                {
                    *shown = Some(letters);
                }
            }
        }
        self.choose_by(0);
    }

    /// The lanes that match the filter, in their order.
    pub fn rows(&self) -> Vec<(LaneKey, &NodeView, &NodeSummary, &LaneSummary)> {
        let mut rows = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            let Some(status) = node.history.last() else {
                continue;
            };
            for lane in &status.lanes {
                if self.matches(node, status, lane) {
                    let key = LaneKey {
                        node: at,
                        lane: lane.lane.clone(),
                    };
                    rows.push((key, node, status, lane));
                }
            }
        }
        // Stable: rows that are alike stay in the order of the configuration.
        rows.sort_by(
            |(_, node, status, lane), (_, other_node, other_status, other)| {
                let one = self.sort.key(node, status, lane);
                let other = self.sort.key(other_node, other_status, other);
                let order = one.total_cmp(&other);
                if self.is_reversed {
                    order.reverse()
                } else {
                    order
                }
            },
        );
        rows
    }

    fn matches(&self, node: &NodeView, status: &NodeSummary, lane: &LaneSummary) -> bool {
        let wanted = self.filter.to_lowercase();
        let has = |text: &str| text.to_lowercase().contains(&wanted);
        let about = status.all_warnings().iter();
        let mut about = about.filter(|warning| warning.about == lane.lane);
        has(&node.name())
            || has(&node.address())
            || [&lane.lane, &lane.tag, lane.shown_state()]
                .into_iter()
                .any(has)
            || lane.last_error.as_deref().is_some_and(has)
            || about.any(|warning| has(&warning.level) || has(&warning.what))
    }

    /// The row of the lane that is chosen.
    pub fn chosen_row(&self) -> Option<usize> {
        let chosen = self.chosen.as_ref()?;
        self.rows().iter().position(|(key, ..)| key == chosen)
    }

    /// Chooses the row so many steps down, or the first if none is chosen. A lane that the operator
    /// has chosen stays so without a row, until the operator goes to another: an order is never for
    /// a lane that has moved into its place.
    fn choose_by(&mut self, steps: isize) {
        let has_choice = self.is_own_choice && self.chosen.is_some();
        if has_choice && steps == 0 {
            return;
        }
        let own = self.chosen_row().filter(|_| self.is_own_choice);
        // Without a row, the first step down goes to the first one.
        let (now, steps) = own.map_or((0, steps.saturating_sub(1)), |row| (row, steps));
        let rows = self.rows();
        let last = rows.len().saturating_sub(1);
        let at = now.saturating_add_signed(steps).min(last);
        let found = rows.into_iter().nth(at).map(|(key, ..)| key);
        if found.is_some() || !has_choice {
            self.chosen = found;
        }
    }

    /// The node whose lane is chosen.
    pub fn chosen_node(&self) -> usize {
        self.chosen.as_ref().map_or(0, |key| key.node)
    }

    fn chosen_lane(&self) -> Option<&LaneSummary> {
        let chosen = self.chosen.as_ref()?;
        let status = self.nodes.get(chosen.node)?.history.last()?;
        status.lanes.iter().find(|lane| lane.lane == chosen.lane)
    }

    /// Does what the key says.
    pub fn press(&mut self, key: KeyEvent) -> Wanted {
        let has_control = key.modifiers.contains(KeyModifiers::CONTROL);
        if has_control && matches!(key.code, KeyCode::Char('c' | 'd')) {
            return Wanted::Quit;
        }
        self.is_own_choice = true;
        if self.is_typing {
            self.type_key(key.code);
            if self.chosen_row().is_none() {
                self.choose_by(1);
            }
            return Wanted::Nothing;
        }
        match &self.screen {
            Screen::Confirm(order) => {
                let order = order.clone();
                self.screen = Screen::Lanes;
                let is_meant = matches!(key.code, KeyCode::Char('y' | 'Y'));
                return if is_meant {
                    Wanted::Order(order)
                } else {
                    self.told = Some(Ok("No order was given".into()));
                    Wanted::Nothing
                };
            }
            Screen::Lanes => {}
            _ => return self.press_on_page(key.code),
        }
        match key.code {
            KeyCode::Char('q') => return Wanted::Quit,
            KeyCode::Up | KeyCode::Char('k') => self.choose_by(-1),
            KeyCode::Down | KeyCode::Char('j') => self.choose_by(1),
            KeyCode::PageUp => self.choose_by(-10),
            KeyCode::PageDown => self.choose_by(10),
            KeyCode::Home => self.choose_by(isize::MIN),
            KeyCode::End => self.choose_by(isize::MAX),
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('s') => self.sort = columns::after(self.sort),
            KeyCode::Char('r') => self.is_reversed = !self.is_reversed,
            KeyCode::Char(digit @ '1'..='9') => {
                let at = digit.to_digit(10).unwrap_or(1) as usize - 1;
                self.sort = columns::at(at).unwrap_or(self.sort);
            }
            KeyCode::Enter if self.chosen_row().is_some() => self.open(Screen::Details),
            KeyCode::Char('?' | 'h') => self.open(Screen::Help),
            KeyCode::Char('w') => self.open(Screen::Warnings),
            KeyCode::Char('p') => self.ask(|lane| match lane.shown_state() {
                "paused" | "draining" | "drained" => "resume",
                _ => "pause",
            }),
            KeyCode::Char('R') => self.ask(|_| "restart"),
            KeyCode::Char('d') => {
                let of = self.chosen_node();
                self.open(Screen::Letters { of, shown: None });
                return Wanted::Letters(of);
            }
            _ => {}
        }
        self.choose_by(0);
        Wanted::Nothing
    }

    fn open(&mut self, screen: Screen) {
        self.scroll = 0;
        self.screen = screen;
    }

    /// A key on a page that is read and left.
    fn press_on_page(&mut self, key: KeyCode) -> Wanted {
        match key {
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll = self.scroll.saturating_add(1),
            KeyCode::PageUp => self.scroll = self.scroll.saturating_sub(10),
            KeyCode::PageDown => self.scroll = self.scroll.saturating_add(10),
            KeyCode::Char('d') => {
                if let Screen::Letters { of, .. } = self.screen {
                    return Wanted::Letters(of);
                }
            }
            KeyCode::Esc | KeyCode::Enter | KeyCode::Char('q' | 'w' | '?' | 'h') => {
                self.open(Screen::Lanes);
            }
            _ => {}
        }
        Wanted::Nothing
    }

    fn type_key(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => {}
        }
    }

    /// Asks whether the lane of the chosen row is to have an order.
    fn ask(&mut self, action: impl Fn(&LaneSummary) -> &'static str) {
        let lane = self.chosen_lane().filter(|_| self.chosen_row().is_some());
        if let (Some(lane), Some(of)) = (lane, &self.chosen) {
            let order = LaneOrder {
                of: of.clone(),
                action: action(lane),
            };
            self.screen = Screen::Confirm(order);
        } else {
            self.told = Some(Ok("No order was given: choose a row first".into()));
        }
    }
}

#[cfg(test)]
mod tests;
