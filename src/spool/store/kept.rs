//! Which copies are to be published again, and which broker has confirmed the others.

use tracing::warn;

use super::Store;
use crate::{
    lane_id::LaneId,
    spool::{Queue, kept},
};

impl Store {
    /// Lets the copies of `lane` be read. Once they are all settled, those that are left were
    /// confirmed by `broker`, and its name is written.
    pub(super) fn read_kept(&mut self, lane: LaneId, broker: Option<String>) {
        if let Err(why) = kept::forget_broker(&self.folder, lane) {
            warn!(%lane, %why, "cannot remove the name of the broker that has confirmed copies");
        }
        self.logs[Queue::Kept(lane).at()].read_present();
        self.brokers[lane as usize] = broker;
    }

    /// Writes the names of brokers that have confirmed all copies now.
    pub(super) fn name_brokers(&mut self) {
        for lane in LaneId::ALL {
            let log = &self.logs[Queue::Kept(lane).at()];
            if let Some(broker) = self.brokers[lane as usize].take_if(|_| log.readable() == 0)
                && let Err(why) = kept::write_broker(&self.folder, lane, &broker)
            {
                warn!(
                    %lane,
                    %why,
                    "cannot write which broker has confirmed copies: the next start publishes them again"
                );
            }
        }
    }
}
