//! The spans of a client's request, and of the records that it makes.

use std::{sync::Arc, time::Instant};

use super::{OpenSpan, Tracer};
use crate::{
    delivery::Receipt,
    record::TraceHeaders,
    trace::{
        context::SpanContext,
        span::{Operation, Parent, Work},
    },
};

/// The bytes of a path that a span keeps: a client may send many long ones.
const PATH_MAX: usize = 256;

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
