use std::{
    hint,
    sync::{Barrier, mpsc},
    thread,
    time::Duration,
};

use bytes::Bytes;

use super::*;
use crate::{
    delivery::{Acker, Delivery, Receipt},
    lane_id::LaneId,
    record::{Origin, Record},
};

const CONTEXT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

const STATE: &str = "congo=t61rcWkgMzE";

fn headers(parent: Option<&str>) -> Option<TraceHeaders> {
    TraceHeaders::read(parent?, Some(STATE))
}

fn tracer(sampler: &str) -> (Tracer, Arc<SpanQueue>) {
    let queue = Arc::new(SpanQueue::new(100, 100));
    let sampler = Sampler::named(sampler, 1.0).unwrap();
    (Tracer::new(Arc::clone(&queue), sampler), queue)
}

fn delivery(traceparent: Option<&str>, is_ours: bool) -> Delivery {
    Delivery {
        record: Record {
            id: "1".into(),
            body: Bytes::from_static(b"{}"),
            trace: traceparent.and_then(|parent| TraceHeaders::read(parent, Some(STATE))),
            origin: is_ours.then(|| Origin::now("run".into())),
            api: None,
            event: None,
        },
        redelivered: false,
        since: tokio::time::Instant::now(),
        held: None,
        span: None,
        acker: Acker::new(|_| {}),
    }
}

#[test]
fn the_sampler_is_asked_where_a_trace_enters_and_not_again() {
    for (sampler, context, is_ours, spans) in [
        ("always_on", None, false, 3),
        ("always_on", None, true, 0),
        ("always_on", Some(CONTEXT), true, 3),
        ("parentbased_always_off", None, false, 0),
        ("parentbased_always_off", Some(CONTEXT), false, 3),
        ("always_off", Some(CONTEXT), true, 3),
        ("always_off", Some(CONTEXT), false, 0),
    ] {
        let (tracer, queue) = tracer(sampler);
        let mut delivery = delivery(context, is_ours);
        tracer.lane(LaneId::Nats).received_one(&mut delivery);
        let traceparent = delivery.record.trace.clone();
        let traceparent = traceparent.as_ref().map(TraceHeaders::parent);
        delivery.ack();
        let told = queue.take(true);
        assert_eq!(told.len(), spans, "{sampler} {context:?} {is_ours}");
        let Some(receive) = told.first() else {
            assert_ne!(traceparent, Some(CONTEXT));
            continue;
        };
        let parent = headers(context);
        let parent = parent.as_ref().and_then(SpanContext::of);
        assert_eq!(
            receive.parent.map(|parent| parent.span),
            parent.map(|parent| parent.span)
        );
        // At its entrance, the trace goes on from the span of the message.
        let next = if is_ours {
            parent
        } else {
            Some(receive.context)
        };
        let next = next.map(|next| next.span);
        let process = told[1..].iter().find(|span| {
            matches!(
                span.work,
                Work::Message {
                    operation: Operation::Process,
                    ..
                }
            )
        });
        assert_eq!(process.unwrap().parent.map(|parent| parent.span), next);
    }
}

#[test]
fn a_record_that_was_taken_before_is_not_created_again() {
    let (tracer, queue) = tracer("always_on");
    let mut trace = tracer.request(|| None, || ("http", "/", "/"));
    trace.record(&"1".into(), None);
    trace.created(&[Receipt::Spool], true);
    trace.answered(202);
    assert_eq!(queue.take(true).len(), 1);
}

#[test]
fn a_request_whose_client_goes_away_is_told_as_that() {
    let (tracer, queue) = tracer("always_on");
    let trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
    drop(trace);
    let told = queue.take(true);
    assert_eq!(told[0].error.as_deref(), Some("client_closed"));
}

#[test]
fn a_delivery_that_is_dropped_is_not_settled() {
    let (tracer, queue) = tracer("always_on");
    let mut delivery = delivery(Some(CONTEXT), true);
    tracer.lane(LaneId::Nats).received_one(&mut delivery);
    drop(delivery);
    let told = queue.take(true);
    assert_eq!(told.len(), 2);
    assert_eq!(told[1].error.as_deref(), Some("not_settled"));
}

