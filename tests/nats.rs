//! Tests of NATS alone: duplicates, ack waits, credentials, and servers that end.
//! `transport_contract` tests all transports.

use std::{
    collections::HashSet,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, consumer, stream};
use bytes::Bytes;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use waypost::{
    actors::lane::bundle::SettledRecords,
    config,
    delivery::Delivery,
    record::{Origin, Record},
    transport::{
        self, CLOSE_TIMEOUT, Transport, TransportError,
        nats::{self, Nats},
    },
};

use crate::support::{
    eventually,
    nats::Nats as Server,
    process::free_port,
    rig::{Bundles, Records as _, Rig},
    tls::certificate,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// Far below the ack wait, after which the server redelivers by itself.
const AT_ONCE: Duration = Duration::from_secs(5);
/// The shortest ack wait of a consumer in these tests.
const SHORT_WAIT: Duration = Duration::from_secs(1);

fn record(id: &str) -> Record {
    Record {
        id: Arc::from(id),
        body: Bytes::from_static(b"{}"),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

async fn connect(settings: &config::NatsConfig) -> Nats {
    let settings = nats::Settings::new(settings.clone());
    transport::connect(&settings).await.expect("a connection")
}

async fn publish(nats: &Nats, records: impl IntoIterator<Item = Record>) {
    for record in records {
        nats.send(&record).await.expect("a confirm");
    }
}

async fn take(nats: &Nats) -> Delivery {
    timeout(PATIENCE, nats.next())
        .await
        .expect("a delivery in time")
        .expect("a connection")
}

async fn refused(settings: &config::NatsConfig) -> String {
    let settings = nats::Settings::new(settings.clone());
    match transport::connect::<Nats>(&settings).await.map(|_| ()) {
        Err(TransportError::Connect(why)) => why,
        other => panic!("{other:?}"),
    }
}

async fn lost(nats: &Nats) -> String {
    match nats.next().await {
        Err(TransportError::Lost(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// An operator's connection to the server.
async fn operator(settings: &config::NatsConfig) -> jetstream::Context {
    jetstream::new(
        async_nats::connect(&*settings.url)
            .await
            .expect("a connection"),
    )
}

fn work_queue(settings: &config::NatsConfig) -> stream::Config {
    stream::Config {
        name: settings.stream.clone(),
        subjects: vec![settings.subject.clone()],
        retention: stream::RetentionPolicy::WorkQueue,
        discard: stream::DiscardPolicy::New,
        ..stream::Config::default()
    }
}

/// The stream, with a consumer whose ack wait is `SHORT_WAIT`.
async fn declare_with_a_short_wait(settings: &config::NatsConfig) {
    let consumer = consumer::pull::Config {
        ack_wait: SHORT_WAIT,
        ..consumer::pull::Config::default()
    };
    declare_with(settings, consumer).await;
}

/// The stream, with this consumer.
async fn declare_with(settings: &config::NatsConfig, consumer: consumer::pull::Config) {
    let stream = operator(settings)
        .await
        .create_stream(work_queue(settings))
        .await
        .unwrap();
    let consumer = consumer::pull::Config {
        durable_name: Some(settings.durable.clone()),
        ..consumer
    };
    stream.create_consumer(consumer).await.unwrap();
}

async fn stored(operator: &jetstream::Context, settings: &config::NatsConfig) -> u64 {
    operator
        .get_stream(&settings.stream)
        .await
        .unwrap()
        .get_info()
        .await
        .unwrap()
        .state
        .messages
}

/// The server refuses the other pulls of two connections, again and again.
#[tokio::test]
async fn a_consumer_that_takes_one_pull_at_a_time_serves_two_connections() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let one_pull = consumer::pull::Config {
        max_waiting: 1,
        ..consumer::pull::Config::default()
    };
    declare_with(&settings, one_pull).await;
    let connections = [connect(&settings).await, connect(&settings).await];
    let mut came = 0;
    for round in 0..5 {
        publish(
            &connections[0],
            (0..20).map(|i| record(&format!("{round}-{i}"))),
        )
        .await;
        while came < (round + 1) * 20 {
            let [first, second] = &connections;
            let delivery = tokio::select! {
                delivery = take(first) => delivery,
                delivery = take(second) => delivery,
            };
            delivery.ack();
            came += 1;
        }
        // The length of a pull.
        sleep(Duration::from_secs(1)).await;
    }
    for connection in connections {
        connection.close().await;
    }
}

#[actix_rt::test]
async fn a_record_published_again_while_it_waits_is_stored_once() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    publish(&nats, [record("a"), record("a")]).await;
    assert_eq!(stored(&operator(&settings).await, &settings).await, 1);
    nats.close().await;
}

/// The case of a dead letter that is replayed within the duplicate window.
#[actix_rt::test]
async fn a_record_sent_again_after_it_was_settled_is_stored_again() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    let operator = operator(&settings).await;
    publish(&nats, [record("a")]).await;
    take(&nats).await.reject();
    eventually("the message is gone", PATIENCE, async || {
        (stored(&operator, &settings).await == 0).then_some(())
    })
    .await;
    publish(&nats, [record("a")]).await;
    let again = take(&nats).await;
    assert_eq!(&*again.record.id, "a");
    again.ack();
    nats.close().await;
}

/// A client sends a record again that it has no answer for, to this node after a kill, or to another.
/// The second acceptance is to come out too: its node counts it, and has perhaps another record.
#[actix_rt::test]
async fn a_record_that_is_accepted_again_is_stored_again() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    let operator = operator(&settings).await;
    let accepted = |run: &str, at_us: u64| Record {
        origin: Some(Origin {
            run: run.into(),
            at_us,
        }),
        ..record("a")
    };
    // The second is the first, as the next run finds it on disk.
    let accepted_once = [accepted("first", 7), accepted("next", 7)];
    publish(&nats, accepted_once).await;
    assert_eq!(stored(&operator, &settings).await, 1);
    publish(&nats, [accepted("first", 8)]).await;
    assert_eq!(stored(&operator, &settings).await, 2);
    let bundles = Bundles::new(&nats, 128, &SettledRecords::default());
    for at_us in [7, 7, 8] {
        let records = ["b", "c"].map(|id| Record {
            id: id.into(),
            ..accepted("first", at_us)
        });
        assert_eq!(publish_all(&bundles, &records).await, 2);
    }
    assert_eq!(stored(&operator, &settings).await, 4);
    nats.close().await;
}

#[actix_rt::test]
async fn neither_what_is_held_nor_what_lies_ready_is_sent_again() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    declare_with_a_short_wait(&settings).await;
    let nats = connect(&settings).await;
    publish(&nats, (0..50).map(|at| record(&at.to_string()))).await;
    let held = take(&nats).await;
    sleep(4 * SHORT_WAIT).await;
    let other = connect(&settings).await;
    assert!(
        timeout(SHORT_WAIT, other.next()).await.is_err(),
        "sent to another connection too"
    );
    let mut seen = HashSet::from([Arc::clone(&held.record.id)]);
    held.ack();
    for _ in 1..50 {
        let delivery = take(&nats).await;
        assert!(!delivery.redelivered, "{delivery:?}");
        assert!(
            seen.insert(Arc::clone(&delivery.record.id)),
            "twice: {delivery:?}"
        );
        delivery.ack();
    }
    let operator = operator(&settings).await;
    eventually("all are acked", PATIENCE, async || {
        (stored(&operator, &settings).await == 0).then_some(())
    })
    .await;
    other.close().await;
    nats.close().await;
}

#[actix_rt::test]
async fn close_gives_back_at_once_what_nobody_has_taken() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    publish(&nats, (0..400).map(|at| record(&at.to_string()))).await;
    let acked = take(&nats).await;
    let first = Arc::clone(&acked.record.id);
    acked.ack();
    let held = take(&nats).await;
    nats.close().await;

    let nats = connect(&settings).await;
    let began = Instant::now();
    let mut missing: HashSet<_> = (0..400)
        .map(|at| at.to_string())
        .filter(|id| **id != *first)
        .collect();
    while !missing.is_empty() {
        let delivery = take(&nats).await;
        assert!(
            missing.remove(&*delivery.record.id),
            "came again: {delivery:?}"
        );
        delivery.ack();
    }
    assert!(began.elapsed() < AT_ONCE, "after {:?}", began.elapsed());
    drop(held);
    nats.close().await;
}

#[actix_rt::test]
async fn a_forwarder_that_takes_nothing_for_long_does_not_cost_the_connection() {
    let Some(server) = Server::start().await else {
        return;
    };
    let nats = connect(&server.config()).await;
    publish(&nats, (0..1000).map(|at| record(&at.to_string()))).await;
    sleep(Duration::from_secs(8)).await;
    for _ in 0..1000 {
        take(&nats).await.ack();
    }
    nats.close().await;
}

#[actix_rt::test]
async fn a_message_that_no_node_published_keeps_one_id() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    let operator = operator(&settings).await;
    for _ in 0..2 {
        operator
            .publish(settings.subject.clone(), "{}".into())
            .await
            .unwrap()
            .await
            .unwrap();
    }
    let first = take(&nats).await;
    let second = take(&nats).await;
    assert_ne!(first.record.id, second.record.id);
    let id = Arc::clone(&first.record.id);
    drop(first);
    assert_eq!(take(&nats).await.record.id, id);
    drop(second);
    nats.close().await;
}

