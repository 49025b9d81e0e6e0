//! Records that a lane's broker refuses: those that are too large for it, and all of them while it
//! is full.

use std::{process::Command, time::Duration};

use async_nats::jetstream::{self, stream};
use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::{Value, json};
use waypost::transport::UNSETTLED_MAX;

use crate::{
    routing::adaptive,
    support::{
        api::{Api, Conduct},
        eventually,
        lanes::{Lane as _, Nats, Rabbitmq, grpc_variables, value},
        load::Load,
        node::{Node, PATIENCE},
        process::free_port,
        rig::Rig as _,
    },
};

/// The most bytes of a message of the stream.
const STREAM_MAX: usize = 4000;
/// Messages that the broker's queue takes.
const ROOM: i64 = 5;

/// Records until a broker is full. Those that the node holds take no place in a queue of `RabbitMQ`.
const FULL_MAX: usize = UNSETTLED_MAX as usize + 200;

/// A record of about `bytes`.
fn record(bytes: usize) -> Bytes {
    let record = json!({
        "name": "Ana", "location": "Flores", "age": 33, "infectedtype": "imported",
        "state": "symptomatic", "note": "x".repeat(bytes),
    });
    record.to_string().into()
}

fn small() -> Bytes {
    record(10)
}

fn large() -> Bytes {
    record(2 * STREAM_MAX)
}

/// The lane's stream, with more limits than a node gives it.
pub async fn declare(
    variables: &[(String, String)],
    limit: impl FnOnce(&mut stream::Config),
) -> (jetstream::Context, stream::Config) {
    let client = async_nats::connect(value(variables, "LANES__NATS__URL"));
    let context = jetstream::new(client.await.expect("the server answers"));
    let mut config = stream::Config {
        name: value(variables, "LANES__NATS__STREAM").into(),
        subjects: vec![value(variables, "LANES__NATS__SUBJECT").into()],
        retention: stream::RetentionPolicy::WorkQueue,
        discard: stream::DiscardPolicy::New,
        ..stream::Config::default()
    };
    limit(&mut config);
    context
        .create_stream(config.clone())
        .await
        .expect("a new stream");
    (context, config)
}

fn limit_messages(config: &mut stream::Config) {
    config.max_message_size = i32::try_from(STREAM_MAX).expect("small");
}

/// What `waypost check --connect` tells.
fn connected(variables: &[(String, String)]) -> String {
    let variables = variables.iter();
    let variables = variables.map(|(key, value)| (format!("WAYPOST_{key}"), value));
    let told = Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["check", "--connect"])
        .envs(variables)
        .output();
    String::from_utf8(told.expect("the program runs").stderr).expect("text")
}

async fn post(node: &Node, path: &str, key: &str, record: Bytes) -> (StatusCode, Value) {
    node.post(path, key, record).await.expect("an answer")
}

/// Posts a record, and says by which path it was taken.
async fn path_of(node: &Node, path: &str, key: &str, record: Bytes) -> String {
    let (status, body) = post(node, path, key, record).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    body["path"].as_str().expect("a path").to_owned()
}

/// The lane is up, has never been away, and refuses nothing.
async fn is_well(node: &Node, lane: &str) {
    let status = node.lane(lane).await;
    assert_eq!(
        (&status["state"], &status["restarts"], &status["refusing"]),
        (&json!("up"), &json!(0), &Value::Null),
        "{status}"
    );
}

async fn metric(node: &Node, name: &str, lane: &str) -> f64 {
    let (_, text) = node.text("/metrics").await;
    let head = format!("{name}{{lane=\"{lane}\"}} ");
    let sample = text.lines().find_map(|sample| sample.strip_prefix(&head));
    sample
        .unwrap_or_else(|| panic!("no {head}"))
        .parse()
        .expect("a number")
}

