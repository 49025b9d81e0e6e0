//! Records that are known again when they come once more.

use crate::{
    lane_id::LaneId,
    recent::{Fingerprint, Hasher128, Recent},
    record::Record,
};

/// How many of the last records are known again, at least: what a table of 2^17 places has room for.
const KNOWN_MIN: usize = (1 << 17) / 8 * 7;

/// Adds a record, and forgets the older half once the younger is full.
fn insert<V>(recent: &mut Recent<V>, found: Fingerprint, value: V) {
    recent.insert(found, value);
    if recent.young_len() >= KNOWN_MIN {
        recent.rotate();
    }
}

/// A record is known by its id and by when it was taken in. The run that answers for it may change: see `Ledger::answers_for`.
fn fingerprint(of: &Hasher128, record: &Record) -> Option<Fingerprint> {
    Some(of.fingerprint((&record.id, record.origin.as_ref()?.at_us)))
}

/// The last records to which something has happened. One without an origin is never known.
#[derive(Default)]
pub(super) struct Known {
    fingerprints: Hasher128,
    last: Recent<()>,
}

impl Known {
    pub fn is_empty(&self) -> bool {
        self.last.is_empty()
    }

    pub fn contains(&self, record: &Record) -> bool {
        // Most often there is nothing to be known again, and no hash to be taken.
        !self.is_empty()
            && fingerprint(&self.fingerprints, record)
                .is_some_and(|found| self.last.get(&found).is_some())
    }

    /// Whether it was new.
    pub fn insert(&mut self, record: &Record) -> bool {
        let Some(found) = fingerprint(&self.fingerprints, record) else {
            return true;
        };
        let is_new = self.last.get(&found).is_none();
        if is_new {
            insert(&mut self.last, found, ());
        }
        is_new
    }
}

/// The records that were delivered last: of each lane, so that what a broker sends again after it was away is known however
/// much went by other lanes meanwhile; and those that may lie in a lane that never confirmed them. One without an origin is never
/// known.
#[derive(Default)]
pub(super) struct Delivered {
    fingerprints: Hasher128,
    lanes: [Recent<()>; LaneId::ALL.len()],
    /// Whether they were delivered.
    doubted: Recent<bool>,
    /// Records of other runs that this run has found on its disk, and answers for. A lane may have them already.
    pub found: Known,
}

impl Delivered {
    pub fn contains(&self, record: &Record) -> bool {
        fingerprint(&self.fingerprints, record).is_some_and(|found| self.has(&found))
    }

    fn has(&self, found: &Fingerprint) -> bool {
        self.lanes.iter().any(|lane| lane.get(found).is_some())
            || self.doubted.get(found) == Some(&true)
    }

    /// It was delivered by `lane`; whether it was new.
    pub fn insert(&mut self, lane: LaneId, record: &Record) -> bool {
        let Some(found) = fingerprint(&self.fingerprints, record) else {
            return true;
        };
        if self.has(&found) {
            return false;
        }
        if let Some(is_delivered) = self.doubted.get_mut(&found) {
            *is_delivered = true;
        }
        insert(&mut self.lanes[lane as usize], found, ());
        true
    }

    /// A lane may have it without having said so.
    pub fn is_doubted(&self, record: &Record) -> bool {
        if self.doubted.is_empty() && self.found.is_empty() {
            return false;
        }
        let is_doubted = |found| self.doubted.get(&found).is_some();
        self.found.contains(record)
            || fingerprint(&self.fingerprints, record).is_some_and(is_doubted)
    }

    /// A lane may have it without having said so, and it goes on by another way.
    pub fn doubt(&mut self, record: &Record) {
        if let Some(found) = fingerprint(&self.fingerprints, record) {
            let is_delivered = self.has(&found);
            insert(&mut self.doubted, found, is_delivered);
        }
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
            traceparent: None,
            origin: Some(Origin {
                run: Arc::from("run"),
                at_us: 1,
            }),
        }
    }

    #[test]
    fn the_last_records_are_known_and_memory_is_bounded() {
        let mut known = Known::default();
        for number in 0..3 * KNOWN_MIN {
            assert!(known.insert(&numbered(number)));
        }
        assert!(known.contains(&numbered(3 * KNOWN_MIN - 1)));
        assert!(known.contains(&numbered(2 * KNOWN_MIN + 1)));
        assert!(!known.contains(&numbered(0)));
        assert!(known.last.len() <= 2 * KNOWN_MIN);
        assert_eq!(
            known.last.old_capacity(),
            KNOWN_MIN,
            "no room that is never used"
        );
    }

    #[test]
    fn what_a_lane_has_delivered_is_known_however_much_others_deliver() {
        let mut delivered = Delivered::default();
        assert!(delivered.insert(LaneId::Nats, &numbered(0)));
        for number in 1..3 * KNOWN_MIN {
            assert!(delivered.insert(LaneId::Grpc, &numbered(number)));
        }
        assert!(!delivered.insert(LaneId::Nats, &numbered(0)));
        assert!(!delivered.contains(&numbered(1)));
    }

    #[test]
    fn what_a_lane_may_have_is_known_once_another_has_delivered_it() {
        let mut delivered = Delivered::default();
        delivered.doubt(&numbered(0));
        assert!(!delivered.contains(&numbered(0)));
        // It had come out before its lane was given up.
        assert!(delivered.insert(LaneId::Nats, &numbered(1)));
        delivered.doubt(&numbered(1));
        for number in [0].into_iter().chain(2..3 * KNOWN_MIN) {
            assert!(delivered.insert(LaneId::Grpc, &numbered(number)));
        }
        for number in 2..3 * KNOWN_MIN {
            delivered.insert(LaneId::Nats, &numbered(number + 3 * KNOWN_MIN));
        }
        assert!(!delivered.insert(LaneId::Nats, &numbered(0)));
        assert!(!delivered.insert(LaneId::Grpc, &numbered(1)));
    }
}
