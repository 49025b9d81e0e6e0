//! A network between node and broker that drops all bytes and closes no connection.
//! `FAULTS_SECONDS` is how long it does.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::support::{
    api::Api,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    proxy::{Flow, Network},
    wanted,
};

const BOTH_WAYS: Network = Network::BLACK_HOLE;
const TO_SERVER: Network = Network {
    to_server: Flow::Swallows,
    ..Network::WELL
};
const TO_CLIENT: Network = Network {
    to_client: Flow::Swallows,
    ..Network::WELL
};
/// How soon the node notices a silent connection.
const NOTICED: Duration = Duration::from_secs(10);

async fn black_hole<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    let seconds = wanted("FAULTS_SECONDS", 6);
    let (proxy, variables) = through_proxy(system.variables());
    let api = Api::start();
    api.keep_keys_only();
    let soon = [("ROUTER__PUBLISH_TIMEOUT".to_owned(), "2s".to_owned())];
    let node = Node::start(
        &api.url(),
        &[&variables[..], &grpc_variables(), &soon].concat(),
    )
    .await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    for network in [BOTH_WAYS, TO_SERVER, TO_CLIENT] {
        node.lane_is(L::NAME, "up", PATIENCE).await;
        load.take(100).await;
        proxy.set(network);
        let began = Instant::now();
        node.lane_is_away(L::NAME, NOTICED).await;
        let noticed = began.elapsed();
        load.take(100).await;
        sleep(Duration::from_secs(seconds).saturating_sub(began.elapsed())).await;
        proxy.set(Network::WELL);
        let began = Instant::now();
        node.lane_is(L::NAME, "up", PATIENCE).await;
        println!(
            "{}: {network:?} for {seconds} s: noticed after {noticed:?}, up {:?} after it",
            L::NAME,
            began.elapsed()
        );
        load.take(100).await;
    }
    load.end().await;
    let verdict = load.verdict(&node, &api, Duration::from_mins(2)).await;
    println!("{}: {verdict}", L::NAME);
    assert_eq!(
        (
            verdict.lost,
            verdict.dead,
            verdict.unexpected,
            verdict.untaken
        ),
        (0, 0, 0, 0),
        "{verdict}"
    );
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn the_network_to_nats_swallows_everything() {
    black_hole::<Nats>().await;
}

#[actix_rt::test]
async fn the_network_to_rabbitmq_swallows_everything() {
    black_hole::<Rabbitmq>().await;
}

#[actix_rt::test]
async fn the_network_to_pubsub_swallows_everything() {
    black_hole::<Pubsub>().await;
}
