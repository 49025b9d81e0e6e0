//! Whether a lane may take records: its falls, its ejections, and the back-off after each.

use std::{fmt, time::Duration};

/// The back-off after the first setback. It doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_mins(1);
/// A lane that was healthy for so long has one setback less.
const HEALTHY: Duration = Duration::from_mins(1);
/// A lane is not ejected for fewer outcomes in ten seconds (Envoy's outlier detection: 5 in a row).
const EVIDENCE_MIN: u64 = 5;
/// A lane is ejected below half of its usual success ratio.
const UNUSUAL: f64 = 0.5;
/// Its usual ratio, if it is usually worse. Without this, a lane that has failed for ten minutes
/// would be as usual.
const USUAL_MIN: f64 = 0.5;
/// Probes that succeed for so long end an ejection.
const PROVEN: Duration = Duration::from_secs(8);
const PROBES_MIN: u32 = 3;

/// Minutes that a lane remembers.
const MINUTES: usize = 10;

/// The share of successes. It is never 0, so a score has a value. One failure of one weighs half
/// (as in ingress-nginx and Envoy's least-request with error rates).
pub fn success_ratio([succeeded, failed]: [u64; 2]) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "ten minutes have fewer than 2^52"
    )]
    let [succeeded, all] = [succeeded + 1, succeeded + failed + 1].map(|count| count as f64);
    succeeded / all
}

/// Why a lane is ejected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ejection {
    /// The time at which it ends.
    pub until: Duration,
    /// Its length at the start.
    pub length: Duration,
    /// Of the outcomes in the last ten seconds, those that failed.
    pub failed: u64,
    /// The outcomes in the last ten seconds.
    pub outcomes: u64,
    /// The share of successes in the ten minutes before.
    pub usual: f64,
}

impl fmt::Display for Ejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            length,
            failed,
            outcomes,
            usual,
            ..
        } = self;
        write!(
            f,
            "{failed} of {outcomes} records failed within ten seconds, while {:.1} % succeeded in \
             the ten minutes before; ejected for {} s",
            usual * 100.0,
            length.as_secs(),
        )
    }
}

/// The memory of one lane, of what happened to it.
#[derive(Debug, Default)]
pub struct Past {
    /// Per minute: the minute, successes and failures.
    minutes: [(u64, [u64; 2]); MINUTES],
    /// Falls and ejections, less the healthy minutes since.
    setbacks: u32,
    /// Since when the lane is up and not ejected.
    healthy_since: Option<Duration>,
    /// Successes since the last failure, and the time of the first.
    successes: u32,
    good_since: Option<Duration>,
    /// The present ejection, or the last one.
    pub ejection: Option<Ejection>,
    /// Ejections since the start.
    pub ejections: u64,
}

impl Past {
    /// The lane is up. Returns the time from which it counts as steady: at once the first time, and
    /// after a fall once its back-off is over.
    pub fn up(&mut self, now: Duration) -> Duration {
        self.healthy_since = Some(now);
        self.good_since = None;
        self.successes = 0;
        now + self.backoff()
    }

    /// The lane has fallen.
    pub fn fell(&mut self, now: Duration) {
        self.setback(now);
        self.healthy_since = None;
    }

    /// The lane is down by an order, which is no setback.
    pub fn paused(&mut self, now: Duration) {
        self.setbacks = self.setbacks_at(now);
        self.healthy_since = None;
    }

    /// Records have succeeded. Returns the time since which the probes of an ejected lane have, if
    /// that ends its ejection.
    pub fn succeeded(&mut self, records: u32, now: Duration) -> Option<Duration> {
        self.minute(now)[0] += u64::from(records);
        let since = *self.good_since.get_or_insert(now);
        self.successes = self.successes.saturating_add(records);
        let is_proven = self.successes >= PROBES_MIN && now.saturating_sub(since) >= PROVEN;
        let ejection = self
            .ejection
            .as_mut()
            .filter(|ejection| ejection.until > now)?;
        if !is_proven {
            return None;
        }
        ejection.until = since;
        self.healthy_since = Some(since);
        Some(since)
    }

    /// Records have failed.
    pub fn failed(&mut self, records: u32, now: Duration) {
        self.minute(now)[1] += u64::from(records);
        self.good_since = None;
        self.successes = 0;
    }

    /// The ejection that the outcomes of the last ten seconds call for, if they do.
    pub fn judge(&self, last: [u64; 2], now: Duration) -> Option<Ejection> {
        let [succeeded, failed] = last;
        let outcomes = succeeded + failed;
        if outcomes < EVIDENCE_MIN {
            return None;
        }
        let usual = success_ratio(self.before(last, now));
        (success_ratio(last) < usual.max(USUAL_MIN) * UNUSUAL).then(|| {
            let length = backoff(self.setbacks_at(now) + 1);
            Ejection {
                until: now + length,
                length,
                failed,
                outcomes,
                usual,
            }
        })
    }

    /// The lane is ejected.
    pub fn ejected(&mut self, ejection: Ejection, now: Duration) {
        self.setback(now);
        self.healthy_since = Some(ejection.until);
        self.ejection = Some(ejection);
        self.ejections += 1;
    }

