//! Addresses that survive a restart.

use std::{sync::Arc, time::Duration};

use actix::{Actor, Addr};
use tokio::{sync::watch, time::timeout};

/// The address of an actor that may be restarted. It outlives the actor; only the supervisor
/// changes it.
pub struct Slot<A: Actor>(Arc<watch::Sender<Option<Addr<A>>>>);

impl<A: Actor> Slot<A> {
    /// The current address, if the actor is alive.
    pub fn get(&self) -> Option<Addr<A>> {
        self.0
            .borrow()
            .as_ref()
            .filter(|address| address.connected())
            .cloned()
    }

    /// The address; waits up to `patience` for a restart.
    pub async fn wait(&self, patience: Duration) -> Option<Addr<A>> {
        if let Some(address) = self.get() {
            return Some(address);
        }
        let mut changes = self.0.subscribe();
        let alive = |address: &Option<Addr<A>>| address.as_ref().is_some_and(Addr::connected);
        let address = timeout(patience, changes.wait_for(alive)).await.ok()?;
        address.ok()?.clone()
    }

    pub(super) fn set(&self, address: Addr<A>) {
        self.0.send_replace(Some(address));
    }
}

impl<A: Actor> Clone for Slot<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A: Actor> Default for Slot<A> {
    fn default() -> Self {
        Self(Arc::default())
    }
}