#[actix_rt::test]
async fn a_record_that_is_too_large_for_one_lane_goes_by_another() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    declare(&variables, limit_messages).await;
    let api = Api::start();
    let node = Node::start(&api.url(), &[&variables[..], &grpc_variables()].concat()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for number in 0..10 {
        let path = path_of(&node, "/", &format!("large-{number}"), large()).await;
        assert_eq!(path, "GRPC");
    }
    let mut paths = Vec::new();
    for number in 0..4 {
        paths.push(path_of(&node, "/", &format!("small-{number}"), small()).await);
    }
    assert!(
        paths.contains(&"NATS".into()) && paths.contains(&"GRPC".into()),
        "{paths:?}"
    );
    is_well(&node, "nats").await;
    let status = node.lane("nats").await;
    assert_eq!(status["broker"]["largest_message"], json!(STREAM_MAX));
    api.wait_for(14, PATIENCE).await;
    let told = connected(&variables);
    assert!(
        told.contains("messages up to 3.9 KiB") && told.contains("no lane carries a record of"),
        "{told}"
    );
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_record_that_no_lane_carries_is_too_large_also_while_the_lane_is_away() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    declare(&variables, limit_messages).await;
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let batch = [&b"["[..], &small(), b",", &large(), b",", &small(), b"]"].concat();
    for round in ["up", "away"] {
        for path in ["/", "/nats"] {
            let (status, problem) = post(&node, path, &format!("{round}{path}"), large()).await;
            assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{problem}");
            let detail = problem["detail"].as_str().expect("a reason");
            assert!(detail.contains("nats 3.9 KiB"), "{detail}");
            assert_eq!(problem["type"], "urn:waypost:problem:too-large");
        }
        let key = format!("batch-{round}");
        let (status, problem) = post(&node, "/", &key, batch.clone().into()).await;
        assert_eq!(
            (status, &problem["index"]),
            (StatusCode::PAYLOAD_TOO_LARGE, &json!(1)),
            "{problem}"
        );
        let status = node.status().await;
        assert_eq!(status["ledger"]["accepted"], 0, "of a batch, none is taken");
        if round == "up" {
            is_well(&node, "nats").await;
            nats.kill().await;
            node.lane_is_away("nats", PATIENCE).await;
        }
    }
    assert_eq!(path_of(&node, "/", "small", small()).await, "spool");
}

/// Nobody knows the limit of a lane that has never connected.
#[actix_rt::test]
async fn before_the_first_connection_the_systems_default_counts_and_more_is_for_later() {
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let variables = [
        ("LANES__NATS__URL", nobody.as_str()),
        ("INGEST__MAX_RECORD", "4MiB"),
        ("INGEST__MAX_BODY", "4MiB"),
    ];
    let variables = variables.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    assert_eq!(path_of(&node, "/", "usual", record(1 << 19)).await, "spool");
    let (status, problem) = post(&node, "/", "large", record(1 << 20)).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{problem}");
}

#[actix_rt::test]
async fn what_waits_and_no_lane_carries_any_more_becomes_a_dead_letter_that_says_so() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let (context, config) = declare(&variables, |_| {}).await;
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    nats.kill().await;
    node.lane_is_away("nats", PATIENCE).await;
    nats.revive().await;
    node.lane_is("nats", "up", PATIENCE).await;
    assert_eq!(node.order("nats", "pause").await, StatusCode::ACCEPTED);
    node.lane_is("nats", "paused", PATIENCE).await;
    assert_eq!(path_of(&node, "/", "large", large()).await, "spool");
    assert_eq!(path_of(&node, "/", "small", small()).await, "spool");
    let mut limited = config;
    limit_messages(&mut limited);
    context
        .update_stream(limited)
        .await
        .expect("the server takes it");
    assert_eq!(node.order("nats", "resume").await, StatusCode::ACCEPTED);
    eventually("a dead letter", PATIENCE, async || {
        (node.dead().await.len() == 1).then_some(())
    })
    .await;
    api.wait_for(1, PATIENCE).await;
    assert!(api.taken().contains_key("small"));
    let (_, list) = node.get("/api/dead").await.expect("an answer");
    let letter = &list["dead"][0];
    let answer = letter["answer"].as_str().expect("a reason");
    let failure = answer.split("last failures: nats: ").nth(1);
    assert!(
        answer.contains("nats 3.9 KiB") && failure.is_some_and(|why| why.contains("connect")),
        "{answer}"
    );
    assert_eq!(
        (&letter["id"], &letter["given_up"]),
        (&json!("large"), &json!(false))
    );
    node.at_rest(PATIENCE).await;
}

