//! Events as JSON (JSON format): one (3, "Envelope"), or many (4, "JSON Batch Format").

use std::{borrow::Cow, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{AttributeValue, EventAttributes, InvalidAttribute, is_json};
use crate::record::{Invalid, as_text, whole_number};

/// An event, and its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonEvent {
    pub attributes: EventAttributes,
    /// A JSON text, byte for byte as it was sent.
    pub data: Bytes,
}

/// Why a text is not an event with JSON as its data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJsonEvent {
    /// It is not JSON.
    #[error(transparent)]
    Json(#[from] Invalid),
    /// It is JSON of another form.
    #[error("an event is a JSON object, and a batch is an array of them")]
    Form,
    #[error(transparent)]
    Attribute(#[from] InvalidAttribute),
    /// The data is not JSON.
    #[error(
        "attribute `datacontenttype`: {0}; a record is JSON, so allowed is application/json or a \
         type that ends with +json"
    )]
    DataType(String),
    #[error("the event has no data; its data is the record")]
    NoData,
}

/// Reads one event in the structured mode. `text` is `body`, or a part of it.
///
/// # Errors
/// Says what is wrong with the event.
pub fn parse_event(body: &Bytes, text: &str) -> Result<JsonEvent, InvalidJsonEvent> {
    let at = text.as_ptr() as usize - body.as_ptr() as usize;
    let envelope: Envelope<'_> =
        serde_json::from_str(text).map_err(|why| malformed(body, at, &why))?;
    let mut attributes = EventAttributes::default();
    let (mut data, mut coded) = (None, None);
    for (name, value) in envelope.0 {
        let member = match &*name {
            "data" => &mut data,
            "data_base64" => &mut coded,
            _ => {
                if let Some(value) = attribute(&name, value.get())? {
                    attributes.insert(&name, value)?;
                }
                continue;
            }
        };
        if member.replace(value.get()).is_some() {
            return Err(invalid(&name, "is there twice; allowed is once"));
        }
    }
    let attributes = attributes.complete_with_room()?;
    let coded = coded.filter(|text| *text != "null");
    // 3.1.1 and 3.1.2: one of them. Only `data` is JSON without a `datacontenttype`.
    let (data, default) = match (data, coded) {
        (Some(data), None) => (body.slice_ref(data.as_bytes()), "application/json"),
        (None, Some(coded)) => (decoded(coded)?, ""),
        (None, None) => return Err(InvalidJsonEvent::NoData),
        (Some(_), Some(_)) => {
            return Err(invalid(
                "data_base64",
                "is beside data; allowed is one of them",
            ));
        }
    };
    match attributes.get("datacontenttype").unwrap_or(default) {
        "" => Err(InvalidJsonEvent::DataType(
            "is missing beside data_base64".into(),
        )),
        other if !is_json(other) => Err(InvalidJsonEvent::DataType(format!("is {other:?}"))),
        _ => Ok(JsonEvent { attributes, data }),
    }
}

/// The texts of the events of a batch, at most one more than `max`.
///
/// # Errors
/// If `body` is no JSON array.
pub fn parse_batch(body: &Bytes, max: usize) -> Result<Vec<&str>, InvalidJsonEvent> {
    let text = as_text(body)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let mut events = Vec::new();
    let batch = Batch {
        events: &mut events,
        max,
    };
    let read = json.deserialize_seq(batch).and_then(|()| json.end());
    if events.len() <= max {
        read.map_err(|why| malformed(body, 0, &why))?;
    }
    Ok(events)
}

/// The error for the text at byte `at` of `body`.
fn malformed(body: &[u8], at: usize, why: &serde_json::Error) -> InvalidJsonEvent {
    if why.is_data() {
        return InvalidJsonEvent::Form;
    }
    // Line and column have fields of their own.
    let text = why.to_string();
    let detail = text
        .rsplit_once(" at line ")
        .map_or(&*text, |(text, _)| text);
    let malformed = Invalid::Malformed {
        line: why.line(),
        column: why.column(),
        detail: detail.to_owned(),
    };
    malformed.further_on(body, at).into()
}

fn invalid(name: &str, detail: impl Into<String>) -> InvalidJsonEvent {
    InvalidAttribute::new(name, detail).into()
}

/// The value of an attribute (2.2); `None` if it is `null`, which means that it is not set.
fn attribute(name: &str, json: &str) -> Result<Option<AttributeValue>, InvalidJsonEvent> {
    if json == "null" {
        return Ok(None);
    }
    if json.starts_with('"') {
        let text = serde_json::from_str(json);
        let text = text.map_err(|_| invalid(name, "has half of a surrogate pair"))?;
        return Ok(Some(AttributeValue::Text(text)));
    }
    // A publisher that knows floats alone writes an integer as one.
    let number = whole_number(json).map(|number| number.to_string());
    let literal = AttributeValue::literal(number.as_deref().unwrap_or(json));
    let wrong = "is not allowed; allowed are a string, a boolean and an integer of 32 bits";
    literal.ok_or_else(|| invalid(name, wrong)).map(Some)
}

