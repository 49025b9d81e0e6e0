//! Messages of records, and records of messages. By default each message is one record. A bundle
//! carries several, where a system charges by the message: `docs/delivery.md` describes its format.
//!
//! Each record of a bundle is a delivery of its own, and the message is settled once all of them
//! are. A message that is nacked because of some of its records comes again with all of them.
//! This process remembers which are settled, and those do not come out again; another process
//! delivers them once more, under the ids that they have.

#[cfg(test)]
mod tests;
mod unbundler;

use std::{mem, ops::Range};

use bytes::Bytes;
use prost::Message as _;
use ring::digest::{Context, SHA256};

pub use self::unbundler::{SettledRecords, Unbundler};
use crate::{
    cloud_events::may_be_event,
    proto,
    record::{self, Origin, Record, TraceHeaders, is_visible_ascii},
    transport::{Headers, Message},
};

/// The most bytes of a bundle, so that the messages fetched ahead stay small.
const BYTES_MAX: usize = 64 << 10;
/// Bytes that a record adds to a bundle beside its texts, its origin included.
const OVERHEAD: usize = 128;
/// The most records of a bundle of another publisher.
const FOREIGN_MAX: usize = 1024;

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
    let origin = Origin::parse(&packed.origin);
    is_visible_ascii(&packed.id).then(|| Record {
        id: packed.id.into(),
        body: read_body(packed.body, origin.as_ref()),
        trace: TraceHeaders::read(&packed.traceparent, Some(&packed.tracestate)),
        origin,
        api: Some(packed.api)
            .filter(|name| is_visible_ascii(name))
            .map(Into::into),
        event: Some(packed.event)
            .filter(|text| may_be_event(text))
            .map(Into::into),
    })
}

/// The body of a record. One of another publisher, which has no origin, is read as ingest reads it:
/// without surrounding white space and without `path`. A body that is no JSON object stays as it is
/// and becomes a dead letter.
fn read_body(sent: Bytes, origin: Option<&Origin>) -> Bytes {
    match origin {
        Some(_) => sent,
        None => record::parse_any(&sent).unwrap_or(sent),
    }
}
