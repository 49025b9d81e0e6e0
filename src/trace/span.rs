//! Spans, and how each is told to a collector: names and attributes are those of the OpenTelemetry
//! semantic conventions 1.44. Pure.

use std::{borrow::Cow, sync::Arc, time::Instant};

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{
        self as otlp, Status,
        span::{Link, SpanKind},
        status::StatusCode,
    },
};

use super::{
    context::SpanContext,
    destination::{Destination, Destinations, OWN_SYSTEM, server},
    settings::SpanLimits,
};
use crate::{lane_id::LaneId, record::TraceHeaders};

/// The RPC of the gRPC lane.
const CARRY: &str = "waypost.v1.Waypost/Carry";
/// The flags of a span: those of its trace, and that its parent is known to be in another process.
const HAS_IS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// A piece of work that has ended.
#[derive(Clone, Debug)]
pub struct Span {
    pub context: SpanContext,
    /// With the `tracestate` of its trace, if a client has sent one.
    pub state: Option<TraceHeaders>,
    pub parent: Option<Parent>,
    /// The spans of the records that it is about, if there are several.
    pub links: Vec<SpanContext>,
    pub began: Instant,
    pub ended: Instant,
    /// `error.type`
    pub error: Option<Cow<'static, str>>,
    pub work: Work,
}

#[derive(Clone, Copy, Debug)]
pub struct Parent {
    pub span: u64,
    /// It came with a request or a message.
    pub is_remote: bool,
}

