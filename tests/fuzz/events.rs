//! CloudEvents.

use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    TORN, cases,
    checks::events::{check_attributes, check_events},
    damaged,
};

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

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn an_event_is_the_same_on_every_way(text in damaged(event_text(), TORN)) {
        check_events(&text);
    }

    #[test]
    fn attributes_as_text_are_read_once(text in "[ -~]{0,60}|id=[ -~é😀]{0,9}&source=/[a-z%0-9]{0,9}&specversion=1.0&type=t(&n:?=[ -~é]{0,9})?") {
        check_attributes(text.as_bytes());
    }
}
