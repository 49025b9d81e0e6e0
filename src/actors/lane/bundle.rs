//! Messages of records, and records of messages. By default each message is one record. A bundle
//! carries several, where a system charges by the message: `docs/delivery.md` describes its format.
//!
//! Each record of a bundle is a delivery of its own, and the message is settled once all of them
//! are. A message that is nacked because of some of its records comes again with all of them.
//! This process remembers which are settled, and those do not come out again; another process
//! delivers them once more, under the ids that they have.

use std::{
    collections::VecDeque,
    mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    vec,
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use prost::Message as _;
use ring::digest::{Context, SHA256};

use crate::{
    cloud_events::may_be_event,
    delivery::{Acker, Delivery, Verdict},
    proto,
    recent::{FingerprintMap, Hasher128},
    record::{self, Origin, Record, TraceHeaders, is_visible_ascii},
    trace::LaneTracer,
    transport::{Headers, Incoming, Message},
};

/// The most bytes of a bundle, so that the messages fetched ahead stay small.
const BYTES_MAX: usize = 64 << 10;
/// Bytes that a record adds to a bundle beside its texts, its origin included.
const OVERHEAD: usize = 128;
/// The most records of a bundle of another publisher.
const FOREIGN_MAX: usize = 1024;
/// Bundles whose settled records are remembered, unless more are out at a time.
const BUNDLES_MAX: usize = 4096;

/// How many records share a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleSize {
    records: usize,
    bytes: usize,
}

impl BundleSize {
    /// At most `records`, where the system takes messages of `largest_message` bytes. Half of that
    /// is left for headers, which count as well.
    pub fn new(records: usize, largest_message: usize) -> Self {
        Self {
            records,
            bytes: BYTES_MAX.min(largest_message / 2),
        }
    }
}

/// Records, packed into messages in their order.
pub struct Packed {
    pub messages: Vec<Message>,
    /// The index of each message's first record; empty where each message is one record.
    firsts: Vec<usize>,
    records: usize,
}

impl Packed {
    /// Packs `records` into as few messages as `size` allows.
    pub fn new(records: &[impl AsRef<Record>], size: BundleSize) -> Self {
        let is_single = size.records <= 1 || records.len() == 1;
        let mut packed = Self {
            messages: Vec::with_capacity(if is_single { records.len() } else { 1 }),
            firsts: Vec::new(),
            records: records.len(),
        };
        if is_single {
            let messages = records.iter().map(|record| record.as_ref().into());
            packed.messages.extend(messages);
            return packed;
        }
        for group in groups(records, size) {
            packed.firsts.push(group.start);
            packed.messages.push(match &records[group] {
                [record] => record.as_ref().into(),
                records => bundle(records),
            });
        }
        packed
    }

    /// The indices of the records in message `index`.
    pub fn records(&self, index: usize) -> Range<usize> {
        match self.firsts.get(index) {
            Some(&first) => first..*self.firsts.get(index + 1).unwrap_or(&self.records),
            None => index..index + 1,
        }
    }
}

/// Splits `records`, in their order, into those that share a message.
fn groups(records: &[impl AsRef<Record>], max: BundleSize) -> impl Iterator<Item = Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fit = records[from..]
            .iter()
            .take(max.records)
            .take_while(|record| {
                bytes += size(record.as_ref());
                bytes <= max.bytes && record.as_ref().origin.is_some()
            });
        // A record that is too large goes alone, and so does one without an origin: it could not be
        // distinguished from another record with its id.
        let until = (from + fit.count().max(1)).min(records.len());
        let group = mem::replace(&mut from, until)..until;
        (!group.is_empty()).then_some(group)
    })
}

/// Bytes that `record` adds to a bundle. They do not depend on the node that took it in, so that
/// the same records make the same bundles on each node.
fn size(record: &Record) -> usize {
    record.id.len()
        + record.body.len()
        + record.trace.as_ref().map_or(0, TraceHeaders::size)
        + record.api.as_ref().map_or(0, |name| name.len())
        + record.event.as_ref().map_or(0, |text| text.len())
        + OVERHEAD
}

