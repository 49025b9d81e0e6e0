//! `hash`: weighted rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to
//! Increase Hit Rates", 1998; the weights as in J. Resch, "New Hashing Algorithms for Data
//! Storage", 2015).
//!
//! Each lane has a score for each key, from the two alone. The order of the scores is the order in
//! which the key tries the lanes, so a lost lane moves only its own keys, each to its second lane.

use std::cmp::Reverse;

use siphasher::sip::SipHasher13;

use crate::lane_id::LaneId;

/// The seed. Another one moves every key at an upgrade, so it never changes; the golden vectors of
/// the tests hold it.
const SEED: (u64, u64) = (0x7761_7970_6f73_7431, 0x726f_7574_696e_6731);

/// The hash of a record's key (SipHash-1-3): the same on every node and in every version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyHash(u64);

impl KeyHash {
    /// The hash of `key`.
    pub fn of(key: &[u8]) -> Self {
        Self(SipHasher13::new_with_keys(SEED.0, SEED.1).hash(key))
    }

    /// A number that means the same on every node and in every version.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The hash with these [`KeyHash::bits`].
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The place of `lane` in the order in which this key tries the lanes: the least is first, and
    /// weight 0 is last.
    pub fn rank(self, lane: LaneId, weight: u32) -> (Reverse<u64>, &'static str) {
        // Scores are never negative: their bits are in their order. Equal scores: by name, which is
        // the same everywhere.
        (Reverse(self.score(lane, weight).to_bits()), lane.name())
    }

    /// The lane's score for this key: −weight ÷ ln(h), h evenly between 0 and 1. The lane with the
    /// highest one takes the key.
    fn score(self, lane: LaneId, weight: u32) -> f64 {
        let draw = SipHasher13::new_with_keys(SEED.0, self.0).hash(lane.name().as_bytes());
        // Never 0 or 1. The upper 52 bits are a whole number that a float holds exactly.
        #[expect(clippy::cast_precision_loss, reason = "52 bits fit")]
        let even = ((draw >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
        -f64::from(weight) / even.ln()
    }
}
