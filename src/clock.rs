//! The wall clock, without its steps, and the clock of rates.
//!
//! The machine's clock is read once, and goes on with the monotonic clock: if NTP or an operator
//! sets it while the node runs, no age changes.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use governor::{clock::Clock, nanos::Nanos};

/// The one reading.
static START: LazyLock<(Instant, u64)> =
    LazyLock::new(|| (Instant::now(), since_epoch(system_time())));
/// How far the machine's clock was behind at the start, in microseconds.
static BEHIND_US: AtomicU64 = AtomicU64::new(0);

/// Microseconds since the Unix epoch.
pub fn unix_us() -> u64 {
    let (began, began_us) = *START;
    began_us + micros(began.elapsed()) + BEHIND_US.load(Relaxed)
}

/// The time since `at_us`, in microseconds since the Unix epoch; zero if that is still to come.
pub fn age(at_us: u64) -> Duration {
    Duration::from_micros(unix_us().saturating_sub(at_us))
}

/// Moves the clock on to `at` if it is behind: then the machine's clock was set back since `at`.
pub fn not_before(at: SystemTime) {
    let behind = since_epoch(at).saturating_sub(unix_us());
    BEHIND_US.fetch_add(behind, Relaxed);
}

/// A test may make it step by so many seconds.
fn system_time() -> SystemTime {
    let now = SystemTime::now();
    fail::fail_point!("clock-step", |seconds| {
        let seconds = seconds
            .and_then(|text| text.parse::<i64>().ok())
            .unwrap_or_default();
        let step = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { now - step } else { now + step }
    });
    now
}

/// 0 on a clock before the epoch.
fn since_epoch(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, micros)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Seconds since the Unix epoch by the system's clock, as other machines count them. It may be set.
pub fn system_unix_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The time since it was made, which tests can simulate.
#[derive(Clone, Copy)]
pub struct SinceStart(tokio::time::Instant);

impl Default for SinceStart {
    fn default() -> Self {
        Self(tokio::time::Instant::now())
    }
}

impl Clock for SinceStart {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.0.elapsed().into()
    }
}
