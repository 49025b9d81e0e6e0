//! The main job, through each lane with its real broker, by the program as users run it.

use std::{
    cell::RefCell,
    collections::HashMap,
    process::{Command, Output},
    rc::Rc,
    time::Duration,
};

use awc::http::StatusCode;
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::{
    support::{
        api::Api,
        lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
        node::Node,
        rig::Rig as _,
        traffic,
    },
    tokens,
};

/// Connections that post at the same time.
const CLIENTS: usize = 16;
const PATIENCE: Duration = Duration::from_mins(1);

/// `record` as the API must get it.
fn tagged(record: &Bytes, tag: &str) -> Vec<u8> {
    let open = record.strip_suffix(b"}").expect("a JSON object");
    [open, format!(",\"path\":\"{tag}\"}}").as_bytes()].concat()
}

/// Posts each record of `traffic.json` under its own key, and compares the POSTs that the API got.
async fn carries_all(lane: &str, tag: &str, variables: &[(String, String)]) {
    let api = Api::start();
    let node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;

    let records = traffic();
    let next = Rc::new(RefCell::new(records.iter().enumerate()));
    join_all((0..CLIENTS).map(|_| async {
        loop {
            let Some((at, record)) = next.borrow_mut().next() else {
                break;
            };
            let key = format!("record-{at}");
            let (status, receipt) = node
                .post("/", &key, record.clone())
                .await
                .expect("an answer");
            assert_eq!(
                (status, &receipt),
                (StatusCode::ACCEPTED, &json!({"id": key, "path": tag}))
            );
        }
    }))
    .await;

    api.wait_for(records.len(), PATIENCE).await;
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["accepted"], &ledger["delivered"]),
        (&json!(1000), &json!(1000)),
        "{ledger}"
    );
    let posts: HashMap<_, _> = api
        .posts()
        .into_iter()
        .map(|post| (post.key.clone().unwrap_or_default(), post))
        .collect();
    assert_eq!(posts.len(), records.len());
    for (at, record) in records.iter().enumerate() {
        let post = &posts[&format!("record-{at}")];
        assert_eq!(post.body, tagged(record, tag), "record {at}");
        assert_eq!(post.content_type.as_deref(), Some("application/json"));
    }
    let status = node.lane(lane).await;
    assert_eq!(
        (&status["accepted"], &status["delivered"]),
        (&json!(1000), &json!(1000))
    );
    assert!(status["publish_ms"]["p50"].as_f64() > Some(0.0), "{status}");
}

#[actix_rt::test]
async fn all_records_pass_the_grpc_lane_byte_for_byte() {
    carries_all("grpc", "GRPC", &grpc_variables()).await;
}

#[actix_rt::test]
async fn all_records_pass_the_nats_lane_byte_for_byte() {
    let Some(mut system) = Nats::start().await else {
        return;
    };
    carries_all(<Nats as Lane>::NAME, Nats::TAG, &system.variables()).await;
}

#[actix_rt::test]
async fn all_records_pass_the_rabbitmq_lane_byte_for_byte() {
    let Some(mut system) = Rabbitmq::start().await else {
        return;
    };
    carries_all(Rabbitmq::NAME, Rabbitmq::TAG, &system.variables()).await;
}

#[actix_rt::test]
async fn all_records_pass_the_pubsub_lane_byte_for_byte() {
    let Some(mut system) = Pubsub::start().await else {
        return;
    };
    carries_all(Pubsub::NAME, Pubsub::TAG, &system.variables()).await;
}

/// A trace context that a client sent reaches the API through the lane.
async fn carries_trace(lane: &str, variables: &[(String, String)]) {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let api = Api::start();
    let node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let request = awc::Client::default().post(format!("http://127.0.0.1:{}/{lane}", node.ingest));
    let answer = request
        .insert_header(("traceparent", TRACE))
        .send_body(traffic()[0].clone())
        .await
        .expect("an answer");
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    api.wait_for(1, PATIENCE).await;
    assert_eq!(api.posts()[0].traceparent.as_deref(), Some(TRACE));
}

#[actix_rt::test]
async fn trace_context_passes_each_lane() {
    carries_trace("grpc", &grpc_variables()).await;
    if let Some(mut nats) = Nats::start().await {
        carries_trace("nats", &nats.variables()).await;
    }
    if let Some(mut rabbitmq) = Rabbitmq::start().await {
        carries_trace("rabbitmq", &rabbitmq.variables()).await;
    }
    if let Some(mut pubsub) = Pubsub::start().await {
        carries_trace("pubsub", &pubsub.variables()).await;
    }
}

/// Runs `waypost demo --once`.
fn run_demo(arguments: &[&str], variables: &[(String, String)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["demo", "--once"])
        .args(arguments)
        // Other tests use the default ports, and a busy machine may keep a healthy broker waiting.
        .env("WAYPOST_INGEST__LISTEN", "127.0.0.1:0")
        .env("WAYPOST_ADMIN__LISTEN", "127.0.0.1:0")
        .env("WAYPOST_ROUTER__PUBLISH_TIMEOUT", "20s")
        .envs(variables.iter().map(|(key, value)| (key, value)))
        .output()
        .expect("the program runs")
}

#[actix_rt::test]
async fn a_demo_of_a_node_that_asks_for_tokens_delivers_all() {
    let tokens = tokens::file("secret-of-mine");
    let path = tokens.path().display().to_string();
    let output = run_demo(&[], &[("WAYPOST_INGEST__TOKENS_FILE".into(), path)]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("without the token"), "{told}");
}

