//! The ledger: one count per transition of a record, made at the one place where it happens.
//!
//! At rest, `accepted + recovered = delivered + handed_over + dead + dropped + spooled + parked +
//! in_flight + missing`: see [`Balance::holds`].
//!
//! Nodes that share a broker take each other's records. The node that accepted a record counts it
//! as `handed_over` once the broker has it no more, and the node that delivered it counts it as
//! `recovered` and as [`taken_over`](LaneLedger::taken_over), by the run that had accepted it. Over
//! all nodes of a broker, what a run has handed over is what was taken over of it, or records are
//! missing. `comparison` says how a node finds what is gone, and what is `missing` to itself.

mod balance;
mod comparison;
mod counts;
mod delivery_times;
mod latency;
mod memory;
mod progress;
mod refusals;
mod rules;
mod steps;
mod taken;
mod taken_file;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time};

pub use self::{
    balance::{Balance, audit},
    comparison::{Finding, Present},
    counts::{ApiCounts, Counts, LaneLedger, NodeCounts, Posting},
    delivery_times::DeliveryTimes,
    latency::{BOUNDS_S, Latency, Quantiles},
    progress::LaneProgress,
    refusals::Refusals,
    steps::{Step, StepLog, ToldStep},
    taken_file::TakenFile,
};
use self::{
    memory::{FlagMemory, Flags},
    rules::{CountedAs, Transition, count},
};
use crate::{
    changes::{Change, ChangeLog, ShortReason},
    clock::unix_us,
    lane_id::LaneId,
    record::Record,
};

/// The counts of one node since its start.
pub struct Ledger {
    /// This run of the node. A record with another origin is of an earlier run, or of another node.
    pub run: Arc<str>,
    pub started: Instant,
    lanes: [Mutex<LaneLedger>; LaneId::ALL.len()],
    node: Mutex<NodeCounts>,
    memory: Mutex<FlagMemory>,
    /// From a request's head to its answer, by the answer's status.
    requests: Mutex<BTreeMap<u16, Latency>>,
    /// The last result of [`audit`].
    imbalanced: AtomicBool,
    /// Notified when a record was taken over.
    taken_over: Notify,
    change_log: ChangeLog,
    pub steps: StepLog,
}

impl Ledger {
    pub fn new(run: Arc<str>) -> Self {
        Self {
            run,
            started: Instant::now(),
            lanes: Default::default(),
            node: Mutex::default(),
            memory: Mutex::default(),
            requests: Mutex::default(),
            imbalanced: AtomicBool::new(false),
            taken_over: Notify::new(),
            change_log: ChangeLog::default(),
            steps: StepLog::default(),
        }
    }

    /// The same ledger, with the log that gets its changes.
    #[must_use]
    pub fn with_change_log(self, change_log: ChangeLog) -> Self {
        Self { change_log, ..self }
    }

    /// `lane` has confirmed a record, and its client has a receipt. The confirm took `after`.
    pub fn accepted(&self, lane: LaneId, record: &Record, after: Duration) {
        self.confirmed(lane, after).counts.accepted += 1;
        self.steps.add(record, Step::Confirmed(lane), unix_us());
        let mut memory = self.memory.lock();
        if memory.is_maybe_published(record)
            && let (_, Some(key)) = memory.look_up(record)
        {
            let ended = memory.confirm(lane, key);
            drop(memory);
            self.moved(lane, ended);
        }
    }

    /// `lane` has confirmed a record from the spool. The confirm took `after`.
    pub fn resent(&self, lane: LaneId, record: &Record, after: Duration) {
        self.steps.add(record, Step::Confirmed(lane), unix_us());
        let mut memory = self.memory.lock();
        let (flags, key) = memory.look_up(record);
        let counted = count(Transition::Resent, flags, self.is_own(record));
        let is_first = counted == CountedAs::Resent;
        let mut ended = None;
        if let Some(key) = key {
            memory.add(Flags::RESENT, key);
            if is_first {
                ended = memory.confirm(lane, key);
            }
        }
        drop(memory);
        self.node.lock().double_counted += u64::from(counted == CountedAs::DoubleCounted);
        {
            let mut ledger = self.confirmed(lane, after);
            ledger.counts.resent += u64::from(is_first);
            ledger.readopted += u64::from(is_first && flags.has(Flags::ADOPTED));
        }
        self.moved(lane, ended);
    }

