//! Capped exponential back-off with full jitter: a delay is drawn evenly from zero to the present
//! ceiling, and the ceiling doubles with each failure up to the cap (M. Brooker, "Exponential
//! Backoff And Jitter", 2015). Pure but for the draw.

use std::time::Duration;

/// The delays between the tries of one thing.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// The first delay is at most `first`; none is longer than `cap`.
    pub const fn new(first: Duration, cap: Duration) -> Self {
        Self {
            first,
            cap,
            failures: 0,
        }
    }

    /// The longest that the next delay can be.
    pub fn ceiling(&self) -> Duration {
        self.first
            .saturating_mul(2u32.saturating_pow(self.failures))
            .min(self.cap)
    }

    /// Counts one more failure and draws the delay that follows it.
    pub fn next_delay(&mut self) -> Duration {
        let ceiling = self.ceiling();
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(fastrand::f64())
    }

    /// Starts again from the first delay.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_cap_and_start_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let mut ceilings = Vec::new();
        for _ in 0..7 {
            ceilings.push(backoff.ceiling().as_millis());
            let ceiling = backoff.ceiling();
            assert!(backoff.next_delay() <= ceiling);
        }
        assert_eq!(ceilings, [50, 100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.ceiling(), Duration::from_millis(50));
    }

    #[test]
    fn a_thousand_failures_do_not_overflow() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_mins(1));
        for _ in 0..1000 {
            assert!(backoff.next_delay() <= Duration::from_mins(1));
        }
    }
}
