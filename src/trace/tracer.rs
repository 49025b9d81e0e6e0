//! The spans of the node while they are under way, each of which ends when it is dropped.

mod lane;
mod request;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    cell::Cell,
    fmt, mem,
    sync::{Arc, OnceLock},
    time::Instant,
};

pub use self::{lane::LaneTracer, request::RequestTrace};
use super::{
    context::SpanContext,
    queue::SpanQueue,
    sampler::Sampler,
    span::{Operation, Parent, Span, Work},
};
use crate::{api::answer::Answer, delivery::Verdict, record::TraceHeaders};

/// Makes spans, if traces are on. Clones are one.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<On>>);

struct On {
    queue: Arc<SpanQueue>,
    sampler: Sampler,
}

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

impl Tracer {
    pub(super) fn new(queue: Arc<SpanQueue>, sampler: Sampler) -> Self {
        Self(Some(Arc::new(On { queue, sampler })))
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
