//! Recognises recent things without storing them: values by 128-bit keyed hash, in two generations,
//! so that memory is bounded.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, BuildHasherDefault, Hash, Hasher, RandomState},
};

use siphasher::sip128::{Hasher128 as _, SipHasher13};

/// A 128-bit hash (SipHash-1-3) under a key of this process: two things never share one, and no
/// client can make them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64, u64);

impl Fingerprint {
    /// Half of its bits.
    pub const fn half(self) -> u64 {
        self.0
    }
}

/// Takes fingerprints. Two hashers have different keys, and so different fingerprints of the same
/// thing.
pub struct Hasher128(SipHasher13);

/// A map by fingerprint.
pub type FingerprintMap<V> = HashMap<Fingerprint, V, BuildHasherDefault<IdentityHasher>>;

/// Two generations of values. [`Recent::rotate`] makes the younger one the older, and forgets the
/// older one.
pub struct Recent<V> {
    young: FingerprintMap<V>,
    old: FingerprintMap<V>,
}

impl<V> Recent<V> {
    pub fn get(&self, key: &Fingerprint) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    pub fn get_mut(&mut self, key: &Fingerprint) -> Option<&mut V> {
        self.young.get_mut(key).or_else(|| self.old.get_mut(key))
    }

    /// Adds a value to the younger generation. It hides one of the same key in the older.
    pub fn insert(&mut self, key: Fingerprint, value: V) {
        self.young.insert(key, value);
    }

    pub fn rotate(&mut self) {
        self.old = std::mem::take(&mut self.young);
    }

    /// Values in the younger generation.
    pub fn young_len(&self) -> usize {
        self.young.len()
    }

    /// Values in both generations, those that are hidden included.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    #[cfg(test)]
    pub fn old_capacity(&self) -> usize {
        self.old.capacity()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<V> Default for Recent<V> {
    fn default() -> Self {
        Self {
            young: FingerprintMap::default(),
            old: FingerprintMap::default(),
        }
    }
}

impl Hasher128 {
    pub fn fingerprint(&self, of: impl Hash) -> Fingerprint {
        let mut hasher = self.0;
        of.hash(&mut hasher);
        let hash = hasher.finish128();
        Fingerprint(hash.h1, hash.h2)
    }
}

impl Default for Hasher128 {
    fn default() -> Self {
        let [first, second] = [0, 1].map(|half| RandomState::new().hash_one(half));
        Self(SipHasher13::new_with_keys(first, second))
    }
}

impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0);
    }
}

/// Passes half of a fingerprint on as its hash: it is a good one already.
#[derive(Default)]
pub struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // A fingerprint writes no bytes. Others are mixed in all the same.
        for byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, half: u64) {
        self.0 ^= half;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_thing_has_one_fingerprint_per_hasher() {
        let ours = Hasher128::default();
        let others = Hasher128::default();
        assert!(ours.fingerprint(("a", 1)) == ours.fingerprint(("a", 1)));
        assert!(ours.fingerprint(("a", 1)) != ours.fingerprint(("a", 2)));
        assert!(ours.fingerprint(("a", 1)) != others.fingerprint(("a", 1)));
        let known: FingerprintMap<_> = (0..10_000)
            .map(|number| (ours.fingerprint(number), number))
            .collect();
        assert_eq!(known.len(), 10_000);
        assert!((0..10_000).all(|number| known.get(&ours.fingerprint(number)) == Some(&number)));
    }

    #[test]
    fn a_value_lives_through_one_rotation() {
        let hasher = Hasher128::default();
        let keys = [1, 2].map(|number| hasher.fingerprint(number));
        let mut recent = Recent::default();
        recent.insert(keys[0], 'a');
        recent.rotate();
        recent.insert(keys[1], 'b');
        assert_eq!(
            keys.map(|key| recent.get(&key).copied()),
            [Some('a'), Some('b')]
        );
        recent.insert(keys[0], 'c');
        assert_eq!((recent.get(&keys[0]), recent.young_len()), (Some(&'c'), 2));
        recent.rotate();
        assert_eq!(recent.get(&keys[0]), Some(&'c'));
        recent.rotate();
        assert!(recent.is_empty());
    }
}
