//! The disk: where records go that no lane takes, or that are answered once they are there.

use std::sync::Arc;

use futures_util::future::join_all;

use super::receipts::PendingRecord;
use crate::{
    delivery::Receipt,
    lane_id::LaneId,
    ledger::Ledger,
    spool::{Entry, Queue, Spool},
};

/// Where records go that are answered once they are on disk.
#[derive(Clone)]
pub struct DiskFallback {
    pub spool: Spool,
    pub ledger: Arc<Ledger>,
}

impl DiskFallback {
    /// Replies for each of `records` once it is on disk, for lane `pinned` or for any, or cannot be. If nobody waits for the answer
    /// any more, nothing is promised, and it does not stay there.
    pub async fn store(&self, records: &[PendingRecord], pinned: Option<LaneId>) {
        let queue = pinned.map_or(Queue::Waiting, Queue::Pinned);
        let keep = async |pending: &PendingRecord| match self
            .spool
            .put(queue, &Entry::new(&pending.record, None))
            .await
        {
            Ok(_) if pending.reply(Ok(Receipt::Spool)) => self.ledger.spooled(),
            Ok(key) => self.spool.settle(key),
            Err(why) => drop(pending.reply(Err(why.into()))),
        };
        join_all(records.iter().map(keep)).await;
    }
}
