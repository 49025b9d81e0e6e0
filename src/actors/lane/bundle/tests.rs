const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const EVENT: &str = "id=1&source=/&specversion=1.0&type=t";

use std::{sync::Arc, time::Duration};

use tracing_mutex::parkinglot::Mutex;

use super::{unbundler::BUNDLES_MAX, *};
use crate::{
    delivery::{Delivery, Verdict},
    transport::Incoming,
};

fn record(at: usize, body: usize) -> Record {
    Record {
        id: format!("id/{at}").into(),
        body: vec![b'x'; body].into(),
        trace: TraceHeaders::read(TRACE, None).filter(|_| at.is_multiple_of(2)),
        origin: Some(Origin {
            run: "node/1".into(),
            at_us: 7,
        }),
        api: None,
        event: at.is_multiple_of(3).then(|| EVENT.into()),
    }
}

fn records(count: usize) -> Vec<Record> {
    (0..count).map(|at| record(at, 20)).collect()
}

fn size(records: usize, bytes: usize) -> BundleSize {
    BundleSize::new(records, bytes.saturating_mul(2))
}

/// The number of records that each message says it has.
fn counts(packed: &Packed) -> Vec<Option<usize>> {
    let messages = packed.messages.iter();
    messages.map(|message| message.headers.bundle).collect()
}

#[test]
fn records_share_a_message_as_far_as_they_fit_and_one_is_the_default() {
    let all = records(130);
    let single = Packed::new(&all, size(1, usize::MAX));
    assert_eq!(counts(&single), vec![None; 130]);
    assert_eq!(single.messages[129], Message::from(&all[129]));
    assert_eq!(single.records(129), 129..130);

    let packed = Packed::new(&all, size(128, usize::MAX));
    assert_eq!(counts(&packed), [Some(128), Some(2)]);
    assert_eq!((packed.records(0), packed.records(1)), (0..128, 128..130));
    assert_eq!(
        counts(&Packed::new(&all[..7], size(3, usize::MAX))),
        [Some(3), Some(3), None]
    );

    let [large, small] = [BYTES_MAX, 20];
    let mixed = [large, small, small, large, small].into_iter().enumerate();
    let mixed: Vec<_> = mixed.map(|(at, body)| record(at, body)).collect();
    let packed = Packed::new(&mixed, size(128, usize::MAX));
    assert_eq!(counts(&packed), [None, Some(2), None, None]);
    assert_eq!(packed.messages[0], Message::from(&mixed[0]));
    assert_eq!(packed.messages[3], Message::from(&mixed[4]));
    assert_eq!((packed.records(1), packed.records(3)), (1..3, 4..5));

    let mut bare = records(3);
    bare[1].origin = None;
    assert_eq!(
        counts(&Packed::new(&bare, size(128, usize::MAX))),
        [None; 3]
    );
    assert_eq!(
        counts(&Packed::new(&records(1), size(128, usize::MAX))),
        [None]
    );
    assert!(
        Packed::new(&records(0), size(128, usize::MAX))
            .messages
            .is_empty()
    );
    assert_eq!(counts(&Packed::new(&records(9), size(128, 0))), [None; 9]);
    let packed = Packed::new(&records(90), size(128, 1000));
    assert!(packed.messages.len() > 1);
    assert!(
        packed
            .messages
            .iter()
            .all(|message| message.body.len() <= 1000)
    );
}

#[test]
fn a_bundle_brings_what_it_took_and_has_the_id_of_its_records() {
    let sent = records(100);
    let packed = bundle(&sent);
    assert_eq!(unpack(&packed).as_deref(), Some(&*sent));
    assert!(packed.body.len() <= sent.iter().map(super::size).sum::<usize>());
    let id = |records: &[Record]| bundle(records).headers.id;
    let by_another = sent.iter().map(|record| Record {
        origin: None,
        ..record.clone()
    });
    let by_another: Vec<_> = by_another.collect();
    assert_eq!(id(&sent), id(&by_another), "whatever node took them in");
    assert_ne!(id(&sent), id(&sent[1..]));
    let named = |ids: &[&str]| {
        let records = ids.iter().map(|&id| Record {
            id: id.into(),
            ..record(0, 0)
        });
        id(&records.collect::<Vec<_>>())
    };
    assert_ne!(named(&["a", "bc"]), named(&["ab", "c"]));
}

