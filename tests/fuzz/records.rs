//! Records, alone and many in one body.

use bytes::Bytes;
use proptest::{collection::vec, prelude::*, sample::select};
use serde::de::IgnoredAny;
use serde_json::Value;
use waypost::record::{
    Invalid, RecordRules, Schema, Tag,
    batch::{Form, InvalidBatch, parse_all},
    parse, parse_body,
    pointer::PointerSet,
};

use super::{TORN, cases, damaged};

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

/// Whether the parser that builds trees fails because a float cannot hold a number.
fn is_beyond_floats(read: &serde_json::Result<Value>) -> bool {
    read.as_ref()
        .is_err_and(|why| why.to_string().starts_with("number out of range"))
}

/// `part` has bytes of `whole` only, in their order.
fn is_left_of(part: &[u8], whole: &[u8]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|byte| whole.any(|other| other == byte))
}

fn check_record(body: Vec<u8>) {
    let body = Bytes::from(body);
    let shown = String::from_utf8_lossy(&body);
    let tree = serde_json::from_slice::<Value>(&body);
    let rules = RecordRules::from(Schema::Any);
    let mut pointers = PointerSet::default();
    let wanted = ["/a", "/b/0", "/a/b", "/path", "/name"];
    let indexes = wanted.map(|pointer| pointers.add(&pointer.parse().expect("a pointer")));
    let parsed = parse(&body, &rules);
    let with_values = parse_body(&body, &rules, &pointers);
    for schema in [Schema::Any, Schema::Case] {
        let rules = RecordRules::from(schema);
        let with_values = parse_body(&body, &rules, &pointers);
        let with_values = with_values.map(|(record, _)| record);
        assert_eq!(with_values, parse(&body, &rules), "{shown}");
    }
    match &parsed {
        Ok(record) => {
            let tagged = Tag::new("T\"é").splice(record).expect("an object");
            for text in [&body, record, &tagged] {
                serde_json::from_slice::<IgnoredAny>(text).expect("JSON");
            }
            assert!(
                tagged.ends_with("\"path\":\"T\\\"é\"}".as_bytes()),
                "{shown}"
            );
            assert!(is_left_of(record, &body), "{shown}");
            assert_eq!(parse(record, &rules).as_ref(), Ok(record), "{shown}");
            let Ok(Value::Object(mut expected)) = tree else {
                assert!(is_beyond_floats(&tree), "{shown}");
                return;
            };
            if expected.remove("path").is_none() {
                assert_eq!(record, body.trim_ascii(), "{shown}");
            }
            let mut expected = Value::Object(expected);
            let read = |text: &[u8]| serde_json::from_slice::<Value>(text).expect("JSON");
            assert_eq!(read(record), expected, "{shown}");
            let values = with_values.expect("the same").1;
            for (pointer, index) in wanted.into_iter().zip(indexes) {
                let found = values.get(index).map(|text| read(text.as_bytes()));
                assert_eq!(
                    found.as_ref(),
                    expected.pointer(pointer),
                    "{pointer} in {shown}"
                );
            }
            expected["path"] = "T\"é".into();
            assert_eq!(read(&tagged), expected, "{shown}");
        }
        Err(Invalid::Malformed { line, .. }) => {
            assert!(tree.is_err(), "{shown}: {parsed:?}");
            let lines = body.split(|byte| *byte == b'\n').count();
            assert!((1..=lines).contains(line), "{shown}: {parsed:?}");
        }
        Err(Invalid::TooLarge { .. }) => panic!("no limit is set"),
        Err(Invalid::Schema { detail, .. }) => {
            let is_object = matches!(tree, Ok(Value::Object(_)));
            assert!(
                !is_object || detail.contains("twice"),
                "{shown}: {parsed:?}"
            );
        }
    }
    check_case(&body);
}

/// The parser of `case` takes what its JSON Schema allows, but for ages like `1.0`.
fn check_case(body: &Bytes) {
    thread_local! {
        static SCHEMA: jsonschema::Validator = {
            let schema: Value = serde_json::from_str(Schema::Case.to_json()).expect("JSON");
            jsonschema::validator_for(&schema).expect("a schema")
        };
    }
    let is_taken = parse(body, &Schema::Case.into()).is_ok();
    let is_any = parse(body, &Schema::Any.into()).is_ok();
    assert!(is_any || !is_taken);
    let Ok(tree) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let fits = is_any && SCHEMA.with(|schema| schema.is_valid(&tree));
    let is_float = tree["age"].is_f64();
    assert!(
        fits == is_taken || fits && is_float,
        "{}",
        String::from_utf8_lossy(body)
    );
}

/// A batch is taken if and only if each of its records is.
fn check_batch(parts: &[Vec<u8>], form: Form) {
    let rules = RecordRules::from(Schema::Any);
    let body = match form {
        Form::Array => [&b"["[..], &parts.join(&b','), b"]"].concat(),
        Form::Lines => parts.join(&b'\n'),
    };
    let body = Bytes::from(body);
    let shown = String::from_utf8_lossy(&body);
    let all = parse_all(&body, form, &rules, &PointerSet::default());
    let records = all
        .as_ref()
        .map(|all| all.iter().map(|(record, _)| record.clone()));
    let one_by_one: Vec<Bytes> = match form {
        Form::Array => {
            let Ok(texts) = serde_json::from_slice::<Vec<&serde_json::value::RawValue>>(&body)
            else {
                assert!(all.is_err(), "{shown}");
                return;
            };
            texts
                .iter()
                .map(|text| Bytes::copy_from_slice(text.get().as_bytes()))
                .collect()
        }
        Form::Lines => {
            let lines = body.split(|byte| *byte == b'\n');
            let lines = lines.filter(|line| !line.trim_ascii().is_empty());
            lines.map(Bytes::copy_from_slice).collect()
        }
    };
    let one_by_one: Vec<_> = one_by_one.iter().map(|text| parse(text, &rules)).collect();
    match records {
        Ok(records) => {
            let expected: Result<Vec<_>, _> = one_by_one.into_iter().collect();
            assert_eq!(Ok(records.collect::<Vec<_>>()), expected, "{shown}");
        }
        Err(InvalidBatch::Record { index, .. }) => {
            let first = one_by_one.iter().position(Result::is_err);
            assert_eq!(Some(*index), first, "{shown}");
        }
        Err(InvalidBatch::Body(why)) => {
            let is_wrong = one_by_one.iter().any(Result::is_err);
            assert!(
                is_wrong || std::str::from_utf8(&body).is_err(),
                "{shown}: {why}"
            );
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_record_is_what_other_parsers_read_and_a_tag_is_its_one_path(body in record_text()) {
        check_record(body);
    }

    #[test]
    fn a_batch_is_its_records_one_by_one(parts in vec(record_text(), 0..4), is_lines in any::<bool>()) {
        check_batch(&parts, if is_lines { Form::Lines } else { Form::Array });
    }
}

#[test]
fn the_texts_that_are_changed_are_themselves_read() {
    check_record(CASE.into());
    for text in VALUES.iter().chain(TORN) {
        check_record(text.as_bytes().to_vec());
        check_record(format!("{{\"a\":{text}}}").into());
        check_record(CASE.replacen("\"a\"", text, 1).into());
    }
}
