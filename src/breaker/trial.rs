//! Judges one record, or one batch, by its failures and by what the API did with others meanwhile.

/// A record that has failed this often is to blame, if the API is up.
pub(super) const TRIES: u32 = 3;

/// The state of the API when a POST has failed.
#[derive(Clone, Copy, Debug)]
pub struct Judgement {
    pub(super) is_up: bool,
    /// POSTs that had succeeded when this one began, and those that have by now.
    pub(super) succeeded: [u64; 2],
    /// POSTs that have ended, with this one.
    pub(super) ended: u64,
}

/// The failures of one record, or of one batch, beside those of all others.
#[derive(Debug, Default)]
pub struct Trial {
    failures: u32,
    first: Option<Judgement>,
    last: Option<Judgement>,
}

impl Trial {
    /// It has failed once more.
    pub fn failed(&mut self, judgement: Judgement) {
        self.failures += 1;
        self.first.get_or_insert(judgement);
        self.last = Some(judgement);
    }

    pub const fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// It has failed three times, the API is up, and others have had an answer between.
    pub fn is_guilty(&self) -> bool {
        let (Some(first), Some(last)) = (self.first, self.last) else {
            return false;
        };
        let others_ended = last.ended - first.ended >= u64::from(self.failures);
        self.failures >= TRIES && last.is_up && others_ended
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
