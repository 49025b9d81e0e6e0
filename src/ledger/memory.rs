//! The ledger's memory: flags of the last records, by fingerprint.

use std::ops::BitOr;

use crate::{
    lane_id::LaneId,
    recent::{Fingerprint, Hasher128, Recent},
    record::Record,
};

/// At least this many of the last records are known of each flag: the load factor of a table of
/// 2^17 slots.
const KNOWN_MIN: usize = (1 << 17) / 8 * 7;

/// Events that a record has had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Flags(u8);

impl Flags {
    #[cfg(test)]
    pub const NONE: Self = Self(0);
    pub const DELIVERED: Self = Self(1);
    pub const DEAD: Self = Self(1 << 1);
    /// Its client got an error.
    pub const REFUSED: Self = Self(1 << 2);
    /// A lane may have it without having confirmed it.
    pub const MAYBE_PUBLISHED: Self = Self(1 << 3);
    /// An earlier run left it on disk, and this run has taken it over.
    pub const ADOPTED: Self = Self(1 << 4);
    /// A lane has confirmed it from the spool.
    pub const RESENT: Self = Self(1 << 5);
    /// It was parked on disk.
    pub const PARKED: Self = Self(1 << 6);

    /// All flags but `DELIVERED`.
    const RARE: [Self; 6] = [
        Self::DEAD,
        Self::REFUSED,
        Self::MAYBE_PUBLISHED,
        Self::ADOPTED,
        Self::RESENT,
        Self::PARKED,
    ];

    /// Whether it has one of `flags`.
    pub const fn has(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A record is recognised by its id and the time at which it was taken in, since a run may adopt
/// the records of another. A record without an origin has no flags.
#[derive(Default)]
pub(super) struct FlagMemory {
    hasher: Hasher128,
    /// The delivered records of each lane apart: a message that a broker sends again after a while
    /// is recognised however many records went by other lanes meanwhile.
    delivered: [Recent<()>; LaneId::ALL.len()],
    /// The records of each rare flag apart, in the order of [`Flags::RARE`]: a flood of refusals
    /// makes no other record forgotten.
    rare: [Recent<RecordLanes>; Flags::RARE.len()],
}

/// The lanes of a record that may lie in several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RecordLanes {
    /// The lane that has confirmed it last.
    pub confirmed: Option<LaneId>,
    /// The lane that it came out of at its first end: a later one counts as recovered.
    pub ended: Option<LaneId>,
    is_delivered: bool,
}

impl FlagMemory {
    /// The flags of `record`, and its fingerprint, unless it has no origin.
    pub fn look_up(&self, record: &Record) -> (Flags, Option<Fingerprint>) {
        let fingerprint = self.fingerprint(record);
        let flags = fingerprint.map_or(Flags::default(), |key| self.flags(&key));
        (flags, fingerprint)
    }

    /// Whether `record` may lie in a lane that has not confirmed it, in the name of this run or of
    /// an earlier one.
    pub fn is_maybe_published(&self, record: &Record) -> bool {
        // Usually there are no such records, and nothing is hashed.
        let is_empty = |flag| self.rare[at(flag)].is_empty();
        !(is_empty(Flags::MAYBE_PUBLISHED) && is_empty(Flags::ADOPTED))
            && self
                .look_up(record)
                .0
                .has(Flags::MAYBE_PUBLISHED | Flags::ADOPTED)
    }

    pub fn add_delivered(&mut self, lane: LaneId, key: Fingerprint) {
        self.update(&key, |lanes| {
            lanes.ended.get_or_insert(lane);
            lanes.is_delivered = true;
        });
        insert(&mut self.delivered[lane as usize], key, ());
    }

    /// The record that came out of `lane` has become a dead letter, or is parked: `flag` says which.
    pub fn add_end(&mut self, flag: Flags, lane: LaneId, key: Fingerprint) {
        self.add(flag, key);
        self.update(&key, |lanes| {
            lanes.ended.get_or_insert(lane);
        });
    }

    /// The other lane that has confirmed a record with these flags, if it may lie in several.
    pub fn confirmed_by_another(
        &self,
        lane: LaneId,
        flags: Flags,
        key: Option<Fingerprint>,
    ) -> Option<LaneId> {
        let may_lie_in_two = Flags::MAYBE_PUBLISHED | Flags::ADOPTED | Flags::RESENT;
        let key = key.filter(|_| flags.has(may_lie_in_two))?;
        let confirmed = self.lanes(&key).confirmed;
        confirmed.filter(|&other| other != lane)
    }

    /// `lane` has confirmed a record that may lie in another, too. Returns the other if the record
    /// has ended there.
    pub fn confirm(&mut self, lane: LaneId, key: Fingerprint) -> Option<LaneId> {
        self.update(&key, |lanes| lanes.confirmed = Some(lane));
        self.lanes(&key).ended.filter(|&other| other != lane)
    }

    /// Adds a rare flag.
    pub fn add(&mut self, flag: Flags, key: Fingerprint) {
        let lanes = self.lanes(&key);
        insert(&mut self.rare[at(flag)], key, lanes);
    }

