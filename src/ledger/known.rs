//! Records that are known again when they come once more.

use std::{
    collections::{HashSet, hash_map::RandomState},
    hash::BuildHasher as _,
};

use crate::record::Record;

/// How many of the last delivered records are known again when a broker sends them once more, at least.
const KNOWN_MIN: usize = 65_536;

/// The records delivered last, as 128-bit hashes of id and origin under keys of this process: two records are not taken for
/// one. Two generations: when the younger is full, the older is forgotten. A record without an origin is never known.
#[derive(Default)]
pub(super) struct Known {
    keys: (RandomState, RandomState),
    young: HashSet<(u64, u64)>,
    old: HashSet<(u64, u64)>,
}

impl Known {
    fn hash(&self, record: &Record) -> Option<(u64, u64)> {
        let origin = record.origin.as_ref()?;
        let identity = (&record.id, &origin.run, origin.at_us);
        Some((self.keys.0.hash_one(identity), self.keys.1.hash_one(identity)))
    }

    pub fn contains(&self, record: &Record) -> bool {
        if self.young.is_empty() && self.old.is_empty() {
            return false;
        }
        self.hash(record).is_some_and(|hash| self.young.contains(&hash) || self.old.contains(&hash))
    }

    /// Whether it was new.
    pub fn insert(&mut self, record: &Record) -> bool {
        let Some(hash) = self.hash(record) else { return true };
        if self.old.contains(&hash) || !self.young.insert(hash) {
            return false;
        }
        if self.young.len() >= KNOWN_MIN {
            self.old = std::mem::take(&mut self.young);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::record::Origin;

    #[test]
    fn the_last_records_are_known_and_memory_is_bounded() {
        let mut known = Known::default();
        let numbered = |i: usize| Record {
            id: Arc::from(i.to_string()),
            body: Bytes::from_static(b"{}"),
            traceparent: None,
            origin: Some(Origin { run: Arc::from("run"), at_us: 1 }),
        };
        for i in 0..3 * KNOWN_MIN {
            assert!(known.insert(&numbered(i)));
        }
        assert!(known.contains(&numbered(3 * KNOWN_MIN - 1)));
        assert!(known.contains(&numbered(2 * KNOWN_MIN + 1)));
        assert!(!known.contains(&numbered(0)));
        assert!(known.young.len() + known.old.len() <= 2 * KNOWN_MIN);
    }
}
