//! Parks records: the API fails at them while it takes others. They wait on disk for their next
//! try, and hold up no other.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::{debug, warn};
use tracing_mutex::parkinglot::Mutex;

use super::dead_letters::DeadLetters;
use crate::{
    clock::unix_us,
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, Tag},
    spool::{DeathReason, Entry, EntryKey, NotSafe, Parked, Queue},
};

/// The longest pause before each try; the last holds for all that follow. A pause is at least half
/// of it, so that records that fail together do not come together again.
pub const PAUSES: [Duration; Queue::PARKED as usize] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(16),
    Duration::from_secs(64),
    Duration::from_secs(256),
    Duration::from_mins(10),
];

/// Records that are parked within this time of a warning are of its episode.
const EPISODE: Duration = Duration::from_mins(1);

/// Puts records on disk with their next try.
#[derive(Clone)]
pub struct Parking {
    dead_letters: DeadLetters,
    /// This run of the node.
    run: Arc<str>,
    /// When it was last logged that records are parked.
    told_at: Arc<Mutex<Option<Instant>>>,
}

/// A record that the API fails at.
pub struct Failing<'a> {
    pub record: &'a Record,
    pub lane: LaneId,
    pub tag: &'a Tag,
    /// The attempts so far, and the last answer.
    pub reason: &'a DeathReason,
    /// How often it was parked before.
    pub pauses: u32,
    /// The API has taken another after it had failed.
    pub is_proven: bool,
    /// The pause that the API asks for.
    pub at_least: Option<Duration>,
}

impl Parking {
    pub fn new(dead_letters: DeadLetters, run: Arc<str>) -> Self {
        Self {
            dead_letters,
            run,
            told_at: Arc::default(),
        }
    }

    /// Resolves when the record is on disk.
    ///
    /// # Errors
    /// If it cannot be written. The record must stay where it is.
    pub async fn park(&self, failing: &Failing<'_>) -> Result<EntryKey, NotSafe> {
        let Failing {
            record,
            lane,
            tag,
            reason,
            pauses,
            is_proven,
            at_least,
        } = *failing;
        let left = self.dead_letters.time_left(record);
        let (queue, pause) = next_pause(pauses, at_least, left, fastrand::f64());
        let now_us = unix_us();
        let reason = DeathReason {
            lane: lane.name().to_owned(),
            at_us: now_us,
            ..reason.clone()
        };
        let mut entry = Entry::new(record, Some(reason));
        entry.set_missing_origin(&self.run, now_us);
        entry.parked = Some(Parked {
            due_us: now_us + u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
            pauses: pauses + 1,
            tag: tag.name().to_owned(),
            proven: is_proven,
        });
        let spool = &self.dead_letters.spool;
        let stats = spool.stats();
        let is_first = stats.parked() == stats.held();
        let key = spool.put(queue, &entry).await?;
        let id = &*record.id;
        let attempts = entry.reason.map(|reason| reason.attempts);
        debug!(%lane, id, attempts, retry_in_s = pause.as_secs_f64(), "parked");
        if is_first && self.is_to_be_told() {
            let DeathReason { status, answer, .. } = failing.reason;
            warn!(
                %lane,
                id,
                status,
                answer,
                "the API fails at this record while it answers others: it is parked, and tried again; \
                 see `waypost dead list --parked`"
            );
        }
        Ok(key)
    }

    /// Records that the API has not taken yet, in the lanes and parked.
    pub fn waiting(&self, ledger: &Ledger) -> u64 {
        ledger.totals().in_flight() + self.dead_letters.spool.stats().parked()
    }

    /// An episode begins with the first parked record. Many may be the first at the same time.
    fn is_to_be_told(&self) -> bool {
        let now = Instant::now();
        let mut told_at = self.told_at.lock();
        let is_new = told_at.is_none_or(|at| now - at >= EPISODE);
        if is_new {
            *told_at = Some(now);
        }
        is_new
    }
}

/// The pause of a record that was parked `pauses` times before, and its queue. `draw` is from 0 to
/// 1. The last try is when the record is to be given up: that is in `left`, if ever.
fn next_pause(
    pauses: u32,
    at_least: Option<Duration>,
    left: Option<Duration>,
    draw: f64,
) -> (Queue, Duration) {
    let number = (pauses as usize).min(PAUSES.len() - 1);
    let drawn = PAUSES[number].mul_f64(0.5 + draw / 2.0);
    let mut pause = drawn.max(at_least.unwrap_or_default());
    if let Some(left) = left.filter(|left| !left.is_zero()) {
        pause = pause.min(left);
    }
    let queues = Queue::parked().zip(PAUSES);
    let fitting = queues
        .filter(|(_, longest)| pause <= *longest)
        .map(|(queue, _)| queue)
        .next();
    let longest = Queue::Parked(Queue::PARKED - 1);
    (
        fitting.unwrap_or(longest),
        pause.min(PAUSES[PAUSES.len() - 1]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_cap_and_end_with_the_records_time() {
        let seconds = Duration::from_secs_f64;
        for (pauses, at_least, left, draw, queue, pause) in [
            (0, None, None, 0.0, 0, 0.5),
            (0, None, None, 1.0, 0, 1.0),
            (1, None, None, 0.0, 1, 2.0),
            (2, None, None, 1.0, 2, 16.0),
            (3, None, None, 0.0, 3, 32.0),
            (4, None, None, 1.0, 4, 256.0),
            (5, None, None, 0.0, 5, 300.0),
            (5, None, None, 1.0, 5, 600.0),
            (u32::MAX, None, None, 1.0, 5, 600.0),
            // The API asks for more, or for less.
            (0, Some(30.0), None, 0.0, 3, 30.0),
            (2, Some(1.0), None, 0.0, 2, 8.0),
            (0, Some(300.0), None, 0.0, 5, 300.0),
            (0, Some(9000.0), None, 0.0, 5, 600.0),
            // It is given up before that.
            (5, None, Some(3.0), 0.0, 1, 3.0),
            (0, Some(300.0), Some(0.25), 0.0, 0, 0.25),
            (0, None, Some(9000.0), 1.0, 0, 1.0),
            // Its time is over, and no API could be reached.
            (1, None, Some(0.0), 1.0, 1, 4.0),
        ] {
            let expected = (Queue::Parked(queue), seconds(pause));
            let next = next_pause(pauses, at_least.map(seconds), left.map(seconds), draw);
            assert_eq!(next, expected, "{pauses}, {at_least:?}, {left:?}, {draw}");
        }
    }
}