    /// The lanes of a record, as far as they are known. Without a rare flag that is the one that
    /// has delivered it.
    pub fn lanes(&self, key: &Fingerprint) -> RecordLanes {
        if let Some(lanes) = self.rare.iter().find_map(|rare| rare.get(key)) {
            return *lanes;
        }
        let delivered = |lane: &LaneId| self.delivered[*lane as usize].get(key).is_some();
        let ended = LaneId::ALL.into_iter().find(delivered);
        RecordLanes {
            confirmed: None,
            ended,
            is_delivered: ended.is_some(),
        }
    }

    fn update(&mut self, key: &Fingerprint, change: impl Fn(&mut RecordLanes)) {
        for rare in &mut self.rare {
            if let Some(lanes) = rare.get_mut(key) {
                change(lanes);
            }
        }
    }

    fn fingerprint(&self, record: &Record) -> Option<Fingerprint> {
        let at_us = record.origin.as_ref()?.at_us;
        Some(self.hasher.fingerprint((&record.id, at_us)))
    }

    fn flags(&self, key: &Fingerprint) -> Flags {
        let mut flags = Flags::default();
        if self.delivered.iter().any(|lane| lane.get(key).is_some()) {
            flags = Flags::DELIVERED;
        }
        for (flag, rare) in Flags::RARE.into_iter().zip(&self.rare) {
            match rare.get(key) {
                Some(lanes) if lanes.is_delivered => flags = flags | flag | Flags::DELIVERED,
                Some(_) => flags = flags | flag,
                None => {}
            }
        }
        flags
    }
}

/// The index of a rare flag.
fn at(flag: Flags) -> usize {
    flag.0.trailing_zeros() as usize - 1
}

/// Forgets the older generation once the younger is full.
fn insert<V>(recent: &mut Recent<V>, key: Fingerprint, value: V) {
    recent.insert(key, value);
    if recent.young_len() >= KNOWN_MIN {
        recent.rotate();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::record::Origin;

    fn numbered(number: usize) -> Record {
        Record {
            id: Arc::from(number.to_string()),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: Some(Origin {
                run: Arc::from("run"),
                at_us: 1,
            }),
            api: None,
            event: None,
        }
    }

    fn flags(memory: &FlagMemory, number: usize) -> Flags {
        memory.look_up(&numbered(number)).0
    }

    fn deliver(memory: &mut FlagMemory, lane: LaneId, numbers: impl IntoIterator<Item = usize>) {
        for number in numbers {
            let key = memory.fingerprint(&numbered(number)).unwrap();
            memory.add_delivered(lane, key);
        }
    }

    fn add(memory: &mut FlagMemory, flag: Flags, number: usize) {
        let key = memory.fingerprint(&numbered(number)).unwrap();
        memory.add(flag, key);
    }

    #[test]
    fn the_last_records_are_known_and_memory_is_bounded() {
        for flag in Flags::RARE {
            let mut memory = FlagMemory::default();
            for number in 0..3 * KNOWN_MIN {
                assert_eq!(flags(&memory, number), Flags::default());
                add(&mut memory, flag, number);
            }
            assert_eq!(flags(&memory, 3 * KNOWN_MIN - 1), flag);
            assert_eq!(flags(&memory, 2 * KNOWN_MIN + 1), flag);
            assert_eq!(flags(&memory, 0), Flags::default());
            let recent = &memory.rare[at(flag)];
            assert!(recent.len() <= 2 * KNOWN_MIN);
            assert_eq!(
                recent.old_capacity(),
                KNOWN_MIN,
                "no room that is never used"
            );
        }
    }

    #[test]
    fn what_a_lane_has_delivered_is_known_however_much_others_deliver() {
        let mut memory = FlagMemory::default();
        deliver(&mut memory, LaneId::Nats, [0]);
        deliver(&mut memory, LaneId::Grpc, 1..3 * KNOWN_MIN);
        assert_eq!(flags(&memory, 0), Flags::DELIVERED);
        assert_eq!(flags(&memory, 1), Flags::default());
    }

    #[test]
    fn what_a_lane_may_have_is_known_once_another_has_delivered_it() {
        let mut memory = FlagMemory::default();
        add(&mut memory, Flags::MAYBE_PUBLISHED, 0);
        assert_eq!(flags(&memory, 0), Flags::MAYBE_PUBLISHED);
        // It had come out before its lane was given up.
        deliver(&mut memory, LaneId::Nats, [1]);
        add(&mut memory, Flags::MAYBE_PUBLISHED, 1);
        deliver(&mut memory, LaneId::Grpc, [0]);
        deliver(&mut memory, LaneId::Grpc, 2..3 * KNOWN_MIN);
        deliver(&mut memory, LaneId::Nats, 5 * KNOWN_MIN..8 * KNOWN_MIN);
        let both = Flags::MAYBE_PUBLISHED | Flags::DELIVERED;
        assert_eq!((flags(&memory, 0), flags(&memory, 1)), (both, both));
    }

    #[test]
    fn a_record_without_an_origin_has_no_flags() {
        let record = Record {
            origin: None,
            ..numbered(0)
        };
        assert!(FlagMemory::default().look_up(&record).1.is_none());
    }
}
