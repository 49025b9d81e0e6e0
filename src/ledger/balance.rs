//! The equation of the ledger, and the task that checks it.

use std::{ops::Add as _, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::sleep};
use tracing::error;

use super::{Counts, Ledger};
use crate::{
    changes::Change,
    lane_id::LaneId,
    spool::{Queue, SpoolStats},
};

/// The counts are compared once they have not changed for this time.
pub(super) const REST: Duration = Duration::from_secs(2);

/// The number of records in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
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

impl Ledger {
    /// The counts of all lanes together.
    pub fn totals(&self) -> Counts {
        LaneId::ALL
            .into_iter()
            .map(|lane| self.lane(lane).counts)
            .fold(Counts::default(), |sum, lane| Counts {
                accepted: sum.accepted + lane.accepted,
                resent: sum.resent + lane.resent,
                moved: sum.moved + lane.moved,
                recovered: sum.recovered + lane.recovered,
                delivered: sum.delivered + lane.delivered,
                dead: sum.dead + lane.dead,
                parked: sum.parked + lane.parked,
                unparked: sum.unparked + lane.unparked,
                redelivered: sum.redelivered + lane.redelivered,
                gone_elsewhere: sum.gone_elsewhere + lane.handed_over(),
                gone_missing: sum.gone_missing + lane.missing(),
            })
    }

    /// The counts of the node, its disk included.
    pub fn balance(&self, stats: &SpoolStats) -> Balance {
        // Read first: the records that are counted twice were counted by their lanes before.
        let node = self.node();
        let lanes = self.totals();
        Balance {
            accepted: lanes.accepted + node.spooled,
            // Records of an earlier run in the gRPC lane are counted when they end, since two
            // copies of a record are one.
            recovered: (lanes.recovered + node.recovered_from_disk + stats.found_carried)
                .saturating_sub(node.double_counted),
            delivered: lanes.delivered,
            handed_over: lanes.handed_over(),
            dead: stats.records(Queue::Dead),
            dropped: node.dropped,
            spooled: stats.waiting(),
            parked: stats.parked(),
            in_flight: lanes.in_flight() + stats.found_carried,
            missing: lanes.missing(),
            redelivered: lanes.redelivered,
        }
    }

    /// Whether the counts did not add up when they last stood still: see [`audit`].
    pub fn is_imbalanced(&self) -> bool {
        self.imbalanced.load(Relaxed)
    }

    /// Records that `lane` has and the API has not.
    pub fn in_flight(&self, lane: LaneId, stats: &SpoolStats) -> u64 {
        let found = match lane {
            LaneId::Grpc => stats.found_carried,
            _ => 0,
        };
        self.lane(lane).counts.in_flight() + found
    }
}

/// Compares the counts whenever nothing has changed for a while, until a spool has ended. An
/// imbalance is an error of this program, and is logged as one. `spools` are those of the node.
/// Nothing is compared while one of them `is_behind` what it was asked: the lanes' counts are not.
pub async fn audit(
    ledger: Arc<Ledger>,
    spools: Vec<watch::Receiver<SpoolStats>>,
    is_behind: impl Fn() -> bool,
) {
    let mut before = None;
    while spools.iter().all(|stats| stats.has_changed().is_ok()) {
        sleep(REST).await;
        if is_behind() {
            before = None;
            continue;
        }
        let stats = spools.iter().map(|stats| *stats.borrow());
        let stats = stats.reduce(SpoolStats::add).unwrap_or_default();
        let balance = ledger.balance(&stats);
        // A record that is parked again is on disk twice for a moment: others may take turns there
        // while the counts stay the same.
        let now = (balance, stats.committed);
        if before.replace(now) == Some(now) {
            let imbalanced = !balance.holds();
            if ledger.imbalanced.swap(imbalanced, Relaxed) == imbalanced {
                continue;
            }
            let balanced = !imbalanced;
            ledger.change_log.add(Change::Ledger { balanced });
            if imbalanced {
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
