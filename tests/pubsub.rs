//! Tests of Pub/Sub alone. `transport_contract` tests all transports.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::try_join_all;
use tokio::time::{Instant, sleep, timeout};
use waypost::{
    delivery::Delivery,
    record::Record,
    transport::{
        self, Transport, TransportError,
        pubsub::{Pubsub, Settings},
    },
};

use crate::support::{
    pubsub::Pubsub as Emulator,
    rig::{Records as _, Rig as _},
};

/// Longer than a lease that is not extended.
const LEASE_LAPSED: Duration = Duration::from_secs(13);
const SOON: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_mins(1);

fn record(id: String) -> Record {
    Record {
        body: format!("{{\"id\":\"{id}\"}}").into(),
        id: Arc::from(id),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

async fn connect(settings: &Settings) -> Pubsub {
    transport::connect(settings)
        .await
        .expect("the emulator answers")
}

/// Publishes `count` records at once, with ids that begin with `name`. Returns when all are
/// confirmed.
async fn publish(transport: &Pubsub, name: &str, count: usize) {
    let records: Vec<_> = (0..count).map(|n| record(format!("{name}-{n}"))).collect();
    try_join_all(records.iter().map(|record| transport.send(record)))
        .await
        .expect("all are confirmed");
}

async fn next(transport: &Pubsub, patience: Duration) -> Delivery {
    timeout(patience, transport.next())
        .await
        .expect("a delivery in time")
        .expect("the connection is well")
}

/// Acks deliveries until it has seen `count` ids. Returns how often each came.
async fn take(transport: &Pubsub, count: usize, patience: Duration) -> HashMap<String, usize> {
    let deadline = Instant::now() + patience;
    let mut seen = HashMap::new();
    while seen.len() < count {
        let Ok(delivery) = tokio::time::timeout_at(deadline, transport.next()).await else {
            panic!("{} of {count} within {patience:?}", seen.len());
        };
        let delivery = delivery.expect("the connection is well");
        *seen.entry(delivery.record.id.to_string()).or_default() += 1;
        delivery.ack();
    }
    seen
}

/// Waits for the failure of a connection that nobody uses.
async fn fails(transport: &Pubsub, patience: Duration) -> (TransportError, Duration) {
    let began = Instant::now();
    let outcome = timeout(patience, transport.next())
        .await
        .expect("`next` notices in time");
    (
        outcome.expect_err("the connection is lost"),
        began.elapsed(),
    )
}

/// The same, with `held` deliveries that nobody settles before.
async fn fails_after(
    transport: &Pubsub,
    held: usize,
    patience: Duration,
) -> (TransportError, Duration) {
    let mut deliveries = Vec::new();
    for _ in 0..held {
        deliveries.push(next(transport, patience).await);
    }
    fails(transport, patience).await
}

#[tokio::test]
async fn two_thousand_records_at_once_are_confirmed_and_come_out_once_each() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let transport = connect(&emulator.settings()).await;
    publish(&transport, "r", 2000).await;
    let seen = take(&transport, 2000, Duration::from_secs(20)).await;
    assert!(seen.values().all(|&times| times == 1));
    transport.close().await;
}

#[tokio::test]
async fn each_of_many_connections_gets_its_records_at_once() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let settings = emulator.settings();
    for life in 0..5 {
        let transport = connect(&settings).await;
        publish(&transport, &format!("life-{life}"), 100).await;
        take(&transport, 100, SOON).await;
        // With and without `close`.
        if life % 2 == 0 {
            transport.close().await;
        }
    }
}

