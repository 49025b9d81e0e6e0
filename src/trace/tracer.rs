//! The spans of the node while they are under way, each of which ends when it is dropped.

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

#[cfg(test)]
mod tests {
    use std::{
        hint,
        sync::{Barrier, mpsc},
        thread,
    };

    use bytes::Bytes;

    use super::*;
    use crate::{delivery::Acker, record::Origin};

    const CONTEXT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    const STATE: &str = "congo=t61rcWkgMzE";

    fn headers(parent: Option<&str>) -> Option<TraceHeaders> {
        TraceHeaders::read(parent?, Some(STATE))
    }

    fn tracer(sampler: &str) -> (Tracer, Arc<SpanQueue>) {
        let queue = Arc::new(SpanQueue::new(100, 100));
        let sampler = Sampler::named(sampler, 1.0).unwrap();
        (Tracer::new(Arc::clone(&queue), sampler), queue)
    }

    fn delivery(traceparent: Option<&str>, is_ours: bool) -> Delivery {
        Delivery {
            record: Record {
                id: "1".into(),
                body: Bytes::from_static(b"{}"),
                trace: traceparent.and_then(|parent| TraceHeaders::read(parent, Some(STATE))),
                origin: is_ours.then(|| Origin::now("run".into())),
                api: None,
                event: None,
            },
            redelivered: false,
            since: tokio::time::Instant::now(),
            held: None,
            span: None,
            acker: Acker::new(|_| {}),
        }
    }

    #[test]
    fn the_sampler_is_asked_where_a_trace_enters_and_not_again() {
        for (sampler, context, is_ours, spans) in [
            ("always_on", None, false, 3),
            ("always_on", None, true, 0),
            ("always_on", Some(CONTEXT), true, 3),
            ("parentbased_always_off", None, false, 0),
            ("parentbased_always_off", Some(CONTEXT), false, 3),
            ("always_off", Some(CONTEXT), true, 3),
            ("always_off", Some(CONTEXT), false, 0),
        ] {
            let (tracer, queue) = tracer(sampler);
            let mut delivery = delivery(context, is_ours);
            tracer.lane(LaneId::Nats).received_one(&mut delivery);
            let traceparent = delivery.record.trace.clone();
            let traceparent = traceparent.as_ref().map(TraceHeaders::parent);
            delivery.ack();
            let told = queue.take(true);
            assert_eq!(told.len(), spans, "{sampler} {context:?} {is_ours}");
            let Some(receive) = told.first() else {
                assert_ne!(traceparent, Some(CONTEXT));
                continue;
            };
            let parent = headers(context);
            let parent = parent.as_ref().and_then(SpanContext::of);
            assert_eq!(
                receive.parent.map(|parent| parent.span),
                parent.map(|parent| parent.span)
            );
            // At its entrance, the trace goes on from the span of the message.
            let next = if is_ours {
                parent
            } else {
                Some(receive.context)
            };
            let next = next.map(|next| next.span);
            let process = told[1..].iter().find(|span| {
                matches!(
                    span.work,
                    Work::Message {
                        operation: Operation::Process,
                        ..
                    }
                )
            });
            assert_eq!(process.unwrap().parent.map(|parent| parent.span), next);
        }
    }

    #[test]
    fn a_record_that_was_taken_before_is_not_created_again() {
        let (tracer, queue) = tracer("always_on");
        let mut trace = tracer.request(|| None, || ("http", "/", "/"));
        trace.record(&"1".into(), None);
        trace.created(&[Receipt::Spool], true);
        trace.answered(202);
        assert_eq!(queue.take(true).len(), 1);
    }

    #[test]
    fn a_request_whose_client_goes_away_is_told_as_that() {
        let (tracer, queue) = tracer("always_on");
        let trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
        drop(trace);
        let told = queue.take(true);
        assert_eq!(told[0].error.as_deref(), Some("client_closed"));
    }

    #[test]
    fn a_delivery_that_is_dropped_is_not_settled() {
        let (tracer, queue) = tracer("always_on");
        let mut delivery = delivery(Some(CONTEXT), true);
        tracer.lane(LaneId::Nats).received_one(&mut delivery);
        drop(delivery);
        let told = queue.take(true);
        assert_eq!(told.len(), 2);
        assert_eq!(told[1].error.as_deref(), Some("not_settled"));
    }

