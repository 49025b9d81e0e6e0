//! The spool's counts.

use std::time::Duration;

use super::Queue;
use crate::lane_id::LaneId;

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

    /// Records that are parked.
    pub fn parked(&self) -> u64 {
        Queue::parked().map(|queue| self.records(queue)).sum()
    }
}
