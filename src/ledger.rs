//! The ledger: one count per transition of a record, made at the one place where it happens.
//!
//! On a node that has its lanes to itself, at rest,
//! `accepted + recovered = delivered + dead + dropped + spooled + in_flight`: see [`Balance::holds`].

mod known;
mod latency;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::{sync::watch, time::sleep};
use tracing::error;

use self::known::{Delivered, Known};
pub use self::latency::{Latency, Quantiles};
use crate::{
    clock::unix_us,
    lane_id::LaneId,
    record::{Origin, Record},
    spool::{Queue, SpoolStats},
};

/// How long the counts must have stood still to be compared.
const REST: Duration = Duration::from_secs(2);

/// The counts of one node since its start.
pub struct Ledger {
    /// This run of the node: what carries another origin is of an earlier run, or of another node.
    pub run: Arc<str>,
    pub started: Instant,
    pub api: ApiGauge,
    lanes: [Lane; LaneId::ALL.len()],
    /// Answered with a receipt of the spool.
    spooled: AtomicU64,
    /// Of an earlier run, found in the spool at the start.
    found: AtomicU64,
    /// Those of them that had come out of a lane before, where they were counted as well.
    twice: AtomicU64,
    /// Dead letters that an operator has removed.
    dropped: AtomicU64,
    /// Records that the API has.
    known: Mutex<Delivered>,
    /// Records that became dead letters.
    died: Mutex<Known>,
    /// Records whose clients were refused: one that comes out of a lane after all has no receipt.
    refused: Mutex<Known>,
    /// Records that had come out before their clients were refused.
    late: AtomicU64,
    /// From a request's head to its answer, by the answer's status.
    requests: Mutex<BTreeMap<u16, Latency>>,
    /// What [`audit`] has found.
    imbalanced: AtomicBool,
}

#[derive(Default)]
struct Lane {
    accepted: AtomicU64,
    fed: AtomicU64,
    recovered: AtomicU64,
    delivered: AtomicU64,
    dead: AtomicU64,
    redelivered: AtomicU64,
    publish: Latency,
    post: Latency,
    delivery: Latency,
    /// When the API took a record last, in microseconds since the Unix epoch; 0 for never.
    last_delivery_us: AtomicU64,
}

/// The counts of one lane, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered with a receipt.
    pub accepted: u64,
    /// Came from the spool, where they were counted before.
    pub fed: u64,
    /// Found without a receipt of this run, in a broker or at the start in the spool: of an earlier run, of another node, or never
    /// confirmed to its client.
    pub recovered: u64,
    /// The API's 2xx.
    pub delivered: u64,
    /// Became dead letters.
    pub dead: u64,
    /// Came out of a broker again after the API's 2xx, and was not POSTed again.
    pub redelivered: u64,
}

impl Counts {
    /// Safe and not yet delivered.
    #[must_use]
    pub const fn in_flight(&self) -> u64 {
        // A record may be delivered a moment before its confirm has come back.
        (self.accepted + self.fed + self.recovered).saturating_sub(self.delivered + self.dead)
    }
}

impl Ledger {
    #[must_use]
    pub fn new(run: Arc<str>) -> Self {
        Self {
            run,
            started: Instant::now(),
            api: ApiGauge::default(),
            lanes: Default::default(),
            spooled: AtomicU64::new(0),
            found: AtomicU64::new(0),
            twice: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            known: Mutex::default(),
            died: Mutex::default(),
            refused: Mutex::default(),
            late: AtomicU64::new(0),
            requests: Mutex::default(),
            imbalanced: AtomicBool::new(false),
        }
    }

    /// `lane` has confirmed a record so long after it was given it, and its client has a receipt.
    pub fn accepted(&self, lane: LaneId, after: Duration) {
        let lane = self.lane(lane);
        lane.accepted.fetch_add(1, Relaxed);
        lane.publish.record(after);
    }

    /// `lane` has confirmed a record from the spool so long after it was given it.
    pub fn fed(&self, lane: LaneId, after: Duration) {
        let lane = self.lane(lane);
        lane.fed.fetch_add(1, Relaxed);
        lane.publish.record(after);
    }

    /// A client has the spool's receipt.
    pub fn spooled(&self) {
        self.spooled.fetch_add(1, Relaxed);
    }