/// Records of one request.
fn together() -> Vec<Record> {
    let origin = Origin {
        run: Arc::from("run"),
        at_us: 1,
    };
    (0..100)
        .map(|at| Record {
            origin: Some(origin.clone()),
            ..record(&format!("key/{at}"))
        })
        .collect()
}

/// How many of `records` are confirmed.
async fn publish_all(nats: &Bundles<'_, Nats>, records: &[Record]) -> usize {
    let confirmed = nats.send(records).await;
    confirmed
        .into_iter()
        .filter(|is_confirmed| *is_confirmed)
        .count()
}

#[actix_rt::test]
async fn records_that_are_published_together_again_are_stored_once_until_they_are_settled() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    let operator = operator(&settings).await;
    let records = together();
    let bundles = Bundles::new(&nats, 128, &SettledRecords::default());
    assert_eq!(publish_all(&bundles, &records).await, 100);
    assert_eq!(publish_all(&bundles, &records).await, 100);
    assert_eq!(stored(&operator, &settings).await, 1);
    for _ in 0..100 {
        bundles.next().await.expect("a connection").ack();
    }
    eventually("the message is gone", PATIENCE, async || {
        (stored(&operator, &settings).await == 0).then_some(())
    })
    .await;
    assert_eq!(publish_all(&bundles, &records).await, 100);
    assert_eq!(
        stored(&operator, &settings).await,
        1,
        "sent again on purpose"
    );
    nats.close().await;
}

