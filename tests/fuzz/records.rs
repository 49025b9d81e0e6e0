//! Records, alone and many in one body.

use proptest::{collection::vec, prelude::*, sample::select};
use waypost::record::batch::Form;

use super::{
    TORN, cases,
    checks::records::{check_batch, check_record},
    damaged,
};

/// Values of JSON that readers get wrong.
const VALUES: &[&str] = &[
    "0",
    "-0",
    "1",
    "42",
    "151",
    "1.50",
    "1e2",
    "1E400",
    "-1e-400",
    "9007199254740993",
    "123456789012345678901234567890",
    "null",
    "true",
    "false",
    "\"\"",
    "\"é😀\"",
    "\"\\u0000\"",
    "\"\\ud83d\\ude00\"",
    "\"\\\"}{:,[]path\\\\\"",
    "\"\\\\\"",
    "\"\u{feff}\"",
    "[]",
    "{}",
];
const NAMES: &[&str] = &[
    "a",
    "b",
    "path",
    "p\\u0061th",
    "",
    "a/b",
    "é",
    "\\\"path",
    "name",
    "location",
    "age",
    "infectedtype",
    "state",
    "~",
    "path ",
];
const SPACES: &[&str] = &["", "", "", " ", "\n", "\r\n\t "];
const CASE: &str = r#"{"name":"a","location":"b","age":1,"infectedtype":"","state":"s"}"#;

fn space() -> impl Strategy<Value = &'static str> {
    select(SPACES)
}

/// The text of a JSON value.
fn value() -> impl Strategy<Value = String> {
    let leaf = select(VALUES).prop_map(str::to_owned);
    leaf.prop_recursive(4, 24, 4, |inner| {
        let list = (vec((space(), inner.clone(), space()), 0..4), space());
        let list = list.prop_map(|(items, end)| {
            let items: Vec<_> = items
                .into_iter()
                .map(|(a, item, b)| [a, &item, b].concat())
                .collect();
            let end = if items.is_empty() { end } else { "" };
            format!("[{}{end}]", items.join(","))
        });
        prop_oneof![list, object(inner)]
    })
}

/// The text of a JSON object. A name may be there twice.
fn object(value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    let member = (space(), select(NAMES), space(), space(), value, space());
    (vec(member, 0..6), space()).prop_map(|(members, end)| {
        let members = members
            .into_iter()
            .map(|(a, name, b, c, value, d)| format!("{a}\"{name}\"{b}:{c}{value}{d}"));
        let members: Vec<_> = members.collect();
        let end = if members.is_empty() { end } else { "" };
        format!("{{{}{end}}}", members.join(","))
    })
}

fn spaced(value: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    (space(), value, space()).prop_map(|(a, value, b)| [a, &value, b].concat())
}

/// A record, nearly one, or none.
fn record_text() -> impl Strategy<Value = Vec<u8>> {
    let case = vec((0..5_usize, select(VALUES)), 0..3).prop_map(|changes| {
        let names = ["name", "location", "age", "infectedtype", "state"];
        let mut values = ["\"a\"", "\"b\"", "1", "\"\"", "\"s\""];
        for (at, value) in changes {
            values[at] = value;
        }
        let members = names
            .iter()
            .zip(values)
            .map(|(name, value)| format!("\"{name}\":{value}"));
        format!("{{{}}}", members.collect::<Vec<_>>().join(","))
    });
    let texts = prop_oneof![spaced(object(value())), spaced(value()), case];
    damaged(texts, TORN)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_record_is_what_other_parsers_read_and_a_tag_is_its_one_path(body in record_text()) {
        check_record(&body);
    }

    #[test]
    fn a_batch_is_its_records_one_by_one(parts in vec(record_text(), 0..4), is_lines in any::<bool>()) {
        let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
        check_batch(&parts, if is_lines { Form::Lines } else { Form::Array });
    }
}

#[test]
fn the_texts_that_are_changed_are_themselves_read() {
    check_record(CASE.as_bytes());
    for text in VALUES.iter().chain(TORN) {
        check_record(text.as_bytes());
        check_record(format!("{{\"a\":{text}}}").as_bytes());
        check_record(CASE.replacen("\"a\"", text, 1).as_bytes());
    }
}
