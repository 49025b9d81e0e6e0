//! Bodies that are compressed, slow or bombs, and the limits of connections.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    pin::pin,
    thread::sleep,
    time::Duration,
};

use awc::http::{Method, StatusCode, header};
use flate2::{Compression, write::GzEncoder};
use futures_util::future::select;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    bombs::bomb,
    ingest::{RECORD, begun, ended, lines, post},
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

pub fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).expect("a vector takes all");
    encoder.finish().expect("a vector takes all")
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 0).expect("a vector takes all")
}

#[actix_rt::test]
async fn a_compressed_record_reaches_the_api_as_it_was_before() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (first, last) = RECORD.as_bytes().split_at(20);
    let cases = [
        ("gzip", gzip(RECORD.as_bytes())),
        ("X-GZIP, identity", gzip(RECORD.as_bytes())),
        ("zstd", zstd(RECORD.as_bytes())),
        // Members and frames may follow each other (RFC 1952, 2.2; RFC 8878, 3.1).
        ("gzip", [gzip(first), gzip(last)].concat()),
        ("zstd", [zstd(first), zstd(last)].concat()),
    ];
    for (number, (coding, body)) in cases.into_iter().enumerate() {
        let key = format!("key-{number}");
        let request = post(body)
            .with("Content-Encoding", coding)
            .with("Idempotency-Key", &key);
        let (status, _, receipt) = request.send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{coding}: {receipt}");
        assert_eq!(receipt["id"], key);
    }
    let batch = lines(&format!("{RECORD}\n{RECORD}\n"));
    let batch = batch
        .with("Content-Encoding", "gzip")
        .map_body(|body| gzip(&body));
    let (_, _, receipt) = batch.send(&node).await;
    assert_eq!(receipt["accepted"], 2, "{receipt}");
    // The same record under the same key, whatever its coding.
    let again = post(RECORD).with("Idempotency-Key", "key-0");
    let (status, headers, _) = again.send_and_see(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(headers.get("Idempotent-Replayed").unwrap(), "true");

    node.at_rest(PATIENCE).await;
    let posts = api.posts();
    assert_eq!(posts.len(), 7);
    let tagged = RECORD.replace('}', ",\"path\":\"GRPC\"}");
    for post in posts {
        assert_eq!(post.body, tagged);
    }
}

#[actix_rt::test]
async fn a_body_that_is_not_what_its_coding_says_is_a_problem() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (coding, whole) in [
        ("gzip", gzip(RECORD.as_bytes())),
        ("zstd", zstd(RECORD.as_bytes())),
    ] {
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 0xff;
        let with_garbage = [&*whole, b"garbage"].concat();
        for (what, body) in [
            ("cut", whole[..whole.len() - 1].to_vec()),
            ("cut in its head", whole[..5].to_vec()),
            ("plain", RECORD.into()),
            ("damaged", damaged),
            ("with garbage", with_garbage),
        ] {
            let request = post(body).with("Content-Encoding", coding);
            let (status, _, problem) = request.send(&node).await;
            assert_eq!(
                status,
                StatusCode::BAD_REQUEST,
                "{what} {coding}: {problem}"
            );
            assert_eq!(
                problem["type"], "urn:waypost:problem:encoding",
                "{what} {coding}"
            );
        }
    }
    // Without a coding, it is no JSON.
    let (status, _, problem) = post(gzip(RECORD.as_bytes())).send(&node).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(problem["type"], "urn:waypost:problem:json");
    for codings in ["br", "gzip, gzip", "zstd, gzip", "aws-chunked"] {
        let request = post(RECORD).with("Content-Encoding", codings);
        let (status, headers, problem) = request.send_and_see(&node).await;
        assert_eq!(
            status,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "{codings}: {problem}"
        );
        assert_eq!(headers.get(header::ACCEPT_ENCODING).unwrap(), "gzip, zstd");
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 0);
}

#[actix_rt::test]
async fn a_bomb_is_refused_and_costs_no_memory() {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let just_fits = [&vec![b' '; (1 << 20) - RECORD.len()], RECORD.as_bytes()].concat();
    let (status, _, answer) = post(gzip(&just_fits))
        .with("Content-Encoding", "gzip")
        .send(&node)
        .await;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    let before = node.peak_memory();
    for (coding, body) in bomb(256 << 20) {
        assert!(body.len() < 1 << 20, "{coding}: {}", body.len());
        for _ in 0..20 {
            let (status, _, problem) = post(body.clone())
                .with("Content-Encoding", coding)
                .send(&node)
                .await;
            assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{coding}: {problem}");
        }
        // Of a stacked bomb, one layer is opened.
        let stacked = gzip(&body);
        let (status, _, problem) = post(stacked)
            .with("Content-Encoding", "gzip")
            .send(&node)
            .await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{coding}: {problem}");
    }
    // Some MiB are pages of the program itself, which it has not run before.
    let grown = node.peak_memory() - before;
    println!("the most memory grew by {grown} bytes");
    assert!(grown < 24 << 20, "{grown} bytes more");
}

/// The answer to a POST whose body has `length` bytes and comes in these pieces, each after a pause;
/// all until the server closes.
fn drip(port: u16, length: usize, pieces: Vec<Vec<u8>>, pause: Duration) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
    stream
        .write_all(head.as_bytes())
        .expect("room in the socket");
    for piece in pieces {
        sleep(pause);
        // The server may have closed already.
        if stream.write_all(&piece).is_err() {
            break;
        }
    }
    let mut answer = Vec::new();
    // A reset after the answer takes nothing of it.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("text")
}

