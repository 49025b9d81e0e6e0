//! The spans that a collector of OpenTelemetry has, and those that were lost. Both are there while
//! traces are off.

use prometheus_client::{metrics::counter::ConstCounter, registry::Registry};

use super::{Samples, Scrape};
use crate::trace::LossReason;

pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    registry.register(
        "waypost_trace_spans_exported",
        "Spans of traces that the collector has taken",
        ConstCounter::new(scrape.exporter.exported()),
    );
    let lost = LossReason::ALL.iter().map(|why| {
        let label = ("reason", why.name().to_owned());
        (vec![label], ConstCounter::new(scrape.exporter.lost(*why)))
    });
    registry.register(
        "waypost_trace_spans_lost",
        "Spans of traces that the collector does not have, and will not get",
        Samples(lost.collect()),
    );
}