/// A message of `records`. Its id says which records it has, whatever node packed them, so that a
/// system that drops duplicates by id recognises it. The id is a cryptographic hash: clients cannot
/// choose ids that make one bundle pass for another.
fn bundle(records: &[impl AsRef<Record>]) -> Message {
    let mut ids = Context::new(&SHA256);
    for record in records {
        // No id has a space.
        ids.update(record.as_ref().id.as_bytes());
        ids.update(b" ");
    }
    let id = format!("{:x}", Bytes::copy_from_slice(ids.finish().as_ref()));
    let packed = records
        .iter()
        .map(|record| proto::Record::from(&Message::from(record.as_ref())));
    let body = proto::Bundle {
        records: packed.collect(),
    };
    Message {
        headers: Headers {
            id: id.into(),
            origin: None,
            trace: None,
            api: None,
            event: None,
            bundle: Some(records.len()),
        },
        body: body.encode_to_vec().into(),
    }
}

/// The records of `message`, or `None` if it is no bundle.
fn unpack(message: &Message) -> Option<Vec<Record>> {
    let count = message.headers.bundle?;
    if !(1..=FOREIGN_MAX).contains(&count) {
        return None;
    }
    let bundle = proto::Bundle::decode(message.body.clone()).ok()?;
    if bundle.records.len() != count {
        return None;
    }
    bundle.records.into_iter().map(unpack_record).collect()
}

/// `None` if the record could not be POSTed under its id.
fn unpack_record(packed: proto::Record) -> Option<Record> {
    is_visible_ascii(&packed.id).then(|| Record {
        id: packed.id.into(),
        body: packed.body,
        trace: TraceHeaders::read(&packed.traceparent, Some(&packed.tracestate)),
        origin: Origin::parse(&packed.origin),
        api: Some(packed.api)
            .filter(|name| is_visible_ascii(name))
            .map(Into::into),
        event: Some(packed.event)
            .filter(|text| may_be_event(text))
            .map(Into::into),
    })
}

/// The settled records of recent bundles. Clones are one; it outlives connections.
#[derive(Clone, Default)]
pub struct SettledRecords(Arc<(Hasher128, Mutex<Bundles>)>);

type Bundles = FingerprintMap<SettledFlags>;
/// Whether each record of a bundle is settled.
type SettledFlags = Arc<[AtomicBool]>;

impl SettledRecords {
    /// The flags of the bundle in `message`. Its records identify it: each by its id, and by the
    /// time at which a node took it in, since the id may have been used before. A bundle of another
    /// publisher is identified by its id and its bytes.
    fn of(&self, message: &Message, records: &[Record]) -> SettledFlags {
        let (hasher, _) = &*self.0;
        let of_each = records.iter().map(|record| {
            record
                .origin
                .as_ref()
                .map(|origin| (&*record.id, &*origin.run, origin.at_us))
        });
        let bundle = match of_each.collect::<Option<Vec<_>>>() {
            Some(of_each) => hasher.fingerprint(of_each),
            None => hasher.fingerprint((&message.headers.id, &message.body)),
        };
        let mut bundles = self.bundles();
        if bundles.len() >= BUNDLES_MAX {
            let is_out = |settled: &SettledFlags| Arc::strong_count(settled) > 1;
            bundles.retain(|_, settled| is_out(settled) || !are_all(settled));
            if bundles.len() >= BUNDLES_MAX {
                // The bundles forgotten here come out whole if they come again.
                bundles.retain(|_, settled| is_out(settled));
            }
        }
        let none = || records.iter().map(|_| AtomicBool::new(false)).collect();
        Arc::clone(bundles.entry(bundle).or_insert_with(none))
    }

    fn bundles(&self) -> MutexGuard<'_, Bundles> {
        self.0.1.lock()
    }
}

fn are_all(settled: &SettledFlags) -> bool {
    settled.iter().all(|is_settled| is_settled.load(Relaxed))
}

/// Makes deliveries of messages, in their order. It ends where no message is left, and goes on once
/// one is added.
pub struct Unbundler {
    settled: SettledRecords,
    tracer: LaneTracer,
    messages: VecDeque<Incoming>,
    /// The records of an open bundle that have not come out yet.
    open: vec::IntoIter<Delivery>,
}

impl Unbundler {
    pub fn new(settled: SettledRecords) -> Self {
        Self {
            settled,
            tracer: LaneTracer::default(),
            messages: VecDeque::new(),
            open: Vec::new().into_iter(),
        }
    }

    /// Tells of each message and record that comes out.
    #[must_use]
    pub fn with_tracer(mut self, tracer: LaneTracer) -> Self {
        self.tracer = tracer;
        self
    }

    /// Adds messages, and leaves `messages` empty.
    pub fn add(&mut self, messages: &mut Vec<Incoming>) {
        self.messages.extend(messages.drain(..));
    }

    /// Nacks the messages of which no record has come out.
    pub fn nack_unopened(&mut self) {
        self.messages.clear();
    }

