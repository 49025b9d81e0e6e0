//! CloudEvents at ingest: binary, structured and batched, good and bad.

use awc::http::StatusCode;
use serde_json::{Value, json};

use crate::{
    ingest::{RECORD, Request, post},
    routing::rules,
    support::{
        api::{Api, Conduct, Post},
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

const STRUCTURED: &str = "application/cloudevents+json";
const BATCHED: &str = "application/cloudevents-batch+json; charset=UTF-8";

/// An event with RECORD as its data.
fn event(id: &str) -> Value {
    let data: Value = serde_json::from_str(RECORD).expect("JSON");
    json!({
        "specversion": "1.0", "id": id, "source": "/cases", "type": "org.example.case", "data": data
    })
}

fn with(mut event: Value, name: &str, value: Value) -> Value {
    event[name] = value;
    event
}

fn without(mut event: Value, name: &str) -> Value {
    event.as_object_mut().expect("an object").remove(name);
    event
}

fn structured(event: &Value) -> Request {
    post(event.to_string()).with("Content-Type", STRUCTURED)
}

fn batched(events: &[Value]) -> Request {
    post(json!(events).to_string()).with("Content-Type", BATCHED)
}

fn binary(headers: &[(&'static str, &str)]) -> Request {
    let request = post(RECORD).with("Content-Type", "application/json");
    headers
        .iter()
        .fold(request, |request, (name, value)| request.with(name, *value))
}

/// The headers of an event, each with another value or none where `others` say so.
fn headers<'v>(
    id: &'v str,
    others: &[(&'static str, Option<&'v str>)],
) -> Vec<(&'static str, &'v str)> {
    let mut all = vec![
        ("ce-specversion", "1.0"),
        ("ce-id", id),
        ("ce-source", "/cases"),
        ("ce-type", "org.example.case"),
    ];
    for (name, value) in others {
        all.retain(|(known, _)| known != name);
        all.extend(value.map(|value| (*name, value)));
    }
    all
}

/// Name, request, and the id of the receipt.
fn good() -> Vec<(&'static str, Request, &'static str)> {
    let optional = with(event("2"), "subject", json!("é 😀 % \""));
    let optional = with(optional, "time", json!("2026-11-29T12:00:00.5+01:00"));
    let optional = with(optional, "dataschema", json!("https://example.com/case"));
    let optional = with(
        optional,
        "datacontenttype",
        json!("text/json; charset=utf-8"),
    );
    let optional = with(optional, "urgent", json!(true));
    let base64 = without(event("3"), "data");
    let base64 = with(base64, "datacontenttype", json!("application/json"));
    let coded =
        "eyJuYW1lIjoiQSIsImxvY2F0aW9uIjoiQiIsImFnZSI6MSwiaW5mZWN0ZWR0eXBlIjoiIiwic3RhdGUiOiIifQ==";
    vec![
        ("structured", structured(&event("1")), "/cases|1"),
        (
            "with optional attributes",
            structured(&optional),
            "/cases|2",
        ),
        (
            "with Base64",
            structured(&with(base64, "data_base64", json!(coded))),
            "/cases|3",
        ),
        (
            "with an attribute that is null",
            structured(&with(event("4"), "subject", Value::Null)),
            "/cases|4",
        ),
        (
            "structured with headers too: the body counts",
            structured(&event("5"))
                .with("ce-id", "other")
                .with("ce-source", "%zz"),
            "/cases|5",
        ),
        (
            "structured with a key: the event's counts",
            structured(&event("6")).with("Idempotency-Key", "k"),
            "/cases|6",
        ),
        ("by a lane", structured(&event("7")).to("/grpc"), "/cases|7"),
        ("binary", binary(&headers("8", &[])), "/cases|8"),
        (
            "binary with a key",
            binary(&headers("9", &[])).with("Idempotency-Key", "k"),
            "/cases|9",
        ),
        (
            "binary, coded",
            binary(&headers(
                "%C3%A9%20%F0%9F%98%80%22%2520",
                &[("ce-source", Some("/a%2520b"))],
            )),
            "/a%2520b|%C3%A9%20%F0%9F%98%80%22%2520",
        ),
        (
            "binary, quoted",
            binary(&headers(r#""a \"b\"""#, &[])),
            "/cases|a%20%22b%22",
        ),
        (
            "binary, lower-case digits",
            binary(&headers("%c3%a9", &[])),
            "/cases|%C3%A9",
        ),
        (
            "binary with optional attributes",
            binary(&headers(
                "10",
                &[
                    ("ce-time", Some("2026-11-29T12:00:00Z")),
                    ("ce-averyveryveryverylongname", Some("")),
                ],
            )),
            "/cases|10",
        ),
        (
            "binary by a lane",
            binary(&headers("11", &[])).to("/grpc"),
            "/cases|11",
        ),
        (
            "binary without a type",
            headers("12", &[])
                .into_iter()
                .fold(post(RECORD), |request, (name, value)| {
                    request.with(name, value)
                }),
            "/cases|12",
        ),
        (
            "another source",
            binary(&headers("1", &[("ce-source", Some("/others"))])),
            "/others|1",
        ),
    ]
}

#[actix_rt::test]
async fn each_form_of_an_event_is_a_record_with_its_key() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let cases = good();
    let count = cases.len();
    for (name, request, id) in cases {
        let (status, _, body) = request.send(&node).await;
        let expected = json!({"id": id, "path": "GRPC"});
        assert_eq!((status, &body), (StatusCode::ACCEPTED, &expected), "{name}");
    }
    // The same events again: nothing is routed.
    for (name, request, id) in good() {
        let (status, headers, body) = request.send_and_see(&node).await;
        assert_eq!((status.as_u16(), &body["id"]), (202, &json!(id)), "{name}");
        assert!(headers.contains_key("Idempotent-Replayed"), "{name}");
    }
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], count);
    assert_eq!(api.count(), count);
    let tagged = format!("{},\"path\":\"GRPC\"}}", RECORD.trim_end_matches('}'));
    let posts = api.posts();
    let sent = posts
        .iter()
        .find(|post| post.key.as_deref() == Some("/cases|8"));
    assert_eq!(sent.expect("a POST").body, tagged, "byte for byte");
}

/// A bad event: name, request, status, and members of the answer.
type Bad = (&'static str, Request, u16, Value);

/// Headers with this value, or without one, are refused by their name.
fn bad_headers() -> Vec<Bad> {
    let long = "x".repeat(16 << 10);
    let cases = [
        ("no version", "ce-specversion", None),
        ("no id", "ce-id", None),
        ("no source", "ce-source", None),
        ("no type", "ce-type", None),
        ("version 0.3", "ce-specversion", Some("0.3")),
        ("an empty id", "ce-id", Some("")),
        ("a source that is none", "ce-source", Some("a%20b")),
        ("an overlong code", "ce-id", Some("%C0%A0")),
        ("half a code", "ce-id", Some("100%")),
        ("half a quote", "ce-id", Some("\"a")),
        ("a control character", "ce-id", Some("%0A")),
        ("no zone", "ce-time", Some("2026-11-29T12:00:00")),
        ("an underscore", "ce-a_b", Some("1")),
        ("the data", "ce-data", Some("1")),
        ("its type", "ce-datacontenttype", Some("application/json")),
        ("many bytes", "ce-note", Some(&*long)),
    ];
    let cases = cases.into_iter().map(|(what, header, value)| {
        let members = json!({"type": "urn:waypost:problem:cloud-event", "header": header});
        (
            what,
            binary(&headers("1", &[(header, value)])),
            400,
            members,
        )
    });
    cases.collect()
}

fn bad_binary() -> Vec<Bad> {
    let of = |body: &str| binary(&headers("1", &[])).map_body(|_| body.into());
    let lines = post(RECORD).with("Content-Type", "application/x-ndjson");
    vec![
        (
            "two ids",
            of(RECORD).with("ce-id", "2"),
            400,
            json!({"header": "ce-id"}),
        ),
        ("NDJSON", lines.with("ce-id", "1"), 415, json!({})),
        (
            "another format",
            post(RECORD)
                .with("Content-Type", "application/CloudEvents-foo+json")
                .with("ce-specversion", "1.0")
                .with("ce-id", "1")
                .with("ce-source", "/cases")
                .with("ce-type", "t"),
            415,
            json!({}),
        ),
        ("many records", of(&format!("[{RECORD}]")), 422, json!({})),
        ("no record", of(""), 400, json!({"line": 1})),
        ("a bad record", of("{}"), 422, json!({"field": "/name"})),
    ]
}

/// Members with this value, or without one, are refused by their name.
fn bad_members() -> Vec<Bad> {
    let cases = [
        ("no version", "specversion", None),
        ("no id", "id", None),
        ("no source", "source", None),
        ("no type", "type", None),
        ("no data", "data", None),
        ("a version as a number", "specversion", Some(json!(1.0))),
        ("version 1.1", "specversion", Some(json!("1.1"))),
        ("an id as a number", "id", Some(json!(1))),
        ("a source with a space", "source", Some(json!("a b"))),
        ("a capital", "Note", Some(json!("a"))),
        ("an object", "note", Some(json!({}))),
        ("both kinds of data", "data_base64", Some(json!("e30="))),
    ];
    let cases = cases.into_iter().map(|(what, member, value)| {
        let members =
            json!({"type": "urn:waypost:problem:cloud-event", "field": format!("/{member}")});
        let event = match value {
            Some(value) => with(event("1"), member, value),
            None => without(event("1"), member),
        };
        (what, structured(&event), 400, members)
    });
    cases.collect()
}

fn bad_structured() -> Vec<Bad> {
    let text = |body: &[u8]| post(body).with("Content-Type", STRUCTURED);
    let one = |name: &str, value: Value| structured(&with(event("1"), name, value));
    let base64 = |data| {
        structured(&with(
            without(event("1"), "data"),
            "data_base64",
            json!(data),
        ))
    };
    let avro = post("{}").with("Content-Type", "application/cloudevents+avro");
    let data_type = || json!({"field": "/datacontenttype"});
    let event_type = || json!({"type": "urn:waypost:problem:cloud-event"});
    vec![
        (
            "a name with a slash",
            one("a/b", json!(1)),
            400,
            json!({"field": "/a~1b"}),
        ),
        (
            "bad Base64",
            base64("e30"),
            400,
            json!({"field": "/data_base64"}),
        ),
        ("Base64 without a type", base64("e30="), 415, data_type()),
        (
            "text",
            one("datacontenttype", json!("text/plain")),
            415,
            data_type(),
        ),
        ("another format", avro, 415, json!({})),
        (
            "an array",
            structured(&json!([event("1")])),
            400,
            event_type(),
        ),
        ("no JSON", text(b"{]"), 400, json!({"line": 1, "column": 2})),
        (
            "no UTF-8",
            text(b"{\n\xff}"),
            400,
            json!({"line": 2, "column": 1}),
        ),
        (
            "half a character in its data, by its place in the body",
            text(
                br#"{
"specversion":"1.0","id":"1","source":"/a","type":"t",
  "data":{"name":"\ud800"}}"#,
            ),
            400,
            json!({"line": 3, "column": 25}),
        ),
        (
            "a media type that is no header",
            one("datacontenttype", json!("application/json; note=é")),
            400,
            json!({"field": "/datacontenttype"}),
        ),
        ("a text as data", one("data", json!(RECORD)), 422, json!({})),
        ("null as data", one("data", Value::Null), 422, json!({})),
        (
            "a bad record",
            one("data", json!({})),
            422,
            json!({"field": "/name"}),
        ),
    ]
}

fn bad_batches() -> Vec<Bad> {
    let second = |event: Value| batched(&[self::event("1"), event]);
    vec![
        (
            "no id",
            second(without(event("2"), "id")),
            400,
            json!({"field": "/id", "index": 1}),
        ),
        ("a number", second(json!(1)), 400, json!({"index": 1})),
        (
            "a record that the schema refuses",
            second(with(event("2"), "data", json!({}))),
            422,
            json!({"field": "/name", "index": 1}),
        ),
        (
            "an event",
            post(event("1").to_string()).with("Content-Type", BATCHED),
            400,
            json!({}),
        ),
        (
            "no end",
            post("[").with("Content-Type", BATCHED),
            400,
            json!({"line": 1}),
        ),
        ("too many", batched(&vec![event("1"); 1025]), 413, json!({})),
        (
            "one event with other data",
            second(with(
                event("1"),
                "data",
                json!({"name": "a", "location": "b", "age": 1, "infectedtype": "", "state": ""}),
            )),
            422,
            json!({"type": "urn:waypost:problem:idempotency-key-reused", "index": 1}),
        ),
    ]
}

#[actix_rt::test]
async fn a_bad_event_gets_the_problem_with_its_place_and_is_not_taken() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let cases = [
        bad_headers(),
        bad_binary(),
        bad_members(),
        bad_structured(),
        bad_batches(),
    ];
    for (name, request, expected, members) in cases.into_iter().flatten() {
        let (status, content_type, body) = request.send(&node).await;
        assert_eq!(status.as_u16(), expected, "{name}: {body}");
        assert_eq!(content_type, "application/problem+json", "{name}");
        for (member, value) in members.as_object().expect("an object") {
            assert_eq!(&body[member], value, "{name}: {body}");
        }
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 0);
    assert_eq!(api.count(), 0);
}

#[actix_rt::test]
async fn a_batch_has_a_key_for_each_event_and_the_same_event_twice_is_one_record() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, _, body) = batched(&["b", "a", "b"].map(event)).send(&node).await;
    let receipts = ["b", "a", "b"].map(|id| json!({"id": format!("/cases|{id}"), "path": "GRPC"}));
    let expected = json!({"accepted": 3, "records": receipts});
    assert_eq!((status, body), (StatusCode::ACCEPTED, expected));
    assert_eq!(batched(&[]).send(&node).await.0, StatusCode::ACCEPTED);

    // Batches with the same events in other orders do not wait for each other.
    let orders = [["c", "d", "e"], ["e", "d", "c"], ["d", "c", "e"]];
    let racers = (0..24).map(|round| batched(&orders[round % 3].map(event)).send(&node));
    let racers: Vec<_> = racers.collect();
    let ended = tokio::time::timeout(PATIENCE, futures_util::future::join_all(racers));
    for (status, _, body) in ended.await.expect("none waits for ever") {
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 5);
    assert_eq!(api.count(), 5);
}

