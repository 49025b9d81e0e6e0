//! The screens of `top`. Each has its words from the status, as the live page has.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Flex, Layout, Rect},
    text::{Line, Span, Text},
    widgets::{Block, Clear, Paragraph, Row, Table, TableState, Wrap},
};

use super::{
    columns,
    node_lines::node_lines,
    pages::{details, help, letters, warnings},
    state::{NodeView, Screen, TopState, severity},
    theme::{CHOSEN, QUIET, TITLE, Theme},
};
use crate::summary::format::{age, count, one_line, rate, wrapped};

/// The most lines of warnings above the lanes, as a part of the screen.
const WARNINGS_PART: u16 = 3;

/// Draws the screen.
pub fn draw(frame: &mut Frame<'_>, state: &mut TopState, theme: Theme) {
    let area = frame.area();
    let head = head(state, theme);
    let rows = Layout::vertical([
        Constraint::Length(length(&head)),
        Constraint::Min(0),
        Constraint::Length(1),
    ]);
    let [top, middle, bottom] = rows.areas(area);
    frame.render_widget(Paragraph::new(head), top);
    match state.screen.clone() {
        Screen::Lanes => lanes(frame, state, theme, middle),
        Screen::Details => page(
            frame,
            state,
            middle,
            " Details ",
            details(state, middle.width),
        ),
        Screen::Warnings => {
            let lines = warnings(state, middle.width);
            page(frame, state, middle, " Warnings ", lines);
        }
        Screen::Help => page(frame, state, middle, " Help ", help()),
        Screen::Letters { of, shown } => {
            let (title, lines) = letters(state, of, shown.as_ref(), middle.width);
            page(frame, state, middle, &title, lines);
        }
        Screen::Confirm(order) => {
            lanes(frame, state, theme, middle);
            let name = state.nodes.get(order.of.node).map(NodeView::name);
            let question = format!(
                "{} lane {} of {}?",
                order.action,
                order.of.lane,
                name.unwrap_or_default()
            );
            confirm(frame, middle, &question);
        }
    }
    frame.render_widget(Paragraph::new(foot(state)), bottom);
}

fn length(lines: &[Line<'_>]) -> u16 {
    u16::try_from(lines.len()).unwrap_or(u16::MAX)
}

/// A line for each node.
fn head(state: &TopState, theme: Theme) -> Vec<Line<'static>> {
    state
        .nodes
        .iter()
        .map(|node| node_line(node, theme))
        .collect()
}

fn node_line(node: &NodeView, theme: Theme) -> Line<'static> {
    let (name, address) = (node.name(), node.address());
    let name = if name == address {
        name
    } else {
        format!("{name} ({address})")
    };
    let name = Span::styled(format!("{name}  "), TITLE);
    let live = match (&node.lost, node.history.last()) {
        (Some((_, since)), Some(_)) => {
            let silent = age(since.elapsed().as_secs_f64());
            Span::styled(
                format!("NO ANSWER for {silent}, old values"),
                theme.level("error"),
            )
        }
        (Some((why, _)), None) => Span::styled(
            format!("NO ANSWER: {}", one_line(why)),
            theme.level("error"),
        ),
        (None, None) => Span::styled("connecting", QUIET),
        (None, Some(status)) if status.draining => Span::styled("STOPPING", theme.level("warning")),
        (None, Some(_)) => Span::styled("live", theme.good()),
    };
    let rest = node.history.last().map(|status| {
        let paced = |found: Option<f64>| found.map_or_else(|| "-/s".into(), rate);
        format!(
            "  up {}  in {}  out {}  waiting {}  dead {}",
            age(status.uptime_s),
            paced(node.history.rate(|status| status.ledger.accepted)),
            paced(node.history.rate(|status| status.ledger.delivered)),
            count(status.ledger.spooled + status.ledger.parked),
            count(status.ledger.dead),
        )
    });
    let spans = [Some(name), Some(live), rest.map(Span::raw)];
    Line::from(spans.into_iter().flatten().collect::<Vec<_>>())
}

/// Warnings, the table of lanes, and the ledger of the node that is chosen.
fn lanes(frame: &mut Frame<'_>, state: &mut TopState, theme: Theme, area: Rect) {
    let foot = node_lines(state, area.width);
    let most = usize::from((area.height / WARNINGS_PART).max(2));
    let warnings = warning_lines(state, theme, area.width, most);
    let parts = Layout::vertical([
        Constraint::Length(length(&warnings)),
        Constraint::Min(3),
        Constraint::Length(length(&foot)),
    ]);
    let [above, table, below] = parts.areas(area);
    frame.render_widget(Paragraph::new(warnings), above);
    lane_table(frame, state, theme, table);
    frame.render_widget(Paragraph::new(foot), below);
}

