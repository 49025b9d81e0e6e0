//! `GET /openapi.json` of both sides: it is OpenAPI, what the node answers is in it, and a fuzzer of
//! another language, `schemathesis`, finds no false statement.

mod schemathesis;
mod side;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use serde_json::Value;

use self::side::{Asked, Side};
use crate::{
    ingest::RECORD,
    support::{
        api::{Api, Conduct},
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
    tokens::file,
};

const EVENT: &str = r#"{"specversion":"1.0","id":"1","source":"/a","type":"t","data":{"name":"a","location":"b","age":1,"infectedtype":"","state":"s"}}"#;

/// The answer to a client that sends these bytes and then waits.
fn raw(port: u16, bytes: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
        .write_all(bytes.as_bytes())
        .expect("room in the socket");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.rsplit_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).expect("a status");
    (
        status.parse().expect("a number"),
        serde_json::from_str(body).expect("JSON"),
    )
}

const JSON: (&str, &str) = ("Content-Type", "application/json");

#[actix_rt::test]
async fn each_answer_to_a_client_is_in_the_document() {
    let api = Api::start();
    let keys = [
        ("INGEST__HEADER_TIMEOUT", "1s"),
        ("INGEST__MAX_RECORD", "1KiB"),
    ];
    let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let node = Node::start(&api.url(), &[grpc_variables(), keys.to_vec()].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut side = Side::new(node.ingest, &[]).await;
    side.is_valid();
    for path in ["/", "/schema", "/openapi.json"] {
        for method in ["GET", "HEAD"] {
            let asked = Asked {
                method,
                path,
                of: path,
                headers: &[],
                body: "",
                status: 200,
            };
            side.ask(asked).await;
        }
    }
    let large = format!("[{}]", vec![RECORD; 1025].join(","));
    let lines = format!("{RECORD}\n{RECORD}");
    let event = ("Content-Type", "application/cloudevents+json");
    let batch = ("Content-Type", "application/cloudevents-batch+json");
    let events = format!("[{EVENT}]");
    for (path, of) in [("/", "/"), ("/grpc", "/{lane}")] {
        for (headers, body, status) in [
            (&[JSON][..], RECORD, 202),
            (&[], RECORD, 202),
            (&[JSON], "[]", 202),
            (&[("Content-Type", "application/x-ndjson")], &lines, 202),
            (&[("Content-Type", "application/jsonl")], &lines, 202),
            (&[event], EVENT, 202),
            (&[batch], &events, 202),
            (&[JSON, ("Idempotency-Key", "\"k\"")], RECORD, 202),
            (&[JSON, ("Idempotency-Key", "k")], RECORD, 202),
            (
                &[JSON, ("Idempotency-Key", "k")],
                "{\"name\":\"b\",\"location\":\"b\",\"age\":1,\"infectedtype\":\"\",\"state\":\"\"}",
                422,
            ),
            (&[JSON, ("Idempotency-Key", "a b")], RECORD, 400),
            (&[JSON], "{", 400),
            (&[JSON], "{}", 422),
            (&[event], "{}", 400),
            (&[JSON, ("Content-Encoding", "gzip")], "{}", 400),
            (&[JSON, ("Content-Encoding", "br")], "{}", 415),
            (&[("Content-Type", "text/plain")], RECORD, 415),
            (&[JSON], &large, 413),
        ] {
            side.ask(Asked {
                method: "POST",
                path,
                of,
                headers,
                body,
                status,
            })
            .await;
        }
    }
    let none = Asked {
        method: "POST",
        path: "/nats",
        of: "/{lane}",
        headers: &[],
        body: RECORD,
        status: 404,
    };
    side.ask(none).await;
    let many: Vec<_> = (0..97).map(|at| format!("x-{at}: 1\r\n")).collect();
    for (lines, kind) in [
        ("nonsense\r\n\r\n", "request"),
        ("x: half", "slow"),
        (&format!("{}\r\n", many.concat()), "large-head"),
    ] {
        let (status, problem) = raw(
            node.ingest,
            &format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}"),
        );
        let told = &side.document["paths"]["/"]["post"]["responses"][status.to_string()];
        let told = &told["content"]["application/problem+json"]["schema"];
        side.fits(told, &problem, kind);
        side.seen.insert(("/".into(), status, kind.into()));
        side.seen.insert(("/{lane}".into(), status, kind.into()));
    }
    // `bodies` and `promise` see these two: a body that breaks off, and no place for a record.
    let others = [(400, "body".to_owned()), (503, "unavailable".to_owned())];
    for path in ["/", "/{lane}"] {
        let mut seen = side.seen(path);
        seen.extend(others.clone());
        assert_eq!(seen, side.told(path), "{path}");
    }
}

