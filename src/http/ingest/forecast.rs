//! When a request that finds no room on disk may find some: by the pace at which the disk drains.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing_mutex::parkinglot::Mutex;

use crate::spool::SpoolStats;

/// The longest pause that a client is asked for: nothing drains while an API is away, and nobody knows
/// for how long.
const PAUSE_MAX: Duration = Duration::from_mins(1);
/// The pace is that of so long, at least.
const PACE_MIN: Duration = Duration::from_secs(1);
/// An older look at the disk tells nothing of its pace.
const PACE_MAX: Duration = Duration::from_secs(10);

/// The pauses of each disk: that of an API by its name, and the node's own. Clones share them.
#[derive(Clone, Default)]
pub struct DiskForecast(Arc<Mutex<HashMap<Option<Arc<str>>, DrainPace>>>);

impl DiskForecast {
    /// Seconds until this disk has room for a request of `bytes`, behind the others that were
    /// refused. `over` bytes have to go before.
    pub fn pause(&self, disk: Option<&str>, stats: &SpoolStats, over: u64, bytes: u64) -> u64 {
        let mut drains = self.0.lock();
        let drain = drains.entry(disk.map(Into::into)).or_default();
        let pause = drain.pause(Instant::now(), stats, over, bytes);
        pause.as_secs() + u64::from(pause.subsec_nanos() > 0)
    }
}

/// A disk that was full.
#[derive(Default)]
struct DrainPace {
    /// A look at the disk: when, and the records that had left it.
    seen: Option<(Instant, i64)>,
    /// Records a second. `None` if nobody knows yet.
    pace: Option<f64>,
    /// By then there is room for all that were refused.
    promised: Option<Instant>,
}

impl DrainPace {
    fn pause(&mut self, now: Instant, stats: &SpoolStats, over: u64, bytes: u64) -> Duration {
        self.look(now, stats.drained());
        let Some(pace) = self.pace else {
            return PACE_MIN;
        };
        let pace = pace * average(stats);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let time = |bytes: u64| {
            let seconds = bytes as f64 / pace;
            let seconds = Duration::try_from_secs_f64(seconds).unwrap_or(PAUSE_MAX);
            seconds.min(PAUSE_MAX)
        };
        let free = now + time(over);
        let behind = self.promised.map_or(free, |promised| promised.max(free));
        let promised = (behind + time(bytes)).min(now + PAUSE_MAX);
        self.promised = Some(promised);
        (promised - now).max(PACE_MIN)
    }

    fn look(&mut self, now: Instant, drained: i64) {
        match self.seen {
            Some((at, before)) if now - at <= 2 * PACE_MAX => {
                let passed = now - at;
                if passed < PACE_MIN {
                    return;
                }
                let left = u32::try_from(drained - before).unwrap_or_default();
                self.pace = Some(f64::from(left) / passed.as_secs_f64());
                if passed >= PACE_MAX {
                    self.seen = Some((now, drained));
                }
            }
            _ => {
                *self = Self {
                    seen: Some((now, drained)),
                    ..Self::default()
                };
            }
        }
    }
}

/// Bytes on disk for each record there.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn average(stats: &SpoolStats) -> f64 {
    stats.bytes as f64 / stats.on_disk().max(1) as f64
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const RECORD: u64 = 1000;

    /// A disk with so many records, after so many have left.
    fn stats(on_disk: u64, left: u64) -> SpoolStats {
        SpoolStats::of_waiting(on_disk, on_disk + left, on_disk * RECORD)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_waits_behind_those_that_were_refused_before_it() {
        let forecast = DiskForecast::default();
        let pause = |left, over| forecast.pause(None, &stats(1000, left), over, RECORD);
        assert_eq!(pause(0, 0), 1, "the pace is not known");
        advance(Duration::from_secs(1)).await;
        // Ten records a second.
        for (number, expected) in (1..=30).zip([[1; 10], [2; 10], [3; 10]].concat()) {
            assert_eq!(pause(10, 0), expected, "client {number}");
        }
        // Two seconds later, the first twenty have room.
        advance(Duration::from_secs(2)).await;
        assert_eq!(pause(30, 0), 2);
        assert_eq!(pause(30, 50 * RECORD), 6, "fifty have to go before");
        assert_eq!(forecast.pause(Some("b"), &stats(1, 0), 0, RECORD), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_does_not_drain_is_asked_seldom_and_an_old_pace_is_none() {
        let forecast = DiskForecast::default();
        let pause = |left| forecast.pause(None, &stats(1000, left), 0, RECORD);
        assert_eq!(pause(5), 1);
        advance(Duration::from_secs(1)).await;
        assert_eq!(pause(5), 60);
        advance(Duration::from_mins(5)).await;
        assert_eq!(pause(5), 1);
        advance(Duration::from_secs(10)).await;
        assert_eq!(pause(10_005), 1);
    }
}
