//! How far behind a lane is.

use std::time::Duration;

use crate::{
    clock::{age, unix_us},
    record::Record,
};

/// Times of one lane, in microseconds since the Unix epoch; 0 for never.
#[derive(Clone, Copy, Debug, Default)]
pub struct LaneProgress {
    /// The last delivery.
    pub last_delivery_us: u64,
    /// The latest time at which a record was accepted that has come out of the lane.
    newest_out_us: u64,
    /// The last time at which a record came into the lane and none was in it.
    busy_since_us: u64,
}

impl LaneProgress {
    /// A record comes into the lane, and none is in it.
    pub(super) fn begins(&mut self) {
        self.busy_since_us = unix_us();
    }

    /// The record has come out of the lane, delivered or set aside.
    pub(super) fn came_out(&mut self, record: &Record) {
        if let Some(origin) = &record.origin {
            self.newest_out_us = self.newest_out_us.max(origin.at_us);
        }
    }

    /// The age of the oldest record in a lane that has some. It is exact if records come out in the
    /// order in which they were accepted; a record that others overtake may be older.
    pub fn lag(&self) -> Duration {
        age(self.newest_out_us.max(self.busy_since_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lane_id::LaneId, ledger::Ledger, record::Origin};

    const HOUR_US: u64 = 3_600_000_000;

    fn record(id: &str, age_us: u64) -> Record {
        Record {
            id: id.into(),
            body: "{}".into(),
            trace: None,
            origin: Some(Origin {
                run: "run".into(),
                at_us: unix_us() - age_us,
            }),
            api: None,
            event: None,
        }
    }

    fn lag_s(ledger: &Ledger) -> u64 {
        ledger.lane(LaneId::Nats).progress.lag().as_secs()
    }

    #[test]
    fn a_lane_is_as_far_behind_as_the_record_that_came_out_last() {
        let ledger = Ledger::new("run".into());
        let [old, new] = [record("a", 2 * HOUR_US), record("b", HOUR_US)];
        for record in [&old, &new, &record("c", 0)] {
            ledger.accepted(LaneId::Nats, record, Duration::ZERO);
        }
        // They came into this lane just now.
        assert_eq!(lag_s(&ledger), 0);
        ledger.lane(LaneId::Nats).progress.busy_since_us = 1;
        ledger.delivered(LaneId::Nats, [&old]);
        assert_eq!(lag_s(&ledger), 2 * 3600);
        ledger.dead(LaneId::Nats, &new);
        assert_eq!(lag_s(&ledger), 3600);
    }

    #[test]
    fn a_lane_that_was_empty_is_not_behind() {
        let ledger = Ledger::new("run".into());
        let old = record("a", HOUR_US);
        ledger.accepted(LaneId::Nats, &old, Duration::ZERO);
        ledger.delivered(LaneId::Nats, [&old]);
        assert_eq!(lag_s(&ledger), 0, "the lane has had it since just now");
        ledger.lane(LaneId::Nats).progress.busy_since_us = 1;
        assert_eq!(lag_s(&ledger), 3600);
        ledger.accepted(LaneId::Nats, &record("b", 0), Duration::ZERO);
        assert_eq!(lag_s(&ledger), 0);
    }
}