#[tokio::test]
async fn what_was_acked_before_close_stays_away_and_the_rest_comes_to_the_next_connection() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let settings = emulator.settings();
    let first = connect(&settings).await;
    publish(&first, "r", 20).await;
    let mut acked = Vec::new();
    let mut living = Vec::new();
    for n in 0..10 {
        let delivery = next(&first, SOON).await;
        if n < 5 {
            acked.push(delivery.record.id.to_string());
            delivery.ack();
        } else {
            living.push(delivery);
        }
    }
    first.close().await;
    let second = connect(&settings).await;
    let seen = take(&second, 15, SOON).await;
    assert!(
        acked.iter().all(|id| !seen.contains_key(id)),
        "{acked:?} in {seen:?}"
    );
    // Late acks of a closed connection have no effect.
    living.into_iter().for_each(Delivery::ack);
    assert!(
        timeout(LEASE_LAPSED, second.next()).await.is_err(),
        "an acked record came again"
    );
    second.close().await;
}

#[tokio::test]
async fn a_living_delivery_is_held_beyond_its_lease_and_one_that_is_given_back_waits_out_its_delay()
{
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let transport = connect(&emulator.settings()).await;
    publish(&transport, "held", 1).await;
    let held = next(&transport, SOON).await;
    assert!(
        timeout(LEASE_LAPSED, transport.next()).await.is_err(),
        "it came again while it lived"
    );
    let began = Instant::now();
    held.retry_after(Duration::from_secs(2));
    let again = next(&transport, SOON).await;
    assert!(
        began.elapsed() >= Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    drop(again);
    next(&transport, SOON).await.reject();
    transport.close().await;
}

#[tokio::test]
async fn records_that_nobody_pulls_for_longer_than_a_lease_come_out_once_each() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let transport = connect(&emulator.settings()).await;
    publish(&transport, "r", 5000).await;
    sleep(LEASE_LAPSED).await;
    let mut seen = take(&transport, 5000, Duration::from_secs(20)).await;
    while let Ok(delivery) = timeout(Duration::from_secs(1), transport.next()).await {
        let delivery = delivery.expect("the connection is well");
        *seen.entry(delivery.record.id.to_string()).or_default() += 1;
        delivery.ack();
    }
    assert_eq!(
        seen.values().filter(|&&times| times > 1).count(),
        0,
        "records that came again"
    );
    transport.close().await;
}

#[tokio::test]
async fn after_a_kill_the_loss_is_noticed_and_a_new_connection_creates_all_anew() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let settings = emulator.settings();
    for round in 0..2 {
        let transport = connect(&settings).await;
        publish(&transport, &format!("before-{round}"), 100).await;
        take(&transport, 100, SOON).await;
        emulator.kill().await;
        let (failure, after) = fails(&transport, Duration::from_secs(10)).await;
        println!("killed: {failure} after {after:?}");
        assert!(transport.send(&record("lost".into())).await.is_err());
        transport.close().await;
        assert!(matches!(
            transport::connect::<Pubsub>(&settings).await,
            Err(TransportError::Connect(_))
        ));
        emulator.revive().await;
        let answers = Instant::now();
        let transport = connect(&settings).await;
        publish(&transport, &format!("after-{round}"), 100).await;
        take(&transport, 100, SOON).await;
        println!(
            "records flow {:?} after the emulator answered",
            answers.elapsed()
        );
        transport.close().await;
    }
}

#[tokio::test]
async fn a_silent_emulator_is_noticed_and_goes_on_with_the_same_stream() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let settings = emulator.settings();
    let transport = connect(&settings).await;
    publish(&transport, "before", 10).await;
    take(&transport, 10, SOON).await;
    emulator.signal("STOP");
    let (failure, after) = fails(&transport, Duration::from_secs(10)).await;
    println!("silent: {failure} after {after:?}");
    transport.close().await;
    emulator.signal("CONT");
    let transport = connect(&settings).await;
    publish(&transport, "after", 100).await;
    take(&transport, 100, SOON).await;
    transport.close().await;
}

