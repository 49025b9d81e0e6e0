//! Copies on disk of records that a lane has confirmed. A copy stays until its record has ended, or
//! until the confirm survives a power cut of the lane's broker.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasherDefault,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::warn;

use crate::{
    lane_id::LaneId,
    recent::{Hasher128, IdentityHasher},
    record::Record,
    spool::{Entry, EntryKey, NotSafe, Position, Queue, Spool},
    transport::{BrokerInfo, Durability},
};

/// The parts of the time after which a confirm is durable. A copy stays for up to one part longer.
pub const PARTS: u32 = 8;
/// Copies are found in this many tables, so that one that grows moves few of them.
const SHARDS: usize = 16;

/// The copies of one lane, over all of its connections. Clones share them.
#[derive(Clone)]
pub struct Copies {
    lane: LaneId,
    spool: Spool,
    hasher: Arc<Hasher128>,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    /// The copies of confirmed records, by half of their fingerprints: 17 bytes each.
    shards: [HashMap<u64, Position, BuildHasherDefault<IdentityHasher>>; SHARDS],
    /// The copy that was written last.
    last: Option<Position>,
    /// The copy that was the last at each of these times.
    marks: VecDeque<(Instant, Position)>,
    broker: Option<BrokerInfo>,
}

/// A copy on disk of a record that no lane has confirmed yet. If it is dropped, it leaves the disk.
pub struct Copy {
    spool: Spool,
    key: Option<EntryKey>,
}

impl Copies {
    pub fn new(lane: LaneId, spool: Spool) -> Self {
        Self {
            lane,
            spool,
            hasher: Arc::default(),
            kept: Arc::default(),
        }
    }

    /// Resolves when a copy of `record` is on disk.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn write(&self, record: &Record) -> Result<Copy, NotSafe> {
        let queue = Queue::Kept(self.lane);
        let key = self.spool.put(queue, &Entry::new(record, None)).await?;
        Ok(Copy {
            spool: self.spool.clone(),
            key: Some(key),
        })
    }

    /// Keeps the copy of a record that the lane has confirmed, unless the confirm is durable.
    pub fn keep(&self, record: &Record, mut copy: Copy) {
        let mut kept = self.kept.lock();
        let is_durable = kept
            .broker
            .as_ref()
            .is_none_or(|broker| broker.outlives_power_cut == Durability::Yes);
        if is_durable {
            return;
        }
        let Some(key) = copy.key.take() else { return };
        let position = key.position();
        kept.last = kept.last.max(Some(position));
        let fingerprint = self.fingerprint(record);
        let replaced = kept.shard(fingerprint).insert(fingerprint, position);
        drop(kept);
        if let Some(position) = replaced {
            self.settle(position);
        }
    }

    /// Removes the copy of a record that has ended, if there is one.
    pub fn release(&self, record: &Record) {
        let mut kept = self.kept.lock();
        // Usually there are no copies, and nothing is hashed.
        if kept.last.is_none() {
            return;
        }
        let fingerprint = self.fingerprint(record);
        let found = kept.shard(fingerprint).remove(&fingerprint);
        drop(kept);
        if let Some(position) = found {
            self.settle(position);
        }
    }

    /// The lane has connected to `broker`. If that may have lost what it has confirmed, all copies
    /// are published again.
    pub fn connected(&self, broker: &BrokerInfo) {
        let mut kept = self.kept.lock();
        let before = kept.broker.replace(broker.clone());
        let is_another = before.is_some_and(|before| before.incarnation != broker.incarnation);
        drop(kept);
        if is_another {
            self.publish_again("the broker has restarted and may have lost records");
        }
    }

    /// Publishes all copies again. The broker drops those that it has, as far as it knows their
    /// ids.
    pub fn publish_again(&self, why: &str) {
        let mut kept = self.kept.lock();
        let records: usize = kept.shards.iter().map(HashMap::len).sum();
        if records == 0 {
            return;
        }
        let lane = self.lane;
        warn!(%lane, records, "{why}: they are published again");
        kept.shards = Default::default();
        kept.marks.clear();
        self.spool.read_kept(lane);
    }

    /// Removes the copies whose confirms have become durable. A confirm came at most
    /// `publish_timeout` after its copy. To be called [`PARTS`] times in that time, or more often.
    pub fn expire(&self, publish_timeout: Duration) {
        let now = Instant::now();
        let mut kept = self.kept.lock();
        let Some(broker) = &kept.broker else { return };
        let durable_after = broker.outlives_power_cut.after();
        let Some(lifetime) = durable_after.checked_add(publish_timeout) else {
            return;
        };
        let last = kept.marks.back();
        if let Some(position) = kept.last
            && last.is_none_or(|(at, _)| now - *at >= durable_after / PARTS)
        {
            kept.marks.push_back((now, position));
        }
        let mut durable = None;
        while let Some((_, position)) = kept.marks.pop_front_if(|(at, _)| now - *at >= lifetime) {
            durable = Some(position);
        }
        let Some(durable) = durable else { return };
        for shard in &mut kept.shards {
            shard.retain(|_, position| *position > durable);
        }
        drop(kept);
        self.spool.settle_through(Queue::Kept(self.lane), durable);
    }

    fn settle(&self, position: Position) {
        self.spool
            .settle(EntryKey::new(Queue::Kept(self.lane), position));
    }

    /// The same id, accepted again, is another record.
    fn fingerprint(&self, record: &Record) -> u64 {
        let at_us = record.origin.as_ref().map(|origin| origin.at_us);
        self.hasher.fingerprint((&record.id, at_us)).half()
    }
}

impl Kept {
    fn shard(
        &mut self,
        fingerprint: u64,
    ) -> &mut HashMap<u64, Position, BuildHasherDefault<IdentityHasher>> {
        // A table uses the other end of the number.
        let index = (fingerprint >> 32) as usize % SHARDS;
        &mut self.shards[index]
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.spool.settle(key);
        }
    }
}
