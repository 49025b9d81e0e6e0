//! A stream, consumer, queue or subscription is deleted on the broker while a lane uses it: the
//! lane creates it again, and no record of this node is lost.

use std::time::Duration;

use async_nats::jetstream;
use lapin::options::QueueDeleteOptions;
use tokio::time::{sleep, timeout};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    load::Load,
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic,
};

fn value(variables: &[(String, String)], key: &str) -> String {
    variables
        .iter()
        .find(|(name, _)| name == key)
        .expect("it is set")
        .1
        .clone()
}

/// Waits until the broker is empty, calls `delete`, and starts a load at once.
async fn deleted(lane: &str, variables: &[(String, String)], delete: impl AsyncFnOnce(&Node)) {
    let api = Api::start();
    let node = Node::start(&api.url(), &[variables, &grpc_variables()].concat()).await;
    node.lane_is(lane, "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    load.take(100).await;
    load.end().await;
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;

    delete(&node).await;
    let mut load = Load::start_after(&node, &load);
    eventually("the loss is noticed", PATIENCE, async || {
        (node.lane(lane).await["restarts"] != 0).then_some(())
    })
    .await;
    load.take(100).await;
    node.lane_is(lane, "up", PATIENCE).await;
    let before = node.lane(lane).await["delivered"]
        .as_u64()
        .expect("a count");
    load.take(200).await;
    load.end().await;
    assert_eq!(load.untaken(), 0, "requests that were not taken");
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;
    let lane = node.lane(lane).await;
    assert!(
        lane["delivered"].as_u64() > Some(before),
        "it carries records again: {lane}"
    );
    assert!(lane["last_error"].is_string(), "{lane}");
}

#[actix_rt::test]
async fn a_stream_is_deleted_in_use() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let client = async_nats::connect(nats.address())
        .await
        .expect("the server answers");
    let stream = value(&variables, "LANES__NATS__STREAM");
    deleted("nats", &variables, async |_| {
        jetstream::new(client)
            .delete_stream(stream)
            .await
            .expect("it is there");
    })
    .await;
}

#[actix_rt::test]
async fn a_consumer_is_deleted_in_use() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let client = async_nats::connect(nats.address())
        .await
        .expect("the server answers");
    let stream = value(&variables, "LANES__NATS__STREAM");
    let durable = value(&variables, "LANES__NATS__DURABLE");
    deleted("nats", &variables, async |_| {
        let stream = jetstream::new(client)
            .get_stream(stream)
            .await
            .expect("it is there");
        stream.delete_consumer(&durable).await.expect("it is there");
    })
    .await;
}

#[actix_rt::test]
async fn a_queue_is_deleted_in_use() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let variables = rabbitmq.variables();
    let client = rabbitmq.client().await;
    let queue = value(&variables, "LANES__RABBITMQ__QUEUE");
    deleted("rabbitmq", &variables, async |_| {
        let channel = client.create_channel().await.expect("a channel");
        channel
            .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("it is there");
    })
    .await;
}

#[actix_rt::test]
async fn a_subscription_is_deleted_in_use() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    let variables = pubsub.variables();
    let (_, subscriptions) = pubsub.admin().await;
    let [project, subscription] =
        ["PROJECT", "SUBSCRIPTION"].map(|key| value(&variables, &format!("LANES__PUBSUB__{key}")));
    let name = format!("projects/{project}/subscriptions/{subscription}");
    deleted("pubsub", &variables, async |node| {
        subscriptions
            .delete_subscription()
            .set_subscription(name)
            .send()
            .await
            .expect("it is there");
        // Until the node notices, the topic confirms messages that no subscription keeps.
        node.lane_is_away("pubsub", PATIENCE).await;
    })
    .await;
}

