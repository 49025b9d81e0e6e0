//! The circuit breaker before the API. It opens when the API fails at whatever it gets: there are no
//! POSTs but a single probe at a time, with back-off between probes, until one succeeds.
//!
//! It judges the API and never one record: an API that answers 2xx to other records is up. A
//! [`Trial`] judges the record.
//!
//! It also opens when the API denies every POST (401, 403 or 404): that is a wrong token or a wrong
//! path, and says nothing about the records.

mod trial;

use std::{mem, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout, timeout_at},
};
use tracing::{info, warn};

pub use self::trial::{Judgement, Trial};
use crate::{api::answer::Answer, backoff::Backoff};

/// Failures in a row that open it if none of them has reached the API.
const FAILURES_MAX: u32 = 5;
/// Failures that have reached the API may be the records' fault. As many in a row open it once the
/// API has taken nothing for this long.
const REACHED_PATIENCE: Duration = Duration::from_secs(5);
/// Denials in a row that open it.
const DENIALS_MAX: u32 = 50;
/// A record that is denied waits this long for the next POST to show whose fault it is.
const VERDICT_WAIT: Duration = Duration::from_secs(2);
/// How long records that have failed leave the probe to others.
const PRECEDENCE: Duration = Duration::from_millis(20);
/// The first probe waits at most this.
const PROBE_FIRST: Duration = Duration::from_millis(100);
/// No probe waits longer, unless the API asks for it.
const PROBE_CAP: Duration = Duration::from_secs(1);

/// One per API, shared by all forwarders of a node.
#[derive(Default)]
pub struct Breaker {
    /// The API's address, for the log.
    api: Arc<str>,
    state: Mutex<State>,
    /// Wakes the callers that wait for a pass.
    changes: Notify,
}

struct State {
    phase: BreakerPhase,
    /// When the breaker last opened or closed.
    since: Instant,
    /// The last failure while it was open.
    last_error: Option<String>,
    /// `None` if the last POST was not denied.
    denials: Option<Denials>,
    /// POSTs that have succeeded.
    succeeded: u64,
    /// POSTs that have succeeded or failed.
    ended: u64,
}

enum BreakerPhase {
    Closed(Failures),
    Open {
        backoff: Backoff,
        /// `None` while a probe is in flight.
        probe_at: Option<Instant>,
    },
}

/// Failures in a row.
#[derive(Clone, Copy, Default)]
struct Failures {
    count: u32,
    /// Those since the last that has reached the API.
    unreached: u32,
    /// The times of the first and of the last.
    span: Option<(Instant, Instant)>,
}

/// Denials in a row.
#[derive(Default)]
struct Denials {
    count: u32,
    /// Changes with each denial, to whether the API denies everything. Dropped when a POST
    /// succeeds.
    everything: watch::Sender<bool>,
}

/// The records that the API denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// This record: it takes others, or there are none.
    TheRecord,
    /// All records: the breaker is open.
    Everything,
}

/// The API as the breaker judges it.
#[derive(Clone, Debug)]
pub struct ApiHealth {
    pub is_up: bool,
    /// The time of the last change.
    pub since: Instant,
    /// The reason of the outage, or of the last one.
    pub last_error: Option<String>,
    /// The time until the next probe.
    pub retry_in: Option<Duration>,
}

/// One POST that may be made. Dropped without a result, it says nothing about the API.
pub struct Pass<'b> {
    breaker: &'b Breaker,
    is_probe: bool,
    /// POSTs that had succeeded when this one began.
    succeeded: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            phase: BreakerPhase::closed(),
            since: Instant::now(),
            last_error: None,
            denials: None,
            succeeded: 0,
            ended: 0,
        }
    }
}

impl Breaker {
    /// A closed breaker of the API at `api`.
    pub fn new(api: Arc<str>) -> Self {
        Self {
            api,
            ..Self::default()
        }
    }

