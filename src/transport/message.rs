//! Messages, and the one codec of their headers. A transport maps [`Headers::pairs`] to the headers
//! or attributes of its system, and [`Headers::read`] back.

use std::{borrow::Cow, fmt, sync::Arc};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    cloud_events::may_be_event,
    delivery::{Acker, Delivery, Verdict},
    record::{Origin, Record, TraceHeaders, is_visible_ascii},
};

/// Names of the headers.
pub mod header {
    pub const ID: &str = "Waypost-Id";
    pub const ORIGIN: &str = "Waypost-Origin";
    /// The name of the API that takes the record; absent for `[api]`.
    pub const API: &str = "Waypost-Api";
    /// The attributes of the event that the record is the data of; absent if it is of none.
    pub const EVENT: &str = "Waypost-Event";
    /// The number of records in the message; absent where the body is one record.
    pub const BUNDLE: &str = "Waypost-Bundle";
    /// W3C Trace Context.
    pub const TRACEPARENT: &str = "traceparent";
    pub const TRACESTATE: &str = "tracestate";
}

/// A message on its way through a system. Clones share the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub headers: Headers,
    /// The client's JSON, or a bundle.
    pub body: Bytes,
}

/// The parts of a message beside its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The system may drop a message whose id it has stored before.
    pub id: Arc<str>,
    pub origin: Option<Origin>,
    pub trace: Option<TraceHeaders>,
    /// See [`Record::api`]. A bundle has it in its records.
    pub api: Option<Arc<str>>,
    /// See [`Record::event`]. A bundle has it in its records.
    pub event: Option<Arc<str>>,
    /// The number of records in a bundle; `None` where the body is one record.
    pub bundle: Option<usize>,
}

impl Headers {
    /// The name and value of each header.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, Cow<'_, str>)> {
        let origin = self.origin.as_ref().map(|origin| origin.to_text().into());
        let trace = self.trace.as_ref();
        let traceparent = trace.map(|trace| trace.parent().into());
        let tracestate = trace.and_then(TraceHeaders::state).map(Cow::from);
        let api = self.api.as_deref().map(Cow::from);
        let event = self.event.as_deref().map(Cow::from);
        let bundle = self.bundle.map(|count| count.to_string().into());
        let optional = [
            (header::ORIGIN, origin),
            (header::TRACEPARENT, traceparent),
            (header::TRACESTATE, tracestate),
            (header::API, api),
            (header::EVENT, event),
            (header::BUNDLE, bundle),
        ];
        let optional = optional
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        std::iter::once((header::ID, Cow::from(&*self.id))).chain(optional)
    }

    /// Reads headers; `header` looks one up by its name. `other_id` is the id of a message that
    /// another publisher sent without [`header::ID`]: it must not change when the system sends the
    /// message again. The id and the trace context become headers of the POST, so a malformed one
    /// counts as absent.
    pub fn read<'v>(
        header: impl Fn(&str) -> Option<&'v str>,
        other_id: impl FnOnce() -> Arc<str>,
    ) -> Self {
        let visible = |name| header(name).filter(|value| is_visible_ascii(value));
        Self {
            id: visible(header::ID).map_or_else(other_id, Arc::from),
            origin: header(header::ORIGIN).and_then(Origin::parse),
            trace: header(header::TRACEPARENT)
                .and_then(|parent| TraceHeaders::read(parent, header(header::TRACESTATE))),
            api: visible(header::API).map(Arc::from),
            event: header(header::EVENT)
                .filter(|text| may_be_event(text))
                .map(Arc::from),
            bundle: visible(header::BUNDLE).and_then(|count| count.parse().ok()),
        }
    }
}

impl From<&Record> for Message {
    fn from(record: &Record) -> Self {
        let headers = Headers {
            id: Arc::clone(&record.id),
            origin: record.origin.clone(),
            trace: record.trace.clone(),
            api: record.api.clone(),
            event: record.event.clone(),
            bundle: None,
        };
        Self {
            headers,
            body: record.body.clone(),
        }
    }
}

impl From<Message> for Record {
    fn from(Message { headers, body }: Message) -> Self {
        Self {
            id: headers.id,
            body,
            trace: headers.trace,
            origin: headers.origin,
            api: headers.api,
            event: headers.event,
        }
    }
}

/// A message that came out of a system and is in flight until it is settled. Dropped, it is *not
/// delivered*: the system redelivers it.
pub struct Incoming {
    pub message: Message,
    /// The system says that it has sent this message before.
    pub redelivered: bool,
    /// When the client crate handed it over, at the latest.
    pub since: Instant,
    pub acker: Acker,
}

impl Incoming {
    /// See [`Acker::new`] for `settle`.
    pub fn new(
        message: Message,
        redelivered: bool,
        settle: impl FnOnce(Verdict) + Send + 'static,
    ) -> Self {
        Self {
            message,
            redelivered,
            since: Instant::now(),
            acker: Acker::new(settle),
        }
    }
}

/// The message has one record as its body.
impl From<Incoming> for Delivery {
    fn from(incoming: Incoming) -> Self {
        Self {
            record: incoming.message.into(),
            redelivered: incoming.redelivered,
            since: incoming.since,
            held: None,
            span: None,
            acker: incoming.acker,
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("headers", &self.message.headers)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Headers {
        let header = |name: &str| {
            let (_, value) = pairs.iter().find(|(known, _)| *known == name)?;
            Some(*value)
        };
        Headers::read(header, || "other".into())
    }

    #[test]
    fn headers_come_out_as_they_went_in() {
        let whole = Headers {
            id: "a/1".into(),
            origin: Some(Origin {
                run: "node-1/7".into(),
                at_us: 1_700_000_000_000_000,
            }),
            trace: TraceHeaders::read(
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                Some("congo=t61rcWkgMzE"),
            ),
            api: Some("billing".into()),
            event: Some("id=1&note=a%26b&source=/&specversion=1.0&type=t".into()),
            bundle: Some(128),
        };
        let bare = Headers {
            origin: None,
            trace: None,
            api: None,
            event: None,
            bundle: None,
            ..whole.clone()
        };
        for sent in [whole, bare] {
            let pairs: Vec<_> = sent.pairs().collect();
            let pairs: Vec<_> = pairs
                .iter()
                .map(|(name, value)| (*name, &**value))
                .collect();
            assert_eq!(read(&pairs), sent);
        }
    }

    #[test]
    fn a_value_that_cannot_be_a_header_of_the_post_counts_as_absent() {
        for unusable in ["", "a\nb", "naïve"] {
            let headers = read(&[
                (header::ID, unusable),
                (header::TRACEPARENT, "00-1-2-01"),
                (header::TRACESTATE, "congo=1"),
                (header::ORIGIN, "nonsense"),
                (header::BUNDLE, "many"),
            ]);
            assert_eq!(headers, read(&[]), "{unusable:?}");
            assert_eq!(&*headers.id, "other");
        }
    }
}
