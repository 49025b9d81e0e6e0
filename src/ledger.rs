//! The ledger: one count per transition of a record, made at the one place where it happens.
//!
//! On a node that has its lanes to itself, at rest,
//! `accepted + recovered = delivered + dead + dropped + spooled + in_flight`: see [`Balance::holds`].

mod balance;
mod counts;
mod latency;
mod memory;
mod rules;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub use self::{
    balance::{Balance, audit},
    counts::{ApiGauge, Counts, Posting},
    latency::{Latency, Quantiles},
};
use self::{
    memory::{FlagMemory, Flags},
    rules::{CountedAs, Transition, count},
};
use crate::{
    clock::unix_us,
    lane_id::LaneId,
    record::Record,
    spool::{Queue, SpoolStats},
};

/// The counts of one node since its start.
pub struct Ledger {
    /// This run of the node. A record with another origin is of an earlier run, or of another node.
    pub run: Arc<str>,
    pub started: Instant,
    pub api: ApiGauge,
    lanes: [LaneCounters; LaneId::ALL.len()],
    /// Answered with a receipt of the spool.
    spooled: AtomicU64,
    /// Left by an earlier run, and found in the spool at the start.
    recovered_from_disk: AtomicU64,
    /// Recovered from disk, and before from a lane: counted in both places.
    double_counted: AtomicU64,
    /// Ended before their clients were refused.
    refused_too_late: AtomicU64,
    /// Dead letters that an operator has removed.
    dropped: AtomicU64,
    memory: Mutex<FlagMemory>,
    /// From a request's head to its answer, by the answer's status.
    requests: Mutex<BTreeMap<u16, Latency>>,
    /// The last result of [`audit`].
    imbalanced: AtomicBool,
}

#[derive(Default)]
struct LaneCounters {
    accepted: AtomicU64,
    resent: AtomicU64,
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

impl Ledger {
    pub fn new(run: Arc<str>) -> Self {
        Self {
            run,
            started: Instant::now(),
            api: ApiGauge::default(),
            lanes: Default::default(),
            spooled: AtomicU64::new(0),
            recovered_from_disk: AtomicU64::new(0),
            double_counted: AtomicU64::new(0),
            refused_too_late: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            memory: Mutex::default(),
            requests: Mutex::default(),
            imbalanced: AtomicBool::new(false),
        }
    }

    /// `lane` has confirmed a record, and its client has a receipt. The confirm took `after`.
    pub fn accepted(&self, lane: LaneId, after: Duration) {
        let lane = self.lane(lane);
        lane.accepted.fetch_add(1, Relaxed);
        lane.publish.record(after);
    }

    /// `lane` has confirmed a record from the spool. The confirm took `after`.
    pub fn resent(&self, lane: LaneId, after: Duration) {
        let lane = self.lane(lane);
        lane.resent.fetch_add(1, Relaxed);
        lane.publish.record(after);
    }

    /// A client has the spool's receipt.
    pub fn spooled(&self) {
        self.spooled.fetch_add(1, Relaxed);
    }

    /// An earlier run has left `records` in the spool, dead letters included.
    pub fn recovered_from_disk(&self, records: u64) {
        self.recovered_from_disk.fetch_add(records, Relaxed);
    }

    /// The API has the records, which came out of `lane`.
    pub fn delivered<'r>(&self, lane: LaneId, records: impl IntoIterator<Item = &'r Record>) {
        let counters = self.lane(lane);
        let now_us = unix_us();
        let mut delivered = 0;
        let mut recovered = 0;
        let mut redelivered = 0;
        // Locked once, however many records.
        let mut memory = self.memory.lock();
        for record in records {
            let (flags, key) = memory.look_up(record);
            match count(Transition::Delivered, flags, self.is_own(record)) {
                CountedAs::Redelivered => {
                    redelivered += 1;
                    continue;
                }
                CountedAs::Delivered => {
                    if let Some(origin) = &record.origin {
                        let us = now_us.saturating_sub(origin.at_us);
                        counters.delivery.record(Duration::from_micros(us));
                    }
                }
                _ => recovered += 1,
            }
            delivered += 1;
            if let Some(key) = key {
                memory.add_delivered(lane, key);
            }
        }
        drop(memory);
        counters.recovered.fetch_add(recovered, Relaxed);
        counters.delivered.fetch_add(delivered, Relaxed);
        counters.redelivered.fetch_add(redelivered, Relaxed);
        if delivered > 0 {
            counters.last_delivery_us.store(now_us, Relaxed);
        }
    }

