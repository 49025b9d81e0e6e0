//! Nodes that share a broker: what one has accepted and another has delivered is in flight nowhere,
//! and what a broker has lost is missing.

use std::{collections::HashMap, time::Duration};

use async_nats::jetstream;
use lapin::options::QueuePurgeOptions;
use serde_json::Value;
use waypost::transport::UNSETTLED_MAX;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables, value},
    load::Load,
    node::{Node, PATIENCE},
    process::free_port,
    rig::Rig as _,
    traffic,
};

/// How long a broker may take to send again what a killed node had, and the nodes to compare.
const REDELIVERY: Duration = Duration::from_mins(2);
/// Longer than a node takes to notice that records are gone. A comparison that finds nothing leaves
/// no trace to wait for, so this time must pass.
const COMPARED: Duration = Duration::from_secs(8);

fn count(of: &Value, key: &str) -> u64 {
    of[key].as_u64().unwrap_or_else(|| panic!("{key} of {of}"))
}

/// The sum of the two sides of the equation.
fn balances(ledger: &Value) -> bool {
    let sum = |keys: &[&str]| keys.iter().map(|key| count(ledger, key)).sum::<u64>();
    let ends = ["delivered", "handed_over", "dead", "dropped"];
    sum(&["accepted", "recovered"]) == sum(&ends) + sum(&["spooled", "in_flight", "missing"])
}

/// Waits until none of the nodes has a record in flight or on disk, and each ledger balances.
async fn all_at_rest(nodes: &[Node], patience: Duration) {
    for node in nodes {
        eventually("a node is at rest", patience, async || {
            let status = node.status().await;
            let ledger = &status["ledger"];
            let lanes = status["lanes"].as_array()?;
            let rests = count(ledger, "spooled") == 0
                && count(ledger, "in_flight") == 0
                && lanes.iter().all(|lane| lane["in_flight"] == 0);
            (rests && balances(ledger) && status["balanced"] == true).then_some(())
        })
        .await;
        assert_eq!(node.status().await["ledger"]["missing"], 0);
    }
}

/// A metric of all nodes, summed by run.
async fn by_run(nodes: &[Node], metric: &str) -> HashMap<String, u64> {
    let mut runs = HashMap::new();
    for node in nodes {
        let (_, text) = node.text("/metrics").await;
        for line in text.lines().filter(|line| line.starts_with(metric)) {
            let run = line.split_once("run=\"").expect("a label").1;
            let (run, records) = run.split_once("\"} ").expect("a sample");
            *runs.entry(run.to_owned()).or_default() += records.parse::<u64>().expect("a count");
        }
    }
    runs
}

/// What `docs/operate.md` asks Prometheus: how many more records a run has handed over than were
/// taken over of it, at least and at most.
async fn untaken(nodes: &[Node]) -> Vec<(i64, i64)> {
    let handed_over = by_run(nodes, "waypost_ledger_handed_over").await;
    let taken_over = by_run(nodes, "waypost_ledger_taken_over").await;
    let uncounted_max = by_run(nodes, "waypost_ledger_uncounted_max").await;
    let of = |(run, records): (&String, &u64)| {
        let taken = taken_over.get(run).copied().unwrap_or_default();
        let most = records.checked_signed_diff(taken).expect("small numbers");
        (
            most - uncounted_max
                .get(run)
                .copied()
                .unwrap_or_default()
                .cast_signed(),
            most,
        )
    };
    handed_over.iter().map(of).collect()
}

/// Waits until no record can be missing. A node counts what it takes over at its end, and may have
/// it in hand when the others are at rest.
async fn all_are_taken_over(nodes: &[Node]) {
    eventually("the fleet's sum balances", REDELIVERY, async || {
        let untaken = untaken(nodes).await;
        println!("untaken: {untaken:?}");
        untaken.iter().all(|(least, _)| *least <= 0).then_some(())
    })
    .await;
}

/// Three nodes with the same lanes and the same API.
async fn three(api: &Api, variables: &[(String, String)]) -> Vec<Node> {
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(Node::start(&api.url(), variables).await);
    }
    nodes
}

/// Posts `records` records to the first node, an eighth of them to the second, and none to others.
async fn load_unevenly(nodes: &[Node], records: usize, name: &str) {
    let records_of_each = [records, records / 8, 0];
    let bodies = traffic();
    for (node, records) in nodes.iter().zip(records_of_each) {
        for number in 0..records {
            let key = format!("{name}-{}-{number}", node.ingest);
            let (status, answer) = node
                .post("/", &key, bodies[number % bodies.len()].clone())
                .await
                .expect("an answer");
            assert!(status.is_success(), "{answer}");
        }
    }
}

