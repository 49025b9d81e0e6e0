//! The report of a load: one HTML file that contains its charts and needs no other file.

use std::fmt::Write as _;

use super::{Sample, Tally};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 220.0;
/// Room for the numbers at the left.
const LEFT: f64 = 64.0;
/// Room for the numbers below.
const BELOW: f64 = 24.0;
/// A chart draws no more points than this; of those that share one, it shows the highest.
const POINTS_MAX: usize = 400;

/// A line of a chart: its name, its CSS class, and the value that it draws of a sample.
type ChartLine = (&'static str, &'static str, fn(&Sample) -> f64);

/// The report of a load on `host`.
pub fn html(tally: &Tally, host: &str) -> String {
    let mut rows = String::new();
    let mut row = |name: &str, value: String| {
        writeln!(rows, "<tr><th>{name}<td>{value}").expect("a string takes all");
    };
    row("requests", tally.requests.to_string());
    row("failures", tally.failures.to_string());
    row("seconds", format!("{:.1}", tally.elapsed.as_secs_f64()));
    row("requests/s", format!("{:.1}", tally.per_second()));
    for (name, quantile) in [
        ("p50 ms", 0.5),
        ("p90 ms", 0.9),
        ("p99 ms", 0.99),
        ("p99.9 ms", 0.999),
    ] {
        row(name, format!("{:.2}", tally.latency_ms(quantile)));
    }
    row("max ms", format!("{:.2}", tally.latency_max_ms()));
    for (status, count) in &tally.statuses {
        row(&format!("status {status}"), count.to_string());
    }
    for (kind, count) in &tally.kinds {
        row(&escaped(kind), count.to_string());
    }
    let rate: [ChartLine; 2] = [
        ("requests/s", "a", |sample| sample.per_second),
        ("failures/s", "b", |sample| sample.failures_per_second),
    ];
    let latency: [ChartLine; 2] = [
        ("p50 ms", "a", |sample| sample.p50),
        ("p99 ms", "b", |sample| sample.p99),
    ];
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 users")]
    let users: [ChartLine; 1] = [("users", "a", |sample| sample.users as f64)];
    include_str!("report.html")
        .replace("{{host}}", &escaped(host))
        .replace("{{rows}}", &rows)
        .replace("{{rate}}", &chart(&tally.samples, &rate))
        .replace("{{latency}}", &chart(&tally.samples, &latency))
        .replace("{{users}}", &chart(&tally.samples, &users))
}

/// Draws lines over time, from 0 up.
fn chart(samples: &[Sample], lines: &[ChartLine]) -> String {
    let end = samples.last().map_or(1.0, |sample| sample.at.as_secs_f64());
    let top = samples
        .iter()
        .flat_map(|sample| lines.iter().map(|(_, _, value)| value(sample)))
        .fold(1.0, f64::max);
    let x = |seconds: f64| LEFT + seconds / end * (WIDTH - LEFT);
    let y = |value: f64| (1.0 - value / top) * (HEIGHT - BELOW - 8.0) + 8.0;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for quarter in [0.0, 0.5, 1.0] {
        let value = top * quarter;
        let level = y(value);
        write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{level:.1}\" y2=\"{level:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.1}</text>",
            LEFT - 6.0,
            level + 4.0
        )
        .expect("a string takes all");
    }
    let foot = HEIGHT - 4.0;
    write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{foot}\">0 s</text><text x=\"{WIDTH}\" y=\"{foot}\" text-anchor=\"end\">{end:.0} s</text>"
    )
    .expect("a string takes all");
    let together = samples.len().div_ceil(POINTS_MAX).max(1);
    for (name, class, value) in lines {
        let points: Vec<_> = samples
            .chunks(together)
            .map(|chunk| {
                let highest = chunk.iter().map(value).fold(0.0, f64::max);
                // A line needs two points.
                let from = if samples.len() == 1 {
                    format!("{LEFT:.1},{:.1} ", y(highest))
                } else {
                    String::new()
                };
                format!(
                    "{from}{:.1},{:.1}",
                    x(chunk[chunk.len() - 1].at.as_secs_f64()),
                    y(highest)
                )
            })
            .collect();
        write!(
            svg,
            "<polyline class=\"{class}\" points=\"{}\"><title>{name}</title></polyline>",
            points.join(" ")
        )
        .expect("a string takes all");
    }
    svg.push_str("</svg><p class=\"legend\">");
    for (name, class, _) in lines {
        write!(svg, "<span class=\"{class}\">{name}</span> ").expect("a string takes all");
    }
    svg.push_str("</p>");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_report_needs_no_other_file_and_shows_the_counts() {
        let mut tally = Tally::new();
        for ms in [1, 2, 3] {
            tally.count(
                Duration::from_millis(ms),
                Ok(awc::http::StatusCode::ACCEPTED),
            );
        }
        tally.count(Duration::from_millis(9), Err("<refused>".into()));
        tally.sample(Duration::from_secs(1));
        let page = html(&tally, "http://node/?a&b");
        for wanted in [
            "<td>4",
            "&lt;refused&gt;",
            "http://node/?a&amp;b",
            "status 202",
            "<polyline",
        ] {
            assert!(page.contains(wanted), "{wanted}");
        }
        for foreign in ["{{", "src=", "<link", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_chart_of_many_samples_keeps_its_peaks() {
        let mut samples: Vec<_> = (1..=5000)
            .map(|at| Sample {
                at: Duration::from_secs(at),
                per_second: 10.0,
                ..Sample::default()
            })
            .collect();
        samples[1234].per_second = 777.0;
        let drawn = chart(&samples, &[("requests/s", "a", |sample| sample.per_second)]);
        assert!(drawn.contains(">777.0<"), "the scale");
        assert!(drawn.matches(',').count() <= POINTS_MAX + 10, "the points");
    }
}
