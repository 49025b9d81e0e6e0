//! The admin side and web pages of other sites: all routes, with all methods.

use std::slice;

use awc::http::{
    Method, StatusCode,
    header::{self, HeaderName},
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{
    api::Api,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
};

/// A route, the method of it, and for an order a body that it takes.
type Route = (&'static str, &'static str, Option<&'static str>);

/// Each comes to any host.
const PROBES: [Route; 3] = [
    ("GET", "/healthz", None),
    ("GET", "/readyz", None),
    ("GET", "/metrics", None),
];
const QUESTIONS: [Route; 3] = [
    ("GET", "/api/status", None),
    ("GET", "/api/explain?id=unknown", None),
    ("GET", "/api/dead?limit=1", None),
];
/// Their answers have no end.
const STREAMS: [Route; 2] = [("GET", "/api/events", None), ("GET", "/api/tap", None)];
const ORDERS: [Route; 12] = [
    ("POST", "/api/dead/replay", Some(r#"{"all":true}"#)),
    ("POST", "/api/dead/drop", Some(r#"{"ids":[]}"#)),
    ("POST", "/api/reload", Some("{}")),
    ("POST", "/api/lanes/pause", Some("{}")),
    ("POST", "/api/lanes/drain", Some("{}")),
    ("POST", "/api/lanes/resume", Some("{}")),
    ("POST", "/api/lanes/restart", Some("{}")),
    ("POST", "/api/lanes/grpc/pause", Some("{}")),
    ("POST", "/api/lanes/grpc/drain", Some("{}")),
    ("POST", "/api/lanes/grpc/resume", Some("{}")),
    ("POST", "/api/lanes/grpc/restart", Some("{}")),
    ("POST", "/api/lanes/grpc/weight", Some(r#"{"weight":7}"#)),
];
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
const JSON: (HeaderName, &str) = (header::CONTENT_TYPE, "application/json");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const CROSS_ORIGIN_RESOURCE_POLICY: HeaderName =
    HeaderName::from_static("cross-origin-resource-policy");

/// An answer of the admin side.
struct Answer {
    status: u16,
    headers: header::HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    /// It is a problem of that kind, and no page of another origin may read it.
    fn is_problem(&self, status: u16, kind: &str, what: &str) {
        let body = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{what}: {body}");
        self.is_closed(what);
        assert_eq!(
            self.headers.get(header::CONTENT_TYPE).expect("a type"),
            "application/problem+json",
            "{what}"
        );
        // An answer to HEAD has no body.
        if !self.body.is_empty() {
            let problem: Value = serde_json::from_slice(&self.body).expect("JSON");
            assert_eq!(
                problem["type"],
                format!("urn:waypost:problem:{kind}"),
                "{what}: {body}"
            );
        }
    }

    fn is_closed(&self, what: &str) {
        let allows = self
            .headers
            .keys()
            .find(|name| name.as_str().starts_with("access-control"));
        assert_eq!(allows, None, "{what}");
    }
}

async fn ask(node: &Node, (method, path, body): Route, headers: &[(HeaderName, &str)]) -> Answer {
    let method: Method = method.parse().expect("a method");
    let url = format!("http://127.0.0.1:{}{path}", node.admin);
    let client = awc::Client::builder().timeout(PATIENCE).finish();
    let mut request = client.request(method, url);
    for header in headers {
        request = request.insert_header(header.clone());
    }
    let sent = match body {
        Some(body) => request.send_body(body).await,
        None => request.send().await,
    };
    let mut answer = sent.unwrap_or_else(|why| panic!("{path}: {why}"));
    // A stream of events has no end.
    let body = timeout(PATIENCE, answer.body()).await;
    let body = body.unwrap_or_else(|_| panic!("{path}: a body without an end"));
    Answer {
        status: answer.status().as_u16(),
        headers: answer.headers().clone(),
        body: body.expect("a body").to_vec(),
    }
}

/// No order has had an effect.
async fn is_untouched(node: &Node) {
    let lane = node.lane("grpc").await;
    for (member, value) in [
        ("state", json!("up")),
        ("restarts", json!(0)),
        ("ordered", Value::Null),
        ("weight_set", Value::Null),
    ] {
        assert_eq!(lane[member], value, "{member}: {lane}");
    }
    assert_eq!(node.status().await["reload"], Value::Null);
}

#[actix_rt::test]
async fn a_foreign_page_can_neither_read_nor_give_an_order() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let origin = format!("http://127.0.0.1:{}", node.admin);
    let other_port = "http://127.0.0.1:1";
    for (header, kind, status) in [
        ((header::HOST, "evil.example.com"), "host", 421),
        ((header::ORIGIN, "https://evil.example.com"), "origin", 403),
        ((header::ORIGIN, other_port), "origin", 403),
        ((header::ORIGIN, "null"), "origin", 403),
        ((SEC_FETCH_SITE, "cross-site"), "origin", 403),
        ((SEC_FETCH_SITE, "same-site"), "origin", 403),
    ] {
        for route in QUESTIONS.into_iter().chain(STREAMS).chain(ORDERS) {
            let what = format!("{} {}, {header:?}", route.0, route.1);
            let answer = ask(&node, route, &[JSON, header.clone()]).await;
            answer.is_problem(status, kind, &what);
        }
        // The question of a browser before a page of another origin may send JSON.
        let preflight = ("OPTIONS", "/api/lanes/grpc/pause", None);
        let answer = ask(&node, preflight, slice::from_ref(&header)).await;
        answer.is_problem(status, kind, "preflight");
        for route in PROBES {
            let answer = ask(&node, route, slice::from_ref(&header)).await;
            assert_eq!(answer.status, 200, "{}, {header:?}", route.1);
            answer.is_closed(route.1);
        }
    }
    // A form of any page needs no such question.
    for content_type in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
    ] {
        for route in ORDERS {
            let header = content_type.map(|value| (header::CONTENT_TYPE, value));
            let answer = ask(&node, route, header.as_slice()).await;
            let what = format!("{}, {content_type:?}", route.1);
            answer.is_problem(415, "media-type", &what);
        }
    }
    is_untouched(&node).await;

    // The node's own page, a program, and an address bar.
    let own_page = [
        (header::ORIGIN, origin.as_str()),
        (SEC_FETCH_SITE, "same-origin"),
    ];
    for headers in [&own_page[..], &[(SEC_FETCH_SITE, "none")], &[]] {
        for route in QUESTIONS {
            let answer = ask(&node, route, headers).await;
            let expected = if route.1.contains("unknown") {
                404
            } else {
                200
            };
            assert_eq!(answer.status, expected, "{}, {headers:?}", route.1);
            let policy = answer.headers.get(CROSS_ORIGIN_RESOURCE_POLICY);
            assert_eq!(policy.expect("a policy"), "same-origin");
        }
        let headers = [headers, &[JSON]].concat();
        for route in ORDERS {
            let answer = ask(&node, route, &headers).await;
            assert!(
                (200..300).contains(&answer.status),
                "{}: {}",
                route.1,
                answer.status
            );
        }
    }
    assert_eq!(node.lane("grpc").await["weight"], 7);
}

#[actix_rt::test]
async fn each_error_of_the_admin_side_is_a_problem_and_each_405_has_allow() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let readable = PROBES.into_iter().chain(QUESTIONS).chain(STREAMS);
    for (_, path, body) in readable.chain(ORDERS) {
        let allowed = if body.is_some() { "POST" } else { "GET, HEAD" };
        let methods = METHODS.into_iter();
        for method in
            methods.filter(|method| !allowed.split(", ").any(|allowed| allowed == *method))
        {
            let what = format!("{method} {path}");
            let answer = ask(&node, (method, path, body), &[JSON]).await;
            answer.is_problem(405, "method", &what);
            let allow = answer.headers.get(header::ALLOW).expect("it is there");
            assert_eq!(allow, allowed, "{what}");
        }
        if body.is_none() {
            let answer = ask(&node, ("HEAD", path, None), &[]).await;
            let expected = if path.contains("unknown") { 404 } else { 200 };
            assert_eq!((answer.status, answer.body.len()), (expected, 0), "{path}");
        }
    }
    for (method, path, body, status, kind) in [
        ("GET", "/nothing", None, 404, "not-found"),
        ("GET", "/api", None, 404, "not-found"),
        ("GET", "/api/nothing", None, 404, "not-found"),
        (
            "POST",
            "/api/lanes/pigeon/pause",
            Some("{}"),
            404,
            "not-found",
        ),
        (
            "POST",
            "/api/lanes/nats/pause",
            Some("{}"),
            404,
            "not-found",
        ),
        (
            "POST",
            "/api/lanes/grpc/paint",
            Some("{}"),
            404,
            "not-found",
        ),
        ("POST", "/api/lanes/paint", Some("{}"), 404, "not-found"),
        ("POST", "/api/lanes/%ff/pause", Some("{}"), 404, "not-found"),
        ("GET", "/api/dead?limit=many", None, 400, "query"),
        ("GET", "/api/explain", None, 400, "query"),
        ("POST", "/api/dead/drop", Some("{}"), 400, "selection"),
        ("POST", "/api/dead/drop", Some("{]"), 400, "json"),
        // The members of the order without their names.
        (
            "POST",
            "/api/dead/drop",
            Some("[null,true,false]"),
            400,
            "json",
        ),
        ("POST", "/api/lanes/grpc/weight", Some("[7]"), 400, "json"),
        ("POST", "/api/lanes/grpc/pause", Some(""), 400, "json"),
        ("POST", "/api/lanes/grpc/pause", Some("[]"), 400, "json"),
        (
            "POST",
            "/api/lanes/grpc/pause",
            Some(r#"{"force":true}"#),
            400,
            "json",
        ),
        ("POST", "/api/lanes/pause", Some("1"), 400, "json"),
        ("POST", "/api/reload", Some(""), 400, "json"),
    ] {
        let answer = ask(&node, (method, path, body), &[JSON]).await;
        answer.is_problem(status, kind, &format!("{method} {path} {body:?}"));
    }
    let large = format!(r#"{{"ids":["{}"]}}"#, "a".repeat(3 << 20));
    let (status, problem) = node
        .tell(
            "/api/dead/drop",
            serde_json::from_str(&large).expect("JSON"),
        )
        .await;
    assert_eq!(
        (status, &problem["type"]),
        (
            StatusCode::PAYLOAD_TOO_LARGE,
            &json!("urn:waypost:problem:too-large")
        )
    );
    is_untouched(&node).await;
}

#[actix_rt::test]
async fn a_node_that_is_read_only_takes_no_order_and_a_named_host_is_no_stranger() {
    let api = Api::start();
    let settings = [
        ("ADMIN__READ_ONLY".to_owned(), "true".to_owned()),
        (
            "ADMIN__HOSTS".to_owned(),
            "waypost.example.com, .internal".to_owned(),
        ),
    ];
    let node = Node::start(&api.url(), &[grpc_variables(), settings.into()].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for route in ORDERS {
        let answer = ask(&node, route, &[JSON]).await;
        answer.is_problem(403, "read-only", route.1);
    }
    is_untouched(&node).await;
    for (host, status) in [
        ("waypost.example.com", 200),
        ("node-a.internal:8001", 200),
        ("evil.example.com", 421),
    ] {
        for route in PROBES.into_iter().chain([QUESTIONS[0]]) {
            let answer = ask(&node, route, &[(header::HOST, host)]).await;
            let expected = if route.1.starts_with("/api") {
                status
            } else {
                200
            };
            assert_eq!(answer.status, expected, "{host} {}", route.1);
        }
    }
    // A proxy that puts another host in the place of the one that the browser knows.
    let origin = (header::ORIGIN, "https://waypost.example.com");
    let same = (SEC_FETCH_SITE, "same-origin");
    let answer = ask(&node, QUESTIONS[0], &[origin, same]).await;
    assert_eq!(answer.status, 200);
}
