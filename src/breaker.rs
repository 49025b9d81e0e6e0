//! The circuit breaker before the API. After a few failures in a row it opens: there are no POSTs
//! but a single probe at a time, with back-off between probes, until one succeeds.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::backoff::Backoff;

/// Failures in a row that open it.
const FAILURES_MAX: u32 = 5;
/// The first probe waits at most this.
const PROBE_FIRST: Duration = Duration::from_millis(100);
/// No probe waits longer, unless the API asks for it.
const PROBE_CAP: Duration = Duration::from_secs(1);

/// One per API, shared by all forwarders of a node.
#[derive(Default)]
pub struct Breaker {
    state: Mutex<State>,
    /// Wakes the callers that wait for a pass.
    changes: Notify,
}

enum State {
    Closed {
        failures: u32,
    },
    Open {
        backoff: Backoff,
        /// `None` while a probe is in flight.
        probe_at: Option<Instant>,
    },
}

/// One POST that may be made. Dropped without a result, it says nothing about the API.
pub struct Pass<'b> {
    breaker: &'b Breaker,
    is_probe: bool,
}

impl Default for State {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

impl Breaker {
    /// Resolves when a POST may be made.
    pub async fn pass(&self) -> Pass<'_> {
        let pass = |is_probe| Pass {
            breaker: self,
            is_probe,
        };
        loop {
            // It is notified of each change after this line.
            let change = self.changes.notified();
            let probe_at = match &mut *self.state.lock() {
                State::Closed { .. } => return pass(false),
                State::Open { probe_at, .. } => {
                    if probe_at.is_some_and(|at| at <= Instant::now()) {
                        *probe_at = None;
                        return pass(true);
                    }
                    *probe_at
                }
            };
            match probe_at {
                // It is over either way.
                Some(at) => drop(timeout_at(at, change).await),
                None => change.await,
            }
        }
    }

    /// The API counts as unavailable.
    pub fn is_open(&self) -> bool {
        matches!(*self.state.lock(), State::Open { .. })
    }
}

impl Pass<'_> {
    /// The API answered, and did not ask for a retry.
    pub fn succeeded(self) {
        let mut state = self.breaker.state.lock();
        // A POST that began before the breaker opened says nothing about the API now.
        if self.is_probe || matches!(*state, State::Closed { .. }) {
            *state = State::default();
        }
    }

    /// No answer, or one that asks for a retry, not before `at_least` if the API says so.
    pub fn failed(self, at_least: Option<Duration>) {
        let mut state = self.breaker.state.lock();
        let mut backoff = match &mut *state {
            State::Closed { failures } if *failures + 1 < FAILURES_MAX => {
                *failures += 1;
                return;
            }
            State::Closed { .. } => Backoff::new(PROBE_FIRST, PROBE_CAP),
            State::Open { backoff, .. } if self.is_probe => backoff.clone(),
            State::Open { .. } => return,
        };
        let delay = backoff.next_delay().max(at_least.unwrap_or_default());
        let probe_at = Some(Instant::now() + delay);
        *state = State::Open { backoff, probe_at };
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.is_probe {
            return;
        }
        // A probe without a result is followed by another at once.
        if let State::Open { probe_at, .. } = &mut *self.breaker.state.lock() {
            probe_at.get_or_insert_with(Instant::now);
        }
        self.breaker.changes.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    async fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            breaker.pass().await.failed(None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_lets_one_probe_through_at_a_time() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX - 1).await;
        breaker.pass().await.succeeded();
        fail(&breaker, FAILURES_MAX - 1).await;
        assert!(!breaker.is_open(), "a success in between counts");
        breaker.pass().await.failed(None);
        assert!(breaker.is_open());
        assert!(breaker.pass().now_or_never().is_none());

        let began = Instant::now();
        let probe = breaker.pass().await;
        assert!(began.elapsed() <= PROBE_FIRST);
        assert!(
            tokio::time::timeout(PROBE_CAP * 10, breaker.pass())
                .await
                .is_err(),
            "a second probe"
        );
        probe.succeeded();
        assert!(!breaker.is_open());
        assert!(breaker.pass().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_fails_or_vanishes_is_followed_by_another() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        for _ in 0..10 {
            let began = Instant::now();
            breaker.pass().await.failed(None);
            assert!(began.elapsed() <= PROBE_CAP);
        }
        drop(breaker.pass().await);
        let asked = Duration::from_secs(30);
        breaker.pass().await.failed(Some(asked));
        let began = Instant::now();
        breaker.pass().await.succeeded();
        assert!(began.elapsed() >= asked, "Retry-After is honoured");
        assert!(!breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_on_when_it_closes() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        let probe = breaker.pass().await;
        let wait = async {
            futures_util::future::join_all((0..100).map(|_| breaker.pass()))
                .await
                .len()
        };
        let (waited, ()) = tokio::join!(wait, async { probe.succeeded() });
        assert_eq!(waited, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_to_an_old_post_does_not_close_it() {
        let breaker = Breaker::default();
        let old = breaker.pass().await;
        fail(&breaker, FAILURES_MAX).await;
        old.succeeded();
        assert!(breaker.is_open());
    }
}