#[actix_rt::test]
async fn three_nodes_on_two_brokers_hand_over_what_others_deliver_and_miss_nothing() {
    let (Some(mut nats), Some(mut rabbitmq)) = (Nats::start().await, Rabbitmq::start().await)
    else {
        return;
    };
    let variables = [nats.variables(), rabbitmq.variables()].concat();
    let api = Api::start();
    api.delay(Duration::from_millis(5));
    let mut nodes = three(&api, &variables).await;
    for node in &nodes {
        for lane in ["nats", "rabbitmq"] {
            node.lane_is(lane, "up", PATIENCE).await;
        }
    }
    load_unevenly(&nodes, 400, "first").await;
    all_at_rest(&nodes, REDELIVERY).await;
    let first = nodes[0].status().await["ledger"].clone();
    assert!(count(&first, "handed_over") > 50, "{first}");
    all_are_taken_over(&nodes).await;
    assert_eq!(untaken(&nodes).await, [(0, 0); 3], "nobody was killed");

    // One dies with records in hand, its own and others', and forgets nothing that it has taken.
    api.behave(|_, _| Conduct::Hang);
    load_unevenly(&nodes, 400, "second").await;
    nodes[1].killed_and_started().await;
    api.behave(|_, _| Conduct::Answer(200));
    load_unevenly(&nodes, 400, "third").await;
    all_at_rest(&nodes, REDELIVERY).await;
    all_are_taken_over(&nodes).await;
    assert_eq!(api.taken().len(), 3 * 450);

    // One dies in the midst of its acks: what it had in hand may be uncounted.
    let mut load = Load::start(&nodes[0]);
    load.take(300).await;
    nodes[2].killed_and_started().await;
    load.take(300).await;
    load.end().await;
    load.is_met(&api, REDELIVERY).await;
    all_at_rest(&nodes, REDELIVERY).await;
    all_are_taken_over(&nodes).await;
}

/// More than a broker hands out.
const PURGED: usize = UNSETTLED_MAX as usize + 700;

/// A node with [`PURGED`] records in flight: its API hangs, so they are in the broker, or in the
/// node's hands.
async fn with_records_in_flight(api: &Api, lane: &str, variables: &[(String, String)]) -> Node {
    api.behave(|_, _| Conduct::Hang);
    let node = Node::start(&api.url(), variables).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let bodies = traffic();
    for number in 0..PURGED {
        let body = bodies[number % bodies.len()].clone();
        let answer = node.post("/", &format!("purged-{number}"), body).await;
        assert!(answer.is_some_and(|(status, _)| status.is_success()));
    }
    tokio::time::sleep(COMPARED).await;
    let status = node.status().await;
    assert_eq!(count(&status["ledger"], "in_flight"), PURGED as u64);
    assert_eq!(count(&status["ledger"], "missing"), 0);
    assert_eq!(status["balanced"], true);
    node
}

async fn is_noticed(node: &Node) {
    eventually("the loss is noticed", PATIENCE, async || {
        let status = node.status().await;
        let missing = count(&status["ledger"], "missing");
        (missing > 0 && status["balanced"] == false).then_some(())
    })
    .await;
}

/// After `purge` the records in the node's hands arrive, and the others are missing.
async fn a_purge_is_noticed<L: Lane>(lane: &mut L, purge: impl AsyncFnOnce(&[(String, String)])) {
    let mut variables = lane.variables();
    // No copy is kept.
    variables.push(("INGEST__ACK".into(), "lane".into()));
    let api = Api::start();
    let node = with_records_in_flight(&api, L::NAME, &variables).await;
    purge(&variables).await;
    is_noticed(&node).await;
    api.behave(|_, _| Conduct::Answer(200));
    let ledger = eventually("the others arrive", PATIENCE, async || {
        let ledger = node.status().await["ledger"].clone();
        (count(&ledger, "in_flight") == 0).then_some(ledger)
    })
    .await;
    let delivered = api.taken().len();
    assert!(delivered < PURGED, "the purge came too late");
    assert_eq!(count(&ledger, "missing"), (PURGED - delivered) as u64);
    assert!(balances(&ledger), "{ledger}");
    eventually("it is said", PATIENCE, async || {
        let said = format!("records={}", PURGED - delivered);
        node.log().contains(&said).then_some(())
    })
    .await;
    tokio::time::sleep(COMPARED).await;
    let status = node.status().await;
    assert_eq!(status["ledger"], ledger, "it stays");
    assert_eq!(status["balanced"], false);
    let (_, metrics) = node.text("/metrics").await;
    let metric = format!("waypost_missing_records {}\n", PURGED - delivered);
    assert!(metrics.contains(&metric), "{metrics}");
    let lines = node.log().matches("has lost records").count();
    assert!(lines <= 2, "no storm: {}", node.log());
}

pub async fn purge_stream(address: &str, variables: &[(String, String)]) {
    let client = async_nats::connect(address).await.expect("it runs");
    let stream = value(variables, "LANES__NATS__STREAM");
    let stream = jetstream::new(client).get_stream(stream).await;
    stream
        .expect("it is there")
        .purge()
        .await
        .expect("it works");
}

