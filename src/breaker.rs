//! The circuit breaker before the API. It opens when the API fails at whatever it gets: there are no
//! POSTs but a single probe at a time, with back-off between probes, until one succeeds.
//!
//! It judges the API and never one record: an API that answers 2xx to other records is up. A
//! [`Trial`] judges the record. A record is *proven* bad once it has failed, the API has then taken
//! another, and it has failed again: its failures say nothing about the API any more.
//!
//! It also opens when the API denies every POST (401, 403 or 404): that is a wrong token or a wrong
//! path, and says nothing about the records.

mod announcer;
mod by_api;
#[cfg(test)]
mod simulation;
mod trial;

use std::{mem, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout, timeout_at},
};

use self::{
    announcer::{Announcer, ApiChange},
    trial::Judgement,
};
pub use self::{by_api::ApiBreakers, trial::Trial};
use crate::{api::answer::Answer, backoff::Backoff, changes::ChangeLog};

/// Failures in a row that open it if none of them has reached the API.
const FAILURES_MAX: u32 = 5;
/// Failures that have reached the API may be the records' fault. As many in a row open it once the
/// API has taken nothing for this long.
const REACHED_PATIENCE: Duration = Duration::from_secs(5);
/// The same when only parked records are left to fail: a stream may end with a few bad ones.
/// Longer than the first two pauses.
const PARKED_PATIENCE: Duration = Duration::from_secs(10);
/// Denials in a row that open it.
const DENIALS_MAX: u32 = 50;
/// A record that is denied waits this long for the next POST to show whose fault it is.
const VERDICT_WAIT: Duration = Duration::from_secs(2);
/// How long records that have failed leave the probe to others; twice as long if they are proven bad.
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
    change_log: ChangeLog,
    announcer: Announcer,
}

struct State {
    phase: BreakerPhase,
    /// When the breaker last opened or closed.
    since: Instant,
    /// The last failure while it was open.
    last_error: Option<String>,
    /// `None` if the last POST was not denied.
    denials: Option<Denials>,
    /// POSTs that have succeeded, and when the last did.
    succeeded: u64,
    succeeded_at: Option<Instant>,
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

/// Failures since a POST has succeeded last.
#[derive(Clone, Copy, Default)]
struct Failures {
    count: u32,
    /// Those since the last that has reached the API.
    unreached: u32,
    first: Option<Instant>,
    /// Failures of records in the lanes, without a long time between them: the first and the last.
    run: Option<(Instant, Instant)>,
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
            succeeded_at: None,
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

    /// The same breaker, with the log that gets its changes.
    #[must_use]
    pub fn with_change_log(self, change_log: ChangeLog) -> Self {
        Self { change_log, ..self }
    }

    /// Resolves when the record, or the batch, of `trial` may be POSTed. While the breaker is open,
    /// one that has not failed yet is the first to probe the API, and one that is proven bad the last.
    pub async fn pass(&self, trial: &Trial) -> Pass<'_> {
        let wait = PRECEDENCE * trial.rank();
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

    /// Opens, and notes why for [`Breaker::announce`]; or counts one more failed probe.
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
            self.announcer.note(ApiChange::Down {
                why: why.clone(),
                retry_in_s: delay.as_secs_f64(),
            });
        }
        state.last_error = Some(why);
        if let Some(denials) = state.denials.take() {
            denials.everything.send_replace(true);
        }
    }

    /// Logs the changes that were noted. The state must not be locked.
    fn announce(&self) {
        self.announcer.tell(&self.api, &self.change_log);
    }
}

impl State {
    const fn is_open(&self) -> bool {
        matches!(self.phase, BreakerPhase::Open { .. })
    }

    /// A POST has succeeded since `at`, and the API counts as up.
    fn has_taken_since(&self, at: Instant) -> bool {
        !self.is_open() && self.succeeded_at > Some(at)
    }
}

impl BreakerPhase {
    fn closed() -> Self {
        Self::Closed(Failures::default())
    }
}

impl Failures {
    /// Counts a POST that has failed. Returns whether the API is down.
    fn add(&mut self, trial: &Trial, is_reached: bool, now: Instant) -> bool {
        self.count += 1;
        self.unreached = if is_reached { 0 } else { self.unreached + 1 };
        let first = *self.first.get_or_insert(now);
        let (since, patience) = if trial.is_parked() {
            (first, PARKED_PATIENCE)
        } else {
            // After a time without POSTs, the failures of others say nothing about the API now.
            let run = self.run.filter(|(_, last)| now - *last < REACHED_PATIENCE);
            let since = run.map_or(now, |(first, _)| first);
            self.run = Some((since, now));
            let own = trial.first_failed_at().unwrap_or(now);
            (since.min(own), REACHED_PATIENCE)
        };
        self.unreached >= FAILURES_MAX || self.count >= FAILURES_MAX && now - since >= patience
    }
}

