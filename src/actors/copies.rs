//! Copies on disk of records that a lane has confirmed. A copy stays until its record has ended, or
//! until the confirm survives a power cut of the lane's broker.
//!
//! The disk also names the broker that has confirmed the copies. A run that connects to that one
//! leaves the copies of an earlier run alone until their confirms are durable, though their records
//! end before. It publishes them again for any other broker.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::warn;
use tracing_mutex::parkinglot::Mutex;

use super::copy_table::CopyTable;
use crate::{
    lane_id::LaneId,
    recent::Hasher128,
    record::Record,
    spool::{Confirmer, CopyWriter, Entry, EntryKey, NotSafe, Position, Queue, Spool},
    transport::{BrokerInfo, Durability},
};

/// The parts of the time after which a confirm is durable. A copy stays for up to one part longer.
pub const PARTS: u32 = 8;

/// How often a lane asks its broker what that has.
pub const ASKED_EVERY: Duration = Duration::from_secs(2);

/// The longest time that copies stay, over one connection to a broker whose confirms become durable
/// `after` a while, and come within `publish_timeout`. They go when their records end, if that is
/// earlier.
pub fn stay_max(after: Duration, publish_timeout: Duration) -> Duration {
    // A part until it is marked, and one until the mark is looked at. The broker is asked meanwhile.
    let after = after.saturating_add((after / PARTS).saturating_mul(2));
    let after = after.saturating_add(publish_timeout);
    after.saturating_add(ASKED_EVERY)
}

/// The copies of one lane, over all of its connections. Clones share them.
#[derive(Clone)]
pub struct Copies {
    lane: LaneId,
    spool: Spool,
    hasher: Arc<Hasher128>,
    kept: Arc<Mutex<KeptCopies>>,
}

#[derive(Default)]
struct KeptCopies {
    /// The copies of confirmed records, by half of their fingerprints.
    table: CopyTable,
    /// The copy that was written last.
    last: Option<Position>,
    /// The copy that was the last at each of these times.
    marks: VecDeque<(Instant, Position)>,
    broker: Option<BrokerInfo>,
    /// When the broker was last asked, of the times that it has answered.
    answered_at: Option<Instant>,
    /// Changes when the broker may have lost what it has confirmed.
    generation: u64,
}

/// A copy on disk of a record that no lane has confirmed yet. If it is dropped, it leaves the disk.
pub struct Copy {
    spool: Spool,
    key: Option<EntryKey>,
    /// The one of [`KeptCopies`] from before its record was published.
    generation: u64,
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

    /// For the connection that publishes the records.
    pub fn writer(&self) -> CopyWriter {
        CopyWriter::new(self.lane, self.spool.clone())
    }

    /// Resolves when a copy of `record` is on disk. If it `is_on_disk` already, its other entry is
    /// about to go, and a full spool takes the copy all the same.
    ///
    /// # Errors
    /// If it cannot be written.
    pub async fn write(
        &self,
        writer: &CopyWriter,
        record: &Record,
        is_on_disk: bool,
    ) -> Result<Copy, NotSafe> {
        let generation = self.kept.lock().generation;
        let key = writer.put(&Entry::new(record, None), is_on_disk).await?;
        Ok(Copy {
            spool: self.spool.clone(),
            key: Some(key),
            generation,
        })
    }

    /// Keeps the copy of a record that the lane has confirmed, unless the confirm is durable.
    pub fn keep(&self, record: &Record, mut copy: Copy) {
        let mut kept = self.kept.lock();
        let is_durable = kept
            .broker
            .as_ref()
            .is_none_or(|broker| broker.outlives_power_cut == Durability::Yes);
        let is_outdated = copy.generation != kept.generation;
        if is_durable && !is_outdated {
            return;
        }
        let Some(key) = copy.key.take() else { return };
        let position = key.position();
        kept.last = kept.last.max(Some(position));
        let fingerprint = self.fingerprint(record);
        let mut older = kept.table.insert(fingerprint, position);
        if let Some(before) = older
            && before > position
        {
            older = kept.table.insert(fingerprint, before);
        }
        drop(kept);
        // The feeder settles the older of two copies, too, if it has read that one.
        if let Some(older) = older {
            self.settle(older);
        }
        if is_outdated {
            self.publish_again("a confirm came from a broker that has restarted since");
        }
    }