#[actix_rt::test]
async fn what_a_purge_of_a_stream_has_taken_is_missing() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let address = nats.address();
    a_purge_is_noticed(&mut nats, async |variables| {
        purge_stream(&address, variables).await;
    })
    .await;
}

#[actix_rt::test]
async fn records_that_were_missing_are_published_again_if_copies_are_kept() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let api = Api::start();
    let node = with_records_in_flight(&api, "nats", &variables).await;
    purge_stream(&nats.address(), &variables).await;
    is_noticed(&node).await;
    let nodes = [node];
    api.behave(|_, _| Conduct::Answer(200));
    all_at_rest(&nodes, PATIENCE).await;
    let ledger = nodes[0].status().await["ledger"].clone();
    assert_eq!(count(&ledger, "delivered"), PURGED as u64, "{ledger}");
    assert_eq!(api.taken().len(), PURGED);
}

#[actix_rt::test]
async fn what_a_purge_of_a_queue_has_taken_is_missing() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let client = rabbitmq.client().await;
    a_purge_is_noticed(&mut rabbitmq, async |variables| {
        let queue = value(variables, "LANES__RABBITMQ__QUEUE");
        let channel = client.create_channel().await.expect("a channel");
        let purged = channel.queue_purge(queue.into(), QueuePurgeOptions::default());
        purged.await.expect("it works");
    })
    .await;
}

/// Each node of a pair is the other's peer: what it sends is with the other.
#[actix_rt::test]
async fn records_of_a_peer_are_handed_over() {
    let ports = [free_port(), free_port()];
    let api = Api::start();
    let mut nodes = Vec::new();
    for (own, other) in [(ports[0], ports[1]), (ports[1], ports[0])] {
        let variables = [
            ("LANES__GRPC__LISTEN".to_owned(), format!("127.0.0.1:{own}")),
            (
                "LANES__GRPC__PEERS".to_owned(),
                format!("http://127.0.0.1:{other}"),
            ),
        ];
        nodes.push(Node::start(&api.url(), &variables).await);
    }
    for node in &nodes {
        node.lane_is("grpc", "up", PATIENCE).await;
    }
    for (number, body) in traffic().iter().take(40).enumerate() {
        let key = format!("peer-{number}");
        let answer = nodes[0].post("/", &key, body.clone()).await;
        assert!(answer.is_some_and(|(status, _)| status.is_success()));
    }
    all_at_rest(&nodes, PATIENCE).await;
    let ledgers = [nodes[0].status().await, nodes[1].status().await];
    assert_eq!(count(&ledgers[0]["ledger"], "handed_over"), 40);
    assert_eq!(count(&ledgers[1]["ledger"], "recovered"), 40);
    all_are_taken_over(&nodes).await;
    assert_eq!(untaken(&nodes).await, [(0, 0); 2]);
}

/// Pub/Sub has no count of its messages. What another node has taken is known once nothing of this
/// node's can wait there any more.
#[actix_rt::test]
async fn two_nodes_on_one_subscription_have_nothing_in_flight_at_rest() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    let variables = pubsub.variables();
    let api = Api::start();
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let node = Node::start(&api.url(), &variables).await;
        node.lane_is("pubsub", "up", PATIENCE).await;
        nodes.push(node);
    }
    load_unevenly(&nodes, 400, "shared").await;
    all_at_rest(&nodes, REDELIVERY).await;
    let mut handed_over = 0;
    for node in &nodes {
        handed_over += count(&node.status().await["ledger"], "handed_over");
    }
    assert!(
        handed_over > 0,
        "one node has taken all of its own records only"
    );
    all_are_taken_over(&nodes).await;
    assert_eq!(untaken(&nodes).await, [(0, 0); 2]);
}

/// A node that is alone on its lanes hands nothing over, however it is disturbed.
#[actix_rt::test]
async fn a_node_that_restarts_its_lane_under_load_is_alone_all_the_same() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let variables = [nats.variables(), grpc_variables()].concat();
    let nodes = [Node::start(&api.url(), &variables).await];
    let [node] = &nodes;
    node.lane_is("nats", "up", PATIENCE).await;
    let mut load = Load::start(node);
    for _ in 0..3 {
        load.take(200).await;
        node.order("nats", "restart").await;
        nats.kill().await;
        load.take(200).await;
        nats.revive().await;
        node.lane_is("nats", "up", PATIENCE).await;
    }
    load.end().await;
    load.is_met(&api, REDELIVERY).await;
    all_at_rest(&nodes, REDELIVERY).await;
    tokio::time::sleep(COMPARED).await;
    assert_eq!(node.status().await["ledger"]["handed_over"], 0);
}
