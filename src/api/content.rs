//! A record as its API gets it: with its path as a member, or as an event of CloudEvents.

use awc::http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use bytes::{Bytes, BytesMut};

use crate::{
    cloud_events::{EventMode, event_of},
    record::{Record, Tag},
};

const EVENT: HeaderValue = HeaderValue::from_static("application/cloudevents+json; charset=utf-8");
const EVENTS: HeaderValue =
    HeaderValue::from_static("application/cloudevents-batch+json; charset=utf-8");

/// The form of the records of an API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostForm {
    mode: EventMode,
}

/// A POST of one record.
pub struct PostContent {
    pub body: Bytes,
    /// Those of an event; they replace others of the same names.
    pub headers: HeaderMap,
}

impl PostForm {
    pub const fn new(mode: EventMode) -> Self {
        Self { mode }
    }

    /// The POST of `record` alone. `None` if it is no JSON object: another publisher may have put
    /// any message into the broker.
    pub fn content(self, record: &Record, tag: &Tag) -> Option<PostContent> {
        let body = match self.mode {
            EventMode::Off => tag.splice(&record.body)?,
            EventMode::Binary => is_object(record).then(|| record.body.clone())?,
            EventMode::Structured => {
                let mut body = BytesMut::new();
                self.write(record, tag, &mut body).then(|| body.freeze())?
            }
        };
        let headers = match self.mode {
            EventMode::Off => HeaderMap::new(),
            EventMode::Binary => headers(record, tag),
            EventMode::Structured => content_type(EVENT),
        };
        Some(PostContent { body, headers })
    }

    /// Appends `record` as an element of an array. False if it is no JSON object: then nothing is
    /// written.
    pub fn write(self, record: &Record, tag: &Tag, array: &mut BytesMut) -> bool {
        match self.mode {
            EventMode::Off => tag.splice_onto(&record.body, array),
            // A POST in the binary mode is one event.
            EventMode::Binary | EventMode::Structured => {
                let is_object = is_object(record);
                if is_object {
                    event_of(record, tag.name()).write_json(&record.body, array);
                }
                is_object
            }
        }
    }

    /// The headers of a POST of many records.
    pub fn batch_headers(self) -> HeaderMap {
        match self.mode {
            EventMode::Off => HeaderMap::new(),
            EventMode::Binary | EventMode::Structured => content_type(EVENTS),
        }
    }
}

/// The same test as the tag's.
fn is_object(record: &Record) -> bool {
    record.body.len() > 1 && record.body.starts_with(b"{") && record.body.ends_with(b"}")
}

fn content_type(value: HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, value);
    headers
}

/// The headers of the event of `record` in the binary mode.
fn headers(record: &Record, tag: &Tag) -> HeaderMap {
    let event = event_of(record, tag.name());
    let data_type = event.get("datacontenttype").unwrap_or_default();
    // A media type has parameters, and those may have any text; the event is JSON in any case.
    let data_type = HeaderValue::from_str(data_type);
    let json = HeaderValue::from_static("application/json");
    let mut headers = content_type(data_type.unwrap_or(json));
    for (name, value) in event.headers() {
        // Names have lower-case letters and digits, and values are visible ASCII.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(body: &'static str) -> Record {
        Record {
            id: "1".into(),
            body: body.into(),
            trace: None,
            origin: None,
            api: None,
            event: Some("id=7&source=/a&specversion=1.0&subject=%C3%A9&type=t".into()),
        }
    }

    #[test]
    fn a_record_has_the_form_that_its_api_wants() {
        let tag = Tag::new("NATS");
        let content = |mode| {
            PostForm::new(mode)
                .content(&record(r#"{"a":1}"#), &tag)
                .unwrap()
        };
        let off = content(EventMode::Off);
        assert_eq!(off.body, r#"{"a":1,"path":"NATS"}"#);
        assert!(off.headers.is_empty());

        let binary = content(EventMode::Binary);
        assert_eq!(binary.body, r#"{"a":1}"#);
        let header = |name: &str| binary.headers.get(name).unwrap().to_str().unwrap();
        assert_eq!(header("content-type"), "application/json");
        assert_eq!(header("ce-id"), "7");
        assert_eq!(header("ce-path"), "NATS");
        assert_eq!(header("ce-subject"), "%C3%A9");
        assert_eq!(binary.headers.len(), 7);

        let structured = content(EventMode::Structured);
        assert_eq!(
            structured.body,
            r#"{"datacontenttype":"application/json","id":"7","path":"NATS","source":"/a","specversion":"1.0","subject":"é","type":"t","data":{"a":1}}"#
        );
        assert_eq!(structured.headers.get("content-type"), Some(&EVENT));
    }

    #[test]
    fn what_is_no_object_has_no_form() {
        let tag = Tag::new("NATS");
        for mode in [EventMode::Off, EventMode::Binary, EventMode::Structured] {
            for body in ["", "{", "}", "[]", "null", "\"}"] {
                let content = PostForm::new(mode).content(&record(body), &tag);
                assert!(content.is_none(), "{mode:?}: {body}");
            }
        }
    }
}
