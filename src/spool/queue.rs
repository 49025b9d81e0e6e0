//! The queues on disk.

use std::ops::Range;

use crate::lane_id::{LaneId, LaneSet};

/// One of the queues on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For any lane that is up.
    Waiting,
    /// For the one lane that the client or a rule has named.
    Pinned(LaneId),
    /// For the lanes that a rule has named: more than one, and not all that there are. Each set has a
    /// queue of its own, so that records whose lanes are away hold up no others.
    Routed(LaneSet),
    /// Confirmed by the gRPC lane, and not delivered yet.
    Carried,
    /// Copies of records that this lane has confirmed, while a power cut of its broker could take
    /// them.
    Kept(LaneId),
    /// The API fails at them while it takes others. There is a queue for each length of pause, by its
    /// number: records that pause for about the same time are due in the order in which they came.
    Parked(u8),
    /// They came out of this lane, and their API takes no more for now: it has a failure, or is slower
    /// than they come.
    Held(LaneId),
    /// Dead letters.
    Dead,
}

impl Queue {
    /// The number of queues of parked records.
    pub const PARKED: u8 = 6;
    pub(super) const COUNT: usize = Self::FIRST_HELD + LaneId::ALL.len();
    /// The number of sets of lanes that have a queue: neither empty, nor one lane, nor all.
    pub const ROUTED: usize = (1 << LaneId::ALL.len()) - LaneId::ALL.len() - 2;

    const FIRST_ROUTED: usize = Self::KEPT.end + Self::PARKED as usize;
    const FIRST_HELD: usize = Self::FIRST_ROUTED + Self::ROUTED;

    /// The places of the copies, by [`Queue::at`].
    const KEPT: Range<usize> = 3 + LaneId::ALL.len()..3 + 2 * LaneId::ALL.len();

    pub(super) fn all() -> impl Iterator<Item = Self> {
        [Self::Waiting, Self::Carried, Self::Dead]
            .into_iter()
            .chain(LaneId::ALL.map(Self::Pinned))
            .chain(LaneId::ALL.map(Self::Kept))
            .chain(Self::parked())
            .chain(Self::routed())
            .chain(LaneId::ALL.map(Self::Held))
    }

    /// The queue of records that only `lanes` may take.
    pub fn of(lanes: LaneSet) -> Self {
        match (lanes.lanes().next(), lanes.len()) {
            (Some(lane), 1) => Self::Pinned(lane),
            (Some(_), count) if count < LaneId::ALL.len() => Self::Routed(lanes),
            _ => Self::Waiting,
        }
    }

    /// The queues of records for the lanes that a rule has named.
    pub fn routed() -> impl Iterator<Item = Self> {
        let queues = LaneSet::all().map(Self::of);
        queues.filter(|queue| matches!(queue, Self::Routed(_)))
    }

    /// The queues of parked records, the shortest pause first.
    pub fn parked() -> impl Iterator<Item = Self> {
        (0..Self::PARKED).map(Self::Parked)
    }

    /// The lanes that records of a queue for named lanes may take.
    pub fn lanes(self) -> impl Iterator<Item = LaneId> {
        let lanes = match self {
            Self::Pinned(lane) => LaneSet::from_iter([lane]),
            Self::Routed(lanes) => lanes,
            _ => LaneSet::default(),
        };
        lanes.lanes()
    }

    pub(super) fn at(self) -> usize {
        match self {
            Self::Waiting => 0,
            Self::Carried => 1,
            Self::Dead => 2,
            Self::Pinned(lane) => 3 + lane as usize,
            Self::Kept(lane) => Self::KEPT.start + lane as usize,
            Self::Parked(number) => Self::KEPT.end + number as usize,
            Self::Routed(lanes) => {
                let before = LaneSet::all().take(lanes.bits() as usize);
                let before = before.filter(|set| matches!(Self::of(*set), Self::Routed(_)));
                Self::FIRST_ROUTED + before.count()
            }
            Self::Held(lane) => Self::FIRST_HELD + lane as usize,
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Waiting => "waiting".into(),
            Self::Pinned(lane) => format!("waiting_{lane}"),
            Self::Carried => "carried".into(),
            Self::Routed(lanes) => {
                let names: Vec<_> = lanes.lanes().map(LaneId::name).collect();
                format!("waiting_{}", names.join("_"))
            }
            Self::Kept(lane) => format!("kept_{lane}"),
            Self::Parked(number) => format!("parked_{number}"),
            Self::Held(lane) => format!("held_{lane}"),
            Self::Dead => "dead".into(),
        }
    }
}

/// Records that an operator can list, replay and drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undelivered {
    /// Dead letters.
    Dead,
    /// Records that wait on disk for another try, or for a place of their API.
    Parked,
}

impl Undelivered {
    pub(super) fn queues(self) -> Vec<Queue> {
        match self {
            Self::Dead => vec![Queue::Dead],
            Self::Parked => {
                let held = LaneId::ALL.map(Queue::Held);
                Queue::parked().chain(held).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_queue_has_a_place_and_a_name_of_its_own() {
        let queues: Vec<_> = Queue::all().collect();
        assert_eq!(queues.len(), Queue::COUNT);
        for (place, queue) in queues.iter().enumerate() {
            assert_eq!(queue.at(), place, "{queue:?}");
        }
        let names: HashSet<_> = queues.iter().map(|queue| queue.name()).collect();
        assert_eq!(names.len(), Queue::COUNT);
        assert_eq!(Queue::routed().count(), Queue::ROUTED);
        assert_eq!(Queue::of(LaneSet::default()), Queue::Waiting);
        assert_eq!(Queue::of(LaneId::ALL.into_iter().collect()), Queue::Waiting);
        let all: LaneSet = Queue::routed().flat_map(Queue::lanes).collect();
        assert_eq!(all.len(), LaneId::ALL.len());
    }
}
