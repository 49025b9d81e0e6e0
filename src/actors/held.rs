//! Records that came out of a lane while their API had no place for them. They wait on disk, and
//! hold up no record of another API.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};
use tracing::{debug, error, warn};
use tracing_mutex::parkinglot::Mutex;

use crate::{
    clock::unix_us,
    delivery::HeldEntry,
    lane_id::{LaneId, PerLane},
    record::{Record, Tag},
    spool::{DeathReason, Entry, EntryKey, NotSafe, Parked, Queue, Spool, SpoolStats, Tail},
};

/// It is logged once in this time that records are held, or cannot be.
const EPISODE: Duration = Duration::from_mins(1);
/// The part of its size that an API's spool keeps free for records that a lane has already.
const RESERVE: u64 = 8;
/// The pause before a record is moved that could not be.
const MOVE_AGAIN: Duration = Duration::from_secs(1);

/// Puts the records of one API on disk. Clones share it.
#[derive(Clone)]
pub struct HeldRecords {
    spool: Spool,
    /// The name of the API, for the log.
    api: Arc<str>,
    /// This run of the node.
    run: Arc<str>,
    told_at: Arc<Mutex<Option<Instant>>>,
    told_full_at: Arc<Mutex<Option<Instant>>>,
    /// Of each lane, the records here whose POST has begun before they came here.
    moved: Arc<PerLane<AtomicU64>>,
}

impl HeldRecords {
    pub fn new(spool: Spool, api: Arc<str>, run: Arc<str>) -> Self {
        Self {
            spool,
            api,
            run,
            told_at: Arc::default(),
            told_full_at: Arc::default(),
            moved: Arc::default(),
        }
    }

    pub const fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Whether records that came out of `lane` wait here for their POST.
    pub fn has_waiting(&self, lane: LaneId) -> bool {
        let moved = self.moved[lane as usize].load(Relaxed);
        self.spool.stats().records(Queue::Held(lane)) > moved
    }

    /// The lanes whose records wait here.
    pub fn lanes(&self) -> impl Iterator<Item = LaneId> {
        let stats = self.spool.stats();
        let lanes = LaneId::ALL.into_iter();
        lanes.filter(move |lane| stats.records(Queue::Held(*lane)) > 0)
    }

    /// Whether only the room for records that lanes have already is left.
    pub fn is_nearly_full(&self) -> bool {
        let stats = self.spool.stats();
        stats.refuses || self.bytes_over(&stats) > 0
    }

    /// The bytes that have to go before a record of a client finds room.
    pub fn bytes_over(&self, stats: &SpoolStats) -> u64 {
        let max = self.spool.max();
        (stats.bytes + max / RESERVE + 1).saturating_sub(max)
    }

    /// Resolves when `record`, which came out of `lane`, is on disk.
    ///
    /// # Errors
    /// If it cannot be written. The record must stay where it is.
    pub async fn put(&self, lane: LaneId, tag: &Tag, record: &Record) -> Result<(), NotSafe> {
        let entry = self.entry(lane, tag, record, "not POSTed yet: it waits for a place");
        let put = self.spool.put(Queue::Held(lane), &entry).await;
        self.tell_refused(lane, put).map(drop)
    }

    /// The same for a record that is being POSTed: no [tail](Self::tail) that reads now yields it.
    /// Returns the record as it is on disk.
    ///
    /// # Errors
    /// If it cannot be written. The record must stay where it is.
    pub async fn put_moved(
        &self,
        lane: LaneId,
        tag: &Tag,
        record: &Record,
    ) -> Result<(EntryKey, Record), NotSafe> {
        let entry = self.entry(lane, tag, record, "its POST had not ended");
        let put = self.spool.put_held(Queue::Held(lane), &entry).await;
        let key = self.tell_refused(lane, put)?;
        Ok((key, entry.record()))
    }

    /// Lets a record that was moved here not count as waiting, until it is dropped.
    pub fn moved(&self, lane: LaneId) -> MovedRecord {
        self.moved[lane as usize].fetch_add(1, Relaxed);
        MovedRecord {
            moved: Arc::clone(&self.moved),
            lane,
        }
    }

