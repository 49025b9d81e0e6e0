//! One supervised actor: how it is started, stopped and killed, and its state.

use std::{collections::VecDeque, sync::Arc};

use actix::{AsyncContext as _, Context, MailboxError, Recipient, SpawnHandle};
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use super::{
    Action, Supervisor,
    handle::{Event, Exit, Factory, Running, SupervisorHandle, Thread},
    restart::{
        BACKOFF_CAP, BACKOFF_FIRST, DRAIN_MAX, DesiredState, HEALTHY, HEARTBEAT, MISSES_MAX,
        RestartDecision,
    },
    view::{ChildId, State, View},
};
use crate::{
    actors::{Drain, Ping, Publish, live_lanes::LiveLanes},
    backoff::Backoff,
    transport::BrokerInfo,
};

/// A supervised actor, over all of its starts.
pub(super) struct Child {
    pub(super) view: View,
    /// Changes with each start and each end: a message of another generation is ignored.
    pub(super) generation: u64,
    factory: Factory,
    thread: Thread,
    live_lanes: LiveLanes,
    desired: DesiredState,
    running: Option<Running>,
    backoff: Backoff,
    /// Panics and stalls of the last healthy minute.
    crashes: VecDeque<Instant>,
    /// The start after a back-off.
    timer: Option<SpawnHandle>,
}

