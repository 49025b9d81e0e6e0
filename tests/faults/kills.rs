//! Killed processes: the node, a broker, and the node before any broker was there.
//!
//! `FAULTS_TIMES` is the number of kills, `FAULTS_DOWN_MS` the longest time that a broker stays
//! away, `FAULTS_RECORDS` the number of records that wait for one.

use std::time::{Duration, Instant};

use awc::http::StatusCode;
use futures_util::{StreamExt as _, stream};

use super::on_subscriptions_of_their_own;
use crate::support::{
    api::Api,
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    load::{CLIENTS, Load},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic, wanted,
};

/// How long a broker may take to redeliver the messages of a killed node.
const REDELIVERY: Duration = Duration::from_mins(12);
/// POSTs that a lane may have in flight.
const POSTS: usize = 64;
/// Pub/Sub's client sends acks every 100 ms; with the round trip, an ack is under way for up to
/// this long.
const PUBSUB_ACKS: Duration = Duration::from_millis(200);

/// The node's memory limit, however many records wait.
const MEMORY_MAX: u64 = 128 << 20;

fn random_ms(up_to: u64) -> Duration {
    Duration::from_millis(fastrand::u64(0..=up_to))
}

/// SIGKILL at random moments under load. Only records in flight at a kill may arrive twice: those
/// in a POST, and those whose ack was under way, for which the client crate takes up to `acks`.
async fn node_is_killed(lane: &str, variables: &[(String, String)], times: u64, acks: Duration) {
    node_is_killed_under(lane, variables, times, acks, 1).await;
}

/// The same with `together` records per request, which are redelivered together.
async fn node_is_killed_under(
    lane: &str,
    variables: &[(String, String)],
    times: u64,
    acks: Duration,
    together: usize,
) {
    let api = Api::start();
    api.keep_keys_only();
    let mut node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let mut load = Load::start_with_batches(&node, together);
    let mut ready = Vec::new();
    let mut in_flight = 0;
    for _ in 0..times {
        load.take(20).await;
        tokio::time::sleep(random_ms(500)).await;
        let posted = api.count();
        tokio::time::sleep(acks).await;
        in_flight += (POSTS + CLIENTS) * together
            + if acks.is_zero() {
                0
            } else {
                api.count() - posted
            };
        ready.push(node.killed_and_started().await);
    }
    node.lane_is(lane, "up", PATIENCE).await;
    load.take(20).await;
    load.end().await;
    let verdict = load.verdict(&node, &api, REDELIVERY).await;
    ready.sort();
    println!(
        "{lane}: {times} kills: {verdict}, {in_flight} in flight; ready after {:?} at most",
        ready[ready.len() - 1]
    );
    assert_eq!(
        (verdict.lost, verdict.dead, verdict.unexpected),
        (0, 0, 0),
        "{verdict}"
    );
    assert!(
        verdict.duplicated <= in_flight,
        "{verdict}, {in_flight} in flight"
    );
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_node_on_grpc_is_killed_under_load() {
    node_is_killed(
        "grpc",
        &grpc_variables(),
        wanted("FAULTS_TIMES", 3),
        Duration::ZERO,
    )
    .await;
}

#[actix_rt::test]
async fn a_node_on_nats_is_killed_under_load() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    node_is_killed(
        "nats",
        &nats.variables(),
        wanted("FAULTS_TIMES", 3),
        Duration::ZERO,
    )
    .await;
}

#[actix_rt::test]
async fn a_node_on_nats_is_killed_under_a_load_of_batches() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    node_is_killed_under(
        "nats",
        &nats.variables(),
        wanted("FAULTS_TIMES", 3),
        Duration::ZERO,
        20,
    )
    .await;
}

/// SIGTERM and a new start under a load of batches. A message of which some records were delivered
/// is finished after the start.
async fn node_is_ended_under_batches<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    let api = Api::start();
    api.keep_keys_only();
    let mut node = Node::start(&api.url(), &system.variables()).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    // Slower than the load, so that some message is always half delivered.
    api.delay(Duration::from_millis(50));
    let mut load = Load::start_with_batches(&node, 100);
    for _ in 0..wanted("FAULTS_TIMES", 3) {
        load.take(2000).await;
        node.signal("TERM");
        assert!(node.ended(PATIENCE).await.success());
        node.start_again().await;
        node.lane_is(L::NAME, "up", PATIENCE).await;
    }
    load.end().await;
    api.delay(Duration::ZERO);
    let verdict = load.verdict(&node, &api, REDELIVERY).await;
    println!("{}: {verdict}", L::NAME);
    assert_eq!(
        (
            verdict.lost,
            verdict.dead,
            verdict.unexpected,
            verdict.duplicated
        ),
        (0, 0, 0, 0),
        "{verdict}"
    );
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_node_on_nats_is_ended_under_a_load_of_batches() {
    node_is_ended_under_batches::<Nats>().await;
}

#[actix_rt::test]
async fn a_node_on_rabbitmq_is_ended_under_a_load_of_batches() {
    node_is_ended_under_batches::<Rabbitmq>().await;
}

#[actix_rt::test]
async fn a_node_on_rabbitmq_is_killed_under_load() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    node_is_killed(
        "rabbitmq",
        &rabbitmq.variables(),
        wanted("FAULTS_TIMES", 3),
        Duration::ZERO,
    )
    .await;
}

