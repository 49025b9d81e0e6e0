//! HTTP/2 over TLS at the ingest side: the same answers as HTTP/1.1, and bounds of its own.

pub mod client;
mod floods;

use std::{process::Command, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use h2::Reason;
use http::{Request, StatusCode, request::Builder};
use rustls::version::TLS13;
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::Mutex, time::timeout};

use self::client::{Answer, Http2Connection};
use crate::{
    ingest::RECORD,
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        missing,
        node::{Node, PATIENCE},
        tls::Authority,
    },
    tls::{Files, client_tls},
    tokens::file,
};

type Variables = Vec<(String, String)>;

/// A node that speaks TLS at the ingest side, and who signed its certificate.
struct TlsNode {
    node: Node,
    authority: Authority,
    /// They are gone with it.
    _files: Files,
}

impl TlsNode {
    /// `None` if a certificate cannot be made here.
    async fn start(api: &str, limits: &[(&str, &str)], fault: &str) -> Option<Self> {
        let authority = Authority::new()?;
        let files = Files::new(&authority);
        let limits = limits
            .iter()
            .map(|(key, value)| (format!("INGEST__{key}"), (*value).to_owned()));
        let variables: Variables = grpc_variables()
            .into_iter()
            .chain(files.variables("INGEST"))
            .chain(limits)
            .collect();
        let node = Node::start_with_fault(api, &variables, fault).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        Some(Self {
            node,
            authority,
            _files: files,
        })
    }

    async fn connect(&self) -> Http2Connection {
        let tls = client_tls(&self.authority, None, &[&TLS13], &["h2", "http/1.1"]);
        Http2Connection::open(self.node.ingest, tls).await
    }
}

fn to(path: &str) -> Builder {
    let uri = format!("https://localhost{path}");
    Request::builder().method("POST").uri(uri)
}

fn record() -> Builder {
    to("/").header("content-type", "application/json")
}

fn json_of(body: &Bytes) -> Value {
    serde_json::from_slice(body).unwrap_or_else(|_| panic!("no JSON: {body:?}"))
}

#[actix_rt::test]
async fn records_come_over_http2() {
    let api = Api::start();
    let Some(tls) = TlsNode::start(&api.url(), &[], "").await else {
        return;
    };
    let mut connection = tls.connect().await;
    let answer = connection.ask(record(), RECORD).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    assert_eq!(json_of(&answer.body)["path"], "GRPC");
    let length = answer.body.len().to_string();
    assert_eq!(answer.headers["content-length"], length);
    assert!(answer.headers.contains_key("date"));
    // All streams of a connection at a time, each with a body of some size.
    let lines = vec![RECORD; 1000].join("\n");
    let many = (0..16).map(|_| {
        let request = to("/").header("content-type", "application/x-ndjson");
        connection.begin(request, Some(lines.clone().into()))
    });
    let many: Vec<_> = many.collect();
    for answer in many {
        let answer = answer.await.expect("an answer");
        assert_eq!(answer.status, StatusCode::ACCEPTED);
        assert_eq!(json_of(&answer.body)["accepted"], 1000);
    }
    for method in ["GET", "HEAD"] {
        let answer = connection.begin(to("/").method(method), None).await;
        let Answer { status, body, .. } = answer.expect("an answer");
        assert_eq!(status, StatusCode::OK);
        let expected = if method == "GET" {
            r#"{"message":"ok"}"#
        } else {
            ""
        };
        assert_eq!(body, expected);
    }
    let (waits, answer) = connection.ask_and_wait(record(), RECORD).await;
    assert!(waits, "it is asked for its body");
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let (waits, answer) = connection.ask_and_wait(to("/pigeon"), RECORD).await;
    assert!(!waits, "nobody wants its body");
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    tls.node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 16_002);
}

#[actix_rt::test]
async fn curl_speaks_it() {
    let api = Api::start();
    let Some(tls) = TlsNode::start(&api.url(), &[], "").await else {
        return;
    };
    let folder = TempDir::new().expect("a temporary folder");
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, tls.authority.cert()).expect("room");
    for (flag, version) in [("--http2", "2 202"), ("--http1.1", "1.1 202")] {
        let mut curl = Command::new("curl");
        curl.args([flag, "--silent", "--show-error", "--cacert"])
            .arg(&ca)
            .args(["--json", RECORD, "--output", "/dev/null"])
            .args(["--write-out", "%{http_version} %{http_code}"])
            .arg(format!("https://localhost:{}/", tls.node.ingest));
        let ended = tokio::task::spawn_blocking(move || curl.output());
        let Ok(output) = ended.await.expect("no panic") else {
            return missing("curl");
        };
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(told, version, "{output:?}");
    }
    tls.node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 2);
}

