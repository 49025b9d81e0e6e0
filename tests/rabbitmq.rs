//! Tests of `RabbitMQ` alone. `transport_contract` tests all transports.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::time::{Instant, timeout};
use waypost::{
    config,
    record::Record,
    transport::{self, Transport, TransportError, rabbitmq::RabbitMq},
};

use crate::support::{
    eventually,
    rabbitmq::Rabbit,
    rig::{Records as _, Rig as _},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn record(n: usize) -> Record {
    Record {
        id: Arc::from(format!("r{n}")),
        body: format!("{{\"n\":{n}}}").into(),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

/// Publishes `count` records at once. Returns when all are confirmed.
async fn publish_all(transport: &RabbitMq, count: usize) -> Vec<Record> {
    let records: Vec<_> = (0..count).map(record).collect();
    try_join_all(records.iter().map(|record| transport.send(record)))
        .await
        .expect("all are confirmed");
    records
}

async fn try_connect(settings: &config::RabbitmqConfig) -> Result<RabbitMq, TransportError> {
    transport::connect(settings).await
}

async fn connect(settings: &config::RabbitmqConfig) -> RabbitMq {
    try_connect(settings).await.expect("the server answers")
}

/// Ready messages and consumers of the queue, as the broker counts them.
async fn counts(rabbit: &mut Rabbit, queue: &str) -> (u32, u32) {
    let client = rabbit.client().await;
    let channel = client.create_channel().await.unwrap();
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel
        .queue_declare(queue.into(), options, FieldTable::default())
        .await
        .unwrap();
    (queue.message_count(), queue.consumer_count())
}

/// Threads of the client library that live in this process.
fn client_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux");
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("lapin")).count()
}

#[tokio::test]
async fn a_thousand_records_at_once_are_confirmed_and_come_out_once_each() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let transport = connect(&settings).await;
    let records = publish_all(&transport, 1000).await;
    let mut seen = Vec::new();
    for _ in 0..1000 {
        let delivery = timeout(Duration::from_secs(10), transport.next())
            .await
            .expect("a delivery")
            .unwrap();
        assert!(!delivery.redelivered);
        seen.push(delivery.record.clone());
        delivery.ack();
    }
    seen.sort_by_key(|record| record.id[1..].parse::<usize>().unwrap());
    assert_eq!(seen, records);
    transport.close().await;
    assert_eq!(counts(&mut rabbit, &settings.queue).await, (0, 0));
}

#[tokio::test]
async fn a_queue_with_other_settings_is_named_with_the_difference_and_left_alone() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let client = rabbit.client().await;
    let channel = client.create_channel().await.unwrap();
    let mut classic = FieldTable::default();
    classic.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("classic".into()),
    );
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare(settings.queue.as_str().into(), options, classic.clone())
        .await
        .unwrap();
    let Err(TransportError::Connect(why)) = try_connect(&settings).await else {
        panic!("it took the queue")
    };
    assert!(
        why.contains(&settings.queue) && why.contains("x-queue-type"),
        "{why}"
    );
    channel
        .queue_declare(settings.queue.as_str().into(), options, classic)
        .await
        .expect("the queue is as it was");
}

/// A user with these rights, and the settings with which it logs in.
fn with_rights(
    rabbit: &mut Rabbit,
    settings: &config::RabbitmqConfig,
    [configure, write, read]: [&str; 3],
) -> config::RabbitmqConfig {
    let user = format!("user-{}", Record::new_id());
    rabbit.ctl(&["add_user", &user, "pass"]);
    rabbit.ctl(&["set_permissions", &user, configure, write, read]);
    let url = settings.url.replace("guest:guest", &format!("{user}:pass"));
    config::RabbitmqConfig {
        url: url.into(),
        ..settings.clone()
    }
}

