//! How samples with labels, and times, become metrics.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, TypedMetric},
};

use crate::ledger::{BOUNDS_S, Latency};

/// The samples of a metric, each with its labels.
#[derive(Debug)]
pub(super) struct Samples<M>(pub Vec<(Vec<(&'static str, String)>, M)>);

impl<M: EncodeMetric + TypedMetric> EncodeMetric for Samples<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, sample) in &self.0 {
            sample.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TypedMetric for Latency {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let mut below = 0;
        let buckets = BOUNDS_S.map(|bound| {
            let bound_us = Duration::from_secs_f64(bound).as_micros();
            let bound_us = u64::try_from(bound_us).unwrap_or(u64::MAX);
            // To two significant digits: a time just above a bound may be counted below it.
            let up_to = self.times.count_between(0, bound_us);
            let count = up_to - below;
            below = up_to;
            (bound, count)
        });
        let all = self.times.len();
        let buckets = [&buckets[..], &[(f64::INFINITY, all - below)]].concat();
        let sum_s = Duration::from_micros(self.sum_us).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum_s, all, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}
