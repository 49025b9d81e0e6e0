//! The spans of what happens in one lane.

use std::{
    slice,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{On, OpenSpan, Tracer, headers_at};
use crate::{
    delivery::Delivery,
    lane_id::LaneId,
    record::Record,
    trace::{
        context::SpanContext,
        span::{Operation, Parent, Work},
    },
};

/// Makes the spans of one lane, if traces are on.
#[derive(Clone, Default)]
pub struct LaneTracer(Option<(Arc<On>, LaneId)>);

impl Tracer {
    /// The tracer of what happens in `lane`.
    pub fn lane(&self, lane: LaneId) -> LaneTracer {
        LaneTracer(self.0.clone().map(|on| (on, lane)))
    }
}

impl LaneTracer {
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Tells how the publish of a message with `records` has ended, which began at `began`: after a
    /// time with a confirm, or with a class of failure.
    pub fn sent(
        &self,
        records: &[impl AsRef<Record>],
        began: Instant,
        result: Result<Duration, &'static str>,
    ) {
        if let Some(mut span) = self.message(Operation::Send, records) {
            span.0.began = began;
            span.0.ended = result.ok().map(|took| began + took);
            span.0.error = result.err().map(Into::into);
        }
    }

    /// Tells that the bundle of `records` has come out of the lane. The client crate has it since
    /// `since`.
    pub fn received(&self, records: &[Record], since: tokio::time::Instant) {
        if let Some(mut span) = self.message(Operation::Receive, records) {
            span.0.began = since.into_std();
        }
    }

    /// Tells that `delivery` has come out of the lane, as a message of its own, and begins the span
    /// of its process.
    pub fn received_one(&self, delivery: &mut Delivery) {
        let Some((on, _)) = &self.0 else { return };
        let record = &mut delivery.record;
        let mut adopted = None;
        if record.origin.is_none() {
            // Of another publisher: a trace may begin here.
            let parent = record.trace.as_ref().and_then(SpanContext::of);
            let next = on.sampler.next(parent);
            if next.is_sampled() {
                adopted = Some((next, parent));
            }
            if next.is_sampled() || parent.is_some_and(SpanContext::is_sampled) {
                record.trace = headers_at(record.trace.as_ref(), next);
            }
        }
        if let Some(mut span) = self.message(Operation::Receive, slice::from_ref(record)) {
            span.0.began = delivery.since.into_std();
            if let Some((next, parent)) = adopted {
                span.0.context = next;
                span.0.parent = parent.map(Parent::remote);
            }
        }
        delivery.span = self.process(record);
    }

    /// The span from now on until `record`, which came out of the lane, is settled.
    pub fn process(&self, record: &Record) -> Option<OpenSpan> {
        let mut span = self.message(Operation::Process, slice::from_ref(record))?;
        // Until something else is known.
        span.0.error = Some("not_settled".into());
        Some(span)
    }

    /// A span of the message of `records`, if the trace of one of them is recorded.
    fn message(&self, operation: Operation, records: &[impl AsRef<Record>]) -> Option<OpenSpan> {
        let (on, lane) = self.0.as_ref()?;
        let recorded = records.iter().filter_map(|record| {
            let record = record.as_ref();
            let context = SpanContext::sampled(record.trace.as_ref())?;
            Some((context, &record.id))
        });
        let (contexts, ids): (Vec<_>, Vec<_>) = recorded.unzip();
        let is_several = records.len() > 1;
        let work = Work::Message {
            operation,
            lane: Some(*lane),
            // The bundle has an id of its own, which no span of a record has.
            id: ids.first().filter(|_| !is_several).map(|id| Arc::clone(id)),
            bundle: is_several.then_some(records.len()),
        };
        if contexts.is_empty() {
            return None;
        }
        let mut span = OpenSpan::about(on, contexts, is_several, work);
        if !is_several {
            span.0.trace.clone_from(&records[0].as_ref().trace);
        }
        Some(span)
    }
}
