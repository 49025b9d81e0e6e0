//! Times, as quantiles and as histograms.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;

/// Median and 99th percentile, in milliseconds; zero before the first time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
}

/// Times in microseconds, to two significant digits, and their sum.
pub struct Latency(Mutex<(Histogram<u32>, u64)>);

impl Latency {
    const MAX_US: u64 = 3_600_000_000;

    pub fn record_since(&self, began: Instant) {
        self.record(began.elapsed());
    }

    pub fn record(&self, time: Duration) {
        let us = u64::try_from(time.as_micros())
            .unwrap_or(u64::MAX)
            .clamp(1, Self::MAX_US);
        let (times, sum) = &mut *self.0.lock();
        times
            .record(us)
            .expect("an hour in µs is within what it grows to");
        *sum += us;
    }

    /// Calls `read` with the times and their sum.
    pub fn read<T>(&self, read: impl FnOnce(&Histogram<u32>, u64) -> T) -> T {
        let (times, sum_us) = &*self.0.lock();
        read(times, *sum_us)
    }

    pub fn quantiles_ms(&self) -> Quantiles {
        let (times, _) = &*self.0.lock();
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
        // It grows with the times that it records, so an unused lane needs little memory.
        Self(Mutex::new((
            Histogram::new(2).expect("two digits are legal, so this cannot fail"),
            0,
        )))
    }
}
