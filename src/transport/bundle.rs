//! Bundles: records that are to be published together travel as one message, where a system charges by the message. Each is a
//! delivery of its own, and the message is settled once all of them are.
//!
//! A message that is given back because of some of its records comes again with all of them. This process knows for long which of
//! them are settled, and they do not come out again; another one delivers them once more, under the ids that they have.

use std::{
    mem,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    vec,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use prost::Message as _;
use ring::digest::{Context, SHA256};

use super::TransportError;
use crate::{
    delivery::{Delivery, Verdict},
    proto,
    recent::{FingerprintMap, Hasher128},
    record::{Origin, Record, is_visible_ascii},
};

/// The most records of a bundle: they come again together.
const RECORDS_MAX: usize = 128;
/// The most bytes of a bundle, so that what is fetched ahead stays small.
const BYTES_MAX: usize = 64 << 10;
/// What a record adds to a bundle beside its texts, its origin included.
const OVERHEAD: usize = 128;
/// The most records of a bundle that somebody else has made.
const FOREIGN_MAX: usize = 1024;
/// Bundles of which it is known what is settled, unless more are out at a time.
const KNOWN_MAX: usize = 4096;

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
        count
            .and_then(|count| count.parse().ok())
            .map_or(Self::Single, Self::Bundle)
    }
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
        let fit = records[from..]
            .iter()
            .take(RECORDS_MAX)
            .take_while(|record| {
                bytes += size(record.as_ref());
                bytes <= bytes_max && record.as_ref().origin.is_some()
            });
        // One that is too large goes alone, and one that could not be told from another of its id.
        let until = (from + fit.count().max(1)).min(records.len());
        let run = mem::replace(&mut from, until)..until;
        (!run.is_empty()).then_some(run)
    })
}

/// What `record` adds to a bundle. It does not depend on who took it in, so that the same records make the same bundles on each node.
fn size(record: &Record) -> usize {
    record.id.len()
        + record.body.len()
        + record.traceparent.as_ref().map_or(0, |text| text.len())
        + OVERHEAD
}

/// Its id says which records it has, whoever has packed them: a system that knows a message by it knows it again. That it is a
/// cryptographic hash keeps clients from choosing ids that make one bundle pass for another.
fn pack(records: &[impl AsRef<Record>]) -> Record {
    let mut ids = Context::new(&SHA256);
    for record in records {
        // No id has a space.
        ids.update(record.as_ref().id.as_bytes());
        ids.update(b" ");
    }
    let id = format!("{:x}", Bytes::copy_from_slice(ids.finish().as_ref()));
    let bundle = proto::Bundle {
        records: records
            .iter()
            .map(|record| record.as_ref().into())
            .collect(),
    };
    Record {
        id: id.into(),
        body: bundle.encode_to_vec().into(),
        traceparent: None,
        origin: None,
    }
}

/// Nothing if `body` is something else.
fn unpack(body: Bytes) -> Option<Vec<Record>> {
    let bundle = proto::Bundle::decode(body).ok()?;
    bundle.records.into_iter().map(record).collect()
}

/// Nothing if it could not be POSTed under its id.
fn record(sent: proto::Record) -> Option<Record> {
    let proto::Record {
        id,
        body,
        traceparent,
        origin,
    } = sent;
    is_visible_ascii(&id).then(|| Record {
        id: id.into(),
        body,
        traceparent: Some(traceparent)
            .filter(|text| is_visible_ascii(text))
            .map(Into::into),
        origin: Origin::parse(&origin),
    })
}

/// What is settled of the last bundles. Clones are one; it outlives connections.
#[derive(Clone, Default)]
pub struct Known(Arc<(Hasher128, Mutex<Bundles>)>);

type Bundles = FingerprintMap<Settled>;
/// Of each record, in its place.
type Settled = Arc<[AtomicBool]>;

