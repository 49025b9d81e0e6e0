//! One suite of guarantees, held against every transport: see `waypost::transport`.

use std::{
    collections::HashSet,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::{task::JoinHandle, time::timeout};
use waypost::{
    actors::lane::bundle::SettledRecords,
    delivery::{Delivery, Verdict},
    record::{Origin, Record, TraceHeaders},
    transport::{self, Headers, Message, Transport},
};

use crate::support::rig::{Bundles, Records as _, Rig};

/// Longer than any system takes to send an unsettled message again.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a test looks on that something does not come.
const A_WHILE: Duration = Duration::from_millis(1500);
/// Longer than the time after which any system, by itself, takes a message for lost.
const LONG_HOLD: Duration = Duration::from_secs(35);
/// A system that has gone is noticed within this.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);

fn record(at: usize) -> Record {
    Record {
        id: Record::new_id(),
        body: Bytes::from(format!("{{\"number\":{at},\"place\":\"Cobán\"}}")),
        trace: TraceHeaders::read(
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            Some("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ),
        origin: Some(Origin {
            run: Arc::from("run"),
            at_us: 1_700_000_000_000_000,
        }),
        api: None,
        event: None,
    }
}

async fn connect<R: Rig>(settings: &<R::T as Transport>::Settings) -> Rc<R::T> {
    // A system that has just come back may turn the first away.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match transport::connect::<R::T>(settings).await {
            Ok(transport) => return Rc::new(transport),
            Err(failure) => assert!(Instant::now() < deadline, "{failure}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Publishes until the record is confirmed, as a router would. If the confirm waits for the
/// settlement, the publish goes on in the background.
async fn publish<R: Rig>(transport: &Rc<R::T>, records: Vec<Record>) -> JoinHandle<()> {
    let transport = Rc::clone(transport);
    let publishing = actix_rt::spawn(async move {
        join_all(records.iter().map(async |record| {
            while let Err(failure) = transport.send(record).await {
                eprintln!("published again after: {failure}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }))
        .await;
    });
    if R::CONFIRMS_ON_SETTLE {
        return publishing;
    }
    timeout(PATIENCE, publishing)
        .await
        .expect("confirms in time")
        .expect("no panic");
    actix_rt::spawn(async {})
}

async fn take<T: Transport>(transport: &T) -> Delivery {
    timeout(PATIENCE, transport.next())
        .await
        .expect("a delivery in time")
        .expect("a connection")
}

async fn bundled<T: Transport>(bundles: &Bundles<'_, T>) -> Delivery {
    timeout(PATIENCE, bundles.next())
        .await
        .expect("a delivery in time")
        .expect("a connection")
}

/// Takes and acks until each of `records` has come out.
async fn take_all<T: Transport>(transport: &T, records: &[Record]) {
    let mut missing: HashSet<_> = records
        .iter()
        .map(|record| Arc::clone(&record.id))
        .collect();
    let took = timeout(PATIENCE, async {
        while !missing.is_empty() {
            let delivery = transport.next().await.expect("a connection");
            missing.remove(&delivery.record.id);
            delivery.ack();
        }
    });
    let all = took.await.is_ok();
    assert!(
        all,
        "{} of {} did not come out",
        missing.len(),
        records.len()
    );
}

async fn nothing_comes<T: Transport>(transport: &T, meanwhile: Duration) {
    if let Ok(came) = timeout(meanwhile, transport.next()).await {
        panic!("came: {came:?}");
    }
}

pub async fn what_goes_in_comes_out<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let mut large = record(1);
    large.body = Bytes::from(format!("{{\"place\":\"{}\"}}", "ñ".repeat(100 << 10)));
    let mut bare = record(2);
    (bare.trace, bare.origin, bare.id) = (None, None, Arc::from("a/key_of-the.client:0"));
    let mut event = record(3);
    event.event = Some(Arc::from(
        "id=1&note=%C3%A9&source=/&specversion=1.0&type=t&n:=5",
    ));
    let mut long_event = record(4);
    let text = format!(
        "id={}&source=/&specversion=1.0&type=t",
        "x".repeat((6 << 10) - 40)
    );
    long_event.event = Some(text.into());
    for sent in [record(0), large, bare, event, long_event] {
        let confirm = publish::<R>(&transport, vec![sent.clone()]).await;
        let delivery = take(&*transport).await;
        assert_eq!(delivery.record, sent);
        assert!(!delivery.redelivered);
        delivery.ack();
        timeout(PATIENCE, confirm)
            .await
            .expect("a confirm in time")
            .expect("no panic");
    }
    transport.close().await;
}

pub async fn many_publishes_at_once_are_all_confirmed<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let records: Vec<_> = (0..1000).map(record).collect();
    let confirms = publish::<R>(&transport, records.clone()).await;
    take_all(&*transport, &records).await;
    timeout(PATIENCE, confirms)
        .await
        .expect("confirms in time")
        .expect("no panic");
    transport.close().await;
}

pub async fn what_is_published_together_is_settled_one_by_one<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let mut records: Vec<_> = (0..300).map(record).collect();
    records[7].body = Bytes::from(format!("{{\"place\":\"{}\"}}", "ñ".repeat(100 << 10)));
    (records[9].trace, records[9].origin) = (None, None);
    records[11].event = Some(Arc::from("id=1&source=/&specversion=1.0&type=t"));
    let most = if R::CARRIES_BUNDLES { 128 } else { 1 };
    let publishing = {
        let transport = Rc::clone(&transport);
        let mut left = records.clone();
        actix_rt::spawn(async move {
            let bundles = Bundles::new(&*transport, most, &SettledRecords::default());
            while !left.is_empty() {
                let mut confirmed = bundles.send(&left).await.into_iter();
                left.retain(|_| confirmed.next() == Some(false));
            }
        })
    };
    let bundles = Bundles::new(&*transport, most, &SettledRecords::default());
    let mut given_back = HashSet::new();
    let mut settled = HashSet::new();
    for number in 0.. {
        let delivery = bundled(&bundles).await;
        let id = Arc::clone(&delivery.record.id);
        assert!(!settled.contains(&id), "{id} was settled, and came again");
        assert_eq!(
            records.iter().find(|record| record.id == id),
            Some(&delivery.record)
        );
        if number % 3 == 0 && given_back.insert(Arc::clone(&id)) {
            drop(delivery);
        } else {
            settled.insert(id);
            if number % 2 == 0 {
                delivery.ack();
            } else {
                delivery.reject();
            }
        }
        if settled.len() == records.len() {
            break;
        }
    }
    timeout(PATIENCE, publishing)
        .await
        .expect("confirms in time")
        .expect("no panic");
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn what_was_settled_of_a_message_does_not_come_again_by_another_connection<R: Rig>() {
    if !R::CARRIES_BUNDLES {
        return;
    }
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let known = SettledRecords::default();
    let bundles = Bundles::new(&*transport, 128, &known);
    let records: Vec<_> = (0..20).map(record).collect();
    assert_eq!(bundles.send(&records).await, [true; 20]);
    let mut settled = HashSet::new();
    for at in 0..10 {
        let delivery = bundled(&bundles).await;
        if at == 4 {
            drop(delivery);
            continue;
        }
        settled.insert(Arc::clone(&delivery.record.id));
        if at % 2 == 0 {
            delivery.ack();
        } else {
            delivery.reject();
        }
    }
    drop(bundles);
    transport.close().await;
    drop(transport);
    let transport = connect::<R>(&settings).await;
    let bundles = Bundles::new(&*transport, 128, &known);
    let left: Vec<_> = records
        .into_iter()
        .filter(|record| !settled.contains(&record.id))
        .collect();
    let mut missing: HashSet<_> = left.iter().map(|record| Arc::clone(&record.id)).collect();
    while !missing.is_empty() {
        let delivery = bundled(&bundles).await;
        assert!(
            !settled.contains(&delivery.record.id),
            "it was settled, and came again"
        );
        missing.remove(&delivery.record.id);
        delivery.ack();
    }
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn a_bundle_keeps_its_headers_and_its_bytes<R: Rig>() {
    if !R::CARRIES_BUNDLES {
        return;
    }
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let sent = Message {
        headers: Headers {
            id: Record::new_id(),
            origin: None,
            trace: None,
            bundle: Some(7),
            api: None,
            event: None,
        },
        body: Bytes::from_static(&[0, 1, 2, 0xff]),
    };
    let mut confirms = Vec::new();
    transport
        .publish(std::slice::from_ref(&sent), |index, outcome| {
            confirms.push((index, outcome));
        })
        .await;
    assert_eq!(confirms, [(0, Ok(()))]);
    let mut received = Vec::new();
    let receiving = timeout(PATIENCE, transport.receive(&mut received, 2));
    receiving
        .await
        .expect("a message in time")
        .expect("a connection");
    let incoming = received.pop().expect("one message");
    assert_eq!(incoming.message, sent);
    assert!(received.is_empty());
    incoming.acker.settle(Verdict::Ack);
    transport.close().await;
}

pub async fn no_more_come_at_once_than_were_asked_for<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let confirms = publish::<R>(&transport, (0..20).map(record).collect()).await;
    let mut count = 0;
    while count < 20 {
        let mut received = Vec::new();
        timeout(PATIENCE, transport.receive(&mut received, 3))
            .await
            .expect("a message in time")
            .expect("a connection");
        assert!((1..=3).contains(&received.len()), "{}", received.len());
        count += received.len();
        for incoming in received {
            incoming.acker.settle(Verdict::Ack);
        }
    }
    timeout(PATIENCE, confirms)
        .await
        .expect("confirms in time")
        .expect("no panic");
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn a_confirm_means_durable<R: Rig>() {
    if !R::SURVIVES_KILL {
        return;
    }
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let records: Vec<_> = (0..200).map(record).collect();
    publish::<R>(&transport, records.clone()).await;
    rig.kill().await;
    rig.revive().await;
    let transport = connect::<R>(&settings).await;
    take_all(&*transport, &records).await;
    transport.close().await;
}

pub async fn acked_and_rejected_do_not_come_again<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let confirms = publish::<R>(&transport, (0..10).map(record).collect()).await;
    for at in 0..10 {
        let delivery = take(&*transport).await;
        if at % 2 == 0 {
            delivery.ack();
        } else {
            delivery.reject();
        }
    }
    timeout(PATIENCE, confirms)
        .await
        .expect("confirms in time")
        .expect("no panic");
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
    drop(transport);
    let transport = connect::<R>(&settings).await;
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn unsettled_comes_again<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let sent = record(0);
    let confirm = publish::<R>(&transport, vec![sent.clone()]).await;
    drop(take(&*transport).await);
    let again = take(&*transport).await;
    assert_eq!(again.record, sent);
    again.ack();
    timeout(PATIENCE, confirm)
        .await
        .expect("a confirm in time")
        .expect("no panic");
    transport.close().await;
}

pub async fn retry_after_waits_its_delay<R: Rig>() {
    const DELAY: Duration = Duration::from_secs(2);
    let Some(mut rig) = R::start().await else {
        return;
    };
    let transport = connect::<R>(&rig.settings()).await;
    let sent = record(0);
    let confirm = publish::<R>(&transport, vec![sent.clone()]).await;
    let delivery = take(&*transport).await;
    let given_back = Instant::now();
    delivery.retry_after(DELAY);
    let again = take(&*transport).await;
    assert!(
        given_back.elapsed() >= DELAY,
        "came after {:?}",
        given_back.elapsed()
    );
    assert_eq!(again.record, sent);
    again.ack();
    timeout(PATIENCE, confirm)
        .await
        .expect("a confirm in time")
        .expect("no panic");
    transport.close().await;
}

pub async fn what_is_held_comes_to_nobody_else<R: Rig>() {
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let confirm = publish::<R>(&transport, vec![record(0)]).await;
    let held = take(&*transport).await;
    nothing_comes(&*transport, LONG_HOLD).await;
    held.ack();
    timeout(PATIENCE, confirm)
        .await
        .expect("a confirm in time")
        .expect("no panic");
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn close_gives_back_what_is_unsettled_and_keeps_what_was_acked<R: Rig>() {
    if R::CONFIRMS_ON_SETTLE {
        // It gives back to the sender, which is gone with it here: `tests/grpc.rs` looks at that.
        return;
    }
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let records: Vec<_> = (0..50).map(record).collect();
    publish::<R>(&transport, records.clone()).await;
    let mut acked = HashSet::new();
    let mut held = Vec::new();
    for at in 0..20 {
        let delivery = take(&*transport).await;
        if at % 2 == 0 {
            acked.insert(Arc::clone(&delivery.record.id));
            delivery.ack();
        } else {
            held.push(delivery);
        }
    }
    timeout(PATIENCE, transport.close())
        .await
        .expect("a close in time");
    assert!(
        transport.next().await.is_err(),
        "a closed transport delivers nothing"
    );
    // Too late: they were given back, and come again.
    held.into_iter().for_each(Delivery::ack);
    drop(transport);

    let transport = connect::<R>(&settings).await;
    let left: Vec<_> = records
        .into_iter()
        .filter(|record| !acked.contains(&record.id))
        .collect();
    assert_eq!(left.len(), 40);
    take_all(&*transport, &left).await;
    nothing_comes(&*transport, A_WHILE).await;
    transport.close().await;
}

pub async fn a_system_that_dies_is_noticed_while_the_lane_is_idle<R: Rig>() {
    if R::CONFIRMS_ON_SETTLE {
        return;
    }
    let Some(mut rig) = R::start().await else {
        return;
    };
    let settings = rig.settings();
    let transport = connect::<R>(&settings).await;
    let (idle, ()) = tokio::join!(timeout(NOTICED_WITHIN, transport.next()), rig.kill());
    assert!(idle.expect("noticed in time").is_err());
    let gone = transport::connect::<R::T>(&settings).await;
    assert!(gone.is_err(), "connected to nobody");
    rig.revive().await;
    let transport = connect::<R>(&settings).await;
    let sent = record(0);
    publish::<R>(&transport, vec![sent.clone()]).await;
    take_all(&*transport, &[sent]).await;
    transport.close().await;
}

/// The suite, for each system.
macro_rules! contract {
    ($($system:ident: $rig:ty),+ $(,)?) => { $(
        mod $system {
            contract!(@tests $rig:
                what_goes_in_comes_out,
                many_publishes_at_once_are_all_confirmed,
                what_is_published_together_is_settled_one_by_one,
                what_was_settled_of_a_message_does_not_come_again_by_another_connection,
                a_bundle_keeps_its_headers_and_its_bytes,
                no_more_come_at_once_than_were_asked_for,
                a_confirm_means_durable,
                acked_and_rejected_do_not_come_again,
                unsettled_comes_again,
                retry_after_waits_its_delay,
                what_is_held_comes_to_nobody_else,
                close_gives_back_what_is_unsettled_and_keeps_what_was_acked,
                a_system_that_dies_is_noticed_while_the_lane_is_idle,
            );
        }
    )+ };
    (@tests $rig:ty: $($guarantee:ident,)+) => { $(
        #[actix_rt::test]
        async fn $guarantee() {
            super::$guarantee::<$rig>().await;
        }
    )+ };
}

contract! {
    memory: crate::support::memory::InMemory,
    grpc: crate::support::grpc::OwnNode,
    nats: crate::support::nats::Nats,
    rabbitmq: crate::support::rabbitmq::Rabbit,
    pubsub: crate::support::pubsub::Pubsub,
}