    /// Nacks everything that has not come out.
    pub fn nack_all(&mut self) {
        self.messages.clear();
        self.open = Vec::new().into_iter();
    }

    /// A delivery for each record of the bundle in `incoming` that is not settled. If all are,
    /// their ack was lost, and the message is acked.
    fn open(&self, incoming: Incoming, records: Vec<Record>) -> Vec<Delivery> {
        let settled = self.settled.of(&incoming.message, &records);
        // A record that another connection settles from here on comes out all the same.
        let unsettled: Vec<_> = records
            .into_iter()
            .enumerate()
            .filter(|(index, _)| !settled[*index].load(Relaxed))
            .collect();
        let Incoming {
            redelivered,
            since,
            acker,
            ..
        } = incoming;
        if unsettled.is_empty() {
            acker.settle(Verdict::Ack);
            return Vec::new();
        }
        let open = Arc::new(Mutex::new(Some(OpenBundle {
            acker,
            left: unsettled.len(),
            verdict: Verdict::Ack,
            settled,
        })));
        let deliveries = unsettled.into_iter().map(|(index, record)| {
            let open = Arc::clone(&open);
            Delivery {
                record,
                redelivered,
                // The system holds the message, for all of its records.
                since,
                held: None,
                span: None,
                acker: Acker::new(move |verdict| settle(&open, index, verdict)),
            }
        });
        deliveries.collect()
    }
}

impl Iterator for Unbundler {
    type Item = Delivery;

    fn next(&mut self) -> Option<Delivery> {
        loop {
            if let Some(mut delivery) = self.open.next() {
                delivery.span = self.tracer.process(&delivery.record);
                return Some(delivery);
            }
            let message = self.messages.pop_front()?;
            match unpack(&message.message) {
                Some(records) => {
                    self.tracer.received(&records, message.since);
                    self.open = self.open(message, records).into_iter();
                }
                None => {
                    let mut delivery = single(message);
                    self.tracer.received_one(&mut delivery);
                    return Some(delivery);
                }
            }
        }
    }
}

/// The delivery of a message that is one record. A body of another publisher is read as ingest
/// reads one: without surrounding white space and without `path`. A body that is no JSON object
/// stays as it is and becomes a dead letter.
fn single(incoming: Incoming) -> Delivery {
    let is_ours = incoming.message.headers.origin.is_some();
    let mut delivery = Delivery::from(incoming);
    if !is_ours && let Ok(body) = record::parse_any(&delivery.record.body) {
        delivery.record.body = body;
    }
    delivery
}

/// A message some of whose records are out.
struct OpenBundle {
    acker: Acker,
    left: usize,
    /// The verdict on the message so far.
    verdict: Verdict,
    settled: SettledFlags,
}

fn settle(open: &Mutex<Option<OpenBundle>>, index: usize, verdict: Verdict) {
    let mut slot = open.lock();
    let Some(bundle) = &mut *slot else { return };
    if matches!(verdict, Verdict::Ack | Verdict::Reject) {
        bundle.settled[index].store(true, Relaxed);
    }
    bundle.verdict = combine(bundle.verdict, verdict);
    bundle.left -= 1;
    if bundle.left == 0
        && let Some(bundle) = slot.take()
    {
        drop(slot);
        // Another connection that had the same message may have settled the records that came back
        // here.
        let verdict = if are_all(&bundle.settled) {
            Verdict::Ack
        } else {
            bundle.verdict
        };
        bundle.acker.settle(verdict);
    }
}

/// The verdict on a message with records of verdicts `one` and `other`: the longest delay wins,
/// then *not delivered*. A record that became a dead letter counts as delivered.
fn combine(one: Verdict, other: Verdict) -> Verdict {
    match (one, other) {
        (Verdict::RetryAfter(one), Verdict::RetryAfter(other)) => {
            Verdict::RetryAfter(one.max(other))
        }
        (retry @ Verdict::RetryAfter(_), _) | (_, retry @ Verdict::RetryAfter(_)) => retry,
        (Verdict::Unsettled, _) | (_, Verdict::Unsettled) => Verdict::Unsettled,
        (Verdict::Ack | Verdict::Reject, Verdict::Ack | Verdict::Reject) => Verdict::Ack,
    }
}

#[cfg(test)]
mod tests {
    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const EVENT: &str = "id=1&source=/&specversion=1.0&type=t";

    use std::time::Duration;

    use super::*;

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
            let message = incoming(Message::from(&sent), &Verdicts::default());
            let mut opened = open(&SettledRecords::default(), message);
            opened.pop().unwrap().record.body
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
}