    /// An earlier run has left this many records in the spool that are for no lane yet, dead letters included.
    pub fn found_waiting(&self, records: u64) {
        self.found.fetch_add(records, Relaxed);
    }

    /// The record lies in the dead letters.
    pub fn dead(&self, lane: LaneId, record: &Record) {
        let is_recovered = {
            // Locked in the order of [`Self::refused`].
            let (known, mut died, refused) =
                (lock(&self.known), lock(&self.died), lock(&self.refused));
            // One that died or was delivered before: this is another copy, which lies on disk as well.
            let is_copy = !died.insert(record) || known.contains(record);
            is_copy || self.promised(record, &known, &refused).is_none()
        };
        let lane = self.lane(lane);
        lane.recovered.fetch_add(is_recovered.into(), Relaxed);
        lane.dead.fetch_add(1, Relaxed);
    }

    /// An operator has removed this many dead letters.
    pub fn dropped(&self, records: u64) {
        self.dropped.fetch_add(records, Relaxed);
    }

    /// Whether the record is known to be with the API. The same id taken in a second time is another record. One that died is not
    /// known: a copy of it that comes later may be what a broker took a replay for.
    #[must_use]
    pub fn is_delivered(&self, record: &Record) -> bool {
        lock(&self.known).contains(record)
    }

    /// The record, which was found on disk, as this run answers for it. Nothing if the API has it: an earlier run had given it to a
    /// lane, and was killed before it had struck it out.
    #[must_use]
    pub fn answers_for(&self, mut found: Record) -> Option<Record> {
        let Some(origin) = found
            .origin
            .as_mut()
            .filter(|origin| origin.run != self.run)
        else {
            return Some(found);
        };
        origin.run = Arc::clone(&self.run);
        let mut known = lock(&self.known);
        if !known.found.contains(&found) {
            if known.contains(&found) {
                self.twice.fetch_add(1, Relaxed);
                return None;
            }
            known.found.insert(&found);
        }
        drop(known);
        Some(found)
    }

