//! The counts of a lane, of the node, and of POSTs in flight.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{
    DeliveryTimes, LaneProgress, Latency, Refusals, comparison::Comparison, taken::TakenOver,
};
use crate::api::answer::FailureClass;

/// The counts and times of one lane.
#[derive(Default)]
pub struct LaneLedger {
    pub counts: Counts,
    pub refusals: Refusals,
    /// From handing a record to the lane to its confirm.
    pub publish: Latency,
    /// From a POST to its answer or failure.
    pub post: Latency,
    /// From accepted to delivered.
    pub delivery: DeliveryTimes,
    pub progress: LaneProgress,
    /// Records of other runs that ended here.
    pub taken_over: TakenOver,
    /// Records of an earlier run that this one has found on disk and sent again. The broker may have
    /// had them already, and then they come out in the name of that run.
    pub readopted: u64,
    pub(super) comparison: Comparison,
}

/// The counts of one lane, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered with a receipt.
    pub accepted: u64,
    /// Resent from the spool, where they were counted before.
    pub resent: u64,
    /// Confirmed by this lane, and counted in another since.
    pub moved: u64,
    /// Found without a receipt of this run: of an earlier run, of another node, or never confirmed
    /// to its client.
    pub recovered: u64,
    /// The API's 2xx.
    pub delivered: u64,
    /// Became dead letters.
    pub dead: u64,
    /// Parked on disk, each once, until they end.
    pub parked: u64,
    /// Delivered or dead after they were parked, by this run or an earlier one.
    pub unparked: u64,
    /// Came out of a broker again after the API's 2xx, and was not POSTed again.
    pub redelivered: u64,
    /// Gone from the broker, at which another node consumes: see [`Counts::handed_over`].
    pub gone_elsewhere: u64,
    /// Gone from the broker, at which no other node consumes: see [`Counts::missing`].
    pub gone_missing: u64,
}

impl Counts {
    /// Came into the lane and has not come out of it here.
    pub const fn outstanding(&self) -> u64 {
        let (came, ended) = self.moves();
        // A record may be delivered a moment before its confirm has come back.
        came.saturating_sub(ended)
    }

    /// Records that came into the lane, and those that ended or went to another.
    pub(super) const fn moves(&self) -> (u64, u64) {
        let came = self.accepted + self.resent + self.recovered;
        (came, self.ended())
    }

    pub(super) const fn ended(&self) -> u64 {
        // A record that is parked has ended here, and ends once more.
        self.moved + self.delivered + self.dead + self.parked - self.unparked
    }

    /// Taken from the broker by another node. A record that was counted here and comes out all the
    /// same is not any more.
    pub const fn handed_over(&self) -> u64 {
        at_most(self.gone_elsewhere, self.outstanding())
    }

    /// Lost by the broker.
    pub const fn missing(&self) -> u64 {
        at_most(self.gone_missing, self.outstanding() - self.handed_over())
    }

    /// Safe and not yet delivered.
    pub const fn in_flight(&self) -> u64 {
        self.outstanding() - self.handed_over() - self.missing()
    }
}

/// `Ord::min` is not `const`.
const fn at_most(count: u64, most: u64) -> u64 {
    if count < most { count } else { most }
}

/// The counts of the node that belong to no lane.
#[derive(Clone, Copy, Default)]
pub struct NodeCounts {
    /// Answered with a receipt of the spool.
    pub spooled: u64,
    /// Left by an earlier run, and found in the spool at the start.
    pub recovered_from_disk: u64,
    /// Recovered from disk, or parked, and from a lane as well: counted in both places.
    pub double_counted: u64,
    /// Dead letters that an operator has removed.
    pub dropped: u64,
}

/// POSTs in flight, and those that have failed.
#[derive(Default)]
pub struct ApiCounts {
    in_flight: AtomicU64,
    failures: [AtomicU64; FailureClass::ALL.len()],
    last_delivery_us: AtomicU64,
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

    /// A POST has succeeded at this time.
    pub fn delivered(&self, at_us: u64) {
        self.last_delivery_us.fetch_max(at_us, Relaxed);
    }

    /// The time of the last delivery, in microseconds since the Unix epoch; 0 for never.
    pub fn last_delivery_us(&self) -> u64 {
        self.last_delivery_us.load(Relaxed)
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
