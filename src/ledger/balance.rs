//! The equation of the ledger, and the task that checks it.

use std::{sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use serde::Serialize;
use tokio::{sync::watch, time::sleep};
use tracing::error;

use super::Ledger;
use crate::spool::SpoolStats;

/// The counts are compared once they have not changed for this time.
pub(super) const REST: Duration = Duration::from_secs(2);

/// The number of records in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Balance {
    pub accepted: u64,
    pub recovered: u64,
    pub delivered: u64,
    /// Taken from a broker by another node.
    pub handed_over: u64,
    /// Dead letters on disk.
    pub dead: u64,
    /// Dead letters that an operator has removed.
    pub dropped: u64,
    /// Waiting on disk.
    pub spooled: u64,
    /// On disk between two tries: the API fails at them while it answers others.
    pub parked: u64,
    /// In a broker, or on the way from it to the API.
    pub in_flight: u64,
    /// Confirmed by a broker that does not have them any more, and taken by no node.
    pub missing: u64,
    pub redelivered: u64,
}

impl Balance {
    /// Holds at every moment at rest.
    pub const fn holds(&self) -> bool {
        let gone = self.handed_over + self.missing;
        let ended = self.delivered + self.dead + self.dropped;
        let waiting = self.spooled + self.parked + self.in_flight;
        self.accepted + self.recovered == ended + gone + waiting
    }
}

/// Compares the counts whenever nothing has changed for a while, until the spool has ended. An
/// imbalance is an error of this program, and is logged as one.
pub async fn audit(ledger: Arc<Ledger>, stats: watch::Receiver<SpoolStats>) {
    let mut before = None;
    while stats.has_changed().is_ok() {
        sleep(REST).await;
        let stats = *stats.borrow();
        let balance = ledger.balance(&stats);
        if before.replace(balance) == Some(balance) {
            let imbalanced = !balance.holds();
            if ledger.imbalanced.swap(imbalanced, Relaxed) != imbalanced && imbalanced {
                error!(
                    accepted = balance.accepted,
                    recovered = balance.recovered,
                    delivered = balance.delivered,
                    handed_over = balance.handed_over,
                    dead = balance.dead,
                    dropped = balance.dropped,
                    spooled = balance.spooled,
                    parked = balance.parked,
                    in_flight = balance.in_flight,
                    missing = balance.missing,
                    "the ledger does not balance"
                );
            }
        }
    }
}
