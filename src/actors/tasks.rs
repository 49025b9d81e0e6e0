//! Work that runs beside an actor's mailbox.

use std::{cell::Cell, rc::Rc};

use tokio::sync::Notify;

/// Counts work under way on one thread, so that a drain can wait for its end.
#[derive(Clone, Default)]
pub struct InFlight(Rc<InFlightState>);

#[derive(Default)]
struct InFlightState {
    count: Cell<usize>,
    idle: Notify,
}

/// One piece of work under way; it ends when this is dropped.
pub struct Underway(InFlight);

impl InFlight {
    #[must_use]
    pub fn begin(&self) -> Underway {
        self.0.count.set(self.0.count.get() + 1);
        Underway(self.clone())
    }

    /// Resolves when nothing is under way.
    pub async fn idle(&self) {
        while self.0.count.get() > 0 {
            self.0.idle.notified().await;
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let state = &self.0.0;
        state.count.set(state.count.get() - 1);
        if state.count.get() == 0 {
            state.idle.notify_one();
        }
    }
}

/// A task that ends with the value that holds this.
pub struct Task(tokio::task::AbortHandle);

impl Task {
    /// Starts it on the present thread.
    pub fn spawn(work: impl Future<Output = ()> + 'static) -> Self {
        Self(actix_rt::spawn(work).abort_handle())
    }

    /// It has come to its end, or has panicked.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
