//! What the head of a request decides before its body is read: how often a client may ask, and how
//! large a head or a body may be.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use awc::http::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};

use crate::{
    ingest::{RECORD, post},
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
    tokens::{file, with_token},
};

fn variables(ingest: &[(&str, &str)]) -> Vec<(String, String)> {
    let own = ingest.iter();
    let own = own.map(|(key, value)| (format!("INGEST__{key}"), (*value).to_owned()));
    grpc_variables().into_iter().chain(own).collect()
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    let value = headers
        .get(name)
        .unwrap_or_else(|| panic!("no {name}: {headers:?}"));
    value.to_str().expect("text")
}

#[actix_rt::test]
async fn a_client_over_its_rate_is_told_when_it_has_room_and_has_it_then() {
    let api = Api::start();
    let node = Node::start(&api.url(), &variables(&[("RATE", "30/m")])).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut left = Vec::new();
    let refused = loop {
        let (status, headers, problem) = post(RECORD).send_and_see(&node).await;
        assert_eq!(text(&headers, "ratelimit-policy"), r#""client";q=30;w=60"#);
        if status == StatusCode::TOO_MANY_REQUESTS {
            break (headers, problem);
        }
        assert_eq!(status, StatusCode::ACCEPTED, "{problem}");
        left.push(text(&headers, "ratelimit").to_owned());
    };
    assert_eq!(left[0], r#""client";r=29"#);
    // Each two seconds there is room for one more.
    assert!((30..60).contains(&left.len()), "{left:?}");
    let (headers, problem) = refused;
    let wait = text(&headers, "retry-after");
    assert_eq!(
        text(&headers, "ratelimit"),
        format!(r#""client";r=0;t={wait}"#)
    );
    assert_eq!(
        problem["type"],
        "https://iana.org/assignments/http-problem-types#quota-exceeded"
    );
    assert_eq!(problem["status"], 429);
    assert_eq!(problem["violated-policies"], json!(["client"]));
    // A refused request of whatever kind is refused so, and the health is told.
    for request in [
        post("{]"),
        post(RECORD).to("/pigeon"),
        post(vec![b' '; 2 << 20]),
    ] {
        let (status, _, problem) = request.send_and_see(&node).await;
        assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{problem}");
    }
    for _ in 0..40 {
        let (status, _, _) = post("").by(Method::GET).send(&node).await;
        assert_eq!(status, StatusCode::OK);
    }
    tokio::time::sleep(Duration::from_secs(wait.parse().expect("seconds"))).await;
    let (status, _, receipt) = post(RECORD).send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), left.len() + 1);
    assert!(
        node.log()
            .contains("requests are answered 429: [ingest].rate binds")
    );
    let count = r#"waypost_ingest_seconds_count{code="429"}"#;
    assert_eq!(node.metric(count).await, "4");
}

#[actix_rt::test]
async fn each_token_has_its_own_rate_and_guesses_have_one_too() {
    let (api, tokens) = (Api::start(), file("first\nsecond"));
    let path = tokens.path().display().to_string();
    let limits = variables(&[("RATE", "2/h"), ("TOKENS_FILE", &path)]);
    let node = Node::start(&api.url(), &limits).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (token, expected) in [
        ("first", 202),
        ("first", 202),
        ("first", 429),
        // The same token, however it is written.
        (" first ", 429),
        ("second", 202),
        ("guess", 401),
        ("another guess", 401),
        ("third guess", 429),
        ("second", 202),
        ("second", 429),
    ] {
        let (status, _, problem) = with_token(token).send(&node).await;
        assert_eq!(status, expected, "{token}: {problem}");
    }
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 4);
    assert!(!node.log().contains("first"), "{}", node.log());
}

/// The bytes that the node answers until it closes, or pauses for `pause`.
fn answer(stream: &mut TcpStream, pause: Duration) -> String {
    stream.set_read_timeout(Some(pause)).expect("a time-out");
    let mut answer = Vec::new();
    let mut some = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut some) {
        answer.extend_from_slice(&some[..length]);
    }
    String::from_utf8(answer).expect("text")
}

fn expecting(node: &Node, line: &str, fields: &str, length: usize) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", node.ingest)).expect("a connection");
    let expect = format!("Expect: 100-continue\r\nContent-Length: {length}");
    let head = format!("{line} HTTP/1.1\r\nHost: a\r\n{expect}\r\n{fields}\r\n");
    stream.write_all(head.as_bytes()).expect("room");
    stream
}

#[actix_rt::test]
async fn a_body_is_asked_for_only_if_the_head_does_not_decide() {
    let (api, tokens) = (Api::start(), file("token"));
    let path = tokens.path().display().to_string();
    let limits = variables(&[
        ("TOKENS_FILE", &path),
        ("MAX_HEADERS", "10"),
        ("RATE", "7/h"),
    ]);
    let node = Node::start(&api.url(), &limits).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let token = "Authorization: Bearer token\r\n";
    let many: Vec<_> = (0..10).map(|number| format!("x-{number}: 1\r\n")).collect();
    let with = |fields: &str| format!("{token}{fields}");
    for (line, fields, length, expected) in [
        ("POST /", String::new(), 10, 401),
        ("POST /pigeon", with(""), 10, 404),
        ("PUT /", with(""), 10, 405),
        ("POST /", with(""), 2 << 20, 413),
        ("POST /", with("Content-Type: text/plain\r\n"), 10, 415),
        ("POST /", with("Content-Encoding: br\r\n"), 10, 415),
        ("POST /", with("Idempotency-Key: é\r\n"), 10, 400),
        ("POST /", many.concat(), 10, 431),
    ] {
        let mut stream = expecting(&node, line, &fields, length);
        let answer = answer(&mut stream, PATIENCE);
        let status = format!("HTTP/1.1 {expected} ");
        assert!(answer.starts_with(&status), "{line} {fields}: {answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        let body = answer.split_once("\r\n\r\n").expect("a body").1;
        let problem: Value = serde_json::from_str(body).expect("one problem and nothing behind it");
        assert_eq!(problem["status"], expected, "{answer}");
    }
    // The head says nothing against it.
    let mut stream = expecting(&node, "POST /", token, RECORD.len());
    let mut asked = [0; 25];
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream.read_exact(&mut asked).expect("an answer");
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(RECORD.as_bytes()).expect("room");
    let answered = answer(&mut stream, Duration::from_secs(2));
    assert!(answered.starts_with("HTTP/1.1 202 "), "{answered}");
    // Its rate is used up.
    let mut stream = expecting(&node, "POST /", token, RECORD.len());
    let answered = answer(&mut stream, PATIENCE);
    assert!(answered.starts_with("HTTP/1.1 429 "), "{answered}");
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 1);
}