/// Its subscription still has records. They are delivered before both are created anew.
#[actix_rt::test]
async fn a_topic_is_deleted_in_use() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    let variables = pubsub.variables();
    let (topics, _) = pubsub.admin().await;
    let [project, topic] =
        ["PROJECT", "TOPIC"].map(|key| value(&variables, &format!("LANES__PUBSUB__{key}")));
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(500));
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("pubsub", "up", PATIENCE).await;
    let post = async |key: &str| {
        let record = traffic()[0].clone();
        let (_, body) = node.post("/", key, record).await.expect("an answer");
        body["path"].clone()
    };
    for number in 0..20 {
        assert_eq!(post(&format!("left-{number}")).await, "PubSub");
    }
    topics
        .delete_topic()
        .set_topic(format!("projects/{project}/topics/{topic}"))
        .send()
        .await
        .expect("it is there");
    eventually("the loss is told", PATIENCE, async || {
        post("meanwhile").await;
        let lane = node.lane("pubsub").await;
        let refusing = lane["refusing"].as_str()?;
        (lane["state"] == "up" && refusing.contains("topic was deleted")).then_some(())
    })
    .await;
    assert_eq!(post("waits").await, "spool");
    api.behave(|_, _| Conduct::Answer(200));
    let left = (0..20).map(|number| format!("left-{number}"));
    let left: Vec<_> = left.collect();
    eventually("what is left arrives", 3 * PATIENCE, async || {
        api.misses(left.iter()).is_empty().then_some(())
    })
    .await;
    let mut number = 0;
    eventually("both are there again", 2 * PATIENCE, async || {
        number += 1;
        (post(&format!("after-{number}")).await == "PubSub").then_some(())
    })
    .await;
    node.at_rest(PATIENCE).await;
}

/// Longer than a node takes to call a subscription empty.
const SEEMS_EMPTY: Duration = Duration::from_secs(40);

/// A node that holds records keeps another from deleting their subscription, and when it dies, the
/// other gets them. The emulator sometimes leases them to the dead node's stream for longer than
/// the other waits, as the service does not. Then another emulator gets a try.
#[actix_rt::test]
async fn a_topic_is_deleted_while_another_node_holds_its_records() {
    for _ in 0..3 {
        let Some(pubsub) = Pubsub::start().await else {
            return;
        };
        if another_node_gets_what_a_dead_one_held(pubsub).await {
            return;
        }
    }
    panic!("what the dead node held did not arrive, with three emulators");
}

async fn another_node_gets_what_a_dead_one_held(mut pubsub: Pubsub) -> bool {
    let variables = pubsub.variables();
    let (topics, subscriptions) = pubsub.admin().await;
    let [project, topic, subscription] = ["PROJECT", "TOPIC", "SUBSCRIPTION"]
        .map(|key| value(&variables, &format!("LANES__PUBSUB__{key}")));
    let hanging = Api::start();
    hanging.behave(|_, _| Conduct::Hang);
    let mut holder = Node::start(&hanging.url(), &variables).await;
    holder.lane_is("pubsub", "up", PATIENCE).await;
    let post = async |key: &str| {
        let answer = holder.post("/", key, traffic()[0].clone()).await;
        answer.expect("an answer").1["path"].clone()
    };
    let held: Vec<_> = (0..5).map(|number| format!("held-{number}")).collect();
    for key in &held {
        assert_eq!(post(key).await, "PubSub");
    }
    topics
        .delete_topic()
        .set_topic(format!("projects/{project}/topics/{topic}"))
        .send()
        .await
        .expect("it is there");
    eventually("the loss is told", PATIENCE, async || {
        post("meanwhile").await;
        let lane = holder.lane("pubsub").await;
        let refusing = lane["refusing"].as_str()?;
        (lane["state"] == "up" && refusing.contains("topic was deleted")).then_some(())
    })
    .await;
    // By then it has them again.
    sleep(Duration::from_secs(5)).await;

    let api = Api::start();
    let other = Node::start(&api.url(), &variables).await;
    other.lane_is("pubsub", "up", PATIENCE).await;
    sleep(SEEMS_EMPTY).await;
    let name = format!("projects/{project}/subscriptions/{subscription}");
    let found = subscriptions.get_subscription().set_subscription(name);
    let found = found.send().await.expect("it is there");
    assert_eq!(found.topic, "_deleted-topic_", "it was created anew");
    holder.signal("KILL");
    holder.ended(PATIENCE).await;
    let arrival = async {
        while !api.misses(held.iter()).is_empty() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(2 * PATIENCE, arrival).await.is_ok()
}
