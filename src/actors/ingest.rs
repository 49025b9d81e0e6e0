//! The door of the actor system: admits a record by permit, hands it to the router, and waits for its receipt.
//!
//! The permit bounds what this node has in hand, by count and by bytes, and travels with the record. Where it is full, the
//! caller hears so at once; nobody waits unseen.

use std::{sync::Arc, time::Duration};

use actix::dev::SendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{Job, LaneSet, RECORDS_MAX, Refused, Route, Slot, router::Router};
use crate::{
    delivery::{LaneId, Receipt},
    ledger::Ledger,
    record::Record,
};

/// Bytes in hand at most.
const BYTES_MAX: usize = 64 << 20;
/// How often a record is sent again after the actor that held it has died.
const ATTEMPTS: usize = 5;
/// How long a restart of the router may take.
const ROUTER_PATIENCE: Duration = Duration::from_secs(2);

/// A place among the records that this node may have in hand.
pub struct Permit {
    _record: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// The door. Clones are one door.
#[derive(Clone)]
pub struct Ingest {
    router: Slot<Router>,
    records: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    ledger: Arc<Ledger>,
    /// How long the router and the lanes may take together: one lane after the other, each up to its time-out.
    patience: Duration,
}

impl Ingest {
    #[must_use]
    pub fn new(router: Slot<Router>, publish_timeout: Duration, ledger: Arc<Ledger>) -> Self {
        Self {
            router,
            records: Arc::new(Semaphore::new(RECORDS_MAX)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            ledger,
            patience: publish_timeout * u32::try_from(LaneId::ALL.len()).unwrap_or(u32::MAX) + Duration::from_secs(1),
        }
    }

    /// Makes `record` safe, by lane `pinned` only if there is one.
    ///
    /// # Errors
    /// When nobody has confirmed the record.
    pub async fn submit(&self, record: Record, pinned: Option<LaneId>) -> Result<Receipt, Refused> {
        let answer = self.confirm(&record, pinned).await;
        if answer.is_err() {
            self.ledger.refused(&record);
        }
        answer
    }

    async fn confirm(&self, record: &Record, pinned: Option<LaneId>) -> Result<Receipt, Refused> {
        let permit = Arc::new(self.admit(record.body.len())?);
        for _ in 0..ATTEMPTS {
            let router = self.router.wait(ROUTER_PATIENCE).await.ok_or(Refused::NoLane)?;
            let (answer, receipt) = oneshot::channel();
            let job =
                Job { record: record.clone(), pinned, tried: LaneSet::default(), answer, _permit: Arc::clone(&permit) };
            match router.try_send(Route(job)) {
                Ok(()) => match tokio::time::timeout(self.patience, receipt).await {
                    Ok(Ok(answer)) => return answer,
                    // Whoever held the job is gone; the record may or may not be safe, so it goes again under the same id.
                    Ok(Err(_)) => {}
                    Err(_) => return Err(Refused::NoLane),
                },
                Err(SendError::Full(_)) => return Err(Refused::Overloaded),
                Err(SendError::Closed(_)) => {}
            }
        }
        Err(Refused::NoLane)
    }

    fn admit(&self, bytes: usize) -> Result<Permit, Refused> {
        let bytes = u32::try_from(bytes).map_err(|_| Refused::Overloaded)?;
        let record = Arc::clone(&self.records).try_acquire_owned().map_err(|_| Refused::Overloaded)?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(bytes).map_err(|_| Refused::Overloaded)?;
        Ok(Permit { _record: record, _bytes: bytes })
    }
}
