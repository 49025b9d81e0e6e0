//! A collector of OpenTelemetry: takes spans as OTLP over HTTP, and keeps them.

use std::{collections::BTreeMap, io::Read as _, time::Duration};

use bytes::Bytes;
use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind},
};
use prost::Message as _;

use super::{api::Api, eventually};

/// A span as the collector got it.
#[derive(Clone, Debug)]
pub struct SeenSpan {
    pub name: String,
    pub kind: SpanKind,
    pub trace: String,
    pub id: String,
    /// Empty if it has none.
    pub parent: String,
    pub attributes: BTreeMap<String, String>,
    /// Trace and span of each.
    pub links: Vec<(String, String)>,
    pub is_error: bool,
    /// `tracestate`
    pub state: String,
    pub began: u64,
    pub ended: u64,
}

pub struct Collector(pub Api);

impl Collector {
    pub fn start() -> Self {
        Self(Api::start())
    }

    /// Variables by which a node sends it spans, soon after they have ended.
    pub fn variables(&self) -> Vec<(String, String)> {
        let url = self.0.url();
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", url.trim_end_matches('/')),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    pub fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        let posts = self.0.posts().into_iter();
        let requests = posts.map(|post| {
            assert_eq!(post.path, "/v1/traces");
            assert_eq!(post.content_type.as_deref(), Some("application/x-protobuf"));
            let mut plain = Vec::new();
            let body = match post.encoding.as_deref() {
                None => &*post.body,
                Some("gzip") => {
                    GzDecoder::new(&*post.body)
                        .read_to_end(&mut plain)
                        .expect("gzip");
                    &plain
                }
                Some(other) => panic!("{other}"),
            };
            ExportTraceServiceRequest::decode(body).expect("a request of OTLP")
        });
        requests.collect()
    }

    pub fn spans(&self) -> Vec<SeenSpan> {
        let resources = self.requests().into_iter();
        let scopes = resources
            .flat_map(|request| request.resource_spans)
            .flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        spans.map(|span| SeenSpan::new(&span)).collect()
    }

    /// The spans, once there are as many of which `counts` is true.
    pub async fn spans_when(
        &self,
        count: usize,
        counts: impl Fn(&SeenSpan) -> bool,
        patience: Duration,
    ) -> Vec<SeenSpan> {
        eventually(&format!("{count} spans"), patience, async || {
            let spans = self.spans();
            (spans.iter().filter(|span| counts(span)).count() >= count).then_some(spans)
        })
        .await
    }
}

/// Attributes as text.
pub fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref().and_then(|any| any.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("neither text nor number: {other:?}"),
    };
    let attributes = attributes.iter();
    attributes
        .map(|pair| (pair.key.clone(), text(&pair.value)))
        .collect()
}

impl SeenSpan {
    fn new(span: &Span) -> Self {
        let hex = |bytes: &[u8]| format!("{:x}", Bytes::copy_from_slice(bytes));
        let links = span.links.iter();
        assert_eq!((span.trace_id.len(), span.span_id.len()), (16, 8));
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        Self {
            name: span.name.clone(),
            kind: span.kind(),
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            attributes: texts(&span.attributes),
            links: links
                .map(|link| (hex(&link.trace_id), hex(&link.span_id)))
                .collect(),
            is_error: span.status.is_some(),
            state: span.trace_state.clone(),
            began: span.start_time_unix_nano,
            ended: span.end_time_unix_nano,
        }
    }

    /// The value of an attribute; empty if it has none of that name.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}
