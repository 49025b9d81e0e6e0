//! Bundles: records that were taken in together travel as one message, where a system charges by the message. Each is a delivery of
//! its own, and the message is settled once all of them are.
//!
//! A message that is given back because of some of its records comes again with all of them. Those that were settled before
//! do not come out of the same connection again; what the API has taken by another is known by the ledger of this node.

use std::{
    collections::HashMap,
    mem,
    ops::Range,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use prost::Message as _;
use smallvec::{SmallVec, smallvec};

use super::TransportError;
use crate::{
    delivery::{Delivery, Verdict},
    fingerprint::Fingerprints,
    proto,
    record::{Origin, Record, is_visible_ascii},
};

/// The most records of a bundle: they come again together.
const RECORDS_MAX: usize = 128;
/// The most bytes of a bundle, so that what is fetched ahead stays small.
const BYTES_MAX: usize = 64 << 10;
/// What a record costs beside its texts, at most.
const OVERHEAD: usize = 64;
/// Bundles whose settled records are remembered.
const PARTLY_MAX: usize = 1024;

/// What a message has for its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A record.
    Single,
    /// So many records; the message itself has no more than an id.
    Bundle(usize),
}

impl Kind {
    /// By the value of the header [`header::BUNDLE`](super::header::BUNDLE), if there is one.
    pub fn of(count: Option<&str>) -> Self {
        count.and_then(|count| count.parse().ok()).map_or(Self::Single, Self::Bundle)
    }
}

/// The deliveries of one message.
pub type Opened = SmallVec<[Delivery; 1]>;
/// Those of them that nobody has taken yet.
pub type Rest = smallvec::IntoIter<[Delivery; 1]>;

/// Nobody has taken nothing.
pub fn no_rest() -> Rest {
    Opened::new().into_iter()
}

/// What [`Transport::publish_all`](super::Transport::publish_all) promises, with bundles for those of `records` that fit together.
/// `publish` sends one message of at most `bytes_max`, unless it is a record of its own.
pub async fn publish_all(
    records: &[impl AsRef<Record>],
    bytes_max: usize,
    mut settled: impl FnMut(usize, Result<(), TransportError>),
    publish: impl AsyncFn(&Record, Kind) -> Result<(), TransportError>,
) {
    if let [record] = records {
        return settled(0, publish(record.as_ref(), Kind::Single).await);
    }
    let under_way = runs(records, bytes_max.min(BYTES_MAX)).map(async |run| {
        let outcome = match &records[run.clone()] {
            [record] => publish(record.as_ref(), Kind::Single).await,
            records => publish(&pack(records), Kind::Bundle(records.len())).await,
        };
        (run, outcome)
    });
    let mut under_way: FuturesUnordered<_> = under_way.collect();
    while let Some((run, outcome)) = under_way.next().await {
        run.for_each(|at| settled(at, outcome.clone()));
    }
}

/// Splits `records`, in their order, into those that travel together.
fn runs(records: &[impl AsRef<Record>], bytes_max: usize) -> impl Iterator<Item = Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fit = records[from..].iter().take(RECORDS_MAX).take_while(|record| {
            bytes += size(record.as_ref());
            bytes <= bytes_max
        });
        // One that is too large goes alone.
        let until = (from + fit.count().max(1)).min(records.len());
        let run = mem::replace(&mut from, until)..until;
        (!run.is_empty()).then_some(run)
    })
}

/// What `record` adds to a bundle, at most.
fn size(record: &Record) -> usize {
    let Record { id, body, traceparent, origin } = record;
    let texts = traceparent.as_ref().map_or(0, |text| text.len()) + origin.as_ref().map_or(0, |it| it.run.len());
    id.len() + body.len() + texts + OVERHEAD
}

/// The same records make the same message, as far as its id goes: what is published twice is known to be the same. No client
/// can choose ids that make another message pass for it.
fn pack(records: &[impl AsRef<Record>]) -> Record {
    static FINGERPRINTS: LazyLock<Fingerprints> = LazyLock::new(Fingerprints::default);
    let bundle = proto::Bundle { records: records.iter().map(|record| record.as_ref().into()).collect() };
    let told_by =
        |record: &Record| (Arc::clone(&record.id), record.origin.as_ref().map(|it| (Arc::clone(&it.run), it.at_us)));
    let id = FINGERPRINTS.of(records.iter().map(|record| told_by(record.as_ref())).collect::<Vec<_>>());
    Record { id: id.to_string().into(), body: bundle.encode_to_vec().into(), traceparent: None, origin: None }
}

/// Nothing if `body` is something else.
fn unpack(body: Bytes) -> Option<Vec<Record>> {
    let bundle = proto::Bundle::decode(body).ok()?;
    bundle.records.into_iter().map(record).collect()
}

/// Nothing if it could not be POSTed under its id.
fn record(sent: proto::Record) -> Option<Record> {
    let proto::Record { id, body, traceparent, origin } = sent;
    is_visible_ascii(&id).then(|| Record {
        id: id.into(),
        body,
        traceparent: Some(traceparent).filter(|text| is_visible_ascii(text)).map(Into::into),
        origin: Origin::parse(&origin),
    })
}

