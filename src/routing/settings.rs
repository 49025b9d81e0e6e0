//! The routing settings in effect. All routers of a node share them, and a reload swaps them as one.

use std::sync::Arc;

use parking_lot::RwLock;

use super::policy::Policy;
use crate::lane_id::LaneId;

/// What decides on a record's lane, but for the weights, which are in
/// [`Scores`](super::scores::Scores).
#[derive(Debug)]
pub struct RoutingSettings {
    pub policy: Policy,
    /// In the order of the configuration.
    pub lanes: Arc<[LaneId]>,
}

/// The settings in effect. Clones share them.
#[derive(Clone, Debug)]
pub struct CurrentRouting(Arc<RwLock<Arc<RoutingSettings>>>);

impl CurrentRouting {
    pub fn new(settings: RoutingSettings) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(settings))))
    }

    pub fn get(&self) -> Arc<RoutingSettings> {
        Arc::clone(&self.0.read())
    }

    /// Each choice from now on is made by `settings`.
    pub fn replace(&self, settings: RoutingSettings) {
        *self.0.write() = Arc::new(settings);
    }

    /// The settings in effect, if they are not `known`.
    pub fn newer_than(&self, known: &Arc<RoutingSettings>) -> Option<Arc<RoutingSettings>> {
        let current = self.0.read();
        (!Arc::ptr_eq(&current, known)).then(|| Arc::clone(&current))
    }
}
