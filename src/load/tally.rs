//! The counts of a load.

use std::{collections::BTreeMap, time::Duration};

use awc::http::StatusCode;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// The most kinds of failure that are counted apart; the others count as one kind.
const KINDS_MAX: usize = 20;
/// Latencies are kept in µs up to an hour, to three digits.
const LATENCY_MAX_US: u64 = 3_600_000_000;
/// The quantiles of the latency that are shown.
const QUANTILES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("max", 1.0),
];

/// Why a record was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `None` if no answer came.
    pub status: Option<StatusCode>,
    pub why: String,
}

impl Refusal {
    /// The server answered with `status`. If `body` is a problem (RFC 9457), its detail is the
    /// reason.
    pub(super) fn answered(status: StatusCode, body: &[u8]) -> Self {
        let problem = serde_json::from_slice::<Value>(body).unwrap_or_default();
        let detail = problem["detail"].as_str();
        let why = detail.map_or_else(String::new, |detail| format!(": {detail}"));
        Self {
            status: Some(status),
            why: format!("answered {status}{why}"),
        }
    }
}

/// One second of the load. Latencies in ms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// When it ended, since the load began.
    pub at: Duration,
    pub per_second: f64,
    pub failures_per_second: f64,
    pub p50: f64,
    pub p99: f64,
    pub users: usize,
}

/// The counts so far.
pub struct Tally {
    pub requests: u64,
    /// Answers other than a 2xx, and requests without an answer.
    pub failures: u64,
    pub users: usize,
    pub elapsed: Duration,
    /// The count of each kind of failure.
    pub kinds: BTreeMap<String, u64>,
    pub statuses: BTreeMap<u16, u64>,
    pub samples: Vec<Sample>,
    latency: Histogram<u64>,
    window: SampleWindow,
}

/// The counts since the last sample.
struct SampleWindow {
    since: Duration,
    failures: u64,
    /// The most at a time.
    users: usize,
    latency: Histogram<u64>,
}

impl Tally {
    pub(super) fn new() -> Self {
        // It grows as far as it is needed.
        let empty = Histogram::new(3).expect("three digits are legal, so this cannot fail");
        Self {
            requests: 0,
            failures: 0,
            users: 0,
            elapsed: Duration::ZERO,
            kinds: BTreeMap::new(),
            statuses: BTreeMap::new(),
            samples: Vec::new(),
            window: SampleWindow {
                since: Duration::ZERO,
                failures: 0,
                users: 0,
                latency: empty.clone(),
            },
            latency: empty,
        }
    }

    pub(super) fn begin_user(&mut self) {
        self.users += 1;
        self.window.users = self.window.users.max(self.users);
    }

    pub(super) fn end_user(&mut self) {
        self.users -= 1;
    }

    pub(super) fn count(&mut self, latency: Duration, answer: Result<StatusCode, Refusal>) {
        let us =
            u64::try_from(latency.as_micros()).map_or(LATENCY_MAX_US, |us| us.min(LATENCY_MAX_US));
        for histogram in [&mut self.latency, &mut self.window.latency] {
            histogram
                .record(us)
                .expect("a histogram that grows takes an hour");
        }
        self.requests += 1;
        let status = answer
            .as_ref()
            .map_or_else(|refusal| refusal.status, |status| Some(*status));
        if let Some(status) = status {
            *self.statuses.entry(status.as_u16()).or_default() += 1;
        }
        let Err(Refusal { why, .. }) = answer else {
            return;
        };
        self.failures += 1;
        self.window.failures += 1;
        let kind = if self.kinds.len() < KINDS_MAX || self.kinds.contains_key(&why) {
            why
        } else {
            "others".into()
        };
        *self.kinds.entry(kind).or_default() += 1;
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of a second")]
    pub(super) fn sample(&mut self, at: Duration) {
        self.elapsed = at;
        let SampleWindow {
            since,
            failures,
            users,
            latency,
        } = &mut self.window;
        let seconds = at.saturating_sub(*since).as_secs_f64();
        if latency.is_empty() || seconds <= 0.0 {
            return;
        }
        self.samples.push(Sample {
            at,
            per_second: latency.len() as f64 / seconds,
            failures_per_second: *failures as f64 / seconds,
            p50: ms(latency.value_at_quantile(0.5)),
            p99: ms(latency.value_at_quantile(0.99)),
            users: *users,
        });
        latency.reset();
        *since = at;
        *failures = 0;
        *users = self.users;
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody posts 2^52 records")]
    pub fn per_second(&self) -> f64 {
        if self.elapsed.is_zero() {
            0.0
        } else {
            self.requests as f64 / self.elapsed.as_secs_f64()
        }
    }

    /// The quantiles of the latency in ms, each with its name.
    fn latencies(&self) -> impl Iterator<Item = (&'static str, f64)> {
        QUANTILES
            .map(|(name, quantile)| (name, ms(self.latency.value_at_quantile(quantile))))
            .into_iter()
    }

    /// For people: each count with its name.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = vec![
            ("requests".into(), self.requests.to_string()),
            ("failures".into(), self.failures.to_string()),
            (
                "seconds".into(),
                format!("{:.1}", self.elapsed.as_secs_f64()),
            ),
            ("requests/s".into(), format!("{:.1}", self.per_second())),
        ];
        rows.extend(
            self.latencies()
                .map(|(name, ms)| (format!("{name} ms"), format!("{ms:.2}"))),
        );
        let statuses = self.statuses.iter();
        rows.extend(
            statuses.map(|(status, count)| (format!("status {status}"), count.to_string())),
        );
        rows.extend(
            self.kinds
                .iter()
                .map(|(kind, count)| (kind.clone(), count.to_string())),
        );
        rows
    }

    /// For machines.
    pub fn json(&self) -> Value {
        json!({
            "requests": self.requests,
            "failures": self.failures,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "requests_per_s": self.per_second(),
            "latency_ms": self.latencies().collect::<BTreeMap<_, _>>(),
            "statuses": self.statuses,
            "kinds_of_failure": self.kinds,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are true")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_failure_are_bounded() {
        let mut tally = Tally::new();
        for number in (0..100).chain([3]) {
            let why = format!("failure {number}");
            tally.count(Duration::from_millis(1), Err(Refusal { status: None, why }));
        }
        assert_eq!(
            (tally.requests, tally.failures, tally.kinds.len()),
            (101, 101, KINDS_MAX + 1)
        );
        assert_eq!((tally.kinds["failure 3"], tally.kinds["others"]), (2, 80));
    }
}
