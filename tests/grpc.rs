//! The gRPC service as its clients see it, and nodes that send records to each other.

use std::{
    net::SocketAddr,
    pin::pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, future::join_all, stream};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use waypost::{
    api::answer::{Answer, FailureClass},
    breaker::{ApiBreakers, Breaker, Trial},
    delivery::Delivery,
    lane_id::LaneId,
    proto::{self, Outcome, Receipt, WatchRequest},
    record::Schema,
    secrets::ServingTls,
    spool::Queue,
    tap::Passage,
    transport::{
        Transport as _, TransportError,
        grpc::{Grpc, Settings},
    },
};

use crate::support::{
    closed_spool, eventually,
    grpc::{Wire, channel, client, connect, message, record, settings, settings_at, uri},
    rig::Records as _,
    spool,
    tls::certificate,
};

const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test watches for an event that must not happen.
const A_WHILE: Duration = Duration::from_millis(200);
/// A record that is not settled in this time is written to disk.
const LATE: Duration = Duration::from_secs(1);

async fn next(node: &Grpc) -> Delivery {
    timeout(PATIENCE, node.next())
        .await
        .expect("a delivery in time")
        .expect("the node serves")
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Acks all deliveries of `node` while the test runs.
fn ack_all(node: &Rc<Grpc>) {
    let node = Rc::clone(node);
    actix_rt::spawn(async move {
        while let Ok(delivery) = node.next().await {
            delivery.ack();
        }
    });
}

#[actix_rt::test]
async fn send_answers_safe_only_once_the_record_is_settled() {
    let node = connect(&settings()).await;
    let mut client = client(&node).await;
    for reject in [false, true] {
        let mut sent = pin!(client.send(message("k-1", r#" {"a":1} "#)));
        let delivery = tokio::select! {
            delivery = next(&node) => delivery,
            answer = &mut sent => panic!("answered before the record came out: {answer:?}"),
        };
        assert_eq!(
            (&*delivery.record.id, &delivery.record.body[..]),
            ("k-1", &br#"{"a":1}"#[..])
        );
        assert!(
            timeout(A_WHILE, &mut sent).await.is_err(),
            "answered while the record was unsettled"
        );
        if reject {
            delivery.reject();
        } else {
            delivery.ack();
        }
        let receipt = soon("the receipt", sent).await.unwrap().into_inner();
        assert_eq!(
            (receipt.outcome(), receipt.id.as_str()),
            (Outcome::Safe, "k-1")
        );
    }
}

#[actix_rt::test]
async fn send_refuses_what_is_no_record_and_names_one_that_has_no_id() {
    let node = connect(&Settings {
        rules: Schema::Case.into(),
        ..settings()
    })
    .await;
    let mut client = client(&node).await;
    for (id, body) in [
        ("k", "[]"),
        ("k", "{"),
        ("k", r#"{"a":1}"#),
        ("line\nbreak", "{}"),
    ] {
        let receipt = client.send(message(id, body)).await.unwrap().into_inner();
        assert_eq!(
            receipt.outcome(),
            Outcome::Refused,
            "{id:?} {body}: {receipt:?}"
        );
        assert!(!receipt.detail.is_empty(), "{id:?} {body}");
    }
    let case = r#"{"name":"a","location":"b","age":1,"infectedtype":"","state":"","path":"mine"}"#;
    let (receipt, ()) = tokio::join!(client.send(message("", case)), async {
        let delivery = next(&node).await;
        assert!(
            !delivery.record.body.ends_with(br#""mine"}"#),
            "a path that a client sent goes"
        );
        delivery.ack();
    });
    let receipt = receipt.unwrap().into_inner();
    assert_eq!(receipt.outcome(), Outcome::Safe);
    assert!(!receipt.id.is_empty());
}

#[actix_rt::test]
async fn send_all_counts_what_is_safe_and_lists_what_is_not() {
    let node = Rc::new(connect(&settings()).await);
    ack_all(&node);
    let mut client = client(&node).await;
    let good = (0..2500).map(|n| message(&format!("k-{n}"), "{}"));
    let bad = (0..1200).map(|n| message(&format!("bad-{n}"), "[]"));
    let summary = soon(
        "the summary",
        client.send_all(stream::iter(good.chain(bad))),
    )
    .await
    .unwrap()
    .into_inner();
    assert_eq!(
        (summary.safe, summary.unsafe_count, summary.r#unsafe.len()),
        (2500, 1200, 1000)
    );
    assert!(
        summary
            .r#unsafe
            .iter()
            .all(|r| r.outcome() == Outcome::Refused && r.id.starts_with("bad-"))
    );
}

#[actix_rt::test]
async fn watch_shows_what_passes_on_one_lane_and_ends_when_the_node_closes() {
    let settings = settings();
    let node = connect(&settings).await;
    let mut client = client(&node).await;
    assert!(
        client
            .watch(WatchRequest {
                lane: "telex".into()
            })
            .await
            .is_err()
    );
    let mut passages = client
        .watch(WatchRequest {
            lane: "nats".into(),
        })
        .await
        .unwrap()
        .into_inner();
    for (lane, id) in [(LaneId::Grpc, "1"), (LaneId::Nats, "2")] {
        let body = Bytes::from_static(b"{}");
        settings.tap.show(|| Passage {
            lane,
            id: id.into(),
            body,
            status: 201,
            at_ms: 5,
        });
    }
    let passage = soon("a passage", passages.message())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (passage.id.as_str(), passage.lane.as_str(), passage.status),
        ("2", "nats", 201)
    );
    node.close().await;
    assert!(soon("the end", passages.message()).await.unwrap().is_none());
}

/// A `Carry` call: the way in for records, and their receipts.
async fn carry(node: &Grpc) -> (mpsc::Sender<proto::Record>, tonic::Streaming<Receipt>) {
    let (records, outbox) = mpsc::channel(8);
    let call = client(node).await.carry(ReceiverStream::new(outbox)).await;
    (records, call.unwrap().into_inner())
}

async fn next_receipt(receipts: &mut tonic::Streaming<Receipt>) -> Receipt {
    let receipt = soon("a receipt", receipts.message()).await;
    receipt.unwrap().unwrap()
}

#[actix_rt::test]
async fn carry_refuses_a_record_without_an_id_or_whose_body_is_no_object() {
    let node = connect(&settings()).await;
    let (records, mut receipts) = carry(&node).await;
    for (id, body) in [("", "{}"), ("k", "1")] {
        records.send(message(id, body)).await.unwrap();
        let receipt = next_receipt(&mut receipts).await;
        assert_eq!(
            (receipt.outcome(), receipt.id.as_str()),
            (Outcome::Refused, id)
        );
    }
    // This node has not checked a record that another node took in.
    records
        .send(proto::Record {
            origin: "another run/1".into(),
            ..message("k", "{x")
        })
        .await
        .unwrap();
    let receipt = next_receipt(&mut receipts).await;
    assert_eq!(receipt.outcome(), Outcome::Refused);
    drop(records);
    assert!(soon("the end", receipts.message()).await.unwrap().is_none());
}

#[actix_rt::test]
async fn carry_gives_a_receipt_per_record_in_the_order_in_which_they_are_settled() {
    let node = connect(&settings()).await;
    let (records, mut receipts) = carry(&node).await;
    for id in ["1", "2", "3"] {
        records.send(message(id, "{}")).await.unwrap();
    }
    let mut deliveries = vec![next(&node).await, next(&node).await, next(&node).await];
    assert!(
        timeout(A_WHILE, receipts.message()).await.is_err(),
        "a receipt while nothing was settled"
    );
    for at in [2, 0, 0] {
        let delivery = deliveries.remove(at);
        let id = delivery.record.id.to_string();
        delivery.ack();
        assert_eq!(
            next_receipt(&mut receipts).await,
            Receipt {
                id,
                outcome: Outcome::Safe.into(),
                detail: String::new()
            }
        );
    }
    drop(records);
    assert!(soon("the end", receipts.message()).await.unwrap().is_none());
}

#[actix_rt::test]
async fn a_record_comes_out_as_it_went_in_and_again_until_it_is_settled() {
    let node = connect(&settings()).await;
    let record = record("k");
    let mut published = pin!(node.send(&record));
    let delivery = tokio::select! { delivery = next(&node) => delivery, _ = &mut published => panic!("confirmed early") };
    assert_eq!(delivery.record, record);
    assert!(!delivery.redelivered);

    drop(delivery);
    let delivery = next(&node).await;
    assert!(delivery.redelivered);
    let given_back = Instant::now();
    delivery.retry_after(Duration::from_millis(300));
    let delivery = next(&node).await;
    assert!(given_back.elapsed() >= Duration::from_millis(300));
    assert_eq!(delivery.record, record);
    assert!(
        published.as_mut().now_or_never().is_none(),
        "confirmed while unsettled"
    );
    delivery.ack();
    soon("the confirm", published).await.unwrap();
}

#[actix_rt::test]
async fn a_delivery_can_be_settled_on_another_thread() {
    let node = connect(&settings()).await;
    let again = record("again");
    let record = record("k");
    let both = async { tokio::join!(node.send(&record), node.send(&again)) };
    let (published, ()) = tokio::join!(both, async {
        let one = next(&node).await;
        let other = next(&node).await;
        std::thread::spawn(|| (one.ack(), drop(other)))
            .join()
            .unwrap();
        next(&node).await.ack();
    });
    assert_eq!(published, (Ok(()), Ok(())));
}

#[actix_rt::test]
async fn the_same_id_may_be_under_way_twice() {
    let node = Rc::new(connect(&settings()).await);
    let record = record("k");
    let published = async { tokio::join!(node.send(&record), node.send(&record)) };
    let mut published = pin!(published);
    let (first, second) = tokio::select! {
        both = async { (next(&node).await, next(&node).await) } => both,
        _ = &mut published => panic!("confirmed early"),
    };
    first.ack();
    assert!(
        timeout(A_WHILE, &mut published).await.is_err(),
        "one receipt confirmed both"
    );
    second.ack();
    assert_eq!(soon("both confirms", published).await, (Ok(()), Ok(())));
}

#[actix_rt::test]
async fn the_window_bounds_what_is_under_way_and_an_abandoned_publish_makes_room() {
    const WINDOW: usize = 512;
    let node = connect(&settings()).await;
    let records: Vec<_> = (0..=WINDOW).map(|n| record(&n.to_string())).collect();
    let mut under_way: Vec<_> = records[..WINDOW]
        .iter()
        .map(|record| Box::pin(node.send(record)))
        .collect();
    let mut held = Vec::new();
    for publish in &mut under_way {
        assert!(publish.now_or_never().is_none());
    }
    for _ in 0..WINDOW {
        held.push(next(&node).await);
    }
    let mut one_more = pin!(node.send(&records[WINDOW]));
    tokio::select! {
        _ = &mut one_more => panic!("confirmed beyond the window"),
        _ = node.next() => panic!("sent beyond the window"),
        () = tokio::time::sleep(A_WHILE) => {}
    }
    under_way.pop();
    let delivery = tokio::select! { delivery = next(&node) => delivery, _ = &mut one_more => panic!("confirmed early") };
    assert_eq!(delivery.record.id, records[WINDOW].id);
    delivery.ack();
    soon("the confirm", one_more).await.unwrap();
    held.into_iter().for_each(Delivery::ack);
    assert!(
        soon("all confirms", join_all(under_way))
            .await
            .iter()
            .all(Result::is_ok)
    );
}

#[actix_rt::test]
async fn a_node_that_is_full_and_whose_disk_takes_nothing_slows_its_senders_down_and_loses_nothing()
{
    const RECORDS: usize = 150;
    let node = connect(&Settings {
        spool: closed_spool().await,
        ..settings()
    })
    .await;
    let body = format!(r#"{{"a":"{}"}}"#, "x".repeat(1 << 20));
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let records = stream::iter(0..RECORDS).map(move |n| {
        count.fetch_add(1, Ordering::SeqCst);
        message(&n.to_string(), &body)
    });
    let receipts = client(&node)
        .await
        .carry(records)
        .await
        .unwrap()
        .into_inner();
    let mut quiet = 0;
    eventually("the sender stands still", PATIENCE, || {
        let now = sent.load(Ordering::SeqCst);
        let still = std::mem::replace(&mut quiet, now) == now && now > 20;
        async move {
            tokio::time::sleep(A_WHILE).await;
            still.then_some(())
        }
    })
    .await;
    assert!(
        sent.load(Ordering::SeqCst) < 80,
        "{} MiB taken in",
        sent.load(Ordering::SeqCst)
    );
    let settled = async {
        for _ in 0..RECORDS {
            next(&node).await.ack();
        }
    };
    let (receipts, ()) = tokio::join!(receipts.collect::<Vec<_>>(), settled);
    assert_eq!(
        receipts
            .iter()
            .flatten()
            .filter(|r| r.outcome() == Outcome::Safe)
            .count(),
        RECORDS
    );
}

#[actix_rt::test]
async fn while_the_api_is_away_a_record_is_safe_on_disk_at_once_and_comes_from_there() {
    const RECORDS: usize = 40;
    let (spool, _folder) = spool();
    let breaker = Arc::default();
    let settings = Settings {
        spool,
        breakers: only(&breaker),
        ..settings()
    };
    while !breaker.is_open() {
        let mut trial = Trial::default();
        let pass = breaker.pass(&trial).await;
        pass.failed(&no_answer(), &mut trial);
    }
    let node = connect(&settings).await;
    let mut client = client(&node).await;
    // If each waited for the API first, these would take twice as long.
    let sent = async {
        for n in 0..RECORDS {
            let receipt = client
                .send(message(&n.to_string(), "{}"))
                .await
                .unwrap()
                .into_inner();
            assert_eq!(receipt.outcome(), Outcome::Safe);
        }
    };
    timeout(PATIENCE, sent).await.expect("receipts at once");
    for n in 0..RECORDS {
        let delivery = next(&node).await;
        assert_eq!(*delivery.record.id, n.to_string());
        delivery.ack();
    }
    eventually("their entries are struck out", PATIENCE, async || {
        (settings.spool.stats().records(Queue::Carried) == 0).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn while_neither_api_nor_disk_takes_a_record_it_is_not_safe() {
    for is_known_to_be_down in [true, false] {
        is_not_safe(is_known_to_be_down).await;
    }
}

/// The breaker of `[api]`.
fn only(breaker: &Arc<Breaker>) -> ApiBreakers {
    ApiBreakers::new([(None, Arc::clone(breaker))].into_iter())
}

/// The disk fails, and the API takes nothing. If it is known to be down, a record goes to disk at
/// once, else when it is late.
async fn is_not_safe(is_known_to_be_down: bool) {
    let breaker = Arc::default();
    let settings = Settings {
        spool: closed_spool().await,
        breakers: only(&breaker),
        ..settings()
    };
    while is_known_to_be_down && !breaker.is_open() {
        let mut trial = Trial::default();
        let pass = breaker.pass(&trial).await;
        pass.failed(&no_answer(), &mut trial);
    }
    let node = connect(&settings).await;
    let mut client = client(&node).await;
    let mut sent = pin!(client.send(message("a", "{}")));
    let delivery = tokio::select! {
        delivery = next(&node) => delivery,
        answer = &mut sent => panic!("answered before the record came out: {answer:?}"),
    };
    assert!(
        timeout(LATE, &mut sent).await.is_err(),
        "answered while nobody had it"
    );
    delivery.ack();
    assert_eq!(
        soon("the receipt", sent)
            .await
            .unwrap()
            .into_inner()
            .outcome(),
        Outcome::Safe
    );
}

#[actix_rt::test]
async fn a_record_is_delivered_though_its_sender_has_gone() {
    let node = connect(&settings()).await;
    let records = stream::iter([message("k", "{}")]).chain(stream::pending());
    let receipts = client(&node).await.carry(records).await.unwrap();
    let delivery = next(&node).await;
    drop(receipts);
    delivery.retry_after(Duration::from_millis(50));
    let delivery = next(&node).await;
    assert_eq!(&*delivery.record.id, "k");
    delivery.ack();
}

#[actix_rt::test]
async fn health_and_reflection_are_served() {
    let node = connect(&settings()).await;
    let channel = channel(&node).await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", "waypost.v1.Waypost"] {
        let answer = health
            .check(HealthCheckRequest {
                service: service.into(),
            })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("{answer:?}")
    };
    assert!(
        list.service
            .iter()
            .any(|service| service.name == "waypost.v1.Waypost"),
        "{list:?}"
    );
}

#[actix_rt::test]
async fn two_nodes_carry_records_to_each_other() {
    let mut a = settings();
    let mut b = settings();
    a.config.peers = vec![uri(&b)];
    b.config.peers = vec![uri(&a)];
    let a = connect(&a).await;
    let b = connect(&b).await;
    for (from, to) in [(&a, &b), (&b, &a)] {
        eventually("the peers find each other", PATIENCE, || async {
            let record = record("k");
            let mut published = pin!(from.send(&record));
            tokio::select! {
                delivery = next(to) => delivery.ack(),
                _ = &mut published => return None,
            }
            published.await.ok()
        })
        .await;
    }
}

#[actix_rt::test]
async fn while_a_peer_is_away_the_others_carry_and_it_is_used_again_once_it_is_back() {
    let near = settings();
    let mut far = settings();
    let mut sender = settings();
    sender.config.peers = vec![uri(&near), uri(&far)];
    let mut gone = connect(&far).await;
    let near = Rc::new(connect(&near).await);
    ack_all(&near);
    let sender = connect(&sender).await;

    // One record per peer: the one that the far peer holds fails as soon as that peer is gone.
    let one = record("1");
    let other = record("2");
    let mut both = pin!(async { tokio::join!(sender.send(&one), sender.send(&other)) });
    let delivery = tokio::select! { delivery = next(&gone) => delivery, _ = &mut both => panic!("confirmed early") };
    drop(gone);
    let (first, second) = soon("both answers", both).await;
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    drop(delivery);

    eventually("the loss is noticed", PATIENCE, || async {
        let records: Vec<_> = (0..10).map(|n| record(&n.to_string())).collect();
        join_all(records.iter().map(|record| sender.send(record)))
            .await
            .iter()
            .all(Result::is_ok)
            .then_some(())
    })
    .await;

    far = settings_at(far.config.listen.port());
    gone = connect(&far).await;
    let back = soon("a record at the peer that is back", async {
        loop {
            let record = record("3");
            tokio::select! {
                delivery = gone.next() => return delivery.unwrap(),
                published = sender.send(&record) => published.unwrap(),
            }
        }
    });
    back.await.ack();
}

#[actix_rt::test]
async fn without_a_peer_that_can_be_reached_a_publish_fails_at_once_and_the_node_serves_all_the_same()
 {
    let mut lonely = settings();
    lonely.config.peers = vec![uri(&settings())];
    let node = connect(&lonely).await;
    let began = Instant::now();
    assert!(matches!(
        node.send(&record("k")).await,
        Err(TransportError::Publish(_))
    ));
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "before any time-out"
    );
    let mut client = client(&node).await;
    let message = message("k", "{}");
    let (receipt, ()) = tokio::join!(client.send(message), async { next(&node).await.ack() });
    assert_eq!(receipt.unwrap().into_inner().outcome(), Outcome::Safe);
}

#[actix_rt::test]
async fn a_peer_that_falls_silent_is_noticed_within_ten_seconds() {
    let peer = settings();
    let mut sender = settings();
    let peer = connect(&peer).await;
    let wire = Wire::to(peer.address());
    sender.config.peers = vec![format!("http://{}", wire.address)];
    let sender = connect(&sender).await;
    let record = record("k");
    let mut published = pin!(sender.send(&record));
    let delivery = tokio::select! { delivery = next(&peer) => delivery, _ = &mut published => panic!("confirmed early") };
    wire.fall_silent();
    delivery.ack();
    assert!(matches!(
        soon("the publish fails", published).await,
        Err(TransportError::Publish(_))
    ));
}

#[actix_rt::test]
async fn close_confirms_what_is_settled_and_gives_back_what_is_not() {
    let node = connect(&settings()).await;
    let records: Vec<_> = (0..4).map(|n| record(&n.to_string())).collect();
    let mut client = client(&node).await;
    let sent = actix_rt::spawn(async move { client.send(message("sent", "{}")).await });
    let mut published = Box::pin(join_all(records.iter().map(|record| node.send(record))));
    // All deliveries but these two stay unsettled.
    let mut held = Vec::new();
    let mut find = async |id: &str| {
        loop {
            let delivery = next(&node).await;
            if &*delivery.record.id == id {
                return delivery;
            }
            held.push(delivery);
        }
    };
    let (settled, late) = tokio::select! {
        biased;
        _ = &mut published => panic!("confirmed early"),
        both = async { (find("0").await, find("1").await) } => both,
    };
    settled.ack();
    late.retry_after(Duration::from_mins(1));
    let (results, (), sent) = tokio::join!(published, node.close(), sent);
    assert_eq!(
        results.iter().map(Result::is_ok).collect::<Vec<_>>(),
        [true, false, false, false],
        "{results:?}"
    );
    assert_eq!(
        sent.unwrap().unwrap().into_inner().outcome(),
        Outcome::Retry
    );
    assert!(matches!(node.next().await, Err(TransportError::Lost(_))));
    assert!(node.send(&records[0]).await.is_err());
}

#[actix_rt::test]
async fn the_port_is_free_for_the_next_life_right_after_close_and_right_after_drop_whatever_clients_keep_open()
 {
    let settings = settings();
    for drop_it in [false, true, false, true] {
        let node = connect(&settings).await;
        let channel = channel(&node).await;
        let mut watching = HealthClient::new(channel)
            .watch(HealthCheckRequest {
                service: String::new(),
            })
            .await
            .unwrap()
            .into_inner();
        let record = record("k");
        {
            let mut published = pin!(node.send(&record));
            tokio::select! { delivery = next(&node) => delivery.ack(), _ = &mut published => panic!("confirmed early") }
        }
        if drop_it {
            drop(node);
        } else {
            let began = Instant::now();
            node.close().await;
            assert!(
                began.elapsed() <= Duration::from_secs(6),
                "closing took {:?}",
                began.elapsed()
            );
            assert_eq!(
                tokio::net::TcpListener::bind(settings.config.listen)
                    .await
                    .err()
                    .map(|e| e.kind()),
                None
            );
        }
        let node = connect(&settings).await;
        let (published, ()) = tokio::join!(node.send(&record), async { next(&node).await.ack() });
        published.unwrap();
        soon("the old connection ends", async {
            while let Ok(Some(_)) = watching.message().await {}
        })
        .await;
        node.close().await;
    }
}

#[actix_rt::test]
async fn an_address_that_is_taken_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = settings_at(taken.local_addr().unwrap().port());
    assert!(matches!(
        Grpc::connect(&settings).await,
        Err(TransportError::Connect(_))
    ));
}

#[actix_rt::test]
async fn nodes_speak_tls_to_each_other_and_to_themselves_and_trust_nobody_else() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let dir = tempfile::tempdir().unwrap();
    let Some((cert, key)) = certificate(dir.path(), "DNS:localhost") else {
        return;
    };
    let mut own = settings();
    own.config.cert_file = Some(cert.clone().into());
    assert!(
        matches!(Grpc::connect(&own).await, Err(TransportError::Connect(_))),
        "a certificate without its key"
    );
    own.config.key_file = Some(key.into());
    own.server_tls = Some(served(&own));
    let node = connect(&own).await;
    let record = record("k");
    let (published, ()) = tokio::join!(node.send(&record), async { next(&node).await.ack() });
    published.unwrap();

    let SocketAddr::V4(address) = node.address() else {
        panic!("an IPv4 address")
    };
    for (ca_file, trusted) in [(Some(cert), true), (None, false)] {
        let mut peer = settings();
        peer.config.ca_file = ca_file.map(Into::into);
        peer.config.peers = vec![format!("https://localhost:{}", address.port())];
        let peer = connect(&peer).await;
        let published = async {
            tokio::select! {
                published = peer.send(&record) => published.is_ok(),
                () = async { loop { next(&node).await.ack() } } => unreachable!("the loop has no end"),
            }
        };
        assert_eq!(published.await, trusted);
    }
}

/// The certificate and key of the settings, which are read again from now on.
fn served(settings: &Settings) -> ServingTls {
    let files = settings.config.tls().expect("both files are named");
    let tls = ServingTls::open("lanes.grpc.cert_file", files).expect("they fit together");
    actix_rt::spawn(tls.clone().keep_reading());
    tls
}

#[actix_rt::test]
async fn a_new_certificate_is_for_new_connections_and_cuts_none() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let dir = tempfile::tempdir().unwrap();
    let Some((cert, key)) = certificate(dir.path(), "DNS:localhost") else {
        return;
    };
    let mut own = settings();
    own.config.cert_file = Some(cert.into());
    own.config.key_file = Some(key.into());
    own.server_tls = Some(served(&own));
    let node = connect(&own).await;
    let SocketAddr::V4(address) = node.address() else {
        panic!("an IPv4 address")
    };
    let (new_cert, _) = certificate(dir.path(), "DNS:localhost").expect("it is installed");
    // A peer that trusts the new certificate alone.
    let record = record("k");
    eventually("the new certificate is served", PATIENCE, async || {
        let mut peer = settings();
        peer.config.ca_file = Some(new_cert.clone().into());
        peer.config.peers = vec![format!("https://localhost:{}", address.port())];
        let peer = connect(&peer).await;
        tokio::select! {
            published = peer.send(&record) => published.ok(),
            () = async { loop { next(&node).await.ack() } } => unreachable!("the loop has no end"),
        }
    })
    .await;
    assert!(
        node.lost().now_or_never().is_none(),
        "its own stream goes on"
    );
    let (published, ()) = tokio::join!(node.send(&record), async { next(&node).await.ack() });
    published.unwrap();
}

fn no_answer() -> Answer {
    Answer::NoAnswer {
        class: FailureClass::Connect,
        why: "refused".into(),
    }
}