/// The bytes of `data_base64` (RFC 4648, 4).
fn decoded(json: &str) -> Result<Bytes, InvalidJsonEvent> {
    let wrong = || {
        invalid(
            "data_base64",
            "is not allowed; allowed is a string of Base64, padded",
        )
    };
    let text: Cow<'_, str> = serde_json::from_str(json).map_err(|_| wrong())?;
    let bytes = STANDARD.decode(&*text).map_err(|_| wrong())?;
    Ok(bytes.into())
}

/// The members of an event, in their order.
struct Envelope<'t>(Vec<(Cow<'t, str>, &'t RawValue)>);

impl<'t> Deserialize<'t> for Envelope<'t> {
    fn deserialize<D: Deserializer<'t>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_map(Members)
    }
}

struct Members;

impl<'t> Visitor<'t> for Members {
    type Value = Envelope<'t>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an event")
    }

    fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(name) = map.next_key_seed(EventMember)? {
            members.push((name, map.next_value()?));
        }
        Ok(Envelope(members))
    }
}

/// Reads the name of a member, without a copy where that is possible.
struct EventMember;

impl<'t> DeserializeSeed<'t> for EventMember {
    type Value = Cow<'t, str>;

    fn deserialize<D: Deserializer<'t>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_identifier(self)
    }
}

impl<'t> Visitor<'t> for EventMember {
    type Value = Cow<'t, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_borrowed_str<E>(self, name: &'t str) -> Result<Self::Value, E> {
        Ok(name.into())
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(name.to_owned().into())
    }
}

/// Reads the texts of events until there are more than `max`.
struct Batch<'b, 't> {
    events: &'b mut Vec<&'t str>,
    max: usize,
}

