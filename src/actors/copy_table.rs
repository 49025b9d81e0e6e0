//! The places of copies by the fingerprints of their records, in about 18 bytes each once there are
//! many. A hash table takes from 19 to 39, and as much again in blocks that the allocator cannot use
//! when it has grown.

use std::{array, collections::HashMap, hash::BuildHasherDefault, iter, mem};

use crate::{recent::IdentityHasher, spool::Position};

/// Each is sorted by itself, so that a merge moves few copies.
const SHARDS: usize = 64;
/// A shard hashes the newest of its copies: so many, or this part of them all.
const YOUNG_MIN: usize = 64;
const YOUNG_PART: usize = 16;
/// Copies of a page: 4 KiB.
const PAGE: usize = 256;

/// Places by fingerprint.
pub struct CopyTable {
    shards: [Shard; SHARDS],
}

#[derive(Default)]
struct Shard {
    young: HashMap<u64, Position, BuildHasherDefault<IdentityHasher>>,
    /// A copy that is gone has no place until the next merge.
    old: SortedPages,
    gone: usize,
}

/// Copies in the order of their fingerprints. All pages but the last are full, and all have the same
/// size, so that a page that is freed fits the next one.
#[derive(Default)]
struct SortedPages(Vec<Vec<(u64, Position)>>);

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
            shard.merge(iter::empty(), |position| position > last);
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
        if let Some(old) = self.old.get_mut(fingerprint) {
            return Some(mem::replace(old, position));
        }
        let before = self.young.insert(fingerprint, position);
        if self.young.len() > YOUNG_MIN.max(self.old.len() / YOUNG_PART) {
            let mut young: Vec<_> = self.young.drain().collect();
            young.sort_unstable_by_key(|(fingerprint, _)| *fingerprint);
            self.merge(young.into_iter(), |_| true);
        }
        before
    }

    fn remove(&mut self, fingerprint: u64) -> Option<Position> {
        let found = self.young.remove(&fingerprint);
        if found.is_some() {
            return found;
        }
        let old = self.old.get_mut(fingerprint)?;
        let position = mem::replace(old, Position::NONE);
        self.gone += 1;
        if self.gone > self.old.len() / 2 {
            self.merge(iter::empty(), |_| true);
        }
        Some(position)
    }

    /// Adds copies, which are sorted, to those of the older ones that are to `stay`.
    fn merge(
        &mut self,
        added: impl Iterator<Item = (u64, Position)>,
        stay: impl Fn(Position) -> bool,
    ) {
        let mut added = added.peekable();
        // A page is freed before another is needed.
        for (fingerprint, position) in mem::take(&mut self.old).0.into_iter().flatten() {
            while let Some(copy) = added.next_if(|(added, _)| *added < fingerprint) {
                self.old.push(copy);
            }
            if position != Position::NONE && stay(position) {
                self.old.push((fingerprint, position));
            }
        }
        added.for_each(|copy| self.old.push(copy));
        self.gone = 0;
    }
}

impl SortedPages {
    fn push(&mut self, copy: (u64, Position)) {
        match self.0.last_mut() {
            Some(page) if page.len() < PAGE => page.push(copy),
            _ => {
                let mut page = Vec::with_capacity(PAGE);
                page.push(copy);
                self.0.push(page);
            }
        }
    }

    fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * PAGE + last
    }

    /// The place of a copy that is not gone.
    fn get_mut(&mut self, fingerprint: u64) -> Option<&mut Position> {
        // No page is empty.
        let after = self.0.partition_point(|page| page[0].0 <= fingerprint);
        let page = &mut self.0[after.checked_sub(1)?];
        let found = page.binary_search_by_key(&fingerprint, |(key, _)| *key);
        let (_, position) = &mut page[found.ok()?];
        (*position != Position::NONE).then_some(position)
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
    enum TableStep {
        Insert(u32, u32),
        Remove(u32),
        RemoveThrough(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<TableStep>> {
        // Few things, which are so often there already.
        let thing = 0..20_000_u32;
        let step = prop_oneof![
            60 => (thing.clone(), 0..1000_u32).prop_map(|(thing, at)| TableStep::Insert(thing, at)),
            40 => thing.prop_map(TableStep::Remove),
            1 => (0..300_u32).prop_map(TableStep::RemoveThrough),
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
                    TableStep::Insert(thing, at) => {
                        let position = Position::of(0, at);
                        let before = table.insert(fingerprint(&hasher, thing), position);
                        prop_assert_eq!(before, map.insert(thing, position));
                    }
                    TableStep::Remove(thing) => {
                        let position = table.remove(fingerprint(&hasher, thing));
                        prop_assert_eq!(position, map.remove(&thing));
                    }
                    TableStep::RemoveThrough(at) => {
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
            shard.old.0.len() * PAGE * size_of::<(u64, Position)>() + slots * 17
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
            if copies >= 100_000 && copies.is_multiple_of(5000) {
                let bytes = bytes(&table);
                assert!(bytes < 21 * copies, "{copies}: {bytes}");
            }
        }
        for number in 0..270_000 {
            table.remove(fingerprint(&hasher, number));
        }
        assert!(bytes(&table) < 60 * 30_000, "{}", bytes(&table));
    }
}
