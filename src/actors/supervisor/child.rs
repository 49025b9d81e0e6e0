//! One supervised actor: how it is started, stopped and killed, and its state.

use std::{collections::VecDeque, sync::Arc};

use actix::Recipient;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use super::{
    handle::{ActorEvent, Event, Factory, Running, SupervisorHandle, Thread},
    outage::OutageLog,
    restart::{
        BACKOFF_CAP, BACKOFF_FIRST, DRAIN_MAX, DesiredState, Exit, HEALTHY, HEARTBEAT, MISSES_MAX,
        RestartDecision, START_MAX,
    },
    view::{ChildId, State, View},
};
use crate::{
    actors::{Drain, Ping, Publish, live_lanes::LiveLanes},
    backoff::Backoff,
    changes::{Change, ShortReason},
    transport::BrokerInfo,
};

/// The commands of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Disconnect.
    Pause,
    /// Deliver what the lane has, and take nothing new.
    Drain,
    Resume,
    /// Connect anew. Ends a pause, and no drain.
    Restart,
}

impl Action {
    pub const ALL: [Self; 4] = [Self::Pause, Self::Drain, Self::Resume, Self::Restart];

    /// The name in URLs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Drain => "drain",
            Self::Resume => "resume",
            Self::Restart => "restart",
        }
    }

    /// The action of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.name() == name)
    }
}

/// The result of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandOutcome {
    Done,
    /// The lane was so already, or the node ends.
    Unchanged,
    NoSuchLane,
}

/// A supervised actor, over all of its starts.
pub(super) struct Child {
    pub(super) view: View,
    /// Each start and each end brings the next one, so that no event of an earlier start counts.
    pub(super) handle: SupervisorHandle,
    factory: Factory,
    thread: Thread,
    live_lanes: LiveLanes,
    desired: DesiredState,
    running: Option<Running>,
    backoff: Backoff,
    /// Panics and stalls of the last healthy minute.
    crashes: VecDeque<Instant>,
    outages: OutageLog,
    /// The state that the change log has last.
    logged_state: &'static str,
}

