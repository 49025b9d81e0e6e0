//! The wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Microseconds since the Unix epoch; 0 on a clock before it.
pub fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}

/// The time since `at_us`, in microseconds since the Unix epoch; zero if that is still to come.
pub fn age(at_us: u64) -> Duration {
    Duration::from_micros(unix_us().saturating_sub(at_us))
}
