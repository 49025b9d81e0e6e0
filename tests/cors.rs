//! Web pages of other origins, as a browser asks for them.

use awc::http::{Method, StatusCode, header::HeaderName};

use crate::{
    ingest::{RECORD, Request, post},
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
    tokens::{file, with_token},
};

const NAMED: &str = "https://app.example.com";

/// The question of a browser before a page of `origin` may send a record.
fn question(origin: &str) -> Request {
    post("")
        .by(Method::OPTIONS)
        .with("Origin", origin)
        .with("Access-Control-Request-Method", "POST")
        .with(
            "Access-Control-Request-Headers",
            "authorization,content-type,ce-id",
        )
}

#[actix_rt::test]
async fn pages_of_named_origins_send_records_and_read_the_answers() {
    let (api, tokens) = (Api::start(), file("token"));
    let path = tokens.path().display().to_string();
    let origins = format!("https://other.example.com:8443,{NAMED}");
    let own = [("CORS_ORIGINS", origins), ("TOKENS_FILE", path)];
    let own = own.map(|(key, value)| (format!("INGEST__{key}"), value));
    let node = Node::start(&api.url(), &[&grpc_variables()[..], &own].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, headers, _) = question(NAMED).send_and_see(&node).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    for (name, value) in [
        ("access-control-allow-origin", NAMED),
        ("access-control-allow-methods", "GET, HEAD, POST"),
        (
            "access-control-allow-headers",
            "authorization,content-type,ce-id",
        ),
        ("vary", "Origin"),
    ] {
        assert_eq!(headers.get(name).expect(name), value);
    }
    assert!(!headers.contains_key("access-control-allow-credentials"));
    for (request, expected) in [
        (with_token("token"), StatusCode::ACCEPTED),
        (post(RECORD), StatusCode::UNAUTHORIZED),
        (with_token("token").to("/pigeon"), StatusCode::NOT_FOUND),
        (
            with_token("token").by(Method::OPTIONS),
            StatusCode::METHOD_NOT_ALLOWED,
        ),
    ] {
        let (status, headers, _) = request.with("Origin", NAMED).send_and_see(&node).await;
        assert_eq!(status, expected);
        assert_eq!(
            headers.get("access-control-allow-origin").expect("it"),
            NAMED
        );
        let exposed = headers.get("access-control-expose-headers").expect("some");
        assert!(exposed.to_str().expect("text").contains("Retry-After"));
    }
    for origin in [
        "http://app.example.com",
        "https://app.example.com:444",
        "https://app.example.com.evil.com",
        "https://other.example.com",
        "null",
    ] {
        let (status, headers, _) = question(origin).send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{origin}");
        assert!(
            !headers.contains_key("access-control-allow-origin"),
            "{origin}"
        );
        assert_eq!(headers.get("vary").expect("it varies"), "Origin");
        let request = with_token("token").with("Origin", origin);
        let (_, headers, _) = request.send_and_see(&node).await;
        assert_eq!(headers.get("vary").expect("it varies"), "Origin");
        assert!(
            !headers.contains_key("access-control-allow-origin"),
            "{origin}"
        );
    }
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 6);
}

#[actix_rt::test]
async fn without_a_named_origin_no_page_is_allowed_anything() {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let (status, headers, _) = question(NAMED).send_and_see(&node).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let get = post("").by(Method::GET).with("Origin", NAMED);
    let (_, of_answer, _) = get.send_and_see(&node).await;
    for headers in [headers, of_answer] {
        assert!(!headers.contains_key("vary"));
        let mut names = headers.keys().map(HeaderName::as_str);
        assert!(names.all(|name| !name.starts_with("access-control-")));
    }
}