    /// The copies on disk.
    pub fn count(&self) -> u64 {
        self.spool.stats().kept(self.lane)
    }

    /// Removes the copy of a record that has ended, if there is one.
    pub fn release(&self, record: &Record) {
        let mut kept = self.kept.lock();
        // Usually there are no copies, and nothing is hashed.
        if kept.last.is_none() {
            return;
        }
        let fingerprint = self.fingerprint(record);
        let found = kept.table.remove(fingerprint);
        drop(kept);
        if let Some(position) = found {
            self.settle(position);
        }
    }

    /// The lane has connected to `broker`. If that may have lost what it has confirmed, in this run
    /// or in an earlier one, all copies are published again.
    pub fn connected(&self, broker: &BrokerInfo) {
        let mut kept = self.kept.lock();
        if let Some(before) = kept.broker.replace(broker.clone()) {
            if before.incarnation == broker.incarnation {
                // It may have stood still meanwhile, as a paused machine does.
                kept.marks.clear();
                return;
            }
        } else {
            let found = self.spool.found_copies(self.lane);
            if let Some(now) = lasting(broker)
                && found.confirmed_by.as_ref().is_some_and(|then| {
                    then.incarnation == now.incarnation && then.last_message <= now.last_message
                })
            {
                // They expire like those that are written now.
                kept.last = found.last;
                return;
            }
        }
        kept.generation += 1;
        drop(kept);
        self.publish_again("the broker may have lost records");
    }

    /// Publishes all copies again. The broker drops those that it has, as far as it knows their
    /// ids.
    pub fn publish_again(&self, why: &str) {
        let mut kept = self.kept.lock();
        // They name copies that are about to be read, and that only the feeder may settle.
        kept.marks.clear();
        kept.last = None;
        kept.table = CopyTable::default();
        let lane = self.lane;
        let records = self.count();
        if records > 0 {
            warn!(%lane, records, "{why}: they are published again");
        }
        let broker = kept.broker.as_ref().and_then(lasting);
        self.spool.read_kept(lane, broker);
    }

    /// The broker has had the message of this number. To be called now and then, and before the
    /// connection closes: a later start publishes the copies again for a broker without it.
    pub fn broker_had(&self, last_message: u64) {
        if self.kept.lock().last.is_some() {
            self.spool.broker_had(self.lane, last_message);
        }
    }

    /// The broker has answered a question of this time, and has lost nothing that is known of.
    pub fn broker_answered(&self, asked_at: Instant) {
        self.kept.lock().answered_at = Some(asked_at);
    }

    /// Removes the copies whose confirms have become durable. A confirm came at most
    /// `publish_timeout` after its copy, and is durable once the broker has lived on for long enough:
    /// it still answers. To be called [`PARTS`] times in that time, or more often.
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
        let Some(alive_at) = kept.answered_at else {
            return;
        };
        let is_over = |(at, _): &mut (Instant, Position)| *at + lifetime <= alive_at;
        while let Some((_, position)) = kept.marks.pop_front_if(is_over) {
            durable = Some(position);
        }
        let Some(durable) = durable else { return };
        kept.table.remove_through(durable);
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

/// `broker` for the next run, if its confirms become durable after a while.
fn lasting(broker: &BrokerInfo) -> Option<Confirmer> {
    let after = broker.outlives_power_cut.after();
    (!after.is_zero() && after < Duration::MAX).then(|| Confirmer {
        incarnation: broker.incarnation.clone(),
        last_message: broker.last_message,
    })
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.spool.settle(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tempfile::TempDir;
    use tokio::{sync::Semaphore, time::advance};

    use super::*;
    use crate::{record::Origin, spool::OpenError};

    const LANE: LaneId = LaneId::Nats;
    const AFTER: Duration = Duration::from_mins(2);
    const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);

    fn broker(incarnation: &str) -> BrokerInfo {
        BrokerInfo {
            outlives_power_cut: Durability::No { after: AFTER },
            incarnation: incarnation.into(),
            ..BrokerInfo::default()
        }
    }

    fn record(number: u64) -> Record {
        Record {
            id: number.to_string().into(),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: Some(Origin {
                run: "run".into(),
                at_us: number,
            }),
            api: None,
            event: None,
        }
    }

    /// Copies for a broker, and three of them that are kept, in simulated time.
    async fn three() -> (TempDir, Spool, Copies) {
        tokio::time::pause();
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path(), 1 << 30).unwrap();
        let copies = Copies::new(LANE, spool.clone());
        copies.connected(&broker("first"));
        let writer = copies.writer();
        for number in 0..3 {
            let copy = copies.write(&writer, &record(number), false).await.unwrap();
            copies.keep(&record(number), copy);
        }
        (folder, spool, copies)
    }