    fn confirmed(&self, lane: LaneId, after: Duration) -> MutexGuard<'_, LaneLedger> {
        let mut ledger = self.lane(lane);
        if ledger.counts.in_flight() == 0 {
            ledger.progress.begins();
        }
        ledger.publish.record(after);
        if ledger.refusals.confirmed(lane, Instant::now) {
            let refusing = None;
            self.change_log.add(Change::Refusal { lane, refusing });
        }
        ledger
    }

    /// The broker of `lane` does not take `records` for now.
    pub fn refused_by(&self, lane: LaneId, reason: &str, records: u64) {
        let now = Instant::now();
        let refusals = &mut self.lane(lane).refusals;
        if refusals.refused(lane, reason, records, now) {
            let refusing = Some(ShortReason(reason));
            self.change_log.add(Change::Refusal { lane, refusing });
        }
    }

    /// A record that `lane` has confirmed ended in lane `to`. Its count moves there.
    fn moved(&self, lane: LaneId, to: Option<LaneId>) {
        if let Some(to) = to {
            self.lane(lane).counts.moved += 1;
            self.lane(to).counts.resent += 1;
        }
    }

    /// A client has the spool's receipt for the record.
    pub fn spooled(&self, record: &Record) {
        self.steps.add(record, Step::Spooled, unix_us());
        self.node.lock().spooled += 1;
    }

    /// An earlier run has left `records` in the spool, dead letters included.
    pub fn recovered_from_disk(&self, records: u64) {
        self.node.lock().recovered_from_disk += records;
    }

    /// The API has the records, which came out of `lane`. Returns the longest time from accepted to
    /// delivered of those that this run accepted, if it has accepted any.
    pub fn delivered<'r>(
        &self,
        lane: LaneId,
        records: impl IntoIterator<Item = &'r Record>,
    ) -> Option<Duration> {
        let now_us = unix_us();
        let mut longest = None;
        let mut moved = Vec::new();
        let mut taken = false;
        // Locked once, however many records.
        let mut ledger = self.lane(lane);
        let mut memory = self.memory.lock();
        for record in records {
            let (flags, key) = memory.look_up(record);
            match count(Transition::Delivered, flags, self.is_own(record)) {
                CountedAs::Redelivered => {
                    ledger.counts.redelivered += 1;
                    continue;
                }
                CountedAs::Delivered => {
                    if let Some(origin) = &record.origin {
                        let us = now_us.saturating_sub(origin.at_us);
                        let took = Duration::from_micros(us);
                        ledger.delivery.record(record, took, now_us);
                        longest = longest.max(Some(took));
                    }
                    moved.extend(memory.confirmed_by_another(lane, flags, key));
                }
                _ => {
                    ledger.counts.recovered += 1;
                    taken |= ledger.taken_over.count(record, &self.run);
                }
            }
            ledger.counts.delivered += 1;
            ledger.progress.last_delivery_us = now_us;
            ledger.progress.came_out(record);
            if let Some(key) = key {
                memory.add_delivered(lane, key);
            }
        }
        drop((memory, ledger));
        if taken {
            self.taken_over.notify_one();
        }
        for from in moved {
            self.moved(from, Some(lane));
        }
        longest
    }

    /// The dead letter of a record that came out of `lane` is on disk.
    pub fn dead(&self, lane: LaneId, record: &Record) {
        self.steps.add(record, Step::Dead(lane), unix_us());
        let mut ledger = self.set_aside(lane, record, Transition::Dead, Flags::DEAD);
        ledger.counts.dead += 1;
    }

    /// A record that came out of `lane` is parked on disk.
    pub fn parked(&self, lane: LaneId, record: &Record) {
        self.steps.add(record, Step::Parked(lane), unix_us());
        let mut ledger = self.set_aside(lane, record, Transition::Parked, Flags::PARKED);
        ledger.counts.parked += 1;
    }

    /// Counts where a record comes from that is not delivered by `lane`. The caller counts `event`.
    fn set_aside(
        &self,
        lane: LaneId,
        record: &Record,
        event: Transition,
        flag: Flags,
    ) -> MutexGuard<'_, LaneLedger> {
        let mut memory = self.memory.lock();
        let (flags, key) = memory.look_up(record);
        let counted = count(event, flags, self.is_own(record));
        let is_counted = matches!(counted, CountedAs::Dead | CountedAs::Parked);
        let moved = memory.confirmed_by_another(lane, flags, key);
        if let Some(key) = key {
            memory.add_end(flag, lane, key);
        }
        drop(memory);
        if let Some(from) = moved.filter(|_| is_counted) {
            self.moved(from, Some(lane));
        }
        let mut ledger = self.lane(lane);
        ledger.progress.came_out(record);
        if !is_counted {
            ledger.counts.recovered += 1;
            if ledger.taken_over.count(record, &self.run) {
                self.taken_over.notify_one();
            }
        }
        ledger
    }

    /// The API has a record that was parked, and before that came out of `lane`.
    pub fn delivered_parked(&self, lane: LaneId, record: &Record) {
        let now_us = unix_us();
        let mut ledger = self.lane(lane);
        ledger.counts.unparked += 1;
        ledger.counts.delivered += 1;
        ledger.progress.last_delivery_us = now_us;
        if let Some(origin) = &record.origin {
            let us = now_us.saturating_sub(origin.at_us);
            let took = Duration::from_micros(us);
            ledger.delivery.record(record, took, now_us);
        }
        let mut memory = self.memory.lock();
        if let (_, Some(key)) = memory.look_up(record) {
            memory.add_delivered(lane, key);
        }
    }

    /// The dead letter of a record that was parked is on disk.
    pub fn dead_parked(&self, lane: LaneId) {
        let mut lane = self.lane(lane);
        lane.counts.unparked += 1;
        lane.counts.dead += 1;
    }

    /// A copy of a parked record was delivered, and the parked one was removed.
    pub fn parked_twice(&self) {
        self.node.lock().double_counted += 1;
    }

    /// An operator has removed `records` dead letters or parked records.
    pub fn dropped(&self, records: u64) {
        self.node.lock().dropped += records;
    }

    /// No lane and no spool has confirmed the record, and its client got an error.
    pub fn refused(&self, record: &Record) {
        let mut memory = self.memory.lock();
        let (flags, Some(key)) = memory.look_up(record) else {
            return;
        };
        memory.add(Flags::REFUSED, key);
        if count(Transition::Refused, flags, self.is_own(record)) != CountedAs::RefusedTooLate {
            return;
        }
        let ended = memory.lanes(&key).ended;
        drop(memory);
        if let Some(lane) = ended {
            self.lane(lane).counts.recovered += 1;
        }
    }

    /// Adopts a record that was found on disk: from now on it counts as a record of this run.
    /// `None` if the API has it: an earlier run published it, and was killed before it had deleted
    /// the entry.
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
            self.node.lock().double_counted += 1;
            return None;
        }
        if let Some(key) = key {
            memory.add(Flags::ADOPTED, key);
        }
        Some(found)
    }

    /// A lane that was given the record has not confirmed it, and may have it all the same. The
    /// record goes on by another way. If both deliver it, it counts as one record.
    pub fn maybe_published(&self, record: &Record) {
        let mut memory = self.memory.lock();
        if let (_, Some(key)) = memory.look_up(record) {
            memory.add(Flags::MAYBE_PUBLISHED, key);
        }
    }

    /// Whether a lane may have the record without having confirmed it, in this run or in an earlier
    /// one.
    pub fn is_maybe_published(&self, record: &Record) -> bool {
        self.memory.lock().is_maybe_published(record)
    }

    /// Whether the API is known to have the record. The same id, accepted again, is another record.
    /// A dead letter is not delivered: a copy that comes later may be its replay.
    pub fn is_delivered(&self, record: &Record) -> bool {
        self.memory.lock().look_up(record).0.has(Flags::DELIVERED)
    }

    /// Whether the API is known to have the record, or it is a dead letter or parked.
    pub fn has_ended(&self, record: &Record) -> bool {
        let flags = self.memory.lock().look_up(record).0;
        flags.has(Flags::DELIVERED | Flags::DEAD | Flags::PARKED)
    }

    /// Whether this run accepted the record.
    pub fn is_own(&self, record: &Record) -> bool {
        record
            .origin
            .as_ref()
            .is_some_and(|origin| origin.run == self.run)
    }

    /// A POST of `lane`, with this `Idempotency-Key`, has ended. It began and ended at these times, in
    /// microseconds since the Unix epoch. `status` is that of its answer; without an answer, 0.
    pub fn posted(&self, lane: LaneId, key: &str, [began_us, ended_us]: [u64; 2], status: u16) {
        let took = Duration::from_micros(ended_us.saturating_sub(began_us));
        self.lane(lane).post.record(took);
        let step = Step::Posted { lane, took, status };
        self.steps.add_post(key, step, ended_us);
    }

    /// A request that came at `began` was answered with `code`.
    pub fn answered(&self, code: u16, began: Instant) {
        let mut requests = self.requests.lock();
        requests.entry(code).or_default().record(began.elapsed());
    }

    /// A record came out of `lane` that the API has already.
    pub fn redelivered(&self, lane: LaneId) {
        self.lane(lane).counts.redelivered += 1;
    }

    /// Compares the records of `lane` that are in flight with those that are `present`, and counts
    /// those that are gone. `before` are the lane's counts from before its broker was asked.
    pub fn compare(&self, lane: LaneId, before: &Counts, present: Present) -> Option<Finding> {
        self.lane(lane)
            .compare(before, present, time::Instant::now())
    }

    /// Locks the counts and times of one lane. Nothing else of this lane is counted meanwhile.
    pub fn lane(&self, lane: LaneId) -> MutexGuard<'_, LaneLedger> {
        self.lanes[lane as usize].lock()
    }

    /// The counts that belong to no lane.
    pub fn node(&self) -> NodeCounts {
        *self.node.lock()
    }

    /// Locks the times of requests, by the status of their answers.
    pub fn requests(&self) -> MutexGuard<'_, BTreeMap<u16, Latency>> {
        self.requests.lock()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use bytes::Bytes;
    use tokio::{sync::watch, time::sleep};

    use super::{balance::REST, *};
    use crate::{record::Origin, spool::SpoolStats};

    fn record(id: &str, run: &str) -> Record {
        let origin = Some(Origin {
            run: Arc::from(run),
            at_us: 1,
        });
        Record {
            id: Arc::from(id),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin,
            api: None,
            event: None,
        }
    }

    #[test]
    fn each_record_counts_once_however_often_it_comes() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
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
        assert_eq!(ledger.lane(LaneId::Grpc).counts, expected);
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
        ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
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

    /// Parks records, and counts their copies by `copy`. Each number is a term of the equation.
    #[track_caller]
    fn parked(records: u64, count: impl FnOnce(&Ledger)) -> (u64, u64, u64, u64) {
        let ledger = Ledger::new(Arc::from("run"));
        count(&ledger);
        let balance = ledger.balance(&SpoolStats::default());
        let sum = balance.delivered + balance.dead + balance.dropped + records + balance.in_flight;
        assert_eq!(balance.accepted + balance.recovered, sum, "{balance:?}");
        (
            balance.recovered,
            balance.delivered,
            records,
            balance.in_flight,
        )
    }

    #[test]
    fn a_parked_record_balances_and_so_does_its_end() {
        let lane = LaneId::Nats;
        let [own, earlier] = [record("a", "run"), record("a", "earlier")];
        let accept = |ledger: &Ledger| ledger.accepted(lane, &own, Duration::ZERO);
        assert_eq!(
            parked(1, |ledger| {
                accept(ledger);
                ledger.parked(lane, &own);
            }),
            (0, 0, 1, 0)
        );
        assert_eq!(
            parked(0, |ledger| {
                accept(ledger);
                ledger.parked(lane, &own);
                ledger.delivered_parked(lane, &own);
                assert!(ledger.is_delivered(&own));
            }),
            (0, 1, 0, 0)
        );
        // Another node took it in, or an earlier run.
        assert_eq!(
            parked(0, |ledger| {
                ledger.parked(lane, &earlier);
                ledger.delivered_parked(lane, &earlier);
            }),
            (1, 1, 0, 0)
        );
        // An earlier run parked it.
        assert_eq!(
            parked(0, |ledger| {
                ledger.recovered_from_disk(1);
                ledger.delivered_parked(lane, &earlier);
            }),
            (1, 1, 0, 0)
        );
        // The broker sends it again, and the copy arrives first.
        assert_eq!(
            parked(0, |ledger| {
                accept(ledger);
                ledger.parked(lane, &own);
                ledger.delivered(lane, [&own]);
                ledger.parked_twice();
            }),
            (0, 1, 0, 0)
        );
        // An operator replays or drops it while it is POSTed.
        assert_eq!(
            parked(0, |ledger| {
                accept(ledger);
                ledger.parked(lane, &own);
                ledger.dropped(1);
                ledger.delivered(lane, [&own]);
            }),
            (1, 1, 0, 0)
        );
    }

    #[test]
    fn a_record_of_an_earlier_run_balances_as_recovered() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.delivered(LaneId::Nats, [&record("a", "earlier")]);
        let mut foreign = record("b", "run");
        foreign.origin = None;
        ledger.delivered(LaneId::Nats, [&foreign]);
        assert!(!ledger.is_delivered(&foreign));
        let counts = ledger.lane(LaneId::Nats).counts;
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
        // The first twice.
        ledger.recovered_from_disk(4);
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
        ledger.resent(LaneId::Nats, &given, Duration::ZERO);
        assert!(!ledger.is_delivered(&found));
        ledger.delivered(LaneId::Nats, [&found]);
        assert!(ledger.is_delivered(&found) && ledger.is_delivered(&given));
        assert_eq!(balance(), (4, 1, 0, 0));
        // A power cut has left a second entry of it.
        assert_eq!(ledger.adopt(found), None);
        assert_eq!(balance(), (3, 1, 0, 0));

        // Both come out, the one in the name of a third run.
        let found = record("b", "replay");
        let given = ledger.adopt(found.clone()).unwrap();
        ledger.resent(LaneId::Nats, &given, Duration::ZERO);
        ledger.delivered(LaneId::Nats, [&given]);
        ledger.delivered(LaneId::Nats, [&record("b", "earlier")]);
        assert_eq!(balance(), (3, 2, 0, 1));

        // It comes out before it is found.
        let found = record("c", "earlier");
        ledger.delivered(LaneId::Nats, [&found]);
        assert_eq!(ledger.adopt(found), None);
        assert_eq!(balance(), (3, 3, 0, 1));

        // A record that this run accepted, or that no node accepted, stays unchanged.
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

    const ENDS: [fn(&Ledger, LaneId, &Record); 2] = [
        |ledger, lane, record| {
            ledger.delivered(lane, [record]);
        },
        Ledger::dead,
    ];

    /// One lane may have the record, and the other has confirmed it. Both copies come out.
    #[test]
    fn a_record_that_lies_in_two_lanes_is_in_flight_in_none_once_it_has_ended() {
        let [silent, other] = [LaneId::Nats, LaneId::Rabbitmq];
        for end in ENDS {
            for is_confirmed_first in [true, false] {
                let ledger = Ledger::new(Arc::from("run"));
                let record = record("a", "run");
                ledger.maybe_published(&record);
                if !is_confirmed_first {
                    end(&ledger, silent, &record);
                }
                ledger.accepted(other, &record, Duration::ZERO);
                if is_confirmed_first {
                    assert_eq!(ledger.lane(other).counts.in_flight(), 1);
                    end(&ledger, silent, &record);
                }
                end(&ledger, other, &record);
                for lane in [silent, other] {
                    let counts = ledger.lane(lane).counts;
                    let (came, ended) = counts.moves();
                    assert_eq!(came, ended, "{lane} {is_confirmed_first}");
                }
            }
        }
    }

    /// Two lanes may have the record, and it comes out of both before a third confirms it.
    #[test]
    fn a_record_that_has_ended_twice_before_its_confirm_is_in_flight_in_no_lane() {
        let lanes = [LaneId::Nats, LaneId::Rabbitmq, LaneId::Pubsub];
        for (first, second) in ENDS
            .into_iter()
            .flat_map(|end| ENDS.map(|other| (end, other)))
        {
            let ledger = Ledger::new(Arc::from("run"));
            let record = record("a", "run");
            ledger.maybe_published(&record);
            first(&ledger, lanes[0], &record);
            second(&ledger, lanes[1], &record);
            ledger.accepted(lanes[2], &record, Duration::ZERO);
            for lane in lanes {
                let (came, ended) = ledger.lane(lane).counts.moves();
                assert_eq!(came, ended, "{lane}");
            }
        }
    }

    #[test]
    fn a_record_of_another_run_is_taken_over() {
        let ledger = Ledger::new(Arc::from("run"));
        let foreign = Record {
            origin: None,
            ..record("c", "run")
        };
        ledger.delivered(LaneId::Nats, [&record("a", "other"), &foreign]);
        ledger.delivered(LaneId::Nats, [&record("a", "other"), &record("d", "run")]);
        ledger.dead(LaneId::Nats, &record("b", "other"));
        let lane = ledger.lane(LaneId::Nats);
        let taken = lane.taken_over.by_run();
        let taken: Vec<_> = taken.map(|(run, taken)| (run, taken.records)).collect();
        assert_eq!(taken, [("other", 2)]);
    }

    #[test]
    fn two_entries_of_a_record_that_are_resent_at_once_are_one_record() {
        let ledger = Ledger::new(Arc::from("run"));
        ledger.recovered_from_disk(2);
        let given = [0, 1].map(|_| ledger.adopt(record("a", "earlier")).unwrap());
        for given in &given {
            ledger.resent(LaneId::Nats, given, Duration::ZERO);
        }
        ledger.delivered(LaneId::Nats, [&given[0]]);
        let balance = ledger.balance(&SpoolStats::default());
        assert_eq!((balance.recovered, balance.in_flight), (1, 0));
        assert!(balance.holds());
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

    #[test]
    fn a_refused_record_that_a_disk_that_hung_has_written_balances() {
        let ledger = Ledger::new(Arc::from("run"));
        let [a, b] = ["a", "b"].map(|id| record(id, "run"));
        ledger.refused(&a);
        ledger.delivered(LaneId::Nats, [&b]);
        ledger.refused(&b);
        // The feeder has read them before they were removed again.
        for refused in [&a, &b] {
            ledger.resent(LaneId::Nats, refused, Duration::ZERO);
        }
        ledger.delivered(LaneId::Nats, [&a, &b]);
        let balance = ledger.balance(&SpoolStats::default());
        assert_eq!(
            (balance.recovered, balance.delivered, balance.in_flight),
            (2, 2, 0)
        );
    }

    #[test]
    fn refusals_are_a_change_when_they_begin() {
        let ledger = Ledger::new(Arc::from("run"));
        for _ in 0..3 {
            ledger.refused_by(LaneId::Nats, "full", 1);
            ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
        }
        assert_eq!(ledger.change_log.last(), 1);
        ledger.refused_by(LaneId::Grpc, "full", 1);
        assert_eq!(ledger.change_log.last(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_imbalance_at_rest_is_reported_until_it_is_over() {
        let ledger = Arc::new(Ledger::new(Arc::from("run")));
        let (_spool, stats) = watch::channel(SpoolStats::default());
        tokio::spawn(audit(Arc::clone(&ledger), vec![stats], || false));
        ledger.dropped(1);
        sleep(3 * REST).await;
        assert!(ledger.is_imbalanced());
        assert_eq!(ledger.change_log.last(), 1);
        ledger.spooled(&record("c", "run"));
        sleep(3 * REST).await;
        assert!(!ledger.is_imbalanced());
        assert_eq!(ledger.change_log.last(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn records_that_take_turns_on_disk_are_no_imbalance_at_rest() {
        let ledger = Arc::new(Ledger::new(Arc::from("run")));
        let (spool, stats) = watch::channel(SpoolStats::default());
        tokio::spawn(audit(Arc::clone(&ledger), vec![stats], || false));
        // It is one too many whenever somebody looks.
        ledger.dropped(1);
        for _ in 0..8 {
            spool.send_modify(|stats| stats.committed += 1);
            sleep(REST / 2).await;
            assert!(!ledger.is_imbalanced());
        }
        sleep(3 * REST).await;
        assert!(ledger.is_imbalanced());
    }

    /// The lanes' counts go on while the disk stalls, and those of the disk do not.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_compared_while_a_disk_is_behind() {
        let ledger = Arc::new(Ledger::new(Arc::from("run")));
        let (_spool, stats) = watch::channel(SpoolStats::default());
        let is_behind = Arc::new(AtomicBool::new(true));
        let behind = Arc::clone(&is_behind);
        let audit = audit(Arc::clone(&ledger), vec![stats], move || {
            behind.load(Relaxed)
        });
        tokio::spawn(audit);
        ledger.dropped(1);
        sleep(5 * REST + REST / 2).await;
        assert!(!ledger.is_imbalanced());
        is_behind.store(false, Relaxed);
        sleep(REST).await;
        assert!(
            !ledger.is_imbalanced(),
            "compared with what was read before"
        );
        sleep(2 * REST).await;
        assert!(ledger.is_imbalanced());
    }
}
