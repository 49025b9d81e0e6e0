//! The log of a healthy node: one start-up line, and only lines that an operator can use.

use std::collections::HashSet;

use awc::http::StatusCode;
use serde_json::{Map, Value, json};

use crate::support::{
    api::Api,
    lanes::{Lane as _, Nats, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic,
};

const LANES: [&str; 3] = ["grpc", "nats", "rabbitmq"];
/// The server may sync later than it confirms, which is its default.
const SYNC_WARNING: &str = "the broker's settings weaken the guarantee";
/// Parts of a line that Rust's `Debug` or a client library wrote.
const FOREIGN: [&str; 5] = ["Some(", "Ok(", " { ", "lapin", "async_nats"];

/// Starts `node`'s three lanes, carries a record and stops the node.
async fn work_and_stop(node: &mut Node) {
    for lane in LANES {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let (status, receipt) = node.post("/", "a", traffic()[0].clone()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    node.at_rest(PATIENCE).await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
}

#[actix_rt::test]
async fn a_healthy_start_is_one_line_and_no_client_library_speaks() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let api = Api::start();
    let variables = [grpc_variables(), nats.variables(), rabbitmq.variables()].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    work_and_stop(&mut node).await;
    let log = node.log();
    let starts: Vec<_> = log
        .lines()
        .filter(|line| line.contains("node is up"))
        .collect();
    assert_eq!(starts.len(), 1, "{log}");
    let spool = node.data().display();
    for part in [
        format!("ingest=127.0.0.1:{}", node.ingest),
        format!("admin=127.0.0.1:{}", node.admin),
        "lanes=\"grpc, nats, rabbitmq\"".to_owned(),
        format!("api={}", api.url()),
        format!("spool={spool}"),
        "policy=\"round-robin\"".to_owned(),
    ] {
        assert!(starts[0].contains(&part), "no {part} in {}", starts[0]);
    }
    let mut seen = HashSet::new();
    for line in log.lines() {
        let (_time, rest) = line.split_once(' ').expect("a time");
        assert!(seen.insert(rest), "twice: {line}");
        let rest = rest.trim_start();
        let (level, rest) = rest.split_once(' ').expect("a level");
        assert!(level == "INFO" || rest.contains(SYNC_WARNING), "{line}");
        assert!(rest.starts_with("waypost::"), "{line}");
        for part in FOREIGN {
            assert!(!rest.contains(part), "{part} in {line}");
        }
    }

    let mut node = Node::start_with_json_log(&api.url(), &variables).await;
    work_and_stop(&mut node).await;
    json_log_is_clean(&node, &api);
}

fn json_log_is_clean(node: &Node, api: &Api) {
    let log = node.log();
    let lines = log.lines().map(serde_json::from_str::<Map<String, Value>>);
    let lines: Vec<_> = lines.map(|line| line.expect("an object a line")).collect();
    let starts: Vec<_> = lines
        .iter()
        .filter(|line| line["message"] == "node is up")
        .collect();
    assert_eq!(starts.len(), 1, "{log}");
    for (key, value) in [
        ("ingest", json!(format!("127.0.0.1:{}", node.ingest))),
        ("admin", json!(format!("127.0.0.1:{}", node.admin))),
        ("lanes", json!("grpc, nats, rabbitmq")),
        ("api", json!(api.url())),
        ("spool", json!(node.data().display().to_string())),
        ("policy", json!("round-robin")),
    ] {
        assert_eq!(starts[0][key], value, "{key}");
    }
    let mut seen = HashSet::new();
    for mut line in lines {
        line.remove("timestamp");
        let text = Value::Object(line.clone()).to_string();
        let is_expected = line["level"] == "INFO" || line["message"] == SYNC_WARNING;
        assert!(is_expected, "{text}");
        let target = line["target"].as_str().expect("a target");
        assert!(target.starts_with("waypost::"), "{text}");
        for value in line.values() {
            let value = value.as_str().unwrap_or_default();
            for part in FOREIGN {
                assert!(!value.contains(part), "{part} in {text}");
            }
        }
        assert!(seen.insert(text.clone()), "twice: {text}");
    }
}
