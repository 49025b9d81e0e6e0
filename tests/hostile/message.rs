//! Requests that are HTTP, with types, codings, keys, events and records that are not as they must be.

use super::{Case, TAKEN, class, closed, either, open, post, request};
use crate::ingest::RECORD;

pub fn cases() -> Vec<Case> {
    [types(), codings(), keys(), records(), batches(), events()]
        .into_iter()
        .flatten()
        .collect()
}

fn typed(media_type: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    request(
        "POST / HTTP/1.1",
        format!("Content-Type: {media_type}"),
        body,
    )
}

fn types() -> Vec<Case> {
    let bad = [
        "text/plain",
        "text/json",
        "text/html",
        "application/xml",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=a",
        "application/octet-stream",
        "application/jsonp",
        "application/+json/x",
        "image/png",
        "application/cloudevents+xml",
        "application/cloudevents+avro",
        "json",
        "*/*",
        "application/",
        "/json",
        "",
        "application/json, text/plain",
        "application/x-protobuf",
        "a b/c",
    ];
    let good = [
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        "application/vnd.case+json",
        "application/ld+json;profile=a",
    ];
    let with = |media_type| typed(media_type, RECORD);
    [
        class("another type", either(415), bad.map(with)),
        class(
            "two types",
            closed(400),
            [
                "application/json\r\nContent-Type: text/plain",
                "application/json\r\ncontent-type: application/json",
                "\r\nContent-Type: application/json",
            ]
            .map(with),
        ),
        class("a type of JSON", TAKEN, good.map(with)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn codings() -> Vec<Case> {
    let with = |coding: &str| post(format!("Content-Encoding: {coding}"));
    let bad = [
        "br",
        "deflate",
        "compress",
        "gzip, gzip",
        "gzip, zstd",
        "*",
        "gzip;q=1",
        "gzip zstd",
        "é",
        "identity, br",
        "zstd\r\nContent-Encoding: gzip",
    ];
    [
        class("another coding, or two", either(415), bad.map(with)),
        class(
            "a body that is not of its coding",
            open(400),
            ["gzip", "zstd", "x-gzip", "GZIP", "identity, gzip"].map(with),
        ),
        class(
            "no coding",
            TAKEN,
            ["identity", "", "identity, identity"].map(with),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn keys() -> Vec<Case> {
    let with = |key: &str| post(format!("Idempotency-Key: {key}"));
    let long = "k".repeat(256);
    let bad = [
        "",
        "a b",
        "é",
        "\"abc",
        "abc\"\"\"\u{7f}",
        "\"a\"b\"",
        "\"a\\b\"",
        "\"\"",
        "a\r\nIdempotency-Key: b",
        "a\r\nIdempotency-Key: a",
        &long,
    ];
    let most = "k".repeat(255);
    [
        class("a key that is none", either(400), bad.map(with)),
        class(
            "a key",
            TAKEN,
            ["a-1", "\"b-2\"", "\"c\\\"\\\\\"", "!~", &most].map(with),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn records() -> Vec<Case> {
    let with = |body: &str| request("POST / HTTP/1.1", "", body);
    let changed = |from: &str, to: &str| {
        assert!(RECORD.contains(from), "{from} is not in the record");
        with(&RECORD.replacen(from, to, 1))
    };
    let fields: serde_json::Value = serde_json::from_str(RECORD).expect("JSON");
    let names: Vec<_> = fields
        .as_object()
        .expect("an object")
        .keys()
        .cloned()
        .collect();
    let without = names.iter().map(|name| {
        let mut fields = fields.clone();
        fields.as_object_mut().expect("an object").remove(name);
        with(&fields.to_string())
    });
    let wrong = names.iter().flat_map(|name| {
        ["null", "true", "[]", "{}", "-1", "1.5", "\"\"", "1e400"].map(|value| {
            let mut fields = fields.clone();
            fields[name] = "REPLACED".into();
            let text = fields.to_string().replacen("\"REPLACED\"", value, 1);
            // These two may be empty.
            let is_good = value == "\"\"" && ["infectedtype", "state"].contains(&name.as_str());
            (!is_good).then(|| with(&text))
        })
    });
    let large = format!(
        "{},\"x\":\"{}\"}}",
        RECORD.trim_end_matches('}'),
        "x".repeat(256 << 10)
    );
    [
        class("a record without a field", open(422), without),
        class("a record with a wrong field", open(422), wrong.flatten()),
        class(
            "an empty or a foreign object",
            open(422),
            [with("{}"), with("{\"a\":1}")],
        ),
        class("a record that is too large", open(413), [with(&large)]),
        class(
            "a record with other fields",
            TAKEN,
            [changed("{", "{\"x\":1,"), changed("{", "{\"path\":\"x\",")],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn batches() -> Vec<Case> {
    let lines = |body: String| typed("application/x-ndjson", body);
    let array = |body: String| request("POST / HTTP/1.1", "", body);
    let many = |count, by: &str| vec![RECORD; count].join(by);
    [
        class(
            "a bad record in a batch",
            open(422),
            [
                array(format!("[{RECORD},{{}}]")),
                array(format!("[{{}},{RECORD}]")),
                array(format!("[{RECORD},1]")),
                lines(format!("{RECORD}\n{{}}")),
            ],
        ),
        class(
            "a batch that is no JSON",
            open(400),
            [
                array(format!("[{RECORD}")),
                array(format!("[{RECORD},]")),
                array(format!("[{RECORD}{RECORD}]")),
                lines(format!("{RECORD}\n{{")),
                lines(format!("{RECORD}{RECORD}")),
                array(many(2, "\n")),
            ],
        ),
        class(
            "too many records",
            open(413),
            [
                array(format!("[{}]", many(1025, ","))),
                lines(many(1025, "\n")),
            ],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn events() -> Vec<Case> {
    let good = [
        ("specversion", "1.0"),
        ("id", "1"),
        ("source", "/a"),
        ("type", "t"),
    ];
    let binary = |fields: &[(&str, &str)]| {
        let fields: Vec<_> = fields
            .iter()
            .map(|(name, value)| format!("ce-{name}: {value}"))
            .collect();
        post(fields.join("\r\n"))
    };
    let and = |name: &'static str, value: &'static str| {
        let others = good.into_iter().filter(|(known, _)| *known != name);
        others.chain([(name, value)]).collect::<Vec<_>>()
    };
    let wrong = [
        and("specversion", "0.3"),
        and("specversion", "1.1"),
        and("specversion", ""),
        and("id", ""),
        and("source", ""),
        and("source", "a b"),
        and("type", ""),
        and("time", "yesterday"),
        and("time", "2026-01-01T00:00:00"),
        and("datacontenttype", "application/json"),
        and("subject", "%zz"),
        and("subject", "%ff"),
        and("a-b", "1"),
    ];
    // One without the other three is no event of the binary mode, unless these identify it.
    let lacking = good.map(|(name, _)| {
        good.into_iter()
            .filter(|(known, _)| *known != name)
            .collect::<Vec<_>>()
    });
    let structured = |body: String| typed("application/cloudevents+json", body);
    let batch = |body: String| typed("application/cloudevents-batch+json", body);
    let event = |members: &str| format!("{{\"specversion\":\"1.0\",\"source\":\"/a\"{members}}}");
    [
        class(
            "an event with a wrong attribute",
            either(400),
            wrong.iter().map(|event| binary(event)),
        ),
        class(
            "an event that lacks an attribute",
            either(400),
            lacking.iter().map(|event| binary(event)),
        ),
        class(
            "an event in JSON that is none",
            open(400),
            [
                structured("{}".into()),
                structured("[]".into()),
                structured("{".into()),
                structured(event("")),
                structured(event(",\"id\":\"1\"")),
                structured(event(",\"id\":\"1\",\"type\":\"t\"")),
                structured(event(",\"id\":1,\"type\":\"t\",\"data\":{}")),
                batch("{}".into()),
                batch("[1]".into()),
                batch(format!("[{}]", event(""))),
            ],
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}
