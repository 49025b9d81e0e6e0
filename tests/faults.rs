//! Faults under load: every record that got a 2xx arrives.

mod api_away;
mod deleted;
mod kills;
mod network;
mod random_faults;

use std::time::{Duration, Instant};

use awc::http::StatusCode;
use futures_util::{StreamExt as _, stream};
use serde_json::json;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    load::{CLIENTS, Load},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic, wanted,
};

/// The Pub/Sub emulator leases messages to the stream of a node that has ended, ten seconds at a
/// time.
const PUBSUB_REDELIVERY: Duration = Duration::from_mins(5);
/// Nodes that run on Pub/Sub at the same time.
const PUBSUB_NODES: usize = 8;

/// Kills the broker of a lane under load, and starts it again. Meanwhile the other lane takes all
/// traffic.
async fn broker_is_killed_under_load<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    let api = Api::start();
    let node = Node::start(&api.url(), &[grpc_variables(), system.variables()].concat()).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;

    let mut load = Load::start(&node);
    load.take(200).await;
    system.kill().await;
    node.lane_is_away(L::NAME, PATIENCE).await;
    let taken = load.accepted();
    let by_grpc = node.lane("grpc").await["accepted"].as_u64().unwrap();
    load.take(200).await;
    let taken_since = load.accepted() - taken;
    let by_grpc_since = node.lane("grpc").await["accepted"].as_u64().unwrap() - by_grpc;
    assert!(
        by_grpc_since + CLIENTS as u64 >= taken_since as u64,
        "{by_grpc_since} of {taken_since} by the other lane"
    );

    system.revive().await;
    let answers = Instant::now();
    node.lane_is(L::NAME, "up", PATIENCE).await;
    println!(
        "{} was up {:?} after its broker answered again",
        L::NAME,
        answers.elapsed()
    );
    load.take(200).await;
    load.end().await;

    assert_eq!(load.untaken(), 0, "requests that were not taken");
    let lane = node.lane(L::NAME).await;
    assert!(lane["restarts"].as_u64() >= Some(1), "{lane}");
    assert!(lane["last_error"].is_string(), "{lane}");
    if L::SURVIVES_KILL {
        load.is_met(&api, PATIENCE).await;
    }
    assert!(node.lane(L::NAME).await["delivered"].as_u64() > Some(0));
}

#[actix_rt::test]
async fn nats_is_killed_under_load() {
    broker_is_killed_under_load::<Nats>().await;
}

#[actix_rt::test]
async fn rabbitmq_is_killed_under_load() {
    broker_is_killed_under_load::<Rabbitmq>().await;
}

/// The emulator loses everything. The node creates topic and subscription again, and they carry
/// records.
#[actix_rt::test]
async fn the_pubsub_emulator_is_killed_under_load() {
    broker_is_killed_under_load::<Pubsub>().await;
}

/// A server that does not answer, on a connection that stays open.
#[actix_rt::test]
async fn nats_falls_silent_under_load() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let soon = [("ROUTER__PUBLISH_TIMEOUT".to_owned(), "2s".to_owned())];
    let node = Node::start(
        &api.url(),
        &[&grpc_variables()[..], &nats.variables(), &soon].concat(),
    )
    .await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    load.take(200).await;
    nats.signal("STOP");
    node.lane_is_away("nats", PATIENCE).await;
    load.take(200).await;
    nats.signal("CONT");
    node.lane_is("nats", "up", PATIENCE).await;
    load.take(200).await;
    load.end().await;
    assert_eq!(load.untaken(), 0, "requests that were not taken");
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;
}

async fn broker_comes_later<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    system.kill().await;
    let api = Api::start();
    let node = Node::start(&api.url(), &system.variables()).await;
    node.lane_is_away(L::NAME, PATIENCE).await;
    let path = async |key: &str| {
        node.post("/", key, traffic()[0].clone()).await.unwrap().1["path"].clone()
    };
    assert_eq!(path("before").await, "spool");
    system.revive().await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    assert_eq!(path("after").await, L::TAG);
    api.wait_for(2, PATIENCE).await;
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["accepted"], &ledger["delivered"]),
        (&json!(2), &json!(2))
    );
}

#[actix_rt::test]
async fn a_node_that_starts_before_nats_finds_it_later() {
    broker_comes_later::<Nats>().await;
}

#[actix_rt::test]
async fn a_node_that_starts_before_rabbitmq_finds_it_later() {
    broker_comes_later::<Rabbitmq>().await;
}

#[actix_rt::test]
async fn a_node_that_starts_before_the_pubsub_emulator_finds_it_later() {
    broker_comes_later::<Pubsub>().await;
}

/// The emulator leases messages to the stream of a node that has ended, and the next node does not
/// get them. So each subscription sees one node end, and the tests wait for all leases at the same
/// time.
async fn on_subscriptions_of_their_own(
    pubsub: &mut Pubsub,
    times: u64,
    once: impl AsyncFn(&[(String, String)]),
) {
    let subscriptions: Vec<_> = (0..times).map(|_| pubsub.variables()).collect();
    let all = subscriptions.iter().map(|variables| once(variables));
    stream::iter(all)
        .buffer_unordered(PUBSUB_NODES)
        .collect::<()>()
        .await;
}