#[actix_rt::test]
async fn rules_read_the_attributes_of_each_event_in_every_form() {
    let file = rules(
        r#"
        [[routes]]
        when = { header = "ce-subject", equals = "é 😀 %20 \"" }
        api = "special"
        [apis.special]
        url = "http://127.0.0.1:9/"
        "#,
    );
    let other = Api::start();
    let api = Api::start();
    let variables = [
        grpc_variables(),
        vec![("APIS__SPECIAL__URL".to_owned(), other.url())],
    ]
    .concat();
    let node = Node::start_with_config(&api.url(), &variables, file.path()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let subject = "é 😀 %20 \"";
    let coded = "%C3%A9%20%F0%9F%98%80%20%2520%20%22";
    let special = |id| with(event(id), "subject", json!(subject));
    // The header of a structured event is none of its attributes.
    let misled = structured(&event("0")).with("ce-subject", coded);
    let requests = [
        misled,
        structured(&special("1")),
        binary(&headers("2", &[("ce-subject", Some(coded))])),
        batched(&[special("3"), event("4")]),
    ];
    for request in requests {
        let (status, _, body) = request.send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    }
    node.at_rest(PATIENCE).await;
    let keys = |api: &Api| {
        let mut keys: Vec<_> = api
            .posts()
            .into_iter()
            .filter_map(|post| post.key)
            .collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&other), ["/cases|1", "/cases|2", "/cases|3"]);
    assert_eq!(keys(&api), ["/cases|0", "/cases|4"]);
}