async fn refused(settings: &config::RabbitmqConfig) -> String {
    match try_connect(settings).await.map(|_| ()) {
        Err(TransportError::Connect(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_user_that_may_only_write_and_read_works_with_a_queue_that_is_there() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let theirs = rabbit.config();
    // Ours, and one with arguments of an operator's own.
    let checked = connect(&settings).await;
    let incarnation = checked.info().incarnation;
    checked.close().await;
    let checked = connect(&settings).await;
    assert_eq!(checked.info().incarnation, incarnation);
    checked.close().await;
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1000));
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let channel = rabbit.client().await.create_channel().await.unwrap();
    channel
        .queue_declare(theirs.queue.as_str().into(), options, arguments)
        .await
        .unwrap();
    for settings in [settings, theirs] {
        let limited = with_rights(&mut rabbit, &settings, ["", ".*", ".*"]);
        let transport = connect(&limited).await;
        let warnings = transport.info().warnings;
        assert!(
            warnings.len() == 1 && warnings[0].contains("`configure`"),
            "{warnings:?}"
        );
        let sent = publish_all(&transport, 10).await;
        for record in sent {
            let delivery = transport.next().await.unwrap();
            assert_eq!(delivery.record, record);
            delivery.ack();
        }
        transport.close().await;
        let later = connect(&limited).await;
        assert_ne!(
            later.info().incarnation,
            transport.info().incarnation,
            "its broker may have restarted, and may have lost what the queue had"
        );
        later.close().await;
    }
}

#[tokio::test]
async fn the_right_that_a_user_lacks_is_named() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let queue = &settings.queue;
    let limited = with_rights(&mut rabbit, &settings, ["", ".*", ".*"]);
    let why = refused(&limited).await;
    assert!(why.contains(&format!("`configure` on `{queue}`")), "{why}");

    connect(&settings).await.close().await;
    let limited = with_rights(&mut rabbit, &settings, ["", ".*", ""]);
    let why = refused(&limited).await;
    assert!(why.contains(&format!("`read` on `{queue}`")), "{why}");

    let limited = with_rights(&mut rabbit, &settings, ["", "", ".*"]);
    let transport = connect(&limited).await;
    let Err(TransportError::Lost(why)) = transport.send(&record(0)).await else {
        panic!("it was published")
    };
    assert!(why.contains("`write` on `amq.default`"), "{why}");
}

#[tokio::test]
async fn the_virtual_host_that_was_asked_for_is_named() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    for (path, named) in [("/", "`` (the URL ends in `/`"), ("/orders", "`orders`")] {
        let asked = config::RabbitmqConfig {
            url: settings.url.replace("/%2f", path).into(),
            ..settings.clone()
        };
        let why = refused(&asked).await;
        assert!(why.contains(&format!("virtual host {named}")), "{why}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_without_the_password() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let mut settings = rabbit.config();
    settings.url = settings.url.replace("guest:guest", "guest:sesame").into();
    let Err(TransportError::Connect(why)) = try_connect(&settings).await else {
        panic!("it got in")
    };
    assert!(
        why.contains("ACCESS_REFUSED") && !why.contains("sesame"),
        "{why}"
    );
}

#[tokio::test]
async fn a_transport_dropped_without_close_leaves_no_consumer_that_parks_messages() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let transport = connect(&settings).await;
    publish_all(&transport, 10).await;
    let alive = transport.next().await.unwrap();
    drop(transport);
    let deadline = Instant::now() + Duration::from_secs(5);
    while counts(&mut rabbit, &settings.queue).await != (10, 0) {
        assert!(
            Instant::now() < deadline,
            "the consumer outlives its transport"
        );
    }
    drop(alive);
}

#[tokio::test]
async fn what_was_settled_before_close_stays_settled_and_the_rest_goes_back() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let transport = connect(&settings).await;
    publish_all(&transport, 20).await;
    let mut deliveries = Vec::new();
    for _ in 0..12 {
        deliveries.push(transport.next().await.unwrap());
    }
    let alive = deliveries.split_off(10);
    let (even, odd): (Vec<_>, Vec<_>) = deliveries
        .into_iter()
        .enumerate()
        .partition(|(at, _)| at % 2 == 0);
    for (_, delivery) in even {
        delivery.ack();
    }
    for (_, delivery) in odd {
        delivery.reject();
    }
    transport.close().await;
    assert_eq!(counts(&mut rabbit, &settings.queue).await, (10, 0));
    drop(alive);
    assert!(matches!(
        transport.next().await,
        Err(TransportError::Lost(_))
    ));
    assert!(transport.send(&record(0)).await.is_err());
}

