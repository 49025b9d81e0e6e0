//! Addresses that survive a restart.

use std::{sync::Arc, time::Duration};

use actix::{
    Actor, Addr, Handler, Message,
    dev::{SendError, ToEnvelope},
};
use tokio::{sync::watch, time::timeout};

/// The address of an actor that may be restarted. It outlives the actor; only the supervisor
/// changes it.
pub struct Slot<A: Actor>(Arc<watch::Sender<Newest<A>>>);

struct Newest<A: Actor> {
    /// Counts the starts.
    generation: u64,
    address: Option<Addr<A>>,
}

impl<A: Actor> Slot<A> {
    /// The current address, if the actor is alive.
    pub fn get(&self) -> Option<Addr<A>> {
        self.0
            .borrow()
            .address
            .as_ref()
            .filter(|address| address.connected())
            .cloned()
    }

    /// Gives `message` to the actor. This costs less than an address of one's own.
    ///
    /// # Errors
    /// The message, if the mailbox is full, or the actor is not alive.
    pub fn try_send<M>(&self, message: M) -> Result<(), SendError<M>>
    where
        A: Handler<M, Context: ToEnvelope<A, M>>,
        M: Message<Result: Send> + Send + 'static,
    {
        match &self.0.borrow().address {
            Some(address) => address.try_send(message),
            None => Err(SendError::Closed(message)),
        }
    }

    /// Whether the actor is alive; waits up to `patience` for a restart.
    pub async fn is_alive_within(&self, patience: Duration) -> bool {
        let alive = |newest: &Newest<A>| newest.address.as_ref().is_some_and(Addr::connected);
        if alive(&self.0.borrow()) {
            return true;
        }
        let mut changes = self.0.subscribe();
        let change = timeout(patience, changes.wait_for(alive)).await;
        change.is_ok_and(|change| change.is_ok())
    }

    /// Sets the address of a start. One that took so long that there is a newer one changes nothing.
    pub(super) fn set(&self, generation: u64, address: Addr<A>) {
        self.0.send_if_modified(|newest| {
            let is_newer = generation > newest.generation;
            if is_newer {
                *newest = Newest {
                    generation,
                    address: Some(address),
                };
            }
            is_newer
        });
    }
}

impl<A: Actor> Clone for Slot<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A: Actor> Default for Slot<A> {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Newest {
            generation: 0,
            address: None,
        })))
    }
}

#[cfg(test)]
mod tests {
    use actix::Context;

    use super::*;

    struct Silent;

    impl Actor for Silent {
        type Context = Context<Self>;
    }

    #[actix_rt::test]
    async fn a_start_that_comes_late_is_not_the_newest() {
        let slot = Slot::default();
        let [late, newest] = [Silent, Silent].map(Actor::start);
        slot.set(2, newest.clone());
        slot.set(1, late);
        assert_eq!(slot.get(), Some(newest));
    }
}