#[actix_rt::test]
async fn a_node_that_wants_keys_takes_events_and_keyed_records_alone() {
    let api = Api::start();
    let required = ("INGEST__REQUIRE_KEY".to_owned(), "true".to_owned());
    let variables = [grpc_variables(), vec![required]].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let lines = || post(RECORD).with("Content-Type", "application/x-ndjson");
    for request in [post(RECORD), post("[]"), lines()] {
        let (status, _, body) = request.send(&node).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(body["type"], "urn:waypost:problem:idempotency-key");
    }
    let requests = [
        post(RECORD).with("Idempotency-Key", "a"),
        lines().with("Idempotency-Key", "b"),
        structured(&event("1")),
        binary(&headers("2", &[])),
        batched(&[event("3")]),
    ];
    for request in requests {
        let (status, _, body) = request.send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 5);
}

/// A node whose API gets events in this form, in batches of up to `batch`.
async fn node_with(api: &Api, form: &str, batch: &str) -> Node {
    let keys = [("API__CLOUDEVENTS", form), ("API__BATCH", batch)];
    let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let variables = [grpc_variables(), keys.to_vec()].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

/// An event with attributes that need codes in headers, and of each type.
fn full(id: &str) -> Value {
    let event = with(event(id), "subject", json!("é 😀 % \" &="));
    let event = with(event, "urgent", json!(true));
    with(with(event, "level", json!(-7)), "path", json!("mine"))
}

fn header_of<'p>(post: &'p Post, name: &str) -> Option<&'p str> {
    post.event.get(name).map(String::as_str)
}

