//! The limits of the JSON of records, and the schema that a node tells.

use serde_json::Value;

use crate::{
    ingest::post,
    support::{
        api::Api,
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
    let url = format!("http://127.0.0.1:{}/schema", node.ingest);
    let answer = awc::Client::default().get(url).send().await;
    let mut answer = answer.expect("an answer");
    let content_type = answer.headers().get("content-type").expect("a type");
    assert_eq!(content_type, "application/schema+json");
    let body = answer.body().await.expect("a body");
    let schema: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(schema["type"], "object");
    assert!(schema["required"].is_null(), "{schema}");
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 3);
}
