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
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time};
use tracing_mutex::parkinglot::{Mutex, MutexGuard};

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
