//! Comparing: finds the records in flight that the lane's system does not have any more.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::LaneParams;
use crate::{
    actors::copies::ASKED_EVERY,
    ledger::{Finding, Present},
    transport::Transport,
};

/// How long the system may take to count.
const PATIENCE: Duration = Duration::from_secs(5);

/// So many copies that no confirm will release are worth a warning. Records under way are fewer.
const STRANDED_MIN: u64 = 10_000;

/// Compares for as long as the connection lives.
pub async fn compare<T: Transport>(transport: &T, params: &LaneParams) {
    let lane = params.lane;
    let durability = transport.info().outlives_power_cut;
    let mut is_told = false;
    loop {
        sleep(ASKED_EVERY).await;
        let before = params.ledger.lane(lane).counts;
        let asked_at = Instant::now();
        let counted = timeout(PATIENCE, transport.backlog()).await;
        let backlog = match counted.unwrap_or_else(|_| Err(format!("silent for {PATIENCE:?}"))) {
            Ok(backlog) => backlog,
            Err(why) => {
                debug!(%lane, reason = why, "the records in flight cannot be compared");
                continue;
            }
        };
        params.copies.broker_answered(asked_at);
        let scores = &params.live_lanes.scores;
        scores.set_shared(lane, backlog.is_shared);
        let present = Present {
            // A message of this node has so many records at most.
            records: backlog.messages.saturating_mul(params.bundle as u64),
            is_shared: backlog.is_shared,
            is_exact: backlog.is_exact,
        };
        match params.ledger.compare(lane, &before, present) {
            Some(Finding::Missing(records)) => {
                error!(
                    %lane,
                    records,
                    "the broker has lost records that it had confirmed, and no other node has \
                     taken them: look for a purge, a limit or a deleted queue there"
                );
                params.copies.publish_again("the broker has lost records");
            }
            Some(Finding::NoneMissing) => info!(%lane, "no record is missing any more"),
            None => {}
        }
        let in_flight = params.ledger.lane(lane).counts.in_flight();
        let copies = durability.stranded(params.copies.count(), in_flight);
        if copies >= STRANDED_MIN && !is_told {
            is_told = true;
            warn!(
                %lane,
                copies,
                "copies stay on this disk until the next start, and may fill it: other nodes have \
                 taken their records, and it is not known whether the broker survives a power cut"
            );
        }
    }
}
