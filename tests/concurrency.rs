//! The limit of POSTs in flight, with a real API.

use std::time::Duration;

use awc::http::StatusCode;
use serde_json::Value;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    traffic,
};

fn variables(concurrency: &str) -> Vec<(String, String)> {
    let mut variables = grpc_variables();
    variables.push(("API__CONCURRENCY".into(), concurrency.into()));
    variables
}

/// The same with an API that must answer soon.
fn impatient(concurrency: &str) -> Vec<(String, String)> {
    let mut variables = variables(concurrency);
    variables.push(("API__TIMEOUT".into(), "500ms".into()));
    variables
}

/// The limit as the status shows it, which the metric shows too.
async fn limit(node: &Node) -> u64 {
    let (_, status) = node.get("/api/status").await.unwrap();
    let limit = status["api"]["limit"].as_u64();
    limit.unwrap_or_else(|| panic!("{status}"))
}

async fn submit(node: &Node, key: &str, records: usize) {
    let record = String::from_utf8_lossy(&traffic()[0]).into_owned();
    let batch = format!("[{}]", vec![record; records].join(","));
    let (status, body) = node.post("/", key, batch.into()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
}

#[actix_rt::test]
async fn an_api_that_times_out_gets_fewer_posts_at_a_time_and_more_when_it_is_back() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Hang);
    let node = Node::start(&api.url(), &impatient("64")).await;
    assert_eq!(limit(&node).await, 64);
    submit(&node, "hang", 500).await;
    eventually("a low limit", PATIENCE, async || {
        (limit(&node).await <= 4).then_some(())
    })
    .await;
    api.behave(|_, _| Conduct::Answer(200));
    api.delay(Duration::from_millis(50));
    submit(&node, "back", 1000).await;
    eventually("a high limit", PATIENCE, async || {
        (limit(&node).await >= 16).then_some(())
    })
    .await;
    let (_, text) = node.text("/metrics").await;
    assert!(text.contains("\nwaypost_api_concurrency_limit "), "{text}");
    let ledger: Value = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["delivered"], 1500, "{ledger}");
}

#[actix_rt::test]
async fn no_more_posts_are_in_flight_than_the_configuration_allows() {
    let api = Api::start();
    api.delay(Duration::from_millis(20));
    // The API counts a POST that the node has given up.
    let node = Node::start(&api.url(), &variables("3")).await;
    submit(&node, "few", 300).await;
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["delivered"], 300, "{ledger}");
    let most = api.most_at_a_time();
    assert!((1..=3).contains(&most), "{most}");
    assert!(limit(&node).await <= 3);
}