    /// Resolves when a POST may be made.
    pub async fn pass(&self) -> Pass<'_> {
        self.pass_after(Duration::ZERO).await
    }

    /// The same for a record that has failed before: others are the first to probe the API.
    pub async fn pass_again(&self) -> Pass<'_> {
        self.pass_after(PRECEDENCE).await
    }

    /// `wait` is how long others may probe first.
    async fn pass_after(&self, wait: Duration) -> Pass<'_> {
        loop {
            // It is notified of each change after this line.
            let change = self.changes.notified();
            let probe_at = {
                let state = &mut *self.state.lock();
                let pass = |is_probe| Pass {
                    breaker: self,
                    is_probe,
                    succeeded: state.succeeded,
                };
                match &mut state.phase {
                    BreakerPhase::Closed(_) => return pass(false),
                    BreakerPhase::Open { probe_at, .. } => {
                        let mine = probe_at.map(|at| at + wait);
                        if mine.is_some_and(|at| at <= Instant::now()) {
                            *probe_at = None;
                            return pass(true);
                        }
                        mine
                    }
                }
            };
            match probe_at {
                // Time-out or change: look again.
                Some(at) => drop(timeout_at(at, change).await),
                None => change.await,
            }
        }
    }

    /// The API counts as unavailable.
    pub fn is_open(&self) -> bool {
        self.state.lock().is_open()
    }

    pub fn health(&self) -> ApiHealth {
        let state = self.state.lock();
        let probe_at = match state.phase {
            BreakerPhase::Closed(_) => None,
            BreakerPhase::Open { probe_at, .. } => probe_at,
        };
        ApiHealth {
            is_up: !state.is_open(),
            since: state.since,
            last_error: state.last_error.clone(),
            retry_in: probe_at.map(|at| at.saturating_duration_since(Instant::now())),
        }
    }

    /// Opens, and logs why; or counts one more failed probe.
    fn open(&self, state: &mut State, why: String, at_least: Option<Duration>) {
        let (was_open, mut backoff) = match mem::replace(&mut state.phase, BreakerPhase::closed()) {
            BreakerPhase::Closed(_) => (false, Backoff::new(PROBE_FIRST, PROBE_CAP)),
            BreakerPhase::Open { backoff, .. } => (true, backoff),
        };
        let now = Instant::now();
        let delay = backoff.next_delay().max(at_least.unwrap_or_default());
        let probe_at = Some(now + delay);
        state.phase = BreakerPhase::Open { backoff, probe_at };
        if !was_open {
            state.since = now;
            let (api, reason) = (&*self.api, &*why);
            let retry_in_ms = delay.as_millis();
            warn!(api, reason, retry_in_ms, "API is down: records wait");
        }
        state.last_error = Some(why);
        if let Some(denials) = state.denials.take() {
            denials.everything.send_replace(true);
        }
    }
}

impl State {
    const fn is_open(&self) -> bool {
        matches!(self.phase, BreakerPhase::Open { .. })
    }
}

impl BreakerPhase {
    fn closed() -> Self {
        Self::Closed(Failures::default())
    }
}

impl Failures {
    /// Counts one more. Returns whether the API is down.
    fn add(&mut self, is_reached: bool) -> bool {
        let now = Instant::now();
        // After a time without POSTs, earlier failures say nothing about the API now.
        if self
            .span
            .is_some_and(|(_, last)| now - last >= REACHED_PATIENCE)
        {
            *self = Self::default();
        }
        let since = self.span.map_or(now, |(first, _)| first);
        self.span = Some((since, now));
        self.count += 1;
        self.unreached = if is_reached { 0 } else { self.unreached + 1 };
        self.unreached >= FAILURES_MAX
            || self.count >= FAILURES_MAX && now - since >= REACHED_PATIENCE
    }
}

