//! Any bytes, and bytes that are nearly right, for everything that reads what others have written.
//! Readers are compared with other readers, and with what writes for them.
//!
//! `PROPTEST_CASES` is the number of cases of each test, 256 by default.

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*, sample::Index, sample::select, string::string_regex};
use prost::Message as _;
use serde::de::IgnoredAny;
use serde_json::Value;
use waypost::{
    actors::lane::bundle::{BundleSize, Packed, SettledRecords, Unbundler},
    cloud_events::{EventAttributes, JsonEvent, header_value, parse_batch, parse_event},
    config::Config,
    delivery::Verdict,
    proto,
    record::{
        Invalid, Origin, Record, RecordRules, Schema, Tag,
        batch::{Form, InvalidBatch, parse_all},
        is_visible_ascii, parse, parse_body,
        pointer::PointerSet,
    },
    transport::{Headers, Incoming, Message},
};

/// Values of JSON that readers get wrong, and texts that are nearly JSON.
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
const TORN: &[&str] = &[
    "\"\\ud800\"",
    "\"\\udc00\\ud800\"",
    "01",
    "+1",
    "1.",
    ".5",
    "1e",
    "nul",
    "\u{feff}",
    "\0",
    "\"",
    "'a'",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "//",
    "NaN",
    "\"\\x\"",
    "\"\n\"",
    "\u{a0}",
    "{\"a\":1,\"a\":2}",
    "{}{}",
    "[,]",
];
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

/// The texts, half of them with a piece cut out, put in or replaced.
fn damaged(
    texts: impl Strategy<Value = String>,
    pieces: &'static [&'static str],
) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        select(pieces).prop_map(|piece| piece.as_bytes().to_vec()),
        vec(any::<u8>(), 0..3),
    ];
    let change = (any::<Index>(), 0..4_usize, piece);
    let changes = prop_oneof![Just(Vec::new()), vec(change, 1..3)];
    (texts, changes).prop_map(|(text, changes)| {
        let mut text = text.into_bytes();
        for (at, length, piece) in changes {
            let at = at.index(text.len() + 1);
            let end = (at + length).min(text.len());
            text.splice(at..end, piece);
        }
        text
    })
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
    assert_eq!(
        with_values.as_ref().map(|(record, _)| record).ok(),
        parsed.as_ref().ok()
    );
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

fn event_text() -> impl Strategy<Value = String> {
    let other = (select(ATTRIBUTES), select(ATTRIBUTE_VALUES));
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
    let text = std::str::from_utf8(&json).expect("text");
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

const SETTINGS: &[&str] = &[
    "[ingest]",
    "schema = \"any\"",
    "listen = \"127.0.0.1:0\"",
    "max_body = \"1MiB\"",
    "max_record = 5",
    "key_window = \"1h 30m\"",
    "numbers = \"exact\"",
    "[api]",
    "url = \"http://localhost:1/\"",
    "give_up_after = \"never\"",
    "retry_statuses = [408, \"5xx\"]",
    "rate = \"5/s\"",
    "[apis.billing]",
    "[router]",
    "policy = \"hash\"",
    "hash_on = \"/a\"",
    "[lanes.nats]",
    "url = \"nats://localhost\"",
    "weight = 0",
    "tag = \"é\"",
    "[lanes.grpc]",
    "peers = [\"http://a:1\"]",
    "[[routes]]",
    "when = { pointer = \"/a\", in = [1, \"b\"] }",
    "when = { header = \"X\", matches = \"^a\" }",
    "lanes = [\"nats\"]",
    "api = \"billing\"",
    "[spool]",
    "max = \"2MiB\"",
    "[admin]",
    "hosts = [\".a.b\"]",
    "read_only = true",
];
const TORN_SETTINGS: &[&str] = &[
    "=", "[", "]", "\"", "\n", "{", "}", "'", "#", ".", "\u{0}", "é",
];

/// A configuration is read, or each mistake has its place; and what is read is read again the same.
fn check_configuration(text: &[u8]) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("room");
    let nothing = BTreeMap::new();
    let shown = String::from_utf8_lossy(text);
    match Config::load(Some(file.path()), &nothing, &[]) {
        Ok(config) => {
            fs::write(file.path(), config.to_toml()).expect("room");
            let again = Config::load(Some(file.path()), &nothing, &[]);
            assert_eq!(again.as_ref(), Ok(&config), "{shown}");
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "{shown}");
            for mistake in mistakes {
                assert!(
                    !mistake.place.is_empty() && !mistake.what.is_empty(),
                    "{shown}"
                );
                assert!(!mistake.to_string().contains('\n'), "{shown}: {mistake}");
            }
        }
    }
}

fn visible(most: usize) -> impl Strategy<Value = String> {
    string_regex(&format!("[!-~]{{1,{most}}}")).expect("an expression")
}

fn origin() -> impl Strategy<Value = Origin> {
    (visible(20), any::<u64>()).prop_map(|(run, at_us)| Origin {
        run: run.into(),
        at_us,
    })
}

fn trace() -> impl Strategy<Value = Arc<str>> {
    let trace = string_regex("00-[1-9a-f][0-9a-f]{31}-[1-9a-f][0-9a-f]{15}-0[01]");
    trace.expect("an expression").prop_map(Into::into)
}

