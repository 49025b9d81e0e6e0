//! From accepted to delivered: quantiles for the status, and a histogram for the metrics that names
//! traces.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::{encoding::EncodeLabelSet, metrics::exemplar::HistogramWithExemplars};

use super::{BOUNDS_S, Latency, Quantiles};
use crate::record::{Record, TraceHeaders, sampled_trace_id};

/// The trace that an exemplar leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TraceLabel {
    trace_id: String,
}

/// The times of the records that one lane has delivered.
pub struct DeliveryTimes {
    pub times: Latency,
    /// With the last sampled trace of each bucket.
    pub histogram: HistogramWithExemplars<TraceLabel>,
}

impl DeliveryTimes {
    /// `record` was delivered at `now_us`, `took` after it was accepted.
    pub(super) fn record(&mut self, record: &Record, took: Duration, now_us: u64) {
        self.times.record(took);
        let trace = record.trace.as_ref().map(TraceHeaders::parent);
        let trace = trace.and_then(sampled_trace_id);
        let exemplar = trace.map(|trace_id| TraceLabel {
            trace_id: trace_id.to_owned(),
        });
        let at = exemplar.as_ref().map(|_| at(now_us));
        self.histogram.observe(took.as_secs_f64(), exemplar, at);
    }

    pub fn quantiles_ms(&self) -> Quantiles {
        self.times.quantiles_ms()
    }
}

impl Default for DeliveryTimes {
    fn default() -> Self {
        Self {
            times: Latency::default(),
            histogram: HistogramWithExemplars::new(BOUNDS_S.into_iter()),
        }
    }
}

fn at(us: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(us)
}
