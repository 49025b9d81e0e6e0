//! The report of a load: one HTML file that contains its charts and needs no other file.

use super::{Sample, Tally};

/// A line has no more points than this; of the samples that share a point, the highest is drawn.
const POINTS_MAX: usize = 400;

/// A line of a chart: its name, its CSS class, and the value that it draws of a sample.
type ChartLine = (&'static str, &'static str, fn(&Sample) -> f64);

/// The report of a load on `host`.
pub fn html(tally: &Tally, host: &str) -> String {
    let row = |(name, value): (String, String)| format!("<tr><th>{}<td>{value}\n", escaped(&name));
    let rows: String = tally.rows().into_iter().map(row).collect();
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
    let values = samples
        .iter()
        .flat_map(|sample| lines.iter().map(|(_, _, value)| value(sample)));
    let top = values.fold(1.0, f64::max);
    let together = samples.len().div_ceil(POINTS_MAX).max(1);
    let polyline = |(_, class, value): &ChartLine| {
        let points = samples.chunks(together).map(|chunk| {
            let at = chunk[chunk.len() - 1].at.as_secs_f64();
            (at, chunk.iter().map(value).fold(0.0, f64::max))
        });
        // A line begins at the left edge, so one sample makes a line too.
        let first = samples.first().map(|sample| (0.0, value(sample)));
        let points = first.into_iter().chain(points);
        let points: Vec<_> = points
            .map(|(at, value)| format!("{:.4},{:.4}", at / end, 1.0 - value / top))
            .collect();
        let points = points.join(" ");
        format!("<polyline class=\"{class}\" points=\"{points}\"/>\n")
    };
    let name = |(name, class, _): &ChartLine| format!("<span class=\"{class}\">{name}</span> ");
    include_str!("chart.html")
        .replace("{{top}}", &format!("{top:.1}"))
        .replace("{{middle}}", &format!("{:.1}", top / 2.0))
        .replace("{{end}}", &format!("{end:.0}"))
        .replace("{{lines}}", &lines.iter().map(polyline).collect::<String>())
        .replace("{{legend}}", &lines.iter().map(name).collect::<String>())
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

    use super::{super::Refusal, *};

    #[test]
    fn a_report_needs_no_other_file_and_shows_the_counts() {
        let mut tally = Tally::new();
        for ms in [1, 2, 3] {
            tally.count(
                Duration::from_millis(ms),
                Ok(awc::http::StatusCode::ACCEPTED),
            );
        }
        let refusal = Refusal {
            status: None,
            why: "<refused>".into(),
        };
        tally.count(Duration::from_millis(9), Err(refusal));
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