/// The stream's limit is lowered while the lane uses it.
#[actix_rt::test]
async fn a_limit_that_is_lowered_is_learnt_from_the_first_refusal() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let (context, config) = declare(&variables, |_| {}).await;
    let api = Api::start();
    let node = Node::start(&api.url(), &[&variables[..], &grpc_variables()].concat()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut limited = config;
    limit_messages(&mut limited);
    context
        .update_stream(limited)
        .await
        .expect("the server takes it");
    for number in 0..4 {
        let path = path_of(&node, "/", &format!("large-{number}"), large()).await;
        assert_eq!(path, "GRPC");
    }
    let (status, problem) = post(&node, "/nats", "pinned", large()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{problem}");
    assert_eq!(path_of(&node, "/nats", "small", small()).await, "NATS");
    is_well(&node, "nats").await;
}

/// The API does not answer, so that nothing leaves the broker; its queue takes `ROOM` messages.
async fn is_told_and_waited_out(
    lane: &str,
    tag: &str,
    reason: &str,
    variables: &[(String, String)],
) {
    let api = Api::start();
    api.behave(|_, _| Conduct::Hang);
    let node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let mut paths = Vec::new();
    while paths.len() < FULL_MAX && !paths.ends_with(&["spool".to_owned()]) {
        let key = format!("r-{}", paths.len());
        paths.push(path_of(&node, "/", &key, small()).await);
    }
    assert_eq!(paths[0], tag);
    assert!(paths.len() < FULL_MAX, "it is never full");
    let status = node.lane(lane).await;
    let refusing = status["refusing"].as_str().unwrap_or_default();
    assert!(refusing.contains(reason), "{status}");
    assert_eq!(
        (&status["state"], &status["restarts"]),
        (&json!("up"), &json!(0)),
        "{status}"
    );
    assert!(metric(&node, "waypost_lane_refusals_total", lane).await >= 1.0);
    assert!(
        node.get("/readyz").await.expect("an answer").0.is_success(),
        "the spool has room"
    );
    let lines = |level: &str, text: &str| {
        let log = node.log();
        let lines = log
            .lines()
            .filter(|line| line.contains(level) && line.contains(text));
        lines.count()
    };
    let refused = metric(&node, "waypost_lane_refusals_total", lane).await;
    eventually("the feeder has tried twice more", PATIENCE, async || {
        let now = metric(&node, "waypost_lane_refusals_total", lane).await;
        (now >= refused + 2.0).then_some(())
    })
    .await;
    assert_eq!(
        lines("WARN", "the broker refuses records"),
        1,
        "one line for all refusals"
    );

    api.behave(|_, _| Conduct::Answer(200));
    api.wait_for(paths.len(), Duration::from_mins(2)).await;
    node.at_rest(PATIENCE).await;
    let mut number = 0;
    eventually("the refusals are over", PATIENCE, async || {
        number += 1;
        path_of(&node, "/", &format!("later-{number}"), small()).await;
        node.lane(lane).await["refusing"].is_null().then_some(())
    })
    .await;
    assert_eq!(lines("INFO", "the broker takes records again"), 1);
    assert_eq!(lines("WARN", "the broker refuses records"), 1);
    assert_eq!(lines("ERROR", ""), 0, "nor is a first start an error");
}

#[actix_rt::test]
async fn a_full_stream_is_told_and_waited_out() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    declare(&variables, |config| config.max_messages = ROOM).await;
    is_told_and_waited_out("nats", "NATS", "maximum messages exceeded", &variables).await;
}