    /// The API has the records, which came out of `lane`. One that it had before counts as redelivered.
    pub fn delivered<'r>(&self, lane: LaneId, records: impl IntoIterator<Item = &'r Record>) {
        let now_us = unix_us();
        let [mut delivered, mut recovered, mut redelivered] = [0; 3];
        {
            // Locked in the order of [`Self::refused`]; once, however many records.
            let (mut known, died, refused) =
                (lock(&self.known), lock(&self.died), lock(&self.refused));
            for record in records {
                if !known.insert(lane, record) {
                    redelivered += 1;
                    continue;
                }
                delivered += 1;
                // One that died is another copy of a dead letter.
                match self
                    .promised(record, &known, &refused)
                    .filter(|_| !died.contains(record))
                {
                    Some(origin) => {
                        self.lane(lane)
                            .delivery
                            .record(Duration::from_micros(now_us.saturating_sub(origin.at_us)));
                    }
                    None => recovered += 1,
                }
            }
        }
        let lane = self.lane(lane);
        lane.recovered.fetch_add(recovered, Relaxed);
        lane.delivered.fetch_add(delivered, Relaxed);
        lane.redelivered.fetch_add(redelivered, Relaxed);
        if delivered > 0 {
            lane.last_delivery_us.store(now_us, Relaxed);
        }
    }

    /// A lane that was given the record has not confirmed it, and may have it all the same. It goes on by another way: when both
    /// have brought it, it is one record.
    pub fn doubted(&self, record: &Record) {
        lock(&self.known).doubt(record);
    }

    /// Whether a lane may have the record without having said so: in this run, or in an earlier one that has left it on disk.
    #[must_use]
    pub fn is_doubted(&self, record: &Record) -> bool {
        lock(&self.known).is_doubted(record)
    }

    /// A POST of `lane` that began then has ended.
    pub fn posted(&self, lane: LaneId, began: Instant) {
        self.lane(lane).post.record_since(began);
    }

    /// A client that sent a request then has been answered with `code`.
    pub fn answered(&self, code: u16, began: Instant) {
        lock(&self.requests)
            .entry(code)
            .or_default()
            .record_since(began);
    }

    /// The origin of a record that has a receipt of this run, or was found by it on disk: whichever run had given it to the lane.
    fn promised<'r>(
        &self,
        record: &'r Record,
        known: &Delivered,
        refused: &Known,
    ) -> Option<&'r Origin> {
        let answers = |origin: &Origin| origin.run == self.run || known.found.contains(record);
        record
            .origin
            .as_ref()
            .filter(|origin| answers(origin) && !refused.contains(record))
    }

    /// No lane and no spool has confirmed the record, and its client was told so. Delivered after all, it counts as recovered.
    pub fn refused(&self, record: &Record) {
        // Held to the end, so that the record's end comes wholly before or wholly after.
        let known = lock(&self.known);
        let died = lock(&self.died);
        if known.contains(record) || died.contains(record) {
            self.late.fetch_add(1, Relaxed);
        } else {
            lock(&self.refused).insert(record);
        }
    }

    /// A record came out of `lane` that the API has already.
    pub fn redelivered(&self, lane: LaneId) {
        self.lane(lane).redelivered.fetch_add(1, Relaxed);
    }

    /// The counts of one lane.
    #[must_use]
    pub fn counts(&self, lane: LaneId) -> Counts {
        let lane = self.lane(lane);
        // Ends first: what ends between the two reads was accepted by the second.
        let (delivered, dead) = (lane.delivered.load(Relaxed), lane.dead.load(Relaxed));
        Counts {
            accepted: lane.accepted.load(Relaxed),
            fed: lane.fed.load(Relaxed),
            recovered: lane.recovered.load(Relaxed),
            delivered,
            dead,
            redelivered: lane.redelivered.load(Relaxed),
        }
    }

    /// The counts of all lanes together.
    #[must_use]
    pub fn totals(&self) -> Counts {
        let unpromised = Counts {
            recovered: self.late.load(Relaxed),
            ..Counts::default()
        };
        LaneId::ALL
            .into_iter()
            .map(|lane| self.counts(lane))
            .fold(unpromised, |sum, lane| Counts {
                accepted: sum.accepted + lane.accepted,
                fed: sum.fed + lane.fed,
                recovered: sum.recovered + lane.recovered,
                delivered: sum.delivered + lane.delivered,
                dead: sum.dead + lane.dead,
                redelivered: sum.redelivered + lane.redelivered,
            })
    }

    /// The counts of the node, with what lies on its disk.
    #[must_use]
    pub fn balance(&self, held: &SpoolStats) -> Balance {
        // First: what it takes away was counted before.
        let twice = self.twice.load(Relaxed);
        let lanes = self.totals();
        Balance {
            accepted: lanes.accepted + self.spooled.load(Relaxed),
            // What the gRPC lane carries of an earlier run is counted one by one as it ends: two copies of a record are one.
            recovered: lanes.recovered + self.found.load(Relaxed) + held.found_carried - twice,
            delivered: lanes.delivered,
            dead: held.records(Queue::Dead),
            dropped: self.dropped.load(Relaxed),
            spooled: held.waiting(),
            in_flight: lanes.in_flight() + held.found_carried,
            redelivered: lanes.redelivered,
        }
    }

    /// The last time that nothing moved, the counts did not add up: see [`audit`].
    #[must_use]
    pub fn is_imbalanced(&self) -> bool {
        self.imbalanced.load(Relaxed)
    }

    /// Records that `lane` has, and the API has not.
    #[must_use]
    pub fn in_flight(&self, lane: LaneId, held: &SpoolStats) -> u64 {
        self.counts(lane).in_flight()
            + if lane == LaneId::Grpc {
                held.found_carried
            } else {
                0
            }
    }

    /// Records answered with a receipt of the spool.
    #[must_use]
    pub fn receipts_of_spool(&self) -> u64 {
        self.spooled.load(Relaxed)
    }

    /// The time of the last delivery, in µs since the Unix epoch; 0 for none.
    #[must_use]
    pub fn last_delivery_us(&self, lane: LaneId) -> u64 {
        self.lane(lane).last_delivery_us.load(Relaxed)
    }

    /// From handing a record to the lane to its confirm.
    #[must_use]
    pub const fn publish_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).publish
    }

    /// From a POST to its answer or failure.
    #[must_use]
    pub const fn post_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).post
    }

    /// From accepted to delivered.
    #[must_use]
    pub const fn delivery_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).delivery
    }

    /// Calls `read` with each status of ingest and the times of its answers.
    pub fn for_each_status(&self, mut read: impl FnMut(u16, &Latency)) {
        for (code, times) in &*lock(&self.requests) {
            read(*code, times);
        }
    }

    const fn lane(&self, lane: LaneId) -> &Lane {
        &self.lanes[lane as usize]
    }
}