/// The verdicts on messages.
type Verdicts = Arc<Mutex<Vec<Verdict>>>;

fn incoming(message: Message, verdicts: &Verdicts) -> Incoming {
    let verdicts = Arc::clone(verdicts);
    Incoming::new(message, false, move |verdict| verdicts.lock().push(verdict))
}

/// The deliveries, the last first.
fn open(settled: &SettledRecords, incoming: Incoming) -> Vec<Delivery> {
    let mut unbundler = Unbundler::new(settled.clone());
    unbundler.add(&mut vec![incoming]);
    let mut all: Vec<_> = unbundler.collect();
    all.reverse();
    all
}

fn ids(opened: &[Delivery]) -> Vec<&str> {
    opened
        .iter()
        .rev()
        .map(|delivery| &*delivery.record.id)
        .collect()
}

#[test]
fn a_message_that_is_no_bundle_comes_out_as_it_is() {
    let unfit = proto::Bundle {
        records: vec![proto::Record {
            id: "a\nb".into(),
            ..proto::Record::default()
        }],
    };
    for (body, count) in [
        (bundle(&records(3)).body, 2),
        (bundle(&records(FOREIGN_MAX + 1)).body, FOREIGN_MAX + 1),
        (Bytes::new(), 0),
        (Bytes::from_static(b"{}"), 1),
        (unfit.encode_to_vec().into(), 1),
    ] {
        let sent = Record {
            body,
            ..record(0, 0)
        };
        let mut message = Message::from(&sent);
        message.headers.bundle = Some(count);
        let opened = open(
            &SettledRecords::default(),
            incoming(message, &Verdicts::default()),
        );
        let opened: Vec<_> = opened.iter().map(|delivery| &delivery.record).collect();
        assert_eq!(opened, [&sent]);
    }
}

#[test]
fn the_body_of_another_publisher_is_read_as_ingest_reads_one() {
    let body = |body: &'static str, origin: Option<Origin>| {
        let sent = Record {
            body: body.into(),
            origin,
            ..record(0, 0)
        };
        let bundled = proto::Bundle {
            records: vec![proto::Record::from(&Message::from(&sent))],
        };
        let mut bundle = Message::from(&sent);
        bundle.headers.bundle = Some(1);
        bundle.body = bundled.encode_to_vec().into();
        let [alone, bundled] = [Message::from(&sent), bundle].map(|message| {
            let message = incoming(message, &Verdicts::default());
            let mut opened = open(&SettledRecords::default(), message);
            opened.pop().unwrap().record.body
        });
        assert_eq!(alone, bundled);
        alone
    };
    assert_eq!(body(" {\"a\": 1, \"path\":\"x\"}\n", None), "{\"a\": 1}");
    assert_eq!(body("[1]\n", None), "[1]\n");
    assert_eq!(
        body(" {}", record(0, 0).origin),
        " {}",
        "ours is not read again"
    );
}

#[test]
fn a_message_is_settled_once_by_all_of_its_records_and_only_what_was_not_settled_comes_again() {
    let (known, verdicts, sent) = (SettledRecords::default(), Verdicts::default(), records(4));
    let open = |known: &SettledRecords| open(known, incoming(bundle(&sent), &verdicts));
    let (short, long) = (Duration::from_secs(1), Duration::from_secs(2));

    let mut opened = open(&known);
    opened.pop().unwrap().retry_after(short);
    opened.pop().unwrap().ack();
    opened.pop().unwrap().reject();
    assert!(verdicts.lock().is_empty(), "one is not settled");
    drop(opened);
    assert_eq!(
        mem::take(&mut *verdicts.lock()),
        [Verdict::RetryAfter(short)]
    );

    let mut opened = open(&known);
    assert_eq!(ids(&opened), ["id/0", "id/3"]);
    opened.pop().unwrap().ack();
    drop(opened);
    let mut opened = open(&known);
    assert_eq!(ids(&opened), ["id/3"]);
    opened.pop().unwrap().reject();
    assert_eq!(
        mem::take(&mut *verdicts.lock()),
        [Verdict::Unsettled, Verdict::Ack]
    );
    assert!(open(&known).is_empty(), "its ack was lost");
    assert_eq!(mem::take(&mut *verdicts.lock()), [Verdict::Ack]);

    let mut opened = open(&SettledRecords::default());
    assert_eq!(opened.len(), 4);
    opened
        .drain(..)
        .zip([long, short, short, long])
        .for_each(|(it, delay)| it.retry_after(delay));
    assert_eq!(
        mem::take(&mut *verdicts.lock()),
        [Verdict::RetryAfter(long)]
    );
}