#[actix_rt::test]
async fn a_stream_that_takes_short_messages_only_gets_short_bundles() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let operator = operator(&settings).await;
    let short = stream::Config {
        max_message_size: 2048,
        ..work_queue(&settings)
    };
    operator.create_stream(short).await.unwrap();
    let nats = connect(&settings).await;
    let records = together();
    let bundles = Bundles::new(&nats, 128, &SettledRecords::default());
    assert_eq!(publish_all(&bundles, &records).await, 100);
    assert!((2..100).contains(&stored(&operator, &settings).await));
    nats.close().await;
}

#[actix_rt::test]
async fn what_exists_with_other_settings_is_named_and_left_alone() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let operator = operator(&settings).await;
    let limits = stream::Config {
        retention: stream::RetentionPolicy::Limits,
        ..work_queue(&settings)
    };
    operator.create_stream(limits).await.unwrap();
    let why = refused(&settings).await;
    assert!(
        why.contains(&settings.stream) && why.contains("Limits, not WorkQueue"),
        "{why}"
    );
    let found = operator.get_stream(&settings.stream).await.unwrap();
    assert_eq!(
        found.cached_info().config.retention,
        stream::RetentionPolicy::Limits
    );

    let settings = server.config();
    let stream = operator.create_stream(work_queue(&settings)).await.unwrap();
    let gives_up = consumer::pull::Config {
        durable_name: Some(settings.durable.clone()),
        max_deliver: 3,
        ..consumer::pull::Config::default()
    };
    stream.create_consumer(gives_up).await.unwrap();
    let why = refused(&settings).await;
    assert!(
        why.contains(&settings.durable) && why.contains("after 3 deliveries"),
        "{why}"
    );
}