    fn minute(&mut self, now: Duration) -> &mut [u64; 2] {
        let minute = now.as_secs() / 60;
        let slot = usize::try_from(minute).unwrap_or_default() % MINUTES;
        let (of, counts) = &mut self.minutes[slot];
        if *of != minute {
            *of = minute;
            *counts = [0, 0];
        }
        counts
    }

    /// The outcomes of the last ten minutes without `last`, which are those of the last ten
    /// seconds.
    fn before(&self, last: [u64; 2], now: Duration) -> [u64; 2] {
        let minute = now.as_secs() / 60;
        let known = self.minutes.iter();
        let known = known.filter(|(of, _)| *of + MINUTES as u64 > minute);
        let sum = known.fold([0, 0], |[good, bad], (_, counts)| {
            [good + counts[0], bad + counts[1]]
        });
        [0, 1].map(|kind| sum[kind].saturating_sub(last[kind]))
    }

    fn setback(&mut self, now: Duration) {
        self.setbacks = self.setbacks_at(now).saturating_add(1);
    }

    fn setbacks_at(&self, now: Duration) -> u32 {
        let since = self.healthy_since.unwrap_or(now);
        let minutes = now.saturating_sub(since).as_secs() / HEALTHY.as_secs();
        self.setbacks
            .saturating_sub(u32::try_from(minutes).unwrap_or(u32::MAX))
    }

    fn backoff(&self) -> Duration {
        backoff(self.setbacks)
    }
}

/// The back-off after so many setbacks; none without any.
fn backoff(setbacks: u32) -> Duration {
    let Some(doublings) = setbacks.checked_sub(1) else {
        return Duration::ZERO;
    };
    let doubled = BACKOFF_FIRST.saturating_mul(2_u32.saturating_pow(doublings));
    doubled.min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_back_off_doubles_up_to_a_minute_and_a_healthy_minute_takes_one_off() {
        let lengths: Vec<_> = (0..9).map(|setbacks| backoff(setbacks).as_secs()).collect();
        assert_eq!(lengths, [0, 1, 2, 4, 8, 16, 32, 60, 60]);
        let mut past = Past::default();
        assert_eq!(past.up(s(0)), s(0), "steady at once");
        for at in 1..=4 {
            past.fell(s(at));
            assert_eq!(past.up(s(at)), s(at) + backoff(u32::try_from(at).unwrap()));
        }
        past.fell(s(4 + 120));
        assert_eq!(past.up(s(130)), s(134), "4 - 2 + 1 setbacks");
        past.paused(s(140));
        assert_eq!(
            past.up(s(200)),
            s(204),
            "a pause is no setback, and no health"
        );
        past.paused(s(200 + 130));
        assert_eq!(past.up(s(340)), s(341), "the minutes before it count");
    }

    #[test]
    fn a_lane_is_judged_against_its_own_last_ten_minutes() {
        let mut past = Past::default();
        assert_eq!(past.judge([0, 4], s(0)), None, "too few");
        past.failed(5, s(1));
        let fresh = past.judge([0, 5], s(1)).unwrap();
        assert_eq!((fresh.length, fresh.failed, fresh.outcomes), (s(1), 5, 5));

        // 60 % is usual here.
        let mut past = Past::default();
        for at in 0..500 {
            past.succeeded(1, s(at));
            if at % 3 != 0 {
                past.failed(1, s(at));
            }
        }
        assert!(past.judge([4, 6], s(500)).is_none(), "not under half of it");
        let ejection = past.judge([2, 8], s(500)).unwrap();
        assert!((ejection.usual - 0.6).abs() < 0.02);

        // Ten minutes later, that is forgotten.
        assert!(past.judge([4, 6], s(1200)).is_some());

        // The last ten seconds are no part of what is usual.
        let mut past = Past::default();
        for at in 0..10 {
            past.succeeded(1, s(at));
        }
        past.failed(60, s(30));
        for _ in 0..40 {
            past.succeeded(1, s(30));
        }
        assert!(past.judge([40, 60], s(30)).is_some());

        // A lane that has always failed is no exception.
        let mut past = Past::default();
        for at in 0..700 {
            past.failed(1, s(at));
        }
        assert!(past.judge([0, 10], s(700)).is_some());
    }

    #[test]
    fn probes_that_succeed_end_an_ejection_and_one_that_fails_starts_again() {
        let mut past = Past::default();
        past.up(s(0));
        for at in 0..7 {
            past.ejected(past.judge([0, 9], s(at)).unwrap(), s(at));
        }
        assert_eq!(past.ejection.unwrap().until, s(66), "60 s");
        for at in 10..15 {
            assert_eq!(past.succeeded(1, s(at)), None);
        }
        past.failed(1, s(15));
        for at in 16..24 {
            assert_eq!(past.succeeded(1, s(at)), None);
        }
        assert_eq!(past.succeeded(1, s(24)), Some(s(16)));
        assert_eq!(past.succeeded(1, s(25)), None, "it is over");
    }
}
