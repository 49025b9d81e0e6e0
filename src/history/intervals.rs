//! Intervals, and the places that keep them.

use std::collections::VecDeque;

use crate::{lane_id::PerLane, ledger::Quantiles};

/// The counts of a node in an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Interval {
    /// How long it was.
    pub seconds: f32,
    pub accepted: u64,
    /// At its end, like the two below.
    pub in_flight: u64,
    /// On disk: waiting or parked.
    pub waiting: u64,
    pub dead: u64,
    pub lanes: PerLane<LaneInterval>,
}

/// The same of one lane.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneInterval {
    pub accepted: u64,
    pub delivered: u64,
    /// Zero if no record passed.
    pub publish: Quantiles,
    pub delivery: Quantiles,
}

impl Interval {
    /// This interval and the one behind it, as one.
    #[must_use]
    pub fn and(&self, next: &Self) -> Self {
        let mut lanes = self.lanes;
        for (lane, next) in lanes.iter_mut().zip(&next.lanes) {
            *lane = lane.and(next);
        }
        Self {
            seconds: self.seconds + next.seconds,
            accepted: self.accepted + next.accepted,
            lanes,
            ..*next
        }
    }
}

impl LaneInterval {
    fn and(&self, next: &Self) -> Self {
        let merged = |one: Quantiles, of_one, other: Quantiles, of_other| Quantiles {
            p50: mean(one.p50, of_one, other.p50, of_other),
            p99: one.p99.max(other.p99),
        };
        Self {
            accepted: self.accepted + next.accepted,
            delivered: self.delivered + next.delivered,
            publish: merged(self.publish, self.accepted, next.publish, next.accepted),
            delivery: merged(self.delivery, self.delivered, next.delivery, next.delivered),
        }
    }
}

/// The mean of two times that were measured so often. Zero is no time.
#[expect(
    clippy::cast_precision_loss,
    reason = "a mean of so many is as exact as need be"
)]
fn mean(one: f64, of_one: u64, other: f64, of_other: u64) -> f64 {
    // A confirm from the disk is measured, and not accepted.
    let weight = |time: f64, of: u64| if time > 0.0 { of.max(1) as f64 } else { 0.0 };
    let (one_weight, other_weight) = (weight(one, of_one), weight(other, of_other));
    if one_weight + other_weight == 0.0 {
        return 0.0;
    }
    (one * one_weight + other * other_weight) / (one_weight + other_weight)
}

/// The last intervals, all of one length.
pub struct IntervalRing {
    intervals: VecDeque<Interval>,
    most: usize,
}

impl IntervalRing {
    pub fn new(most: usize) -> Self {
        Self {
            intervals: VecDeque::with_capacity(most),
            most,
        }
    }

    pub fn push(&mut self, interval: Interval) {
        if self.intervals.len() == self.most {
            self.intervals.pop_front();
        }
        self.intervals.push_back(interval);
    }

    pub fn intervals(&self) -> Intervals<'_> {
        self.intervals.iter()
    }
}

/// Intervals, oldest first.
pub type Intervals<'i> = std::collections::vec_deque::Iter<'i, Interval>;

/// All intervals since the start. When there is no room, each two become one.
pub struct GrowingIntervals {
    intervals: VecDeque<Interval>,
    most: usize,
    /// How many of those that are added are one that is kept.
    step: u32,
    open: Option<Interval>,
    added: u32,
}

impl GrowingIntervals {
    /// `most` is even.
    pub fn new(most: usize) -> Self {
        Self {
            intervals: VecDeque::with_capacity(most),
            most,
            step: 1,
            open: None,
            added: 0,
        }
    }

    pub const fn step(&self) -> u32 {
        self.step
    }

    pub fn push(&mut self, interval: Interval) {
        let open = match self.open.take() {
            Some(open) => open.and(&interval),
            None => interval,
        };
        self.added += 1;
        if self.added < self.step {
            self.open = Some(open);
            return;
        }
        self.added = 0;
        if self.intervals.len() == self.most {
            self.halve();
            // It is half of one by now.
            self.open = Some(open);
            self.added = self.step / 2;
            return;
        }
        self.intervals.push_back(open);
    }

    fn halve(&mut self) {
        for at in 0..self.most / 2 {
            self.intervals[at] = self.intervals[2 * at].and(&self.intervals[2 * at + 1]);
        }
        self.intervals.truncate(self.most / 2);
        self.step *= 2;
    }

    pub fn intervals(&self) -> Intervals<'_> {
        self.intervals.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn second(accepted: u64) -> Interval {
        Interval {
            seconds: 1.0,
            accepted,
            waiting: accepted,
            ..Interval::default()
        }
    }

    fn accepted(intervals: Intervals<'_>) -> Vec<u64> {
        intervals.map(|interval| interval.accepted).collect()
    }

    #[test]
    fn a_ring_keeps_the_last_ones() {
        let mut ring = IntervalRing::new(3);
        for number in 1..=5 {
            ring.push(second(number));
        }
        assert_eq!(accepted(ring.intervals()), [3, 4, 5]);
    }

    #[test]
    fn growing_intervals_lose_no_count_and_need_no_more_room() {
        let mut all = GrowingIntervals::new(4);
        for number in 1..=1000 {
            all.push(second(number));
            let kept: u64 = all.intervals().map(|interval| interval.accepted).sum();
            let open = all.open.map_or(0, |open| open.accepted);
            assert_eq!(kept + open, number * (number + 1) / 2);
            assert!(all.intervals().len() <= 4);
            for interval in all.intervals() {
                let seconds = Duration::from_secs_f32(interval.seconds);
                assert_eq!(seconds.as_secs(), u64::from(all.step()), "{number}");
            }
        }
        assert_eq!(all.step(), 256);
        let last = all.intervals().next_back().unwrap();
        // A count at its end is that of its last part.
        assert_eq!(last.waiting, 768);
    }

    #[test]
    fn times_of_two_intervals_are_one() {
        let lane = |delivered, p50, p99| LaneInterval {
            delivered,
            delivery: Quantiles { p50, p99 },
            ..LaneInterval::default()
        };
        let both = lane(30, 1.0, 9.0).and(&lane(10, 2.0, 4.0));
        assert_eq!(both, lane(40, 1.25, 9.0));
        // Nothing passed in one of them.
        assert_eq!(
            lane(0, 0.0, 0.0).and(&lane(10, 2.0, 4.0)),
            lane(10, 2.0, 4.0)
        );
        assert_eq!(lane(0, 0.0, 0.0).and(&lane(0, 0.0, 0.0)), lane(0, 0.0, 0.0));
    }
}
