//! The limits of the JSON of records, and the schema that a node tells.

use std::fs;

use awc::http::StatusCode;
use serde_json::{Value, json};
use waypost::proto::{Outcome, waypost_client::WaypostClient};

use crate::{
    ingest::post,
    support::{
        api::Api,
        grpc::message,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

#[actix_rt::test]
async fn a_record_beyond_a_limit_is_refused_with_its_pointer_and_the_limit() {
    let keys = [
        ("INGEST__SCHEMA", "any"),
        ("INGEST__NUMBERS", "exact"),
        ("INGEST__MAX_MEMBERS", "6"),
        ("INGEST__MAX_DEPTH", "3"),
    ];
    let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let api = Api::start();
    let variables = [grpc_variables(), keys.to_vec()].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (record, status, field, part) in [
        (r#"{"a":{"b":[1]}}"#, 202, None, ""),
        (r#"{"n":9007199254740991}"#, 202, None, ""),
        (r#"{"1":1,"2":1,"3":1,"4":1,"5":1,"6":1}"#, 202, None, ""),
        ("1", 422, None, "expected a JSON object"),
        (
            r#"{"n":9007199254740993}"#,
            422,
            Some("/n"),
            "9007199254740993",
        ),
        (r#"{"n":1e400}"#, 422, Some("/n"), "1e400"),
        (
            r#"{"1":1,"2":1,"3":1,"4":1,"5":{"a":1,"b":1}}"#,
            422,
            Some("/5/b"),
            "allowed are 6",
        ),
        (r#"{"n":[[[]]]}"#, 422, Some("/n/0/0"), "deeper than 3"),
    ] {
        let (got, _, body) = post(record).send(&node).await;
        assert_eq!(got.as_u16(), status, "{record}: {body}");
        assert_eq!(body["field"].as_str(), field, "{record}: {body}");
        let detail = body["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(part), "{record}: {body}");
    }
    let schema: Value = serde_json::from_slice(&schema_of(&node).await).expect("JSON");
    assert_eq!(schema["type"], "object");
    assert!(schema["required"].is_null(), "{schema}");
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 3);
}

/// The schema that the node tells, byte for byte.
async fn schema_of(node: &Node) -> Vec<u8> {
    let url = format!("http://127.0.0.1:{}/schema", node.ingest);
    let answer = awc::Client::default().get(url).send().await;
    let mut answer = answer.expect("an answer");
    let content_type = answer.headers().get("content-type").expect("a type");
    assert_eq!(content_type, "application/schema+json");
    answer.body().await.expect("a body").to_vec()
}

#[actix_rt::test]
async fn a_schema_file_decides_what_is_a_record_until_the_next_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("order.schema.json");
    let schema = r#"{
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["sku"],
        "additionalProperties": false,
        "properties": {
            "sku": { "type": "string", "pattern": "^[A-Z]{2}-[0-9]+$" },
            "count": { "type": "integer", "minimum": 1, "maximum": 99 },
            "weight": { "type": "number" }
        }
    }"#;
    let write = |text: &str| fs::write(&path, text).expect("the folder is ours");
    write(schema);
    let file = path.to_str().expect("a plain path").to_owned();
    let api = Api::start();
    let keys = [("INGEST__SCHEMA".to_owned(), file.clone())];
    let variables = [grpc_variables(), keys.to_vec()].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // Each byte of a number that a float does not hold travels as it came.
    let taken = r#"{"sku":"AB-7","count":3,"weight":0.10000000000000000000001}"#;
    for (body, status, field, parts) in [
        (taken, 202, None, ["", ""]),
        (
            r#"{"sku":"ab","count":3}"#,
            422,
            Some("/sku"),
            ["\"ab\"", "^[A-Z]{2}-[0-9]+$"],
        ),
        (
            r#"{"sku":"AB-7","count":100}"#,
            422,
            Some("/count"),
            ["100", "maximum of 99"],
        ),
        (
            r#"{"count":1}"#,
            422,
            Some("/sku"),
            ["is missing", "/required"],
        ),
        (
            r#"{"sku":"AB-7","more":1}"#,
            422,
            Some("/more"),
            ["not allow", "additionalProperties"],
        ),
        (
            r#"{"sku":"AB-7","weight":1e400}"#,
            422,
            Some("/weight"),
            ["1e400", "1.8e308"],
        ),
        ("1", 422, None, ["expected a JSON object", ""]),
    ] {
        let (got, _, answer) = post(body).send(&node).await;
        assert_eq!(got.as_u16(), status, "{body}: {answer}");
        assert_eq!(answer["field"].as_str(), field, "{body}: {answer}");
        for part in parts {
            let detail = answer["detail"].as_str().unwrap_or_default();
            assert!(detail.contains(part), "{body}: {answer}");
        }
    }
    let batch = format!("[{taken},{{}}]");
    let (status, _, answer) = post(&*batch).send(&node).await;
    assert_eq!(
        (status.as_u16(), &answer["index"]),
        (422, &json!(1)),
        "{answer}"
    );
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 1);
    let posts = api.posts();
    let [record] = &posts[..] else {
        panic!("one record was taken");
    };
    assert_eq!(record.body, taken.replace('}', r#","path":"GRPC"}"#));
    assert_eq!(schema_of(&node).await, schema.as_bytes());

    write("{\n\"type\": 1}");
    let (status, answer) = node.tell("/api/reload", json!({})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
    let what = answer["reasons"][0]["what"].as_str().expect("a reason");
    assert!(what.starts_with(&format!("{file}:2: /type: 1 ")), "{what}");
    let new = r#"{"required":["code"]}"#;
    write(new);
    let (_, answer) = node.tell("/api/reload", json!({})).await;
    assert_eq!(
        answer["needs_restart"],
        json!(["ingest.schema"]),
        "{answer}"
    );
    assert_eq!(schema_of(&node).await, schema.as_bytes());
    assert_eq!(post(r#"{"code":1}"#).send(&node).await.0.as_u16(), 422);
    node.signal("TERM");
    node.ended(PATIENCE).await;
    node.start_again().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(schema_of(&node).await, new.as_bytes());
    assert_eq!(post(r#"{"code":1}"#).send(&node).await.0.as_u16(), 202);
}

#[actix_rt::test]
async fn a_record_costs_little_whatever_its_schema_multiplies() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("expression.schema.json");
    let of = |op: &str| {
        json!({
            "properties": { "op": { "const": op }, "args": { "items": { "$ref": "#" } } },
            "required": ["op", "args"],
        })
    };
    let leaf = json!({ "properties": { "n": { "type": "integer" } }, "required": ["n"] });
    let schema = json!({ "oneOf": [of("and"), of("or"), of("not"), leaf] });
    fs::write(&path, schema.to_string()).expect("the folder is ours");
    let file = path.to_str().expect("a plain path").to_owned();
    let api = Api::start();
    let grpc = grpc_variables();
    let address = format!("http://{}", grpc[0].1);
    let keys = [("INGEST__SCHEMA".to_owned(), file)];
    let node = Node::start(&api.url(), &[grpc, keys.to_vec()].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let nested = |leaf: &str| {
        let depth = 30;
        let begin = r#"{"op":"and","args":["#.repeat(depth);
        [&begin, leaf, &"]}".repeat(depth)].concat()
    };
    let deep = nested(r#"{"n":"1"}"#);
    let fits_and_is_large = format!(r#"{{"n":1,"text":"{}"}}"#, "x".repeat(256 << 10));
    let large = fits_and_is_large.replace("1,", "true,");
    let refused = [
        (&deep, 422, Some(""), "does not fit the schema"),
        (&large, 413, None, "larger than 262144 bytes"),
        (&fits_and_is_large, 413, None, "larger than 262144 bytes"),
    ];
    let mut client = WaypostClient::connect(address)
        .await
        .expect("the lane is up");
    for (record, status, field, part) in refused {
        let (got, _, answer) = post(&**record).send(&node).await;
        assert_eq!(got.as_u16(), status, "{answer}");
        assert_eq!(answer["field"].as_str(), field, "{answer}");
        let detail = answer["detail"].as_str().unwrap_or_default();
        assert!(detail.contains(part), "{answer}");
        let receipt = client.send(message("k", record)).await.expect("a receipt");
        let receipt = receipt.into_inner();
        assert_eq!(receipt.outcome(), Outcome::Refused, "{receipt:?}");
        assert!(receipt.detail.contains(part), "{receipt:?}");
    }
    let batch = format!(r#"[{{"n":1}},{large}]"#);
    let (status, _, answer) = post(batch).send(&node).await;
    assert_eq!(
        (status.as_u16(), &answer["index"]),
        (413, &json!(1)),
        "{answer}"
    );
    let (status, _, answer) = post(nested(r#"{"n":1}"#)).send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 1);
}
