//! Refusals of a lane's broker that pass: it is full, over a quota, or has an alarm.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::lane_id::LaneId;

/// A confirm ends the refusals if none has come for this long: a queue that is nearly full refuses
/// and confirms in turns.
const CALM: Duration = Duration::from_secs(5);

/// Without traffic no confirm ends the refusals. After this long, the broker may take records again.
const STALE: Duration = Duration::from_secs(30);

/// The refusals of one lane.
#[derive(Default)]
pub struct Refusals {
    /// Records that were refused since the start.
    pub records: u64,
    episode: Option<Episode>,
}

/// Refusals without a calm between them.
struct Episode {
    reason: Arc<str>,
    began: Instant,
    last: Instant,
    records: u64,
}

impl Refusals {
    /// The last reason, while the broker refuses records.
    pub fn reason(&self) -> Option<Arc<str>> {
        let episode = self.episode.as_ref();
        let episode = episode.filter(|episode| episode.last.elapsed() < STALE)?;
        Some(Arc::clone(&episode.reason))
    }

    /// The broker has refused `records` at `now`. The first refusal is logged. Returns whether the
    /// broker took records until now, as far as it is known.
    pub(super) fn refused(
        &mut self,
        lane: LaneId,
        reason: &str,
        records: u64,
        now: Instant,
    ) -> bool {
        let is_new = self.reason().is_none();
        self.records += records;
        let episode = self.episode.get_or_insert_with(|| {
            warn!(%lane, reason, "the broker refuses records: they go by other lanes, or wait on disk");
            Episode {
                reason: reason.into(),
                began: now,
                last: now,
                records: 0,
            }
        });
        episode.last = now;
        episode.records += records;
        if *episode.reason != *reason {
            episode.reason = reason.into();
        }
        is_new
    }

    /// The broker has confirmed a record. The end of the refusals is logged. Returns whether this is
    /// the end.
    pub(super) fn confirmed(&mut self, lane: LaneId, now: impl FnOnce() -> Instant) -> bool {
        // The usual case costs one comparison.
        if self.episode.is_none() {
            return false;
        }
        let now = now();
        let over = |episode: &mut Episode| now - episode.last >= CALM;
        let Some(Episode { began, records, .. }) = self.episode.take_if(over) else {
            return false;
        };
        let refused_s = (now - began).as_secs_f64();
        info!(%lane, refused_s, records, "the broker takes records again");
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: LaneId = LaneId::Nats;

    #[test]
    fn refusals_end_with_a_confirm_after_a_calm() {
        let mut refusals = Refusals::default();
        let began = Instant::now();
        let is_over = refusals.confirmed(LANE, || unreachable!("nothing was refused"));
        assert!(!is_over);
        assert_eq!(refusals.reason(), None);

        assert!(refusals.refused(LANE, "full", 2, began), "the first");
        assert!(!refusals.confirmed(LANE, || began + CALM / 2));
        assert_eq!(refusals.reason().as_deref(), Some("full"), "in turns");
        assert!(!refusals.refused(LANE, "over quota", 1, began + CALM / 2));
        assert!(!refusals.confirmed(LANE, || began + CALM));
        assert_eq!(refusals.reason().as_deref(), Some("over quota"));
        assert!(refusals.confirmed(LANE, || began + CALM / 2 + CALM));
        assert_eq!((refusals.reason(), refusals.records), (None, 3));
    }
}
