//! When failures in a row open the breaker.

use std::time::Duration;

use tokio::time::Instant;

use super::Trial;

/// Failures in a row that open it if none of them has reached the API.
pub(super) const FAILURES_MAX: u32 = 5;
/// Failures that have reached the API may be the records' fault. As many in a row open it once the
/// API has taken nothing for this long.
pub(super) const REACHED_PATIENCE: Duration = Duration::from_secs(5);
/// The same when only parked records are left to fail: a stream may end with a few bad ones.
/// Longer than the first two pauses.
pub(super) const PARKED_PATIENCE: Duration = Duration::from_secs(10);

/// Failures since a POST has succeeded last.
#[derive(Clone, Copy, Default)]
pub(super) struct Failures {
    count: u32,
    /// Those since the last that has reached the API.
    unreached: u32,
    first: Option<Instant>,
    /// Failures of records in the lanes, without a long time between them: the first and the last.
    run: Option<(Instant, Instant)>,
}

impl Failures {
    /// Counts a POST that has failed. Returns whether the API is down.
    pub(super) fn add(&mut self, trial: &Trial, is_reached: bool, now: Instant) -> bool {
        self.count += 1;
        self.unreached = if is_reached { 0 } else { self.unreached + 1 };
        let first = *self.first.get_or_insert(now);
        let (since, patience) = if trial.is_parked() {
            (first, PARKED_PATIENCE)
        } else {
            // After a time without POSTs, the failures of others say nothing about the API now.
            let run = self.run.filter(|(_, last)| now - *last < REACHED_PATIENCE);
            let since = run.map_or(now, |(first, _)| first);
            self.run = Some((since, now));
            let own = trial.first_failed_at().unwrap_or(now);
            (since.min(own), REACHED_PATIENCE)
        };
        self.unreached >= FAILURES_MAX || self.count >= FAILURES_MAX && now - since >= patience
    }
}