fn lock<T>(counted: &Mutex<T>) -> MutexGuard<'_, T> {
    counted.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where every record is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Balance {
    pub accepted: u64,
    pub recovered: u64,
    pub delivered: u64,
    /// Dead letters on disk.
    pub dead: u64,
    /// Dead letters that an operator has removed.
    pub dropped: u64,
    /// Waiting on disk.
    pub spooled: u64,
    /// In a broker, or on the way from it to the API.
    pub in_flight: u64,
    pub redelivered: u64,
}

impl Balance {
    /// Holds at every moment at rest.
    #[must_use]
    pub const fn holds(&self) -> bool {
        self.accepted + self.recovered
            == self.delivered + self.dead + self.dropped + self.spooled + self.in_flight
    }
}

/// Compares the counts whenever nothing has moved for a while, until the spool has ended: an imbalance is an error of this program, and is
/// reported as one.
pub async fn audit(ledger: Arc<Ledger>, held: watch::Receiver<SpoolStats>) {
    let mut before = None;
    while held.has_changed().is_ok() {
        sleep(REST).await;
        let held = *held.borrow();
        let balance = ledger.balance(&held);
        if before.replace(balance) == Some(balance) {
            let imbalanced = !balance.holds();
            if ledger.imbalanced.swap(imbalanced, Relaxed) != imbalanced && imbalanced {
                error!(?balance, "the ledger does not balance");
            }
        }
    }
}

/// The POSTs of all forwarders.
#[derive(Default)]
pub struct ApiGauge(AtomicU64);

/// One POST in flight.
pub struct Posting<'a>(&'a ApiGauge);

