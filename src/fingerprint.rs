//! Fingerprints: what was seen is known again without being kept.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher as _, BuildHasherDefault, Hash, Hasher, RandomState},
};

use siphasher::sip128::{Hasher128 as _, SipHasher13};

/// A 128-bit hash (SipHash-1-3) under a key of this process: no two things are taken for one, and no client can make it so.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64, u64);

/// Takes fingerprints. Those of another one are different.
pub struct Fingerprints(SipHasher13);

/// A map by fingerprint.
pub type ByFingerprint<V> = HashMap<Fingerprint, V, BuildHasherDefault<Half>>;

impl Fingerprints {
    pub fn of(&self, what: impl Hash) -> Fingerprint {
        let mut hasher = self.0;
        what.hash(&mut hasher);
        let hash = hasher.finish128();
        Fingerprint(hash.h1, hash.h2)
    }
}

impl Default for Fingerprints {
    fn default() -> Self {
        let [first, second] = [0, 1].map(|half| RandomState::new().hash_one(half));
        Self(SipHasher13::new_with_keys(first, second))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0, self.1)
    }
}

impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0);
    }
}

/// Half of a fingerprint is as good a hash of it as any, and costs nothing.
#[derive(Default)]
pub struct Half(u64);

impl Hasher for Half {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
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
    fn what_is_the_same_has_one_fingerprint_of_a_kind() {
        let (ours, others) = (Fingerprints::default(), Fingerprints::default());
        assert!(ours.of(("a", 1)) == ours.of(("a", 1)));
        assert!(ours.of(("a", 1)) != ours.of(("a", 2)));
        assert!(ours.of(("a", 1)) != others.of(("a", 1)));
        let known: ByFingerprint<_> = (0..10_000)
            .map(|number| (ours.of(number), number))
            .collect();
        assert_eq!(known.len(), 10_000);
        assert!((0..10_000).all(|number| known.get(&ours.of(number)) == Some(&number)));
    }
}
