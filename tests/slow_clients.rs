//! Clients that hold connections: slow heads, bodies that nobody wants, and handshakes without end.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use actix_web::{HttpResponse, web};
use serde_json::Value;
use tokio::{io::AsyncReadExt as _, time::timeout};
use waypost::{
    http::{
        self, ServerLimits,
        early_ends::{EarlyEnd, EarlyEnds},
    },
    secrets::{ServingTls, TlsFiles, WithoutCertificate},
};

use crate::{
    ingest::RECORD,
    support::{
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        tls::certificate,
    },
    tokens::{file, guarded_by},
};

/// A slow client's pause between two bytes.
const PAUSE: Duration = Duration::from_millis(50);

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
}

/// Sends `request` and reads one answer, which has a body of a known length.
fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).expect("room");
    let mut answer = Vec::new();
    let mut byte = [0];
    let is_whole = |answer: &[u8]| {
        let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.split_once("content-length: ")?.1.lines().next()?;
        (body.len() == length.parse::<usize>().ok()?).then_some(())
    };
    while is_whole(&answer).is_none() {
        stream.read_exact(&mut byte).expect("an answer");
        answer.push(byte[0]);
    }
    String::from_utf8(answer).expect("text")
}

/// Sends `piece` again and again until the server ends the connection, and returns its last words.
fn until_closed(mut stream: TcpStream, piece: &[u8]) -> String {
    let began = Instant::now();
    stream.set_read_timeout(Some(PAUSE)).expect("a time-out");
    let mut answer = Vec::new();
    loop {
        assert!(began.elapsed() < PATIENCE, "the connection is still there");
        let sent = stream.write_all(piece);
        let mut some = [0; 4096];
        match stream.read(&mut some) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&some[..length]),
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            // It closes with bytes unread.
            Err(_) => break,
        }
        if sent.is_err() {
            break;
        }
    }
    String::from_utf8(answer).expect("text")
}

fn assert_late(answer: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    assert!(head.starts_with("HTTP/1.1 408 Request Timeout"), "{answer}");
    assert!(head.contains("\r\nconnection: close"), "{answer}");
    assert!(
        head.contains("\r\ncontent-type: application/problem+json"),
        "{answer}"
    );
    let problem: Value = serde_json::from_str(body).expect("a problem");
    assert_eq!(problem["type"], "urn:waypost:problem:slow", "{answer}");
}

#[actix_rt::test]
async fn the_head_of_each_request_of_a_connection_has_to_come_in_time() {
    let limit = [("INGEST__HEADER_TIMEOUT".into(), "1s".into())];
    let variables = [&grpc_variables()[..], &limit].concat();
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    let length = RECORD.len();
    let record = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{RECORD}");
    let (ingest, admin) = (node.ingest, node.admin);
    let health = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
    let clients = [
        (ingest, vec![], "the first head"),
        (ingest, vec![&*record], "the second head"),
        (ingest, vec![&*record, &*record], "the third head"),
        (admin, vec![health], "the second head of the admin side"),
    ];
    let clients = clients.map(|(port, requests, what)| {
        let requests: Vec<_> = requests.into_iter().map(ToOwned::to_owned).collect();
        let client = move || {
            let mut stream = connect(port);
            for request in requests {
                let answer = ask(&mut stream, &request);
                assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
            }
            stream.write_all(b"GET / HTTP/1.1\r\nX: ").expect("room");
            until_closed(stream, b"x")
        };
        (what, thread::spawn(client))
    });
    for (what, client) in clients {
        let answer = client.join().unwrap_or_else(|_| panic!("{what}: no 408"));
        assert_late(&answer);
    }
    // A connection that was kept may have ended meanwhile.
    node.status().await;
    for (side, late) in [("ingest", "3"), ("admin", "1")] {
        let metric = "waypost_connections_ended_total";
        let labels = format!(r#"{{side="{side}",reason="head_late"}}"#);
        assert_eq!(node.metric(&format!("{metric}{labels}")).await, late);
    }
}

#[actix_rt::test]
async fn an_order_whose_body_does_not_come_ends_and_one_that_is_too_large_is_none() {
    let limit = [("INGEST__BODY_TIMEOUT".into(), "1s".into())];
    let variables = [&grpc_variables()[..], &limit].concat();
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    let head = "POST /api/lanes/pause HTTP/1.1\r\nHost: 127.0.0.1\r\n\
        Content-Type: application/json\r\n";
    let large = (2 << 20) + 1;
    let orders = [
        (format!("{head}Content-Length: 2\r\n\r\n{{"), "408", "slow"),
        (
            format!("{head}Transfer-Encoding: chunked\r\n\r\n"),
            "408",
            "slow",
        ),
        (
            format!("{head}Content-Length: {large}\r\n\r\n"),
            "413",
            "too-large",
        ),
        (format!("{head}Content-Length: 1\r\n\r\n]"), "400", "json"),
        (format!("{head}Content-Length: 2\r\n\r\n{{}}"), "202", ""),
    ];
    let admin = node.admin;
    let asked = orders.map(|(order, status, kind)| {
        let asking = thread::spawn(move || ask(&mut connect(admin), &order));
        (asking, status, kind)
    });
    for (asking, status, kind) in asked {
        let answer = asking.join().expect("an answer");
        assert_eq!(&answer[9..12], status, "{answer}");
        assert!(answer.contains(&format!("urn:waypost:problem:{kind}")) || kind.is_empty());
    }
    node.lane_is("grpc", "paused", PATIENCE).await;
}

#[actix_rt::test]
async fn a_client_that_never_ends_its_body_keeps_no_connection_after_the_answer() {
    let limit = [("INGEST__HEADER_TIMEOUT".into(), "1s".into())];
    let variables = [&grpc_variables()[..], &limit].concat();
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    let rest = "Host: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let clients = [
        (node.ingest, "GET /", "200"),
        (node.ingest, "POST /unknown/path", "404"),
        (node.admin, "GET /healthz", "200"),
    ];
    let clients = clients.map(|(port, line, status)| {
        let client = move || {
            let mut stream = connect(port);
            let answer = ask(&mut stream, &format!("{line} HTTP/1.1\r\n{rest}"));
            assert_eq!(&answer[9..12], status, "{answer}");
            until_closed(stream, b"")
        };
        (line, thread::spawn(client))
    });
    for (line, client) in clients {
        let more = client.join().unwrap_or_else(|_| panic!("{line}: it stays"));
        assert_eq!(more, "", "{line}: one answer is enough");
    }
}

