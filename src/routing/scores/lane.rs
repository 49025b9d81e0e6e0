//! The score of one lane, and its factors. The outcomes are written under a lock of its own; any
//! number of routers read the rest without one.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tracing_mutex::parkinglot::Mutex;

use super::{
    health::{Ejection, Past, success_ratio},
    latency::PeakAverage,
    window::TenSeconds,
};

/// A lane that has come up, or back from an ejection, begins with this share of its weight
/// (Envoy's slow start: 10 %).
const SLOW_START_MIN: f64 = 0.1;
/// It has its whole weight after this long.
const SLOW_START: Duration = Duration::from_secs(10);

/// The time of a lane that is not up.
const NEVER: u64 = u64::MAX;

/// The four factors of a lane's score, with the weight that they are divided by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors {
    /// The peak-sensitive average of accepted-to-delivered times, in seconds; `None` before the
    /// first.
    pub latency: Option<f64>,
    /// Records that the lane was sent and the API has not taken; on a shared broker, those that
    /// are not confirmed.
    pub in_flight: u64,
    pub weight: u32,
    /// The share of successes in the last ten seconds, over 0.
    pub success_ratio: f64,
    /// From 0.1 when the lane comes up to 1 ten seconds later.
    pub slow_start: f64,
}

impl Factors {
    /// latency × (in flight + 1) ÷ (weight × success ratio × slow start): the lane with the lowest
    /// score takes the next record. A lane without a latency counts as `unmeasured` seconds.
    /// Infinite for weight 0.
    pub fn score(&self, unmeasured: f64) -> f64 {
        let latency = self.latency.unwrap_or(unmeasured);
        #[expect(
            clippy::cast_precision_loss,
            reason = "a node has fewer than 2^52 records"
        )]
        let load = self.in_flight as f64 + 1.0;
        latency * load / (f64::from(self.weight) * self.success_ratio * self.slow_start)
    }
}

#[derive(Debug)]
pub(super) struct LaneScore {
    weight: AtomicU32,
    /// Records that were sent and have no outcome of their publish.
    publishing: AtomicU32,
    is_shared: AtomicBool,
    /// The bits of the average in seconds; 0 before the first sample.
    latency: AtomicU64,
    succeeded: TenSeconds,
    failed: TenSeconds,
    sent: TenSeconds,
    /// Times in microseconds.
    up_since: AtomicU64,
    steady_from: AtomicU64,
    ejected_until: AtomicU64,
    sent_at: AtomicU64,
    learned: Mutex<Learned>,
}

#[derive(Debug, Default)]
struct Learned {
    latency: PeakAverage,
    past: Past,
}

impl Default for LaneScore {
    fn default() -> Self {
        Self {
            weight: AtomicU32::new(1),
            publishing: AtomicU32::new(0),
            is_shared: AtomicBool::new(false),
            latency: AtomicU64::new(0),
            succeeded: TenSeconds::default(),
            failed: TenSeconds::default(),
            sent: TenSeconds::default(),
            up_since: AtomicU64::new(NEVER),
            steady_from: AtomicU64::new(NEVER),
            ejected_until: AtomicU64::new(0),
            sent_at: AtomicU64::new(0),
            learned: Mutex::default(),
        }
    }
}

impl LaneScore {
    /// The lane has connected. What was measured on its last connection is forgotten.
    pub fn up(&self, now: Duration) {
        let mut learned = self.learned.lock();
        let steady_from = learned.past.up(now);
        learned.latency = PeakAverage::default();
        self.latency.store(0, Relaxed);
        self.steady_from.store(micros(steady_from), Relaxed);
        self.up_since.store(micros(now), Relaxed);
    }