#[actix_rt::test]
async fn a_queue_that_rejects_is_told_and_waited_out() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let variables = rabbitmq.variables();
    let pattern = format!("^{}$", value(&variables, "LANES__RABBITMQ__QUEUE"));
    let limit = format!(r#"{{"max-length":{ROOM},"overflow":"reject-publish"}}"#);
    rabbitmq.ctl(&[
        "set_policy",
        "full",
        &pattern,
        &limit,
        "--apply-to",
        "queues",
    ]);
    is_told_and_waited_out("rabbitmq", "RabbitMQ", "reject-publish", &variables).await;
    rabbitmq.ctl(&["clear_policy", "full"]);
}

/// `RabbitMQ` tells its limit only by refusing.
#[actix_rt::test]
async fn the_limit_of_rabbitmq_is_learnt_from_the_first_refusal() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let variables = rabbitmq.variables();
    let set = |rabbitmq: &mut Rabbitmq, bytes: usize| {
        let order = format!("application:set_env(rabbit, max_message_size, {bytes}).");
        rabbitmq.ctl(&["eval", &order]);
    };
    set(&mut rabbitmq, STREAM_MAX);
    let api = Api::start();
    let node = Node::start(&api.url(), &[&variables[..], &grpc_variables()].concat()).await;
    node.lane_is("rabbitmq", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, problem) = post(&node, "/rabbitmq", "first", large()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{problem}");
    let detail = problem["detail"].as_str().expect("a reason");
    assert!(detail.contains("rabbitmq 3.9 KiB"), "{detail}");
    // The refusal has cost the connection.
    eventually("the lane is up again", PATIENCE, async || {
        let lane = node.lane("rabbitmq").await;
        (lane["restarts"] != 0 && lane["state"] == "up").then_some(())
    })
    .await;
    let restarts = node.lane("rabbitmq").await["restarts"].clone();
    for number in 0..10 {
        let path = path_of(&node, "/", &format!("large-{number}"), large()).await;
        assert_eq!(path, "GRPC");
    }
    assert_eq!(
        path_of(&node, "/rabbitmq", "small", small()).await,
        "RabbitMQ"
    );
    assert_eq!(
        node.lane("rabbitmq").await["restarts"],
        restarts,
        "one refusal is enough"
    );
    api.wait_for(11, PATIENCE).await;
    node.at_rest(PATIENCE).await;
    set(&mut rabbitmq, 128 << 20);
}

#[actix_rt::test]
async fn a_lane_that_fails_is_ejected_with_a_log_line_a_metric_and_the_reason() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    declare(&variables, |config| config.max_messages = ROOM).await;
    let api = Api::start();
    // Nothing leaves the broker, which is soon full.
    api.behave(|_, _| Conduct::Hang);
    let node = Node::start(&api.url(), &adaptive(&variables)).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(node.lane("nats").await["ejected"], Value::Null);
    let mut load = Load::start(&node);
    let ejected = eventually("an ejection", PATIENCE, async || {
        let ejected = node.lane("nats").await["ejected"].take();
        (!ejected.is_null()).then_some(ejected)
    })
    .await;
    let reason = ejected["reason"].as_str().expect("a reason");
    assert!(
        reason.contains("records failed within ten seconds"),
        "{reason}"
    );
    assert!(
        ejected["retry_in_s"].as_f64().is_some_and(|s| s > 0.0),
        "{ejected}"
    );
    load.end().await;
    assert_eq!(load.refused(), 0, "the other lane takes them");
    let count = metric(&node, "waypost_lane_ejections_total", "nats").await;
    let log = node.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("the lane is ejected"));
    let lines: Vec<_> = lines.collect();
    assert!(lines.iter().all(|line| line.contains("lane=nats")), "{log}");
    let told = f64::from(u32::try_from(lines.len()).expect("few"));
    assert!((1.0..=told).contains(&count), "one line for each: {log}");
    assert_eq!(node.lane("grpc").await["ejected"], Value::Null);
}
