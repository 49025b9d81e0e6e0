//! Deliveries of messages: a message is settled once all of its records are.

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    vec,
};

use tracing_mutex::parkinglot::{Mutex, MutexGuard};

use super::{read_body, unpack};
use crate::{
    delivery::{Acker, Delivery, Verdict},
    recent::{FingerprintMap, Hasher128},
    record::Record,
    trace::LaneTracer,
    transport::{Incoming, Message},
};

/// Bundles whose settled records are remembered, unless more are out at a time.
pub(super) const BUNDLES_MAX: usize = 4096;

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

    pub(super) fn bundles(&self) -> MutexGuard<'_, Bundles> {
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

/// The delivery of a message that is one record.
fn single(incoming: Incoming) -> Delivery {
    let mut delivery = Delivery::from(incoming);
    let record = &mut delivery.record;
    record.body = read_body(mem::take(&mut record.body), record.origin.as_ref());
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