#[test]
fn what_one_connection_has_settled_the_next_one_knows_at_once() {
    let (known, verdicts, sent) = (SettledRecords::default(), Verdicts::default(), records(4));
    let open = |sent: &[Record]| open(&known, incoming(bundle(sent), &verdicts));
    let mut first = open(&sent);
    first.pop().unwrap().reject();
    // It was lost while three were out, which are settled late.
    let mut second = open(&sent);
    assert_eq!(ids(&second), ["id/1", "id/2", "id/3"]);
    first.pop().unwrap().ack();
    assert_eq!(ids(&open(&sent)), ["id/2", "id/3"]);
    assert_eq!(mem::take(&mut *verdicts.lock()), [Verdict::Unsettled]);
    second.pop().unwrap().retry_after(Duration::ZERO);
    second.into_iter().for_each(Delivery::ack);
    assert_eq!(
        mem::take(&mut *verdicts.lock()),
        [Verdict::Ack],
        "all are settled by now"
    );
    first.into_iter().for_each(Delivery::ack);

    // Under ids that were used before.
    let at = |at_us| {
        Some(Origin {
            run: "node/1".into(),
            at_us,
        })
    };
    let later: Vec<_> = sent
        .iter()
        .map(|record| Record {
            origin: at(9),
            ..record.clone()
        })
        .collect();
    assert_eq!(open(&later).len(), 4);
}

#[test]
fn a_bundle_of_somebody_else_is_known_by_its_id_and_its_bytes() {
    let (known, verdicts) = (SettledRecords::default(), Verdicts::default());
    let theirs: Vec<_> = records(4)
        .into_iter()
        .map(|record| Record {
            origin: None,
            ..record
        })
        .collect();
    let packed = bundle(&theirs);
    let open = |message: &Message| open(&known, incoming(message.clone(), &verdicts));
    open(&packed).pop().unwrap().ack();
    assert_eq!(ids(&open(&packed)), ["id/1", "id/2", "id/3"]);
    let mut renamed = packed.clone();
    renamed.headers.id = "other".into();
    assert_eq!(open(&renamed).len(), 4);
    let other = theirs.into_iter().map(|record| Record {
        body: Bytes::from_static(b"{}"),
        ..record
    });
    let body = bundle(&other.collect::<Vec<_>>()).body;
    assert_eq!(open(&Message { body, ..packed }).len(), 4);
}

#[test]
fn what_is_known_of_bundles_is_bounded_and_those_that_are_out_are_kept() {
    let (known, verdicts) = (SettledRecords::default(), Verdicts::default());
    let numbered = |number: usize| {
        let origin = Some(Origin {
            run: "node/1".into(),
            at_us: number as u64,
        });
        [0, 1].map(|at| Record {
            origin: origin.clone(),
            ..record(at, 0)
        })
    };
    let open = |number| open(&known, incoming(bundle(&numbered(number)), &verdicts));
    let mut out = open(0);
    out.pop().unwrap().ack();
    open(1).pop().unwrap().ack();
    for number in 2..2 * BUNDLES_MAX {
        open(number).into_iter().for_each(Delivery::ack);
    }
    assert!(known.bundles().len() <= BUNDLES_MAX);
    assert_eq!(
        (ids(&open(0)), ids(&open(1))),
        (vec!["id/1"], vec!["id/1"]),
        "those that are settled go first"
    );
    for number in 0..2 * BUNDLES_MAX {
        open(2 * BUNDLES_MAX + number).pop().unwrap().ack();
    }
    assert!(known.bundles().len() <= BUNDLES_MAX);
    assert_eq!(
        (ids(&open(0)), ids(&open(1))),
        (vec!["id/1"], vec!["id/0", "id/1"]),
        "what is out is kept"
    );
}
