//! The routes in effect. Ingest and all routers of a node share them, and a reload swaps them as one.

use std::sync::Arc;

use tracing_mutex::parkinglot::RwLock;

use super::rules::Routes;

/// The routes in effect. Clones share them. The weights are in [`Scores`](super::scores::Scores).
#[derive(Clone, Debug)]
pub struct CurrentRouting(Arc<RwLock<Arc<Routes>>>);

impl CurrentRouting {
    pub fn new(routes: Routes) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(routes))))
    }

    pub fn get(&self) -> Arc<Routes> {
        Arc::clone(&self.0.read())
    }

    /// Each record that comes from now on takes one of `routes`.
    pub fn replace(&self, routes: Routes) {
        *self.0.write() = Arc::new(routes);
    }

    /// The routes in effect, if they are not `known`.
    pub fn newer_than(&self, known: &Arc<Routes>) -> Option<Arc<Routes>> {
        let current = self.0.read();
        (!Arc::ptr_eq(&current, known)).then(|| Arc::clone(&current))
    }
}
