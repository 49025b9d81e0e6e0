//! Other clients of the brokers: their client crates alone, without Waypost's code, read its
//! records and publish plain JSON.

use std::{collections::HashSet, time::Duration};

use async_nats::jetstream::{self, consumer::PullConsumer};
use bytes::Bytes;
use futures_util::{StreamExt as _, future::join_all};
use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::{
    client::{Publisher, Subscriber, SubscriptionAdmin},
    model,
};
use lapin::{
    BasicProperties,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions},
    types::FieldTable,
};
use tokio::time::timeout;

use crate::support::{
    api::Api,
    lanes::{Lane, Nats, Pubsub, Rabbitmq},
    node::Node,
    rig::Rig as _,
    traffic,
};

const PATIENCE: Duration = Duration::from_mins(1);
/// An API that takes nothing.
const NO_API: &str = "http://127.0.0.1:9/";
/// A record of another publisher, with white space and a `path` of its own.
const PLAIN: &str = "\n{\"place\": \"Cobán\", \"path\": \"theirs\"}\n";

/// The value of a variable of a lane.
fn variable<'v>(variables: &'v [(String, String)], name: &str) -> &'v str {
    let found = variables.iter().find(|(key, _)| key.ends_with(name));
    &found.expect("the lane has it").1
}

/// Leaves all of `traffic.json` in the broker, by a node that has ended. `prepare` runs once the
/// lane is up, and before the first record is published.
async fn leave_traffic<L: Lane>(
    variables: &[(String, String)],
    prepare: impl AsyncFnOnce(),
) -> Vec<Bytes> {
    let records = traffic();
    let mut node = Node::start(NO_API, variables).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    prepare().await;
    let posts = records.iter().enumerate().map(|(at, record)| {
        let node = &node;
        async move {
            let answer = node
                .post("/", &format!("record-{at}"), record.clone())
                .await;
            let (status, receipt) = answer.expect("an answer");
            assert!(status.is_success(), "{receipt}");
            assert_eq!(receipt["path"], L::TAG);
        }
    });
    join_all(posts).await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    records
}

/// Takes messages until each of `records` has come, byte for byte. A message is its id and its
/// body; the broker may send one twice.
async fn are_all(records: &[Bytes], mut next: impl AsyncFnMut() -> (String, Bytes)) {
    let mut missing: HashSet<_> = (0..records.len()).collect();
    let reading = async {
        while !missing.is_empty() {
            let (id, body) = next().await;
            let at = id.strip_prefix("record-").expect("an id of ours");
            let at: usize = at.parse().expect("a number");
            assert_eq!(body, records[at], "record {at}");
            missing.remove(&at);
        }
    };
    let all = timeout(PATIENCE, reading).await.is_ok();
    assert!(all, "{} records did not come", missing.len());
}

/// A message that another client publishes reaches the API, with an id.
async fn reaches_the_api<L: Lane>(
    variables: &[(String, String)],
    publish: impl AsyncFnOnce(),
) -> String {
    let api = Api::start();
    let node = Node::start(&api.url(), variables).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    publish().await;
    api.wait_for(1, PATIENCE).await;
    let post = api.posts().remove(0);
    let expected = format!("{{\"place\": \"Cobán\",\"path\":\"{}\"}}", L::TAG);
    assert_eq!(post.body, expected.as_bytes());
    assert_eq!(post.content_type.as_deref(), Some("application/json"));
    let ledger = node.all_ended(1, PATIENCE).await;
    assert_eq!(
        (&ledger["delivered"], &ledger["dead"]),
        (&1.into(), &0.into())
    );
    post.key.expect("an Idempotency-Key")
}

async fn jetstream(variables: &[(String, String)]) -> jetstream::Context {
    let client = async_nats::connect(variable(variables, "NATS__URL")).await;
    jetstream::new(client.expect("a connection"))
}

#[actix_rt::test]
async fn a_nats_consumer_reads_plain_records() {
    let Some(mut system) = Nats::start().await else {
        return;
    };
    let variables = system.variables();
    let records = leave_traffic::<Nats>(&variables, async || {}).await;
    let context = jetstream(&variables).await;
    let stream = context
        .get_stream(variable(&variables, "STREAM"))
        .await
        .unwrap();
    let consumer = stream.get_consumer(variable(&variables, "DURABLE")).await;
    let consumer: PullConsumer = consumer.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    are_all(&records, async || {
        let message = messages.next().await.unwrap().unwrap();
        message.ack().await.unwrap();
        let id = message.headers.as_ref().unwrap().get("Nats-Msg-Id");
        (id.unwrap().to_string(), message.payload.clone())
    })
    .await;
}

