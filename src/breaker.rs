//! The circuit breaker before the API. After a few failures in a row it opens: nobody POSTs but a single probe at a time, with
//! back-off between probes, until one succeeds.

use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::backoff::Backoff;

/// Failures in a row that open it.
const FAILURES_MAX: u32 = 5;
/// The first probe waits at most this.
const PROBE_FIRST: Duration = Duration::from_millis(100);
/// No probe waits longer, unless the API asks for it.
const PROBE_CAP: Duration = Duration::from_secs(1);

/// One per API, shared by all forwarders of a node.
pub struct Breaker {
    state: Mutex<State>,
    /// Changes whenever somebody who waits should look again.
    changes: watch::Sender<()>,
}

enum State {
    Closed {
        failures: u32,
    },
    Open {
        backoff: Backoff,
        probe_at: Instant,
        probing: bool,
    },
}

/// One POST that may be made. Dropped without a word, it says nothing of the API.
pub struct Pass<'b> {
    breaker: &'b Breaker,
    is_probe: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            state: Mutex::new(State::Closed { failures: 0 }),
            changes: watch::Sender::new(()),
        }
    }
}

impl Breaker {
    /// Resolves when a POST may be made.
    pub async fn pass(&self) -> Pass<'_> {
        if !self.is_open() {
            return Pass {
                breaker: self,
                is_probe: false,
            };
        }
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            let probe_at = match &mut *self.lock() {
                State::Closed { .. } => {
                    return Pass {
                        breaker: self,
                        is_probe: false,
                    };
                }
                State::Open { probing: true, .. } => None,
                State::Open {
                    probe_at, probing, ..
                } if *probe_at <= Instant::now() => {
                    *probing = true;
                    return Pass {
                        breaker: self,
                        is_probe: true,
                    };
                }
                State::Open { probe_at, .. } => Some(*probe_at),
            };
            // The sender is `self`, so a change is never an error.
            match probe_at {
                Some(at) => tokio::select! {
                    _ = changes.changed() => {}
                    () = sleep_until(at) => {}
                },
                None => drop(changes.changed().await),
            }
        }
    }

    /// The API is taken for away.
    pub fn is_open(&self) -> bool {
        matches!(*self.lock(), State::Open { .. })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Pass<'_> {
    /// The API answered, and not that it is unable.
    pub fn succeeded(self) {
        let mut state = self.breaker.lock();
        let was_open = matches!(*state, State::Open { .. });
        // What set out before it opened says nothing of the API as it is now.
        if !was_open || self.is_probe {
            *state = State::Closed { failures: 0 };
        }
        drop(state);
        if was_open {
            self.breaker.changes.send_replace(());
        }
    }

    /// No answer, or one that asks for another try, not before `at_least` if the API says so.
    pub fn failed(self, at_least: Option<Duration>) {
        let is_probe = self.is_probe;
        let mut state = self.breaker.lock();
        match &mut *state {
            State::Closed { failures } if *failures + 1 < FAILURES_MAX => *failures += 1,
            State::Closed { .. } => {
                let mut backoff = Backoff::new(PROBE_FIRST, PROBE_CAP);
                let probe_at =
                    Instant::now() + backoff.next_delay().max(at_least.unwrap_or_default());
                *state = State::Open {
                    backoff,
                    probe_at,
                    probing: false,
                };
            }
            State::Open {
                backoff, probe_at, ..
            } if is_probe => {
                *probe_at = Instant::now() + backoff.next_delay().max(at_least.unwrap_or_default());
            }
            State::Open { .. } => {}
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.is_probe {
            return;
        }
        if let State::Open { probing, .. } = &mut *self.breaker.lock() {
            *probing = false;
        }
        self.breaker.changes.send_replace(());
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
