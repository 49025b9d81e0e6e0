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
mod failures;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod trial;

use std::{mem, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout, timeout_at},
};
use tracing_mutex::parkinglot::Mutex;

use self::{
    announcer::{Announcer, ApiChange},
    failures::Failures,
    trial::Judgement,
};
pub use self::{by_api::ApiBreakers, trial::Trial};
use crate::{api::answer::Answer, backoff::Backoff, changes::ChangeLog};

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