/// The JSON report of the demo.
fn demo(variables: &[(String, String)]) -> Value {
    let output = run_demo(&["--json"], variables);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON on the standard output")
}

#[actix_rt::test]
async fn the_demo_delivers_all_with_nothing_installed() {
    let report = demo(&[]);
    let all = json!({
        "accepted": 1000, "recovered": 0, "delivered": 1000, "handed_over": 0, "dead": 0, "dropped": 0,
        "spooled": 0, "parked": 0, "in_flight": 0, "missing": 0,
        "redelivered": 0,
    });
    assert_eq!(report["ledger"], all);
    assert_eq!(report["api"]["paths"], json!({"GRPC": 1000}));
}

#[actix_rt::test]
async fn the_demo_shows_a_record_as_the_api_received_it_and_the_ledgers_terms() {
    let output = run_demo(&[], &[]);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let received = printed.lines().find(|line| line.starts_with('{')).unwrap();
    let is_it = |record: &Bytes| received.as_bytes() == tagged(record, "GRPC");
    assert!(traffic().iter().any(is_it), "{received}");
    for term in [
        "1000 accepted",
        "0 recovered",
        "1000 delivered",
        "0 dead",
        "0 dropped",
        "0 spooled",
        "0 in_flight",
        "0 handed_over",
        "0 missing",
    ] {
        assert!(printed.contains(term), "no {term} in\n{printed}");
    }
}

#[actix_rt::test]
async fn a_demo_of_chaos_breaks_all_and_loses_nothing() {
    let output = run_demo(&["--chaos=10s", "--json"], &[]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    for step in [
        "The live page is http://127.0.0.1:",
        "lane grpc is disconnected",
        "lane grpc may connect again",
        "the API is away",
        "the API is back",
        "the disk is full: new records are refused",
    ] {
        assert!(told.contains(step), "no {step} in\n{told}");
    }
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let (chaos, ledger) = (&report["chaos"], &report["ledger"]);
    let count = |value: &Value| value.as_u64().expect("a count");
    assert_eq!(
        (count(&chaos["lost"]), &chaos["disk_was_full"]),
        (0, &json!(true)),
        "{report}"
    );
    // 200 are due each second.
    assert!(count(&chaos["taken"]) > 500, "{report}");
    assert_eq!(ledger["accepted"], chaos["taken"], "{report}");
    assert!(
        ledger["delivered"].as_u64() >= chaos["taken"].as_u64(),
        "{report}"
    );
    for nowhere in [
        "dead",
        "dropped",
        "missing",
        "spooled",
        "parked",
        "in_flight",
    ] {
        assert_eq!(ledger[nowhere], 0, "{nowhere}: {report}");
    }
    assert!(
        count(&report["api"]["records"]) >= count(&chaos["taken"]),
        "{report}"
    );
}

#[actix_rt::test]
async fn the_demo_says_why_a_record_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("records.json");
    std::fs::write(
        &file,
        [b"[", &*traffic()[0], b",{\"name\":\"Ana\"}]"].concat(),
    )
    .unwrap();
    let output = run_demo(&["--records", file.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    let why = told
        .lines()
        .find(|line| line.starts_with("waypost: record 2: answered 422 "));
    assert!(why.is_some_and(|why| why.contains("location")), "{told}");
    assert!(
        told.contains("waypost: 1 of 2 records were refused"),
        "{told}"
    );
}

#[actix_rt::test]
async fn the_demo_rejects_a_flag_that_it_would_ignore() {
    let output = run_demo(&["--api", "http://127.0.0.1:9/"], &[]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[actix_rt::test]
async fn the_demo_shares_its_records_out_over_all_lanes() {
    let (Some(mut nats), Some(mut rabbitmq), Some(mut pubsub)) = (
        Nats::start().await,
        Rabbitmq::start().await,
        Pubsub::start().await,
    ) else {
        return;
    };
    let variables = [nats.variables(), rabbitmq.variables(), pubsub.variables()].concat();
    let variables: Vec<_> = variables
        .into_iter()
        .map(|(key, value)| (format!("WAYPOST_{key}"), value))
        .collect();
    let report = demo(&variables);
    assert_eq!(
        report["api"]["paths"],
        json!({"GRPC": 250, "NATS": 250, "RabbitMQ": 250, "PubSub": 250})
    );
    for (term, count) in [
        ("accepted", 1000),
        ("delivered", 1000),
        ("in_flight", 0),
        ("spooled", 0),
    ] {
        assert_eq!(report["ledger"][term], count, "{term}");
    }
}

#[actix_rt::test]
async fn no_more_posts_are_under_way_than_the_api_is_to_bear() {
    let api = Api::start();
    api.delay(Duration::from_millis(50));
    let node = Node::start(
        &api.url(),
        &[
            grpc_variables(),
            vec![("API__CONCURRENCY".into(), "4".into())],
        ]
        .concat(),
    )
    .await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let posts = (0..60).map(|number| {
        let client = node.client();
        async move {
            client
                .post("/", &number.to_string(), traffic()[0].clone())
                .await
                .expect("an answer")
                .0
        }
    });
    assert!(
        join_all(posts)
            .await
            .iter()
            .all(|status| *status == StatusCode::ACCEPTED)
    );
    node.at_rest(PATIENCE).await;
    assert_eq!((api.count(), api.most_at_a_time()), (60, 4));
}

#[actix_rt::test]
async fn an_interrupt_drains_the_node_as_well() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node.signal("INT");
    assert_eq!(node.ended(Duration::from_secs(10)).await.code(), Some(0));
}