/// Which records of bundles that were given back are settled. Clones are one.
#[derive(Clone, Default)]
pub struct Partly(Arc<Mutex<ById>>);

/// By the ids of bundles: of each record, in its place, whether it is settled.
type ById = HashMap<Arc<str>, Vec<bool>>;

impl Partly {
    /// The deliveries of `message`, one at least. `settle` is called once, when the last of them is settled.
    pub fn open(
        &self,
        (message, kind): (Record, Kind),
        redelivered: bool,
        settle: impl FnOnce(Verdict) + Send + 'static,
    ) -> Opened {
        let records = match kind {
            Kind::Single => None,
            Kind::Bundle(count) => unpack(message.body.clone()).filter(|records| count > 0 && records.len() == count),
        };
        let Some(records) = records else {
            return smallvec![Delivery::new(message, redelivered, settle)];
        };
        let before = self.lock().get(&message.id).cloned();
        // All settled, it would not have been given back.
        let before = before.filter(|it| it.len() == records.len() && it.contains(&false));
        let settled = before.unwrap_or_else(|| vec![false; records.len()]);
        let fate = Arc::new(Mutex::new(Fate {
            left: settled.iter().filter(|it| !**it).count(),
            settled: settled.clone(),
            verdict: Verdict::Ack,
            end: Some(Box::new(settle)),
            id: message.id,
            partly: self.clone(),
        }));
        let unsettled = records.into_iter().zip(settled).enumerate().filter(|(_, (_, is_settled))| !is_settled);
        let each = unsettled.map(|(at, (record, _))| {
            let fate = Arc::clone(&fate);
            Delivery::new(record, redelivered, move |verdict| Fate::settle(&fate, at, verdict))
        });
        each.collect()
    }

    fn lock(&self) -> MutexGuard<'_, ById> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, id: Arc<str>, settled: Vec<bool>) {
        let mut bundles = self.lock();
        if bundles.len() >= PARTLY_MAX {
            // Another node may have them by now. Forgotten, they come out whole.
            bundles.clear();
        }
        bundles.insert(id, settled);
    }
}

/// What is to become of a message, once it is known of all its records.
struct Fate {
    settled: Vec<bool>,
    left: usize,
    /// What those that were settled ask for together.
    verdict: Verdict,
    end: Option<Box<dyn FnOnce(Verdict) + Send>>,
    id: Arc<str>,
    partly: Partly,
}

impl Fate {
    fn settle(fate: &Mutex<Self>, at: usize, verdict: Verdict) {
        let mut fate = fate.lock().unwrap_or_else(PoisonError::into_inner);
        fate.settled[at] = matches!(verdict, Verdict::Ack | Verdict::Reject);
        fate.verdict = together(fate.verdict, verdict);
        fate.left -= 1;
        if fate.left > 0 {
            return;
        }
        let (verdict, settled, end) = (fate.verdict, mem::take(&mut fate.settled), fate.end.take());
        match verdict {
            Verdict::Ack => drop(fate.partly.lock().remove(&fate.id)),
            _ if settled.contains(&true) => fate.partly.remember(Arc::clone(&fate.id), settled),
            _ => {}
        }
        drop(fate);
        if let Some(end) = end {
            end(verdict);
        }
    }
}