/// The warnings, in at most `most` lines.
fn warning_lines(state: &TopState, theme: Theme, width: u16, most: usize) -> Vec<Line<'static>> {
    let mut all: Vec<_> = state
        .nodes
        .iter()
        .flat_map(|node| {
            node.warnings()
                .into_iter()
                .map(|warning| (node.name(), warning))
        })
        .collect();
    all.sort_by_key(|(_, warning)| severity(&warning.level));
    if all.is_empty() {
        let has_status = state.nodes.iter().any(|node| node.history.last().is_some());
        let text = if has_status { "Nothing is wrong." } else { "" };
        return vec![Line::styled(text, theme.good())];
    }
    let is_one_node = state.nodes.len() == 1;
    let mut lines = Vec::new();
    let mut shown = 0;
    for (node, warning) in &all {
        let level = warning.level.to_uppercase();
        let node = if is_one_node {
            String::new()
        } else {
            format!("{node} ")
        };
        let first = format!("{level:<8}{node}{}: ", one_line(&warning.about));
        let text = format!(
            "{} -> {}",
            one_line(&warning.what),
            one_line(&warning.remedy)
        );
        let text = wrapped(&first, "        ", &text, width.into());
        let has_more = shown + 1 < all.len();
        if !lines.is_empty() && lines.len() + text.len() + usize::from(has_more) > most {
            break;
        }
        shown += 1;
        let style = theme.level(&warning.level);
        lines.extend(
            text.into_iter()
                .take(most)
                .map(|line| Line::styled(line, style)),
        );
    }
    if shown < all.len() {
        let more = format!("        and {} more: w shows all", all.len() - shown);
        lines.push(Line::styled(more, QUIET));
    }
    lines
}

fn lane_table(frame: &mut Frame<'_>, state: &TopState, theme: Theme, area: Rect) {
    let columns = columns::that_fit(area.width, state.nodes.len() == 1);
    let aligned = |text: String, is_number: bool| {
        let alignment = if is_number {
            Alignment::Right
        } else {
            Alignment::Left
        };
        Text::from(text).alignment(alignment)
    };
    let mark = if state.is_reversed { "^" } else { "v" };
    let titles = columns.iter().map(|column| {
        let is_sorted = column.title == state.sort.title;
        let title = if is_sorted {
            format!("{mark}{}", column.title)
        } else {
            column.title.into()
        };
        aligned(title, column.is_number)
    });
    let rows = state.rows();
    let lines = rows.iter().map(|(_, node, status, lane)| {
        let cells = columns
            .iter()
            .map(|column| aligned(column.text(node, status, lane), column.is_number));
        let style = theme.level(columns::level(status, lane));
        Row::new(cells.collect::<Vec<_>>()).style(style)
    });
    let last = columns.len().saturating_sub(1);
    // The last one has what is left.
    let widths = columns.iter().enumerate().map(|(at, column)| match at {
        at if at == last && !column.is_number => Constraint::Min(column.width),
        _ => Constraint::Length(column.width),
    });
    let table = Table::new(lines, widths.collect::<Vec<_>>())
        .header(Row::new(titles.collect::<Vec<_>>()).style(TITLE))
        .row_highlight_style(CHOSEN);
    let mut chosen = TableState::new().with_selected(state.chosen_row());
    frame.render_stateful_widget(table, area, &mut chosen);
}

/// A page that may be longer than the screen. It scrolls no further than to its end.
fn page(frame: &mut Frame<'_>, state: &mut TopState, area: Rect, title: &str, lines: Vec<String>) {
    let room = area.height.saturating_sub(2);
    let longest = u16::try_from(lines.len()).unwrap_or(u16::MAX);
    state.scroll = state.scroll.min(longest.saturating_sub(room));
    let lines: Vec<_> = lines.into_iter().map(Line::from).collect();
    let block = Block::bordered().title(title.to_owned());
    let page = Paragraph::new(lines).block(block).scroll((state.scroll, 0));
    frame.render_widget(page, area);
}

/// A question above the rest.
fn confirm(frame: &mut Frame<'_>, area: Rect, question: &str) {
    let [row] = Layout::vertical([Constraint::Length(5)])
        .flex(Flex::Center)
        .areas(area);
    let width = 60.min(area.width);
    let [area] = Layout::horizontal([Constraint::Length(width)])
        .flex(Flex::Center)
        .areas(row);
    frame.render_widget(Clear, area);
    let text = vec![
        Line::styled(question.to_owned(), TITLE),
        Line::from(""),
        Line::from("y yes   any other key: no"),
    ];
    let block = Block::bordered();
    let asked = Paragraph::new(text).block(block).wrap(Wrap { trim: false });
    frame.render_widget(asked.alignment(Alignment::Center), area);
}

/// The keys, or the filter while it is typed, or the outcome of an order.
fn foot(state: &TopState) -> Line<'static> {
    if state.is_typing {
        return Line::from(format!(
            "/{}_   Enter keeps it, Esc removes it",
            state.filter
        ));
    }
    if let Some(told) = &state.told {
        let (mark, text) = match told {
            Ok(text) => ("", text),
            Err(text) => ("FAILED: ", text),
        };
        return Line::styled(format!("{mark}{}", one_line(text)), TITLE);
    }
    let keys = match state.screen {
        Screen::Lanes if !state.filter.is_empty() => {
            return Line::from(format!(
                "Only rows with {:?}; Esc removes the filter",
                state.filter
            ));
        }
        Screen::Lanes => {
            "q quit  / filter  s sort  Enter details  p pause  R restart  d dead  ? help"
        }
        Screen::Confirm(_) => "y yes, any other key: no",
        Screen::Letters { .. } => "Up Down scroll  d again  Esc back",
        Screen::Details | Screen::Warnings | Screen::Help => "Up Down scroll  Esc back",
    };
    Line::styled(keys, QUIET)
}
