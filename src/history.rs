//! What has passed, for the charts of the live page: counts and times of each interval, and not
//! since the start.
//!
//! | range | an interval is |
//! | --- | --- |
//! | five minutes | one second |
//! | an hour | ten seconds |
//! | all, since the start | ten seconds, and twice as long each time that the room is full |
//!
//! So its memory has a bound, however long the node runs. The times of an interval are exact to two
//! digits; where intervals are put together, p50 is the mean by deliveries, and p99 the higher one.

mod disk_pace;
mod intervals;
mod told;

use std::{sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing_mutex::parkinglot::Mutex;

use self::{
    disk_pace::DiskPace,
    intervals::{GrowingIntervals, IntervalRing},
};
pub use self::{
    intervals::{Interval, LaneInterval},
    told::{Columns, HistoryRange},
};
use crate::{
    clock::unix_us,
    lane_id::{LaneId, PerLane},
    ledger::{Latency, Ledger, Quantiles},
    spool::Spools,
};

/// The shortest interval.
const SECOND: Duration = Duration::from_secs(1);
/// Intervals of a second: five minutes.
const SECONDS_KEPT: usize = 300;
/// Seconds of a longer interval.
const LONGER: u32 = 10;
/// Intervals of ten seconds: an hour.
const TENS_KEPT: usize = 360;
/// Intervals since the start.
const ALL_KEPT: usize = 360;

/// The history of a node. Clones share it.
#[derive(Clone)]
pub struct History(Arc<Mutex<KeptHistory>>);

struct KeptHistory {
    /// In the order of the configuration.
    lanes: Vec<LaneId>,
    /// The end of the last interval, in milliseconds since the Unix epoch.
    at_ms: u64,
    seconds: IntervalRing,
    tens: IntervalRing,
    all: GrowingIntervals,
    /// The ten seconds that have begun.
    open: Interval,
    open_seconds: u32,
    open_times: PerLane<LaneTimes>,
    last: LastCounts,
    disk: DiskPace,
}

/// The counts and times at the end of the last interval.
#[derive(Default)]
struct LastCounts {
    accepted: u64,
    lanes: PerLane<LastLane>,
}

#[derive(Default)]
struct LastLane {
    accepted: u64,
    delivered: u64,
    times: LaneTimes,
}

/// From handing a record to the lane to its confirm, and from accepted to delivered.
#[derive(Default)]
struct LaneTimes {
    publish: Times,
    delivery: Times,
}

struct Times(Histogram<u32>);

impl Default for Times {
    fn default() -> Self {
        Self(Latency::default().times)
    }
}

impl Times {
    /// The times that `now` has more than these, which become `now`.
    fn advance(&mut self, now: &Histogram<u32>) -> Option<Histogram<u32>> {
        if now.len() == self.0.len() {
            return None;
        }
        let mut new = now.clone();
        // It only grows, so all that it had is still in it.
        new.subtract(&self.0).ok()?;
        self.0.clone_from(now);
        Some(new)
    }

    fn add(&mut self, times: &Histogram<u32>) {
        // It grows with what is added.
        self.0.add(times).ok();
    }

    /// Its quantiles; it is empty after that.
    fn close(&mut self) -> Quantiles {
        let quantiles = Latency::quantiles_of(&self.0);
        if !self.0.is_empty() {
            self.0.reset();
        }
        quantiles
    }
}

impl History {
    pub fn new(lanes: impl Iterator<Item = LaneId>) -> Self {
        Self(Arc::new(Mutex::new(KeptHistory {
            lanes: lanes.collect(),
            at_ms: unix_us() / 1000,
            seconds: IntervalRing::new(SECONDS_KEPT),
            tens: IntervalRing::new(TENS_KEPT),
            all: GrowingIntervals::new(ALL_KEPT),
            open: Interval::default(),
            open_seconds: 0,
            open_times: PerLane::default(),
            last: LastCounts::default(),
            disk: DiskPace::default(),
        })))
    }

    /// Adds an interval each second, without end.
    pub async fn keep(self, ledger: Arc<Ledger>, spools: Spools) {
        let mut ticks = interval(SECOND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut began = Instant::now();
        loop {
            ticks.tick().await;
            let balance = ledger.balance(&spools.stats());
            let now = Instant::now();
            let mut kept = self.0.lock();
            let mut second = kept.of_lanes(&ledger, now - began);
            second.in_flight = balance.in_flight;
            second.waiting = balance.spooled + balance.parked;
            second.dead = balance.dead;
            second.accepted = balance.accepted.saturating_sub(kept.last.accepted);
            kept.last.accepted = balance.accepted;
            kept.add(second);
            if let Some(own) = spools.iter().next() {
                kept.disk.look(now, own.stats().into());
            }
            began = now;
        }
    }

    /// The intervals of a range, oldest first.
    pub fn range(&self, range: HistoryRange) -> Columns<Vec<f64>> {
        let kept = self.0.lock();
        let (step, intervals) = match range {
            HistoryRange::FiveMinutes => (1, kept.seconds.intervals()),
            HistoryRange::Hour => (LONGER, kept.tens.intervals()),
            HistoryRange::All => (LONGER * kept.all.step(), kept.all.intervals()),
        };
        Columns::of_all(kept.at_ms, step, &kept.lanes, intervals)
    }

    /// The last second that has ended; before the first, nothing has passed.
    pub fn last_second(&self) -> Columns<f64> {
        let kept = self.0.lock();
        let last = kept.seconds.intervals().next_back();
        let last = last.copied().unwrap_or_default();
        Columns::of_one(kept.at_ms, &kept.lanes, &last)
    }

    /// The seconds until the node's own disk has `max` bytes, in coarse steps, if each lane's copies
    /// stay for at most `copies_stay`; `None` if nobody knows, or there is more than a day.
    pub fn disk_full_in_s(&self, max: u64, copies_stay: &PerLane<Duration>) -> Option<f64> {
        self.0.lock().disk.full_in_s(max, copies_stay)
    }

    /// The time that half of the lane's confirms took in the last ten seconds that have ended; 0 if
    /// there was none.
    pub fn recent_publish(&self, lane: LaneId) -> Duration {
        let kept = self.0.lock();
        let last = kept.tens.intervals().next_back();
        let ms = last.map_or(0.0, |ten| ten.lanes[lane as usize].publish.p50);
        Duration::from_secs_f64(ms / 1000.0)
    }
}

impl KeptHistory {
    /// The counts of the lanes since the last call, which was `long` ago.
    fn of_lanes(&mut self, ledger: &Ledger, long: Duration) -> Interval {
        let mut second = Interval {
            seconds: long.as_secs_f32(),
            ..Interval::default()
        };
        for lane in &self.lanes {
            let at = *lane as usize;
            let last = &mut self.last.lanes[at];
            let ledger = ledger.lane(*lane);
            let (accepted, delivered) = (ledger.counts.accepted, ledger.counts.delivered);
            let publish = last.times.publish.advance(&ledger.publish.times);
            let delivery = last.times.delivery.advance(&ledger.delivery.times.times);
            drop(ledger);
            let open = &mut self.open_times[at];
            second.lanes[at] = LaneInterval {
                accepted: accepted - last.accepted,
                delivered: delivered - last.delivered,
                publish: open.publish.quantiles_and_add(publish),
                delivery: open.delivery.quantiles_and_add(delivery),
            };
            (last.accepted, last.delivered) = (accepted, delivered);
        }
        second
    }

    fn add(&mut self, second: Interval) {
        self.at_ms = unix_us() / 1000;
        self.seconds.push(second);
        self.open = self.open.and(&second);
        self.open_seconds += 1;
        if self.open_seconds < LONGER {
            return;
        }
        let mut ten = std::mem::take(&mut self.open);
        self.open_seconds = 0;
        for (lane, times) in ten.lanes.iter_mut().zip(&mut self.open_times) {
            lane.publish = times.publish.close();
            lane.delivery = times.delivery.close();
        }
        self.tens.push(ten);
        self.all.push(ten);
    }
}

impl Times {
    fn quantiles_and_add(&mut self, times: Option<Histogram<u32>>) -> Quantiles {
        let Some(times) = times else {
            return Quantiles::default();
        };
        self.add(&times);
        Latency::quantiles_of(&times)
    }
}

#[cfg(test)]
mod tests;
