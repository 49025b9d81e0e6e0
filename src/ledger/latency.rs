//! Times, as quantiles and as histograms.

use std::time::Duration;

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Upper bounds of all histograms, in seconds: from a confirm in memory to a record that waited for
/// an hour.
pub const BOUNDS_S: [f64; 20] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];

/// Median and 99th percentile, in milliseconds; zero before the first time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
}

/// Times in microseconds, to two significant digits, and their sum.
#[derive(Clone, Debug)]
pub struct Latency {
    pub times: Histogram<u32>,
    pub sum_us: u64,
}

impl Latency {
    const MAX_US: u64 = 3_600_000_000;

    pub fn record(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros())
            .unwrap_or(u64::MAX)
            .clamp(1, Self::MAX_US);
        self.times
            .record(us)
            .expect("an hour in µs is within what it grows to");
        self.sum_us += us;
    }

    pub fn quantiles_ms(&self) -> Quantiles {
        Self::quantiles_of(&self.times)
    }

    /// The quantiles of times in microseconds.
    pub fn quantiles_of(times: &Histogram<u32>) -> Quantiles {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a time of centuries would lose a microsecond"
        )]
        let ms = |quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
        Quantiles {
            p50: ms(0.5),
            p99: ms(0.99),
        }
    }
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            // It grows with the times that it records, so an unused lane needs little memory.
            times: Histogram::new(2).expect("two digits are legal, so this cannot fail"),
            sum_us: 0,
        }
    }
}
