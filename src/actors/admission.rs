//! Admission: takes a request's records in by permit, hands them to the router, and waits for their
//! receipts.
//!
//! The permit bounds the records that this node has in hand, by count and by bytes, and travels
//! with them. A request that gets no permit is refused at once; nobody waits unseen.

use std::{sync::Arc, time::Duration};

use actix::dev::SendError;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use super::{
    Job, Permit, RECORDS_MAX, Route, Source,
    receipts::{AssignedRecord, Refused, Replies, Reply},
    router::Router,
    slot::Slot,
};
use crate::{config::BODY_MAX, lane_id::LaneSet, ledger::Ledger, record::Record};

/// Bytes in hand at most: the longest request fits, if no other is there.
const BYTES_MAX: usize = BODY_MAX;
/// A record is sent this often, if each actor that holds it dies.
const ATTEMPTS: usize = 5;
/// The longest wait for a restart of the router.
const ROUTER_PATIENCE: Duration = Duration::from_secs(2);
/// The longest wait for the spool once no lane has confirmed a record: a disk that hangs must not
/// hold its client for ever.
const SPOOL_PATIENCE: Duration = Duration::from_secs(10);

/// Admits records. Clones share one bound.
#[derive(Clone)]
pub struct Admission {
    router: Slot<Router>,
    records: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    ledger: Arc<Ledger>,
    /// The longest wait for the router, the lanes and the spool together.
    patience: Duration,
    source: Source,
}

impl Admission {
    /// Admits the records of clients.
    pub fn new(router: Slot<Router>, publish_timeout: Duration, ledger: Arc<Ledger>) -> Self {
        Self {
            router,
            records: Arc::new(Semaphore::new(RECORDS_MAX)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            ledger,
            patience: publish_timeout + SPOOL_PATIENCE,
            source: Source::Client,
        }
    }

    /// Admits records of the spool, `records` at a time. A record that no lane confirms stays
    /// there.
    #[must_use]
    pub fn from_disk(&self, source: Source, records: usize) -> Self {
        Self {
            records: Arc::new(Semaphore::new(records)),
            bytes: Arc::new(Semaphore::new(BYTES_MAX)),
            source,
            ..self.clone()
        }
    }

    /// Makes `records` safe, each by a lane that it may take. Returns a reply for each record, in
    /// their order. Either all records are admitted, or none.
    ///
    /// An error means that nobody has confirmed the record; a later confirm finds that its client
    /// has gone. Dropping the future means the same for all records.
    ///
    /// A record of policy `broadcast` is safe once each of its copies is; after an error, some of them
    /// may be on their way. Its receipt is that of its first lane.
    pub async fn submit(&self, records: &[AssignedRecord]) -> Vec<Reply> {
        let is_broadcast = |assigned: &AssignedRecord| assigned.assignment.is_broadcast();
        // Records on disk are copies already.
        if self.source != Source::Client || !records.iter().any(is_broadcast) {
            return self.submit_each(records, bytes(records)).await;
        }
        let mut copies = Vec::new();
        let mut originals = Vec::new();
        for (index, assigned) in records.iter().enumerate() {
            let AssignedRecord { record, assignment } = assigned;
            if !is_broadcast(assigned) {
                copies.push(assigned.clone());
                originals.push(index);
                continue;
            }
            for (id, assignment) in assignment.copies(&record.id) {
                let record = Record {
                    id,
                    ..record.clone()
                };
                copies.push(AssignedRecord { record, assignment });
                originals.push(index);
            }
        }
        // Copies share the bytes of their record.
        let replies = self.submit_each(&copies, bytes(records)).await;
        let mut joined: Vec<Option<Reply>> = vec![None; records.len()];
        for (original, reply) in originals.into_iter().zip(replies) {
            let first = joined[original].get_or_insert_with(|| reply.clone());
            if first.is_ok() && reply.is_err() {
                *first = reply;
            }
        }
        let joined = joined.into_iter();
        joined
            .map(|reply| reply.unwrap_or(Err(Refused::NoLane)))
            .collect()
    }

    async fn submit_each(&self, records: &[AssignedRecord], bytes: usize) -> Vec<Reply> {
        let Some(permit) = self.admit(records.len(), bytes) else {
            return vec![Err(Refused::Overloaded); records.len()];
        };
        let request = Replies::new(
            records,
            (self.source == Source::Client).then_some(&*self.ledger),
        );
        self.confirm(&request, &permit).await;
        let replies = request.close().into_iter();
        replies
            .map(|reply| reply.unwrap_or(Err(Refused::NoLane)))
            .collect()
    }

    /// Waits until each record has a reply, or no reply can come any more.
    async fn confirm(&self, request: &Replies<'_>, permit: &Arc<Permit>) {
        for _ in 0..ATTEMPTS {
            let groups = request.unanswered();
            if groups.is_empty() {
                return;
            }
            let began = Instant::now();
            if !self.router.is_alive_within(ROUTER_PATIENCE).await {
                return;
            }
            let mut is_sent = false;
            for (assignment, records) in groups {
                let job = Job {
                    records,
                    route: Arc::clone(&assignment.route),
                    pinned: assignment.pinned,
                    tried: LaneSet::default(),
                    sent: None,
                    source: self.source,
                    began,
                    permit: Arc::clone(permit),
                };
                match self.router.try_send(Route(job)) {
                    Ok(()) => is_sent = true,
                    Err(SendError::Full(Route(job))) => job.refuse(&Refused::Overloaded),
                    // Its records go to the next router.
                    Err(SendError::Closed(_)) => {}
                }
            }
            if !is_sent {
                continue;
            }
            let deadline = began + self.patience;
            if timeout_at(deadline, request.wait()).await.is_err() {
                return;
            }
            // The holders of these are gone. They may be safe, so they go again under the same ids.
            for (_, records) in request.unanswered() {
                for pending in records {
                    self.ledger.maybe_published(&pending.record);
                }
            }
        }
    }

    fn admit(&self, records: usize, bytes: usize) -> Option<Arc<Permit>> {
        let take = |from: &Arc<Semaphore>, count: usize| {
            let count = u32::try_from(count).ok()?;
            Arc::clone(from).try_acquire_many_owned(count).ok()
        };
        Some(Arc::new(Permit {
            _records: take(&self.records, records)?,
            _bytes: take(&self.bytes, bytes)?,
        }))
    }
}

fn bytes(records: &[AssignedRecord]) -> usize {
    let bodies = records.iter().map(|assigned| assigned.record.body.len());
    bodies.sum()
}