impl Known {
    /// What is settled of the bundle in `message`. It is known by its records, and a record by when it was taken in as well, since its
    /// id may have been used before; a bundle that somebody else has made is known by all that it is.
    fn settled(&self, message: &Record, records: &[Record]) -> Settled {
        let of_each = records.iter().map(|record| {
            record
                .origin
                .as_ref()
                .map(|it| (&*record.id, &*it.run, it.at_us))
        });
        let bundle = match of_each.collect::<Option<Vec<_>>>() {
            Some(of_each) => self.0.0.fingerprint(of_each),
            None => self.0.0.fingerprint((&message.id, &message.body)),
        };
        let mut bundles = self.bundles();
        if bundles.len() >= KNOWN_MAX {
            let is_out = |settled: &Settled| Arc::strong_count(settled) > 1;
            bundles.retain(|_, settled| is_out(settled) || !are_all(settled));
            if bundles.len() >= KNOWN_MAX {
                // Forgotten, they come out whole.
                bundles.retain(|_, settled| is_out(settled));
            }
        }
        let none = || records.iter().map(|_| AtomicBool::new(false)).collect();
        Arc::clone(bundles.entry(bundle).or_insert_with(none))
    }

    fn bundles(&self) -> MutexGuard<'_, Bundles> {
        self.0.1.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn are_all(settled: &Settled) -> bool {
    settled.iter().all(|it| it.load(Relaxed))
}

/// Opens the messages of one connection.
pub struct Opener {
    known: Known,
    /// Records of the last message that nobody has taken yet.
    rest: vec::IntoIter<Delivery>,
}

impl Opener {
    pub fn new(known: Known) -> Self {
        Self {
            known,
            rest: Vec::new().into_iter(),
        }
    }

    /// The next record of a message of which some are out.
    pub fn next(&mut self) -> Option<Delivery> {
        self.rest.next()
    }