impl<'t> Visitor<'t> for Batch<'_, 't> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'t>>(self, mut events: A) -> Result<(), A::Error> {
        while self.events.len() <= self.max
            && let Some(event) = events.next_element::<&RawValue>()?
        {
            self.events.push(event.get());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn parse(text: &str) -> Result<JsonEvent, InvalidJsonEvent> {
        let body = Bytes::copy_from_slice(text.as_bytes());
        parse_event(&body, std::str::from_utf8(&body).unwrap())
    }

    fn event_with(name: &str, value: Value) -> String {
        let mut event = json!({
            "specversion": "1.0", "id": "1", "source": "/a", "type": "t", "data": {"a": 1}
        });
        event[name] = value;
        event.to_string()
    }

    #[test]
    fn the_data_is_as_it_was_sent() {
        let event = r#"{ "specversion":"1.0","id":"é\u00e9" , "source":"/a","type":"t","n":-7,"m":-7.0,"on":true,
            "unset":null, "da\u0074a" : {"b" : [1.0, "\u00e9"], "b":2} }"#;
        let JsonEvent { attributes, data } = parse(event).unwrap();
        assert_eq!(data, r#"{"b" : [1.0, "\u00e9"], "b":2}"#);
        let attribute = |name| attributes.get(name);
        assert_eq!(attribute("id"), Some("éé"));
        assert_eq!(attribute("n"), Some("-7"));
        assert_eq!(attribute("m"), Some("-7"));
        assert_eq!(attribute("on"), Some("true"));
        assert_eq!(attribute("unset"), None);
        assert_eq!(attribute("data"), None);
    }

    #[test]
    fn base64_is_the_data_of_a_type_that_is_json() {
        let coded = r#"{"specversion":"1.0","id":"1","source":"/a","type":"t","datacontenttype":"application/json","data_base64":"eyAieHl6IjogMTIzIH0="}"#;
        assert_eq!(parse(coded).unwrap().data, r#"{ "xyz": 123 }"#);
        let without = |part: &str| coded.replacen(part, "", 1);
        let untyped = without(r#""datacontenttype":"application/json","#);
        assert!(matches!(
            parse(&untyped),
            Err(InvalidJsonEvent::DataType(_))
        ));
        let unpadded = without("=");
        assert!(matches!(
            parse(&unpadded),
            Err(InvalidJsonEvent::Attribute(_))
        ));
        let both = coded.replacen('{', r#"{"data":{},"#, 1);
        assert!(matches!(parse(&both), Err(InvalidJsonEvent::Attribute(_))));
        let unset = event_with("data_base64", Value::Null);
        assert_eq!(parse(&unset).unwrap().data, r#"{"a":1}"#);
    }

    #[test]
    fn a_bad_attribute_is_named() {
        for (name, value) in [
            ("specversion", json!(1.0)),
            ("specversion", json!("0.3")),
            ("id", json!(1)),
            ("id", json!(null)),
            ("source", json!("")),
            ("type", json!(["t"])),
            ("time", json!("2018-04-05")),
            ("subject", json!("")),
            ("dataschema", json!("/a")),
            ("datacontenttype", json!("json")),
            ("note", json!({})),
            ("note", json!(1.5)),
            ("note", json!(2_147_483_648_i64)),
            ("Note", json!("a")),
            ("a_b", json!("a")),
            ("data_base64", json!("e30=")),
            ("data_base64", json!({})),
        ] {
            let why = parse(&event_with(name, value.clone())).unwrap_err();
            assert!(
                matches!(&why, InvalidJsonEvent::Attribute(InvalidAttribute { name: told, .. }) if told == name),
                "{name}: {value}: {why:?}"
            );
        }
        let twice = event_with("note", json!("a")).replacen('{', r#"{"not\u0065":"b","#, 1);
        assert!(matches!(parse(&twice), Err(InvalidJsonEvent::Attribute(_))));
        let lone = event_with("note", json!("a")).replace("\"a\"", r#""\ud800""#);
        assert!(
            matches!(parse(&lone), Err(InvalidJsonEvent::Attribute(_))),
            "{lone}"
        );
    }

    #[test]
    fn what_is_no_event_is_told() {
        let text = event_with("datacontenttype", json!("text/plain"));
        assert!(matches!(parse(&text), Err(InvalidJsonEvent::DataType(_))));
        let without_data = event_with("note", json!(1)).replace(r#""data":{"a":1},"#, "");
        assert_eq!(parse(&without_data), Err(InvalidJsonEvent::NoData));
        for form in ["[]", "1", "null", "\"{}\""] {
            assert_eq!(parse(form), Err(InvalidJsonEvent::Form), "{form}");
        }
        for (malformed, place) in [
            ("", (1, 0)),
            ("{", (1, 1)),
            ("{\"a\":1}\n x", (2, 2)),
            ("{\"\\ud800\":1}", (1, 9)),
        ] {
            match parse(malformed) {
                Err(InvalidJsonEvent::Json(Invalid::Malformed { line, column, .. })) => {
                    assert_eq!((line, column), place, "{malformed}");
                }
                other => panic!("{malformed}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_batch_is_split_up_to_its_bound() {
        let batch = |text: &str| {
            let body = Bytes::copy_from_slice(text.as_bytes());
            let events = parse_batch(&body, 3)?;
            Ok(events.into_iter().map(str::to_owned).collect::<Vec<_>>())
        };
        let events = batch(" [ {\"a\" : 1} ,\n2, [3]]\n").unwrap();
        assert_eq!(events, ["{\"a\" : 1}", "2", "[3]"]);
        assert_eq!(batch("[]").unwrap(), [""; 0]);
        assert_eq!(batch("[1,2,3,4,5,]").unwrap().len(), 4);
        assert_eq!(batch("{}"), Err(InvalidJsonEvent::Form));
        for malformed in ["", "[1", "[1,]", "[1] 2", "[{]"] {
            let why = batch(malformed).unwrap_err();
            assert!(
                matches!(why, InvalidJsonEvent::Json(_)),
                "{malformed}: {why:?}"
            );
        }
    }

    #[test]
    fn a_place_counts_from_the_begin_of_the_body() {
        let body = Bytes::from_static(b"[{},\n {\"\\ud800\":1}]");
        let events = parse_batch(&body, 3).unwrap();
        let why = parse_event(&body, events[1]).unwrap_err();
        assert!(
            matches!(
                why,
                InvalidJsonEvent::Json(Invalid::Malformed {
                    line: 2,
                    column: 10,
                    ..
                })
            ),
            "{why:?}"
        );
    }

    proptest! {
        #[test]
        fn whatever_comes_is_an_event_or_told(text in any::<String>()) {
            parse(&text).ok();
            parse_batch(&text.into(), 2).ok();
        }

        #[test]
        fn each_attribute_is_what_the_json_says(note in "[^\\p{Cc}\\p{Cn}]*", number in any::<i32>()) {
            let event = event_with("note", json!(note)).replacen('{', &format!("{{\"n\":{number},"), 1);
            let attributes = parse(&event).unwrap().attributes;
            prop_assert_eq!(attributes.get("note"), Some(&*note));
            prop_assert_eq!(attributes.get("n"), Some(&*number.to_string()));
        }
    }
}
