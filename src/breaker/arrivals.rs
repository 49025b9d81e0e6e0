//! Keeps the records that come while the API is down out of the lanes, but for one now and then that
//! may be the next probe.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{Breaker, BreakerPhase, PROBE_CAP, State};

/// No more than one record comes in this time while the API is down.
const PAUSE: Duration = PROBE_CAP;

impl Breaker {
    /// Whether a record may come now: the API is up, or a probe is due and no other record has come
    /// for it lately.
    pub fn admit(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        match state.next_arrival() {
            Arrival::Now => true,
            Arrival::From(at) if at <= now => {
                state.admitted_at = Some(now);
                true
            }
            Arrival::From(_) | Arrival::AfterProbe => false,
        }
    }

    /// Resolves when a record may come: see [`Breaker::admit`].
    pub async fn until_admitted(&self) {
        loop {
            // It is notified of each change after this line.
            let change = self.changes.notified();
            if self.admit() {
                return;
            }
            let next = self.state.lock().next_arrival();
            match next {
                Arrival::Now => {}
                // Time-out or change: look again.
                Arrival::From(at) => drop(timeout_at(at, change).await),
                Arrival::AfterProbe => change.await,
            }
        }
    }
}

/// The time at which the next record may come.
enum Arrival {
    Now,
    From(Instant),
    /// The end of the probe in flight decides.
    AfterProbe,
}

impl State {
    fn next_arrival(&self) -> Arrival {
        match self.phase {
            BreakerPhase::Closed(_) => Arrival::Now,
            BreakerPhase::Open { probe_at, .. } => probe_at.map_or(Arrival::AfterProbe, |at| {
                let paused_until = self.admitted_at.map(|last| last + PAUSE);
                Arrival::From(paused_until.map_or(at, |until| until.max(at)))
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::advance;

    use super::*;
    use crate::{
        api::answer::{Answer, FailureClass},
        breaker::Trial,
    };

    /// Failures until the API is down.
    async fn down() -> Breaker {
        let breaker = Breaker::default();
        while !breaker.is_open() {
            fail(&breaker).await;
        }
        breaker
    }

    async fn fail(breaker: &Breaker) {
        let why = "refused".into();
        let class = FailureClass::Connect;
        let pass = breaker.pass(&Trial::default()).await;
        pass.failed(&Answer::NoAnswer { class, why }, &mut Trial::default());
    }

    #[tokio::test(start_paused = true)]
    async fn one_record_comes_for_each_probe_that_nobody_makes_and_all_come_to_an_api_that_is_up() {
        let breaker = Breaker::default();
        assert!(breaker.admit() && breaker.admit());

        let breaker = down().await;
        assert!(!breaker.admit(), "no probe is due");
        advance(PROBE_CAP).await;
        assert!(breaker.admit(), "a probe is due");
        assert!(!breaker.admit(), "a record has come for it");
        advance(PAUSE).await;
        assert!(breaker.admit(), "that record has not arrived");
        advance(PAUSE).await;
        let probe = breaker.pass(&Trial::default()).await;
        assert!(!breaker.admit(), "a record probes");
        probe.succeeded(|| 0);
        assert!(breaker.admit() && breaker.admit());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_let_through_for_a_probe_or_when_the_api_is_up() {
        let breaker = down().await;
        assert!(breaker.until_admitted().now_or_never().is_none());
        breaker.until_admitted().await;
        let waiting = breaker.until_admitted();
        let probe = breaker.pass(&Trial::default()).await;
        assert!(waiting.now_or_never().is_none());
        let waiting = breaker.until_admitted();
        let ends = async { probe.succeeded(|| 0) };
        tokio::join!(waiting, ends);
        fail(&breaker).await;
        assert!(breaker.admit(), "one failure is none of the API");
    }
}
