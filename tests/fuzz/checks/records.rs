//! Records, alone and many in one body.

use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::Value;
use waypost::record::{
    Invalid, RecordRules, Schema, Tag,
    batch::{self, Form, InvalidBatch, parse_all},
    parse, parse_body,
    pointer::PointerSet,
};

/// The form of a body, and its records behind bytes that no text has.
pub fn batch(bytes: &[u8]) {
    let Some((form, parts)) = bytes.split_first() else {
        return;
    };
    let form = if form % 2 == 0 {
        Form::Array
    } else {
        Form::Lines
    };
    let parts: Vec<_> = parts.split(|byte| *byte == u8::MAX).collect();
    check_batch(&parts, form);
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

/// A record is what other parsers read, and a tag is its one path.
pub fn check_record(body: &[u8]) {
    let body = Bytes::copy_from_slice(body);
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
pub fn check_batch(parts: &[&[u8]], form: Form) {
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
    if let Ok(all) = &all
        && all.len() > batch::MAX
    {
        // Nothing is read behind one record too many.
        assert_eq!(all.len(), batch::MAX + 1, "{shown}");
        for (record, _) in all {
            assert_eq!(parse(record, &rules).as_ref(), Ok(record), "{shown}");
        }
        return;
    }
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
            // The white space of JSON, as around a record alone (RFC 8259, 2).
            let is_space = |byte: &u8| b" \t\r".contains(byte);
            let lines = lines.filter(|line| !line.iter().all(is_space));
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