    /// The first record of `message`, called when none of the last is left; nothing if all of them are settled.
    pub fn open(&mut self, message: Delivery, kind: Kind) -> Option<Delivery> {
        let records = match kind {
            Kind::Bundle(count @ 1..=FOREIGN_MAX) => {
                unpack(message.record.body.clone()).filter(|it| it.len() == count)
            }
            _ => None,
        };
        let Some(records) = records else {
            return Some(message);
        };
        let settled = self.known.settled(&message.record, &records);
        // Another connection may settle some meanwhile: those come out all the same.
        let before: Vec<_> = settled.iter().map(|it| it.load(Relaxed)).collect();
        let left = before.iter().filter(|is_settled| !**is_settled).count();
        if left == 0 {
            // Its ack was lost.
            message.ack();
            return None;
        }
        let (redelivered, since) = (message.redelivered, message.since);
        let open = Arc::new(Mutex::new(Some(Open {
            message,
            left,
            verdict: Verdict::Ack,
            settled,
        })));
        let unsettled = records
            .into_iter()
            .enumerate()
            .filter(|(at, _)| !before[*at])
            .map(|(at, record)| {
                let open = Arc::clone(&open);
                let mut delivery = Delivery::new(record, redelivered, move |verdict| {
                    settle(&open, at, verdict)
                });
                // What is held is the message, for all of them.
                delivery.since = since;
                delivery
            });
        self.rest = unsettled.collect::<Vec<_>>().into_iter();
        self.next()
    }
}

/// A message of which records are out.
struct Open {
    message: Delivery,
    left: usize,
    /// What those that were settled ask for together.
    verdict: Verdict,
    settled: Settled,
}

impl Open {
    fn end(self) {
        match self.verdict {
            // What was not settled here may have been by another connection, which had the same message.
            _ if are_all(&self.settled) => self.message.ack(),
            Verdict::RetryAfter(delay) => self.message.retry_after(delay),
            _ => drop(self.message),
        }
    }
}

fn settle(open: &Mutex<Option<Open>>, at: usize, verdict: Verdict) {
    let mut place = open.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(open) = &mut *place else { return };
    if matches!(verdict, Verdict::Ack | Verdict::Reject) {
        open.settled[at].store(true, Relaxed);
    }
    open.verdict = together(open.verdict, verdict);
    open.left -= 1;
    if open.left == 0
        && let Some(open) = place.take()
    {
        drop(place);
        open.end();
    }
}

/// What the message is settled by: whoever asks for it to come again is heard, and whoever asks for the longest delay. One that
/// was kept elsewhere need not be heard of again, as one that was delivered.
fn together(one: Verdict, other: Verdict) -> Verdict {
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
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::*;

    fn record(at: usize, body: usize) -> Record {
        Record {
            id: format!("id/{at}").into(),
            body: vec![b'x'; body].into(),
            traceparent: at.is_multiple_of(2).then(|| "00-1-2-01".into()),
            origin: Some(Origin {
                run: "node/1".into(),
                at_us: 7,
            }),
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
            |at, outcome| {
                assert!(
                    told[at].replace(outcome.is_ok()).is_none(),
                    "{at} was told of twice"
                )
            },
            async |message, kind| {
                let mut sent = sent.lock().unwrap();
                sent.push((message.clone(), kind));
                // The second is not confirmed.
                if sent.len() == 2 {
                    Err(TransportError::Publish("no".into()))
                } else {
                    Ok(())
                }
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
        let mixed = [large, small, small, large, small]
            .into_iter()
            .enumerate()
            .map(|(at, body)| record(at, body));
        let mixed: Vec<_> = mixed.collect();
        let (sent, told) = published(&mixed, usize::MAX);
        assert_eq!(
            sent.iter().map(|(_, kind)| *kind).collect::<Vec<_>>(),
            [Kind::Single, Kind::Bundle(2), Kind::Single, Kind::Single]
        );
        assert_eq!((&sent[0].0, &sent[3].0), (&mixed[0], &mixed[4]));
        assert_eq!(told, [true, false, false, true, true].map(Some));

        let mut bare = records(3);
        bare[1].origin = None;
        assert!(
            published(&bare, usize::MAX)
                .0
                .iter()
                .all(|(_, kind)| *kind == Kind::Single)
        );

        assert_eq!(
            published(&records(1), usize::MAX).0,
            [(record(0, 20), Kind::Single)]
        );
        assert!(published(&[], usize::MAX).0.is_empty());
        assert!(
            published(&records(9), 0)
                .0
                .iter()
                .all(|(_, kind)| *kind == Kind::Single),
            "none is too large for none"
        );
        let (sent, _) = published(&records(90), 1000);
        assert!(sent.len() > 1 && sent.iter().all(|(message, _)| message.body.len() <= 1000));
    }

    #[test]
    fn a_bundle_brings_what_it_took_and_has_the_id_of_its_records() {
        let sent = records(100);
        let bundle = pack(&sent);
        assert_eq!(unpack(bundle.body.clone()).as_deref(), Some(&*sent));
        assert!(bundle.body.len() <= sent.iter().map(size).sum::<usize>());
        let by_another = sent.iter().map(|record| Record {
            origin: None,
            ..record.clone()
        });
        assert_eq!(
            bundle.id,
            pack(&by_another.collect::<Vec<_>>()).id,
            "whoever has taken them in"
        );
        assert_ne!(bundle.id, pack(&sent[1..]).id);
        let named = |ids: &[&str]| {
            pack(
                &ids.iter()
                    .map(|&id| Record {
                        id: id.into(),
                        ..record(0, 0)
                    })
                    .collect::<Vec<_>>(),
            )
            .id
        };
        assert_ne!(named(&["a", "bc"]), named(&["ab", "c"]));
    }

    /// Each verdict that a message was given.
    type Verdicts = Arc<Mutex<Vec<Verdict>>>;

    fn message(record: Record, verdicts: &Verdicts) -> Delivery {
        let verdicts = Arc::clone(verdicts);
        Delivery::new(record, false, move |verdict| {
            verdicts.lock().unwrap().push(verdict)
        })
    }

    /// What comes out, the last first.
    fn open(known: &Known, message: Delivery, kind: Kind) -> Vec<Delivery> {
        let mut opener = Opener::new(known.clone());
        let mut all: Vec<_> = opener.open(message, kind).into_iter().collect();
        all.extend(std::iter::from_fn(|| opener.next()));
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
    fn what_is_no_bundle_comes_out_as_it_is() {
        let unfit = proto::Bundle {
            records: vec![proto::Record {
                id: "a\nb".into(),
                ..proto::Record::default()
            }],
        };
        for (body, count) in [
            (pack(&records(3)).body, 2),
            (pack(&records(FOREIGN_MAX + 1)).body, FOREIGN_MAX + 1),
            (Bytes::new(), 0),
            (Bytes::from_static(b"{}"), 1),
            (unfit.encode_to_vec().into(), 1),
        ] {
            let sent = Record {
                body,
                ..record(0, 0)
            };
            let opened = open(
                &Known::default(),
                message(sent.clone(), &Verdicts::default()),
                Kind::Bundle(count),
            );
            assert_eq!(
                opened
                    .iter()
                    .map(|delivery| &delivery.record)
                    .collect::<Vec<_>>(),
                [&sent]
            );
        }
    }

    #[test]
    fn a_message_is_settled_once_by_all_of_its_records_and_only_what_was_not_settled_comes_again() {
        let (known, verdicts, sent) = (Known::default(), Verdicts::default(), records(4));
        let open = |known: &Known| open(known, message(pack(&sent), &verdicts), Kind::Bundle(4));
        let (short, long) = (Duration::from_secs(1), Duration::from_secs(2));

        let mut opened = open(&known);
        opened.pop().unwrap().retry_after(short);
        opened.pop().unwrap().ack();
        opened.pop().unwrap().reject();
        assert!(verdicts.lock().unwrap().is_empty(), "one is not settled");
        drop(opened);
        assert_eq!(
            mem::take(&mut *verdicts.lock().unwrap()),
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
            mem::take(&mut *verdicts.lock().unwrap()),
            [Verdict::Unsettled, Verdict::Ack]
        );
        assert!(open(&known).is_empty(), "its ack was lost");
        assert_eq!(mem::take(&mut *verdicts.lock().unwrap()), [Verdict::Ack]);

        let mut opened = open(&Known::default());
        assert_eq!(opened.len(), 4);
        opened
            .drain(..)
            .zip([long, short, short, long])
            .for_each(|(it, delay)| it.retry_after(delay));
        assert_eq!(
            mem::take(&mut *verdicts.lock().unwrap()),
            [Verdict::RetryAfter(long)]
        );
    }

    #[test]
    fn what_one_connection_has_settled_the_next_one_knows_at_once() {
        let (known, verdicts, sent) = (Known::default(), Verdicts::default(), records(4));
        let open = |sent: &[Record]| open(&known, message(pack(sent), &verdicts), Kind::Bundle(4));
        let mut first = open(&sent);
        first.pop().unwrap().reject();
        // It was lost while three were out, which are settled late.
        let mut second = open(&sent);
        assert_eq!(ids(&second), ["id/1", "id/2", "id/3"]);
        first.pop().unwrap().ack();
        assert_eq!(ids(&open(&sent)), ["id/2", "id/3"]);
        assert_eq!(
            mem::take(&mut *verdicts.lock().unwrap()),
            [Verdict::Unsettled]
        );
        second.pop().unwrap().retry_after(Duration::ZERO);
        second.into_iter().for_each(Delivery::ack);
        assert_eq!(
            mem::take(&mut *verdicts.lock().unwrap()),
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
        let (known, verdicts) = (Known::default(), Verdicts::default());
        let theirs: Vec<_> = records(4)
            .into_iter()
            .map(|record| Record {
                origin: None,
                ..record
            })
            .collect();
        let bundle = pack(&theirs);
        let open =
            |bundle: &Record| open(&known, message(bundle.clone(), &verdicts), Kind::Bundle(4));
        open(&bundle).pop().unwrap().ack();
        assert_eq!(ids(&open(&bundle)), ["id/1", "id/2", "id/3"]);
        assert_eq!(
            open(&Record {
                id: "other".into(),
                ..bundle.clone()
            })
            .len(),
            4
        );
        let other = theirs.into_iter().map(|record| Record {
            body: Bytes::from_static(b"{}"),
            ..record
        });
        let body = pack(&other.collect::<Vec<_>>()).body;
        assert_eq!(open(&Record { body, ..bundle }).len(), 4);
    }

    #[test]
    fn what_is_known_of_bundles_is_bounded_and_those_that_are_out_are_kept() {
        let (known, verdicts) = (Known::default(), Verdicts::default());
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
        let open = |number| {
            open(
                &known,
                message(pack(&numbered(number)), &verdicts),
                Kind::Bundle(2),
            )
        };
        let mut out = open(0);
        out.pop().unwrap().ack();
        open(1).pop().unwrap().ack();
        for number in 2..2 * KNOWN_MAX {
            open(number).into_iter().for_each(Delivery::ack);
        }
        assert!(known.bundles().len() <= KNOWN_MAX);
        assert_eq!(
            (ids(&open(0)), ids(&open(1))),
            (vec!["id/1"], vec!["id/1"]),
            "those that are settled go first"
        );
        for number in 0..2 * KNOWN_MAX {
            open(2 * KNOWN_MAX + number).pop().unwrap().ack();
        }
        assert!(known.bundles().len() <= KNOWN_MAX);
        assert_eq!(
            (ids(&open(0)), ids(&open(1))),
            (vec!["id/1"], vec!["id/0", "id/1"]),
            "what is out is kept"
        );
    }
}
