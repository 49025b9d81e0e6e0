//! `GET /api/events` of a real node.

use std::{fs, pin::Pin, time::Duration};

use awc::{
    ClientRequest,
    http::{StatusCode, header},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, future::join_all};
use memchr::memmem::find_iter;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        traffic,
    },
    tokens,
};

/// The most readers of a node.
const READERS_MAX: usize = 256;

/// An event.
#[derive(Debug)]
struct Event {
    name: String,
    id: String,
    data: Value,
}

/// A reader of events.
struct Events {
    body: Pin<Box<dyn Stream<Item = Bytes>>>,
    unread: String,
}

impl Events {
    /// Reads from `path`, after the event `last_id` if there is one.
    async fn open(node: &Node, path: &str, last_id: Option<&str>) -> Result<Self, (u16, Value)> {
        let url = format!("http://127.0.0.1:{}{path}", node.admin);
        let client = awc::Client::builder().disable_timeout().finish();
        let mut request = client.get(url);
        if let Some(id) = last_id {
            request = request.insert_header(("Last-Event-ID", id));
        }
        Self::send(request).await
    }

    async fn send(request: ClientRequest) -> Result<Self, (u16, Value)> {
        let mut answer = request.send().await.expect("the node answers");
        if answer.status() != StatusCode::OK {
            let problem = answer.body().await.expect("a body");
            let problem = serde_json::from_slice(&problem).expect("JSON");
            return Err((answer.status().as_u16(), problem));
        }
        let headers = answer.headers();
        assert_eq!(
            headers.get(header::CONTENT_TYPE).unwrap(),
            "text/event-stream"
        );
        assert_eq!(headers.get(header::CACHE_CONTROL).unwrap(), "no-store");
        let answer = answer.timeout(10 * PATIENCE);
        let body = answer.take_while(|part| std::future::ready(part.is_ok()));
        Ok(Self {
            body: Box::pin(body.map(|part| part.expect("it was checked"))),
            unread: String::new(),
        })
    }

    async fn start(node: &Node) -> Self {
        let opened = Self::open(node, "/api/events", None).await;
        opened.unwrap_or_else(|problem| panic!("{problem:?}"))
    }

    async fn resume(node: &Node, last_id: &str) -> Self {
        let opened = Self::open(node, "/api/events", Some(last_id)).await;
        opened.unwrap_or_else(|problem| panic!("{problem:?}"))
    }

    /// The next event; `None` at the end.
    async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some((event, rest)) = self.unread.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.unread = rest;
                let line = |name: &str| {
                    let value = event.lines().find_map(|line| line.strip_prefix(name));
                    value.unwrap_or_default().to_owned()
                };
                if event.contains("data: ") {
                    return Some(Event {
                        name: line("event: "),
                        id: line("id: "),
                        data: serde_json::from_str(&line("data: ")).expect("JSON"),
                    });
                }
            }
            let part = timeout(PATIENCE, self.body.next()).await;
            let part = part.expect("an event in time")?;
            self.unread
                .push_str(std::str::from_utf8(&part).expect("text"));
        }
    }

    /// The next event of that name.
    async fn next_of(&mut self, name: &str) -> Event {
        self.until(|event| event.name == name, name).await
    }

    async fn until(&mut self, is_it: impl Fn(&Event) -> bool, what: &str) -> Event {
        let found = timeout(PATIENCE, async {
            loop {
                let event = self.next().await.expect("more events");
                if is_it(&event) {
                    return event;
                }
            }
        });
        let found = found.await;
        found.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
    }

    /// The next change in which these members have these values.
    async fn change(&mut self, expected: Value) -> Event {
        let is_it = |event: &Event| {
            let mut members = expected.as_object().expect("an object").iter();
            event.name == "change" && members.all(|(name, value)| event.data[name] == *value)
        };
        self.until(is_it, &expected.to_string()).await
    }
}

async fn node(api: &Api) -> Node {
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

fn number(id: &str) -> u64 {
    let (_, number) = id.rsplit_once('-').expect("an id");
    number.parse().expect("a number")
}

/// A connection to the admin side, on which nothing was said yet.
async fn connected(node: &Node) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", node.admin)).await;
    stream.expect("the node listens")
}

async fn asks(stream: &mut TcpStream) {
    let ask = "GET /api/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.expect("it is sent");
}

