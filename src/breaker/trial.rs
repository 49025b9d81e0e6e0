//! Judges one record, or one batch, by its failures and by what the API did with others meanwhile.

use std::time::Duration;

use tokio::time::Instant;

/// A record that has failed this often is to blame, if the API is up.
pub(super) const TRIES: u32 = 3;

/// The state of the API when a POST has failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judgement {
    pub at: Instant,
    pub is_up: bool,
    /// A connection could be opened: no record is to blame for one that cannot.
    pub is_connected: bool,
    /// POSTs that had succeeded when this one began, and those that have by now.
    pub succeeded: [u64; 2],
    /// POSTs that have ended, with this one.
    pub ended: u64,
}

/// The failures of one record, or of one batch, beside those of all others.
#[derive(Debug, Default)]
pub struct Trial {
    failures: u32,
    first: Option<Judgement>,
    last: Option<Judgement>,
    /// The last failure, before it was parked or since.
    pub(super) failed_at: Option<Instant>,
    is_parked: bool,
    pub(super) is_proven: bool,
}

impl Trial {
    /// The trial of a record that is parked, and failed last so long ago.
    pub fn parked(is_proven: bool, ago: Duration) -> Self {
        Self {
            failed_at: Instant::now().checked_sub(ago),
            is_parked: true,
            is_proven,
            ..Self::default()
        }
    }

    /// It has failed once more.
    pub(super) fn failed(&mut self, judgement: Judgement) {
        self.failures += 1;
        self.first.get_or_insert(judgement);
        self.last = Some(judgement);
        self.failed_at = Some(judgement.at);
    }

    /// Its turn to probe the API: 0 if it has not failed yet, 1 if it has, 2 if it is proven bad.
    pub(super) fn rank(&self) -> u32 {
        let has_failed = self.is_parked || self.failures > 0;
        u32::from(has_failed) + u32::from(self.is_proven)
    }

    pub(super) const fn is_parked(&self) -> bool {
        self.is_parked
    }

    pub(super) fn first_failed_at(&self) -> Option<Instant> {
        self.first.map(|first| first.at)
    }

    /// It has failed, then the API has taken another, and it has failed again while the API was up.
    pub const fn is_proven(&self) -> bool {
        self.is_proven
    }

    /// It has failed three times, the API is up, and POSTs of others have ended between.
    pub fn is_guilty(&self) -> bool {
        let (Some(first), Some(last)) = (self.first, self.last) else {
            return false;
        };
        let others_ended = last.ended - first.ended >= u64::from(self.failures);
        self.failures >= TRIES && last.is_up && last.is_connected && others_ended
    }

    /// The API has taken others since its first POST began.
    pub fn others_succeeded(&self) -> bool {
        let span = self.first.zip(self.last);
        span.is_some_and(|(first, last)| last.succeeded[1] > first.succeeded[0])
    }

    /// The API was up when it failed last.
    pub fn is_api_up(&self) -> bool {
        self.last.is_some_and(|last| last.is_up)
    }
}
