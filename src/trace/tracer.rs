//! The spans of the node while they are under way, each of which ends when it is dropped.

#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    cell::Cell,
    fmt, mem, slice,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{
    context::SpanContext,
    queue::SpanQueue,
    sampler::Sampler,
    span::{Operation, Parent, Span, Work},
};
use crate::{
    api::answer::Answer,
    delivery::{Delivery, Receipt, Verdict},
    lane_id::LaneId,
    record::{Record, TraceHeaders},
};

/// The bytes of a path that a span keeps: a client may send many long ones.
const PATH_MAX: usize = 256;

/// Makes spans, if traces are on. Clones are one.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<On>>);

struct On {
    queue: Arc<SpanQueue>,
    sampler: Sampler,
}

/// Makes the spans of one lane, if traces are on.
#[derive(Clone, Default)]
pub struct LaneTracer(Option<(Arc<On>, LaneId)>);

/// A span that is under way. Dropped, it has ended.
pub struct OpenSpan(Box<Under>);

struct Under {
    on: Arc<On>,
    context: SpanContext,
    /// The headers that the trace came with.
    trace: Option<TraceHeaders>,
    parent: Option<Parent>,
    links: Vec<SpanContext>,
    began: Instant,
    ended: Option<Instant>,
    error: Option<Cow<'static, str>>,
    work: Work,
    /// POSTs of its record.
    posts: Cell<u32>,
    /// Of a process whose message may leave its broker before it ends.
    moved: Option<MoveMark>,
    /// Nobody is told of it.
    is_void: bool,
}

/// Marks the end of a process: its message is settled, and its record is on disk. What goes on with
/// the record is a process of its own. Clones are one.
#[derive(Clone, Default)]
pub struct MoveMark(Arc<OnceLock<Instant>>);

impl MoveMark {
    /// The message is settled now.
    pub fn set(&self) {
        self.0.set(Instant::now()).ok();
    }
}

/// The trace of a client's request, if traces are on.
#[derive(Default)]
pub enum RequestTrace {
    /// The client's trace context goes on as it is.
    #[default]
    Untouched,
    /// The client records its trace, and this node does not: its records get this `traceparent`.
    Unsampled(String),
    Sampled {
        request: OpenSpan,
        /// One for each record.
        creates: Vec<OpenSpan>,
    },
}

impl Tracer {
    pub(super) fn new(queue: Arc<SpanQueue>, sampler: Sampler) -> Self {
        Self(Some(Arc::new(On { queue, sampler })))
    }

    /// The trace of a client's request, which brings this context. `describe` says its scheme, path
    /// and route.
    pub fn request<'r>(
        &self,
        client: impl FnOnce() -> Option<TraceHeaders>,
        describe: impl FnOnce() -> (&'static str, &'r str, &'static str),
    ) -> RequestTrace {
        let Some(on) = &self.0 else {
            return RequestTrace::Untouched;
        };
        let client = client();
        let parent = client.as_ref().and_then(SpanContext::of);
        let context = on.sampler.next(parent);
        if !context.is_sampled() {
            return if parent.is_some_and(SpanContext::is_sampled) {
                RequestTrace::Unsampled(context.to_string())
            } else {
                RequestTrace::Untouched
            };
        }
        let (scheme, path, route) = describe();
        let work = Work::Request {
            path: path[..path.floor_char_boundary(PATH_MAX)].into(),
            scheme,
            route,
            status: 0,
        };
        let parent = parent.map(Parent::remote);
        let mut request = OpenSpan::new(on, context, parent, work);
        request.0.trace = client;
        // Until it is answered.
        request.0.error = Some("client_closed".into());
        RequestTrace::Sampled {
            request,
            creates: Vec::new(),
        }
    }

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

impl OpenSpan {
    fn new(on: &Arc<On>, context: SpanContext, parent: Option<Parent>, work: Work) -> Self {
        Self(Box::new(Under {
            on: Arc::clone(on),
            context,
            trace: None,
            parent,
            links: Vec::new(),
            began: Instant::now(),
            ended: None,
            error: None,
            work,
            posts: Cell::new(0),
            moved: None,
            is_void: false,
        }))
    }

    /// A span about records with these contexts: the child of the only one, or one of its own with
    /// links.
    fn about(on: &Arc<On>, contexts: Vec<SpanContext>, is_several: bool, work: Work) -> Self {
        let (context, parent, links) = match &*contexts {
            [only] if !is_several => {
                let parent = Some(Parent::remote(*only));
                (only.child(true), parent, Vec::new())
            }
            _ => (SpanContext::root(true), None, contexts),
        };
        let mut span = Self::new(on, context, parent, work);
        span.0.links = links;
        span
    }

    fn child(&self, work: Work) -> Self {
        let parent = Parent {
            span: self.0.context.span,
            is_remote: false,
        };
        let context = self.0.context.child(true);
        let mut child = Self::new(&self.0.on, context, Some(parent), work);
        child.0.trace.clone_from(&self.0.trace);
        child
    }

    /// The headers of what this span causes elsewhere.
    pub fn headers(&self) -> Option<TraceHeaders> {
        headers_at(self.0.trace.as_ref(), self.0.context)
    }

    /// The mark by which the message of this process leaves its broker.
    pub fn move_mark(&mut self) -> MoveMark {
        self.0.moved.get_or_insert_default().clone()
    }

