//! The door of the actor system: admits the records of a request by permit, hands them to the router, and waits for their receipts.
//!
//! The permit bounds what this node has in hand, by count and by bytes, and travels with the records. Where it is full, the
//! caller hears so at once; nobody waits unseen.

use std::{sync::Arc, time::Duration};

use actix::dev::SendError;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, error::Elapsed, timeout_at},
};

use super::{
    Job, LaneSet, RECORDS_MAX, Refused, Route, Slot,
    fallback::DiskFallback,
    receipts::{PendingRecord, Replies, Reply, pending_records},
    router::Router,
};
use crate::{delivery::Receipt, lane_id::LaneId, ledger::Ledger, record::Record};

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
pub struct Admission {
    router: Slot<Router>,
    records: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    ledger: Arc<Ledger>,
    /// How long the router, the lanes and the spool may take together.
    patience: Duration,
    /// What comes in here lies in the spool already.
    on_disk: bool,
    /// What comes in here is put there first, and its receipt is the spool's.
    disk_first: Option<DiskFallback>,
}

impl Admission {
    /// The door of clients.
    #[must_use]
    pub fn new(
        router: Slot<Router>,
        publish_timeout: Duration,
        ledger: Arc<Ledger>,
        disk_first: Option<DiskFallback>,
    ) -> Self {
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
        self.submit_all(vec![record], pinned)
            .await?
            .pop()
            .unwrap_or(Err(Refused::NoLane))
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
        let permit = self.admit(
            records.len(),
            records.iter().map(|record| record.body.len()).sum(),
        )?;
        let answers = vec![None; records.len()];
        let mut promises = Promises {
            records,
            answers,
            waits: None,
            ledger: (!self.on_disk).then_some(&self.ledger),
        };
        self.confirm(&mut promises, pinned, &permit).await;
        Ok(promises.end())
    }

    async fn confirm(
        &self,
        promises: &mut Promises<'_>,
        pinned: Option<LaneId>,
        permit: &Arc<Permit>,
    ) {
        for _ in 0..ATTEMPTS {
            let records = promises.set_out();
            if records.is_empty() {
                return;
            }
            let began = Instant::now();
            let job = Job {
                records,
                pinned,
                tried: LaneSet::default(),
                on_disk: self.on_disk,
                began,
                _permit: Arc::clone(permit),
            };
            let patience = if let Some(disk) = &self.disk_first {
                let disk = disk.clone();
                // Goes on when the client hangs up, and holds the permit to its end.
                actix_rt::spawn(async move {
                    disk.store(&job.records, job.pinned).await;
                    drop(job);
                });
                SPOOL_PATIENCE
            } else {
                let Some(router) = self.router.wait(ROUTER_PATIENCE).await else {
                    return;
                };
                match router.try_send(Route(job)) {
                    Ok(()) => self.patience,
                    Err(SendError::Full(Route(job))) => {
                        job.refuse(&Refused::Overloaded);
                        return;
                    }
                    Err(SendError::Closed(_)) => continue,
                }
            };
            if promises.hear(began + patience).await.is_err() {
                return;
            }
            // Whoever held these is gone; they may or may not be safe, so they go again under the same ids.
            promises
                .unanswered()
                .for_each(|record| self.ledger.doubted(record));
        }
    }

    fn admit(&self, records: usize, bytes: usize) -> Result<Arc<Permit>, Refused> {
        let take = |from: &Arc<Semaphore>, count: usize| {
            let count = u32::try_from(count).map_err(|_| Refused::Overloaded)?;
            Arc::clone(from)
                .try_acquire_many_owned(count)
                .map_err(|_| Refused::Overloaded)
        };
        Ok(Arc::new(Permit {
            _records: take(&self.records, records)?,
            _bytes: take(&self.bytes, bytes)?,
        }))
    }
}

/// Records whose client waits. Dropped early, the client has no receipts for those without an answer, and never will.
struct Promises<'a> {
    records: Vec<Record>,
    answers: Vec<Option<Reply>>,
    /// The answers that are on their way to those that have none.
    waits: Option<Replies>,
    /// Told of records that are not safe; `None` where they lie on disk.
    ledger: Option<&'a Ledger>,
}

impl Promises<'_> {
    /// Those that have no answer, ready to set out.
    fn set_out(&mut self) -> Vec<PendingRecord> {
        self.end_wait();
        let (promised, answers) = pending_records(self.unanswered().cloned());
        self.waits = Some(answers);
        promised
    }

    fn unanswered(&self) -> impl Iterator<Item = &Record> {
        self.records
            .iter()
            .zip(&self.answers)
            .filter(|(_, answer)| answer.is_none())
            .map(|(record, _)| record)
    }

    /// Waits for the answers; an error says that `deadline` has passed: nobody can answer any more.
    async fn hear(&mut self, deadline: Instant) -> Result<(), Elapsed> {
        let heard = match &self.waits {
            Some(answers) => timeout_at(deadline, answers.wait()).await,
            None => Ok(()),
        };
        self.end_wait();
        heard
    }

    fn end_wait(&mut self) {
        let Some(waits) = self.waits.take() else {
            return;
        };
        let unanswered = self.answers.iter_mut().filter(|answer| answer.is_none());
        unanswered
            .zip(waits.close())
            .for_each(|(answer, came)| *answer = came);
    }

    fn end(mut self) -> Vec<Reply> {
        self.refuse();
        std::mem::take(&mut self.answers)
            .into_iter()
            .map(|answer| answer.unwrap_or(Err(Refused::NoLane)))
            .collect()
    }

    fn refuse(&mut self) {
        self.end_wait();
        let Some(ledger) = self.ledger else { return };
        for (record, _) in self
            .records
            .iter()
            .zip(&self.answers)
            .filter(|(_, answer)| !matches!(answer, Some(Ok(_))))
        {
            ledger.refused(record);
        }
    }
}

impl Drop for Promises<'_> {
    fn drop(&mut self) {
        self.refuse();
    }
}
