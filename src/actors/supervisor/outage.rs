//! The log lines of a lane that is away: one warning when an outage begins, one per minute while it
//! lasts, and one line when the lane is up again.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::lane_id::LaneId;

/// A longer outage is told again after this.
const TELL_AGAIN: Duration = Duration::from_mins(1);
/// A lane that was up for less time is still in the same outage: it may come and go many times a
/// second.
const SETTLED: Duration = Duration::from_secs(10);

/// The outages of one lane, as far as they are told.
#[derive(Default)]
pub(super) struct OutageLog {
    /// The last warning.
    told_at: Option<Instant>,
    /// When the lane came up, if it was up since the last failure.
    up_since: Option<Instant>,
    /// The log says that the lane is away.
    is_told: bool,
}

impl OutageLog {
    /// The lane is up after `away`, which began with the lane's start or its last loss.
    pub(super) fn up(&mut self, lane: LaneId, away: Duration) {
        let is_first = self.told_at.is_none() && self.up_since.is_none();
        self.up_since = Some(Instant::now());
        if self.is_told {
            info!(%lane, away_s = away.as_secs_f64(), "lane is up again");
        } else if is_first {
            info!(%lane, "lane is up");
        }
        self.is_told = false;
    }

    /// The lane has failed for `reason`, and is away for the time `away`. It starts again after
    /// `retry_in`.
    pub(super) fn failed(
        &mut self,
        lane: LaneId,
        reason: &str,
        away: Duration,
        retry_in: Duration,
    ) {
        let was_settled = self.up_since.is_some_and(|at| at.elapsed() >= SETTLED);
        // A lane that comes and goes was up in between.
        let is_new = self.up_since.take().is_some() || self.told_at.is_none();
        if was_settled || self.told_at.is_none_or(|at| at.elapsed() >= TELL_AGAIN) {
            let (away_s, retry_in_s) = (away.as_secs_f64(), retry_in.as_secs_f64());
            if is_new {
                warn!(%lane, reason, retry_in_s, "lane is away");
            } else {
                warn!(%lane, reason, away_s, retry_in_s, "lane is still away");
            }
            self.told_at = Some(Instant::now());
            self.is_told = true;
        }
    }
}
