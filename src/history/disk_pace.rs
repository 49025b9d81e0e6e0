//! How soon the disk is full, by the pace at which it fills.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// The pace is that of so long, or at least of the time below it.
const PACE_OVER: Duration = Duration::from_secs(20);
const PACE_FROM: Duration = Duration::from_secs(10);
/// Nobody needs to know of a later time.
const FORESEEN_MAX: f64 = 86_400.0;

/// The bytes on the disk in the last seconds.
#[derive(Default)]
pub struct DiskPace(VecDeque<(Instant, u64)>);

impl DiskPace {
    /// Notes how many bytes there are now.
    pub fn look(&mut self, now: Instant, bytes: u64) {
        self.0.push_back((now, bytes));
        // The first one is as old as the pace needs.
        while self.0.get(1).is_some_and(|(at, _)| now - *at >= PACE_OVER) {
            self.0.pop_front();
        }
    }

    /// The seconds until there are `max` bytes, in coarse steps; `None` if the disk does not fill, its
    /// pace is not known yet, or there is more than a day.
    #[expect(clippy::cast_precision_loss, reason = "no disk has 2^52 bytes")]
    pub fn full_in_s(&self, max: u64) -> Option<f64> {
        let (began, first) = self.0.front()?;
        let (now, last) = self.0.back()?;
        let passed = *now - *began;
        if passed < PACE_FROM || last <= first {
            return None;
        }
        let pace = (last - first) as f64 / passed.as_secs_f64();
        let left = max.saturating_sub(*last) as f64 / pace;
        (left <= FORESEEN_MAX).then(|| coarse(left))
    }
}

/// The time by steps, so that it changes seldom, rounded down but for the last minute.
fn coarse(seconds: f64) -> f64 {
    let step = match seconds {
        s if s < 600.0 => 60.0,
        s if s < 3_600.0 => 300.0,
        _ => 3_600.0,
    };
    ((seconds / step).floor() * step).max(60.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that has had so many bytes in each second.
    fn pace(bytes: impl Iterator<Item = u64>) -> DiskPace {
        let (began, mut pace) = (Instant::now(), DiskPace::default());
        for (second, bytes) in (0..).zip(bytes) {
            pace.look(began + Duration::from_secs(second), bytes);
        }
        pace
    }

    #[test]
    fn a_disk_that_fills_is_foreseen() {
        let filling = pace((0..=20).map(|at| at * 500));
        assert_eq!(filling.full_in_s(100_000), Some(180.0));
        assert_eq!(filling.full_in_s(10_500), Some(60.0), "a second");
        assert_eq!(filling.full_in_s(1_000_000_000_000), None, "in years");
        assert_eq!(pace((0..10).map(|at| at * 500)).full_in_s(100_000), None);
        assert_eq!(pace((0..=20).map(|_| 50_000)).full_in_s(100_000), None);
        assert_eq!(pace((0..=20).rev()).full_in_s(100_000), None);
    }

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        let bytes = (0..100).map(|at| at * 7_000);
        let slower = (1..=20).map(|at| 99 * 7_000 + at * 10);
        let pace = pace(bytes.chain(slower));
        assert_eq!(pace.0.len(), 21);
        assert_eq!(pace.full_in_s(99 * 7_000 + 200 + 1_234), Some(120.0));
    }

    #[test]
    fn a_time_is_told_in_coarse_steps() {
        for (seconds, told) in [
            (1.0, 60.0),
            (179.0, 120.0),
            (599.0, 540.0),
            (1_380.0, 1_200.0),
            (3_601.0, 3_600.0),
            (86_400.0, 86_400.0),
        ] {
            assert!((coarse(seconds) - told).abs() < 0.1, "{seconds}");
        }
    }
}
