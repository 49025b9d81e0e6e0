//! A count over the last ten seconds, in buckets of one second. Any thread adds and reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Buckets, and so the seconds that count.
const SECONDS: usize = 10;
/// Bits of the count in a bucket. The rest tells which lap of the ring the bucket is of: with 24
/// bits, one lap is taken for another after 5 years.
const BITS: u32 = 40;
const COUNT: u64 = (1 << BITS) - 1;

#[derive(Debug, Default)]
pub struct TenSeconds([AtomicU64; SECONDS]);

impl TenSeconds {
    /// Adds to the count of `second`.
    pub fn add(&self, second: u64, count: u32) {
        let lap = lap(second);
        let added = |bucket: u64| {
            let before = if bucket >> BITS == lap {
                bucket & COUNT
            } else {
                0
            };
            Some(lap << BITS | (before + u64::from(count)).min(COUNT))
        };
        // It always returns a value, so the update cannot fail.
        self.0[slot(second)]
            .fetch_update(Relaxed, Relaxed, added)
            .ok();
    }

    /// The count of the ten seconds that end with `second`.
    pub fn sum(&self, second: u64) -> u64 {
        let newest = slot(second);
        let this_lap = lap(second);
        let last_lap = lap(second.wrapping_sub(SECONDS as u64));
        let counts = self.0.iter().enumerate().map(|(at, bucket)| {
            let bucket = bucket.load(Relaxed);
            let expected = if at <= newest { this_lap } else { last_lap };
            if bucket >> BITS == expected {
                bucket & COUNT
            } else {
                0
            }
        });
        counts.sum()
    }
}

fn slot(second: u64) -> usize {
    usize::try_from(second).unwrap_or_default() % SECONDS
}

/// Never 0, which is an unused bucket's.
fn lap(second: u64) -> u64 {
    (second / SECONDS as u64).wrapping_add(1) & ((1 << (64 - BITS)) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_counts_what_was_added_in_the_last_ten_seconds(
            steps in prop::collection::vec((0_u64..15, 0_u32..9), 1..60)
        ) {
            let window = TenSeconds::default();
            let mut added = Vec::new();
            let mut second = 0;
            for (step, count) in steps {
                second += step;
                window.add(second, count);
                added.push((second, u64::from(count)));
                for at in [second, second + 4, second + 9, second + 10, second + 11] {
                    let recent = added.iter().filter(|(when, _)| when + SECONDS as u64 > at);
                    let expected: u64 = recent.map(|(_, count)| count).sum();
                    prop_assert_eq!(window.sum(at), expected);
                }
            }
        }
    }
}