/// SIGTERM under load, `FAULTS_TIMES` times.
async fn is_terminated_under_load(
    mut variables: impl FnMut() -> Vec<(String, String)>,
    lane: &str,
) {
    for _ in 0..wanted("FAULTS_TIMES", 1) {
        is_terminated_once(&variables(), lane, PATIENCE).await;
    }
}

/// The node exits 0 within ten seconds and cuts no request off. All records arrive within
/// `patience`, after a new start if need be.
async fn is_terminated_once(variables: &[(String, String)], lane: &str, patience: Duration) {
    let api = Api::start();
    api.delay(Duration::from_millis(20));
    let mut node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let mut load = Load::start(&node);
    load.take(200).await;
    node.signal("TERM");
    let asked = Instant::now();
    let status = node.ended(Duration::from_secs(10)).await;
    println!("ended {:?} after SIGTERM", asked.elapsed());
    assert_eq!(status.code(), Some(0));
    load.end().await;
    assert_eq!(load.refused(), 0, "a request was refused");

    node.start_again().await;
    let verdict = load.verdict(&node, &api, patience).await;
    assert_eq!(
        (verdict.lost, verdict.dead, verdict.unexpected),
        (0, 0, 0),
        "{verdict}"
    );
    node.at_rest(PATIENCE).await;
    // A refused connection has no answer either, but its record has not arrived.
    assert_eq!(load.cut_off(&api), 0, "requests that were cut off");
}

#[actix_rt::test]
async fn a_node_on_grpc_is_terminated_under_load() {
    is_terminated_under_load(grpc_variables, "grpc").await;
}

#[actix_rt::test]
async fn a_node_on_nats_is_terminated_under_load() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    is_terminated_under_load(|| nats.variables(), "nats").await;
}

#[actix_rt::test]
async fn a_node_on_rabbitmq_is_terminated_under_load() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    is_terminated_under_load(|| rabbitmq.variables(), "rabbitmq").await;
}

#[actix_rt::test]
async fn a_node_on_pubsub_is_terminated_under_load() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    on_subscriptions_of_their_own(&mut pubsub, wanted("FAULTS_TIMES", 1), async |variables| {
        is_terminated_once(variables, "pubsub", PUBSUB_REDELIVERY).await;
    })
    .await;
}

/// The API reads the POSTs and answers none.
#[actix_rt::test]
async fn a_node_whose_api_hangs_is_terminated_in_time() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    api.behave(|_, _| Conduct::Hang);
    let variables = [
        nats.variables(),
        vec![("API__TIMEOUT".into(), "60s".into())],
    ]
    .concat();
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    load.take(200).await;
    api.wait_for(1, PATIENCE).await;
    node.signal("TERM");
    eventually("it says that it takes no more", PATIENCE, async || {
        (node.get("/readyz").await?.0 == StatusCode::SERVICE_UNAVAILABLE).then_some(())
    })
    .await;
    assert_eq!(node.ended(Duration::from_secs(10)).await.code(), Some(0));
    load.end().await;
    assert_eq!(load.refused(), 0, "a request was refused");

    api.behave(|_, _| Conduct::Answer(200));
    node.start_again().await;
    load.is_met(&api, PATIENCE).await;
    node.all_ended(load.accepted(), PATIENCE).await;
}

/// A panic in an actor's handler: only that actor restarts, and each record with a receipt arrives.
async fn an_actor_panics_under_load(point: &str) {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let variables = [grpc_variables(), nats.variables()].concat();
    // The point panics once, at its hundred and first pass.
    let node = Node::start_with_fault(
        &api.url(),
        &variables,
        &format!("{point}=100*off->1*panic(planted)->off"),
    )
    .await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    let restarts = async || {
        let status = node.status().await;
        let of_lanes = status["lanes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|lane| lane["restarts"].as_u64().unwrap());
        (
            of_lanes.sum::<u64>(),
            status["router_restarts"].as_u64().unwrap(),
        )
    };
    let expected = if point == "router" { (0, 1) } else { (1, 0) };
    eventually("the actor is restarted", PATIENCE, async || {
        (restarts().await == expected).then_some(())
    })
    .await;
    load.take(300).await;
    load.end().await;
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;
    assert_eq!(restarts().await, expected, "no other actor was restarted");
    assert_eq!(load.untaken(), 0, "requests that were not taken");
}

#[actix_rt::test]
async fn the_router_panics_under_load() {
    an_actor_panics_under_load("router").await;
}

#[actix_rt::test]
async fn a_lane_panics_while_it_publishes_under_load() {
    an_actor_panics_under_load("lane").await;
}

#[actix_rt::test]
async fn a_lane_panics_while_it_pulls_under_load() {
    an_actor_panics_under_load("pull").await;
}

#[actix_rt::test]
async fn a_forwarder_panics_under_load() {
    an_actor_panics_under_load("forwarder").await;
}