#[actix_rt::test]
async fn each_answer_to_an_operator_is_in_the_document() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (_, receipt) = node
        .post("/", "key-1", RECORD.into())
        .await
        .expect("an answer");
    assert_eq!(receipt["id"], "key-1");
    node.all_ended(1, PATIENCE).await;
    let mut side = Side::new(node.admin, &[]).await;
    side.is_valid();
    let reads = [
        "/",
        "/page.css",
        "/page.js",
        "/healthz",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/api/status",
        "/api/history",
        "/api/history?range=1h",
        "/api/explain?id=key-1",
        "/api/dead",
        "/api/dead?parked=true",
    ];
    for path in reads {
        for method in ["GET", "HEAD"] {
            let of = path.split('?').next().expect("a path");
            side.ask(Asked {
                method,
                path,
                of,
                headers: &[],
                body: "",
                status: 200,
            })
            .await;
        }
    }
    let foreign = ("Origin", "http://evil.example.com");
    for (path, of, headers, status) in [
        ("/api/explain?id=none", "/api/explain", &[][..], 404),
        ("/api/explain", "/api/explain", &[], 400),
        ("/api/dead?limit=x", "/api/dead", &[], 400),
        ("/api/history?range=1d", "/api/history", &[], 400),
        ("/api/events?after=a&after=b", "/api/events", &[], 400),
        ("/api/tap?sample=0", "/api/tap", &[], 400),
        ("/api/tap?lane=nats", "/api/tap", &[], 404),
        ("/page.js", "/page.js", &[("If-None-Match", "*")], 304),
        ("/api/dead?api=none", "/api/dead", &[], 400),
        ("/api/status", "/api/status", &[foreign], 403),
        ("/", "/", &[foreign], 403),
        ("/openapi.json", "/openapi.json", &[foreign], 403),
    ] {
        side.ask(Asked {
            method: "GET",
            path,
            of,
            headers,
            body: "",
            status,
        })
        .await;
    }
    let (lane, all) = ("/api/lanes/{lane}/{action}", "/api/lanes/{action}");
    for (path, of, body, status) in [
        ("/api/lanes/grpc/pause", lane, "{}", 202),
        ("/api/lanes/grpc/resume", lane, "{}", 202),
        ("/api/lanes/grpc/dance", lane, "{}", 404),
        ("/api/lanes/nats/pause", lane, "{}", 404),
        ("/api/lanes/grpc/pause", lane, "[]", 400),
        ("/api/lanes/pause", all, "{}", 202),
        ("/api/lanes/resume", all, "{}", 202),
        ("/api/lanes/dance", all, "{}", 404),
        (
            "/api/lanes/grpc/weight",
            "/api/lanes/{lane}/weight",
            "{\"weight\":3}",
            200,
        ),
        (
            "/api/lanes/grpc/weight",
            "/api/lanes/{lane}/weight",
            "{\"weight\":1001}",
            400,
        ),
        (
            "/api/lanes/nats/weight",
            "/api/lanes/{lane}/weight",
            "{\"weight\":1}",
            404,
        ),
        ("/api/reload", "/api/reload", "{}", 200),
        ("/api/dead/replay", "/api/dead/replay", "{\"ids\":[]}", 200),
        ("/api/dead/replay", "/api/dead/replay", "{}", 400),
        ("/api/dead/drop", "/api/dead/drop", "{\"all\":true}", 200),
        ("/api/dead/drop", "/api/dead/drop", "{\"all\":1}", 400),
    ] {
        side.ask(Asked {
            method: "POST",
            path,
            of,
            headers: &[JSON],
            body,
            status,
        })
        .await;
        let foreign = [JSON, foreign];
        side.ask(Asked {
            method: "POST",
            path,
            of,
            headers: &foreign,
            body,
            status: 403,
        })
        .await;
        side.ask(Asked {
            method: "POST",
            path,
            of,
            headers: &[],
            body,
            status: 415,
        })
        .await;
    }
}

#[actix_rt::test]
async fn each_answer_to_one_who_may_not_ask_is_in_the_document() {
    let (api, tokens) = (Api::start(), file("token"));
    let path = tokens.path().display().to_string();
    let keys = [
        ("INGEST__TOKENS_FILE", &*path),
        ("INGEST__RATE", "4/h"),
        ("INGEST__REQUIRE_KEY", "true"),
        ("ADMIN__TOKEN_FILE", &path),
        ("ADMIN__READ_ONLY", "true"),
    ];
    let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let node = Node::start(&api.url(), &[grpc_variables(), keys.to_vec()].concat()).await;
    let token = ("Authorization", "Bearer token");
    let mut side = Side::new(node.ingest, &[token]).await;
    side.is_valid();
    let key = ("Idempotency-Key", "key");
    for (method, headers, body, status) in [
        ("GET", &[][..], "", 200),
        ("POST", &[JSON], RECORD, 401),
        ("POST", &[token, JSON], RECORD, 400),
        ("POST", &[token, JSON, key], "{", 400),
        ("POST", &[token, JSON, key], RECORD, 202),
        ("POST", &[token, JSON, key], RECORD, 429),
    ] {
        side.ask(Asked {
            method,
            path: "/",
            of: "/",
            headers,
            body,
            status,
        })
        .await;
    }
    let mut side = Side::new(node.admin, &[token]).await;
    side.is_valid();
    for (method, path, headers, status) in [
        ("GET", "/healthz", &[][..], 200),
        ("GET", "/api/status", &[], 401),
        ("HEAD", "/metrics", &[], 401),
        ("GET", "/openapi.json", &[], 401),
        ("GET", "/api/status", &[token], 200),
        ("POST", "/api/reload", &[token, JSON], 403),
    ] {
        side.ask(Asked {
            method,
            path,
            of: path,
            headers,
            body: "",
            status,
        })
        .await;
    }
}