    fn entry(&self, lane: LaneId, tag: &Tag, record: &Record, answer: &str) -> Entry {
        let now_us = unix_us();
        let mut entry = Entry::new(
            record,
            Some(DeathReason {
                lane: lane.name().to_owned(),
                at_us: now_us,
                answer: answer.into(),
                ..DeathReason::default()
            }),
        );
        entry.set_missing_origin(&self.run, now_us);
        entry.parked = Some(Parked {
            due_us: now_us,
            pauses: 0,
            tag: tag.name().to_owned(),
            proven: false,
        });
        entry
    }

    /// Logs, once in a while, that a record cannot be held.
    fn tell_refused<T>(&self, lane: LaneId, put: Result<T, NotSafe>) -> Result<T, NotSafe> {
        put.inspect_err(|why| {
            if is_to_be_told(&self.told_full_at) {
                error!(
                    api = &*self.api,
                    %lane,
                    reason = %why,
                    "records cannot be held on disk: they hold up the lane until their API takes them"
                );
            }
        })
    }

    /// Logs, once in a while, that records of the API are held.
    pub fn tell(&self, lane: LaneId) {
        if is_to_be_told(&self.told_at) {
            warn!(
                api = &*self.api,
                %lane,
                "the API does not take its records as fast as they come: they are held on this \
                 node's disk, and hold up no other API"
            );
        }
    }

    /// Logs, once in a while, that a record is for an API which is not configured.
    pub fn tell_unclaimed(&self, lane: LaneId, record: &Record) {
        if is_to_be_told(&self.told_at) {
            error!(
                api = record.api.as_deref(),
                %lane,
                id = &*record.id,
                "a record is for an API that is not configured at this node: it is held on disk \
                 until [apis.NAME] is there and the node is started again"
            );
        }
    }

    /// Reads the records that came out of `lane`, `batch` at a time.
    pub fn tail(&self, lane: LaneId, batch: u32, window: Arc<Semaphore>) -> Tail {
        self.spool.tail_by(batch, Queue::Held(lane), window)
    }

    /// Removes a record. Returns whether it was still there: an operator may have taken it.
    ///
    /// # Errors
    /// If the spool is closed.
    pub async fn remove(&self, held: &HeldEntry) -> Result<bool, NotSafe> {
        self.spool.remove(held.key).await
    }

    /// Moves the records that came out of `lane`, each to where `held_by` says by the name of its
    /// API. The others stay. Ends with the spool.
    pub async fn move_all<'h>(
        &self,
        lane: LaneId,
        held_by: impl Fn(Option<&str>) -> Option<&'h Self>,
    ) {
        let mut tail = self.tail(lane, 1, Arc::new(Semaphore::new(1)));
        while let Some((key, entry, _permit)) = tail.next().await {
            if let Some(to) = held_by(entry.api.as_deref()) {
                while let Err(why) = to.spool.put(Queue::Held(lane), &entry).await {
                    debug!(id = entry.id, reason = %why, "a record is not moved to its API yet");
                    if why == NotSafe::Closed {
                        return;
                    }
                    sleep(MOVE_AGAIN).await;
                }
                self.spool.settle(key);
            }
        }
    }
}

/// A record on disk whose POST has begun before it came there.
pub struct MovedRecord {
    moved: Arc<PerLane<AtomicU64>>,
    lane: LaneId,
}

impl Drop for MovedRecord {
    fn drop(&mut self) {
        self.moved[self.lane as usize].fetch_sub(1, Relaxed);
    }
}

/// An entry of the disk, read for its POST.
pub struct HeldRecord {
    pub record: Record,
    pub held: HeldEntry,
    pub permit: OwnedSemaphorePermit,
}

impl HeldRecord {
    pub fn new((key, entry, permit): (EntryKey, Entry, OwnedSemaphorePermit)) -> Self {
        let tag = entry.parked.as_ref().map(|parked| Tag::new(&parked.tag));
        Self {
            record: entry.record(),
            held: HeldEntry {
                key,
                tag: tag.unwrap_or_else(|| Tag::new("")),
            },
            permit,
        }
    }
}

fn is_to_be_told(told_at: &Mutex<Option<Instant>>) -> bool {
    let now = Instant::now();
    let mut told_at = told_at.lock();
    let is_new = told_at.is_none_or(|at| now - at >= EPISODE);
    if is_new {
        *told_at = Some(now);
    }
    is_new
}
