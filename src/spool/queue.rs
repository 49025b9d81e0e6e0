//! The queues on disk.

use std::ops::Range;

use crate::lane_id::LaneId;

/// One of the queues on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For any lane that is up.
    Waiting,
    /// For the lane that the client has named.
    Pinned(LaneId),
    /// Confirmed by the gRPC lane, and not delivered yet.
    Carried,
    /// Copies of records that this lane has confirmed, while a power cut of its broker could take
    /// them.
    Kept(LaneId),
    /// The API fails at them while it takes others. There is a queue for each length of pause, by its
    /// number: records that pause for about the same time are due in the order in which they came.
    Parked(u8),
    /// Dead letters.
    Dead,
}

impl Queue {
    /// The number of queues of parked records.
    pub const PARKED: u8 = 6;
    pub(super) const COUNT: usize = Self::KEPT.end + Self::PARKED as usize;

    /// The places of the copies, by [`Queue::at`].
    const KEPT: Range<usize> = 3 + LaneId::ALL.len()..3 + 2 * LaneId::ALL.len();

    pub(super) fn all() -> impl Iterator<Item = Self> {
        [Self::Waiting, Self::Carried, Self::Dead]
            .into_iter()
            .chain(LaneId::ALL.map(Self::Pinned))
            .chain(LaneId::ALL.map(Self::Kept))
            .chain(Self::parked())
    }

    /// The queues of parked records, the shortest pause first.
    pub fn parked() -> impl Iterator<Item = Self> {
        (0..Self::PARKED).map(Self::Parked)
    }

    pub(super) const fn at(self) -> usize {
        match self {
            Self::Waiting => 0,
            Self::Carried => 1,
            Self::Dead => 2,
            Self::Pinned(lane) => 3 + lane as usize,
            Self::Kept(lane) => Self::KEPT.start + lane as usize,
            Self::Parked(number) => Self::KEPT.end + number as usize,
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Waiting => "waiting".into(),
            Self::Pinned(lane) => format!("waiting_{lane}"),
            Self::Carried => "carried".into(),
            Self::Kept(lane) => format!("kept_{lane}"),
            Self::Parked(number) => format!("parked_{number}"),
            Self::Dead => "dead".into(),
        }
    }
}

/// Records that an operator can list, replay and drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undelivered {
    /// Dead letters.
    Dead,
    /// Records that wait on disk for another try.
    Parked,
}

impl Undelivered {
    pub(super) fn queues(self) -> Vec<Queue> {
        match self {
            Self::Dead => vec![Queue::Dead],
            Self::Parked => Queue::parked().collect(),
        }
    }
}
