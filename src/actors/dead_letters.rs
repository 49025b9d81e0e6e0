//! Dead letters: records that were refused for good, or that nobody has taken for too long.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use crate::{
    api::answer::Answer,
    clock::{age, unix_us},
    record::Record,
    spool::{DeathReason, Entry, NotSafe, Queue, Spool},
};

/// Decides when a record is given up, and writes dead letters.
#[derive(Clone)]
pub struct DeadLetters {
    pub spool: Spool,
    /// A record that is older than this is given up; `None` for never.
    pub give_up_after: Option<Duration>,
}

impl DeadLetters {
    /// When `record` is to be given up, if ever.
    pub fn give_up_at(&self, record: &Record) -> Option<Instant> {
        Instant::now().checked_add(self.time_left(record)?)
    }

    /// The time until `record` is to be given up, if ever.
    pub fn time_left(&self, record: &Record) -> Option<Duration> {
        let patience = self.give_up_after?;
        let at_us = record.origin.as_ref().map(|origin| origin.at_us);
        Some(patience.saturating_sub(at_us.map_or(Duration::ZERO, age)))
    }

    /// Resolves when the dead letter of `record` is on disk. Completes `reason` with the lane and
    /// the time.
    ///
    /// # Errors
    /// If it cannot be written. The record must stay where it is.
    pub async fn write(
        &self,
        lane: &str,
        record: &Record,
        mut reason: DeathReason,
    ) -> Result<(), NotSafe> {
        reason.lane = lane.to_owned();
        reason.at_us = unix_us();
        let entry = Entry::new(record, Some(reason.clone()));
        match self.spool.put(Queue::Dead, &entry).await {
            Ok(_) => {
                warn!(
                    lane,
                    id = &*record.id,
                    status = reason.status,
                    answer = reason.answer,
                    "dead letter"
                );
                Ok(())
            }
            Err(why) => {
                error!(lane, id = &*record.id, reason = %why, "cannot write a dead letter: the record stays where it is");
                Err(why)
            }
        }
    }
}

/// The reason for the death of a record that was never POSTed.
pub fn not_posted(why: &str) -> DeathReason {
    DeathReason {
        answer: format!("not POSTed: {why}"),
        ..DeathReason::default()
    }
}

/// Counts one more attempt to deliver a record, and keeps its answer.
pub fn add_attempt(reason: &mut DeathReason, answer: &Answer) {
    reason.attempts += 1;
    (reason.status, reason.answer) = match answer {
        Answer::Status {
            status, excerpt, ..
        } => (u32::from(*status), excerpt.clone()),
        Answer::NoAnswer { why, .. } => (0, why.clone()),
    };
}