#[actix_rt::test]
async fn a_rabbitmq_consumer_reads_plain_records() {
    let Some(mut system) = Rabbitmq::start().await else {
        return;
    };
    let variables = system.variables();
    let records = leave_traffic::<Rabbitmq>(&variables, async || {}).await;
    let connection = system.client().await;
    let channel = connection.create_channel().await.unwrap();
    let queue = variable(&variables, "QUEUE");
    let options = BasicConsumeOptions::default();
    let mut consumer = channel
        .basic_consume(queue.into(), "plain".into(), options, FieldTable::default())
        .await
        .unwrap();
    are_all(&records, async || {
        let message = consumer.next().await.unwrap().unwrap();
        message.ack(BasicAckOptions::default()).await.unwrap();
        let id = message.properties.message_id().as_ref().unwrap();
        let content_type = message.properties.content_type().as_ref().unwrap();
        assert_eq!(content_type.as_str(), "application/json");
        (id.to_string(), message.data.clone().into())
    })
    .await;
}

#[actix_rt::test]
async fn a_pubsub_pull_reads_plain_records() {
    let Some(mut system) = Pubsub::start().await else {
        return;
    };
    let variables = system.variables();
    let endpoint = format!("http://{}", variable(&variables, "ENDPOINT"));
    let project = format!("projects/{}", variable(&variables, "PROJECT"));
    let topic = format!("{project}/topics/{}", variable(&variables, "TOPIC"));
    // One of its own: the emulator goes on leasing messages to the node's stream after its end.
    let subscription = format!("{project}/subscriptions/plain");
    let records = leave_traffic::<Pubsub>(&variables, async || {
        let admin = SubscriptionAdmin::builder()
            .with_endpoint(&*endpoint)
            .with_credentials(anonymous::Builder::new().build())
            .build()
            .await
            .unwrap();
        let create = admin.create_subscription();
        let create = create.set_name(&*subscription).set_topic(&*topic);
        create.send().await.unwrap();
    })
    .await;
    let subscriber = Subscriber::builder()
        .with_endpoint(&*endpoint)
        .with_credentials(anonymous::Builder::new().build())
        .build()
        .await
        .unwrap();
    let mut messages = subscriber.subscribe(subscription).build();
    are_all(&records, async || {
        let (message, handler) = messages.next().await.unwrap().unwrap();
        handler.ack();
        (message.attributes["Waypost-Id"].clone(), message.data)
    })
    .await;
}

#[actix_rt::test]
async fn plain_json_from_a_nats_client_reaches_the_api() {
    let Some(mut system) = Nats::start().await else {
        return;
    };
    let variables = system.variables();
    let key = reaches_the_api::<Nats>(&variables, async || {
        let context = jetstream(&variables).await;
        let subject = variable(&variables, "SUBJECT").to_owned();
        let confirm = context.publish(subject, PLAIN.into()).await.unwrap();
        assert_eq!(confirm.await.unwrap().sequence, 1);
    });
    let stream = variable(&variables, "STREAM");
    let key = key.await;
    assert!(key.starts_with(&format!("{stream}-1-")), "{key}");
}

#[actix_rt::test]
async fn plain_json_from_a_rabbitmq_client_reaches_the_api() {
    let Some(mut system) = Rabbitmq::start().await else {
        return;
    };
    let variables = system.variables();
    let connection = system.client().await;
    let channel = connection.create_channel().await.unwrap();
    let key = reaches_the_api::<Rabbitmq>(&variables, async || {
        let queue = variable(&variables, "QUEUE");
        let properties = BasicProperties::default().with_message_id("theirs".into());
        let options = BasicPublishOptions::default();
        channel
            .basic_publish(
                "".into(),
                queue.into(),
                options,
                PLAIN.as_bytes(),
                properties,
            )
            .await
            .unwrap();
    });
    assert_eq!(key.await, "theirs");
}

#[actix_rt::test]
async fn plain_json_from_a_pubsub_client_reaches_the_api() {
    let Some(mut system) = Pubsub::start().await else {
        return;
    };
    let variables = system.variables();
    let mut published = String::new();
    let key = reaches_the_api::<Pubsub>(&variables, async || {
        let project = variable(&variables, "PROJECT");
        let topic = variable(&variables, "TOPIC");
        let publisher = Publisher::builder(format!("projects/{project}/topics/{topic}"))
            .with_endpoint(format!("http://{}", variable(&variables, "ENDPOINT")))
            .with_credentials(anonymous::Builder::new().build())
            .build()
            .await
            .unwrap();
        let message = model::Message::new().set_data(PLAIN);
        published = publisher.publish(message).await.unwrap();
    });
    let key = key.await;
    assert_eq!(key, published, "the service's id");
}