impl Parent {
    /// The parent that came with a request or a message.
    pub const fn remote(context: SpanContext) -> Self {
        Self {
            span: context.span,
            is_remote: true,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Work {
    /// A client's POST.
    Request {
        path: Box<str>,
        scheme: &'static str,
        route: &'static str,
        /// 0 without an answer.
        status: u16,
    },
    Message {
        operation: Operation,
        /// `None` if no lane has the record.
        lane: Option<LaneId>,
        /// `None` of a bundle.
        id: Option<Arc<str>>,
        /// Records of the message, if it is a bundle.
        bundle: Option<usize>,
    },
    /// A POST to the API.
    Post {
        url: Arc<str>,
        /// 0 without an answer.
        status: u16,
        /// POSTs of the same record before this one.
        resends: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Send,
    Receive,
    Process,
    Ack,
    /// The message is given back for another try.
    Nack,
    /// The broker is to forget the message: it is a dead letter here.
    Reject,
}

impl Operation {
    const fn name(self, system: &'static str) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Send => "send",
            Self::Receive => "receive",
            // The name that the conventions give it there.
            Self::Process if matches!(system.as_bytes(), b"gcp_pubsub") => "subscribe",
            Self::Process => "process",
            Self::Ack => "ack",
            Self::Nack => "nack",
            Self::Reject => "reject",
        }
    }

    const fn kind(self) -> (&'static str, SpanKind) {
        match self {
            Self::Create => ("create", SpanKind::Producer),
            Self::Send => ("send", SpanKind::Client),
            Self::Receive => ("receive", SpanKind::Client),
            Self::Process => ("process", SpanKind::Consumer),
            Self::Ack | Self::Nack | Self::Reject => ("settle", SpanKind::Client),
        }
    }
}

/// The attributes of a span, as many as its limits allow.
struct Attributes {
    limits: SpanLimits,
    list: Vec<KeyValue>,
    dropped: u32,
}

impl Attributes {
    fn add(&mut self, name: &'static str, value: Value) {
        if self.list.len() >= self.limits.attributes {
            self.dropped += 1;
            return;
        }
        self.list.push(pair(name, value));
    }

    fn text(&mut self, name: &'static str, text: &str) {
        let most = self.limits.value_length;
        let end = text
            .char_indices()
            .nth(most)
            .map_or(text.len(), |(at, _)| at);
        self.add(name, Value::StringValue(text[..end].into()));
    }

    fn number(&mut self, name: &'static str, number: impl TryInto<i64>) {
        let number = number.try_into().unwrap_or(i64::MAX);
        self.add(name, Value::IntValue(number));
    }

    fn server(&mut self, server: Option<&(String, u16)>) {
        if let Some((host, port)) = server {
            self.text("server.address", host);
            self.number("server.port", *port);
        }
    }
}

/// An attribute.
pub fn pair(name: impl Into<String>, value: Value) -> KeyValue {
    KeyValue {
        key: name.into(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

impl Span {
    /// The span as a collector takes it. `unix_ns` turns its times into nanoseconds since the Unix
    /// epoch.
    pub fn to_otlp(
        &self,
        destinations: &Destinations,
        limits: SpanLimits,
        unix_ns: impl Fn(Instant) -> u64,
    ) -> otlp::Span {
        let mut attributes = Attributes {
            limits,
            list: Vec::new(),
            dropped: 0,
        };
        let (name, kind) = self.work.describe(destinations, &mut attributes);
        if let Work::Message {
            lane: Some(LaneId::Grpc),
            operation: Operation::Send | Operation::Receive,
            ..
        } = self.work
        {
            let code = match self.error.as_deref() {
                None => "OK",
                Some("timeout") => "DEADLINE_EXCEEDED",
                Some("connect" | "connection_lost") => "UNAVAILABLE",
                Some("refused") => "RESOURCE_EXHAUSTED",
                Some("too_large") => "INVALID_ARGUMENT",
                Some(_) => "UNKNOWN",
            };
            attributes.text("rpc.response.status_code", code);
        }
        if let Some(error) = &self.error {
            attributes.text("error.type", error);
        }
        let links = self.links.iter().take(limits.links).map(|link| Link {
            trace_id: link.trace.to_be_bytes().into(),
            span_id: link.span.to_be_bytes().into(),
            flags: u32::from(link.flags),
            ..Link::default()
        });
        let links: Vec<_> = links.collect();
        let is_remote = self.parent.is_some_and(|parent| parent.is_remote);
        let parent = self.parent.map(|parent| parent.span.to_be_bytes().into());
        otlp::Span {
            trace_id: self.context.trace.to_be_bytes().into(),
            span_id: self.context.span.to_be_bytes().into(),
            trace_state: self
                .state
                .as_ref()
                .and_then(TraceHeaders::state)
                .unwrap_or_default()
                .into(),
            parent_span_id: parent.unwrap_or_default(),
            flags: u32::from(self.context.flags)
                | HAS_IS_REMOTE
                | if is_remote { IS_REMOTE } else { 0 },
            name,
            kind: kind.into(),
            start_time_unix_nano: unix_ns(self.began),
            end_time_unix_nano: unix_ns(self.ended),
            attributes: attributes.list,
            dropped_attributes_count: attributes.dropped,
            dropped_links_count: u32::try_from(self.links.len() - links.len()).unwrap_or(u32::MAX),
            links,
            // A client's mistake is no error of the server (HTTP spans, status).
            status: self.error.as_ref().map(|_| Status {
                message: String::new(),
                code: StatusCode::Error.into(),
            }),
            ..otlp::Span::default()
        }
    }
}

impl Work {
    /// The name and kind, and the attributes that are not about errors.
    fn describe(
        &self,
        destinations: &Destinations,
        attributes: &mut Attributes,
    ) -> (String, SpanKind) {
        match self {
            Self::Request {
                path,
                scheme,
                route,
                status,
            } => {
                attributes.text("http.request.method", "POST");
                attributes.text("http.route", route);
                attributes.text("url.path", path);
                attributes.text("url.scheme", scheme);
                if *status != 0 {
                    attributes.number("http.response.status_code", *status);
                }
                (format!("POST {route}"), SpanKind::Server)
            }
            Self::Post {
                url,
                status,
                resends,
            } => {
                attributes.text("http.request.method", "POST");
                attributes.text("url.full", url);
                attributes.server(server(url, 80).as_ref());
                if *status != 0 {
                    attributes.number("http.response.status_code", *status);
                }
                if *resends > 0 {
                    attributes.number("http.request.resend_count", *resends);
                }
                ("POST".into(), SpanKind::Client)
            }
            Self::Message {
                operation,
                lane,
                id,
                bundle,
            } => {
                let destination = lane.and_then(|lane| destinations[lane as usize].as_ref());
                match (operation, lane) {
                    (Operation::Send, Some(LaneId::Grpc)) => {
                        describe_call(destination, attributes);
                        (CARRY.into(), SpanKind::Client)
                    }
                    (Operation::Receive, Some(LaneId::Grpc)) => {
                        describe_call(destination, attributes);
                        (CARRY.into(), SpanKind::Server)
                    }
                    _ => {
                        let message = (id.as_deref(), *bundle);
                        describe_message(*operation, destination, message, attributes)
                    }
                }
            }
        }
    }
}

fn describe_call(destination: Option<&Destination>, attributes: &mut Attributes) {
    attributes.text("rpc.system.name", "grpc");
    attributes.text("rpc.method", CARRY);
    attributes.server(destination.and_then(|lane| lane.server.as_ref()));
}

fn describe_message(
    operation: Operation,
    destination: Option<&Destination>,
    (id, bundle): (Option<&str>, Option<usize>),
    attributes: &mut Attributes,
) -> (String, SpanKind) {
    let system = destination.map_or(OWN_SYSTEM, |lane| lane.system);
    let (kind_name, kind) = operation.kind();
    let name = operation.name(system);
    attributes.text("messaging.system", system);
    attributes.text("messaging.operation.name", name);
    attributes.text("messaging.operation.type", kind_name);
    if let Some(id) = id {
        attributes.text("messaging.message.id", id);
    }
    if let Some(records) = bundle {
        attributes.number("messaging.batch.message_count", records);
    }
    let Some(lane) = destination else {
        return (name.into(), kind);
    };
    attributes.text("messaging.destination.name", &lane.name);
    if system == "rabbitmq" {
        // The default exchange routes by the name of the queue.
        attributes.text("messaging.rabbitmq.destination.routing_key", &lane.name);
    }
    let is_consumer = !matches!(operation, Operation::Create | Operation::Send);
    if is_consumer && let Some(subscription) = &lane.subscription {
        attributes.text("messaging.destination.subscription.name", subscription);
    }
    if is_consumer && let Some(group) = &lane.consumer_group {
        attributes.text("messaging.consumer.group.name", group);
    }
    attributes.server(lane.server.as_ref());
    (format!("{name} {}", lane.name), kind)
}
