//! The result of a simulation, as a table of at most 80 columns.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;

use crate::lane_id::LaneId;

/// Latencies are kept in microseconds up to this.
const LATENCY_MAX_US: u64 = 24 * 3_600_000_000;

/// The result of a simulation.
#[derive(Clone, Debug)]
pub struct SimulationReport {
    /// The policy of `[router]`.
    pub policy: &'static str,
    pub duration: Duration,
    pub seed: u64,
    /// In the order of the configuration.
    pub lanes: Vec<LaneTally>,
    /// Records that no lane took in time.
    pub spooled: u64,
    /// Records of each route, by its name; copies of a broadcast count once.
    pub routes: Vec<(String, u64)>,
}

/// The ends of the records that a lane took.
#[derive(Clone, Debug)]
pub struct LaneTally {
    pub lane: LaneId,
    /// Records that were delivered by it.
    pub delivered: u64,
    /// Publishes that failed; another lane had the record, or the disk.
    pub failed: u64,
    pub ejections: u64,
    latency: Histogram<u64>,
}

impl LaneTally {
    pub fn new(lane: LaneId) -> Self {
        // These bounds and digits are allowed.
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).expect("a valid range");
        Self {
            lane,
            delivered: 0,
            failed: 0,
            ejections: 0,
            latency,
        }
    }

    /// A record was delivered, so long after it had come.
    pub fn deliver(&mut self, took: Duration) {
        self.delivered += 1;
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.latency.saturating_record(us);
    }

    /// The time from the record to its delivery that this part of the records is under; `None`
    /// without any.
    pub fn latency(&self, quantile: f64) -> Option<Duration> {
        (self.delivered > 0)
            .then(|| Duration::from_micros(self.latency.value_at_quantile(quantile)))
    }
}

impl SimulationReport {
    /// The part of all records, copies included, that this many are.
    #[expect(clippy::cast_precision_loss, reason = "some million records")]
    pub fn share(&self, records: u64) -> f64 {
        let delivered: u64 = self.lanes.iter().map(|lane| lane.delivered).sum();
        records as f64 / (delivered + self.spooled).max(1) as f64
    }
}

/// In milliseconds, with one digit behind the point.
fn millis(time: Option<Duration>) -> String {
    time.map_or_else(
        || "-".into(),
        |time| format!("{:.1}", time.as_secs_f64() * 1e3),
    )
}

impl fmt::Display for SimulationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.duration.as_secs_f64();
        writeln!(f, "policy     {}", self.policy)?;
        writeln!(f, "simulated  {seconds} s, seed {}", self.seed)?;
        writeln!(f)?;
        writeln!(
            f,
            "{:<9} {:>10} {:>7} {:>10} {:>10} {:>9} {:>9}",
            "lane", "delivered", "share", "p50 ms", "p99 ms", "failed", "ejected"
        )?;
        for lane in &self.lanes {
            writeln!(
                f,
                "{:<9} {:>10} {:>6.1}% {:>10} {:>10} {:>9} {:>9}",
                lane.lane.name(),
                lane.delivered,
                self.share(lane.delivered) * 100.0,
                millis(lane.latency(0.5)),
                millis(lane.latency(0.99)),
                lane.failed,
                lane.ejections,
            )?;
        }
        write!(
            f,
            "{:<9} {:>10} {:>6.1}%",
            "spool",
            self.spooled,
            self.share(self.spooled) * 100.0
        )?;
        if self.routes.len() > 1 {
            write!(f, "\n\n{:<11} {:>8}", "rule", "records")?;
            for (name, records) in &self.routes {
                write!(f, "\n{name:<11} {records:>8}")?;
            }
        }
        Ok(())
    }
}