impl Pass<'_> {
    /// It is the only POST that is made while the breaker is open.
    pub const fn is_probe(&self) -> bool {
        self.is_probe
    }

    /// The API answered, and neither asked for a retry nor denied the POST. `waiting` counts the
    /// records that an outage has kept waiting.
    pub fn succeeded(self, waiting: impl FnOnce() -> u64) {
        let waiting = if self.is_probe { waiting() } else { 0 };
        let mut state = self.breaker.state.lock();
        state.succeeded += 1;
        state.succeeded_at = Some(Instant::now());
        state.ended += 1;
        match &mut state.phase {
            BreakerPhase::Closed(failures) => *failures = Failures::default(),
            // A POST that began before the breaker opened says nothing about the API now.
            BreakerPhase::Open { .. } if !self.is_probe => return,
            BreakerPhase::Open { .. } => {
                state.phase = BreakerPhase::closed();
                let down = mem::replace(&mut state.since, Instant::now()).elapsed();
                self.breaker.announcer.note(ApiChange::Up {
                    down_s: down.as_secs_f64(),
                    waiting,
                });
            }
        }
        state.denials = None;
        drop(state);
        let (breaker, is_probe) = (self.breaker, self.is_probe);
        // Others go on before the log is written.
        drop(self);
        if is_probe {
            breaker.announce();
        }
    }

    /// No answer, or one that asks for a retry. `trial` is that of what was POSTed.
    pub fn failed(self, answer: &Answer, trial: &mut Trial) {
        let now = Instant::now();
        let mut state = self.breaker.state.lock();
        trial.is_proven |= trial.failed_at.is_some_and(|at| state.has_taken_since(at));
        let is_connected = answer.is_connected();
        let is_about_the_record = trial.is_proven && is_connected;
        state.ended += 1;
        let has_others = state.succeeded > self.succeeded;
        let opens = match &mut state.phase {
            // An API that has taken others meanwhile is up.
            BreakerPhase::Closed(_) if is_about_the_record || has_others => false,
            BreakerPhase::Closed(failures) => failures.add(trial, answer.is_reached(), now),
            BreakerPhase::Open { .. } => self.is_probe,
        };
        if opens {
            let at_least = answer.pause();
            self.breaker.open(&mut state, answer.to_string(), at_least);
        }
        trial.failed(Judgement {
            at: now,
            is_up: !state.is_open(),
            is_connected,
            succeeded: [self.succeeded, state.succeeded],
            ended: state.ended,
        });
        drop(state);
        let breaker = self.breaker;
        // Others go on before the log is written.
        drop(self);
        breaker.announce();
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
                drop(state);
                let breaker = self.breaker;
                // Others go on before the log is written.
                drop(self);
                breaker.announce();
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
            is_retryable: true,
            retry_after: None,
            excerpt: String::new(),
        }
    }

    /// The pass of a record that has not failed yet.
    async fn pass(breaker: &Breaker) -> Pass<'_> {
        breaker.pass(&Trial::default()).await
    }

    /// A POST of such a record.
    async fn post(breaker: &Breaker, answer: &Answer) {
        pass(breaker).await.failed(answer, &mut Trial::default());
    }

    async fn take(breaker: &Breaker) {
        pass(breaker).await.succeeded(|| 0);
    }

    async fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            post(breaker, &none("500")).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_lets_one_probe_through_at_a_time() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX - 1).await;
        take(&breaker).await;
        fail(&breaker, FAILURES_MAX - 1).await;
        assert!(!breaker.is_open(), "a success in between counts");
        post(&breaker, &none("500")).await;
        assert!(breaker.is_open());
        assert!(pass(&breaker).now_or_never().is_none());

        let began = Instant::now();
        let probe = pass(&breaker).await;
        assert!(began.elapsed() <= PROBE_FIRST);
        assert!(
            tokio::time::timeout(PROBE_CAP * 10, pass(&breaker))
                .await
                .is_err(),
            "a second probe"
        );
        probe.succeeded(|| 0);
        assert!(!breaker.is_open());
        assert!(pass(&breaker).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_fails_or_vanishes_is_followed_by_another() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        for _ in 0..10 {
            let began = Instant::now();
            post(&breaker, &none("500")).await;
            assert!(began.elapsed() <= PROBE_CAP);
        }
        drop(pass(&breaker).await);
        let asked = Duration::from_secs(30);
        let overloaded = Answer::Status {
            status: 503,
            is_retryable: true,
            retry_after: Some(asked),
            excerpt: String::new(),
        };
        post(&breaker, &overloaded).await;
        let began = Instant::now();
        take(&breaker).await;
        assert!(began.elapsed() >= asked, "Retry-After is honoured");
        assert!(!breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn new_records_are_the_first_to_probe_and_proven_ones_the_last() {
        let ranks = [(false, false), (true, false), (true, true)];
        let trials = ranks.map(|(is_parked, is_proven)| {
            if is_parked {
                Trial::parked(is_proven, Duration::ZERO)
            } else {
                Trial::default()
            }
        });
        for first in 0..trials.len() {
            let breaker = Breaker::default();
            fail(&breaker, FAILURES_MAX).await;
            // Many of each, those that are to wait before the others.
            let waiting = trials[first..].iter().rev().flat_map(|trial| [trial; 64]);
            let waiting = waiting.map(async |trial| (breaker.pass(trial).await, trial.rank()));
            let ((probe, rank), ..) = futures_util::future::select_all(waiting.map(Box::pin)).await;
            assert_eq!(rank as usize, first);
            probe.succeeded(|| 0);
            assert!(!breaker.is_open());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_on_when_it_closes() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        let probe = pass(&breaker).await;
        let wait = async {
            futures_util::future::join_all((0..100).map(|_| pass(&breaker)))
                .await
                .len()
        };
        let (waited, ()) = tokio::join!(wait, async { probe.succeeded(|| 0) });
        assert_eq!(waited, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_to_an_old_post_does_not_close_it() {
        let breaker = Breaker::default();
        let old = pass(&breaker).await;
        fail(&breaker, FAILURES_MAX).await;
        old.succeeded(|| 0);
        assert!(breaker.is_open());
    }

    /// `times` denials at once: what each of their records is told.
    async fn deny(breaker: &Breaker, times: u32) -> Vec<Denied> {
        let denied = (0..times).map(async |_| pass(breaker).await.denied("status 401").await);
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
        take(&breaker).await;
        assert!(breaker.health().is_up);
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_is_denied_while_the_api_takes_another_is_to_blame() {
        let breaker = Breaker::default();
        let began = Instant::now();
        let another = async { take(&breaker).await };
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
            pass(&breaker).await.denied("status 403").await
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
        post(&breaker, &none("one record's fault")).await;
        assert_eq!(breaker.health().last_error, None, "it is no outage");
        fail(&breaker, FAILURES_MAX).await;
        let began = breaker.health().since;
        for _ in 0..5 {
            post(&breaker, &none("refused")).await;
        }
        let health = breaker.health();
        assert_eq!(health.since, began);
        assert_eq!(health.last_error.as_deref(), Some("refused"));
        assert!(health.retry_in.is_some_and(|time| time <= PROBE_CAP));
        take(&breaker).await;
        assert!(breaker.health().is_up && breaker.health().since > began);
    }

    #[tokio::test(start_paused = true)]
    async fn each_outage_is_two_changes_in_the_log() {
        let log = ChangeLog::default();
        let breaker = Breaker::new("http://api/".into()).with_change_log(log.clone());
        for outage in 1..3 {
            fail(&breaker, FAILURES_MAX).await;
            post(&breaker, &none("refused")).await;
            assert_eq!(log.last(), 2 * outage - 1);
            take(&breaker).await;
            take(&breaker).await;
            assert_eq!(log.last(), 2 * outage);
        }
    }

    /// Answers may be about the records. Only time tells that the API takes none.
    #[tokio::test(start_paused = true)]
    async fn failures_that_reach_the_api_open_it_once_nothing_was_taken_for_a_while() {
        let breaker = Breaker::default();
        let step = REACHED_PATIENCE / 5;
        for _ in 0..3000 {
            post(&breaker, &status(500)).await;
        }
        assert!(!breaker.is_open());
        tokio::time::advance(4 * step).await;
        take(&breaker).await;
        for _ in 0..5 {
            post(&breaker, &status(500)).await;
            assert!(!breaker.is_open(), "it has taken one");
            tokio::time::advance(step).await;
        }
        post(&breaker, &status(503)).await;
        assert!(breaker.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_before_a_time_without_posts_are_forgotten() {
        let breaker = Breaker::default();
        for _ in 0..3 {
            for _ in 0..100 {
                post(&breaker, &status(500)).await;
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
            hanging.push(pass(&breaker).await);
        }
        take(&breaker).await;
        for pass in hanging {
            let mut trial = Trial::default();
            pass.failed(&none("refused"), &mut trial);
            assert!(trial.is_api_up());
        }
        assert!(!breaker.is_open());
    }

    /// POSTs of others between two failures of a record.
    #[derive(Clone, Copy, Debug)]
    enum Others {
        None,
        Fail,
        /// They fail, and are known to be bad.
        FailAsEver,
        Succeed,
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_to_blame_if_it_fails_three_times_while_others_are_answered() {
        for (others, failures, guilty, succeeded) in [
            (Others::None, 4, false, false),
            (Others::Fail, 2, false, false),
            (Others::Fail, 3, true, false),
            (Others::FailAsEver, 3, true, false),
            (Others::Succeed, 2, false, true),
            (Others::Succeed, 3, true, true),
        ] {
            let breaker = Breaker::default();
            let mut trial = Trial::default();
            for number in 0..failures {
                match others {
                    _ if number == 0 => {}
                    Others::None => {}
                    Others::Fail => post(&breaker, &status(500)).await,
                    Others::FailAsEver => {
                        let mut trial = Trial::parked(true, Duration::ZERO);
                        breaker.pass(&trial).await.failed(&status(500), &mut trial);
                    }
                    Others::Succeed => take(&breaker).await,
                }
                breaker.pass(&trial).await.failed(&status(500), &mut trial);
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
            breaker
                .pass(&trial)
                .await
                .failed(&none("refused"), &mut trial);
        }
        assert!(breaker.is_open() && !trial.is_guilty());
        // Nor is one while no connection can be opened, though the API still counts as up.
        for (answer, guilty) in [(none("refused"), false), (status(500), true)] {
            let breaker = Breaker::default();
            let mut trial = Trial::default();
            for number in 0..TRIES {
                if number == 1 {
                    fail(&breaker, 1).await;
                }
                breaker.pass(&trial).await.failed(&answer, &mut trial);
            }
            assert_eq!(
                (breaker.is_open(), trial.is_guilty()),
                (false, guilty),
                "{answer}"
            );
        }
    }

    /// The fate of a parked record and of others, in this order, a second apart.
    #[derive(Clone, Copy, Debug)]
    enum ParkedEvent {
        /// It fails.
        Fails,
        /// The API takes another.
        Takes,
        /// The API goes down.
        Outage,
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_proven_bad_once_the_api_has_taken_another_between_two_of_its_failures() {
        use ParkedEvent::{Fails, Outage, Takes};
        for (events, proven) in [
            (&[Fails, Fails, Fails][..], false),
            (&[Takes, Fails, Fails], false),
            (&[Fails, Takes], false),
            (&[Fails, Takes, Fails], true),
            (&[Fails, Takes, Fails, Outage, Fails], true),
            (&[Fails, Outage, Fails], false),
            (&[Fails, Takes, Outage, Fails], false),
            (&[Fails, Outage, Fails, Takes, Fails], true),
        ] {
            for is_parked in [false, true] {
                let breaker = Breaker::default();
                let mut trial = Trial::default();
                let mut failed_at = None;
                for event in events {
                    tokio::time::advance(Duration::from_secs(1)).await;
                    match event {
                        Fails => {
                            if let Some(at) = failed_at.filter(|_| is_parked) {
                                trial = Trial::parked(trial.is_proven(), Instant::now() - at);
                            }
                            breaker.pass(&trial).await.failed(&status(500), &mut trial);
                            failed_at = Some(Instant::now());
                        }
                        Takes => take(&breaker).await,
                        Outage => {
                            fail(&breaker, FAILURES_MAX).await;
                            assert!(breaker.is_open());
                        }
                    }
                }
                assert_eq!(trial.is_proven(), proven, "{events:?}, parked: {is_parked}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_records_that_are_not_proven_bad_say_something_about_the_api() {
        let minute = Duration::from_mins(1);
        for (proven, answer, opens) in [
            (false, status(500), true),
            (false, none("refused"), true),
            (true, status(500), false),
            // No record is to blame for a connection that is refused.
            (true, none("refused"), true),
        ] {
            let breaker = Breaker::default();
            for _ in 0..FAILURES_MAX {
                assert!(!breaker.is_open());
                let mut trial = Trial::parked(proven, minute);
                breaker.pass(&trial).await.failed(&answer, &mut trial);
                tokio::time::advance(minute).await;
            }
            assert_eq!(breaker.is_open(), opens, "{proven}, {answer:?}");
        }
    }

    /// The API asks each for a pause of a minute, and nothing else is POSTed.
    #[tokio::test(start_paused = true)]
    async fn records_that_wait_long_between_their_failures_open_it() {
        let breaker = Breaker::default();
        let mut trials = [Trial::default(), Trial::default(), Trial::default()];
        for is_open in [false, true] {
            for trial in &mut trials {
                let pass = breaker.pass(trial).now_or_never();
                pass.expect("it is closed").failed(&status(503), trial);
                if breaker.is_open() {
                    break;
                }
            }
            assert_eq!(breaker.is_open(), is_open);
            tokio::time::advance(Duration::from_mins(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_proven_record_that_is_the_probe_keeps_it_open() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        let mut trial = Trial::parked(true, Duration::ZERO);
        breaker.pass(&trial).await.failed(&status(500), &mut trial);
        assert!(
            pass(&breaker).now_or_never().is_none(),
            "the next probe waits"
        );
        take(&breaker).await;
        assert!(!breaker.is_open());
    }
}