    /// The dead letter of a record that came out of `lane` is on disk.
    pub fn dead(&self, lane: LaneId, record: &Record) {
        let is_recovered =
            self.end(Transition::Dead, Flags::DEAD, record) == CountedAs::DeadAndRecovered;
        let lane = self.lane(lane);
        lane.recovered.fetch_add(is_recovered.into(), Relaxed);
        lane.dead.fetch_add(1, Relaxed);
    }

    /// An operator has removed `records` dead letters.
    pub fn dropped(&self, records: u64) {
        self.dropped.fetch_add(records, Relaxed);
    }

    /// No lane and no spool has confirmed the record, and its client was told so.
    pub fn refused(&self, record: &Record) {
        if self.end(Transition::Refused, Flags::REFUSED, record) == CountedAs::RefusedTooLate {
            self.refused_too_late.fetch_add(1, Relaxed);
        }
    }

    /// Adopts a record that was found on disk: this run answers for it from now on. `None` if the API has it: an earlier run
    /// published it, and was killed before it had deleted the entry.
    pub fn adopt(&self, mut found: Record) -> Option<Record> {
        let Some(origin) = found
            .origin
            .as_mut()
            .filter(|origin| origin.run != self.run)
        else {
            return Some(found);
        };
        origin.run = Arc::clone(&self.run);
        let mut memory = self.memory.lock();
        let (flags, key) = memory.look_up(&found);
        // The run was changed: the record is not this run's own.
        if count(Transition::Adopted, flags, false) == CountedAs::DoubleCounted {
            self.double_counted.fetch_add(1, Relaxed);
            return None;
        }
        if let Some(key) = key {
            memory.add(Flags::ADOPTED, key, flags);
        }
        Some(found)
    }

    /// A lane that was given the record has not confirmed it, and may have it all the same. The record goes on by another way: if
    /// both deliver it, it is one record.
    pub fn maybe_published(&self, record: &Record) {
        let mut memory = self.memory.lock();
        let (flags, key) = memory.look_up(record);
        if let Some(key) = key {
            memory.add(Flags::MAYBE_PUBLISHED, key, flags);
        }
    }

    /// Whether a lane may have the record without having confirmed it, in this run or in an earlier one.
    pub fn is_maybe_published(&self, record: &Record) -> bool {
        self.memory.lock().is_maybe_published(record)
    }

    /// Whether the API is known to have the record. The same id, taken in again, is another record. A dead letter is not delivered:
    /// a copy that comes later may be its replay.
    pub fn is_delivered(&self, record: &Record) -> bool {
        self.memory.lock().look_up(record).0.has(Flags::DELIVERED)
    }

    /// Counts an event that gives `record` the flag `flag`, unless it comes too late.
    fn end(&self, event: Transition, flag: Flags, record: &Record) -> CountedAs {
        let mut memory = self.memory.lock();
        let (flags, key) = memory.look_up(record);
        let counted = count(event, flags, self.is_own(record));
        if let Some(key) = key
            && counted != CountedAs::RefusedTooLate
        {
            memory.add(flag, key, flags);
        }
        counted
    }

    /// Whether this run took the record in.
    fn is_own(&self, record: &Record) -> bool {
        record
            .origin
            .as_ref()
            .is_some_and(|origin| origin.run == self.run)
    }

    /// A POST of `lane` that began at `began` has ended.
    pub fn posted(&self, lane: LaneId, began: Instant) {
        self.lane(lane).post.record_since(began);
    }

    /// A request that came at `began` was answered with `code`.
    pub fn answered(&self, code: u16, began: Instant) {
        self.requests
            .lock()
            .entry(code)
            .or_default()
            .record_since(began);
    }

    /// A record came out of `lane` that the API has already.
    pub fn redelivered(&self, lane: LaneId) {
        self.lane(lane).redelivered.fetch_add(1, Relaxed);
    }

    /// The counts of one lane.
    pub fn counts(&self, lane: LaneId) -> Counts {
        let lane = self.lane(lane);
        // Ends first: a record that ends between the reads is accepted by the last.
        let delivered = lane.delivered.load(Relaxed);
        let dead = lane.dead.load(Relaxed);
        Counts {
            accepted: lane.accepted.load(Relaxed),
            resent: lane.resent.load(Relaxed),
            recovered: lane.recovered.load(Relaxed),
            delivered,
            dead,
            redelivered: lane.redelivered.load(Relaxed),
        }
    }

    /// The counts of all lanes together.
    pub fn totals(&self) -> Counts {
        let too_late = Counts {
            recovered: self.refused_too_late.load(Relaxed),
            ..Counts::default()
        };
        LaneId::ALL
            .into_iter()
            .map(|lane| self.counts(lane))
            .fold(too_late, |sum, lane| Counts {
                accepted: sum.accepted + lane.accepted,
                resent: sum.resent + lane.resent,
                recovered: sum.recovered + lane.recovered,
                delivered: sum.delivered + lane.delivered,
                dead: sum.dead + lane.dead,
                redelivered: sum.redelivered + lane.redelivered,
            })
    }