impl ApiGauge {
    /// A POST begins; it ends when the answer is dropped.
    pub fn begin(&self) -> Posting<'_> {
        self.0.fetch_add(1, Relaxed);
        Posting(self)
    }

    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Drop for Posting<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn record(id: &str, run: &str) -> Record {
        let origin = Some(Origin {
            run: Arc::from(run),
            at_us: 1,
        });
        Record {
            id: Arc::from(id),
            body: Bytes::from_static(b"{}"),
            traceparent: None,
            origin,
        }
    }

    #[test]
    fn each_record_counts_once_however_often_it_comes() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.accepted(LaneId::Nats, Duration::ZERO);
        assert_eq!(ledger.totals().in_flight(), 1);
        assert!(!ledger.is_delivered(&record("a", "run")));
        ledger.delivered(LaneId::Nats, [&record("a", "run")]);
        assert!(ledger.is_delivered(&record("a", "run")));
        ledger.delivered(LaneId::Grpc, [&record("a", "run")]);
        assert_eq!(
            ledger.totals(),
            Counts {
                accepted: 1,
                recovered: 0,
                delivered: 1,
                redelivered: 1,
                ..Counts::default()
            }
        );
    }

    #[test]
    fn the_records_of_a_post_count_one_by_one() {
        let ledger = Ledger::new(Arc::from("run"));
        let [known, refused, earlier] = [
            record("a", "run"),
            record("b", "run"),
            record("c", "earlier"),
        ];
        ledger.refused(&refused);
        ledger.delivered(LaneId::Grpc, [&known, &refused, &earlier, &known]);
        let expected = Counts {
            recovered: 2,
            delivered: 3,
            redelivered: 1,
            ..Counts::default()
        };
        assert_eq!(ledger.counts(LaneId::Grpc), expected);
    }

    #[test]
    fn an_id_that_is_taken_in_twice_is_settled_twice() {
        let ledger = Ledger::new(Arc::from("run"));
        let first = record("a", "run");
        let mut second = first.clone();
        second.origin = Some(Origin {
            run: Arc::from("run"),
            at_us: 2,
        });
        ledger.delivered(LaneId::Nats, [&first]);
        assert!(!ledger.is_delivered(&second));
    }

    #[test]
    fn a_copy_of_a_dead_letter_is_posted_and_balances() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.accepted(LaneId::Nats, Duration::ZERO);
        ledger.dead(LaneId::Nats, &record("a", "run"));
        assert!(
            !ledger.is_delivered(&record("a", "run")),
            "a replay may have become that copy"
        );
        ledger.dead(LaneId::Grpc, &record("a", "run"));
        ledger.delivered(LaneId::Grpc, [&record("a", "run")]);
        let counts = ledger.totals();
        let expected = Counts {
            accepted: 1,
            recovered: 2,
            delivered: 1,
            dead: 2,
            ..Counts::default()
        };
        assert_eq!((counts, counts.in_flight()), (expected, 0));
    }

    #[test]
    fn a_record_of_an_earlier_run_balances_as_recovered() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.delivered(LaneId::Nats, [&record("a", "earlier")]);
        let mut foreign = record("b", "run");
        foreign.origin = None;
        ledger.delivered(LaneId::Nats, [&foreign]);
        assert!(!ledger.is_delivered(&foreign));
        let counts = ledger.counts(LaneId::Nats);
        assert_eq!(
            counts,
            Counts {
                accepted: 0,
                recovered: 2,
                delivered: 2,
                redelivered: 0,
                ..Counts::default()
            }
        );
        assert_eq!(counts.in_flight(), 0);
    }

    #[test]
    fn a_record_that_was_found_on_disk_and_lies_in_a_lane_too_is_one() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.found_waiting(3);
        let balance = || {
            let Balance {
                recovered,
                delivered,
                in_flight,
                redelivered,
                ..
            } = ledger.balance(&SpoolStats::default());
            (recovered, delivered, in_flight, redelivered)
        };
        // The lane takes the second for what it has already: only the first comes out.
        let found = record("a", "earlier");
        let given = ledger.answers_for(found.clone()).unwrap();
        assert_eq!(given, record("a", "run"));
        ledger.fed(LaneId::Nats, Duration::ZERO);
        assert!(!ledger.is_delivered(&found));
        ledger.delivered(LaneId::Nats, [&found]);
        assert!(ledger.is_delivered(&found) && ledger.is_delivered(&given));
        assert_eq!(balance(), (3, 1, 0, 0));
        // Given to the lane once more, as the feeder's next life does.
        assert_eq!(ledger.answers_for(found), Some(given));

        // Both come out, the one in the name of a third run.
        let found = record("b", "replay");
        let given = ledger.answers_for(found.clone()).unwrap();
        ledger.fed(LaneId::Nats, Duration::ZERO);
        ledger.delivered(LaneId::Nats, [&given]);
        ledger.delivered(LaneId::Nats, [&record("b", "earlier")]);
        assert_eq!(balance(), (3, 2, 0, 1));

        // It comes out before it is found.
        let found = record("c", "earlier");
        ledger.delivered(LaneId::Nats, [&found]);
        assert_eq!(ledger.answers_for(found), None);
        assert_eq!(balance(), (3, 3, 0, 1));

        // What this run has put there, and what no node took in, goes as it is.
        for own in [
            record("d", "run"),
            Record {
                origin: None,
                ..record("e", "run")
            },
        ] {
            assert_eq!(ledger.answers_for(own.clone()), Some(own));
        }
    }

    #[test]
    fn a_record_that_is_delivered_though_its_client_was_refused_balances() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.refused(&record("a", "run"));
        ledger.delivered(LaneId::Nats, [&record("a", "run")]);
        ledger.delivered(LaneId::Nats, [&record("b", "run")]);
        ledger.refused(&record("b", "run"));
        ledger.refused(&record("c", "run"));
        assert_eq!(
            ledger.totals(),
            Counts {
                accepted: 0,
                recovered: 2,
                delivered: 2,
                redelivered: 0,
                ..Counts::default()
            }
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_imbalance_at_rest_is_reported_until_it_is_over() {
        let ledger = Arc::new(Ledger::new(Arc::from("run")));
        let (_spool, held) = watch::channel(SpoolStats::default());
        tokio::spawn(audit(Arc::clone(&ledger), held));
        ledger.dropped(1);
        sleep(3 * REST).await;
        assert!(ledger.is_imbalanced());
        ledger.spooled();
        sleep(3 * REST).await;
        assert!(!ledger.is_imbalanced());
    }
}
