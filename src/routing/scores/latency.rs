//! The latency of a lane: a peak-sensitive moving average.

use std::time::Duration;

/// The time after which a sample has lost all but 1/e of its part in the average (finagle's and
/// linkerd's constant).
const DECAY_S: f64 = 10.0;

/// The average of samples by their times (peak-EWMA, as finagle's): a higher sample replaces it, a
/// lower one pulls it down by the time since the one before.
///
/// One rule more: the average falls to the largest sample of the last two seconds that had any,
/// once that is under half of it. Without it, a lane that was a hundred times slower needs 46
/// seconds to be as good as it was, since it gets probes only.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeakAverage {
    /// In seconds; `None` before the first sample.
    average: Option<f64>,
    /// The time of the last sample.
    at: Duration,
    /// The largest sample of the present second, of the one before that had any, and of the one
    /// before that.
    largest: [Option<f64>; 3],
}

impl PeakAverage {
    /// Adds a sample in seconds, and returns the new average.
    pub fn add(&mut self, sample: f64, now: Duration) -> f64 {
        if self.largest[0].is_some() && now.as_secs() > self.at.as_secs() {
            self.largest = [None, self.largest[0], self.largest[1]];
            if let (Some(average), [_, Some(last), Some(before)]) =
                (&mut self.average, self.largest)
            {
                let largest = last.max(before);
                if largest < *average / 2.0 {
                    *average = largest;
                }
            }
        }
        self.largest[0] = Some(self.largest[0].unwrap_or_default().max(sample));
        let average = match self.average {
            Some(average) if sample < average => {
                let since = now.saturating_sub(self.at).as_secs_f64();
                let kept = (-since / DECAY_S).exp();
                average * kept + sample * (1.0 - kept)
            }
            _ => sample,
        };
        self.average = Some(average);
        self.at = self.at.max(now);
        average
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_peak_replaces_the_average_and_lower_samples_pull_it_down_by_their_time() {
        let mut latency = PeakAverage::default();
        assert!((latency.add(0.003, ms(0)) - 0.003).abs() < 1e-9);
        assert!((latency.add(0.005, ms(10)) - 0.005).abs() < 1e-9);
        let expected = 0.005 * (-0.05_f64).exp() + 0.004 * (1.0 - (-0.05_f64).exp());
        assert!((latency.add(0.004, ms(510)) - expected).abs() < 1e-9);
        // A sample from another thread that is a little older.
        assert!((latency.add(0.004, ms(500)) - expected).abs() < 1e-9);
    }

    #[test]
    fn it_falls_after_two_seconds_of_good_samples_and_not_before() {
        let mut latency = PeakAverage::default();
        latency.add(0.2, ms(500));
        assert!(latency.add(0.002, ms(1500)) > 0.15);
        assert!(latency.add(0.003, ms(2500)) > 0.15);
        assert!((latency.add(0.001, ms(3500)) - 0.003).abs() < 0.001);
    }

    #[test]
    fn a_lane_with_one_peak_a_second_stays_slow() {
        let mut latency = PeakAverage::default();
        for at in 0..20_000 {
            let sample = if at % 900 == 0 { 0.2 } else { 0.001 };
            assert!(latency.add(sample, ms(at)) > 0.1, "at {at} ms");
        }
    }
}
