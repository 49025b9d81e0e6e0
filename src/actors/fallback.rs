//! The disk: takes the records that no lane takes.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{Job, receipts::PendingRecord, stored_route};
use crate::{
    delivery::Receipt, lane_id::LaneId, ledger::Ledger, routing::rules::CompiledRoute, spool::Spool,
};

/// Writes records to the spool and replies to their clients.
#[derive(Clone)]
pub struct DiskFallback {
    pub spool: Spool,
    pub ledger: Arc<Ledger>,
}

impl DiskFallback {
    /// Stores the records of `job`. It goes on if the client hangs up, and holds the permit until
    /// the records are stored.
    pub fn store_job(&self, job: Job) {
        let fallback = self.clone();
        actix_rt::spawn(async move {
            let Job {
                records,
                route,
                pinned,
                ..
            } = &job;
            fallback.store(records, route, *pinned).await;
        });
    }

    /// Replies for each of `records` once it is on disk, for lane `pinned` or for the lanes of
    /// `route`, or cannot be. A record whose client no longer waits is removed again: it has no
    /// receipt.
    pub async fn store(
        &self,
        records: &[PendingRecord],
        route: &CompiledRoute,
        pinned: Option<LaneId>,
    ) {
        let queue = stored_route::queue(route, pinned);
        let store = async |pending: &PendingRecord| {
            let entry = stored_route::entry(route, pending);
            match self.spool.put(queue, &entry).await {
                Ok(_) if pending.reply(Ok(Receipt::Spool)) => self.ledger.spooled(&pending.record),
                Ok(key) => self.spool.settle(key),
                Err(why) => drop(pending.reply(Err(why.into()))),
            }
        };
        join_all(records.iter().map(store)).await;
    }
}