#[actix_rt::test]
async fn a_client_without_a_token_keeps_no_connection() {
    let tokens = file("token");
    for (key, side) in [
        ("INGEST__TOKENS_FILE", "ingest"),
        ("ADMIN__TOKEN_FILE", "admin"),
    ] {
        let node = guarded_by(key, "http://127.0.0.1:9/", &tokens).await;
        let (port, open): (_, &[_]) = match side {
            "ingest" => (node.ingest, &["/"]),
            _ => (node.admin, &["/healthz", "/readyz"]),
        };
        for path in open.iter().copied().chain(["/wanted"]) {
            let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
            let answer = ask(&mut connect(port), &request);
            assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        }
        let mut stream = connect(port);
        for _ in 0..2 {
            let token = "Authorization: Bearer token";
            let request = format!("GET /wanted HTTP/1.1\r\nHost: 127.0.0.1\r\n{token}\r\n\r\n");
            let answer = ask(&mut stream, &request);
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        }
        // It has its answer, and the rest of its body has no end.
        let mut stream = connect(port);
        let chunked =
            "POST /wanted HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer = ask(&mut stream, chunked);
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
        tokio::task::spawn_blocking(move || until_closed(stream, b"1\r\nx\r\n"))
            .await
            .expect("it ends");
    }
}

#[actix_rt::test]
async fn handshakes_without_end_are_few_and_hold_up_no_drain() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let Some((cert, key)) = certificate(folder.path(), "IP:127.0.0.1") else {
        return;
    };
    let files = TlsFiles {
        cert,
        key,
        client_ca: None,
        without_certificate: WithoutCertificate::NoConnection,
        protocols: &["http/1.1"],
    };
    let tls = ServingTls::open("ingest.tls_cert_file", files).expect("good files");
    let socket = http::listen(SocketAddr::from(([127, 0, 0, 1], 0)), None).expect("a free port");
    let port = socket.local_addr().expect("it is bound").port();
    let (long, ends) = (Duration::from_mins(10), EarlyEnds::default());
    let limits = ServerLimits {
        workers: 1,
        max_connections: 16,
        header_timeout: long,
        keep_alive: long,
        drain: long,
    };
    let server = http::serve(socket, limits, Some(tls), &ends, |app| {
        app.default_service(web::to(HttpResponse::Ok));
    })
    .expect("it serves");
    let mut silent = Vec::new();
    for _ in 0..9 {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
        silent.push(stream.expect("the system takes it"));
    }
    // Half of the connections may be in their handshakes, and the oldest one is one too many.
    let closed = timeout(PATIENCE, silent[0].read(&mut [0])).await;
    closed.expect("it is closed").ok();
    assert_eq!(ends.counted(EarlyEnd::HandshakeEvicted), 1);
    let stopped = timeout(PATIENCE, server.stop(true)).await;
    stopped.expect("the server ends");
    for stream in &mut silent[1..] {
        let closed = timeout(PATIENCE, stream.read(&mut [0])).await;
        closed.expect("it is closed").ok();
    }
}