#[actix_rt::test]
async fn a_server_or_an_account_without_jetstream_is_named_as_that() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let account = "accounts { A { users: [{user: a, password: b}] } }";
    std::fs::write(file.path(), account).unwrap();
    let file = file.path().to_str().expect("a plain path");
    for (arguments, login) in [(&["-js=false"][..], ""), (&["-c", file], "a:b@")] {
        let Some(server) = Server::with(arguments).await else {
            return;
        };
        let settings = config::NatsConfig {
            url: format!("nats://{login}{}", server.address()).into(),
            ..server.config()
        };
        let why = refused(&settings).await;
        assert!(why.contains(": JetStream is not enabled"), "{why}");
    }
}

#[actix_rt::test]
async fn a_stream_in_memory_is_warned_of() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let memory = stream::Config {
        storage: stream::StorageType::Memory,
        ..work_queue(&settings)
    };
    operator(&settings)
        .await
        .create_stream(memory)
        .await
        .unwrap();
    let broker = connect(&settings).await.info();
    assert!(broker.version.is_some());
    assert!(
        broker
            .warnings
            .iter()
            .any(|warning| warning.contains("in memory")),
        "{:?}",
        broker.warnings
    );
}

#[actix_rt::test]
async fn credentials_in_the_url_and_in_a_file_are_used() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    fs::write(secret.path(), "p:ñ@ss\n").unwrap();
    let Some(server) = Server::with(&["--user", "waypost", "--pass", "p:ñ@ss"]).await else {
        return;
    };
    let address = server.address();
    let settings = server.config();
    let with = |url: String| config::NatsConfig {
        url: url.into(),
        ..settings.clone()
    };
    connect(&with(format!("nats://waypost:p%3A%C3%B1%40ss@{address}")))
        .await
        .close()
        .await;
    let from_file = config::NatsConfig {
        password_file: Some(secret.path().into()),
        ..with(format!("nats://waypost@{address}"))
    };
    connect(&from_file).await.close().await;
    for wrong in [
        format!("nats://{address}"),
        format!("nats://waypost:wrong@{address}"),
    ] {
        assert!(refused(&with(wrong)).await.contains("authorization"));
    }

    let Some(server) = Server::with(&["--auth", "s3cret"]).await else {
        return;
    };
    let url = format!("nats://s3cret@{}", server.address());
    connect(&config::NatsConfig {
        url: url.into(),
        ..server.config()
    })
    .await
    .close()
    .await;
}

