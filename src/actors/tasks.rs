//! Work that runs beside an actor's mailbox.

use std::{cell::Cell, rc::Rc};

use tokio::sync::Notify;

/// Counts the work in flight on one thread, so that a drain can wait for its end.
#[derive(Clone, Default)]
pub struct InFlight(Rc<InFlightState>);

#[derive(Default)]
struct InFlightState {
    count: Cell<usize>,
    idle: Notify,
}

/// One piece of work in flight; it ends when this is dropped.
pub struct Underway(InFlight);

impl InFlight {
    pub fn begin(&self) -> Underway {
        self.0.count.set(self.0.count.get() + 1);
        Underway(self.clone())
    }

    /// Resolves when nothing is in flight.
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

/// A task that is aborted when this is dropped.
pub struct Task(tokio::task::AbortHandle);

impl Task {
    /// Starts it on the current thread.
    pub fn spawn(work: impl Future<Output = ()> + 'static) -> Self {
        Self(actix_rt::spawn(work).abort_handle())
    }

    /// It has finished or panicked.
    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
