//! The page of charts: each figure of each case as two bars, and the second one as a multiple of
//! the first. It opens from disk.

use std::fmt::Write as _;

use super::{Contest, table};

/// The page on `contests`.
pub fn html(contests: &[Contest]) -> String {
    let mut sections = String::new();
    for contest in contests {
        section(&mut sections, contest);
    }
    include_str!("page.html").replace("{{sections}}", &sections)
}

fn section(
    page: &mut String,
    Contest {
        lane,
        base,
        other,
        rounds,
    }: &Contest,
) {
    let rate = rounds.first().map_or(0.0, |round| round.rate);
    let takes_all = "a string takes all";
    write!(page, "<section><h2>{lane}: {other} against {base}</h2>").expect(takes_all);
    let rounds_text = if rounds.len() == 1 {
        "One round".into()
    } else {
        format!("Medians of {} rounds", rounds.len())
    };
    write!(
        page,
        "<p>{rounds_text}; latencies at {rate:.0} records/s.</p>"
    )
    .expect(takes_all);
    page.push_str("<table><thead><tr><th>figure<th><th>median<th>ratio<tbody>");
    for (name, less_is_better, figure) in table::FIGURES {
        let [first, second, ratio] = table::medians(rounds, figure);
        let most = first.max(second).max(f64::MIN_POSITIVE);
        let is_better = (ratio < 1.0) == less_is_better;
        let bar = |class: &str, side: &str, value: f64| {
            format!(
                "<i class=\"{class}\" style=\"width:{:.1}%\" title=\"{side}\"></i>",
                value / most * 100.0
            )
        };
        write!(
            page,
            "<tr><th>{name}<td class=\"bars\">{}{}<td>{}<br>{}<td class=\"{}\">{ratio:.2}",
            bar("base", base, first),
            bar("other", other, second),
            shown(first),
            shown(second),
            if is_better { "better" } else { "worse" },
        )
        .expect(takes_all);
    }
    for (name, [first, second]) in table::faults(rounds) {
        write!(page, "<tr><th>{name}<td><td>{first}<br>{second}<td>").expect(takes_all);
    }
    for (name, figure) in table::syncs(rounds) {
        write!(page, "<tr><th>{name}<td><td>{figure:.2}<td>").expect(takes_all);
    }
    write!(
        page,
        "</table><p class=\"legend\"><i class=\"base\"></i> {base} <i class=\"other\"></i> {other}</p></section>"
    )
    .expect(takes_all);
}

/// To about three digits.
fn shown(value: f64) -> String {
    if value < 100.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}