#[tokio::test]
async fn a_topic_that_is_deleted_is_created_anew_once_its_subscription_is_empty() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let config = emulator.config();
    let settings = Settings::new(config.clone());
    let transport = connect(&settings).await;
    let (topics, subscriptions) = emulator.admin().await;
    let topic = format!("projects/{}/topics/{}", config.project, config.topic);
    let subscription = format!(
        "projects/{}/subscriptions/{}",
        config.project, config.subscription
    );
    publish(&transport, "before", 20).await;
    topics
        .delete_topic()
        .set_topic(&topic)
        .send()
        .await
        .unwrap();
    let failure = transport.send(&record("r".into())).await;
    assert!(
        matches!(failure, Err(TransportError::Lost(_))),
        "{failure:?}"
    );
    transport.close().await;

    // The subscription is left without a topic. It is delivered to its last message.
    let orphan = connect(&settings).await;
    let refused = orphan.send(&record("r".into())).await;
    assert!(
        matches!(&refused, Err(TransportError::Refused(why)) if why.contains("topic was deleted")),
        "{refused:?}"
    );
    let left = take(&orphan, 20, PATIENCE).await;
    assert!(left.keys().all(|id| id.starts_with("before")), "{left:?}");
    let (failure, after) = fails(&orphan, PATIENCE).await;
    println!("empty: {failure} after {after:?}");
    assert!(failure.to_string().contains("empty"), "{failure}");
    let gone = subscriptions.get_subscription();
    let gone = gone.set_subscription(&subscription).send().await;
    assert!(gone.is_err(), "{gone:?}");
    orphan.close().await;

    let transport = connect(&settings).await;
    publish(&transport, "after", 10).await;
    take(&transport, 10, PATIENCE).await;
    transport.close().await;
}

#[tokio::test]
async fn what_a_node_still_holds_keeps_the_subscription_of_a_deleted_topic() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let config = emulator.config();
    let settings = Settings::new(config.clone());
    let transport = connect(&settings).await;
    publish(&transport, "held", 1).await;
    let (topics, _) = emulator.admin().await;
    let topic = format!("projects/{}/topics/{}", config.project, config.topic);
    topics
        .delete_topic()
        .set_topic(&topic)
        .send()
        .await
        .unwrap();
    // A quiet lane notices too.
    let (failure, _) = fails_after(&transport, 1, PATIENCE).await;
    assert!(failure.to_string().contains("topic is gone"), "{failure}");
    transport.close().await;
    let orphan = connect(&settings).await;
    let held = next(&orphan, PATIENCE).await;
    // Longer than it takes to call a subscription empty.
    assert!(
        timeout(Duration::from_secs(40), orphan.next())
            .await
            .is_err(),
        "its message came again, or it was deleted"
    );
    held.ack();
    let (failure, _) = fails(&orphan, PATIENCE).await;
    assert!(failure.to_string().contains("empty"), "{failure}");
    orphan.close().await;
}

#[tokio::test]
async fn a_subscription_that_is_deleted_ends_the_connection_of_a_quiet_lane() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let config = emulator.config();
    let transport = connect(&Settings::new(config.clone())).await;
    let (_, subscriptions) = emulator.admin().await;
    let subscription = format!(
        "projects/{}/subscriptions/{}",
        config.project, config.subscription
    );
    subscriptions
        .delete_subscription()
        .set_subscription(subscription)
        .send()
        .await
        .unwrap();
    let (failure, _) = fails(&transport, Duration::from_secs(10)).await;
    assert!(matches!(failure, TransportError::Lost(_)), "{failure}");
    transport.close().await;
}

#[tokio::test]
async fn a_subscription_on_another_topic_is_named_and_left_alone() {
    let Some(mut emulator) = Emulator::start().await else {
        return;
    };
    let theirs = emulator.config();
    connect(&Settings::new(theirs.clone())).await.close().await;
    let mut ours = emulator.config();
    ours.subscription.clone_from(&theirs.subscription);
    let Err(TransportError::Connect(why)) =
        transport::connect::<Pubsub>(&Settings::new(ours.clone())).await
    else {
        panic!("it took the subscription")
    };
    assert!(
        why.contains(&theirs.topic) && why.contains(&ours.topic),
        "{why}"
    );
}