    /// The lane is not up any more, by an order or not.
    pub fn down(&self, by_order: bool, now: Duration) {
        let mut learned = self.learned.lock();
        if self.up_since.swap(NEVER, Relaxed) == NEVER {
            return;
        }
        if by_order {
            learned.past.paused(now);
        } else {
            learned.past.fell(now);
        }
    }

    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight, Relaxed);
    }

    pub fn set_shared(&self, is_shared: bool) {
        self.is_shared.store(is_shared, Relaxed);
    }

    pub fn is_shared(&self) -> bool {
        self.is_shared.load(Relaxed)
    }

    pub fn sent(&self, records: u32, now: Duration) {
        self.sent.add(now.as_secs(), records);
    }

    pub fn publishes(&self, records: u32, now: Duration) {
        self.publishing.fetch_add(records, Relaxed);
        self.sent_at.store(micros(now), Relaxed);
    }

    pub fn published(&self, records: u32) {
        self.publishing.fetch_sub(records, Relaxed);
    }

    pub fn confirmed(&self, records: u32, now: Duration) {
        self.succeeded.add(now.as_secs(), records);
        if let Some(since) = self.learned.lock().past.succeeded(records, now) {
            // The slow start counts from the first probe that succeeded.
            self.ejected_until.store(micros(since), Relaxed);
        }
    }

    /// Records have failed; `penalty` is what that costs as a latency.
    pub fn failed(&self, records: u32, penalty: Duration, now: Duration) {
        self.failed.add(now.as_secs(), records);
        self.learned.lock().past.failed(records, now);
        self.took(penalty, now);
    }

    /// A sample of the latency.
    pub fn took(&self, took: Duration, now: Duration) {
        // A float of 0 means that nothing was measured.
        let took = took.max(Duration::from_micros(1));
        let mut learned = self.learned.lock();
        let average = learned.latency.add(took.as_secs_f64(), now);
        self.latency.store(average.to_bits(), Relaxed);
    }

    /// The ejection that the last ten seconds call for, if the lane is up and not ejected.
    pub fn judge(&self, now: Duration) -> Option<Ejection> {
        let is_candidate = self.is_up() && !self.is_ejected(now);
        is_candidate.then(|| self.learned.lock().past.judge(self.outcomes(now), now))?
    }

    pub fn eject(&self, ejection: Ejection, now: Duration) {
        self.learned.lock().past.ejected(ejection, now);
        self.ejected_until.store(micros(ejection.until), Relaxed);
    }

    /// The present ejection.
    pub fn ejection(&self, now: Duration) -> Option<Ejection> {
        let ejection = self.learned.lock().past.ejection;
        ejection.filter(|ejection| ejection.until > now)
    }

    /// Ejections since the start.
    pub fn ejections(&self) -> u64 {
        self.learned.lock().past.ejections
    }

    pub fn weight(&self) -> u32 {
        self.weight.load(Relaxed)
    }

    pub fn is_up(&self) -> bool {
        self.up_since.load(Relaxed) != NEVER
    }

    pub fn is_ejected(&self, now: Duration) -> bool {
        self.ejected_until.load(Relaxed) > micros(now)
    }

    pub fn is_steady(&self, now: Duration) -> bool {
        self.is_up() && self.steady_from.load(Relaxed) <= micros(now) && !self.is_ejected(now)
    }

    /// Microseconds; later than any time for a lane that is not up.
    pub fn up_since(&self) -> u64 {
        self.up_since.load(Relaxed)
    }

    /// The time since the lane was last sent a record.
    pub fn unused_for(&self, now: Duration) -> Duration {
        Duration::from_micros(micros(now).saturating_sub(self.sent_at.load(Relaxed)))
    }

    pub fn factors(&self, undelivered: u64, now: Duration) -> Factors {
        let latency = match self.latency.load(Relaxed) {
            0 => None,
            bits => Some(f64::from_bits(bits)),
        };
        let undelivered = if self.is_shared() { 0 } else { undelivered };
        let up_since = self.up_since.load(Relaxed);
        let warm_from = up_since.max(self.ejected_until.load(Relaxed));
        let warm_for = Duration::from_micros(micros(now).saturating_sub(warm_from));
        let slow_start = warm_for.as_secs_f64() / SLOW_START.as_secs_f64();
        Factors {
            latency,
            in_flight: u64::from(self.publishing.load(Relaxed)) + undelivered,
            weight: self.weight(),
            success_ratio: success_ratio(self.outcomes(now)),
            slow_start: slow_start.clamp(SLOW_START_MIN, 1.0),
        }
    }

    /// Records that were sent in the last ten seconds.
    pub fn sent_lately(&self, now: Duration) -> u64 {
        self.sent.sum(now.as_secs())
    }

    /// Successes and failures of the last ten seconds.
    fn outcomes(&self, now: Duration) -> [u64; 2] {
        [&self.succeeded, &self.failed].map(|count| count.sum(now.as_secs()))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(NEVER)
}
