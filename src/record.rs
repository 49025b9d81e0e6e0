//! A record: its id, its bytes and its trace context. Everything here is pure, but for new ids and
//! times.
//!
//! [`parse`] reads a body once, at ingest, for validation. After that its bytes travel untouched.
//! At the end [`Tag::splice`] writes the tag into them without building a JSON tree.

pub mod batch;
mod limits;
mod number;
mod parse;
mod passed_id;
pub mod pointer;
mod schema;
mod schema_file;
mod schema_references;
mod tag;
mod trace_headers;

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

pub use self::{
    limits::{DEPTH_MAX, JsonLimits, NumberRange},
    number::whole_number,
    parse::{Invalid, RecordRules, as_text, parse, parse_any, parse_body},
    passed_id::PassedId,
    schema::Schema,
    schema_file::SchemaFile,
    tag::Tag,
    trace_headers::{KNOWN_FLAGS, TraceHeaders, sampled_trace_id},
};
use crate::clock::unix_us;

/// A JSON object on its way from a client to the API. Clones share the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The same on every hop, retry and lane. It becomes the API's `Idempotency-Key`.
    pub id: Arc<str>,
    /// A JSON object without surrounding white space and without a `path` member.
    pub body: Bytes,
    /// W3C Trace Context.
    pub trace: Option<TraceHeaders>,
    /// The run that accepted the record, and the time. `None` for a message that no Waypost node
    /// published.
    pub origin: Option<Origin>,
    /// The API that takes it, by its name in `[apis.NAME]`; `None` for `[api]`.
    pub api: Option<Arc<str>>,
    /// The attributes of the event that it is the data of, as [`EventAttributes::to_text`] writes
    /// them; `None` if it did not come as an event.
    ///
    /// [`EventAttributes::to_text`]: crate::cloud_events::EventAttributes::to_text
    pub event: Option<Arc<str>>,
}

/// The most bytes that the headers of a record's message take in any system, beside their texts:
/// their names, and the time in the origin.
pub const HEADERS_MAX: usize = 192;
/// The most bytes of a value of Pub/Sub: longer attributes of an event take several headers there.
pub const EVENT_PART: usize = 1024;
/// The most bytes of such a header beside its value.
const EVENT_HEADER_MAX: usize = 32;

impl AsRef<Self> for Record {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Record {
    /// The most bytes of the record as a message of any system, headers included.
    pub fn message_size(&self) -> usize {
        let trace = self.trace.as_ref().map_or(0, TraceHeaders::size);
        let run = self.origin.as_ref().map_or(0, |origin| origin.run.len());
        let api = self.api.as_ref().map_or(0, |name| name.len());
        let event = self.event.as_ref().map_or(0, |text| {
            text.len() + (text.len() / EVENT_PART + 1) * EVENT_HEADER_MAX
        });
        self.body.len() + self.id.len() + trace + run + api + event + HEADERS_MAX
    }

    /// A new id: a UUID version 7 (RFC 9562), unique without coordination and in order of time.
    pub fn new_id() -> Arc<str> {
        to_id(Uuid::now_v7())
    }

    /// Up to [`batch::MAX`] new ids for one batch: they differ in their last bits, in ascending
    /// order.
    pub fn new_ids() -> impl Iterator<Item = Arc<str>> {
        let first = Uuid::now_v7().as_u128() & !(batch::MAX as u128 - 1);
        (0..batch::MAX as u128).map(move |at| to_id(Uuid::from_u128(first | at)))
    }
}

fn to_id(uuid: Uuid) -> Arc<str> {
    Arc::from(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) as &str)
}

/// The run of a node that accepted a record, and the time. It crosses a broker as one string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Unique per start of a node.
    pub run: Arc<str>,
    /// Microseconds since the Unix epoch.
    pub at_us: u64,
}

impl Origin {
    /// The origin of a record that `run` accepts now.
    pub fn now(run: Arc<str>) -> Self {
        Self {
            run,
            at_us: unix_us(),
        }
    }

    /// The string that crosses a broker.
    pub fn to_text(&self) -> String {
        [&*self.run, "/", &self.at_us.to_string()].concat()
    }

    /// Reads what [`Origin::to_text`] wrote; `None` if it is something else, or could not pass through
    /// a header.
    pub fn parse(text: &str) -> Option<Self> {
        let (run, at_us) = text.rsplit_once('/').filter(|_| is_visible_ascii(text))?;
        Some(Self {
            run: Arc::from(run),
            at_us: at_us.parse().ok()?,
        })
    }
}

/// Whether `text` is one or more visible ASCII characters. Ids and trace contexts are: they pass
/// through the headers of every hop unchanged.
pub fn is_visible_ascii(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_batch_are_as_new_as_any_and_in_their_order() {
        let ids: Vec<_> = Record::new_ids().chain(Record::new_ids()).collect();
        assert_eq!(ids.len(), 2 * batch::MAX);
        assert_eq!(
            ids.iter().collect::<std::collections::HashSet<_>>().len(),
            ids.len()
        );
        assert!(ids[..batch::MAX].is_sorted());
        let id = Uuid::parse_str(&ids[batch::MAX - 1]).unwrap();
        assert_eq!(
            (id.get_version_num(), id.get_variant()),
            (7, uuid::Variant::RFC4122)
        );
    }

    #[test]
    fn an_origin_reads_back() {
        let origin = Origin::now(Arc::from("node/a/1"));
        assert_eq!(Origin::parse(&origin.to_text()), Some(origin));
        assert_eq!(Origin::parse("no slash"), None);
        assert_eq!(Origin::parse("a/b"), None);
        for run in ["\u{1}", "a b", "a\r\nb", "é"] {
            assert_eq!(Origin::parse(&format!("{run}/1")), None);
        }
    }
}