#[actix_rt::test]
async fn a_node_on_pubsub_is_killed_under_load() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    on_subscriptions_of_their_own(&mut pubsub, wanted("FAULTS_TIMES", 1), async |variables| {
        node_is_killed("pubsub", variables, 1, PUBSUB_ACKS).await;
    })
    .await;
}

/// The only broker is killed again and again. The spool takes the records meanwhile.
async fn the_only_broker_is_killed<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    let times = wanted("FAULTS_TIMES", 2);
    let down = wanted("FAULTS_DOWN_MS", 1500);
    let api = Api::start();
    api.keep_keys_only();
    let soon = ("ROUTER__PUBLISH_TIMEOUT".to_owned(), "2s".to_owned());
    let node = Node::start(&api.url(), &[system.variables(), vec![soon]].concat()).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    let mut load = Load::start(&node);
    let mut back = Vec::new();
    for _ in 0..times {
        load.take(20).await;
        tokio::time::sleep(random_ms(500)).await;
        system.kill().await;
        node.lane_is_away(L::NAME, PATIENCE).await;
        load.take(20).await;
        tokio::time::sleep(random_ms(down)).await;
        system.revive().await;
        let answers = Instant::now();
        node.lane_is(L::NAME, "up", PATIENCE).await;
        back.push(answers.elapsed());
    }
    load.end().await;
    let verdict = load.verdict(&node, &api, REDELIVERY).await;
    back.sort();
    println!(
        "{}: {times} kills: {verdict}; up {:?} after it answered at most",
        L::NAME,
        back[back.len() - 1]
    );
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
async fn the_only_nats_is_killed_again_and_again() {
    the_only_broker_is_killed::<Nats>().await;
}

#[actix_rt::test]
async fn the_only_rabbitmq_is_killed_again_and_again() {
    the_only_broker_is_killed::<Rabbitmq>().await;
}

/// Posts `records` records. Returns how long that took.
async fn posted(node: &Node, prefix: &str, records: u64) -> Duration {
    let began = Instant::now();
    let all = traffic();
    let posts = stream::iter(0..records).map(|number| {
        let client = node.client();
        let record = all[0].clone();
        async move {
            client
                .post("/", &format!("{prefix}-{number}"), record)
                .await
                .expect("an answer")
                .0
        }
    });
    let answers: Vec<_> = posts.buffer_unordered(64).collect().await;
    assert!(
        answers.iter().all(|status| *status == StatusCode::ACCEPTED),
        "a record was not taken"
    );
    began.elapsed()
}

/// No broker at the start, then a kill of the node, then the broker. The node's memory does not
/// grow with the records that wait.
#[actix_rt::test]
async fn records_wait_on_disk_for_a_broker_that_comes_after_a_kill() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let records = wanted("FAULTS_RECORDS", 2000);
    let api = Api::start();
    api.keep_keys_only();
    let variables = nats.variables();
    let healthy = {
        let node = Node::start(&api.url(), &variables).await;
        node.lane_is("nats", "up", PATIENCE).await;
        let healthy = posted(&node, "healthy", records / 4).await * 4;
        node.at_rest(REDELIVERY).await;
        healthy
    };
    nats.kill().await;
    let mut node = Node::start(&api.url(), &variables).await;
    node.limit_memory(MEMORY_MAX);
    let spooled = posted(&node, "waits", records).await;
    let full = node.spool_bytes();
    let mut memory = vec![node.memory()];
    let ready = node.killed_and_started().await;
    let recovered = node.status().await["ledger"]["recovered"]
        .as_u64()
        .expect("a count");
    assert!(recovered >= records, "{recovered}");
    memory.push(node.memory());
    nats.revive().await;
    let began = Instant::now();
    let patience = REDELIVERY + Duration::from_millis(records * 5);
    let all = usize::try_from(records + records / 4).expect("a count");
    eventually("all have arrived", patience, async || {
        (api.taken().len() >= all).then_some(())
    })
    .await;
    let arrived = began.elapsed();
    memory.push(node.memory());
    assert!(
        memory.iter().all(|bytes| *bytes < MEMORY_MAX),
        "{memory:?} bytes of memory"
    );
    let waiting = usize::try_from(records).expect("a count");
    node.all_ended(waiting, REDELIVERY).await;
    eventually("its disk space is given back", PATIENCE, async || {
        (node.spool_bytes() < 1 << 20).then_some(())
    })
    .await;
    println!(
        "{records} records without a broker: {:.2} of the healthy lane's rate, {} KiB on disk, {:?} MiB of memory, ready {ready:?} \
         after a kill, all delivered within {arrived:?}, {} KiB on disk afterwards",
        healthy.as_secs_f64() / spooled.as_secs_f64(),
        full >> 10,
        memory.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>(),
        node.spool_bytes() >> 10,
    );
}

/// SIGSTOP for a while, then SIGCONT.
#[actix_rt::test]
async fn a_node_that_is_stopped_for_a_while_goes_on() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let seconds = wanted("FAULTS_SECONDS", 4);
    let api = Api::start();
    let node = Node::start(&api.url(), &[grpc_variables(), nats.variables()].concat()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    load.take(100).await;
    node.signal("STOP");
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    node.signal("CONT");
    node.lane_is("nats", "up", PATIENCE).await;
    load.take(100).await;
    load.end().await;
    let verdict = load.verdict(&node, &api, REDELIVERY).await;
    println!("stopped for {seconds} s: {verdict}");
    assert_eq!(
        (verdict.lost, verdict.dead, verdict.unexpected),
        (0, 0, 0),
        "{verdict}"
    );
    node.at_rest(PATIENCE).await;
}