    /// Looks for copies that are not needed any more, for longer than any is.
    async fn expire(copies: &Copies) {
        for _ in 0..2 * PARTS {
            copies.broker_answered(Instant::now());
            copies.expire(PUBLISH_TIMEOUT);
            advance(AFTER / PARTS).await;
        }
    }

    /// The copies of the next run, whose broker is `broker`.
    async fn next_run(folder: &TempDir, spool: Spool, broker: &BrokerInfo) -> (Spool, Copies) {
        spool.close().await;
        let spool = loop {
            // The thread lets go of the folder a moment after its end was seen.
            match Spool::open(folder.path(), 1 << 30) {
                Err(OpenError::InUse(_)) => std::thread::yield_now(),
                spool => break spool.unwrap(),
            }
        };
        let copies = Copies::new(LANE, spool.clone());
        copies.connected(broker);
        (spool, copies)
    }

    #[actix_rt::test]
    async fn no_copy_stays_for_longer_than_is_said() {
        let (_folder, spool, copies) = three().await;
        let began = Instant::now();
        loop {
            advance(AFTER / PARTS).await;
            copies.broker_answered(Instant::now());
            copies.expire(PUBLISH_TIMEOUT);
            if counts(&spool).await.0 == 0 {
                break;
            }
        }
        let stayed = began.elapsed();
        let max = |after| stay_max(after, PUBLISH_TIMEOUT);
        assert!(stayed <= max(AFTER), "{stayed:?}");
        assert_eq!(max(Duration::MAX), Duration::MAX);
    }

    /// The copies on disk, and those of them that are to be published again.
    async fn counts(spool: &Spool) -> (u64, u64) {
        // The thread has done all that it was asked to before.
        spool.oldest().await;
        spool.oldest().await;
        let stats = spool.stats();
        (stats.kept(LANE), stats.records(Queue::Kept(LANE)))
    }

    #[actix_rt::test]
    async fn a_copy_goes_once_its_confirm_is_durable() {
        let (_folder, spool, copies) = three().await;
        copies.expire(PUBLISH_TIMEOUT);
        advance(AFTER).await;
        copies.broker_answered(Instant::now());
        copies.expire(PUBLISH_TIMEOUT);
        assert_eq!(
            counts(&spool).await,
            (3, 0),
            "a confirm may have come later"
        );
        expire(&copies).await;
        assert_eq!(counts(&spool).await, (0, 0));
    }

    /// The node, or the broker, stands still for longer than a confirm needs.
    #[actix_rt::test]
    async fn no_time_counts_in_which_the_broker_may_have_been_dead() {
        let (_folder, spool, copies) = three().await;
        copies.broker_answered(Instant::now());
        for _ in 0..3 {
            copies.expire(PUBLISH_TIMEOUT);
            advance(2 * AFTER).await;
        }
        copies.expire(PUBLISH_TIMEOUT);
        assert_eq!(counts(&spool).await, (3, 0));
        copies.broker_answered(Instant::now());
        copies.expire(PUBLISH_TIMEOUT);
        assert_eq!(counts(&spool).await, (0, 0));
    }

    #[actix_rt::test]
    async fn a_copy_goes_when_its_record_has_ended() {
        let (_folder, spool, copies) = three().await;
        copies.release(&record(1));
        copies.release(&record(7));
        assert_eq!(counts(&spool).await, (2, 0));
    }

    #[actix_rt::test]
    async fn copies_that_wait_to_be_published_again_do_not_expire() {
        let (_folder, spool, copies) = three().await;
        copies.expire(PUBLISH_TIMEOUT);
        copies.connected(&broker("first"));
        assert_eq!(counts(&spool).await, (3, 0));
        copies.connected(&broker("second"));
        assert_eq!(counts(&spool).await, (3, 3));
        expire(&copies).await;
        assert_eq!(counts(&spool).await, (3, 3));
    }

