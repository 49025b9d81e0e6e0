//! A table of bad and odd requests over plain sockets. Each gets the answer that is promised, and
//! nothing of it goes further.

mod framing;
mod head;
mod json;
mod json_values;
mod message;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use serde_json::Value;

use crate::{
    ingest::RECORD,
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

/// The table has at least so many requests.
const LEAST: usize = 400;
/// Clients at a time.
const CLIENTS: usize = 16;
/// It comes behind each request that ends its connection.
const SMUGGLED: &str =
    r#"{"name":"smuggled","location":"b","age":1,"infectedtype":"c","state":"d"}"#;

/// The promised answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise {
    status: u16,
    ends: Ends,
}

/// Whether the connection ends behind the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    No,
    /// What comes there is no request.
    Yes,
    /// A body that nobody has read may end it.
    Maybe,
}

/// The record is taken, and the connection goes on.
pub const TAKEN: Promise = open(202);

pub const fn open(status: u16) -> Promise {
    Promise {
        status,
        ends: Ends::No,
    }
}

pub const fn closed(status: u16) -> Promise {
    Promise {
        status,
        ends: Ends::Yes,
    }
}

pub const fn either(status: u16) -> Promise {
    Promise {
        status,
        ends: Ends::Maybe,
    }
}

/// A request of the table.
pub struct Case {
    class: &'static str,
    request: Vec<u8>,
    promise: Promise,
    rest: Rest,
}

/// The bytes that a client sends behind a request of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Another request.
    Request,
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
}

/// The requests of a class, each with its promise.
pub fn class<R: Into<Vec<u8>>>(
    class: &'static str,
    promise: Promise,
    requests: impl IntoIterator<Item = R>,
) -> Vec<Case> {
    let requests = requests.into_iter().map(|request| Case {
        class,
        request: request.into(),
        promise,
        rest: Rest::Request,
    });
    requests.collect()
}

/// The same requests with something else behind them.
pub fn then(rest: Rest, mut cases: Vec<Case>) -> Vec<Case> {
    for case in &mut cases {
        case.rest = rest;
    }
    cases
}

/// A request with these bytes as its first line and fields, a host, and a length.
pub fn request(
    line: impl AsRef<[u8]>,
    fields: impl AsRef<[u8]>,
    body: impl AsRef<[u8]>,
) -> Vec<u8> {
    let body = body.as_ref();
    let length = format!("Content-Length: {}", body.len());
    let fields = match fields.as_ref() {
        b"" => length.into_bytes(),
        fields => [fields, b"\r\n", length.as_bytes()].concat(),
    };
    framed(line, fields, body)
}

/// The same without a length.
pub fn framed(line: impl AsRef<[u8]>, fields: impl AsRef<[u8]>, body: impl AsRef<[u8]>) -> Vec<u8> {
    let parts = [line.as_ref(), b"\r\nHost: a\r\n", fields.as_ref()];
    [&parts.concat()[..], b"\r\n\r\n", body.as_ref()].concat()
}

/// A POST of a record with these fields.
pub fn post(fields: impl AsRef<[u8]>) -> Vec<u8> {
    request("POST / HTTP/1.1", fields, RECORD)
}

/// An answer: its status, its fields and its body.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

/// Reads the next answer; `None` at the end of the connection.
fn read_answer(stream: &mut TcpStream, unread: &mut Vec<u8>) -> Option<Answer> {
    loop {
        if let Some(at) = unread.windows(4).position(|end| end == b"\r\n\r\n") {
            let head = String::from_utf8(unread[..at].to_vec()).expect("text");
            let status = head.get(9..12).and_then(|status| status.parse().ok());
            let lower = head.to_ascii_lowercase();
            let length = lower.split("content-length: ").nth(1);
            let length = length.map_or(0, |rest| {
                let digits = rest.lines().next().expect("a value");
                digits.parse().expect("a number")
            });
            let end = at + 4 + length;
            if unread.len() >= end {
                let body = unread[at + 4..end].to_vec();
                unread.drain(..end);
                let status = status.unwrap_or_else(|| panic!("no status: {head}"));
                return Some(Answer { status, head, body });
            }
        }
        let mut some = [0; 8192];
        match stream.read(&mut some) {
            Ok(0) => break,
            Ok(length) => unread.extend_from_slice(&some[..length]),
            // It closes with bytes unread.
            Err(why) if why.kind() == ErrorKind::ConnectionReset => break,
            Err(why) => panic!("the connection is still there: {why}"),
        }
    }
    assert!(unread.is_empty(), "half an answer");
    None
}