fn record() -> impl Strategy<Value = Record> {
    let optional = (
        proptest::option::of(trace()),
        proptest::option::weighted(0.9, origin()),
        proptest::option::of(visible(10)),
    );
    let own = (visible(40), vec(any::<u8>(), 0..200));
    (own, optional, any::<bool>()).prop_map(|((id, body), (traceparent, origin, api), is_event)| {
        Record {
            id: id.into(),
            body: body.into(),
            traceparent,
            origin,
            api: api.map(Into::into),
            event: is_event.then(|| "id=1&source=/&specversion=1.0&type=t".into()),
        }
    })
}

/// Each record comes out of its messages as it went in, and each message is settled once.
fn check_bundles(records: &[Record], most: usize, largest: usize) {
    let packed = Packed::new(records, BundleSize::new(most, largest));
    let count = packed.messages.len();
    let acked = Arc::new(AtomicUsize::new(0));
    let mut incoming: Vec<_> = packed
        .messages
        .into_iter()
        .map(|message| {
            // As every system carries them.
            let pairs: Vec<_> = message
                .headers
                .pairs()
                .map(|(name, value)| (name, value.into_owned()))
                .collect();
            let header = |name: &str| {
                let (_, value) = pairs.iter().find(|(known, _)| *known == name)?;
                Some(&**value)
            };
            let headers = Headers::read(header, || "other".into());
            assert_eq!(headers, message.headers);
            let acked = Arc::clone(&acked);
            let message = Message {
                headers,
                body: message.body,
            };
            Incoming::new(message, false, move |verdict| {
                assert_eq!(verdict, Verdict::Ack);
                acked.fetch_add(1, Relaxed);
            })
        })
        .collect();
    let mut unbundler = Unbundler::new(SettledRecords::default());
    unbundler.add(&mut incoming);
    let deliveries: Vec<_> = unbundler.collect();
    assert_eq!(deliveries.len(), records.len());
    for (delivery, record) in deliveries.into_iter().zip(records) {
        if record.origin.is_some() {
            assert_eq!(delivery.record, *record);
        }
        delivery.acker.settle(Verdict::Ack);
    }
    assert_eq!(acked.load(Relaxed), count);
}

/// A message of any publisher comes out as records that can be POSTed.
fn check_foreign(body: Vec<u8>, headers: &[(usize, String)]) {
    const NAMES: [&str; 6] = [
        "Waypost-Id",
        "Waypost-Origin",
        "Waypost-Api",
        "Waypost-Event",
        "Waypost-Bundle",
        "traceparent",
    ];
    let header = |name: &str| {
        let found = headers.iter().find(|(at, _)| NAMES[*at] == name)?;
        Some(&*found.1)
    };
    let headers = Headers::read(header, || "other".into());
    let message = Message {
        headers,
        body: body.into(),
    };
    let mut unbundler = Unbundler::new(SettledRecords::default());
    unbundler.add(&mut vec![Incoming::new(message, false, |_| {})]);
    for delivery in unbundler {
        let Record {
            id,
            traceparent,
            api,
            event,
            body,
            ..
        } = &delivery.record;
        for text in [Some(id), traceparent.as_ref(), api.as_ref(), event.as_ref()]
            .into_iter()
            .flatten()
        {
            assert!(is_visible_ascii(text), "{text:?}");
        }
        Tag::new("T").splice(body);
    }
}

/// Bytes that are a bundle, or nearly.
fn wire() -> impl Strategy<Value = Vec<u8>> {
    let bundle = vec(record(), 0..4).prop_map(|records| {
        let records = records
            .iter()
            .map(|record| proto::Record::from(&Message::from(record)));
        proto::Bundle {
            records: records.collect(),
        }
        .encode_to_vec()
    });
    let change = (any::<Index>(), any::<u8>());
    let changed = (bundle, vec(change, 0..4), any::<Index>(), any::<bool>());
    let changed = changed.prop_map(|(mut bytes, changes, end, is_cut)| {
        for (at, byte) in changes {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        if is_cut {
            bytes.truncate(end.index(bytes.len() + 1));
        }
        bytes
    });
    prop_oneof![4 => changed, 1 => vec(any::<u8>(), 0..100)]
}

fn cases() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
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

    #[test]
    fn a_configuration_is_read_or_refused_with_places(
        text in damaged(vec(select(SETTINGS), 0..12).prop_map(|lines| lines.join("\n")), TORN_SETTINGS)
    ) {
        check_configuration(&text);
    }

    #[test]
    fn records_come_out_of_bundles_as_they_went_in(
        records in vec(record(), 0..12), most in 1..8_usize, largest in 100..3000_usize
    ) {
        check_bundles(&records, most, largest);
    }

    #[test]
    fn a_message_of_anyone_is_records_that_can_be_posted(
        body in wire(),
        headers in vec((0..6_usize, prop_oneof![
            visible(30), "[0-9]{1,4}", "[a-z]{1,3}/[0-9]{1,22}", any::<String>(), trace().prop_map(|trace| trace.to_string()),
        ]), 0..6),
    ) {
        check_foreign(body, &headers);
    }

    #[test]
    fn a_message_of_protobuf_is_read_as_it_was_written(bytes in wire()) {
        if let Ok(bundle) = proto::Bundle::decode(&*bytes) {
            let again = bundle.encode_to_vec();
            prop_assert_eq!(proto::Bundle::decode(&*again), Ok(bundle));
        }
        let _ = proto::Record::decode(&*bytes);
        let _ = proto::Receipt::decode(&*bytes);
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