    /// The counts of the node, its disk included.
    pub fn balance(&self, stats: &SpoolStats) -> Balance {
        // Read first: the records that it takes away were counted before.
        let double_counted = self.double_counted.load(Relaxed);
        let from_disk = self.recovered_from_disk.load(Relaxed);
        let lanes = self.totals();
        Balance {
            accepted: lanes.accepted + self.spooled.load(Relaxed),
            // Records of an earlier run in the gRPC lane are counted when they end, since two copies of a record are one.
            recovered: lanes.recovered + from_disk + stats.found_carried - double_counted,
            delivered: lanes.delivered,
            dead: stats.records(Queue::Dead),
            dropped: self.dropped.load(Relaxed),
            spooled: stats.waiting(),
            in_flight: lanes.in_flight() + stats.found_carried,
            redelivered: lanes.redelivered,
        }
    }

    /// Whether the counts did not add up when they last stood still: see [`audit`].
    pub fn is_imbalanced(&self) -> bool {
        self.imbalanced.load(Relaxed)
    }

    /// Records that `lane` has and the API has not.
    pub fn in_flight(&self, lane: LaneId, stats: &SpoolStats) -> u64 {
        self.counts(lane).in_flight()
            + if lane == LaneId::Grpc {
                stats.found_carried
            } else {
                0
            }
    }

    /// Records answered with a receipt of the spool.
    pub fn receipts_of_spool(&self) -> u64 {
        self.spooled.load(Relaxed)
    }

    /// The time of the last delivery, in µs since the Unix epoch; 0 for none.
    pub fn last_delivery_us(&self, lane: LaneId) -> u64 {
        self.lane(lane).last_delivery_us.load(Relaxed)
    }

    /// From handing a record to the lane to its confirm.
    pub const fn publish_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).publish
    }

    /// From a POST to its answer or failure.
    pub const fn post_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).post
    }

    /// From accepted to delivered.
    pub const fn delivery_times(&self, lane: LaneId) -> &Latency {
        &self.lane(lane).delivery
    }

    /// Calls `read` with each status of ingest and the times of its answers.
    pub fn for_each_status(&self, mut read: impl FnMut(u16, &Latency)) {
        for (code, times) in &*self.requests.lock() {
            read(*code, times);
        }
    }

    const fn lane(&self, lane: LaneId) -> &LaneCounters {
        &self.lanes[lane as usize]
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use tokio::{sync::watch, time::sleep};

    use super::{balance::REST, *};
    use crate::record::Origin;

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
        ledger.recovered_from_disk(3);
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
        let given = ledger.adopt(found.clone()).unwrap();
        assert_eq!(given, record("a", "run"));
        ledger.resent(LaneId::Nats, Duration::ZERO);
        assert!(!ledger.is_delivered(&found));
        ledger.delivered(LaneId::Nats, [&found]);
        assert!(ledger.is_delivered(&found) && ledger.is_delivered(&given));
        assert_eq!(balance(), (3, 1, 0, 0));
        // Given to the lane once more, as the feeder's next life does.
        assert_eq!(ledger.adopt(found), Some(given));

        // Both come out, the one in the name of a third run.
        let found = record("b", "replay");
        let given = ledger.adopt(found.clone()).unwrap();
        ledger.resent(LaneId::Nats, Duration::ZERO);
        ledger.delivered(LaneId::Nats, [&given]);
        ledger.delivered(LaneId::Nats, [&record("b", "earlier")]);
        assert_eq!(balance(), (3, 2, 0, 1));

        // It comes out before it is found.
        let found = record("c", "earlier");
        ledger.delivered(LaneId::Nats, [&found]);
        assert_eq!(ledger.adopt(found), None);
        assert_eq!(balance(), (3, 3, 0, 1));

        // What this run has put there, and what no node took in, goes as it is.
        for own in [
            record("d", "run"),
            Record {
                origin: None,
                ..record("e", "run")
            },
        ] {
            assert_eq!(ledger.adopt(own.clone()), Some(own));
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
        let (_spool, stats) = watch::channel(SpoolStats::default());
        tokio::spawn(audit(Arc::clone(&ledger), stats));
        ledger.dropped(1);
        sleep(3 * REST).await;
        assert!(ledger.is_imbalanced());
        ledger.spooled();
        sleep(3 * REST).await;
        assert!(!ledger.is_imbalanced());
    }
}
