//! The event that the API gets of a record.

use std::time::{Duration, UNIX_EPOCH};

use bytes::{BufMut as _, BytesMut};
use serde::{Deserialize, Serialize};

use super::{AttributeValue, EventAttributes, header_value};
use crate::record::Record;

/// The form of records in POSTs to an API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventMode {
    /// The record, with its path as its last member.
    #[default]
    Off,
    /// An event with its attributes in headers. Its data is the record.
    Binary,
    /// An event as JSON, or an array of them.
    Structured,
}

/// The attribute that has the tag of the record's lane.
pub(super) const PATH: &str = "path";
/// The media type of the data, which each event has that is POSTed.
pub(super) const DATA_TYPE: &str = "datacontenttype";
/// `source` and `type` of a record that did not come as an event. Its `id` is the record's, which
/// is the same on every node and lane and at each redelivery; so is the source, or each would be
/// another event.
const SOURCE: &str = "urn:waypost:ingest";
const TYPE: &str = "waypost.record";

/// The event of `record`, which came by the lane of this tag. Attributes that cannot be read count
/// as none: another publisher may have written them.
pub fn event_of(record: &Record, tag: &str) -> EventAttributes {
    let given = record.event.as_deref().and_then(EventAttributes::from_text);
    let mut event = given.unwrap_or_else(|| own_event(record));
    event.set(PATH, tag);
    // Core, "datacontenttype": what JSON implies is told.
    if event.get(DATA_TYPE).is_none() {
        event.set(DATA_TYPE, "application/json");
    }
    event
}

fn own_event(record: &Record) -> EventAttributes {
    let mut event = EventAttributes::default();
    event.set("specversion", "1.0");
    event.set("id", &record.id);
    event.set("source", SOURCE);
    event.set("type", TYPE);
    if let Some(origin) = &record.origin
        && let Some(at) = UNIX_EPOCH.checked_add(Duration::from_micros(origin.at_us))
        && origin.at_us < YEAR_10000_US
    {
        let time = humantime::format_rfc3339_micros(at);
        event.set("time", &time.to_string());
    }
    event
}

/// RFC 3339 ends there. The time of another publisher's message may be any.
const YEAR_10000_US: u64 = 253_402_300_800_000_000;

impl EventAttributes {
    fn set(&mut self, name: &str, text: &str) {
        let value = AttributeValue::text_of(text);
        self.values.insert(name.to_owned(), value);
    }

    /// Name and value of each header of the event in the binary mode, but for `Content-Type` (HTTP
    /// binding, 3.1.3).
    pub fn headers(&self) -> impl Iterator<Item = (String, String)> {
        let attributes = self.values.iter();
        let attributes = attributes.filter(|(name, _)| *name != DATA_TYPE);
        attributes.map(|(name, value)| {
            let value = header_value::encode(value.text()).to_string();
            (format!("ce-{name}"), value)
        })
    }

    /// Appends the event as JSON; `data` is a JSON text (JSON format, 3).
    pub fn write_json(&self, data: &[u8], json: &mut BytesMut) {
        json.put_u8(b'{');
        for (name, value) in &self.values {
            // No name has a character that JSON escapes.
            json.put_slice(format!("\"{name}\":").as_bytes());
            match value {
                AttributeValue::Literal(text) => json.put_slice(text.as_bytes()),
                AttributeValue::Text(text) => {
                    let text = serde_json::Value::from(&**text).to_string();
                    json.put_slice(text.as_bytes());
                }
            }
            json.put_u8(b',');
        }
        json.put_slice(b"\"data\":");
        json.put_slice(data);
        json.put_u8(b'}');
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        cloud_events::{JsonEvent, parse_event},
        record::Origin,
    };

    fn record(event: Option<&str>) -> Record {
        Record {
            id: "a/1".into(),
            body: Bytes::from_static(br#"{ "a":1 }"#),
            trace: None,
            origin: Some(Origin {
                run: "node/1".into(),
                at_us: 1_700_000_000_123_456,
            }),
            api: None,
            event: event.map(Into::into),
        }
    }

    #[test]
    fn an_event_keeps_its_attributes_but_for_the_path() {
        let text = "id=7&n:=5&note=%C3%A9%20%22%25&path=mine&source=/a&specversion=1.0&type=t";
        let event = event_of(&record(Some(text)), "NATS");
        let headers: Vec<_> = event.headers().collect();
        let expected = [
            ("ce-id", "7"),
            ("ce-n", "5"),
            ("ce-note", "%C3%A9%20%22%25"),
            ("ce-path", "NATS"),
            ("ce-source", "/a"),
            ("ce-specversion", "1.0"),
            ("ce-type", "t"),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(headers, expected);
        let mut json = BytesMut::new();
        event.write_json(br#"{ "a":1 }"#, &mut json);
        let expected = concat!(
            r#"{"datacontenttype":"application/json","id":"7","n":5,"note":"é \"%","path":"NATS","#,
            r#""source":"/a","specversion":"1.0","type":"t","data":{ "a":1 }}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn a_record_that_was_no_event_has_its_id_and_its_time() {
        for event in [None, Some("id=7"), Some("nonsense")] {
            let event = event_of(&record(event), "NATS");
            for (name, value) in [
                ("id", "a/1"),
                ("source", SOURCE),
                ("type", TYPE),
                ("specversion", "1.0"),
                ("time", "2023-11-14T22:13:20.123456Z"),
                ("path", "NATS"),
                ("datacontenttype", "application/json"),
            ] {
                assert_eq!(event.get(name), Some(value), "{name}");
            }
        }
        for at_us in [YEAR_10000_US, u64::MAX] {
            let mut record = record(None);
            record.origin = Some(Origin {
                run: "a".into(),
                at_us,
            });
            assert_eq!(event_of(&record, "NATS").get("time"), None, "{at_us}");
        }
    }

    proptest! {
        #[test]
        fn what_the_api_gets_is_an_event_with_the_same_attributes(
            note in "[^\\p{Cc}\\p{Cn}]*",
            number in any::<i32>(),
        ) {
            let mut sent = EventAttributes::default();
            for (name, value) in [("specversion", "1.0"), ("type", "t"), ("source", "/a"), ("id", "7"), ("note", &note)] {
                sent.insert(name, AttributeValue::text_of(value)).unwrap();
            }
            sent.insert("n", AttributeValue::literal(&number.to_string()).unwrap()).unwrap();
            let event = event_of(&record(Some(&sent.to_text())), "NATS");
            let mut json = BytesMut::new();
            event.write_json(b"{}", &mut json);
            let json = json.freeze();
            let JsonEvent { attributes, data } = parse_event(&json, std::str::from_utf8(&json).unwrap()).unwrap();
            prop_assert_eq!(data, "{}");
            prop_assert_eq!(&attributes.values, &event.values);
            for (name, value) in event.headers() {
                let decoded = header_value::decode(value.as_bytes()).unwrap();
                prop_assert_eq!(attributes.get(&name["ce-".len()..]), Some(&*decoded));
            }
        }
    }
}
