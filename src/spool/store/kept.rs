//! Which copies are to be published again, and which broker has confirmed the others.

use std::io;

use tracing::warn;

use super::Store;
use crate::{
    lane_id::LaneId,
    spool::{
        Queue,
        kept::{self, Confirmer, FoundCopies},
    },
};

impl Store {
    /// The copies of `lane` that are on disk, before any is read.
    pub fn found_copies(&self, lane: LaneId) -> FoundCopies {
        FoundCopies {
            last: self.logs[Queue::Kept(lane).at()].last(),
            confirmed_by: self.named_brokers[lane as usize].clone(),
        }
    }

    /// Lets the copies of `lane` be read. Once they are all settled, those that are left were
    /// confirmed by `broker`, and its name is written.
    pub(super) fn read_kept(&mut self, lane: LaneId, broker: Option<Confirmer>) {
        self.stale_brokers[lane as usize] = true;
        if let Err(why) = self.forget_stale_broker(lane) {
            warn!(%lane, reason = %why, "cannot remove the name of the broker that has confirmed copies");
        }
        self.logs[Queue::Kept(lane).at()].read_present();
        self.named_brokers[lane as usize] = None;
        self.next_brokers[lane as usize] = broker;
    }

    /// The broker that has confirmed the copies of `lane` has had `last_message`. Written if there
    /// are copies, whose loss it could tell the next start.
    pub fn broker_had(&mut self, lane: LaneId, last_message: u64) {
        let has_copies = self.logs[Queue::Kept(lane).at()].last().is_some();
        if let Some(named) = &mut self.named_brokers[lane as usize]
            && has_copies
            && named.last_message < last_message
        {
            let now = Confirmer {
                last_message,
                ..named.clone()
            };
            match kept::write_broker(&self.folder, lane, &now) {
                Ok(()) => *named = now,
                Err(why) => warn!(
                    %lane,
                    reason = %why,
                    "cannot write the number of the broker's last message: a start does not notice \
                     the loss of those since"
                ),
            }
        }
    }

    /// Removes the name of a broker that has not confirmed all copies.
    fn forget_stale_broker(&mut self, lane: LaneId) -> io::Result<()> {
        if self.stale_brokers[lane as usize] {
            kept::forget_broker(&self.folder, lane)?;
            self.stale_brokers[lane as usize] = false;
        }
        Ok(())
    }

    /// Writes the names of brokers that have confirmed all copies now.
    pub(super) fn name_brokers(&mut self) {
        for lane in LaneId::ALL {
            // It was logged when it failed first.
            self.forget_stale_broker(lane).ok();
            let log = &self.logs[Queue::Kept(lane).at()];
            if let Some(broker) = self.next_brokers[lane as usize].take_if(|_| log.readable() == 0)
            {
                match kept::write_broker(&self.folder, lane, &broker) {
                    Ok(()) => {
                        self.stale_brokers[lane as usize] = false;
                        self.named_brokers[lane as usize] = Some(broker);
                    }
                    Err(why) => warn!(
                        %lane,
                        reason = %why,
                        "cannot write which broker has confirmed copies: the next start publishes them again"
                    ),
                }
            }
        }
    }
}