/// What the message is settled by: whoever asks for it to come again is heard, and whoever asks for the longest delay. One that
/// was kept elsewhere need not be heard of again, as one that was delivered.
fn together(one: Verdict, other: Verdict) -> Verdict {
    match (one, other) {
        (Verdict::RetryAfter(one), Verdict::RetryAfter(other)) => Verdict::RetryAfter(one.max(other)),
        (retry @ Verdict::RetryAfter(_), _) | (_, retry @ Verdict::RetryAfter(_)) => retry,
        (Verdict::Unsettled, _) | (_, Verdict::Unsettled) => Verdict::Unsettled,
        (Verdict::Ack | Verdict::Reject, Verdict::Ack | Verdict::Reject) => Verdict::Ack,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn record(at: usize, body: usize) -> Record {
        Record {
            id: format!("id/{at}").into(),
            body: vec![b'x'; body].into(),
            traceparent: at.is_multiple_of(2).then(|| "00-1-2-01".into()),
            origin: at.is_multiple_of(3).then(|| Origin { run: "node/1".into(), at_us: 7 }),
        }
    }

    fn records(count: usize) -> Vec<Record> {
        (0..count).map(|at| record(at, 20)).collect()
    }

    /// Publishes, and tells what went as one message, and what was told of each.
    fn published(records: &[Record], bytes_max: usize) -> (Vec<(Record, Kind)>, Vec<Option<bool>>) {
        let (sent, mut told) = (Mutex::new(Vec::new()), vec![None; records.len()]);
        publish_all(
            records,
            bytes_max,
            |at, outcome| assert!(told[at].replace(outcome.is_ok()).is_none(), "{at} was told of twice"),
            async |message, kind| {
                let mut sent = sent.lock().unwrap();
                sent.push((message.clone(), kind));
                // The second is not confirmed.
                if sent.len() == 2 { Err(TransportError::Publish("no".into())) } else { Ok(()) }
            },
        )
        .now_or_never()
        .unwrap();
        (sent.into_inner().unwrap(), told)
    }

    #[test]
    fn what_fits_together_travels_together_and_each_is_told_of() {
        let (sent, told) = published(&records(RECORDS_MAX + 2), usize::MAX);
        assert_eq!(
            sent.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(),
            [Kind::Bundle(RECORDS_MAX), Kind::Bundle(2)]
        );
        assert!(told[..RECORDS_MAX].iter().all(|told| *told == Some(true)));
        assert_eq!(told[RECORDS_MAX..], [Some(false); 2]);

        let [large, small] = [BYTES_MAX, 20];
        let mixed = [large, small, small, large, small].into_iter().enumerate().map(|(at, body)| record(at, body));
        let mixed: Vec<_> = mixed.collect();
        let (sent, told) = published(&mixed, usize::MAX);
        assert_eq!(
            sent.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(),
            [Kind::Single, Kind::Bundle(2), Kind::Single, Kind::Single]
        );
        assert_eq!((&sent[0].0, &sent[3].0), (&mixed[0], &mixed[4]));
        assert_eq!(told, [true, false, false, true, true].map(Some));

        assert_eq!(published(&records(1), usize::MAX).0, [(record(0, 20), Kind::Single)]);
        assert!(published(&[], usize::MAX).0.is_empty());
        assert!(
            published(&records(9), 0).0.iter().all(|(_, kind)| *kind == Kind::Single),
            "none is too large for none"
        );
        let (sent, _) = published(&records(90), 1000);
        assert!(sent.len() > 1 && sent.iter().all(|(message, _)| message.body.len() <= 1000));
    }

    #[test]
    fn a_bundle_brings_what_it_took_and_is_known_by_it() {
        let sent = records(100);
        let [bundle, again, other] = [pack(&sent), pack(&sent), pack(&sent[1..])];
        assert_eq!(unpack(bundle.body.clone()).as_deref(), Some(&*sent));
        assert!(bundle.id == again.id && bundle.id != other.id);
        let mut later = sent.clone();
        later[3].origin = Some(Origin { run: "node/1".into(), at_us: 8 });
        assert_ne!(bundle.id, pack(&later).id, "a client may use a key again");
        assert!(bundle.body.len() <= sent.iter().map(size).sum::<usize>());
    }

    #[test]
    fn what_is_no_bundle_comes_out_as_it_is() {
        let unfit = proto::Bundle { records: vec![proto::Record { id: "a\nb".into(), ..proto::Record::default() }] };
        for (body, count) in [
            (pack(&records(3)).body, 2),
            (Bytes::new(), 0),
            (Bytes::from_static(b"{}"), 1),
            (unfit.encode_to_vec().into(), 1),
        ] {
            let message = Record { body, ..record(0, 0) };
            let opened = Partly::default().open((message.clone(), Kind::Bundle(count)), false, |_| {});
            assert_eq!(opened.iter().map(|delivery| &delivery.record).collect::<Vec<_>>(), [&message]);
        }
    }

    #[test]
    fn a_message_is_settled_once_by_all_of_its_records_and_only_what_was_not_settled_comes_again() {
        let partly = Partly::default();
        let (sent, verdicts) = (records(4), Arc::new(Mutex::new(Vec::new())));
        let open = |partly: &Partly| {
            let verdicts = Arc::clone(&verdicts);
            let settle = move |verdict| verdicts.lock().unwrap().push(verdict);
            let mut opened = partly.open((pack(&sent), Kind::Bundle(4)), false, settle).into_vec();
            opened.reverse();
            opened
        };
        let (short, long) = (std::time::Duration::from_secs(1), std::time::Duration::from_secs(2));

        let mut opened = open(&partly);
        opened.pop().unwrap().retry_after(short);
        opened.pop().unwrap().ack();
        opened.pop().unwrap().reject();
        assert!(verdicts.lock().unwrap().is_empty(), "one is not settled");
        drop(opened);
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::RetryAfter(short)]);

        let mut opened = open(&partly);
        assert_eq!(opened.iter().map(|it| &*it.record.id).collect::<Vec<_>>(), ["id/3", "id/0"]);
        opened.pop().unwrap().ack();
        drop(opened);
        let mut opened = open(&partly);
        assert_eq!(opened.iter().map(|it| &*it.record.id).collect::<Vec<_>>(), ["id/3"]);
        opened.pop().unwrap().reject();
        assert_eq!(verdicts.lock().unwrap()[1..], [Verdict::Unsettled, Verdict::Ack]);
        assert!(partly.lock().is_empty(), "nothing is to be remembered");

        let mut opened = open(&partly);
        assert_eq!(opened.len(), 4);
        opened.drain(..).zip([long, short, short, long]).for_each(|(it, delay)| it.retry_after(delay));
        assert_eq!(verdicts.lock().unwrap()[3..], [Verdict::RetryAfter(long)]);
        assert!(partly.lock().is_empty(), "nothing was settled");
        assert_eq!(open(&Partly::default()).len(), 4);
    }
}