#[actix_rt::test]
async fn over_tls_only_a_server_that_is_trusted_gets_records() {
    let folder = TempDir::new().unwrap();
    let Some((cert, key)) = certificate(folder.path(), "IP:127.0.0.1") else {
        return;
    };
    let cert_file = cert.to_str().unwrap();
    let key_file = key.to_str().unwrap();
    let Some(server) = Server::with(&["--tls", "--tlscert", cert_file, "--tlskey", key_file]).await
    else {
        return;
    };
    let url = format!("tls://{}", server.address());
    let strange = config::NatsConfig {
        url: url.into(),
        ..server.config()
    };
    let why = refused(&strange).await;
    assert!(why.to_lowercase().contains("certificate"), "{why}");
    let trusted = config::NatsConfig {
        ca_file: Some(cert.clone().into()),
        ..strange
    };
    let nats = connect(&trusted).await;
    publish(&nats, [record("a")]).await;
    take(&nats).await.ack();
    nats.close().await;

    let Some(plain) = Server::start().await else {
        return;
    };
    let settings = config::NatsConfig {
        ca_file: Some(cert.into()),
        ..plain.config()
    };
    // It does not talk down to plain text.
    refused(&settings).await;
}

#[actix_rt::test]
async fn one_of_several_servers_is_enough() {
    let Some(server) = Server::start().await else {
        return;
    };
    let dead = [free_port(), free_port(), free_port()];
    let url = dead
        .map(|port| format!("nats://127.0.0.1:{port}"))
        .join(",")
        + ", "
        + &server.address();
    let settings = config::NatsConfig {
        url: url.into(),
        ..server.config()
    };
    // The client shuffles the servers.
    for _ in 0..5 {
        connect(&settings).await.close().await;
    }
}

#[actix_rt::test]
async fn a_killed_server_fails_whoever_waits() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let nats = connect(&server.config()).await;
    server.signal("STOP");
    let unanswered = record("a");
    let (next, confirm, ()) = tokio::join!(
        timeout(AT_ONCE, nats.next()),
        timeout(AT_ONCE, nats.send(&unanswered)),
        async {
            sleep(Duration::from_secs(1)).await;
            server.kill().await;
        }
    );
    assert!(matches!(next, Ok(Err(TransportError::Lost(_)))), "{next:?}");
    assert!(
        matches!(confirm, Ok(Err(TransportError::Lost(_)))),
        "{confirm:?}"
    );
    let began = Instant::now();
    nats.close().await;
    assert!(
        began.elapsed() < CLOSE_TIMEOUT,
        "there is nobody to wait for: {:?}",
        began.elapsed()
    );
}

#[actix_rt::test]
async fn a_server_that_falls_silent_is_noticed_within_ten_seconds() {
    let Some(server) = Server::start().await else {
        return;
    };
    let nats = connect(&server.config()).await;
    server.signal("STOP");
    let why = timeout(Duration::from_secs(10), lost(&nats)).await;
    server.signal("CONT");
    why.expect("noticed in time");
    timeout(Duration::from_secs(3), nats.close())
        .await
        .expect("closed in time");
}