/// Sends the request and checks what comes back. An error says what is wrong.
fn check(case: &Case, port: u16) -> Result<(), String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(|why| why.to_string())?;
    stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a time-out");
    let behind = request("POST / HTTP/1.1", "", SMUGGLED);
    let is_followed = case.promise.ends == Ends::Yes && case.rest == Rest::Request;
    let behind = if is_followed { &behind[..] } else { b"" };
    // The node may have ended the connection already.
    stream.write_all(&[&*case.request, behind].concat()).ok();
    if case.rest == Rest::End {
        stream.shutdown(Shutdown::Write).ok();
    }
    let mut unread = Vec::new();
    let answer = read_answer(&mut stream, &mut unread).ok_or("no answer")?;
    let Answer { status, head, body } = answer;
    let body_text = String::from_utf8_lossy(&body);
    if status != case.promise.status {
        return Err(format!("{status}: {body_text}"));
    }
    if status >= 400 {
        if !head.contains("\r\ncontent-type: application/problem+json") {
            return Err(format!("no problem: {head}"));
        }
        let problem: Value = serde_json::from_slice(&body).map_err(|why| why.to_string())?;
        let is_whole = problem["status"] == status
            && problem["type"].is_string()
            && problem["title"].is_string()
            && problem["detail"].is_string();
        if !is_whole {
            return Err(format!("no whole problem: {problem}"));
        }
    }
    match case.promise.ends {
        Ends::No => {}
        Ends::Maybe => return Ok(()),
        Ends::Yes => {
            // Otherwise a client that sends another request takes its loss for an error.
            let request = String::from_utf8_lossy(&case.request).to_ascii_lowercase();
            let is_asked = request.contains("close") || request.contains("http/1.0");
            if status < 300
                && !is_asked
                && !head.to_ascii_lowercase().contains("\r\nconnection: close")
            {
                return Err(format!("it ends and does not say so: {head}"));
            }
            return match read_answer(&mut stream, &mut unread) {
                None => Ok(()),
                Some(other) => Err(format!("then {}: {}", other.status, other.head)),
            };
        }
    }
    let health = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    stream.write_all(health).map_err(|why| why.to_string())?;
    match read_answer(&mut stream, &mut unread) {
        Some(health) if health.status == 200 => Ok(()),
        Some(other) => Err(format!("then {}: {}", other.status, other.head)),
        None => Err(format!("the connection ended behind {head}")),
    }
}

/// Checks all cases, and returns the wrong ones.
fn check_all(cases: &[Case], port: u16) -> Vec<String> {
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|clients| {
        for _ in 0..CLIENTS {
            clients.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Relaxed)) {
                    let Err(why) = check(case, port) else {
                        continue;
                    };
                    let shown = &case.request[..case.request.len().min(150)];
                    let shown = String::from_utf8_lossy(shown);
                    let Case { class, promise, .. } = case;
                    let line = format!("{class}: {promise:?} was promised for {shown:?}: {why}");
                    wrong.lock().expect("no panic").push(line);
                }
            });
        }
    });
    wrong.into_inner().expect("no panic")
}

#[actix_rt::test]
async fn each_bad_or_odd_request_gets_what_is_promised_and_goes_no_further() {
    let limits = [("HEADER_TIMEOUT", "3s"), ("BODY_TIMEOUT", "3s")];
    let limits = limits.map(|(key, value)| (format!("INGEST__{key}"), value.to_owned()));
    let any = [("INGEST__SCHEMA".to_owned(), "any".to_owned())];
    let of_http = [framing::cases(), head::cases(), message::cases()]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>();
    let of_json = json::cases();
    let count = of_http.len() + of_json.len();
    assert!(count >= LEAST, "only {count} requests");
    for (cases, schema) in [(of_http, &[][..]), (of_json, &any)] {
        let api = Api::start();
        let variables = [&grpc_variables()[..], &limits, schema].concat();
        let mut node = Node::start(&api.url(), &variables).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        let port = node.ingest;
        let taken = cases.iter().filter(|case| case.promise.status == 202);
        let taken = taken.count();
        let wrong = tokio::task::spawn_blocking(move || check_all(&cases, port));
        let wrong = wrong.await.expect("no panic");
        assert!(
            wrong.is_empty(),
            "{} are wrong:\n{}",
            wrong.len(),
            wrong.join("\n")
        );
        node.at_rest(PATIENCE).await;
        assert_eq!(api.count(), taken);
        for posted in api.posts() {
            assert!(!format!("{posted:?}").contains("smuggled"), "{posted:?}");
        }
        // Then its log is complete.
        node.signal("TERM");
        node.ended(PATIENCE).await;
        for trouble in ["panicked", " ERROR ", " WARN "] {
            assert!(!node.log().contains(trouble), "{}", node.log());
        }
    }
}
