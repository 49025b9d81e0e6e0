//! CloudEvents.

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*, sample::select};
use serde::de::IgnoredAny;
use waypost::{
    cloud_events::{EventAttributes, JsonEvent, header_value, parse_batch, parse_event},
    record::is_visible_ascii,
};

use super::{TORN, cases, damaged};

const ATTRIBUTES: &[&str] = &[
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "dataschema",
    "datacontenttype",
    "note",
    "path",
    "data",
    "data_base64",
    "Id",
    "",
];
const ATTRIBUTE_VALUES: &[&str] = &[
    "\"1.0\"",
    "\"7\"",
    "\"/a\"",
    "\"é 😀 % \\\"\"",
    "\"\\u0000\"",
    "\"urn:a\"",
    "true",
    "-7",
    "2147483648",
    "null",
    "\"2026-11-29T12:00:00Z\"",
    "\"application/json\"",
    "\"text/plain\"",
    "{\"a\" : 1}",
    "\"e30=\"",
    "[]",
    "\"a&b=c\"",
    "\"\\ud800\"",
];

/// The values that an attribute may have, for the most part.
fn values_of(name: &str) -> &'static [&'static str] {
    match name {
        "specversion" => &["\"1.0\"", "\"1.0\"", "1.0", "\"0.3\""],
        "source" | "dataschema" => &["\"urn:a\"", "\"https://a/b?c=%C3%A9#d\"", "\"/a\"", "\"é\""],
        "time" => &[
            "\"2026-11-29T12:00:00Z\"",
            "\"1990-12-31t23:59:60.5+01:00\"",
            "\"12:00\"",
        ],
        "datacontenttype" => &[
            "\"application/json\"",
            "\"a/b+json; c=\\\"d\\\"\"",
            "\"text/plain\"",
        ],
        "data" => &["{\"a\" : 1}", "{ }", "[\"}\"]", "null", "-0.0"],
        "data_base64" => &["null", "\"e30=\"", "\"e30\""],
        _ => ATTRIBUTE_VALUES,
    }
}

fn event_text() -> impl Strategy<Value = String> {
    let other = select(ATTRIBUTES).prop_flat_map(|name| {
        let value = prop_oneof![6 => select(values_of(name)), 1 => select(ATTRIBUTE_VALUES)];
        (Just(name), value)
    });
    vec(other, 0..5).prop_map(|others| {
        let required = [
            ("specversion", "\"1.0\""),
            ("id", "\"1\""),
            ("source", "\"/s\""),
            ("type", "\"t\""),
            ("data", "{\"a\":1}"),
        ];
        let is_other = |name: &str| others.iter().any(|(other, _)| *other == name);
        let required = required.into_iter().filter(|(name, _)| !is_other(name));
        let members = required.chain(others.iter().copied());
        let members = members.map(|(name, value)| format!("\"{name}\" : {value}"));
        format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
    })
}

/// An event that was read is the same after each way that it may take.
fn check_event(event: &JsonEvent) {
    let JsonEvent { attributes, data } = event;
    let text = attributes.to_text();
    assert!(is_visible_ascii(&text));
    assert_eq!(EventAttributes::from_text(&text).as_ref(), Some(attributes));
    let key = attributes.key();
    assert!(key.len() <= 255 && is_visible_ascii(&key), "{key}");
    for (name, value) in attributes.headers() {
        let name = name.strip_prefix("ce-").expect("the prefix");
        let decoded = header_value::decode(value.as_bytes()).expect("it is coded");
        assert_eq!(Some(&*decoded), attributes.get(name));
    }
    let mut json = BytesMut::new();
    attributes.write_json(data, &mut json);
    let json = json.freeze();
    // Data in base64 may be no text, and no record then.
    let Ok(text) = std::str::from_utf8(&json) else {
        return assert!(std::str::from_utf8(data).is_err());
    };
    // The data may be of another type than an event's has to be.
    if let Ok(read) = parse_event(&json, text) {
        assert_eq!((&read.attributes, &read.data), (attributes, data));
    } else {
        assert!(
            serde_json::from_slice::<IgnoredAny>(data).is_err(),
            "{text}"
        );
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn an_event_is_the_same_on_every_way(text in damaged(event_text(), TORN)) {
        let body = Bytes::from(text);
        if let Ok(text) = std::str::from_utf8(&body)
            && let Ok(event) = parse_event(&body, text)
        {
            check_event(&event);
        }
        let many = Bytes::from([b"[", &*body, b", ", &body, b"]"].concat());
        if let Ok(events) = parse_batch(&many, 10) {
            for text in events {
                if let Ok(event) = parse_event(&many, text) {
                    check_event(&event);
                }
            }
        }
    }

    #[test]
    fn attributes_as_text_are_read_once(text in "[ -~]{0,60}|id=[ -~é😀]{0,9}&source=/[a-z%0-9]{0,9}&specversion=1.0&type=t(&n:?=[ -~é]{0,9})?") {
        if let Some(event) = EventAttributes::from_text(&text) {
            let again = event.to_text();
            prop_assert!(is_visible_ascii(&again));
            prop_assert_eq!(EventAttributes::from_text(&again), Some(event));
        }
        if let Ok(decoded) = header_value::decode(text.as_bytes()) {
            let coded = header_value::encode(&decoded).to_string();
            prop_assert_eq!(header_value::decode(coded.as_bytes()), Ok(decoded));
        }
    }
}
