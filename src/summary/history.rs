//! The last statuses of one run of a node, and what follows from two of them: rates and trends.
//! Their number is bounded.

use std::collections::VecDeque;

use super::{
    NodeSummary,
    format::{age, rate},
};

const KEPT_MAX: usize = 60;
/// A rate is measured over this many seconds, a trend over more.
const RATE_OVER_S: f64 = 3.0;
const RATE_FROM_S: f64 = 0.5;
const TREND_OVER_S: f64 = 20.0;
/// A forecast needs as many.
const TREND_FROM_S: f64 = 10.0;
/// Statuses from before a longer gap say nothing about now.
const GAP_MAX_S: f64 = 5.0;

/// Statuses of a node, the newest last.
#[derive(Debug, Default)]
pub struct StatusHistory(VecDeque<NodeSummary>);

impl StatusHistory {
    /// Adds a status. One of another run, or after a gap, is the first again.
    pub fn add(&mut self, status: NodeSummary) {
        let gap = self
            .last()
            .map_or(0.0, |last| status.uptime_s - last.uptime_s);
        if !(0.0..=GAP_MAX_S).contains(&gap) {
            self.0.clear();
        }
        if self.0.len() == KEPT_MAX {
            self.0.pop_front();
        }
        self.0.push_back(status);
    }

    /// The newest status.
    pub fn last(&self) -> Option<&NodeSummary> {
        self.0.back()
    }

    /// The change of a value by the second over the last `over` seconds; `None` while fewer than
    /// `from` seconds are known.
    fn slope(&self, over: f64, from: f64, value: impl Fn(&NodeSummary) -> f64) -> Option<f64> {
        let last = self.last()?;
        let passed = |status: &NodeSummary| last.uptime_s - status.uptime_s;
        let earlier = self.0.iter().rev().find(|status| passed(status) >= over);
        let first = earlier.or_else(|| self.0.front())?;
        let seconds = passed(first);
        (seconds >= from).then(|| (value(last) - value(first)) / seconds)
    }

    /// The pace of a counter by the second, once it is known.
    #[expect(clippy::cast_precision_loss, reason = "no counter reaches 2^52")]
    pub fn rate(&self, counter: impl Fn(&NodeSummary) -> u64) -> Option<f64> {
        let found = self.slope(RATE_OVER_S, RATE_FROM_S, |status| counter(status) as f64);
        // Counters that are not read at the same moment may seem to go back.
        found.map(|rate| rate.max(0.0))
    }

    /// How long until a number of records is gone, in words; empty while it is not known.
    #[expect(clippy::cast_precision_loss, reason = "no number reaches 2^52")]
    pub fn trend(&self, number: impl Fn(&NodeSummary) -> u64) -> String {
        let value = |status: &NodeSummary| number(status) as f64;
        let now = self.last().map_or(0.0, value);
        let found = self.slope(TREND_OVER_S, TREND_FROM_S, value);
        match found {
            _ if now < 1.0 => "empty".into(),
            None => String::new(),
            Some(pace) if pace.abs() * TREND_OVER_S < 1.0 => "steady".into(),
            Some(pace) if pace > 0.0 => format!("growing, {}", rate(pace)),
            Some(pace) => format!("empty in {}", age(now / -pace)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(uptime_s: f64, count: u64) -> NodeSummary {
        let mut status = NodeSummary {
            uptime_s,
            ..NodeSummary::default()
        };
        status.ledger.accepted = count;
        status
    }

    fn history(counts: impl Iterator<Item = u64>) -> StatusHistory {
        let mut history = StatusHistory::default();
        for (second, count) in (0_u32..).zip(counts) {
            history.add(status(second.into(), count));
        }
        history
    }

    fn accepted(status: &NodeSummary) -> u64 {
        status.ledger.accepted
    }

    #[test]
    fn a_rate_is_of_the_last_seconds_and_a_trend_of_more() {
        assert_eq!(history([7].into_iter()).rate(accepted), None);
        // 100 a second, and 10 a second for the last five.
        let counts = (0..30).map(|at| at * 100);
        let counts = counts.chain((1..=5).map(|at| 2_900 + at * 10));
        let grown = history(counts);
        assert_eq!(grown.rate(accepted), Some(10.0));
        assert!(grown.trend(accepted).starts_with("growing, "));
        let shrunk = history((0..=20).map(|at| 3_000 - at * 100));
        assert_eq!(shrunk.rate(accepted), Some(0.0));
        assert_eq!(shrunk.trend(accepted), "empty in 10 s");
        assert_eq!(history([5; 20].into_iter()).trend(accepted), "steady");
        assert_eq!(history([5; 3].into_iter()).trend(accepted), "");
        assert_eq!(history([0].into_iter()).trend(accepted), "empty");
    }

    #[test]
    fn another_run_and_a_gap_begin_anew_and_nothing_grows() {
        let mut history = history((0..500).map(|at| at * 100));
        assert_eq!(history.0.len(), KEPT_MAX);
        history.add(status(1.0, 3));
        assert_eq!((history.0.len(), history.rate(accepted)), (1, None));
        history.add(status(60.0, 9));
        assert_eq!(history.rate(accepted), None);
    }
}