impl Child {
    pub(super) fn new(
        id: ChildId,
        thread: Thread,
        factory: Factory,
        live_lanes: LiveLanes,
        supervisor: Recipient<ActorEvent>,
    ) -> Self {
        Self {
            view: View::new(id),
            handle: SupervisorHandle::new(id, supervisor),
            factory,
            thread,
            live_lanes,
            desired: DesiredState::Running,
            running: None,
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_CAP),
            crashes: VecDeque::new(),
            outages: OutageLog::default(),
            logged_state: State::Connecting.name(),
        }
    }

    /// Starts a new actor, now.
    pub(super) fn start(&mut self) {
        self.handle = self.handle.next();
        self.desired = DesiredState::Running;
        self.view.attempts += 1;
        let handle = self.handle.clone();
        match &self.thread {
            Thread::Current => (self.factory)(handle),
            Thread::Arbiter(arbiter) => {
                let factory = Arc::clone(&self.factory);
                if !arbiter.spawn_fn(move || factory(handle)) {
                    self.thread = Thread::spawn();
                    let exit = Exit::Failed("its thread has ended".into());
                    self.handle.send(Event::Exited(exit));
                }
            }
        }
        self.handle.send_later(START_MAX, Event::StartTimedOut);
        self.set_state(State::Connecting);
    }

    pub(super) fn handle(&mut self, event: Event) {
        match event {
            Event::Started(running) => self.running = Some(running),
            Event::Ready(lane) => self.ready(lane),
            Event::Pinged(Ok(Ok(()))) => self.answered(),
            Event::Pinged(Ok(Err(why))) => self.kill(Exit::Stalled(why)),
            Event::Pinged(Err(_)) => self.missed_heartbeat(),
            Event::StartTimedOut if self.running.is_some() => {}
            Event::StartTimedOut => self.exited(Exit::Stalled("did not start in time".into())),
            Event::DrainTimedOut => self.kill(Exit::Unfinished),
            Event::Exited(exit) => self.exited(exit),
            Event::BackoffEnded => self.start(),
        }
    }

    fn ready(&mut self, lane: Option<(Recipient<Publish>, BrokerInfo)>) {
        if self.desired != DesiredState::Running {
            return;
        }
        if let (ChildId::Lane(id), Some((publisher, broker))) = (self.view.child, lane) {
            let known = &self.view.broker.warnings;
            let new = broker.warnings.iter();
            for warning in new.filter(|warning| !known.contains(warning)) {
                warn!(lane = %id, warning, "the broker's settings weaken the guarantee");
            }
            self.live_lanes
                .insert(id, publisher, broker.largest_message);
            self.view.broker = broker;
        }
        if let ChildId::Lane(lane) = self.view.child {
            self.outages.up(lane, self.view.since.elapsed());
        }
        self.set_state(State::Up);
    }

    /// Asks the actor to finish, and kills it if it takes longer than [`DRAIN_MAX`].
    pub(super) fn stop(&mut self, desired: DesiredState) {
        self.desired = desired;
        self.set_state(match desired {
            DesiredState::Paused => State::Paused,
            DesiredState::Running | DesiredState::Restarted => State::Connecting,
        });
        if let Some(running) = &self.running {
            running.drain.do_send(Drain);
            self.handle.send_later(DRAIN_MAX, Event::DrainTimedOut);
            return;
        }
        // Invalidates a back-off, and a start that is under way on another thread.
        self.handle = self.handle.next();
        if desired != DesiredState::Paused {
            self.start();
        }
    }

    /// Ends the actor at once.
    fn kill(&mut self, exit: Exit) {
        if let Some(running) = &self.running {
            running.abort.abort();
        }
        self.exited(exit);
    }

    /// The actor has ended: decides what follows.
    fn exited(&mut self, exit: Exit) {
        let now = Instant::now();
        self.handle = self.handle.next();
        let is_asked = self.running.take().is_some_and(|running| running.is_asked);
        if self.view.state == State::Up && now - self.view.since >= HEALTHY {
            self.backoff.reset();
        }
        // An actor that was asked to end and took too long has not crashed.
        if self.desired == DesiredState::Running
            && let Exit::Panicked(_) | Exit::Stalled(_) = exit
        {
            self.crashes.push_back(now);
            self.crashes.retain(|&at| now - at < HEALTHY);
        }
        let may_be_blocked = match exit {
            Exit::Stalled(_) => true,
            Exit::Unfinished => is_asked,
            _ => false,
        };
        if may_be_blocked && matches!(self.thread, Thread::Arbiter(_)) {
            self.thread = Thread::spawn();
        }
        let was_up = self.view.state == State::Up;
        let has_crashed = matches!(exit, Exit::Panicked(_) | Exit::Stalled(_));
        let decision = RestartDecision::after(&exit, self.desired, self.crashes.len());
        if let Some(why) = exit.reason() {
            if let ChildId::Lane(lane) = self.view.child {
                self.live_lanes.failed(lane, why);
            }
            self.view.last_error = Some(why.to_owned());
        }
        match decision {
            RestartDecision::StartNow => self.start(),
            RestartDecision::BackOff => {
                // Any other failure is an attempt to connect.
                self.view.restarts += u64::from(was_up || has_crashed);
                let delay = self.backoff.next_delay();
                self.handle.send_later(delay, Event::BackoffEnded);
                self.set_state(State::Backoff { until: now + delay });
                if let ChildId::Lane(lane) = self.view.child {
                    let reason = self.view.last_error.as_deref().unwrap_or_default();
                    self.outages
                        .failed(lane, reason, self.view.since.elapsed(), delay);
                }
            }
            RestartDecision::Pause => self.set_state(State::Paused),
            RestartDecision::GiveUp => self.set_state(State::Down),
        }
    }

    pub(super) fn command(&mut self, action: Action) -> CommandOutcome {
        let before = (self.is_paused(), self.view.is_draining, self.view.attempts);
        self.obey(action);
        if action != Action::Restart {
            self.set_draining(action == Action::Drain);
        }
        let after = (self.is_paused(), self.view.is_draining, self.view.attempts);
        if action == Action::Restart || before != after {
            CommandOutcome::Done
        } else {
            CommandOutcome::Unchanged
        }
    }

    /// As it was last asked to be.
    pub(super) fn is_paused(&self) -> bool {
        self.view.state == State::Paused && self.desired == DesiredState::Paused
    }

    fn set_draining(&mut self, is_draining: bool) {
        let is_new = self.view.is_draining != is_draining;
        self.view.is_draining = is_draining;
        if let ChildId::Lane(lane) = self.view.child {
            self.live_lanes.set_draining(lane, is_draining);
        }
        if is_new {
            self.log_change();
        }
    }

    fn obey(&mut self, action: Action) {
        match (action, self.view.state) {
            (Action::Resume | Action::Drain, State::Connecting | State::Up)
            // It connects by itself.
            | (Action::Drain, State::Backoff { .. }) => {}
            // It may have been resumed while it finished.
            (Action::Pause, State::Paused) => self.desired = DesiredState::Paused,
            (Action::Pause, _) => self.stop(DesiredState::Paused),
            // It still finishes after a pause, and starts again when it has.
            (Action::Resume | Action::Drain, State::Paused) if self.running.is_some() => {
                self.desired = DesiredState::Restarted;
            }
            (Action::Resume | Action::Drain, _) => {
                self.crashes.clear();
                self.start();
            }
            (Action::Restart, _) => {
                self.crashes.clear();
                self.view.restarts += 1;
                self.stop(DesiredState::Restarted);
            }
        }
    }

    /// Sends a heartbeat, if the actor runs.
    pub(super) fn ping(&mut self) {
        if let Some(running) = &mut self.running {
            running.is_asked = true;
            let answer = running.ping.send(Ping).timeout(HEARTBEAT);
            let handle = self.handle.clone();
            actix_rt::spawn(async move { handle.send(Event::Pinged(answer.await)) });
        }
    }

    fn answered(&mut self) {
        if let Some(running) = &mut self.running {
            running.misses = 0;
            running.is_asked = false;
        }
    }

    fn missed_heartbeat(&mut self) {
        if let Some(running) = &mut self.running {
            running.misses += 1;
            if running.misses >= MISSES_MAX {
                let why = format!("missed {MISSES_MAX} heartbeats of {HEARTBEAT:?}");
                self.kill(Exit::Stalled(why));
            }
        }
    }

    /// Closes when the actor that runs now has ended.
    pub(super) fn ended(&self) -> Option<watch::Receiver<()>> {
        Some(self.running.as_ref()?.ended.subscribe())
    }

    /// The one place where a state changes.
    fn set_state(&mut self, state: State) {
        let is_new = self.view.state != state;
        if !(self.view.state.is_away() && state.is_away()) {
            self.view.since = Instant::now();
        }
        self.view.state = state;
        if let ChildId::Lane(lane) = self.view.child
            && state != State::Up
        {
            let is_ordered = self.desired != DesiredState::Running;
            self.live_lanes.remove(lane, is_ordered);
        }
        if is_new {
            self.view.log();
        }
        let is_next_attempt = self.logged_state == "backoff" && state == State::Connecting;
        if self.logged_state != state.name() && !is_next_attempt {
            self.logged_state = state.name();
            self.log_change();
        }
    }

    fn log_change(&self) {
        let state = self.view.state.name();
        let until = match self.view.state {
            State::Backoff { until } => Some(until),
            _ => None,
        };
        let has_failed = matches!(self.view.state, State::Backoff { .. } | State::Down);
        let last_error = self.view.last_error.as_deref().map(ShortReason);
        let last_error = last_error.filter(|_| has_failed);
        let actor = self.view.child.to_string();
        self.live_lanes.change_log.add(match self.view.child {
            ChildId::Lane(lane) => Change::Lane {
                lane,
                state,
                draining: self.view.is_draining,
                last_error,
                retry_in_s: until.map(|at| (at - Instant::now()).as_secs_f64()),
            },
            _ => Change::Actor {
                actor: &actor,
                state,
                last_error,
            },
        });
    }
}
