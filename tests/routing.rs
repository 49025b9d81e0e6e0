//! Policies that read scores, with real lanes: what `/api/status` tells of them.

use std::time::Duration;

use awc::http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    api::Api,
    eventually,
    lanes::{Lane as _, Nats, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    process::free_port,
    proxy::{Flow, Network},
    rig::Rig as _,
    traffic,
};

/// The variables of a lane and of the gRPC lane, with the policy.
pub fn adaptive(lane: &[(String, String)]) -> Vec<(String, String)> {
    let policy = ("ROUTER__POLICY".to_owned(), "adaptive".to_owned());
    // A copy on disk would take longer than the lanes.
    let ack = ("INGEST__ACK".to_owned(), "lane".to_owned());
    [lane, &grpc_variables(), &[policy, ack]].concat()
}

async fn share(node: &Node, lane: &str) -> f64 {
    node.lane(lane).await["share"].as_f64().expect("a share")
}

#[actix_rt::test]
async fn a_slow_lane_takes_few_records_and_gets_its_share_back() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    let api = Api::start();
    let node = Node::start(&api.url(), &adaptive(&variables)).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start_with(&node, 16, Duration::from_millis(5));
    let has = async |what: &str, fits: fn(f64) -> bool| {
        eventually(what, 2 * PATIENCE, async || {
            fits(share(&node, "nats").await).then_some(())
        })
        .await;
    };
    has("its share", |share| share > 0.1).await;
    eventually("a delivery has made its score", PATIENCE, async || {
        let score = node.lane("nats").await["score"].as_f64();
        score.filter(|score| *score > 0.0)
    })
    .await;

    proxy.set(Network {
        to_client: Flow::Delays(Duration::from_millis(200)),
        ..Network::WELL
    });
    has("a small one while it is slow", |share| share < 0.03).await;
    proxy.set(Network::WELL);
    has("its share again", |share| share > 0.1).await;
    load.end().await;
    assert_eq!(load.untaken(), 0);
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;
}

async fn explained(node: &Node, id: &str) -> (StatusCode, Value) {
    let answer = node.get(&format!("/api/explain?id={id}")).await;
    answer.expect("the node answers")
}

#[actix_rt::test]
async fn a_choice_is_explained_with_the_factors_of_its_score() {
    let api = Api::start();
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let nats = [("LANES__NATS__URL".to_owned(), nobody)];
    let node = Node::start(&api.url(), &adaptive(&nats)).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["first", "second"] {
        let (status, _) = node.post("/", key, traffic()[0].clone()).await.unwrap();
        assert_eq!(status, StatusCode::ACCEPTED);
        node.at_rest(PATIENCE).await;
    }
    let (status, told) = explained(&node, "second").await;
    assert_eq!((status, &told["id"]), (StatusCode::OK, &json!("second")));
    let choices = told["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 1, "{told}");
    for (member, value) in [
        ("rule", json!("default")),
        ("policy", json!("adaptive")),
        ("lane", json!("grpc")),
        ("reason", json!("the lowest score")),
        ("runner_up", Value::Null),
        ("api", json!("api")),
    ] {
        assert_eq!(choices[0][member], value, "{member}: {told}");
    }
    let weighed = &choices[0]["lanes"][0];
    let number = |member: &str| weighed[member].as_f64().expect("a number");
    assert_eq!(weighed["lane"], "grpc");
    assert!(number("latency_ms") > 0.0, "{told}");
    let score = number("latency_ms") / 1000.0 * (number("in_flight") + 1.0)
        / (number("weight") * number("success_ratio") * number("slow_start"));
    assert!((number("score") / score - 1.0).abs() < 1e-9, "{told}");

    for (query, status) in [
        ("id=unknown", StatusCode::NOT_FOUND),
        ("id=", StatusCode::BAD_REQUEST),
        ("", StatusCode::BAD_REQUEST),
        ("id=a&id=b", StatusCode::BAD_REQUEST),
    ] {
        let answer = node.get(&format!("/api/explain?{query}")).await;
        let (answered, problem) = answer.expect("the node answers");
        assert_eq!(answered, status, "{query}: {problem}");
        assert_eq!(problem["status"], status.as_u16(), "{query}: {problem}");
    }
}

#[actix_rt::test]
async fn a_record_that_waits_on_disk_is_explained_before_and_after() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    proxy.set(Network {
        refuses: true,
        ..Network::WELL
    });
    proxy.cut();
    node.lane_is_away("nats", PATIENCE).await;
    let (_, receipt) = node.post("/", "waits", traffic()[0].clone()).await.unwrap();
    assert_eq!(receipt["path"], "spool");
    let (_, told) = explained(&node, "waits").await;
    assert_eq!(told["choices"][0]["lane"], Value::Null, "{told}");

    proxy.set(Network::WELL);
    node.at_rest(PATIENCE).await;
    let (_, told) = explained(&node, "waits").await;
    assert_eq!(told["choices"][1]["lane"], "nats", "{told}");
}
