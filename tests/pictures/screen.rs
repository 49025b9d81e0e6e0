//! The screen of a terminal as SVG.

use std::fmt::Write as _;

use vt100::{Cell, Color, Screen};

const CELL: (f64, f64) = (8.4, 19.0);
const FONT: f64 = 14.0;
/// Around the text; above it is the bar of a window.
const MARGIN: f64 = 18.0;
const BAR: f64 = 34.0;
const BACK: &str = "#15191f";
const TEXT: &str = "#e4e9ee";
/// The sixteen colours of a terminal, as the page has them in the dark.
const COLOURS: [&str; 16] = [
    "#38424d", "#ff8b90", "#4fd6a4", "#f0b341", "#7cb7ff", "#c3a4ff", "#6fd3e0", "#e4e9ee",
    "#a3b0bd", "#ff8b90", "#4fd6a4", "#f0b341", "#7cb7ff", "#c3a4ff", "#6fd3e0", "#ffffff",
];

/// The look that the cells of a piece of text share.
#[derive(Clone, PartialEq)]
struct Look {
    colour: String,
    back: Option<String>,
    is_bold: bool,
    is_dim: bool,
}

fn colour(of: Color, usual: &str) -> String {
    match of {
        Color::Default => usual.into(),
        Color::Idx(at) => COLOURS
            .get(usize::from(at))
            .copied()
            .unwrap_or(usual)
            .into(),
        Color::Rgb(red, green, blue) => format!("#{red:02x}{green:02x}{blue:02x}"),
    }
}

impl Look {
    fn of(cell: &Cell) -> Self {
        let text = colour(cell.fgcolor(), TEXT);
        let back = colour(cell.bgcolor(), BACK);
        let (text, back) = if cell.inverse() {
            (back, text)
        } else {
            (text, back)
        };
        Self {
            colour: text,
            back: (back != BACK).then_some(back),
            is_bold: cell.bold(),
            is_dim: cell.dim(),
        }
    }

    /// The cells from `column` on, in the row whose upper edge is at `y`.
    fn draw(&self, svg: &mut String, column: u16, y: f64, text: &str) {
        let x = MARGIN + f64::from(column) * CELL.0;
        let cells = text.chars().count();
        #[expect(clippy::cast_precision_loss, reason = "a row is short")]
        let width = cells as f64 * CELL.0;
        if let Some(back) = &self.back {
            let height = CELL.1;
            write!(svg, r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height}" fill="{back}"/>"#)
                .expect("memory takes it");
        }
        let shown = text.trim_end();
        if shown.is_empty() {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a row is short")]
        let length = shown.chars().count() as f64 * CELL.0;
        let base = y + FONT;
        let weight = if self.is_bold {
            r#" font-weight="700""#
        } else {
            ""
        };
        let opacity = if self.is_dim {
            r#" opacity="0.65""#
        } else {
            ""
        };
        let fill = &self.colour;
        let shown = shown.replace('&', "&amp;").replace('<', "&lt;");
        // A plain space at a begin or behind another one is no character of SVG.
        let shown = shown.replace(' ', "\u{a0}");
        // Any font of the reader has the width of the cells.
        writeln!(svg, r#"<text x="{x:.1}" y="{base:.1}" textLength="{length:.1}" fill="{fill}"{weight}{opacity}>{shown}</text>"#)
            .expect("memory takes it");
    }
}

/// The screen in a window.
pub fn svg(screen: &Screen) -> String {
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let width = 2.0 * MARGIN + f64::from(columns) * CELL.0;
    let height = BAR + MARGIN + f64::from(rows) * CELL.1;
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0} {height:.0}" width="{width:.0}" height="{height:.0}" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="{FONT}">
<title>waypost top, with a broker down</title>
<rect width="{width:.0}" height="{height:.0}" rx="10" fill="{BACK}"/>
<g fill="#38424d"><circle cx="20" cy="17" r="5.5"/><circle cx="38" cy="17" r="5.5"/><circle cx="56" cy="17" r="5.5"/></g>
"##
    );
    for row in 0..rows {
        let y = BAR + f64::from(row) * CELL.1;
        let mut piece: Option<(u16, Look, String)> = None;
        for column in 0..columns {
            let Some(cell) = screen.cell(row, column) else {
                continue;
            };
            let look = Look::of(cell);
            let letter = if cell.has_contents() {
                cell.contents()
            } else {
                " "
            };
            match &mut piece {
                Some((_, same, text)) if *same == look => text.push_str(letter),
                _ => {
                    let next = Some((column, look, letter.to_owned()));
                    if let Some((from, look, text)) = std::mem::replace(&mut piece, next) {
                        look.draw(&mut svg, from, y, &text);
                    }
                }
            }
        }
        if let Some((from, look, text)) = piece {
            look.draw(&mut svg, from, y, &text);
        }
    }
    svg.push_str("</svg>\n");
    svg
}
