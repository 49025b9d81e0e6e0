//! The counts of a lane, of the node, and of POSTs in flight.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::api::answer::FailureClass;

/// The counts of one lane, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered with a receipt.
    pub accepted: u64,
    /// Resent from the spool, where they were counted before.
    pub resent: u64,
    /// Found without a receipt of this run: of an earlier run, of another node, or never confirmed
    /// to its client.
    pub recovered: u64,
    /// The API's 2xx.
    pub delivered: u64,
    /// Became dead letters.
    pub dead: u64,
    /// Came out of a broker again after the API's 2xx, and was not POSTed again.
    pub redelivered: u64,
}

impl Counts {
    /// Safe and not yet delivered.
    pub const fn in_flight(&self) -> u64 {
        // A record may be delivered a moment before its confirm has come back.
        (self.accepted + self.resent + self.recovered).saturating_sub(self.delivered + self.dead)
    }
}

/// The counts of the node that belong to no lane.
#[derive(Clone, Copy, Default)]
pub struct NodeCounts {
    /// Answered with a receipt of the spool.
    pub spooled: u64,
    /// Left by an earlier run, and found in the spool at the start.
    pub recovered_from_disk: u64,
    /// Recovered from disk, and before from a lane: counted in both places.
    pub double_counted: u64,
    /// Ended before their clients were refused.
    pub refused_too_late: u64,
    /// Dead letters that an operator has removed.
    pub dropped: u64,
}

/// POSTs in flight, and those that have failed.
#[derive(Default)]
pub struct ApiCounts {
    in_flight: AtomicU64,
    failures: [AtomicU64; FailureClass::ALL.len()],
}

/// One POST in flight.
pub struct Posting<'a>(&'a ApiCounts);

impl ApiCounts {
    /// A POST begins. It ends when the returned value is dropped.
    pub fn begin(&self) -> Posting<'_> {
        self.in_flight.fetch_add(1, Relaxed);
        Posting(self)
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }

    /// A POST has failed.
    pub fn failed(&self, class: FailureClass) {
        self.failures[class as usize].fetch_add(1, Relaxed);
    }

    /// The POSTs that have failed in this way.
    pub fn failures(&self, class: FailureClass) -> u64 {
        self.failures[class as usize].load(Relaxed)
    }
}

impl Drop for Posting<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}