#[actix_rt::test]
async fn bad_requests_get_the_answers_of_http_1_1() {
    let api = Api::start();
    let limits = [
        ("BODY_TIMEOUT", "1s"),
        ("MAX_BODY", "64KiB"),
        ("MAX_RECORD", "32KiB"),
    ];
    let Some(tls) = TlsNode::start(&api.url(), &limits, "").await else {
        return;
    };
    let mut connection = tls.connect().await;
    let large = "x".repeat((64 << 10) + 1);
    let many = (0..97).fold(record(), |request, at| {
        request.header(format!("x-{at}"), "x")
    });
    let bytes = (0..40).fold(record(), |request, at| {
        request.header(format!("x-{at}"), "x".repeat(1000))
    });
    let long = record().header("x".repeat(300), "x");
    let length = RECORD.len();
    for (what, request, body, status, kind) in [
        ("no JSON", record(), "{]", 400, "json"),
        ("no field", record(), "{}", 422, "schema"),
        ("a lane", to("/pigeon"), RECORD, 404, "not-found"),
        ("a path", to("/a/b"), RECORD, 404, "not-found"),
        ("a method", to("/").method("PUT"), "", 405, "method"),
        ("a tunnel", to("/grpc").method("TRACE"), "", 405, "method"),
        (
            "a type",
            to("/").header("content-type", "text/plain"),
            RECORD,
            415,
            "media-type",
        ),
        (
            "a coding",
            record().header("content-encoding", "br"),
            RECORD,
            415,
            "encoding",
        ),
        ("a length", record(), &large, 413, "too-large"),
        (
            "a key",
            record().header("idempotency-key", ""),
            RECORD,
            400,
            "idempotency-key",
        ),
        ("a name", long, RECORD, 400, "request"),
        (
            "another host",
            record().header("host", "other"),
            RECORD,
            400,
            "request",
        ),
        (
            "another port",
            record().header("host", "localhost:1"),
            RECORD,
            400,
            "request",
        ),
        (
            "two hosts",
            record()
                .header("host", "localhost")
                .header("host", "localhost"),
            RECORD,
            400,
            "request",
        ),
        (
            "two lengths",
            record()
                .header("content-length", length)
                .header("content-length", length),
            RECORD,
            400,
            "request",
        ),
        (
            "two types",
            record().header("content-type", "text/plain"),
            RECORD,
            400,
            "request",
        ),
        ("headers", many, RECORD, 431, "large-head"),
    ] {
        // Some end their connection.
        if connection.is_over() {
            connection = tls.connect().await;
        }
        let answer = connection.ask(request, body).await;
        let answer = answer.unwrap_or_else(|why| panic!("{what}: {why}"));
        assert_eq!(answer.status, status, "{what}");
        assert_eq!(
            answer.headers["content-type"], "application/problem+json",
            "{what}"
        );
        let problem = json_of(&answer.body);
        assert_eq!(
            problem["type"],
            format!("urn:waypost:problem:{kind}"),
            "{what}"
        );
        assert_eq!(problem["status"], status, "{what}");
    }
    // The library answers these, or resets the stream.
    let mut connection = tls.connect().await;
    let answer = connection.ask(bytes, RECORD).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let short = record().header("content-length", "1");
    let why = connection
        .ask(short, RECORD)
        .await
        .err()
        .expect("no answer");
    assert_eq!(why.reason(), Some(Reason::PROTOCOL_ERROR));
    let connection = tls.connect().await;
    let answer = connection.trickle(record()).await;
    assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(json_of(&answer.body)["type"], "urn:waypost:problem:slow");
    assert_eq!(tls.node.at_rest(PATIENCE).await["accepted"], 0);
}

