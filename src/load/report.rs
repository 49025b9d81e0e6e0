//! The report of a load: one HTML file that contains its charts and needs no other file.

use super::{Sample, Tally, axis::Axis};

/// A line has no more points than this; of the samples that share a point, the highest is drawn.
const POINTS_MAX: usize = 400;
/// The size of a chart's area, and its place.
const AREA: (f64, f64) = (796.0, 188.0);
const CORNER: (f64, f64) = (64.0, 8.0);

/// A line of a chart: its name, its CSS class, and the value that it draws of a sample.
type ChartLine = (&'static str, &'static str, fn(&Sample) -> f64);

/// The report of a load on `host`. `parameters` says how it was run, each with its name.
pub fn html(tally: &Tally, host: &str, parameters: &[(&str, String)]) -> String {
    let row = |name: &str, value: &str| {
        let (name, value) = (escaped(name), escaped(value));
        format!("<tr><th>{name}<td>{value}\n")
    };
    let rows = tally.rows().into_iter();
    let rows: String = rows.map(|(name, value)| row(&name, &value)).collect();
    let parameters = parameters.iter();
    let parameters: String = parameters.map(|(name, value)| row(name, value)).collect();
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
        .replace("{{parameters}}", &parameters)
        .replace("{{rows}}", &rows)
        .replace("{{rate}}", &chart("Rate", &tally.samples, &rate))
        .replace("{{latency}}", &chart("Latency", &tally.samples, &latency))
        .replace("{{users}}", &chart("Users", &tally.samples, &users))
}

/// Draws lines over time, from 0 up, between axes with round numbers.
fn chart(title: &str, samples: &[Sample], lines: &[ChartLine]) -> String {
    let end = samples.last().map_or(1.0, |sample| sample.at.as_secs_f64());
    let values = samples
        .iter()
        .flat_map(|sample| lines.iter().map(|(_, _, value)| value(sample)));
    let highest = values.fold(0.0, f64::max);
    let (time, height) = (Axis::new(end, 8), Axis::new(highest, 4));
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
            .map(|(at, value)| format!("{:.4},{:.4}", at / time.end, 1.0 - value / height.end))
            .collect();
        let points = points.join(" ");
        format!("<polyline class=\"{class}\" points=\"{points}\"/>\n")
    };
    let name = |(name, class, _): &ChartLine| format!("<span class=\"{class}\">{name}</span> ");
    let told = lines.iter().map(|(name, _, value)| {
        let highest = samples.iter().map(value).fold(0.0, f64::max);
        format!("{name} up to {highest:.1}")
    });
    let told = told.collect::<Vec<_>>().join(", ");
    include_str!("chart.html")
        .replace("{{told}}", &format!("{title} over {end:.1} s: {told}"))
        .replace("{{grid}}", &grid(&time, &height))
        .replace("{{lines}}", &lines.iter().map(polyline).collect::<String>())
        .replace("{{legend}}", &lines.iter().map(name).collect::<String>())
}

/// The grid and the numbers beside it.
fn grid(time: &Axis, height: &Axis) -> String {
    let ((width, tall), (left, top)) = (AREA, CORNER);
    let right = left + width;
    let rows = height.ticks().map(|(value, label)| {
        let y = top + tall * (1.0 - value / height.end);
        format!(
            "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/>\
             <text class=\"y\" x=\"58\" y=\"{:.1}\">{label}</text>\n",
            y + 4.0
        )
    });
    let columns = time.ticks().map(|(value, label)| {
        let x = left + width * value / time.end;
        let bottom = top + tall;
        format!(
            "<path class=\"grid\" d=\"M{x:.1} {bottom}v5\"/>\
             <text class=\"x\" x=\"{x:.1}\" y=\"216\">{label} s</text>\n"
        )
    });
    rows.chain(columns).collect()
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
        let parameters = [("users", "10".to_owned()), ("file", "<a>".to_owned())];
        let page = html(&tally, "http://node/?a&b", &parameters);
        for wanted in [
            "<td>4",
            "&lt;refused&gt;",
            "http://node/?a&amp;b",
            "status 202",
            "<polyline",
            "<th>users<td>10",
            "<th>file<td>&lt;a&gt;",
            "p99 ms up to 3.0",
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
        let lines: [ChartLine; 1] = [("requests/s", "a", |sample| sample.per_second)];
        let drawn = chart("Rate", &samples, &lines);
        assert!(drawn.contains("Rate over 5000.0 s: requests/s up to 777.0"));
        for label in [">800<", ">5000 s<"] {
            assert!(drawn.contains(label), "{label}");
        }
        let peak = format!(",{:.4}", 1.0 - 777.0 / 800.0);
        assert!(drawn.contains(&peak), "the peak");
        assert!(drawn.matches(',').count() <= POINTS_MAX + 10, "the points");
    }
}
