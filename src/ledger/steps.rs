//! The last steps of records, with their times.

use std::{collections::VecDeque, time::Duration};

use schemars::JsonSchema;
use serde::Serialize;
use tracing_mutex::parkinglot::Mutex;

use crate::{
    lane_id::LaneId,
    record::{PassedId, Record},
};

/// The most steps that are kept: two of each record on a good day, for about ten thousand.
const STEPS_MAX: usize = 25_000;

/// A step of a record, or of all records of a POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A lane has it, and its client a receipt.
    Confirmed(LaneId),
    /// The disk has it, and its client a receipt.
    Spooled,
    /// A POST that took so long, and the status of its answer; without an answer, 0.
    Posted {
        lane: LaneId,
        took: Duration,
        status: u16,
    },
    /// It waits on disk for its next try.
    Parked(LaneId),
    /// It is a dead letter.
    Dead(LaneId),
}

/// A step, as [`StepLog::of`] tells it.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(description = "A step of a record.")]
pub struct ToldStep {
    /// Milliseconds since the Unix epoch.
    at_ms: f64,
    /// "accepted", "confirmed", "spooled", "posted", "delivered", "parked" or "dead".
    what: &'static str,
    lane: Option<LaneId>,
    /// How long a POST took.
    took_ms: Option<f64>,
    /// Of the API's answer to a POST; null if there was none.
    status: Option<u16>,
}

struct LoggedStep {
    /// Of a batch, the list of all.
    ids: PassedId,
    /// Microseconds since the Unix epoch; of a POST, its end.
    at_us: u64,
    /// When the record was accepted; 0 if that is not known.
    accepted_us: u64,
    step: Step,
}

/// The last steps of records.
#[derive(Default)]
pub struct StepLog(Mutex<VecDeque<LoggedStep>>);

impl StepLog {
    pub fn add(&self, record: &Record, step: Step, at_us: u64) {
        let accepted_us = record.origin.as_ref().map_or(0, |origin| origin.at_us);
        self.push(LoggedStep {
            ids: (&*record.id).into(),
            at_us,
            accepted_us,
            step,
        });
    }

    /// Adds a POST that has this `Idempotency-Key`.
    pub fn add_post(&self, key: &str, step: Step, at_us: u64) {
        self.push(LoggedStep {
            ids: key.into(),
            at_us,
            accepted_us: 0,
            step,
        });
    }

    fn push(&self, step: LoggedStep) {
        let mut steps = self.0.lock();
        if steps.len() == STEPS_MAX {
            steps.pop_front();
        }
        steps.push_back(step);
    }

    /// The steps of a record that are kept, in the order of their ends. `in_list` is its id as a POST
    /// of many lists it.
    pub fn of(&self, id: &str, in_list: &str) -> Vec<ToldStep> {
        let steps = self.0.lock();
        let is_of = |step: &&LoggedStep| {
            step.ids.is(id) || matches!(step.step, Step::Posted { .. }) && step.ids.lists(in_list)
        };
        let mut told = Vec::new();
        let mut is_accepted = false;
        for step in steps.iter().filter(is_of) {
            if !is_accepted && step.accepted_us > 0 {
                told.push(ToldStep::at(step.accepted_us, "accepted", None));
                is_accepted = true;
            }
            step.tell(&mut told);
        }
        told
    }
}

impl LoggedStep {
    fn tell(&self, told: &mut Vec<ToldStep>) {
        let mut at_end = |what, lane| told.push(ToldStep::at(self.at_us, what, lane));
        match self.step {
            Step::Confirmed(lane) => at_end("confirmed", Some(lane)),
            Step::Spooled => at_end("spooled", None),
            Step::Parked(lane) => at_end("parked", Some(lane)),
            Step::Dead(lane) => at_end("dead", Some(lane)),
            Step::Posted { lane, took, status } => {
                let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                told.push(ToldStep {
                    took_ms: Some(took.as_secs_f64() * 1000.0),
                    status: (status > 0).then_some(status),
                    ..ToldStep::at(self.at_us.saturating_sub(took_us), "posted", Some(lane))
                });
                if (200..300).contains(&status) {
                    told.push(ToldStep::at(self.at_us, "delivered", Some(lane)));
                }
            }
        }
    }
}

impl ToldStep {
    /// A POST may end before the confirm that its record was waiting for.
    pub fn sort(steps: &mut [Self]) {
        steps.sort_by(|one, other| one.at_ms.total_cmp(&other.at_ms));
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds of this century fit"
    )]
    const fn at(at_us: u64, what: &'static str, lane: Option<LaneId>) -> Self {
        Self {
            at_ms: at_us as f64 / 1000.0,
            what,
            lane,
            took_ms: None,
            status: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::Origin;

    fn record(id: &str) -> Record {
        Record {
            id: id.into(),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: Some(Origin {
                run: "run".into(),
                at_us: 1000,
            }),
            api: None,
            event: None,
        }
    }

    fn posted(status: u16) -> Step {
        Step::Posted {
            lane: LaneId::Nats,
            took: Duration::from_micros(500),
            status,
        }
    }

    fn names(log: &StepLog, id: &str, in_list: &str) -> Vec<(&'static str, f64)> {
        let mut steps = log.of(id, in_list);
        ToldStep::sort(&mut steps);
        steps.iter().map(|step| (step.what, step.at_ms)).collect()
    }

    #[test]
    fn a_record_has_its_steps_in_the_order_of_time() {
        let log = StepLog::default();
        // The answer of the API is faster than the confirm of the broker.
        log.add_post("a", posted(503), 3000);
        log.add(&record("a"), Step::Confirmed(LaneId::Nats), 3500);
        log.add_post("a", posted(200), 5000);
        log.add(&record("other"), Step::Dead(LaneId::Nats), 6000);
        let steps = [
            ("accepted", 1.0),
            ("posted", 2.5),
            ("confirmed", 3.5),
            ("posted", 4.5),
            ("delivered", 5.0),
        ];
        assert_eq!(names(&log, "a", "a"), steps);
        assert_eq!(names(&log, "b", "b"), []);
    }

    #[test]
    fn a_post_of_many_is_a_step_of_each() {
        let log = StepLog::default();
        log.add_post("a,b%2Cc", posted(0), 1000);
        assert_eq!(names(&log, "a", "a"), [("posted", 0.5)]);
        assert_eq!(names(&log, "b,c", "b%2Cc"), [("posted", 0.5)]);
        assert_eq!(names(&log, "b", "b"), []);
    }

    #[test]
    fn the_oldest_steps_are_forgotten() {
        let log = StepLog::default();
        for at_us in 0..=STEPS_MAX as u64 {
            let id = if at_us == 0 { "first" } else { "others" };
            log.add(&record(id), Step::Spooled, at_us);
        }
        assert_eq!(names(&log, "first", "first"), []);
        assert_eq!(log.0.lock().len(), STEPS_MAX);
    }
}