#[tokio::test]
async fn a_record_given_back_for_later_comes_later_and_one_given_up_comes_soon() {
    const LATER: Duration = Duration::from_secs(4);
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let transport = connect(&rabbit.config()).await;
    publish_all(&transport, 2).await;
    let later = transport.next().await.unwrap();
    let soon = transport.next().await.unwrap();
    let ids = [Arc::clone(&soon.record.id), Arc::clone(&later.record.id)];
    let start = Instant::now();
    later.retry_after(LATER);
    drop(soon);
    let again = timeout(Duration::from_secs(5), transport.next())
        .await
        .expect("it comes again")
        .unwrap();
    assert!(again.redelivered && start.elapsed() < LATER);
    let at_last = timeout(3 * LATER, transport.next())
        .await
        .expect("it comes again")
        .unwrap();
    assert!(at_last.redelivered && start.elapsed() >= LATER);
    assert_eq!([again.record.id.clone(), at_last.record.id.clone()], ids);
    again.ack();
    at_last.ack();
    transport.close().await;
}

/// More than the default limit of version 4, which drops a message after twenty deliveries.
#[tokio::test]
async fn a_record_given_back_fifty_times_is_still_there() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let transport = connect(&rabbit.config()).await;
    publish_all(&transport, 1).await;
    for _ in 0..50 {
        let delivery = timeout(Duration::from_secs(5), transport.next())
            .await
            .expect("it comes again")
            .unwrap();
        delivery.retry_after(Duration::ZERO);
    }
    timeout(Duration::from_secs(5), transport.next())
        .await
        .expect("it comes again")
        .unwrap()
        .ack();
    transport.close().await;
}

#[tokio::test]
async fn confirmed_records_survive_a_kill_right_after_their_confirm() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let transport = connect(&settings).await;
    let records = publish_all(&transport, 500).await;
    rabbit.kill().await;
    let noticed = timeout(Duration::from_secs(4), async {
        while transport.next().await.is_ok() {}
    })
    .await;
    noticed.expect("a dead server shows before its heartbeats are missed");
    assert!(transport.send(&record(500)).await.is_err());
    transport.close().await;
    rabbit.revive().await;
    let transport = connect(&settings).await;
    let mut left: BTreeSet<_> = records
        .iter()
        .map(|record| Arc::clone(&record.id))
        .collect();
    while !left.is_empty() {
        let delivery = timeout(Duration::from_secs(5), transport.next())
            .await
            .expect("none is lost")
            .unwrap();
        left.remove(&delivery.record.id);
        delivery.ack();
    }
    transport.close().await;
}

#[tokio::test]
async fn a_deleted_queue_ends_the_transport_and_nothing_more_is_confirmed() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let transport = connect(&settings).await;
    let client = rabbit.client().await;
    let channel = client.create_channel().await.unwrap();
    channel
        .queue_delete(
            settings.queue.as_str().into(),
            QueueDeleteOptions::default(),
        )
        .await
        .unwrap();
    let records: Vec<_> = (0..100).map(record).collect();
    let answers = join_all(records.iter().map(|record| transport.send(record))).await;
    assert!(answers.iter().all(Result::is_err), "{answers:?}");
    let lost = timeout(Duration::from_secs(4), transport.next())
        .await
        .expect("it is noticed");
    assert!(matches!(lost, Err(TransportError::Lost(_))), "{lost:?}");
}

#[tokio::test]
async fn a_broker_that_blocks_publishers_is_named_and_deliveries_go_on() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    let mut transport = connect(&settings).await;
    publish_all(&transport, 3).await;
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.000001"]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the alarm never came");
        match transport.send(&record(3)).await {
            Ok(()) => {}
            Err(TransportError::Refused(why)) if why.contains("blocks publishers") => break,
            // A broker in this state may also drop a connection.
            Err(TransportError::Lost(_)) => transport = connect(&settings).await,
            Err(why) => panic!("{why:?}"),
        }
    }
    let mut taken = 0;
    while taken < 3 {
        match timeout(PATIENCE, transport.next())
            .await
            .expect("deliveries go on")
        {
            Ok(delivery) => {
                delivery.ack();
                taken += 1;
            }
            Err(_) => transport = connect(&settings).await,
        }
    }
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.6"]);
    eventually("publishing goes on", PATIENCE, async || {
        match transport.send(&record(4)).await {
            Ok(()) => return Some(()),
            Err(TransportError::Lost(_)) => transport = connect(&settings).await,
            Err(_) => {}
        }
        None
    })
    .await;
    transport.close().await;
}

