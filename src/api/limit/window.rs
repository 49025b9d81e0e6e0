//! The cost of POSTs under one limit.

use std::time::Duration;

use tokio::time::Instant;

use super::PostResult;

/// Fewer ends say nothing, unless the limit is lower.
const ENDS_MIN: u32 = 10;
/// A shorter time says nothing.
const TIME_MIN: Duration = Duration::from_millis(20);
/// The limit binds if this part of the POSTs takes the last place.
const LAST_MIN: f64 = 0.5;
/// If less than this part of the POSTs in flight ends, the others hang.
const MOVING_MIN: f64 = 0.8;
/// An API has stopped if nothing ends for this time, and for several times what a POST takes.
const STOP_MIN: Duration = Duration::from_millis(200);
const STOP_FACTOR: u32 = 4;

/// The POSTs since a change of the limit.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) changed_at: Instant,
    /// Later than the change: POSTs of the earlier limit end first.
    began: Instant,
    /// The last begin or end.
    passed: Instant,
    /// The last end while POSTs were in flight.
    moved: Instant,
    /// The time of a POST before; zero if that is not known.
    usual: Duration,
    begun: u32,
    begun_last: u32,
    settled: u32,
    records: u32,
    overloaded: u32,
    timed_out: u32,
    failed: u32,
    /// The time of POSTs in flight, in seconds: of all, of those that ended without a time-out, of
    /// those that were answered 429 or 503, and of those that were settled.
    busy_s: f64,
    ended_s: f64,
    overloaded_s: f64,
    settled_s: f64,
    /// Squares of the last one.
    settled_s2: f64,
}

/// The result of a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// POSTs in flight, on average.
    pub(super) in_flight: f64,
    /// Seconds of POSTs for each settled record.
    pub(super) cost: f64,
    /// The square of the relative standard error of the cost.
    variance: f64,
    /// The part of the time that 429 and 503 took.
    pub(super) overload: f64,
    /// Most POSTs took the last place.
    pub(super) is_bound: bool,
    /// Few POSTs hang.
    pub(super) is_moving: bool,
}

impl Window {
    pub(super) fn new(now: Instant, usual: Duration) -> Self {
        Self {
            changed_at: now,
            began: now + usual,
            passed: now,
            moved: now,
            usual,
            begun: 0,
            begun_last: 0,
            settled: 0,
            records: 0,
            overloaded: 0,
            timed_out: 0,
            failed: 0,
            busy_s: 0.0,
            ended_s: 0.0,
            overloaded_s: 0.0,
            settled_s: 0.0,
            settled_s2: 0.0,
        }
    }

    /// Measures from now on, without a change of the limit.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Self {
            changed_at: self.changed_at,
            began: now,
            ..Self::new(now, self.usual())
        };
    }

    /// A POST begins beside `in_flight` others.
    pub(super) fn begin(&mut self, now: Instant, in_flight: u32, is_last: bool) {
        self.count_time(now, in_flight);
        if in_flight == 0 {
            self.moved = now;
        }
        self.begun += 1;
        self.begun_last += u32::from(is_last);
    }

    /// One of `in_flight` POSTs ends. Returns whether the API had stopped before.
    pub(super) fn pass(&mut self, now: Instant, in_flight: u32) -> bool {
        self.count_time(now, in_flight);
        let still = now - self.moved;
        self.moved = now;
        let usual = self.usual();
        !usual.is_zero() && still > STOP_MIN.max(usual * STOP_FACTOR)
    }

    fn count_time(&mut self, now: Instant, in_flight: u32) {
        let since = self.passed.max(self.began);
        let passed = now.saturating_duration_since(since);
        self.busy_s += passed.as_secs_f64() * f64::from(in_flight);
        self.passed = now;
    }

    pub(super) fn end(&mut self, began: Instant, now: Instant, result: PostResult) {
        if now < self.began {
            return;
        }
        let seconds = (now - began).as_secs_f64();
        match result {
            PostResult::Settled(records) => {
                self.settled += 1;
                self.records = self.records.saturating_add(records);
                self.settled_s += seconds;
                self.settled_s2 += seconds * seconds;
            }
            PostResult::Overloaded => {
                self.overloaded += 1;
                self.overloaded_s += seconds;
            }
            PostResult::TimedOut => self.timed_out += 1,
            PostResult::Failed => self.failed += 1,
        }
        if result != PostResult::TimedOut {
            self.ended_s += seconds;
        }
    }

    /// The time that is measured.
    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    const fn ends(&self) -> u32 {
        self.settled + self.overloaded + self.timed_out + self.failed
    }

    /// The window says something.
    pub(super) fn is_enough(&self, now: Instant, limit: u32) -> bool {
        self.ends() >= ENDS_MIN.min(limit) && self.elapsed(now) >= TIME_MIN.max(self.usual())
    }

    pub(super) const fn has_many(&self) -> bool {
        self.ends() >= ENDS_MIN
    }

    pub(super) const fn mostly_timed_out(&self) -> bool {
        self.timed_out > self.ends() / 2
    }

    /// Nothing was known before, and something is now.
    pub(super) const fn is_first(&self) -> bool {
        self.usual.is_zero() && self.settled > 0
    }

    /// The mean time of a POST.
    pub(super) fn usual(&self) -> Duration {
        if self.settled == 0 {
            return self.usual;
        }
        Duration::from_secs_f64(self.settled_s / f64::from(self.settled))
    }

    pub(super) fn measure(&self, now: Instant) -> Measured {
        let elapsed = self.elapsed(now).as_secs_f64();
        let settled = f64::from(self.settled.max(1));
        let mean = self.settled_s / settled;
        // NaN without a settled POST, which counts as 0.
        let spread = (self.settled_s2 / settled / (mean * mean) - 1.0).max(0.0);
        Measured {
            in_flight: self.busy_s / elapsed,
            cost: self.ended_s / f64::from(self.records.max(1)),
            // One more or less is never known.
            variance: (spread + 1.0 / settled) / settled,
            overload: if self.overloaded == 0 {
                0.0
            } else {
                self.overloaded_s / self.ended_s
            },
            is_bound: f64::from(self.begun_last) >= LAST_MIN * f64::from(self.begun),
            is_moving: self.ended_s >= MOVING_MIN * self.busy_s,
        }
    }
}

impl Measured {
    /// The standard error of the logarithm of the ratio of two costs.
    pub(super) fn error(self, other: Self) -> f64 {
        (self.variance + other.variance).sqrt()
    }
}