    /// A POST to the API at `url` of `records`, those of the processes `of` among them.
    pub fn post(of: &[&Self], records: usize, url: &Arc<str>) -> Option<Self> {
        let first = of.first()?;
        let work = Work::Post {
            url: Arc::clone(url),
            status: 0,
            resends: first.0.posts.get(),
        };
        for span in of {
            span.0.posts.update(|posts| posts + 1);
        }
        if records == 1 {
            return Some(first.child(work));
        }
        let contexts = of.iter().map(|span| span.0.context).collect();
        Some(Self::about(&first.0.on, contexts, true, work))
    }

    /// Ends a POST by the API's answer.
    pub fn answered(mut self, answer: &Answer) {
        if let Work::Post { status, .. } = &mut self.0.work {
            *status = answer.status();
        }
        self.0.error = match answer {
            Answer::Status { status, .. } if *status >= 400 => Some(status.to_string().into()),
            Answer::Status { .. } => None,
            Answer::NoAnswer { class, .. } => Some(class.name().into()),
        };
    }

    /// Ends the process of a record on disk, which no broker has.
    pub fn ended(mut self, verdict: Verdict) {
        self.0.error = match verdict {
            Verdict::Ack => None,
            Verdict::RetryAfter(_) => Some("retry_later".into()),
            Verdict::Reject => Some("dead_letter".into()),
            Verdict::Unsettled => return,
        };
    }

    /// Ends a process, and begins the span of its settlement. One whose message was settled before
    /// has ended then.
    pub fn settle(mut self, verdict: Verdict) -> Option<Self> {
        let operation = match verdict {
            Verdict::Ack => Operation::Ack,
            Verdict::RetryAfter(_) => Operation::Nack,
            Verdict::Reject => Operation::Reject,
            Verdict::Unsettled => return None,
        };
        if self.moved_at().is_some() {
            return None;
        }
        // A message that moves from now on is settled here, and not again at the end.
        self.0.moved = None;
        let settling = self.settlement(operation);
        self.ended(verdict);
        Some(settling)
    }

    fn settlement(&self, operation: Operation) -> Self {
        let mut work = self.0.work.clone();
        if let Work::Message { operation: of, .. } = &mut work {
            *of = operation;
        }
        self.child(work)
    }

    fn moved_at(&self) -> Option<Instant> {
        self.0.moved.as_ref()?.0.get().copied()
    }
}

/// The headers at a span: those that its trace came with, or new ones.
fn headers_at(trace: Option<&TraceHeaders>, context: SpanContext) -> Option<TraceHeaders> {
    let parent = context.to_string();
    match trace {
        Some(trace) => Some(trace.at(&parent)),
        None => TraceHeaders::read(&parent, None),
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        if self.0.is_void {
            return;
        }
        if let Some(at) = self.moved_at() {
            let mut ack = self.settlement(Operation::Ack);
            (ack.0.began, ack.0.ended) = (at, Some(at));
            (self.0.error, self.0.ended) = (None, Some(at));
        }
        let under = &mut *self.0;
        let work = Work::Post {
            url: Arc::default(),
            status: 0,
            resends: 0,
        };
        under.on.queue.add(Span {
            context: under.context,
            state: under.trace.take(),
            parent: under.parent,
            links: mem::take(&mut under.links),
            began: under.began,
            ended: under.ended.unwrap_or_else(Instant::now),
            error: under.error.take(),
            work: mem::replace(&mut under.work, work),
        });
    }
}

impl fmt::Debug for OpenSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenSpan").field(&self.0.context).finish()
    }
}

impl RequestTrace {
    /// The trace context of the next record of the request, which brings `client`.
    pub fn record(&mut self, id: &Arc<str>, client: Option<&TraceHeaders>) -> Option<TraceHeaders> {
        match self {
            Self::Untouched => client.cloned(),
            Self::Unsampled(parent) => client.map(|client| client.at(parent)),
            Self::Sampled { request, creates } => {
                let mut create = request.child(Work::Message {
                    operation: Operation::Create,
                    lane: None,
                    id: Some(Arc::clone(id)),
                    bundle: None,
                });
                create.0.ended = Some(Instant::now());
                let headers = create.headers();
                creates.push(create);
                headers
            }
        }
    }

    /// Ends the spans of the records by their receipts. Those of earlier requests made no records.
    pub fn created(&mut self, receipts: &[Receipt], is_replay: bool) {
        let Self::Sampled { creates, .. } = self else {
            return;
        };
        for (create, receipt) in creates.iter_mut().zip(receipts) {
            if let (Work::Message { lane, .. }, Receipt::Lane(by)) = (&mut create.0.work, receipt) {
                *lane = Some(*by);
            }
            create.0.is_void = is_replay;
        }
        creates.clear();
    }

    /// Ends the span of the request.
    pub fn answered(self, code: u16) {
        let Self::Sampled {
            mut request,
            creates,
        } = self
        else {
            return;
        };
        for mut create in creates {
            create.0.error = Some("not_taken".into());
        }
        if let Work::Request { status, .. } = &mut request.0.work {
            *status = code;
        }
        // A client's mistake is no error of the server.
        request.0.error = (code >= 500).then(|| code.to_string().into());
    }
}