#[test]
fn the_state_of_a_trace_goes_along_and_not_into_another_trace() {
    let (tracer, queue) = tracer("parentbased_always_on");
    let client = headers(Some(CONTEXT));
    let mut trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
    let first = trace.record(&"1".into(), client.as_ref());
    trace.answered(202);
    assert_eq!(first.as_ref().and_then(TraceHeaders::state), Some(STATE));
    assert_ne!(first.as_ref().map(TraceHeaders::parent), Some(CONTEXT));
    let mut delivery = delivery(Some(CONTEXT), true);
    tracer.lane(LaneId::Nats).received_one(&mut delivery);
    let process = delivery.span.as_ref().expect("a span");
    let url = Arc::from("http://api/");
    let alone = OpenSpan::post(&[process], 1, &url).expect("a span");
    let sent = alone.headers().expect("headers");
    assert_eq!(sent.state(), Some(STATE));
    let several = OpenSpan::post(&[process], 2, &url).expect("a span");
    let sent = several.headers().expect("headers");
    assert_eq!(sent.state(), None);
    drop((alone, several));
    delivery.ack();
    for span in queue.take(true) {
        let state = span.state.as_ref().and_then(TraceHeaders::state);
        let expected = span.links.is_empty().then_some(STATE);
        assert_eq!(state, expected, "{span:?}");
    }
    let none = [
        ("always_off", Some(STATE)),
        ("parentbased_always_off", Some(STATE)),
    ];
    for (sampler, expected) in none {
        let (tracer, _) = self::tracer(sampler);
        let mut trace = tracer.request(|| headers(Some(CONTEXT)), || ("http", "/", "/"));
        let record = trace.record(&"1".into(), client.as_ref());
        assert_eq!(record.as_ref().and_then(TraceHeaders::state), expected);
    }
}

/// The operation and error of each span, with its times.
fn told(queue: &SpanQueue) -> Vec<(Operation, Option<String>, Instant, Instant)> {
    let spans = queue.take(true).into_iter();
    let operations = spans.map(|span| {
        let Work::Message { operation, .. } = span.work else {
            panic!("{span:?}");
        };
        let error = span.error.map(Cow::into_owned);
        (operation, error, span.began, span.ended)
    });
    operations.collect()
}

#[test]
fn a_process_ends_when_its_message_moves_to_disk_whatever_comes_after() {
    for verdict in [Some(Verdict::Ack), Some(Verdict::Reject), None] {
        let (tracer, queue) = tracer("always_on");
        let mut delivery = delivery(Some(CONTEXT), true);
        tracer.lane(LaneId::Nats).received_one(&mut delivery);
        drop(queue.take(true));
        let mark = delivery.span.as_mut().expect("a span").move_mark();
        let before = Instant::now();
        mark.set();
        let after = Instant::now();
        // The POST goes on.
        std::thread::sleep(Duration::from_millis(2));
        match verdict {
            Some(Verdict::Ack) => delivery.ack(),
            Some(_) => delivery.reject(),
            None => drop(delivery),
        }
        let told = told(&queue);
        let operations: Vec<_> = told.iter().map(|(operation, ..)| *operation).collect();
        assert_eq!(operations, [Operation::Ack, Operation::Process]);
        for (operation, error, _, ended) in told {
            assert_eq!(error, None, "{operation:?}");
            assert!((before..=after).contains(&ended), "{operation:?}");
        }
    }
}

#[test]
fn a_message_that_moves_while_it_is_settled_is_settled_once() {
    const TURNS: u32 = 5_000;
    let (tracer, queue) = tracer("always_on");
    let together = Barrier::new(2);
    let (marks, to_set) = mpsc::channel::<MoveMark>();
    thread::scope(|threads| {
        threads.spawn(|| {
            for mark in to_set {
                together.wait();
                mark.set();
            }
        });
        for turn in 0..TURNS {
            let mut delivery = delivery(Some(CONTEXT), true);
            tracer.lane(LaneId::Nats).received_one(&mut delivery);
            drop(queue.take(true));
            let mark = delivery.span.as_mut().expect("a span").move_mark();
            marks.send(mark).expect("the thread waits");
            together.wait();
            // Sooner or later than the other.
            (0..turn % 256).for_each(|_| hint::spin_loop());
            delivery.ack();
            let told = told(&queue);
            let is_ack = |operation| operation == Operation::Ack;
            let acks = told.iter().filter(|(operation, ..)| is_ack(*operation));
            assert_eq!((told.len(), acks.count()), (2, 1), "{turn}: {told:?}");
        }
        drop(marks);
    });
}

#[test]
fn a_record_on_disk_is_processed_and_has_no_message_to_settle() {
    for (verdict, expected) in [
        (Verdict::Ack, None),
        (Verdict::Reject, Some("dead_letter")),
        (Verdict::RetryAfter(Duration::ZERO), Some("retry_later")),
        (Verdict::Unsettled, Some("not_settled")),
    ] {
        let (tracer, queue) = tracer("always_on");
        let record = delivery(Some(CONTEXT), true).record;
        let span = tracer.lane(LaneId::Nats).process(&record).expect("a span");
        span.ended(verdict);
        let told = told(&queue);
        let [(Operation::Process, error, ..)] = &told[..] else {
            panic!("{told:?}");
        };
        assert_eq!(error.as_deref(), expected);
    }
}