    #[actix_rt::test]
    async fn copies_of_an_earlier_run_are_published_again_for_another_broker_only() {
        let never = BrokerInfo {
            outlives_power_cut: Durability::default(),
            ..broker("first")
        };
        for (broker, left) in [(broker("first"), 0), (broker("second"), 3), (never, 3)] {
            let (folder, spool, _) = three().await;
            let (spool, copies) = next_run(&folder, spool, &broker).await;
            assert_eq!(counts(&spool).await, (3, left), "{broker:?}");
            expire(&copies).await;
            assert_eq!(counts(&spool).await, (left, left), "{broker:?}");
            tokio::time::resume();
        }
    }

    #[actix_rt::test]
    async fn copies_of_an_earlier_run_are_published_again_for_a_broker_that_lacks_its_last_message()
    {
        let with = |last_message| BrokerInfo {
            last_message,
            ..broker("first")
        };
        for (noted, found, left) in [(7, 7, 0), (7, 9, 0), (7, 6, 3), (5, 6, 0)] {
            let (folder, spool, copies) = three().await;
            copies.broker_had(noted);
            copies.broker_had(2);
            let (spool, _) = next_run(&folder, spool, &with(found)).await;
            assert_eq!(counts(&spool).await, (3, left), "{noted}, {found}");
            tokio::time::resume();
        }
    }

    /// One connection of a cluster leads to another server, and the next one back.
    #[actix_rt::test]
    async fn a_broker_is_known_no_more_once_its_copies_are_to_be_published_again() {
        let (folder, spool, copies) = three().await;
        copies.connected(&broker("second"));
        let (spool, _) = next_run(&folder, spool, &broker("first")).await;
        assert_eq!(counts(&spool).await, (3, 3));
    }

    #[actix_rt::test]
    async fn a_run_that_ends_before_all_copies_are_published_again_names_no_broker() {
        let (folder, spool, _) = three().await;
        let second = broker("second");
        let (spool, copies) = next_run(&folder, spool, &second).await;
        let copy = copies
            .write(&copies.writer(), &record(3), false)
            .await
            .unwrap();
        copies.keep(&record(3), copy);
        let window = Arc::new(Semaphore::new(2));
        let mut tail = spool.tail_one_by_one(Queue::Kept(LANE), window);
        let mut permits = Vec::new();
        for _ in 0..2 {
            let (key, _, permit) = tail.next().await.unwrap();
            spool.settle(key);
            permits.push(permit);
        }
        let (spool, copies) = next_run(&folder, spool, &second).await;
        assert_eq!(counts(&spool).await, (2, 2));

        let copy = copies
            .write(&copies.writer(), &record(4), false)
            .await
            .unwrap();
        copies.keep(&record(4), copy);
        let window = Arc::new(Semaphore::new(2));
        let mut tail = spool.tail_one_by_one(Queue::Kept(LANE), window);
        for _ in 0..2 {
            let (key, ..) = tail.next().await.unwrap();
            spool.settle(key);
        }
        let (spool, _) = next_run(&folder, spool, &second).await;
        assert_eq!(counts(&spool).await, (1, 0));
    }

    #[actix_rt::test]
    async fn a_confirm_of_the_broker_before_counts_for_nothing() {
        let (_folder, spool, copies) = three().await;
        let writer = copies.writer();
        let copy = copies.write(&writer, &record(3), false).await.unwrap();
        copies.connected(&broker("second"));
        copies.keep(&record(3), copy);
        assert_eq!(counts(&spool).await, (4, 4));
    }

    #[actix_rt::test]
    async fn of_two_copies_of_a_record_the_younger_stays() {
        let (_folder, spool, copies) = three().await;
        let writer = copies.writer();
        let [older, younger] = [
            copies.write(&writer, &record(3), false).await.unwrap(),
            copies.write(&writer, &record(3), false).await.unwrap(),
        ];
        let position = younger.key.unwrap().position();
        copies.keep(&record(3), younger);
        copies.keep(&record(3), older);
        assert_eq!(counts(&spool).await, (4, 0));
        let fingerprint = copies.fingerprint(&record(3));
        let mut kept = copies.kept.lock();
        assert_eq!(kept.table.remove(fingerprint), Some(position));
    }
}