/// Reads until there were so many statuses more.
async fn reads_statuses(stream: &mut TcpStream, count: usize) {
    let mut seen = Vec::new();
    let read = timeout(PATIENCE, async {
        while find_iter(&seen, "event: status").count() < count {
            let read = stream.read_buf(&mut seen).await.expect("the node goes on");
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&seen));
        }
    });
    read.await.expect("statuses in time");
}

/// As that many open pages: opened all at once, and one after the other.
#[actix_rt::test]
async fn a_hundred_readers_take_less_than_a_mebibyte() {
    const READERS: usize = 100;
    for at_once in [true, false] {
        let api = Api::start();
        let node = node(&api).await;
        // The others share the memory of the first one.
        let mut first = connected(&node).await;
        asks(&mut first).await;
        reads_statuses(&mut first, 3).await;
        let before = node.memory();
        let mut readers = Vec::new();
        for _ in 0..READERS {
            let mut reader = connected(&node).await;
            if !at_once {
                asks(&mut reader).await;
                reads_statuses(&mut reader, 1).await;
            }
            readers.push(reader);
        }
        if at_once {
            join_all(readers.iter_mut().map(asks)).await;
        }
        join_all(readers.iter_mut().map(|reader| reads_statuses(reader, 3))).await;
        let took = node.memory().saturating_sub(before);
        println!(
            "{READERS} readers take {} KiB, at once: {at_once}",
            took >> 10
        );
        assert!(took < 1 << 20, "{took} bytes, at once: {at_once}");
    }
}

/// The HTTP library's buffers of a connection are 16 KiB.
#[actix_rt::test]
async fn a_connection_without_a_request_takes_little_memory() {
    const CONNECTIONS: usize = 500;
    let api = Api::start();
    let node = node(&api).await;
    let before = node.memory();
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        silent.push(connected(&node).await);
    }
    // They are served in turn.
    node.status().await;
    let took = node.memory().saturating_sub(before) / CONNECTIONS as u64;
    println!("a connection without a request takes {took} bytes");
    assert!(took < 11 << 10, "{took} bytes");
}