impl Pass<'_> {
    /// The API answered, and neither asked for a retry nor denied the POST. `waiting` counts the
    /// records that an outage has kept waiting.
    pub fn succeeded(self, waiting: impl FnOnce() -> u64) {
        let mut state = self.breaker.state.lock();
        state.succeeded += 1;
        state.ended += 1;
        match &mut state.phase {
            BreakerPhase::Closed(failures) => *failures = Failures::default(),
            // A POST that began before the breaker opened says nothing about the API now.
            BreakerPhase::Open { .. } if !self.is_probe => return,
            BreakerPhase::Open { .. } => {
                state.phase = BreakerPhase::closed();
                let down = mem::replace(&mut state.since, Instant::now()).elapsed();
                let down_s = down.as_secs_f64();
                info!(
                    api = &*self.breaker.api,
                    down_s,
                    waited = waiting(),
                    "API is up again"
                );
            }
        }
        state.denials = None;
    }

    /// No answer, or one that asks for a retry, not before `at_least` if the API says so.
    pub fn failed(self, answer: &Answer, at_least: Option<Duration>) -> Judgement {
        let mut state = self.breaker.state.lock();
        state.ended += 1;
        let has_others = state.succeeded > self.succeeded;
        let opens = match &mut state.phase {
            // An API that has taken others meanwhile is up.
            BreakerPhase::Closed(_) if has_others => false,
            BreakerPhase::Closed(failures) => failures.add(answer.is_reached()),
            BreakerPhase::Open { .. } => self.is_probe,
        };
        if opens {
            self.breaker.open(&mut state, answer.to_string(), at_least);
        }
        self.judge(&state)
    }

    /// The same for a record that is known to fail: that says nothing about the API, unless the
    /// record was the probe.
    pub fn failed_again(self, answer: &Answer, at_least: Option<Duration>) {
        if self.is_probe {
            let mut state = self.breaker.state.lock();
            self.breaker.open(&mut state, answer.to_string(), at_least);
        }
    }

    fn judge(&self, state: &State) -> Judgement {
        Judgement {
            is_up: !state.is_open(),
            succeeded: [self.succeeded, state.succeeded],
            ended: state.ended,
        }
    }

    /// The API denied the POST with a status that a wrong token or a wrong path causes, too.
    /// Resolves when it is known whether it denies everything: when the breaker is open, when a
    /// POST succeeds, or when no other was denied for a moment.
    pub async fn denied(self, why: impl ToString) -> Denied {
        let mut verdict = {
            let mut state = self.breaker.state.lock();
            if state.is_open() {
                if self.is_probe {
                    self.breaker.open(&mut state, why.to_string(), None);
                }
                return Denied::Everything;
            }
            let denials = state.denials.get_or_insert_default();
            denials.count += 1;
            if denials.count >= DENIALS_MAX {
                let why = format!(
                    "{DENIALS_MAX} POSTs in a row were denied, the last with {}; check `url` and \
                     `token_file` of [api]",
                    why.to_string()
                );
                self.breaker.open(&mut state, why, None);
                return Denied::Everything;
            }
            denials.everything.send_replace(false);
            denials.everything.subscribe()
        };
        loop {
            match timeout(VERDICT_WAIT, verdict.changed()).await {
                Ok(Ok(())) if *verdict.borrow() => return Denied::Everything,
                // One more was denied.
                Ok(Ok(())) => {}
                // A POST has succeeded, or no other is made.
                Ok(Err(_)) | Err(_) => return Denied::TheRecord,
            }
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.is_probe {
            return;
        }
        // A probe without a result is followed by another at once.
        if let BreakerPhase::Open { probe_at, .. } = &mut self.breaker.state.lock().phase {
            probe_at.get_or_insert_with(Instant::now);
        }
        self.breaker.changes.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::{trial::TRIES, *};
    use crate::api::answer::FailureClass;

    fn none(why: &str) -> Answer {
        Answer::NoAnswer {
            class: FailureClass::Connect,
            why: why.into(),
        }
    }

    fn status(status: u16) -> Answer {
        Answer::Status {
            status,
            retry_after: None,
            excerpt: String::new(),
        }
    }

    async fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            breaker.pass().await.failed(&none("500"), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_lets_one_probe_through_at_a_time() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX - 1).await;
        breaker.pass().await.succeeded(|| 0);
        fail(&breaker, FAILURES_MAX - 1).await;
        assert!(!breaker.is_open(), "a success in between counts");
        breaker.pass().await.failed(&none("500"), None);
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
        probe.succeeded(|| 0);
        assert!(!breaker.is_open());
        assert!(breaker.pass().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_fails_or_vanishes_is_followed_by_another() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        for _ in 0..10 {
            let began = Instant::now();
            breaker.pass().await.failed(&none("500"), None);
            assert!(began.elapsed() <= PROBE_CAP);
        }
        drop(breaker.pass().await);
        let asked = Duration::from_secs(30);
        breaker.pass().await.failed(&none("503"), Some(asked));
        let began = Instant::now();
        breaker.pass().await.succeeded(|| 0);
        assert!(began.elapsed() >= asked, "Retry-After is honoured");
        assert!(!breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_has_not_failed_yet_is_the_first_to_probe() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        let failed = futures_util::future::join_all((0..64).map(|_| breaker.pass_again()));
        tokio::select! {
            biased;
            _ = failed => panic!("one that has failed was the first"),
            pass = breaker.pass() => pass.succeeded(|| 0),
        }
        fail(&breaker, FAILURES_MAX).await;
        breaker.pass_again().await.succeeded(|| 0);
        assert!(!breaker.is_open(), "there was no other");
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
        let (waited, ()) = tokio::join!(wait, async { probe.succeeded(|| 0) });
        assert_eq!(waited, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_to_an_old_post_does_not_close_it() {
        let breaker = Breaker::default();
        let old = breaker.pass().await;
        fail(&breaker, FAILURES_MAX).await;
        old.succeeded(|| 0);
        assert!(breaker.is_open());
    }

    /// `times` denials at once: what each of their records is told.
    async fn deny(breaker: &Breaker, times: u32) -> Vec<Denied> {
        let denied = (0..times).map(async |_| breaker.pass().await.denied("status 401").await);
        futures_util::future::join_all(denied).await
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_that_denies_everything_counts_as_down_and_condemns_no_record() {
        let breaker = Breaker::default();
        let told = deny(&breaker, DENIALS_MAX).await;
        assert!(
            told.iter().all(|told| *told == Denied::Everything),
            "{told:?}"
        );
        let health = breaker.health();
        let reason = health.last_error.unwrap();
        assert!(!health.is_up && health.retry_in.is_some());
        assert!(
            reason.contains("401") && reason.contains("token_file"),
            "{reason}"
        );
        // A probe is denied, too, and condemns no record either.
        assert_eq!(deny(&breaker, 3).await, [Denied::Everything; 3]);
        breaker.pass().await.succeeded(|| 0);
        assert!(breaker.health().is_up);
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_is_denied_while_the_api_takes_another_is_to_blame() {
        let breaker = Breaker::default();
        let began = Instant::now();
        let another = async { breaker.pass().await.succeeded(|| 0) };
        let (told, ()) = tokio::join!(deny(&breaker, DENIALS_MAX - 1), another);
        assert!(
            told.iter().all(|told| *told == Denied::TheRecord),
            "{told:?}"
        );
        assert!(began.elapsed() < VERDICT_WAIT, "the success is the verdict");
        assert_eq!(deny(&breaker, 1).await, [Denied::TheRecord]);
        assert!(began.elapsed() >= VERDICT_WAIT, "nothing else is POSTed");
        assert!(breaker.health().is_up);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_stream_of_denials_condemns_no_record() {
        let breaker = Breaker::default();
        let told = (1..=DENIALS_MAX).map(async |at| {
            tokio::time::sleep(at * VERDICT_WAIT / 2).await;
            breaker.pass().await.denied("status 403").await
        });
        let told = futures_util::future::join_all(told).await;
        assert!(
            told.iter().all(|told| *told == Denied::Everything),
            "{told:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_has_one_beginning_and_its_last_reason() {
        let breaker = Breaker::default();
        breaker
            .pass()
            .await
            .failed(&none("one record's fault"), None);
        assert_eq!(breaker.health().last_error, None, "it is no outage");
        fail(&breaker, FAILURES_MAX).await;
        let began = breaker.health().since;
        for _ in 0..5 {
            breaker.pass().await.failed(&none("refused"), None);
        }
        let health = breaker.health();
        assert_eq!(health.since, began);
        assert_eq!(health.last_error.as_deref(), Some("refused"));
        assert!(health.retry_in.is_some_and(|time| time <= PROBE_CAP));
        breaker.pass().await.succeeded(|| 0);
        assert!(breaker.health().is_up && breaker.health().since > began);
    }

    /// Answers may be about the records. Only time tells that the API takes none.
    #[tokio::test(start_paused = true)]
    async fn failures_that_reach_the_api_open_it_once_nothing_was_taken_for_a_while() {
        let breaker = Breaker::default();
        let step = REACHED_PATIENCE / 5;
        for _ in 0..3000 {
            breaker.pass().await.failed(&status(500), None);
        }
        assert!(!breaker.is_open());
        tokio::time::advance(4 * step).await;
        breaker.pass().await.succeeded(|| 0);
        for _ in 0..5 {
            breaker.pass().await.failed(&status(500), None);
            assert!(!breaker.is_open(), "it has taken one");
            tokio::time::advance(step).await;
        }
        breaker.pass().await.failed(&status(503), None);
        assert!(breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_before_a_time_without_posts_are_forgotten() {
        let breaker = Breaker::default();
        for _ in 0..3 {
            for _ in 0..100 {
                breaker.pass().await.failed(&status(500), None);
            }
            tokio::time::advance(REACHED_PATIENCE).await;
        }
        assert!(!breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn a_post_that_fails_while_others_succeed_does_not_open_it() {
        let breaker = Breaker::default();
        let mut hanging = Vec::new();
        for _ in 0..64 {
            hanging.push(breaker.pass().await);
        }
        breaker.pass().await.succeeded(|| 0);
        for pass in hanging {
            assert!(pass.failed(&none("refused"), None).is_up);
        }
        assert!(!breaker.is_open());
    }

    /// POSTs of others between two failures of a record.
    #[derive(Clone, Copy, Debug)]
    enum Others {
        None,
        Fail,
        Succeed,
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_to_blame_if_it_fails_three_times_while_others_are_answered() {
        for (others, failures, guilty, succeeded) in [
            (Others::None, 4, false, false),
            (Others::Fail, 2, false, false),
            (Others::Fail, 3, true, false),
            (Others::Succeed, 2, false, true),
            (Others::Succeed, 3, true, true),
        ] {
            let breaker = Breaker::default();
            let mut trial = Trial::default();
            for number in 0..failures {
                match others {
                    _ if number == 0 => {}
                    Others::None => {}
                    Others::Fail => drop(breaker.pass().await.failed(&status(500), None)),
                    Others::Succeed => breaker.pass().await.succeeded(|| 0),
                }
                trial.failed(breaker.pass().await.failed(&status(500), None));
            }
            let judged = (trial.is_guilty(), trial.others_succeeded());
            assert_eq!(
                judged,
                (guilty, succeeded),
                "{others:?}, {failures} failures"
            );
        }
        // With the API down, no record is to blame.
        let breaker = Breaker::default();
        let mut trial = Trial::default();
        for _ in 0..TRIES + FAILURES_MAX {
            fail(&breaker, 1).await;
            trial.failed(breaker.pass().await.failed(&none("refused"), None));
        }
        assert!(breaker.is_open() && !trial.is_guilty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_failed_before_says_nothing_about_the_api_unless_it_is_the_probe() {
        let breaker = Breaker::default();
        tokio::time::advance(REACHED_PATIENCE * 2).await;
        for _ in 0..100 {
            breaker.pass().await.failed_again(&status(500), None);
        }
        assert!(!breaker.is_open());
        fail(&breaker, FAILURES_MAX).await;
        breaker.pass().await.failed_again(&status(500), None);
        assert!(
            breaker.pass().now_or_never().is_none(),
            "the next probe waits"
        );
        breaker.pass().await.succeeded(|| 0);
        assert!(!breaker.is_open());
    }
}
