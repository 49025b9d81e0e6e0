//! Policies that read scores, with real lanes: what `/api/status` tells of them.

use std::time::Duration;

use crate::support::{
    api::Api,
    eventually,
    lanes::{Lane as _, Nats, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    proxy::{Flow, Network},
    rig::Rig as _,
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
    let score = node.lane("nats").await["score"].as_f64();
    assert!(score.is_some_and(|score| score > 0.0), "{score:?}");

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