#[actix_rt::test]
async fn the_statuses_are_those_of_the_node_and_each_change_is_told() {
    let mut api = Api::start();
    let node = node(&api).await;
    let mut events = Events::start(&node).await;
    let first = events.next().await.expect("an event");
    assert_eq!(first.name, "status", "{first:?}");
    let second = events.next_of("status").await;
    assert!(second.data["uptime_s"].as_f64() > first.data["uptime_s"].as_f64());
    let names = |status: &Value| {
        let members = status.as_object().expect("an object");
        members.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(names(&second.data), names(&node.status().await));

    node.order("grpc", "drain").await;
    let change = events
        .change(json!({"what": "lane", "draining": true}))
        .await;
    assert_eq!(
        (&change.data["lane"], &change.data["state"]),
        (&json!("grpc"), &json!("up"))
    );
    assert!(change.data["at_ms"].is_u64(), "{change:?}");
    let change = events.change(json!({"what": "order"})).await;
    let mut order = change.data;
    order["at_ms"].take();
    let expected = json!({
        "at_ms": null, "what": "order", "lanes": ["grpc"], "action": "drain", "by": "127.0.0.1"
    });
    assert_eq!(order, expected);
    node.order("grpc", "resume").await;
    events
        .change(json!({"what": "lane", "draining": false}))
        .await;
    node.order("grpc", "pause").await;
    events
        .change(json!({"what": "lane", "state": "paused"}))
        .await;
    node.order("grpc", "resume").await;
    events
        .change(json!({"what": "lane", "state": "connecting"}))
        .await;
    events.change(json!({"what": "lane", "state": "up"})).await;
    node.tell("/api/lanes/grpc/weight", json!({"weight": 7}))
        .await;
    events
        .change(json!({"what": "weight", "lane": "grpc", "weight": 7, "by": "127.0.0.1"}))
        .await;
    node.tell("/api/reload", json!({})).await;
    events
        .change(json!({"what": "reload", "outcome": "applied"}))
        .await;

    api.stop().await;
    for number in 0..10 {
        let key = format!("away-{number}");
        node.post("/", &key, traffic()[0].clone()).await.unwrap();
    }
    let down = events
        .change(json!({"what": "api", "state": "down", "url": api.url()}))
        .await;
    let why = down.data["last_error"].as_str().expect("a reason");
    assert!(
        why.contains("refused") && down.data["retry_in_s"].is_f64(),
        "{down:?}"
    );
    api.start_again();
    events
        .change(json!({"what": "api", "state": "up", "last_error": null}))
        .await;
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_lane_that_is_away_is_one_change_however_often_it_tries() {
    let api = Api::start();
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let variables = [grpc_variables(), vec![("LANES__NATS__URL".into(), nobody)]].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    eventually("it has tried five times", PATIENCE, async || {
        (node.lane("nats").await["attempts"].as_u64() >= Some(5)).then_some(())
    })
    .await;
    // All changes of this run.
    let mut events = Events::resume(&node, "an-earlier-run-0").await;
    let mut away = Vec::new();
    loop {
        let event = events.next().await.expect("more events");
        if event.name == "status" {
            break;
        }
        if event.data["lane"] == "nats" {
            away.push(event.data);
        }
    }
    let [change] = &away[..] else {
        panic!("{away:?}");
    };
    assert_eq!(change["state"], "backoff");
    assert!(
        change["last_error"].is_string() && change["retry_in_s"].is_f64(),
        "{change}"
    );
}

#[actix_rt::test]
async fn a_reader_that_comes_back_reads_on_and_misses_nothing() {
    let api = Api::start();
    let node = node(&api).await;
    let mut events = Events::start(&node).await;
    let last = events.next_of("status").await.id;
    drop(events);
    for action in ["pause", "resume"] {
        node.order("grpc", action).await;
    }
    node.lane_is("grpc", "up", PATIENCE).await;
    let expected = ["paused", "pause", "connecting", "resume", "up"];
    let by_query = format!("/api/events?after={last}");
    for (path, header) in [("/api/events", Some(&*last)), (&*by_query, None)] {
        let mut events = Events::open(&node, path, header).await.expect("a stream");
        let mut told = Vec::new();
        for at in 1..=expected.len() as u64 {
            let Event { name, id, data } = events.next().await.expect("a change");
            assert_eq!((&*name, number(&id)), ("change", number(&last) + at));
            let what = if data["what"] == "lane" {
                "state"
            } else {
                "action"
            };
            told.push(data[what].as_str().expect("a name").to_owned());
        }
        told.sort_unstable();
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        assert_eq!(told, expected);
        let status = events.next().await.expect("a status");
        assert_eq!(
            (&*status.name, number(&status.id)),
            ("status", number(&last) + 5)
        );
    }
}

#[actix_rt::test]
async fn a_reader_is_told_that_the_node_was_restarted_and_what_has_changed_since() {
    let api = Api::start();
    let mut node = node(&api).await;
    let mut events = Events::start(&node).await;
    let last = events.next_of("status").await.id;
    node.killed_and_started().await;
    assert!(
        events
            .next()
            .await
            .is_none_or(|event| event.name != "missed"),
        "the old stream"
    );
    let mut events = Events::resume(&node, &last).await;
    let missed = events.next().await.expect("an event");
    assert_eq!(missed.name, "missed");
    assert_eq!(missed.data, json!({"reason": "restart", "changes": null}));
    let change = events.change(json!({"what": "lane", "state": "up"})).await;
    assert_ne!(
        change.id.rsplit_once('-').unwrap().0,
        last.rsplit_once('-').unwrap().0
    );
    let status = events.next_of("status").await;
    assert_eq!(status.data["ledger"]["accepted"], 0);
    let mut events = Events::resume(&node, "no id").await;
    let missed = events.next().await.expect("an event");
    assert_eq!(
        missed.data,
        json!({"reason": "unknown-id", "changes": null})
    );
    events.next_of("status").await;
}

#[actix_rt::test]
async fn many_readers_hear_of_each_change_and_one_too_many_gets_a_problem() {
    let api = Api::start();
    let node = node(&api).await;
    let mut readers = Vec::new();
    for _ in 0..READERS_MAX {
        readers.push(Events::start(&node).await);
    }
    let refused = Events::open(&node, "/api/events", None).await;
    let (status, problem) = refused.err().expect("a problem");
    assert_eq!(
        (status, &problem["type"]),
        (503, &json!("urn:waypost:problem:streams"))
    );
    let (head, _) = node.get("/healthz").await.expect("the node answers");
    assert_eq!(head, StatusCode::OK);
    node.order("grpc", "drain").await;
    let heard = readers
        .iter_mut()
        .map(|reader| reader.change(json!({"draining": true})));
    join_all(heard).await;
    readers.truncate(READERS_MAX - 1);
    eventually("a place is free", PATIENCE, async || {
        Events::open(&node, "/api/events", None).await.ok()
    })
    .await;
}

/// A client that asks for all changes, and reads nothing.
async fn reads_nothing(node: &Node) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let address = format!("127.0.0.1:{}", node.admin);
    let address = address.parse().expect("an address");
    let mut stream = socket.connect(address).await.expect("a connection");
    let ask = "GET /api/events?after=earlier-0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    stream.write_all(ask.as_bytes()).await.expect("it is sent");
    stream
}

#[actix_rt::test]
async fn a_reader_that_takes_nothing_loses_its_place() {
    let api = Api::start();
    let fault = "write-patience=return(300)";
    let node = Node::start_with_fault(&api.url(), &grpc_variables(), fault).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // More than the system holds for a client.
    for weight in 0..1200 {
        let path = "/api/lanes/grpc/weight";
        let (status, problem) = node.tell(path, json!({"weight": weight % 1000})).await;
        assert_eq!(status, StatusCode::OK, "{problem}");
    }
    let mut reader = Events::start(&node).await;
    let mut idle = Vec::new();
    for _ in 1..READERS_MAX {
        idle.push(reads_nothing(&node).await);
    }
    eventually("the idle readers are gone", PATIENCE, async || {
        let mut others = Vec::new();
        for _ in 1..READERS_MAX {
            others.push(Events::open(&node, "/api/events", None).await.ok()?);
        }
        Some(())
    })
    .await;
    // One that reads stays.
    reader.next_of("status").await;
    let mut taken = Vec::new();
    let read = timeout(PATIENCE, idle[0].read_to_end(&mut taken)).await;
    drop(read.expect("the node has closed it"));
}

#[actix_rt::test]
async fn a_node_that_stops_tells_its_readers_and_does_not_wait_for_them() {
    let api = Api::start();
    let mut node = node(&api).await;
    let mut readers = Vec::new();
    for _ in 0..10 {
        readers.push(Events::start(&node).await);
    }
    let idle = reads_nothing(&node).await;
    node.signal("TERM");
    assert!(node.ended(Duration::from_secs(10)).await.success());
    for reader in &mut readers {
        reader
            .change(json!({"what": "node", "draining": true}))
            .await;
        while let Some(event) = reader.next().await {
            assert_ne!(event.name, "missed");
        }
    }
    drop(idle);
}

#[actix_rt::test]
async fn the_nodes_own_page_may_read_events() {
    let api = Api::start();
    let node = node(&api).await;
    let origin = format!("http://127.0.0.1:{}", node.admin);
    for (name, value) in [("Origin", &*origin), ("Sec-Fetch-Site", "same-origin")] {
        let client = awc::Client::new();
        let request = client.get(format!("{origin}/api/events"));
        let answer = request.insert_header((name, value)).send().await;
        assert_eq!(
            answer.expect("an answer").status(),
            StatusCode::OK,
            "{name}"
        );
    }
}

type Login = fn(ClientRequest) -> ClientRequest;

#[actix_rt::test]
async fn a_stream_ends_when_the_token_that_opened_it_is_taken_away() {
    let (api, tokens) = (Api::start(), tokens::file("first-token\nsecond-token\n"));
    let node = tokens::guarded_by("ADMIN__TOKEN_FILE", &api.url(), &tokens).await;
    let url = format!("http://127.0.0.1:{}/api/events", node.admin);
    let client = awc::Client::builder().disable_timeout().finish();
    let logins: [(&str, Login); 3] = [
        ("a token that stays", |request| {
            request.bearer_auth("first-token")
        }),
        ("a token", |request| request.bearer_auth("second-token")),
        ("a browser", |request| {
            request.basic_auth("me", "second-token")
        }),
    ];
    let mut streams = Vec::new();
    for (who, login) in logins {
        let mut events = Events::send(login(client.get(&url))).await.expect(who);
        events.next_of("status").await;
        streams.push((who, events));
    }
    fs::write(tokens.path(), "first-token\nthird-token\n").expect("room");
    let (_, mut stays) = streams.remove(0);
    for (who, mut events) in streams {
        let ended = timeout(PATIENCE, async { while events.next().await.is_some() {} }).await;
        assert!(ended.is_ok(), "{who} still hears");
    }
    for _ in 0..3 {
        stays.next_of("status").await;
    }
}
