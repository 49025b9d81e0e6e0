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
    /// Of the records that were taken.
    latency: Histogram<u64>,
    /// Of the others: those that fail at once would make a server look fast.
    failure_latency: Histogram<u64>,
    window: SampleWindow,
}

/// The counts since the last sample.
struct SampleWindow {
    since: Duration,
    requests: u64,
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
                requests: 0,
                failures: 0,
                users: 0,
                latency: empty.clone(),
            },
            failure_latency: empty.clone(),
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
        let histograms = if answer.is_ok() {
            vec![&mut self.latency, &mut self.window.latency]
        } else {
            vec![&mut self.failure_latency]
        };
        for histogram in histograms {
            histogram
                .record(us)
                .expect("a histogram that grows takes an hour");
        }
        self.requests += 1;
        self.window.requests += 1;
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
            requests,
            failures,
            users,
            latency,
        } = &mut self.window;
        let seconds = at.saturating_sub(*since).as_secs_f64();
        if *requests == 0 || seconds <= 0.0 {
            return;
        }
        self.samples.push(Sample {
            at,
            per_second: *requests as f64 / seconds,
            failures_per_second: *failures as f64 / seconds,
            p50: ms(latency.value_at_quantile(0.5)),
            p99: ms(latency.value_at_quantile(0.99)),
            users: *users,
        });
        latency.reset();
        *since = at;
        *requests = 0;
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

    /// The 99th percentile of the records that were taken; `None` if none was.
    pub fn p99(&self) -> Option<Duration> {
        let p99 = self.latency.value_at_quantile(0.99);
        (!self.latency.is_empty()).then_some(Duration::from_micros(p99))
    }

    /// For people: each count with its name. The latencies are of the records that were taken.
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
        for (histogram, prefix) in [(&self.latency, ""), (&self.failure_latency, "failed, ")] {
            let quantiles = quantiles_ms(histogram).into_iter();
            let named =
                quantiles.map(|(name, ms)| (format!("{prefix}{name} ms"), format!("{ms:.2}")));
            rows.extend(named.filter(|_| !histogram.is_empty()));
        }
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

    /// For machines. `latency_ms` is of the records that were taken.
    pub fn json(&self) -> Value {
        json!({
            "requests": self.requests,
            "failures": self.failures,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "requests_per_s": self.per_second(),
            "latency_ms": BTreeMap::from(quantiles_ms(&self.latency)),
            "failure_latency_ms": BTreeMap::from(quantiles_ms(&self.failure_latency)),
            "statuses": self.statuses,
            "kinds_of_failure": self.kinds,
        })
    }
}

/// The quantiles that are shown, in ms, each with its name.
fn quantiles_ms(histogram: &Histogram<u64>) -> [(&'static str, f64); QUANTILES.len()] {
    QUANTILES.map(|(name, quantile)| (name, ms(histogram.value_at_quantile(quantile))))
}

#[expect(clippy::cast_precision_loss, reason = "three digits are true")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_in_no_latency_of_the_records_that_were_taken() {
        let mut tally = Tally::new();
        assert_eq!(tally.p99(), None);
        tally.count(Duration::from_millis(20), Ok(StatusCode::ACCEPTED));
        for _ in 0..99 {
            let refusal = Refusal {
                status: None,
                why: "cannot connect".into(),
            };
            tally.count(Duration::from_micros(100), Err(refusal));
        }
        tally.sample(Duration::from_secs(1));
        let json = tally.json();
        let rounded = |name: &str| json[name]["p50"].as_f64().unwrap().round();
        assert_eq!(
            (rounded("latency_ms"), rounded("failure_latency_ms")),
            (20.0, 0.0)
        );
        assert_eq!(tally.p99().unwrap().as_millis(), 20);
        let sample = tally.samples[0];
        assert_eq!((sample.per_second, sample.p50.round()), (100.0, 20.0));
    }

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