    #[test]
    fn the_state_of_a_trace_goes_along_and_not_into_another_trace() {
        let (tracer, queue) = tracer("parentbased_always_on");
        let client = headers(Some(CONTEXT));
        let mut trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
        let first = trace.record(&"1".into(), client.as_ref());
        trace.answered(202);
        assert_eq!(first.as_ref().and_then(TraceHeaders::state), Some(STATE));
        assert_ne!(first.as_ref().map(TraceHeaders::parent), Some(CONTEXT));
        let mut delivery = delivery(Some(CONTEXT), true);
        tracer.lane(LaneId::Nats).received_one(&mut delivery);
        let process = delivery.span.as_ref().expect("a span");
        let url = Arc::from("http://api/");
        let alone = OpenSpan::post(&[process], 1, &url).expect("a span");
        let sent = alone.headers().expect("headers");
        assert_eq!(sent.state(), Some(STATE));
        let several = OpenSpan::post(&[process], 2, &url).expect("a span");
        let sent = several.headers().expect("headers");
        assert_eq!(sent.state(), None);
        drop((alone, several));
        delivery.ack();
        for span in queue.take(true) {
            let state = span.state.as_ref().and_then(TraceHeaders::state);
            let expected = span.links.is_empty().then_some(STATE);
            assert_eq!(state, expected, "{span:?}");
        }
        let none = [
            ("always_off", Some(STATE)),
            ("parentbased_always_off", Some(STATE)),
        ];
        for (sampler, expected) in none {
            let (tracer, _) = self::tracer(sampler);
            let mut trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
            let record = trace.record(&"1".into(), client.as_ref());
            assert_eq!(record.as_ref().and_then(TraceHeaders::state), expected);
        }
    }

    /// The operation and error of each span, with its times.
    fn told(queue: &SpanQueue) -> Vec<(Operation, Option<String>, Instant, Instant)> {
        let spans = queue.take(true).into_iter();
        let operations = spans.map(|span| {
            let Work::Message { operation, .. } = span.work else {
                panic!("{span:?}");
            };
            let error = span.error.map(Cow::into_owned);
            (operation, error, span.began, span.ended)
        });
        operations.collect()
    }

    #[test]
    fn a_process_ends_when_its_message_moves_to_disk_whatever_comes_after() {
        for verdict in [Some(Verdict::Ack), Some(Verdict::Reject), None] {
            let (tracer, queue) = tracer("always_on");
            let mut delivery = delivery(Some(CONTEXT), true);
            tracer.lane(LaneId::Nats).received_one(&mut delivery);
            drop(queue.take(true));
            let mark = delivery.span.as_mut().expect("a span").move_mark();
            let before = Instant::now();
            mark.set();
            let after = Instant::now();
            // The POST goes on.
            std::thread::sleep(Duration::from_millis(2));
            match verdict {
                Some(Verdict::Ack) => delivery.ack(),
                Some(_) => delivery.reject(),
                None => drop(delivery),
            }
            let told = told(&queue);
            let operations: Vec<_> = told.iter().map(|(operation, ..)| *operation).collect();
            assert_eq!(operations, [Operation::Ack, Operation::Process]);
            for (operation, error, _, ended) in told {
                assert_eq!(error, None, "{operation:?}");
                assert!((before..=after).contains(&ended), "{operation:?}");
            }
        }
    }

    #[test]
    fn a_message_that_moves_while_it_is_settled_is_settled_once() {
        const TURNS: u32 = 5_000;
        let (tracer, queue) = tracer("always_on");
        let together = Barrier::new(2);
        let (marks, to_set) = mpsc::channel::<MoveMark>();
        thread::scope(|threads| {
            threads.spawn(|| {
                for mark in to_set {
                    together.wait();
                    mark.set();
                }
            });
            for turn in 0..TURNS {
                let mut delivery = delivery(Some(CONTEXT), true);
                tracer.lane(LaneId::Nats).received_one(&mut delivery);
                drop(queue.take(true));
                let mark = delivery.span.as_mut().expect("a span").move_mark();
                marks.send(mark).expect("the thread waits");
                together.wait();
                // Sooner or later than the other.
                (0..turn % 256).for_each(|_| hint::spin_loop());
                delivery.ack();
                let told = told(&queue);
                let is_ack = |operation| operation == Operation::Ack;
                let acks = told.iter().filter(|(operation, ..)| is_ack(*operation));
                assert_eq!((told.len(), acks.count()), (2, 1), "{turn}: {told:?}");
            }
            drop(marks);
        });
    }

    #[test]
    fn a_record_on_disk_is_processed_and_has_no_message_to_settle() {
        for (verdict, expected) in [
            (Verdict::Ack, None),
            (Verdict::Reject, Some("dead_letter")),
            (Verdict::RetryAfter(Duration::ZERO), Some("retry_later")),
            (Verdict::Unsettled, Some("not_settled")),
        ] {
            let (tracer, queue) = tracer("always_on");
            let record = delivery(Some(CONTEXT), true).record;
            let span = tracer.lane(LaneId::Nats).process(&record).expect("a span");
            span.ended(verdict);
            let told = told(&queue);
            let [(Operation::Process, error, ..)] = &told[..] else {
                panic!("{told:?}");
            };
            assert_eq!(error.as_deref(), expected);
        }
    }
}