#[tokio::test]
async fn a_silent_broker_is_noticed_within_ten_seconds_and_leaves_no_thread_behind() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let settings = rabbit.config();
    eventually(
        "earlier tests' threads end",
        Duration::from_secs(10),
        async || (client_threads() == 0).then_some(()),
    )
    .await;
    let lost = connect(&settings).await;
    let closed = connect(&settings).await;
    let dropped = connect(&settings).await;
    rabbit.signal("STOP");
    let start = Instant::now();
    closed.close().await;
    assert!(
        start.elapsed() < Duration::from_secs(6),
        "close has a deadline"
    );
    drop((closed, dropped));
    let silent = timeout(Duration::from_secs(10), lost.next())
        .await
        .expect("silence is noticed");
    assert!(matches!(silent, Err(TransportError::Lost(_))), "{silent:?}");
    drop(lost);
    let start = Instant::now();
    assert!(matches!(
        try_connect(&settings).await,
        Err(TransportError::Connect(_))
    ));
    assert!(
        start.elapsed() < Duration::from_secs(15),
        "connect has a deadline"
    );
    eventually(
        "no thread waits for the broker",
        Duration::from_secs(5),
        async || (client_threads() == 0).then_some(()),
    )
    .await;
    rabbit.signal("CONT");
}

#[tokio::test]
async fn over_tls_only_a_server_that_is_trusted_gets_records() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let plain = rabbit.config();
    let Some((port, certificate)) = rabbit.tls() else {
        return;
    };
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "guest\n").unwrap();
    let trusting = config::RabbitmqConfig {
        url: format!("amqps://guest@127.0.0.1:{port}/%2f").into(),
        password_file: Some(password.path().into()),
        ca_file: Some(certificate.into()),
        ..plain
    };
    let transport = connect(&trusting).await;
    publish_all(&transport, 1).await;
    transport.next().await.unwrap().ack();
    transport.close().await;

    let refused =
        async |settings: &config::RabbitmqConfig| match try_connect(settings).await.map(|_| ()) {
            Err(TransportError::Connect(why)) => why,
            other => panic!("{other:?}"),
        };
    let why = refused(&config::RabbitmqConfig {
        ca_file: None,
        ..trusting.clone()
    })
    .await;
    assert!(why.to_lowercase().contains("certificate"), "{why}");
    std::fs::write(password.path(), "wrong").unwrap();
    let why = refused(&trusting).await;
    assert!(
        why.contains("ACCESS_REFUSED") || why.contains("refused"),
        "{why}"
    );
}

/// The body of the next delivery, which is acked.
async fn next_body(transport: &RabbitMq) -> Bytes {
    let delivery = timeout(PATIENCE, transport.next())
        .await
        .expect("a delivery")
        .unwrap();
    let body = delivery.record.body.clone();
    delivery.ack();
    body
}

/// Longer than a frame of the connection.
fn long_text() -> String {
    "x".repeat(100 << 10)
}

#[tokio::test]
async fn a_message_with_long_properties_comes_out() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let config = rabbit.config();
    let transport = connect(&config).await;
    let mut headers = FieldTable::default();
    headers.insert("note".into(), AMQPValue::LongString(long_text().into()));
    let properties = BasicProperties::default().with_headers(headers);
    let channel = rabbit.client().await.create_channel().await.unwrap();
    let publish = async |body: &str| {
        let queue = config.queue.as_str().into();
        let options = BasicPublishOptions::default();
        channel
            .basic_publish(
                "".into(),
                queue,
                options,
                body.as_bytes(),
                properties.clone(),
            )
            .await
            .unwrap();
    };
    publish("{}").await;
    assert_eq!(next_body(&transport).await, "{}");
    transport.close().await;

    // This one waits already when the connection opens.
    publish("[]").await;
    let transport = connect(&config).await;
    assert_eq!(next_body(&transport).await, "[]");
    transport.close().await;
}

#[tokio::test]
async fn an_id_that_is_too_long_harms_no_other_record() {
    let Some(mut rabbit) = Rabbit::start().await else {
        return;
    };
    let transport = connect(&rabbit.config()).await;
    let wordy = Record {
        id: long_text().into(),
        ..record(0)
    };
    assert!(
        matches!(
            transport.send(&wordy).await,
            Err(TransportError::Publish(_))
        ),
        "not the connection's end"
    );
    publish_all(&transport, 1).await;
    transport.next().await.unwrap().ack();
    let large = Record {
        body: format!("\"{}\"", "y".repeat(1 << 20)).into(),
        ..record(1)
    };
    transport.send(&large).await.expect("many frames");
    assert_eq!(next_body(&transport).await, large.body);
    transport.close().await;
}
