//! The limits of a load for CI.

use std::time::Duration;

use humantime::format_duration;

/// The most records that may fail.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum FailuresMax {
    Count(u64),
    /// Of all, in percent.
    Percent(f64),
}

/// Reads a number, or a part such as `0.1%`.
pub(super) fn failures_max(text: &str) -> Result<FailuresMax, String> {
    let read = match text.strip_suffix('%') {
        Some(percent) => percent
            .trim()
            .parse()
            .ok()
            .filter(|percent| (0.0..=100.0).contains(percent))
            .map(FailuresMax::Percent),
        None => text.parse().ok().map(FailuresMax::Count),
    };
    read.ok_or_else(|| "a whole number, or a part such as 0.1%".into())
}

pub(super) struct LoadLimits {
    pub p99: Option<Duration>,
    pub failures: FailuresMax,
}

impl LoadLimits {
    /// Each limit that does not hold, in a line.
    #[expect(clippy::cast_precision_loss, reason = "nobody posts 2^52 records")]
    pub fn broken(&self, requests: u64, failures: u64, p99: Option<Duration>) -> Vec<String> {
        let (is_broken, max) = match self.failures {
            FailuresMax::Count(max) => (failures > max, max.to_string()),
            FailuresMax::Percent(max) => {
                let part = 100.0 * failures as f64;
                (part > max * requests as f64, format!("{max}%"))
            }
        };
        let mut broken = Vec::new();
        if is_broken {
            broken.push(format!(
                "{failures} of {requests} records failed; --max-failures allows {max}"
            ));
        }
        if let Some(max) = self.p99 {
            let shown = format_duration(max);
            match p99 {
                Some(p99) if p99 <= max => {}
                Some(p99) => {
                    let ms = p99.as_secs_f64() * 1000.0;
                    broken.push(format!("p99 is {ms:.2} ms; --max-p99 allows {shown}"));
                }
                None => broken.push(format!("no record was taken; --max-p99 allows {shown}")),
            }
        }
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_broken_by_what_is_above_it_alone() {
        let ms = Duration::from_millis;
        let broken = |failures: &str, p99: Option<u64>, failed, found: Option<u64>| {
            let limits = LoadLimits {
                p99: p99.map(ms),
                failures: failures_max(failures).unwrap(),
            };
            limits.broken(1000, failed, found.map(ms)).len()
        };
        for (failures, p99, failed, found, count) in [
            ("0", None, 0, Some(9), 0),
            ("0", None, 1, Some(9), 1),
            ("5", None, 5, Some(9), 0),
            ("5", None, 6, Some(9), 1),
            ("0.1%", None, 1, Some(9), 0),
            ("0.1%", None, 2, Some(9), 1),
            ("100%", Some(9), 1000, None, 1),
            ("0", Some(9), 0, Some(9), 0),
            ("0", Some(9), 1, Some(10), 2),
        ] {
            let case = (failures, p99, failed, found);
            assert_eq!(broken(failures, p99, failed, found), count, "{case:?}");
        }
        for text in ["", "-1", "1.5", "101%", "NaN%", "%"] {
            assert!(failures_max(text).is_err(), "{text}");
        }
    }
}
