//! Messages of records, and records of messages. By default each message is one record. A bundle
//! carries several, where a system charges by the message: `docs/delivery.md` describes its format.
//!
//! Each record of a bundle is a delivery of its own, and the message is settled once all of them
//! are. A message that is nacked because of some of its records comes again with all of them.
//! This process remembers which are settled, and those do not come out again; another process
//! delivers them once more, under the ids that they have.

#[cfg(test)]
mod tests;

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