async fn dripped(
    node: &Node,
    length: usize,
    pieces: Vec<Vec<u8>>,
    pause: Duration,
) -> (String, Value) {
    let port = node.ingest;
    let answer = tokio::task::spawn_blocking(move || drip(port, length, pieces, pause));
    let answer = answer.await.expect("it ends");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.to_owned(), serde_json::from_str(body).expect("JSON"))
}

#[actix_rt::test]
async fn a_body_that_comes_too_slowly_ends_and_one_that_goes_on_is_taken() {
    let api = Api::start();
    let limits = [
        ("INGEST__BODY_TIMEOUT", "500ms"),
        ("INGEST__MIN_BODY_RATE", "20B"),
    ];
    let limits = limits.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let node = Node::start(&api.url(), &[&grpc_variables()[..], &limits].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let pause = Duration::from_millis(100);
    let slow = [
        ("nothing of it", vec![]),
        ("a byte at a time", vec![vec![b' ']; 100]),
    ];
    for (what, pieces) in slow {
        let (head, problem) = dripped(&node, 1000, pieces, pause).await;
        assert!(head.starts_with("HTTP/1.1 408 "), "{what}: {head}");
        assert!(head.contains("\r\nconnection: close"), "{what}: {head}");
        assert_eq!(
            problem["type"], "urn:waypost:problem:slow",
            "{what}: {problem}"
        );
    }
    // 200 bytes a second, for longer than the time-out.
    let pieces: Vec<_> = RECORD.as_bytes().chunks(8).map(<[u8]>::to_vec).collect();
    assert!(pieces.len() > 8);
    let (head, receipt) = dripped(&node, RECORD.len(), pieces, pause).await;
    assert!(head.starts_with("HTTP/1.1 202 "), "{head}");
    assert_eq!(receipt["path"], json!("GRPC"));
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 1);
    let (status, _, _) = post("").by(Method::GET).send(&node).await;
    assert_eq!(status, StatusCode::OK);
}

/// A node whose connections may take an hour, with these limits.
async fn with_limits(limits: &[(&str, &str)]) -> Node {
    let hours = [
        ("INGEST__HEADER_TIMEOUT", "1h"),
        ("INGEST__KEEP_ALIVE", "1h"),
    ];
    let limits = hours.iter().chain(limits);
    let limits = limits.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let variables: Vec<_> = grpc_variables().into_iter().chain(limits).collect();
    Node::start("http://127.0.0.1:9/", &variables).await
}

/// Reads one answer without a body.
fn answer_to_head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    Ok(String::from_utf8(answer).expect("text"))
}

const HEAD: &[u8] = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n";

#[actix_rt::test]
async fn a_connection_may_take_as_long_as_the_configuration_says() {
    // The defaults are five seconds.
    let longer = Duration::from_secs(7);
    let node = with_limits(&[]).await;
    let port = node.ingest;
    let answers = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let (first, rest) = HEAD.split_at(10);
        [&[first, rest][..], &[HEAD]].map(|pieces| {
            for piece in pieces {
                stream.write_all(piece).expect("it is open");
                sleep(longer);
            }
            answer_to_head(&mut stream).expect("an answer")
        })
    });
    for answer in answers.await.expect("it ends") {
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[actix_rt::test]
async fn a_connection_above_the_limit_waits_for_another_to_end() {
    let node = with_limits(&[("INGEST__MAX_CONNECTIONS", "1")]).await;
    let port = node.ingest;
    let answers = tokio::task::spawn_blocking(move || {
        let connect = || {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
            stream.write_all(HEAD).expect("room in the socket");
            stream
        };
        let mut first = connect();
        first.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let answered = answer_to_head(&mut first);
        // As many as the server has workers could be accepted otherwise.
        let mut others: Vec<_> = (0..8).map(|_| connect()).collect();
        let last = others.last_mut().expect("there are some");
        last.set_read_timeout(Some(Duration::from_secs(1)))
            .expect("a time-out");
        let unanswered = answer_to_head(last);
        drop(first);
        let mut last = others.pop().expect("there are some");
        drop(others);
        last.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        (answered, unanswered, answer_to_head(&mut last))
    });
    let (first, early, last) = answers.await.expect("it ends");
    assert!(first.expect("an answer").starts_with("HTTP/1.1 200 "));
    assert!(early.is_err(), "{early:?}");
    assert!(last.expect("an answer").starts_with("HTTP/1.1 200 "));
}

/// Its bytes would gain it hours.
#[actix_rt::test]
async fn a_body_that_holds_the_room_of_others_and_sends_nothing_ends_soon() {
    let api = Api::start();
    let mut variables = grpc_variables();
    let own = [
        ("INGEST__MAX_BODY", "64MiB"),
        ("INGEST__BODY_TIMEOUT", "5s"),
    ];
    variables.extend(own.map(|(key, value)| (key.to_owned(), value.to_owned())));
    let node = Node::start(&api.url(), &variables).await;
    let holds = async |size: usize| {
        let body = vec![b' '; size];
        let stream = begun(node.ingest, "POST / HTTP/1.1", &body, b"{}").await;
        ended(stream, b"").await
    };
    // One of them has less than half of the room, and may go on.
    let (one, other) = (pin!(holds(40 << 20)), pin!(holds(40 << 20)));
    let first = timeout(PATIENCE, select(one, other))
        .await
        .expect("one ends");
    let (answer, _) = first.factor_first();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    // A small one has room always.
    let (status, _, receipt) = post(RECORD).send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
}
