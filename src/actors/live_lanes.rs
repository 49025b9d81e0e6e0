//! The table of lanes that take records now: the supervisor writes it, each router reads it.

use std::sync::Arc;

use actix::Recipient;
use parking_lot::{RwLock, RwLockReadGuard};

use super::Publish;
use crate::lane_id::LaneId;

/// One entry per lane, by `LaneId as usize`; filled while the lane is up.
pub type LaneTable = [Option<Recipient<Publish>>; LaneId::ALL.len()];

/// Clones share one table. It outlives every router, so a restarted router knows which lanes are
/// up.
#[derive(Clone, Default)]
pub struct LiveLanes(Arc<RwLock<LaneTable>>);

impl LiveLanes {
    /// The lane is up, and `publisher` takes its records.
    pub fn insert(&self, lane: LaneId, publisher: Recipient<Publish>) {
        self.0.write()[lane as usize] = Some(publisher);
    }

    /// The lane is no longer up.
    pub fn remove(&self, lane: LaneId) {
        self.0.write()[lane as usize] = None;
    }

    /// The table as it is now. Hold it for one choice only: the supervisor waits for it.
    pub fn read(&self) -> RwLockReadGuard<'_, LaneTable> {
        self.0.read()
    }
}
