//! The door of the actor system: admits a record by permit, hands it to the router, and waits for its receipt.
//!
//! The permit bounds what this node has in hand, by count and by bytes, and travels with the record. Where it is full, the
//! caller hears so at once; nobody waits unseen.

use std::{sync::Arc, time::Duration};

use actix::dev::SendError;
use futures_util::future::join_all;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout},
};

use super::{Job, LaneSet, RECORDS_MAX, Refused, Route, Slot, router::Router};
use crate::{
    delivery::{LaneId, Receipt},
    ledger::Ledger,
    record::Record,
    spool::{Entry, Queue, Spool},
};

/// Bytes in hand at most.
const BYTES_MAX: usize = 64 << 20;
/// How often a record is sent again after the actor that held it has died.
const ATTEMPTS: usize = 5;
/// How long a restart of the router may take.
const ROUTER_PATIENCE: Duration = Duration::from_secs(2);
/// How long the spool may take once no lane has confirmed a record: a disk that hangs must not hold its client for ever.
const SPOOL_PATIENCE: Duration = Duration::from_secs(10);

/// A place among the records that this node may have in hand, for one or for a batch.
pub struct Permit {
    _records: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// A door. Clones are one door.
#[derive(Clone)]
pub struct Ingest {
    router: Slot<Router>,
    records: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    ledger: Arc<Ledger>,
    /// How long the router, the lanes and the spool may take together.
    patience: Duration,
    /// What comes in here lies in the spool already.
    on_disk: bool,
    /// What comes in here is put there first, and its receipt is the spool's.
    disk_first: Option<Disk>,
}

/// Where records go that are answered once they are on disk.
#[derive(Clone)]
pub struct Disk {
    pub spool: Spool,
    pub ledger: Arc<Ledger>,
}

impl Disk {
    /// Answers once `record` is on disk, for lane `pinned` or for any, or cannot be. If nobody waits for the answer any more, nothing
    /// is promised, and it does not stay there.
    pub async fn keep(self, record: Record, pinned: Option<LaneId>, answer: oneshot::Sender<Result<Receipt, Refused>>) {
        let queue = pinned.map_or(Queue::Waiting, Queue::Pinned);
        match self.spool.put(queue, &Entry::new(&record, None), false).await {
            Ok(key) => match answer.send(Ok(Receipt::Spool)) {
                Ok(()) => self.ledger.spooled(),
                Err(_) => self.spool.settle(key),
            },
            Err(why) => drop(answer.send(Err(why.into()))),
        }
    }
}

impl Ingest {
    /// The door of clients.
    #[must_use]
    pub fn new(router: Slot<Router>, publish_timeout: Duration, ledger: Arc<Ledger>, disk_first: Option<Disk>) -> Self {
        Self {
            router,
            records: Arc::new(Semaphore::new(RECORDS_MAX)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            ledger,
            patience: publish_timeout + SPOOL_PATIENCE,
            on_disk: false,
            disk_first,
        }
    }

    /// The door of what has waited in the spool, for `records` at a time: if no lane confirms one, it stays there.
    #[must_use]
    pub fn from_disk(&self, records: usize) -> Self {
        Self {
            records: Arc::new(Semaphore::new(records)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            on_disk: true,
            disk_first: None,
            ..self.clone()
        }
    }

    /// Makes `record` safe, by lane `pinned` only if there is one.
    ///
    /// # Errors
    /// When nobody has confirmed the record. Whoever does so later, or after the future was dropped, learns that nobody waits.
    pub async fn submit(&self, record: Record, pinned: Option<LaneId>) -> Result<Receipt, Refused> {
        let permit = self.admit(1, record.body.len())?;
        self.promise(record, pinned, permit).await
    }

    /// The same for each of `records`, in their order: either all are admitted, or none.
    ///
    /// # Errors
    /// When they were not admitted.
    pub async fn submit_all(
        &self,
        records: Vec<Record>,
        pinned: Option<LaneId>,
    ) -> Result<Vec<Result<Receipt, Refused>>, Refused> {
        let permit = self.admit(records.len(), records.iter().map(|record| record.body.len()).sum())?;
        Ok(join_all(records.into_iter().map(|record| self.promise(record, pinned, Arc::clone(&permit)))).await)
    }

    async fn promise(&self, record: Record, pinned: Option<LaneId>, permit: Arc<Permit>) -> Result<Receipt, Refused> {
        let mut promise = Promise { record: (!self.on_disk).then(|| record.clone()), ledger: &self.ledger };
        let answer = self.confirm(&record, pinned, permit).await;
        if answer.is_ok() {
            promise.record = None;
        }
        answer
    }

    async fn confirm(&self, record: &Record, pinned: Option<LaneId>, permit: Arc<Permit>) -> Result<Receipt, Refused> {
        if let Some(disk) = &self.disk_first {
            let (answer, receipt) = oneshot::channel();
            let keep = disk.clone().keep(record.clone(), pinned, answer);
            actix_rt::spawn(async move {
                keep.await;
                drop(permit);
            });
            return heard(receipt, SPOOL_PATIENCE).await.unwrap_or(Err(Refused::NoLane));
        }
        for _ in 0..ATTEMPTS {
            let router = self.router.wait(ROUTER_PATIENCE).await.ok_or(Refused::NoLane)?;
            let (answer, receipt) = oneshot::channel();
            let job = Job {
                record: record.clone(),
                pinned,
                tried: LaneSet::default(),
                on_disk: self.on_disk,
                began: Instant::now(),
                answer,
                permit: Arc::clone(&permit),
            };
            match router.try_send(Route(job)) {
                Ok(()) => {
                    if let Some(answer) = heard(receipt, self.patience).await {
                        return answer;
                    }
                    // Whoever held the job is gone; the record may or may not be safe, so it goes again under the same id.
                    self.ledger.doubted(record);
                }
                Err(SendError::Full(_)) => return Err(Refused::Overloaded),
                Err(SendError::Closed(_)) => {}
            }
        }
        Err(Refused::NoLane)
    }

    fn admit(&self, records: usize, bytes: usize) -> Result<Arc<Permit>, Refused> {
        let take = |from: &Arc<Semaphore>, count: usize| {
            let count = u32::try_from(count).map_err(|_| Refused::Overloaded)?;
            Arc::clone(from).try_acquire_many_owned(count).map_err(|_| Refused::Overloaded)
        };
        Ok(Arc::new(Permit { _records: take(&self.records, records)?, _bytes: take(&self.bytes, bytes)? }))
    }
}

/// A record whose client waits. Dropped with the record in it, the client has no receipt and never will.
struct Promise<'a> {
    record: Option<Record>,
    ledger: &'a Ledger,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            self.ledger.refused(record);
        }
    }
}

/// The answer; `None` if whoever owed it is gone. After `patience` nobody can answer any more: an answer is either heard here, or its
/// sender learns that it is not.
async fn heard(
    mut receipt: oneshot::Receiver<Result<Receipt, Refused>>,
    patience: Duration,
) -> Option<Result<Receipt, Refused>> {
    match timeout(patience, &mut receipt).await {
        Ok(answer) => answer.ok(),
        Err(_) => {
            receipt.close();
            Some(receipt.try_recv().unwrap_or(Err(Refused::NoLane)))
        }
    }
}
