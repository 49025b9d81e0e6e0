//! Messages of brokers, one record or a bundle of them.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use serde_json::Value;
use waypost::{
    actors::lane::bundle::{BundleSize, Packed, SettledRecords, Unbundler},
    delivery::Verdict,
    record::{Record, Tag, is_visible_ascii},
    transport::{Headers, Incoming, Message},
};

/// The number of headers, each as its place in [`NAMES`], its length and its value; then the body.
/// The records that come out are bundled again.
pub fn message(bytes: &[u8]) {
    let Some((&count, mut rest)) = bytes.split_first() else {
        return;
    };
    let mut headers = Vec::new();
    for _ in 0..usize::from(count) % NAMES.len() {
        let [at, length, others @ ..] = rest else {
            return;
        };
        let Some((value, others)) = others.split_at_checked((*length).into()) else {
            return;
        };
        let value = String::from_utf8_lossy(value).into_owned();
        headers.push((usize::from(*at) % NAMES.len(), value));
        rest = others;
    }
    let mut records = check_foreign(rest.to_vec(), &headers);
    // A message has each id once.
    let mut ids = HashSet::new();
    records.retain(|record| ids.insert(Arc::clone(&record.id)));
    check_bundles(&records, 1 + records.len() / 2, 300);
}

/// Each record comes out of its messages as it went in, and each message is settled once.
pub fn check_bundles(records: &[Record], most: usize, largest: usize) {
    let packed = Packed::new(records, BundleSize::new(most, largest));
    let count = packed.messages.len();
    let acked = Arc::new(AtomicUsize::new(0));
    let mut incoming: Vec<_> = packed
        .messages
        .into_iter()
        .map(|message| {
            // As every system carries them.
            let pairs: Vec<_> = message
                .headers
                .pairs()
                .map(|(name, value)| (name, value.into_owned()))
                .collect();
            let header = |name: &str| {
                let (_, value) = pairs.iter().find(|(known, _)| *known == name)?;
                Some(&**value)
            };
            let headers = Headers::read(header, || "other".into());
            assert_eq!(headers, message.headers);
            let acked = Arc::clone(&acked);
            let message = Message {
                headers,
                body: message.body,
            };
            Incoming::new(message, false, move |verdict| {
                assert_eq!(verdict, Verdict::Ack);
                acked.fetch_add(1, Relaxed);
            })
        })
        .collect();
    let mut unbundler = Unbundler::new(SettledRecords::default());
    unbundler.add(&mut incoming);
    let deliveries: Vec<_> = unbundler.collect();
    assert_eq!(deliveries.len(), records.len());
    for (delivery, record) in deliveries.into_iter().zip(records) {
        assert_eq!(delivery.record, *record);
        delivery.acker.settle(Verdict::Ack);
    }
    assert_eq!(acked.load(Relaxed), count);
}

/// The headers of a message.
pub const NAMES: [&str; 7] = [
    "Waypost-Id",
    "Waypost-Origin",
    "Waypost-Api",
    "Waypost-Event",
    "Waypost-Bundle",
    "traceparent",
    "tracestate",
];

/// A message of any publisher comes out as records that can be POSTed. They are returned.
pub fn check_foreign(body: Vec<u8>, headers: &[(usize, String)]) -> Vec<Record> {
    let header = |name: &str| {
        let found = headers.iter().find(|(at, _)| NAMES[*at] == name)?;
        Some(&*found.1)
    };
    let headers = Headers::read(header, || "other".into());
    let message = Message {
        headers,
        body: body.into(),
    };
    let mut unbundler = Unbundler::new(SettledRecords::default());
    unbundler.add(&mut vec![Incoming::new(message, false, |_| {})]);
    let deliveries: Vec<_> = unbundler.collect();
    assert!(!deliveries.is_empty(), "a message is lost");
    for delivery in &deliveries {
        let Record {
            id,
            trace,
            origin,
            api,
            event,
            body,
        } = &delivery.record;
        if let Some(trace) = trace {
            assert!(is_visible_ascii(trace.parent()), "{trace:?}");
            let state = trace.state().unwrap_or_default();
            assert!(
                state.bytes().all(|byte| matches!(byte, b' '..=b'~')),
                "{trace:?}"
            );
        }
        for text in [Some(id), api.as_ref(), event.as_ref()]
            .into_iter()
            .flatten()
        {
            assert!(is_visible_ascii(text), "{text:?}");
        }
        let Ok(Value::Object(mut expected)) = serde_json::from_slice(body) else {
            continue;
        };
        let is_read = body.trim_ascii() == body && !expected.contains_key("path");
        // Only a node sets an origin, and it has read the body.
        assert!(is_read || origin.is_some(), "{body:?}");
        if is_read {
            let tagged = Tag::new("T").splice(body);
            let tagged = tagged.expect("an object has a place for a tag");
            expected.insert("path".into(), "T".into());
            let read: Value = serde_json::from_slice(&tagged).expect("JSON");
            assert_eq!(read, Value::Object(expected));
        }
    }
    let deliveries = deliveries.into_iter();
    deliveries.map(|delivery| delivery.record).collect()
}
