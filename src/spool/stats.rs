//! The spool's counts.

use std::{array, ops::Add, time::Duration};

use super::Queue;
use crate::lane_id::{LaneId, PerLane};

/// The contents of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolStats {
    /// Of the copies, those that are to be published again.
    pub(super) records: [u64; Queue::COUNT],
    /// Records of the gRPC lane that an earlier run has left, and that are still there.
    pub found_carried: u64,
    pub(super) kept: [u64; LaneId::ALL.len()],
    /// All files together.
    pub bytes: u64,
    /// About the bytes of what is there, copies apart. Files also have what is gone, until all of a
    /// file is.
    pub live_bytes: u64,
    /// The same for the copies of each lane.
    pub kept_bytes: PerLane<u64>,
    /// Syncs since the start that made records safe, each of one queue.
    pub commits: u64,
    /// Records that they made safe.
    pub committed: u64,
    /// Time that these syncs took.
    pub commit_time: Duration,
    /// The last attempt to write failed, or there is no room: nothing can be put.
    pub refuses: bool,
}

impl SpoolStats {
    pub fn records(&self, queue: Queue) -> u64 {
        self.records[queue.at()]
    }

    /// All records, letters and copies.
    pub fn on_disk(&self) -> u64 {
        self.records.iter().chain(&self.kept).sum()
    }

    /// How many have left, to compare with another time of the same run.
    pub fn drained(&self) -> i64 {
        self.committed.wrapping_sub(self.on_disk()).cast_signed()
    }

    /// Copies of records that `lane` has confirmed.
    pub const fn kept(&self, lane: LaneId) -> u64 {
        self.kept[lane as usize]
    }

    /// Records that wait for a lane.
    pub fn waiting(&self) -> u64 {
        let pinned = LaneId::ALL.map(Queue::Pinned);
        let queues = pinned.into_iter().chain(Queue::routed());
        let limited: u64 = queues.map(|queue| self.records(queue)).sum();
        self.records(Queue::Waiting) + limited
    }

    /// Records that are parked, or held until their API has a place.
    pub fn parked(&self) -> u64 {
        let parked: u64 = Queue::parked().map(|queue| self.records(queue)).sum();
        parked + self.held()
    }

    /// The same without records that are held.
    #[must_use]
    pub fn without_held(mut self) -> Self {
        for lane in LaneId::ALL {
            self.records[Queue::Held(lane).at()] = 0;
        }
        self
    }

    /// Records that are held until their API has a place.
    pub fn held(&self) -> u64 {
        LaneId::ALL
            .map(|lane| self.records(Queue::Held(lane)))
            .iter()
            .sum()
    }
}

#[cfg(test)]
impl SpoolStats {
    /// A disk with so many records that wait, of so many that came.
    pub fn of_waiting(waiting: u64, committed: u64, bytes: u64) -> Self {
        let mut stats = Self {
            bytes,
            committed,
            ..Self::default()
        };
        stats.records[Queue::Waiting.at()] = waiting;
        stats
    }
}

/// The contents of two spools together.
impl Add for SpoolStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            records: array::from_fn(|at| self.records[at] + other.records[at]),
            found_carried: self.found_carried + other.found_carried,
            kept: array::from_fn(|at| self.kept[at] + other.kept[at]),
            bytes: self.bytes + other.bytes,
            live_bytes: self.live_bytes + other.live_bytes,
            kept_bytes: array::from_fn(|at| self.kept_bytes[at] + other.kept_bytes[at]),
            commits: self.commits + other.commits,
            committed: self.committed + other.committed,
            commit_time: self.commit_time + other.commit_time,
            refuses: self.refuses || other.refuses,
        }
    }
}