#[actix_rt::test]
async fn a_client_without_a_token_keeps_no_connection() {
    let api = Api::start();
    let tokens = file("a-token");
    let path = tokens.path().display().to_string();
    // An idle connection would end by itself.
    let limits = [("TOKENS_FILE", &*path), ("KEEP_ALIVE", "10m")];
    let Some(tls) = TlsNode::start(&api.url(), &limits, "").await else {
        return;
    };
    let mut connection = tls.connect().await;
    for _ in 0..3 {
        let with_token = record().header("authorization", "Bearer a-token");
        let answer = connection.ask(with_token, RECORD).await;
        assert_eq!(answer.expect("an answer").status, StatusCode::ACCEPTED);
    }
    for request in [record(), to("/").method("GET")] {
        let mut connection = tls.connect().await;
        let is_health = request.method_ref().is_some_and(|method| method == "GET");
        let answer = connection.ask(request, "").await.expect("an answer");
        let expected = if is_health { 200 } else { 401 };
        assert_eq!(answer.status, expected);
        assert_eq!(answer.headers.contains_key("www-authenticate"), !is_health);
        // The client would keep it.
        eventually("it ends", PATIENCE, async || {
            connection.is_over().then_some(())
        })
        .await;
    }
    floods::an_answer_comes_before_the_end_of_its_connection(&tls).await;
    tls.node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 3);
}

#[actix_rt::test]
async fn a_stop_answers_what_is_under_way_and_takes_nothing_more() {
    let api = Api::start();
    let Some(mut tls) = TlsNode::start(&api.url(), &[("KEEP_ALIVE", "10m")], "").await else {
        return;
    };
    let mut idle = tls.connect().await;
    let answer = idle.ask(record(), RECORD).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let connection = tls.connect().await;
    let (answer, mut body) = connection.begin_body(record());
    body.send_data(Bytes::from_static(&RECORD.as_bytes()[..9]), false)
        .expect("room");
    // It is under way.
    connection.round_trip().await;
    tls.node.signal("TERM");
    // The client, too, may end it first.
    let ended = timeout(PATIENCE, idle.ended()).await;
    ended.expect("it ends").ok();
    body.send_data(Bytes::from_static(&RECORD.as_bytes()[9..]), true)
        .expect("room");
    let answer = answer.await.expect("an answer");
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let ended = timeout(PATIENCE, connection.ended()).await;
    ended.expect("it ends").ok();
    let status = tls.node.ended(Duration::from_secs(10)).await;
    assert!(status.success(), "{status}");
}

/// Sends a record until it has an answer, as a client does that knows what `REFUSED_STREAM` and `GOAWAY`
/// say: it was not read. The room that the client's rate has left, and how often it was refused.
async fn sent_at_last(tls: &TlsNode, connection: &Mutex<Http2Connection>) -> (u64, u64) {
    let mut refused = 0;
    loop {
        let begun = {
            let mut connection = connection.lock().await;
            if connection.is_over() {
                *connection = tls.connect().await;
            }
            connection.begin(record(), Some(RECORD.into()))
        };
        let why = match timeout(PATIENCE, begun).await.expect("an answer in time") {
            Ok(answer) => {
                assert_eq!(answer.status, StatusCode::ACCEPTED);
                let room = answer.headers["ratelimit"].to_str().expect("text");
                let (_, left) = room.split_once("r=").expect("what is left");
                return (left.parse().expect("a number"), refused);
            }
            Err(why) => why,
        };
        assert!(
            matches!(
                why.reason(),
                Some(Reason::REFUSED_STREAM | Reason::NO_ERROR)
            ),
            "{why}"
        );
        refused += 1;
    }
}

#[actix_rt::test]
async fn a_client_that_is_refused_streams_loses_no_record_and_pays_for_each_once() {
    const RECORDS: usize = 300;
    let api = Api::start();
    // A place beside the first one, for each thread.
    let limits = [("MAX_CONNECTIONS", "2"), ("RATE", "10000/h")];
    let Some(tls) = TlsNode::start(&api.url(), &limits, "").await else {
        return;
    };
    let connection = Mutex::new(tls.connect().await);
    // As many at a time as a connection may have streams.
    let sent: Vec<_> = stream::iter(0..RECORDS)
        .map(|_| sent_at_last(&tls, &connection))
        .buffer_unordered(100)
        .collect()
        .await;
    let refused: u64 = sent.iter().map(|(_, refused)| refused).sum();
    assert!(refused > 50, "there is room for all of them: {refused}");
    let left = sent.iter().map(|(left, _)| *left).min().expect("some");
    assert!(left >= 10_000 - RECORDS as u64, "{left} of 10000 are left");
    let ledger = tls.node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], RECORDS);
    assert_eq!(api.count(), RECORDS);
    let metric = r#"waypost_connections_ended_total{side="ingest",reason="streams_refused"}"#;
    assert_eq!(tls.node.metric(metric).await, "0");
}
