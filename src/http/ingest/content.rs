//! The kind of a request's body, by its headers.

use actix_web::http::header::{self, HeaderMap};

use crate::{
    cloud_events::{self, AttributeValue, EventAttributes, header_value},
    http::problem::{Problem, ProblemKind},
};

/// The prefix of headers that are the attributes of an event (CloudEvents, HTTP binding, 3.1.3.1).
pub const EVENT_PREFIX: &str = "ce-";
/// How the media types of events begin.
const EVENT_TYPES: &str = "application/cloudevents";
/// The kinds that are taken, for the answer to another one.
const ALLOWED: &str = "A record is application/json, many may be application/x-ndjson, and \
    CloudEvents application/cloudevents+json or application/cloudevents-batch+json";

/// The content of a request.
pub enum Content {
    /// A record, or an array of them.
    Json,
    /// A record in each line.
    Lines,
    /// The data of an event that has its attributes in the headers.
    BinaryEvent(Box<EventAttributes>),
    /// An event as JSON.
    StructuredEvent,
    /// An array of events as JSON.
    EventBatch,
}

impl Content {
    /// By `Content-Type`, and by the headers of an event (CloudEvents, HTTP binding, 3). JSON is
    /// `application/json`, `application/*+json`, or has no type.
    pub fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let essence = essence(headers);
        let is = |other: &str| essence.eq_ignore_ascii_case(other);
        // Nearly all requests are, and need no other look at the type.
        let is_plain_json = is("application/json");
        if is("application/cloudevents+json") {
            return Ok(Self::StructuredEvent);
        }
        if is("application/cloudevents-batch+json") {
            return Ok(Self::EventBatch);
        }
        // HTTP binding, 3: a format that is not known, and no event of the binary mode.
        if !is_plain_json && essence.to_ascii_lowercase().starts_with(EVENT_TYPES) {
            return Err(other_type(essence));
        }
        if is_event(headers) {
            return binary_event(headers).map(|event| Self::BinaryEvent(Box::new(event)));
        }
        if is_plain_json {
            return Ok(Self::Json);
        }
        // The first has most users; the others are proposed names of the same form.
        if ["x-ndjson", "ndjson", "jsonl"]
            .iter()
            .any(|subtype| is_of(essence, subtype))
        {
            return Ok(Self::Lines);
        }
        let is_json = if essence.is_empty() {
            !headers.contains_key(header::CONTENT_TYPE)
        } else {
            is_application_json(essence)
        };
        if is_json {
            return Ok(Self::Json);
        }
        Err(other_type(essence))
    }

    /// A word for the form. The key table keeps it, on disk too.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Lines => "lines",
            Self::BinaryEvent(_) => "binary event",
            Self::StructuredEvent => "structured event",
            Self::EventBatch => "event batch",
        }
    }
}

impl Content {
    /// Whether its records have keys of their own.
    pub(super) const fn is_event(&self) -> bool {
        !matches!(self, Self::Json | Self::Lines)
    }
}

/// The type of the body without parameters (RFC 9110, 8.3.1).
fn essence(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE);
    let text = value.and_then(|value| value.to_str().ok());
    let first = text.and_then(|text| text.split(';').next());
    first.unwrap_or_default().trim()
}

/// Whether `essence` is `application/` and this subtype.
fn is_of(essence: &str, subtype: &str) -> bool {
    let named = essence.split_once('/');
    named.is_some_and(|(top, of)| {
        top.eq_ignore_ascii_case("application") && of.eq_ignore_ascii_case(subtype)
    })
}

/// Whether `essence` is `application/*+json`, and no other form of an event.
fn is_application_json(essence: &str) -> bool {
    let essence = essence.to_ascii_lowercase();
    essence.starts_with("application/")
        && essence.ends_with("+json")
        && !essence.starts_with(EVENT_TYPES)
}

fn other_type(essence: &str) -> Problem {
    Problem::unsupported(
        ProblemKind::MediaType,
        format!("{ALLOWED}; not {essence:?}"),
    )
}

/// Whether the headers identify an event. One that lacks others is refused: taken as a plain record,
/// it would have no key. Any other attribute alone is a header like any, for rules to read.
fn is_event(headers: &HeaderMap) -> bool {
    let mut names = headers.keys().map(header::HeaderName::as_str);
    names.any(|name| {
        let attribute = name.strip_prefix(EVENT_PREFIX);
        attribute.is_some_and(|name| matches!(name, "specversion" | "id" | "source"))
    })
}

/// The attributes of an event in the binary mode (HTTP binding, 3.1).
fn binary_event(headers: &HeaderMap) -> Result<EventAttributes, Problem> {
    let mut event = EventAttributes::default();
    for (header, value) in headers {
        let header = header.as_str();
        let Some(name) = header.strip_prefix(EVENT_PREFIX) else {
            continue;
        };
        if name == "datacontenttype" {
            return Err(bad_header(
                header,
                "is no header; Content-Type is, in its place",
            ));
        }
        let text = header_value::decode(value.as_bytes());
        let text = text.map_err(|detail| bad_header(header, &detail))?;
        let added = event.insert(name, AttributeValue::Text(text));
        added.map_err(|why| bad_header(header, &why.detail))?;
    }
    if let Some(media_type) = headers.get(header::CONTENT_TYPE) {
        let media_type = media_type.to_str().unwrap_or_default();
        if !cloud_events::is_json(media_type) {
            return Err(other_type(media_type));
        }
        let added = event.insert("datacontenttype", AttributeValue::text_of(media_type));
        added.map_err(|why| bad_header("content-type", &why.detail))?;
    }
    let complete = event.complete_with_room();
    complete.map_err(|why| bad_header(&format!("{EVENT_PREFIX}{}", why.name), &why.detail))
}

fn bad_header(header: &str, detail: &str) -> Problem {
    let detail = format!("An event's header {header} {detail}");
    Problem::bad_request(ProblemKind::CloudEvent, detail).with("header", header)
}
