//! Every answer of the HTTP side that the contract names, from a real node.

use std::collections::HashSet;

use awc::http::{
    Method, StatusCode,
    header::{self, HeaderMap},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::{
    api::Api,
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    traffic,
};

pub const RECORD: &str = r#"{"name":"Ñusta","location":"Cobán","age":42,"infectedtype":"imported","state":"symptomatic"}"#;

pub struct Request {
    method: Method,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

pub fn post(body: impl Into<Vec<u8>>) -> Request {
    Request {
        method: Method::POST,
        path: "/",
        headers: Vec::new(),
        body: body.into(),
    }
}

/// A request to `port` whose body is on its way: the end of it is not there. `head` has the request's
/// own lines.
pub async fn begun(port: u16, head: &str, body: &[u8], end: &[u8]) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).await;
    let mut stream = stream.expect("it listens");
    let length = body.len() + end.len();
    let head = format!(
        "{head}\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("room");
    stream.write_all(body).await.expect("room");
    stream
}

/// The answer to such a request once `end` is there.
pub async fn ended(mut stream: TcpStream, end: &[u8]) -> String {
    stream.write_all(end).await.expect("room");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

pub fn lines(body: &str) -> Request {
    post(body).with("Content-Type", "application/x-ndjson")
}

impl Request {
    pub fn to(mut self, path: &'static str) -> Self {
        self.path = path;
        self
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn by(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    pub fn map_body(mut self, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Self {
        self.body = change(self.body);
        self
    }

    /// Status, content type and body of the answer.
    pub async fn send(self, node: &Node) -> (StatusCode, String, Value) {
        let (status, headers, body) = self.send_and_see(node).await;
        let content_type = headers.get(header::CONTENT_TYPE);
        let content_type = content_type.map(|value| value.to_str().unwrap().to_owned());
        (status, content_type.unwrap_or_default(), body)
    }

    /// Status, headers and body of the answer.
    pub async fn send_and_see(self, node: &Node) -> (StatusCode, HeaderMap, Value) {
        let mut request = awc::Client::default().request(
            self.method,
            format!("http://127.0.0.1:{}{}", node.ingest, self.path),
        );
        for (name, value) in self.headers {
            request = request.append_header((name, value));
        }
        let mut answer = request.send_body(self.body).await.expect("an answer");
        let body = answer.body().await.expect("a body");
        (
            answer.status(),
            answer.headers().clone(),
            serde_json::from_slice(&body).unwrap_or(Value::Null),
        )
    }
}

/// Name, request, expected status, and a member of the expected answer.
type Case = (&'static str, Request, u16, (&'static str, Value));

/// Requests with a 2xx.
fn accepted() -> Vec<Case> {
    vec![
        ("a record", post(RECORD), 202, ("path", json!("GRPC"))),
        (
            "pinned to a lane",
            post(RECORD).to("/grpc"),
            202,
            ("path", json!("GRPC")),
        ),
        (
            "typed",
            post(RECORD).with("Content-Type", "application/json; charset=utf-8"),
            202,
            ("path", json!("GRPC")),
        ),
        (
            "typed +json",
            post(RECORD).with("Content-Type", "application/vnd.case+JSON"),
            202,
            ("path", json!("GRPC")),
        ),
        (
            "with a key",
            post(RECORD).with("Idempotency-Key", "k-1"),
            202,
            ("id", json!("k-1")),
        ),
        (
            "with a quoted key",
            post(RECORD).with("Idempotency-Key", r#""k\\\"2""#),
            202,
            ("id", json!(r#"k\"2"#)),
        ),
        (
            "with a long quoted key",
            post(RECORD).with("Idempotency-Key", format!("\"{}\"", "k".repeat(255))),
            202,
            ("id", json!("k".repeat(255))),
        ),
        (
            "with a quote in a bare key",
            post(RECORD).with("Idempotency-Key", r#"k"3"#),
            202,
            ("id", json!(r#"k"3"#)),
        ),
        (
            "without a content coding",
            post(RECORD).with("Content-Encoding", "Identity, IDENTITY"),
            202,
            ("path", json!("GRPC")),
        ),
        (
            "an age of minus zero",
            post(RECORD.replace("42", "-0")),
            202,
            ("path", json!("GRPC")),
        ),
        (
            "health",
            post("").by(Method::GET),
            200,
            ("message", json!("ok")),
        ),
        ("an empty batch", post("[]"), 202, ("accepted", json!(0))),
        (
            "NDJSON by another name",
            post(format!("{RECORD}\n")).with("Content-Type", "application/NDJSON; charset=utf-8"),
            202,
            ("accepted", json!(1)),
        ),
        (
            "JSON Lines",
            post(format!("{RECORD}\n")).with("Content-Type", "application/jsonl"),
            202,
            ("accepted", json!(1)),
        ),
        (
            "the schema",
            post("").by(Method::GET).to("/schema"),
            200,
            ("title", json!("case")),
        ),
    ]
}

/// Requests whose JSON or header is malformed.
fn malformed() -> Vec<Case> {
    vec![
        ("cut JSON", post("{\"name\":\n"), 400, ("line", json!(2))),
        ("no JSON", post(""), 400, ("line", json!(1))),
        (
            "not UTF-8",
            post(b"{\"a\":\"\xff\"}".to_vec()),
            400,
            ("column", json!(7)),
        ),
        (
            "two values",
            post(format!("{RECORD}{RECORD}")),
            400,
            ("line", json!(1)),
        ),
        (
            "an empty key",
            post(RECORD).with("Idempotency-Key", ""),
            400,
            ("status", json!(400)),
        ),
        (
            "a key with a space",
            post(RECORD).with("Idempotency-Key", "a b"),
            400,
            ("status", json!(400)),
        ),
        (
            "a long key",
            post(RECORD).with("Idempotency-Key", "k".repeat(256)),
            400,
            ("status", json!(400)),
        ),
        (
            "an empty quoted key",
            post(RECORD).with("Idempotency-Key", "\"\""),
            400,
            ("type", json!("urn:waypost:problem:idempotency-key")),
        ),
        (
            "a quoted key without an end",
            post(RECORD).with("Idempotency-Key", "\"k"),
            400,
            ("status", json!(400)),
        ),
        (
            "a quoted key whose end is escaped",
            post(RECORD).with("Idempotency-Key", r#""k\""#),
            400,
            ("status", json!(400)),
        ),
        (
            "a quoted key with an unknown escape",
            post(RECORD).with("Idempotency-Key", r#""k\n""#),
            400,
            ("status", json!(400)),
        ),
        (
            "a quoted key with more behind it",
            post(RECORD).with("Idempotency-Key", r#""k", "l""#),
            400,
            ("status", json!(400)),
        ),
        (
            "a quoted key with a space",
            post(RECORD).with("Idempotency-Key", r#""a b""#),
            400,
            ("status", json!(400)),
        ),
        (
            "two keys",
            post(RECORD)
                .with("Idempotency-Key", "a")
                .with("Idempotency-Key", "a"),
            400,
            ("status", json!(400)),
        ),
        (
            "a bad line in a batch",
            lines(&format!("{RECORD}\n\n{{]")),
            400,
            ("line", json!(3)),
        ),
    ]
}

/// Requests whose text is no JSON in a way that many programs let pass.
fn odd() -> Vec<Case> {
    vec![
        (
            "lines that are typed as JSON",
            post(format!("{RECORD}\n{RECORD}\n")),
            400,
            (
                "detail",
                json!(
                    "malformed JSON at line 2, column 1: another value; many records are an array, \
                     or lines of Content-Type application/x-ndjson"
                ),
            ),
        ),
        (
            "a byte order mark",
            post(format!("\u{feff}{RECORD}")),
            400,
            (
                "detail",
                json!(
                    "malformed JSON at line 1, column 1: a byte order mark (BOM), which is no part \
                     of JSON; send the text without it"
                ),
            ),
        ),
        (
            "a byte order mark before a line",
            lines(&format!("{RECORD}\n\u{feff}{RECORD}\n")),
            400,
            ("line", json!(2)),
        ),
        (
            "UTF-16",
            post(b"\xff\xfe{\0}\0".to_vec()),
            400,
            (
                "detail",
                json!(
                    "malformed JSON at line 1, column 1: a byte order mark (BOM) of UTF-16; JSON is \
                     UTF-8, without one"
                ),
            ),
        ),
        (
            "half of a surrogate pair",
            post(RECORD.replace("Cobán", "\\ud800")),
            400,
            ("type", json!("urn:waypost:problem:json")),
        ),
    ]
}

/// Requests to another route, by another method or of another type.
fn misdirected() -> Vec<Case> {
    vec![
        (
            "an unknown lane",
            post(RECORD).to("/pigeon"),
            404,
            ("status", json!(404)),
        ),
        (
            "a lane that is off",
            post(RECORD).to("/nats"),
            404,
            ("status", json!(404)),
        ),
        (
            "an unknown route",
            post(RECORD).to("/a/b"),
            404,
            ("status", json!(404)),
        ),
        (
            "another method",
            post(RECORD).by(Method::PUT),
            405,
            ("status", json!(405)),
        ),
        (
            "another method at a lane",
            post(RECORD).by(Method::DELETE).to("/grpc"),
            405,
            ("status", json!(405)),
        ),
        (
            "another method at the schema",
            post(RECORD).to("/schema"),
            405,
            ("status", json!(405)),
        ),
        (
            "another type",
            post(RECORD).with("Content-Type", "text/plain"),
            415,
            ("status", json!(415)),
        ),
        (
            "another content coding",
            post(RECORD).with("Content-Encoding", "br"),
            415,
            ("status", json!(415)),
        ),
        (
            "two content codings",
            post(RECORD)
                .with("Content-Encoding", "zstd")
                .with("Content-Encoding", "identity, GZIP"),
            415,
            ("status", json!(415)),
        ),
    ]
}

/// Requests beyond a limit.
fn too_large() -> Vec<Case> {
    vec![
        (
            "a large record",
            post(RECORD.replace("Cobán", &"x".repeat(256 << 10))),
            413,
            ("status", json!(413)),
        ),
        (
            "a large request",
            post(vec![b' '; (1 << 20) + 1]),
            413,
            ("status", json!(413)),
        ),
        (
            "a large batch",
            post(format!("[{}]", vec![RECORD; 1025].join(","))),
            413,
            ("status", json!(413)),
        ),
    ]
}

/// Records that the schema does not allow.
fn invalid() -> Vec<Case> {
    vec![
        (
            "a bad record in a batch",
            post(format!("[{RECORD},{{}}]")),
            422,
            ("index", json!(1)),
        ),
        (
            "an old patient",
            post(RECORD.replace("42", "151")),
            422,
            ("field", json!("/age")),
        ),
        (
            "an age that no float can hold",
            post(RECORD.replace("42", "1e400")),
            422,
            ("field", json!("/age")),
        ),
        (
            "a name that no float can hold",
            post(RECORD.replace("\"Ñusta\"", "-1e400")),
            422,
            ("field", json!("/name")),
        ),
        (
            "a missing field",
            post(RECORD.replace("location", "place")),
            422,
            ("field", json!("/location")),
        ),
        (
            "a name that is twice",
            post(RECORD.replacen('{', "{\"a\":{\"b\":1,\"b\":2},", 1)),
            422,
            ("field", json!("/a/b")),
        ),
        (
            "a path that is twice",
            post(RECORD.replacen('{', "{\"path\":1,\"path\":2,", 1)),
            422,
            ("field", json!("/path")),
        ),
        (
            "deep",
            post(RECORD.replacen(
                '{',
                &format!("{{\"a\":{}{},", "[".repeat(64), "]".repeat(64)),
                1,
            )),
            422,
            ("field", json!(format!("/a{}", "/0".repeat(63)))),
        ),
    ]
}

#[actix_rt::test]
async fn each_request_gets_the_answer_that_the_contract_names() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let cases = [
        accepted(),
        malformed(),
        odd(),
        misdirected(),
        too_large(),
        invalid(),
    ];
    for (name, request, status, member) in cases.into_iter().flatten() {
        let (got, content_type, body) = request.send(&node).await;
        assert_eq!(got.as_u16(), status, "{name}: {body}");
        assert_eq!(body[member.0], member.1, "{name}: {body}");
        if status >= 400 {
            assert_eq!(content_type, "application/problem+json", "{name}");
            for part in ["type", "title", "status", "detail"] {
                assert!(!body[part].is_null(), "{name}: no {part} in {body}");
            }
        }
    }

    // A refused record was not taken; an accepted one was delivered once.
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], 12);
    assert_eq!(api.count(), 12);
}

#[actix_rt::test]
async fn the_422_of_a_missing_field_names_the_schema_and_the_key_that_accepts_any_object() {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let without_location = RECORD.replace("location", "place");
    let (status, _, body) = post(without_location).send(&node).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    let detail = body["detail"].as_str().expect("a text");
    for part in [
        "location",
        "schema is `case`",
        "`[ingest].schema = \"any\"`",
    ] {
        assert!(detail.contains(part), "no {part} in {detail}");
    }
}

#[actix_rt::test]
async fn a_record_with_a_malformed_trace_context_is_taken_and_goes_without_it() {
    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let zero = "0".repeat(32);
    let (unknown, known) = (GOOD.replace("-01", "-fd"), GOOD);
    let cases: [(&[&str], bool); 7] = [
        (&[known], true),
        (&[&unknown], true),
        (&["nonsense"], false),
        (&["00-1-2-01"], false),
        (&[&format!("00-{zero}-00f067aa0ba902b7-01")], false),
        (&[&GOOD.to_uppercase()], false),
        (&[GOOD, GOOD], false),
    ];
    for (number, (lines, is_carried)) in cases.into_iter().enumerate() {
        let mut request = post(RECORD);
        for line in lines {
            request = request.with("traceparent", *line);
        }
        // Of two vendors, one a line.
        request = request.with("tracestate", "a=1 ").with("tracestate", "b=2");
        let (status, _, body) = request.send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{lines:?}: {body}");
        api.wait_for(number + 1, PATIENCE).await;
        let posted = api.posts()[number].traceparent.clone();
        assert_eq!(posted.as_deref(), is_carried.then_some(GOOD), "{lines:?}");
        let state = api.posts()[number].tracestate.clone();
        assert_eq!(
            state.as_deref(),
            is_carried.then_some("a=1,b=2"),
            "{lines:?}"
        );
    }
}

#[actix_rt::test]
async fn any_json_object_is_a_record_under_schema_any() {
    let api = Api::start();
    let variables = [
        grpc_variables(),
        vec![("INGEST__SCHEMA".into(), "any".into())],
    ]
    .concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, _, _) = post(r#" {"path":"mine","b":{"path":1}} "#)
        .send(&node)
        .await;
    assert_eq!(status, StatusCode::ACCEPTED);
    api.wait_for(1, PATIENCE).await;
    assert_eq!(api.posts()[0].body, r#"{"b":{"path":1},"path":"GRPC"}"#);
}

/// The address of a NATS server that is not there.
pub fn nobody() -> [(String, String); 1] {
    [(
        "LANES__NATS__URL".into(),
        format!("nats://127.0.0.1:{}", crate::support::process::free_port()),
    )]
}

#[actix_rt::test]
async fn no_lane_up_is_a_receipt_of_the_spool() {
    let node = Node::start("http://127.0.0.1:9/", &nobody()).await;
    let (status, body) = node
        .post("/", "a", traffic()[0].clone())
        .await
        .expect("an answer");
    assert_eq!(
        (status, &body),
        (StatusCode::ACCEPTED, &json!({"id": "a", "path": "spool"}))
    );
    assert_eq!(node.get("/readyz").await.unwrap().0, StatusCode::OK);
    let ledger = &node.status().await["ledger"];
    assert_eq!(
        (&ledger["accepted"], &ledger["spooled"]),
        (&json!(1), &json!(1))
    );
}

/// A disk is full or fails at the sync: no 2xx, and the node takes records again once the disk
/// works.
async fn a_disk_that_fails(fault: &str) {
    let mut node = Node::start_with_fault("http://127.0.0.1:9/", &nobody(), fault).await;
    assert_eq!(
        node.post("/", "a", traffic()[0].clone()).await.unwrap().0,
        StatusCode::ACCEPTED
    );
    let mut answer = awc::Client::default()
        .post(format!("http://127.0.0.1:{}/", node.ingest))
        .send_body(traffic()[0].clone())
        .await
        .expect("an answer");
    let body: Value = serde_json::from_slice(&answer.body().await.unwrap()).unwrap();
    assert_eq!(
        (answer.status(), &body["status"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!(503))
    );
    assert_eq!(answer.headers().get(header::RETRY_AFTER).unwrap(), "1");
    assert_eq!(node.get("/healthz").await.unwrap().0, StatusCode::OK);
    assert_eq!(node.status().await["ledger"]["accepted"], 1);
    eventually("the disk works again", PATIENCE, async || {
        let (status, _) = node.post("/", "b", traffic()[0].clone()).await?;
        (status == StatusCode::ACCEPTED).then_some(())
    })
    .await;
    eventually("the node is ready", PATIENCE, async || {
        (node.get("/readyz").await?.0 == StatusCode::OK).then_some(())
    })
    .await;
    assert_eq!(
        node.status().await["ledger"]["spooled"],
        2,
        "nothing of what was refused is there"
    );
    node.plant("");
    node.killed_and_started().await;
    assert_eq!(
        node.status().await["ledger"]["recovered"],
        2,
        "nor comes it back"
    );
}

#[actix_rt::test]
async fn a_full_disk_is_a_503_and_no_more() {
    a_disk_that_fails("spool-write=1*off->5*return->off").await;
}

#[actix_rt::test]
async fn a_failed_sync_is_a_503_and_no_more() {
    // The folder is synced before and after the file is made, then the first record is, and the
    // second is not, though it is written.
    a_disk_that_fails("spool-sync=3*off->5*return->off").await;
}

#[actix_rt::test]
async fn while_the_disk_fails_a_node_without_lanes_is_not_ready_and_one_with_lanes_is() {
    let node = Node::start_with_fault("http://127.0.0.1:9/", &nobody(), "spool-write=return").await;
    assert_eq!(
        node.post("/", "a", traffic()[0].clone()).await.unwrap().0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    assert_eq!(
        node.get("/readyz").await.unwrap().0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    let api = Api::start();
    let node = Node::start_with_fault(&api.url(), &grpc_variables(), "spool-write=return").await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["a", "b", "c"] {
        let (status, body) = node.post("/", key, traffic()[0].clone()).await.unwrap();
        assert_eq!(
            (status, &body["path"]),
            (StatusCode::ACCEPTED, &json!("GRPC"))
        );
    }
    assert_eq!(node.get("/readyz").await.unwrap().0, StatusCode::OK);
}

#[actix_rt::test]
async fn a_key_that_comes_again_gets_its_first_receipt_also_after_a_kill() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let record = || traffic()[0].clone();
    let first = node.post("/", "once", record()).await.unwrap();
    assert_eq!(
        (first.0, &first.1["path"]),
        (StatusCode::ACCEPTED, &json!("GRPC"))
    );
    assert_eq!(node.post("/", "once", record()).await.unwrap(), first);
    node.signal("KILL");
    node.ended(PATIENCE).await;
    node.start_again().await;
    assert_eq!(node.post("/", "once", record()).await.unwrap(), first);
    assert_eq!(
        node.at_rest(PATIENCE).await["accepted"],
        0,
        "nothing was routed again"
    );
    assert_eq!(api.count(), 1);
}

#[actix_rt::test]
async fn a_batch_has_a_receipt_for_each_of_its_records() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let text = traffic()[..200]
        .iter()
        .map(|record| String::from_utf8(record.to_vec()).unwrap())
        .collect::<Vec<_>>();
    let (array, rest) = text.split_at(100);
    let mut ids = HashSet::new();
    for request in [
        post(format!("[{}]", array.join(",\n"))),
        lines(&rest.join("\r\n")),
    ] {
        let (status, _, body) = request.send(&node).await;
        assert_eq!(
            (status, &body["accepted"]),
            (StatusCode::ACCEPTED, &json!(100)),
            "{body}"
        );
        for receipt in body["records"].as_array().unwrap() {
            assert_eq!(receipt["path"], "GRPC");
            ids.insert(receipt["id"].as_str().unwrap().to_owned());
        }
    }
    api.wait_for(200, PATIENCE).await;
    assert_eq!(api.taken().into_keys().collect::<HashSet<_>>(), ids);
    let bodies: HashSet<_> = api.posts().into_iter().map(|post| post.body).collect();
    let expected = text
        .iter()
        .map(|record| format!("{},\"path\":\"GRPC\"}}", record.strip_suffix('}').unwrap()));
    assert_eq!(bodies, expected.map(Into::into).collect(), "byte for byte");
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 200);
}

#[actix_rt::test]
async fn a_batch_that_comes_again_under_its_key_gets_its_first_receipts() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let batch = || post(format!("[{RECORD},{RECORD}]")).with("Idempotency-Key", "k");
    let (status, _, first) = batch().send(&node).await;
    let expected = ["k/0", "k/1"].map(|id| json!({"id": id, "path": "GRPC"}));
    assert_eq!(
        (status, &first),
        (
            StatusCode::ACCEPTED,
            &json!({"accepted": 2, "records": expected})
        )
    );
    assert_eq!(batch().send(&node).await.2, first);
    node.signal("KILL");
    node.ended(PATIENCE).await;
    node.start_again().await;
    assert_eq!(batch().send(&node).await.2, first);
    assert_eq!(
        node.at_rest(PATIENCE).await["accepted"],
        0,
        "nothing was routed again"
    );
    assert_eq!(api.count(), 2);
}

#[actix_rt::test]
async fn a_batch_of_which_one_record_is_not_safe_has_no_2xx() {
    let sizes = [
        ("SPOOL__MAX", "1MiB"),
        ("INGEST__MAX_BODY", "4MiB"),
        ("INGEST__MAX_RECORD", "2MiB"),
    ];
    let sizes = sizes.map(|(key, size)| (key.to_owned(), size.to_owned()));
    let node = Node::start(
        "http://127.0.0.1:9/",
        &[nobody().as_slice(), &sizes].concat(),
    )
    .await;
    let big = RECORD.replace("Cobán", &"x".repeat(1 << 20));
    let batch = || post(format!("[{RECORD},{big}]"));
    for request in [batch(), batch().with("Idempotency-Key", "k")] {
        let (status, _, body) = request.send(&node).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    }
    assert_eq!(post(RECORD).send(&node).await.0, StatusCode::ACCEPTED);
}

#[actix_rt::test]
async fn a_batch_that_no_lane_takes_is_safe_on_disk() {
    let node = Node::start("http://127.0.0.1:9/", &nobody()).await;
    let (status, _, body) = lines(&[RECORD; 3].join("\n")).send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    assert!(
        body["records"]
            .as_array()
            .unwrap()
            .iter()
            .all(|receipt| receipt["path"] == "spool"),
        "{body}"
    );
    assert_eq!(node.status().await["ledger"]["spooled"], 3);
}

/// As RFC 9110, 9.3.2 wants it.
#[actix_rt::test]
async fn a_head_has_the_length_that_a_get_has() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    for path in ["/", "/schema", "/openapi.json"] {
        let of = async |method| {
            let (status, headers, _) = post("").to(path).by(method).send_and_see(&node).await;
            (status, headers.get(header::CONTENT_LENGTH).cloned())
        };
        let of_get = of(Method::GET).await;
        assert!(of_get.1.is_some(), "{path}");
        assert_eq!(of(Method::HEAD).await, of_get, "{path}");
    }
}
