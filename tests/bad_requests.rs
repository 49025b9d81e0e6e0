//! Requests that end before a handler sees them, over a plain socket.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

use serde_json::Value;

use crate::support::{
    lanes::grpc_variables,
    node::{Node, PATIENCE},
};

/// What a client sends, and the status that it gets last.
fn cases() -> Vec<(&'static str, Vec<u8>, u16)> {
    let head = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n").into_bytes();
    let many: Vec<_> = (0..97).map(|at| format!("x-{at}: 1")).collect();
    vec![
        ("a header without a colon", head("nonsense"), 400),
        ("a space in a header's name", head("a b: c"), 400),
        (
            "a length that is no number",
            head("Content-Length: many"),
            400,
        ),
        (
            "two lengths",
            head("Content-Length: 1\r\nContent-Length: 1"),
            400,
        ),
        (
            "an unknown transfer coding",
            head("Transfer-Encoding: gzip"),
            400,
        ),
        ("two hosts", head("Host: b"), 400),
        ("no host", b"GET / HTTP/1.1\r\n\r\n".to_vec(), 400),
        (
            "another protocol",
            b"GET / HTTP/3.9\r\nHost: a\r\n\r\n".to_vec(),
            400,
        ),
        (
            "TLS",
            b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03".to_vec(),
            400,
        ),
        (
            "nonsense behind a request",
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n".to_vec(),
            400,
        ),
        ("many headers", head(&many.join("\r\n")), 431),
        (
            "a head without end",
            [
                b"GET / HTTP/1.1\r\nHost: a\r\nx: ".to_vec(),
                vec![b'x'; 128 << 10],
            ]
            .concat(),
            431,
        ),
        ("half a head", b"GET / HTTP/1.1\r\nHo".to_vec(), 408),
    ]
}

/// The bytes that the server answers until it closes, and the client's address.
fn exchange(port: u16, request: &[u8]) -> (String, SocketAddr) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream.write_all(request).expect("room in the socket");
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // It closes with bytes unread.
        Err(why) if why.kind() == ErrorKind::ConnectionReset => {}
        ended => {
            ended.expect("an answer and its end");
        }
    }
    let answer = String::from_utf8(answer).expect("text");
    (answer, stream.local_addr().expect("an address"))
}

#[actix_rt::test]
async fn each_gets_a_problem_and_is_logged_at_debug_with_its_address() {
    let mut node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    node.log_more();
    node.killed_and_started().await;
    let port = node.ingest;
    let cases = cases().into_iter().map(|(what, request, status)| {
        let ended = tokio::task::spawn_blocking(move || exchange(port, &request));
        (what, status, ended)
    });
    for (what, status, ended) in cases.collect::<Vec<_>>() {
        let (answer, client) = ended.await.expect("it ends");
        let last = answer.rfind("HTTP/1.1 ").expect("an answer");
        let (head, body) = answer[last..].split_once("\r\n\r\n").expect("a head");
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status} ")),
            "{what}: {answer}"
        );
        let media_type = "\r\ncontent-type: application/problem+json";
        assert!(head.contains(media_type), "{what}: {answer}");
        let length = format!("\r\ncontent-length: {}\r\n", body.len());
        assert!(head.contains(&length), "{what}: {answer}");
        let problem: Value = serde_json::from_str(body).expect("a problem");
        assert_eq!(problem["status"], status, "{what}");
        for part in ["type", "title", "detail"] {
            assert!(!problem[part].is_null(), "{what}: no {part} in {body}");
        }
        let log = node.log();
        let address = format!("bad request client={client} reason={status} ");
        let line = log.lines().find(|line| line.contains(&address));
        let line = line.unwrap_or_else(|| panic!("{what}: no {address} in {log}"));
        assert!(line.contains(" DEBUG "), "{line}");
    }
    // Then its log is complete.
    node.signal("TERM");
    node.ended(PATIENCE).await;
    for loud in [" ERROR ", " WARN "] {
        assert!(!node.log().contains(loud), "{}", node.log());
    }
}

#[actix_rt::test]
async fn what_a_handler_refuses_is_logged_at_debug_with_its_address_too() {
    let mut node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    node.log_more();
    node.killed_and_started().await;
    for (port, head, body, status) in [
        (node.ingest, "POST / HTTP/1.1", "{]", 400),
        (node.ingest, "POST / HTTP/1.1", "{}", 422),
        (node.ingest, "POST /pigeon HTTP/1.1", "{}", 404),
        (node.ingest, "PUT / HTTP/1.1", "{}", 405),
        (node.ingest, "PUT /grpc HTTP/1.1", "{}", 405),
        (node.ingest, "GET /a/b HTTP/1.1", "", 404),
        (node.admin, "POST /api/dead/drop HTTP/1.1", "{]", 400),
        (
            node.admin,
            "POST /api/lanes/pigeon/pause HTTP/1.1",
            "{}",
            404,
        ),
        (node.admin, "GET /a HTTP/1.1", "", 404),
    ] {
        let length = body.len();
        let fields = "Host: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json";
        let request = format!("{head}\r\n{fields}\r\nContent-Length: {length}\r\n\r\n{body}");
        let ended = tokio::task::spawn_blocking(move || exchange(port, request.as_bytes()));
        let (answer, client) = ended.await.expect("it ends");
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{head}: {answer}"
        );
        let address = format!("bad request client={client} reason={status} ");
        assert!(node.log().contains(&address), "{head}: {}", node.log());
    }
}