impl Child {
    pub(super) fn new(id: ChildId, thread: Thread, factory: Factory, lanes: LiveLanes) -> Self {
        Self {
            view: View::new(id),
            generation: 0,
            factory,
            thread,
            live_lanes: lanes,
            desired: DesiredState::Running,
            running: None,
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_CAP),
            crashes: VecDeque::new(),
            timer: None,
        }
    }

    /// Starts a new actor, now.
    pub(super) fn start(&mut self, ctx: &mut Context<Supervisor>) {
        self.generation += 1;
        self.desired = DesiredState::Running;
        self.cancel_timer(ctx);
        let handle = SupervisorHandle::new(self.view.child, self.generation, ctx.address());
        match &self.thread {
            Thread::Current => (self.factory)(handle),
            Thread::Arbiter(arbiter) => {
                let factory = Arc::clone(&self.factory);
                let starting = handle.clone();
                if !arbiter.spawn_fn(move || factory(starting)) {
                    self.thread = Thread::spawn();
                    handle.exited(Exit::Failed("its thread has ended".into()));
                }
            }
        }
        self.set_state(State::Connecting);
    }

    /// Takes in what the actor says of itself.
    pub(super) fn handle(&mut self, event: Event, ctx: &mut Context<Supervisor>) {
        match event {
            Event::Started(running) => self.running = Some(running),
            Event::Ready(lane) => self.ready(lane),
            Event::Exited(exit) => self.exited(exit, ctx),
        }
    }

    fn ready(&mut self, lane: Option<(Recipient<Publish>, BrokerInfo)>) {
        if self.desired != DesiredState::Running {
            return;
        }
        if let (ChildId::Lane(id), Some((publisher, broker))) = (self.view.child, lane) {
            for warning in &broker.warnings {
                warn!(lane = %id, warning, "the broker's settings weaken the guarantee");
            }
            self.view.broker = broker;
            self.live_lanes.insert(id, publisher);
        }
        self.set_state(State::Up);
    }

    /// Asks the actor to finish, and kills it if it takes longer than [`DRAIN_MAX`].
    pub(super) fn stop(&mut self, desired: DesiredState, ctx: &mut Context<Supervisor>) {
        self.desired = desired;
        self.set_state(match desired {
            DesiredState::Paused => State::Paused,
            DesiredState::Running | DesiredState::Restarted => State::Connecting,
        });
        let Some(running) = &self.running else {
            self.cancel_timer(ctx);
            // Invalidates a start that is under way on another thread.
            self.generation += 1;
            if desired != DesiredState::Paused {
                self.start(ctx);
            }
            return;
        };
        running.drain.do_send(Drain);
        let child = self.view.child;
        let generation = self.generation;
        ctx.run_later(DRAIN_MAX, move |supervisor, ctx| {
            if let Some(child) = supervisor.current(child, generation) {
                child.kill(Exit::Stalled("did not finish in time".into()), ctx);
            }
        });
    }

    /// Ends the actor at once.
    fn kill(&mut self, exit: Exit, ctx: &mut Context<Supervisor>) {
        if let Some(running) = &self.running {
            running.task.abort();
        }
        self.exited(exit, ctx);
    }

    /// The actor has ended: decides what follows.
    fn exited(&mut self, exit: Exit, ctx: &mut Context<Supervisor>) {
        let now = Instant::now();
        self.generation += 1;
        self.running = None;
        if self.view.state == State::Up && now - self.view.since >= HEALTHY {
            self.backoff.reset();
        }
        // An actor that was asked to end and took too long has not crashed.
        if self.desired == DesiredState::Running {
            if let Exit::Panicked(_) | Exit::Stalled(_) = exit {
                self.crashes.push_back(now);
                self.crashes.retain(|&at| now - at < HEALTHY);
            }
            // The old thread may be blocked.
            if let (Exit::Stalled(_), Thread::Arbiter(_)) = (&exit, &self.thread) {
                self.thread = Thread::spawn();
            }
        }
        let decision = RestartDecision::after(&exit, self.desired, self.crashes.len());
        if let Exit::Failed(why) | Exit::Panicked(why) | Exit::Stalled(why) = exit {
            self.view.last_error = Some(why);
        }
        match decision {
            RestartDecision::StartNow => self.start(ctx),
            RestartDecision::BackOff => self.start_later(now, ctx),
            RestartDecision::Pause => self.set_state(State::Paused),
            RestartDecision::GiveUp => self.set_state(State::Down),
        }
    }

    fn start_later(&mut self, now: Instant, ctx: &mut Context<Supervisor>) {
        self.view.restarts += 1;
        let delay = self.backoff.next_delay();
        let child = self.view.child;
        let generation = self.generation;
        self.timer = Some(ctx.run_later(delay, move |supervisor, ctx| {
            if let Some(child) = supervisor.current(child, generation) {
                child.timer = None;
                child.start(ctx);
            }
        }));
        self.set_state(State::Backoff { until: now + delay });
    }

    fn cancel_timer(&mut self, ctx: &mut Context<Supervisor>) {
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
    }

    /// Does what an operator asks of a lane.
    pub(super) fn obey(&mut self, action: Action, ctx: &mut Context<Supervisor>) {
        match (action, self.view.state) {
            (Action::Pause, State::Paused) | (Action::Resume, State::Connecting | State::Up) => {}
            (Action::Pause, _) => self.stop(DesiredState::Paused, ctx),
            // It still finishes after a pause, and starts again when it has.
            (Action::Resume, State::Paused) if self.running.is_some() => {
                self.desired = DesiredState::Restarted;
            }
            (Action::Resume, _) => {
                self.crashes.clear();
                self.start(ctx);
            }
            (Action::Restart, _) => {
                self.crashes.clear();
                self.view.restarts += 1;
                self.stop(DesiredState::Restarted, ctx);
            }
        }
    }

    /// Sends a heartbeat, if the actor runs.
    pub(super) fn ping(
        &self,
    ) -> Option<impl Future<Output = Result<Result<(), String>, MailboxError>> + use<>> {
        Some(self.running.as_ref()?.ping.send(Ping).timeout(HEARTBEAT))
    }

    /// The answer to a heartbeat, or none in time.
    pub(super) fn pinged(
        &mut self,
        answer: Result<Result<(), String>, MailboxError>,
        ctx: &mut Context<Supervisor>,
    ) {
        let Some(running) = &mut self.running else {
            return;
        };
        match answer {
            Ok(Ok(())) => running.misses = 0,
            Ok(Err(why)) => self.kill(Exit::Stalled(why), ctx),
            Err(_) => {
                running.misses += 1;
                if running.misses >= MISSES_MAX {
                    let why = format!("missed {MISSES_MAX} heartbeats of {HEARTBEAT:?}");
                    self.kill(Exit::Stalled(why), ctx);
                }
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
        self.view.state = state;
        self.view.since = Instant::now();
        if let ChildId::Lane(lane) = self.view.child
            && state != State::Up
        {
            self.live_lanes.remove(lane);
        }
        if is_new {
            self.view.log();
        }
    }
}
