//! The places of copies by the fingerprints of their records, in about 18 bytes each once there are
//! many. A hash table takes from 19 to 39.

use std::{array, collections::HashMap, hash::BuildHasherDefault, mem};

use crate::{recent::IdentityHasher, spool::Position};

/// Each has its own memory, so that one that grows moves few copies.
const SHARDS: usize = 64;
/// A shard hashes the newest of its copies: so many, or this part of them all.
const YOUNG_MIN: usize = 64;
const YOUNG_PART: usize = 16;

/// Places by fingerprint.
pub struct CopyTable {
    shards: [Shard; SHARDS],
}

#[derive(Default)]
struct Shard {
    young: HashMap<u64, Position, BuildHasherDefault<IdentityHasher>>,
    /// Sorted by fingerprint. A copy that is gone has no place until the next merge.
    old: Vec<(u64, Position)>,
    gone: usize,
}

impl CopyTable {
    /// Sets the place for a fingerprint, and returns the one from before.
    pub fn insert(&mut self, fingerprint: u64, position: Position) -> Option<Position> {
        self.shard(fingerprint).insert(fingerprint, position)
    }

    /// Removes a fingerprint, and returns its place.
    pub fn remove(&mut self, fingerprint: u64) -> Option<Position> {
        self.shard(fingerprint).remove(fingerprint)
    }

    /// Removes all places up to `last`.
    pub fn remove_through(&mut self, last: Position) {
        for shard in &mut self.shards {
            shard.young.retain(|_, position| *position > last);
            shard.shrink(|position| position > last);
        }
    }

    fn shard(&mut self, fingerprint: u64) -> &mut Shard {
        // The hash table within uses the lower bits.
        let index = (fingerprint >> 32) as usize % SHARDS;
        &mut self.shards[index]
    }
}

impl Shard {
    fn insert(&mut self, fingerprint: u64, position: Position) -> Option<Position> {
        if let Some(old) = self.old(fingerprint) {
            return Some(mem::replace(old, position));
        }
        let before = self.young.insert(fingerprint, position);
        if self.young.len() > YOUNG_MIN.max(self.old.len() / YOUNG_PART) {
            self.merge();
        }
        before
    }

    fn remove(&mut self, fingerprint: u64) -> Option<Position> {
        let found = self.young.remove(&fingerprint);
        if found.is_some() {
            return found;
        }
        let position = mem::replace(self.old(fingerprint)?, Position::NONE);
        self.gone += 1;
        if self.gone > self.old.len() / 2 {
            self.shrink(|_| true);
        }
        Some(position)
    }

    /// The place of an older copy.
    fn old(&mut self, fingerprint: u64) -> Option<&mut Position> {
        let found = self.old.binary_search_by_key(&fingerprint, |(key, _)| *key);
        let (_, position) = &mut self.old[found.ok()?];
        (*position != Position::NONE).then_some(position)
    }

    fn merge(&mut self) {
        self.old.retain(|(_, position)| *position != Position::NONE);
        self.gone = 0;
        self.old.reserve_exact(self.young.len());
        self.old.extend(self.young.drain());
        // The stable sort takes the part that is sorted as it is.
        self.old.sort_by_key(|(fingerprint, _)| *fingerprint);
    }

    /// Keeps only the older copies that are not gone and whose places are to `stay`.
    fn shrink(&mut self, stay: impl Fn(Position) -> bool) {
        self.old
            .retain(|(_, position)| *position != Position::NONE && stay(*position));
        self.gone = 0;
        self.old.shrink_to_fit();
    }
}

impl Default for CopyTable {
    fn default() -> Self {
        Self {
            shards: array::from_fn(|_| Shard::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::recent::Hasher128;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Insert(u32, u32),
        Remove(u32),
        RemoveThrough(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // Few things, which are so often there already.
        let thing = 0..20_000_u32;
        let step = prop_oneof![
            60 => (thing.clone(), 0..1000_u32).prop_map(|(thing, at)| Step::Insert(thing, at)),
            40 => thing.prop_map(Step::Remove),
            1 => (0..300_u32).prop_map(Step::RemoveThrough),
        ];
        vec(step, 0..20_000)
    }

    fn fingerprint(hasher: &Hasher128, thing: u32) -> u64 {
        hasher.fingerprint(thing).half()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        #[test]
        fn it_is_a_map(steps in steps()) {
            let hasher = Hasher128::default();
            let mut table = CopyTable::default();
            let mut map = HashMap::new();
            for step in steps {
                match step {
                    Step::Insert(thing, at) => {
                        let position = Position::of(0, at);
                        let before = table.insert(fingerprint(&hasher, thing), position);
                        prop_assert_eq!(before, map.insert(thing, position));
                    }
                    Step::Remove(thing) => {
                        let position = table.remove(fingerprint(&hasher, thing));
                        prop_assert_eq!(position, map.remove(&thing));
                    }
                    Step::RemoveThrough(at) => {
                        let last = Position::of(0, at);
                        table.remove_through(last);
                        map.retain(|_, position| *position > last);
                    }
                }
            }
            for thing in 0..20_000 {
                let position = table.remove(fingerprint(&hasher, thing));
                prop_assert_eq!(position, map.remove(&thing));
            }
        }
    }

    /// The bytes of all shards.
    fn bytes(table: &CopyTable) -> usize {
        let bytes = |shard: &Shard| {
            let slots = (shard.young.capacity() * 8).div_ceil(7);
            shard.old.capacity() * size_of::<(u64, Position)>() + slots * 17
        };
        table.shards.iter().map(bytes).sum()
    }

    #[test]
    fn many_take_little_memory_at_any_number() {
        let hasher = Hasher128::default();
        let mut table = CopyTable::default();
        for number in 0..300_000 {
            table.insert(fingerprint(&hasher, number), Position::of(0, number));
            let copies = number as usize + 1;
            if copies >= 50_000 && copies.is_multiple_of(5000) {
                let bytes = bytes(&table);
                assert!(bytes < 21 * copies, "{copies}: {bytes}");
            }
        }
        for number in 0..270_000 {
            table.remove(fingerprint(&hasher, number));
        }
        assert!(bytes(&table) < 40 * 30_000, "{}", bytes(&table));
    }
}