#[actix_rt::test]
async fn an_api_gets_binary_events_with_the_attributes_that_came_and_the_path() {
    let api = Api::start();
    let node = node_with(&api, "binary", "1").await;
    assert_eq!(
        structured(&full("7")).send(&node).await.0,
        StatusCode::ACCEPTED
    );
    api.wait_for(1, PATIENCE).await;
    let post = &api.posts()[0];
    let expected = [
        ("ce-id", "7"),
        ("ce-level", "-7"),
        ("ce-path", "GRPC"),
        ("ce-source", "/cases"),
        ("ce-specversion", "1.0"),
        ("ce-subject", "%C3%A9%20%F0%9F%98%80%20%25%20%22%20&="),
        ("ce-type", "org.example.case"),
        ("ce-urgent", "true"),
    ];
    let sent: Vec<_> = post
        .event
        .iter()
        .map(|(name, value)| (&**name, &**value))
        .collect();
    assert_eq!(sent, expected);
    assert_eq!(post.content_type.as_deref(), Some("application/json"));
    assert_eq!(post.key.as_deref(), Some("/cases|7"));
    let data: Value = serde_json::from_slice(&post.body).expect("JSON");
    assert_eq!(data, full("7")["data"], "the data has no path");

    // A record that was no event.
    let record = format!(" {RECORD}\n");
    let (_, _, receipt) = self::post(record)
        .with("Idempotency-Key", "k")
        .send(&node)
        .await;
    assert_eq!(receipt["id"], "k");
    api.wait_for(2, PATIENCE).await;
    let post = &api.posts()[1];
    let named = ["ce-id", "ce-source", "ce-type", "ce-path"].map(|name| header_of(post, name));
    let expected = ["k", "urn:waypost:ingest", "waypost.record", "GRPC"].map(Some);
    assert_eq!(named, expected);
    assert!(header_of(post, "ce-time").is_some());
    assert_eq!(post.body, RECORD);

    // The type of the data goes with it.
    let typed = headers("8", &[])
        .into_iter()
        .fold(self::post(RECORD), |request, (name, value)| {
            request.with(name, value)
        });
    let media_type = "application/vnd.case+json; charset=utf-8";
    typed.with("Content-Type", media_type).send(&node).await;
    api.wait_for(3, PATIENCE).await;
    assert_eq!(api.posts()[2].content_type.as_deref(), Some(media_type));
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn an_api_gets_structured_events_one_by_one_or_in_batches() {
    for (batch, media_type) in [
        ("1", "application/cloudevents+json; charset=utf-8"),
        ("100", "application/cloudevents-batch+json; charset=utf-8"),
    ] {
        let api = Api::start();
        let node = node_with(&api, "structured", batch).await;
        let (status, _, body) = batched(&[full("1"), full("2")]).send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        node.at_rest(PATIENCE).await;
        let mut events = Vec::new();
        for post in api.posts() {
            assert_eq!(post.content_type.as_deref(), Some(media_type));
            assert!(post.event.is_empty());
            match serde_json::from_slice(&post.body).expect("JSON") {
                Value::Array(all) => events.extend(all),
                one => events.push(one),
            }
        }
        events.sort_by_key(|event| event["id"].to_string());
        let expected = ["1", "2"].map(|id| {
            let event = with(full(id), "path", json!("GRPC"));
            with(event, "datacontenttype", json!("application/json"))
        });
        assert_eq!(events, expected);
    }
}

#[actix_rt::test]
async fn an_event_keeps_its_attributes_on_disk_through_retries_and_as_a_dead_letter() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let mut node = node_with(&api, "structured", "1").await;
    structured(&full("1")).send(&node).await;
    let dead = async || node.dead().await.into_iter().next();
    let id = eventually("a dead letter", PATIENCE, dead).await;
    assert_eq!(id, "/cases|1");
    api.behave(|_, _| Conduct::Answer(200));
    node.killed_and_started().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, answer) = node.tell("/api/dead/replay", json!({"all": true})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    api.wait_for(2, PATIENCE).await;
    let posts = api.posts();
    let sent: Value = serde_json::from_slice(&posts[1].body).expect("JSON");
    assert_eq!(sent["subject"], full("1")["subject"]);
    assert_eq!(posts[0].body, posts[1].body);
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn another_node_takes_the_events_that_a_node_posts() {
    let api = Api::start();
    for mode in ["binary", "structured"] {
        let last = node_with(&api, "structured", "1").await;
        let url = format!("http://127.0.0.1:{}/", last.ingest);
        let mode = ("API__CLOUDEVENTS".to_owned(), mode.to_owned());
        let variables: Vec<_> = grpc_variables().into_iter().chain([mode]).collect();
        let first = Node::start(&url, &variables).await;
        first.lane_is("grpc", "up", PATIENCE).await;
        let before = api.count();
        assert_eq!(
            structured(&full("1")).send(&first).await.0,
            StatusCode::ACCEPTED
        );
        api.wait_for(before + 1, PATIENCE).await;
        first.at_rest(PATIENCE).await;
        // As many attributes as there may be, and a name as long as it may be.
        let names = (0..59)
            .map(|number| format!("x{number}"))
            .chain(["n".repeat(253)]);
        let most = names.fold(event("2"), |event, name| with(event, &name, json!("1")));
        assert_eq!(structured(&most).send(&first).await.0, StatusCode::ACCEPTED);
        api.wait_for(before + 2, PATIENCE).await;
        let ledger = first.at_rest(PATIENCE).await;
        assert_eq!(ledger["dead"], 0, "{ledger}");
        let posts = api.posts();
        let post = posts[before..]
            .iter()
            .find(|post| post.key.as_deref() == Some("/cases|1"));
        let post = post.expect("the first event");
        let sent: Value = serde_json::from_slice(&post.body).expect("JSON");
        assert_eq!(sent["subject"], full("1")["subject"]);
        assert_eq!(sent["data"], full("1")["data"]);
        assert_eq!(post.key.as_deref(), Some("/cases|1"));
    }
}