#[actix_rt::test]
async fn a_consumer_or_stream_that_is_deleted_is_noticed() {
    let Some(server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    let operator = operator(&settings).await;
    let nats = connect(&settings).await;
    operator
        .get_stream(&settings.stream)
        .await
        .unwrap()
        .delete_consumer(&settings.durable)
        .await
        .unwrap();
    timeout(Duration::from_secs(8), lost(&nats))
        .await
        .expect("noticed in time");
    nats.close().await;

    let nats = connect(&settings).await;
    operator.delete_stream(&settings.stream).await.unwrap();
    let confirm = nats.send(&record("a")).await;
    assert!(
        matches!(confirm, Err(TransportError::Lost(_))),
        "{confirm:?}"
    );
    nats.close().await;

    let nats = connect(&settings).await;
    publish(&nats, [record("a")]).await;
    take(&nats).await.ack();
    nats.close().await;
}

#[actix_rt::test]
async fn a_server_that_announces_its_end_is_left() {
    let Some(server) = Server::start().await else {
        return;
    };
    let nats = connect(&server.config()).await;
    server.signal("USR2");
    timeout(Duration::from_secs(8), lost(&nats))
        .await
        .expect("noticed in time");
    nats.close().await;
}

#[actix_rt::test]
async fn a_dropped_connection_leaves_nothing_behind() {
    let port = free_port().to_string();
    let Some(server) = Server::with(&["-m", &port]).await else {
        return;
    };
    let settings = server.config();
    let connections = async || {
        let varz = format!("http://127.0.0.1:{port}/varz");
        let varz = awc::Client::default()
            .get(varz)
            .send()
            .await
            .unwrap()
            .body()
            .await
            .unwrap();
        serde_json::from_slice::<serde_json::Value>(&varz).unwrap()["connections"]
            .as_u64()
            .unwrap()
    };
    let nats = connect(&settings).await;
    publish(&nats, [record("a")]).await;
    let held = take(&nats).await;
    assert_eq!(connections().await, 1);
    drop(nats);
    eventually("the connection is gone", PATIENCE, async || {
        (connections().await == 0).then_some(())
    })
    .await;
    held.ack();
}

/// Ends the server after `settled` records were settled, and makes it number messages from 1 again.
/// A killed server may do that by itself.
async fn count_again(server: &mut Server, settings: &config::NatsConfig, settled: usize) {
    let nats = connect(settings).await;
    publish(
        &nats,
        (0..settled).map(|number| record(&format!("old-{number}"))),
    )
    .await;
    for _ in 0..settled {
        take(&nats).await.ack();
    }
    nats.close().await;
    server.terminate().await;
    server.forget_messages(&settings.stream);
    server.revive().await;
}

async fn takes_all_new(nats: &Nats, count: usize) {
    let mut ids = HashSet::new();
    while ids.len() < count {
        let delivery = take(nats).await;
        ids.insert(delivery.record.id.to_string());
        delivery.ack();
    }
}

#[actix_rt::test]
async fn a_server_that_has_forgotten_its_count_does_not_pass_over_new_records() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    Box::pin(count_again(&mut server, &settings, 20)).await;
    let nats = connect(&settings).await;
    publish(
        &nats,
        (0..30).map(|number| record(&format!("new-{number}"))),
    )
    .await;
    takes_all_new(&nats, 30).await;
}

#[actix_rt::test]
async fn records_that_came_before_anyone_saw_that_the_count_was_lost_are_delivered() {
    let Some(mut server) = Server::start().await else {
        return;
    };
    let settings = server.config();
    Box::pin(count_again(&mut server, &settings, 20)).await;
    let operator = operator(&settings).await;
    for number in 0..30 {
        let confirm = operator
            .publish(
                settings.subject.clone(),
                Bytes::from(format!("{{\"n\":{number}}}")),
            )
            .await;
        confirm.expect("it leaves").await.expect("a confirm");
    }
    takes_all_new(&connect(&settings).await, 30).await;
}

/// The system's older server recovers from that by itself.
#[actix_rt::test]
async fn a_consumer_whose_files_a_power_cut_has_emptied_is_in_memory_from_then_on() {
    let Some(mut server) = Server::current(&[]).await else {
        return;
    };
    let settings = server.config();
    let nats = connect(&settings).await;
    publish(&nats, [record("a"), record("b")]).await;
    take(&nats).await.ack();
    nats.close().await;
    for id in ["c", "d"] {
        server.terminate().await;
        server.damage_consumer(&settings.stream, &settings.durable);
        server.revive().await;
        let nats = connect(&settings).await;
        let warnings = nats.info().warnings.join(", ");
        assert!(warnings.contains("in memory"), "{warnings}");
        assert_eq!(take(&nats).await.record, record("b"));
        publish(&nats, [record(id)]).await;
        take(&nats).await.ack();
        nats.close().await;
    }
    // The remedy of the log line.
    server.terminate().await;
    server.forget_consumer(&settings.stream, &settings.durable);
    server.revive().await;
    let nats = connect(&settings).await;
    let warnings = nats.info().warnings.join(", ");
    assert!(!warnings.contains("in memory"), "{warnings}");
    nats.close().await;
}
