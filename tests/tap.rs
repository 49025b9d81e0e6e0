//! `GET /api/tap` and `waypost tap`: records as they pass.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use bytes::Bytes;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpSocket, TcpStream, unix::pipe},
    time::timeout,
};

use crate::{
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        process::{self, waypost},
        traffic,
    },
    tokens,
};

/// The most watchers of a node.
const WATCHERS_MAX: usize = 16;

async fn node(api: &Api) -> Node {
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

/// A watcher over a connection of its own.
struct Watcher(BufReader<TcpStream>);

impl Watcher {
    /// Returns the status if it is no success. `buffer` is the room for what is not read yet.
    async fn open(node: &Node, query: &str, buffer: u32) -> Result<Self, u16> {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(buffer).unwrap();
        let address = ([127, 0, 0, 1], node.admin).into();
        let mut connection = socket.connect(address).await.unwrap();
        let ask = format!("GET /api/tap?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
        connection.write_all(ask.as_bytes()).await.unwrap();
        let mut watcher = Self(BufReader::new(connection));
        let head = watcher.line().await;
        let status = head.split(' ').nth(1).expect("a status").parse().unwrap();
        if status != 200 {
            return Err(status);
        }
        // What passes from now on is seen.
        while watcher.line().await != ": watching" {}
        Ok(watcher)
    }

    async fn start(node: &Node, query: &str) -> Self {
        Self::open(node, query, 1 << 20).await.expect("a stream")
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        let read = timeout(PATIENCE, self.0.read_line(&mut line)).await;
        read.expect("a line in time").expect("a connection");
        line.trim_end().to_owned()
    }

    /// The data of the next event.
    async fn next(&mut self) -> Value {
        // Pings come for ever.
        let data = timeout(PATIENCE, async {
            loop {
                if let Some(data) = self.line().await.strip_prefix("data: ") {
                    return data.to_owned();
                }
            }
        });
        let data = data.await.expect("an event in time");
        serde_json::from_str(&data).expect("JSON")
    }
}

async fn post_all(node: &Node, name: &str, records: impl Iterator<Item = Bytes>) {
    for (number, record) in records.enumerate() {
        let key = format!("{name}-{number}");
        let (status, answer) = node.post("/", &key, record).await.expect("an answer");
        assert_eq!(status, 202, "{answer}");
    }
}

#[actix_rt::test]
async fn each_record_is_shown_once_with_its_lane_and_answer() {
    let api = Api::start();
    let node = node(&api).await;
    post_all(&node, "before", traffic().into_iter().take(1)).await;
    node.all_ended(1, PATIENCE).await;
    let mut watcher = Watcher::start(&node, "lane=grpc").await;
    let spread = "{\"name\": \"Ana\",\r\n \"location\":\n\"Graz\", \"age\": 3,\
                  \"infectedtype\": \"\", \"state\": \"\"}";
    let records = [
        traffic()[0].clone(),
        Bytes::from(spread),
        traffic()[2].clone(),
    ];
    post_all(&node, "shown", records.into_iter()).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        let shown = watcher.next().await;
        assert_eq!(
            (&shown["lane"], &shown["status"]),
            (&"grpc".into(), &200.into())
        );
        assert_eq!(shown["record"]["path"], "GRPC", "{shown}");
        assert!(shown["at_ms"].as_u64() > Some(1_700_000_000_000), "{shown}");
        ids.push(shown["id"].as_str().expect("an id").to_owned());
    }
    ids.sort_unstable();
    assert_eq!(ids, ["shown-0", "shown-1", "shown-2"]);
}

#[actix_rt::test]
async fn a_sample_is_one_of_so_many() {
    let api = Api::start();
    let node = node(&api).await;
    let mut watcher = Watcher::start(&node, "sample=10").await;
    post_all(&node, "a", traffic().into_iter().take(31)).await;
    node.all_ended(31, PATIENCE).await;
    for _ in 0..4 {
        assert_eq!(watcher.next().await["lane"], "grpc");
    }
    let more = timeout(Duration::from_millis(200), watcher.next()).await;
    assert!(more.is_err(), "{more:?}");
    for (query, status) in [("sample=0", 400), ("lane=nats", 404), ("lanes=grpc", 400)] {
        assert_eq!(
            Watcher::open(&node, query, 1 << 20).await.err(),
            Some(status),
            "{query}"
        );
    }
}

#[actix_rt::test]
async fn a_slow_watcher_holds_up_no_record_and_learns_how_many_it_has_missed() {
    const RECORDS: usize = 120;
    let api = Api::start();
    let node = node(&api).await;
    let mut slow = Watcher::open(&node, "", 4 << 10).await.expect("a stream");
    let filling = "x".repeat(200 << 10);
    let record = format!(
        "{{\"name\":\"{filling}\",\"location\":\"Graz\",\"age\":3,\"infectedtype\":\"\",\"state\":\"\"}}"
    );
    let record = Bytes::from(record);
    // More than the system's buffers and the node's room have place for.
    post_all(&node, "a", (0..RECORDS).map(|_| record.clone())).await;
    node.all_ended(RECORDS, PATIENCE).await;
    let (mut shown, mut missed) = (0, 0);
    while shown + missed < RECORDS {
        let event = slow.next().await;
        match event["missed"].as_u64() {
            Some(count) => missed += usize::try_from(count).unwrap(),
            None => shown += 1,
        }
    }
    assert_eq!(shown + missed, RECORDS);
    assert!(missed > 0 && shown > 0, "{missed} missed");
    // It sees what passes now.
    post_all(&node, "b", traffic().into_iter().take(1)).await;
    assert_eq!(slow.next().await["id"], "b-0");
}

#[actix_rt::test]
async fn one_watcher_too_many_gets_a_problem_and_one_that_leaves_makes_room() {
    let api = Api::start();
    let node = node(&api).await;
    let mut watchers = Vec::new();
    for _ in 0..WATCHERS_MAX {
        watchers.push(Watcher::start(&node, "").await);
    }
    assert_eq!(Watcher::open(&node, "", 1 << 20).await.err(), Some(503));
    watchers.pop();
    eventually("a place is free", PATIENCE, async || {
        Watcher::open(&node, "", 1 << 20).await.ok()
    })
    .await;
}

/// `waypost tap`, while it runs.
fn running_tap(node: &Node, arguments: &[&str]) -> Child {
    let admin = format!("http://127.0.0.1:{}", node.admin);
    process::start(env!("CARGO_BIN_EXE_waypost"), |command| {
        command
            .args(["tap", "--admin", &admin])
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    })
    .expect("it runs")
}

#[actix_rt::test]
async fn the_command_prints_a_line_for_each_record_up_to_its_limit() {
    let api = Api::start();
    let node = node(&api).await;
    let mut tap = running_tap(&node, &["--lane", "grpc", "--limit", "3"]);
    let mut posted = 0;
    let status = eventually("it ends", PATIENCE, async || {
        let name = format!("a-{posted}");
        post_all(&node, &name, traffic().into_iter().take(1)).await;
        posted += 1;
        tap.try_wait().expect("a child's status")
    })
    .await;
    assert!(status.success(), "{status}");
    let output = tap.wait_with_output().expect("its output");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(
        lines.iter().all(|line| line["record"]["path"] == "GRPC"),
        "{text}"
    );

    // Its reader has gone: it ends with the next record.
    let mut tap = running_tap(&node, &[]);
    drop(tap.stdout.take());
    let status = eventually("it ends", PATIENCE, async || {
        post_all(&node, &format!("b-{posted}"), traffic().into_iter().take(1)).await;
        posted += 1;
        tap.try_wait().expect("a child's status")
    })
    .await;
    assert!(status.success(), "{status}");
    let mut tap = running_tap(&node, &[]);
    process::signal(&tap, "TERM");
    let ended = async || tap.try_wait().expect("a child's status");
    let status = eventually("it ends", PATIENCE, ended).await;
    assert!(status.success() || status.code().is_none(), "{status}");
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    for (arguments, status, told) in [
        (
            &["--lane", "nats"][..],
            1,
            "This node has no lane nats; it has grpc\n",
        ),
        (&["--lane", "pigeon"], 2, "waypost: invalid value 'pigeon'"),
        (&["--sample", "0"], 2, "waypost: invalid value '0'"),
        (&["--limit", "0"], 2, "waypost: invalid value '0'"),
    ] {
        let (code, printed, error) =
            waypost(&[&["tap", "--admin", admin], arguments].concat()).await;
        assert_eq!(
            (code, &*printed),
            (Some(status), ""),
            "{arguments:?}: {error}"
        );
        assert!(error.contains(told), "{arguments:?}: {error}");
    }
}

#[actix_rt::test]
async fn the_command_follows_a_node_through_a_restart_and_says_that_it_was_away() {
    let api = Api::start();
    let mut node = node(&api).await;
    let mut tap = running_tap(&node, &["--limit", "1000"]);
    let lines = tap.stdout.take().expect("it is piped");
    let lines = pipe::Receiver::from_owned_fd(lines.into()).expect("it is a pipe");
    let mut lines = BufReader::new(lines).lines();
    let mut posted = 0;
    // Posts until a line comes: a record that passes before the watch is not shown.
    let mut next = async |node: &Node| loop {
        let name = format!("a-{posted}");
        posted += 1;
        post_all(node, &name, traffic().into_iter().take(1)).await;
        if let Ok(line) = timeout(Duration::from_millis(300), lines.next_line()).await {
            let line = line.expect("a pipe").expect("it has not ended");
            return serde_json::from_str::<Value>(&line).expect("JSON");
        }
    };
    assert_eq!(next(&node).await["lane"], "grpc");
    node.killed_and_started().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // Records from before the kill may come first.
    let away = loop {
        let line = next(&node).await;
        if line["lane"] != "grpc" {
            break line;
        }
    };
    let is_told = away.get("missed") == Some(&Value::Null) && away["away_s"].as_f64() > Some(0.0);
    assert!(is_told, "{away}");
    assert_eq!(next(&node).await["lane"], "grpc");
    tap.kill().expect("it runs");
    tap.wait().expect("it has ended");
}

#[actix_rt::test]
async fn records_are_shown_to_operators_alone() {
    let api = Api::start();
    let file = tokens::file("open-sesame-open-sesame\n");
    let node = tokens::guarded_by("ADMIN__TOKEN_FILE", &api.url(), &file).await;
    assert_eq!(Watcher::open(&node, "", 1 << 20).await.err(), Some(401));
}
