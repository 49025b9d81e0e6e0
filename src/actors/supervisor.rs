//! The supervisor: the only one that starts, restarts and stops actors.
//!
//! actix's own supervisor restarts an actor that stops, at once, without end and with the same value; a panic ends an actor
//! for good. Here an actor is made anew by its factory after any end, and what follows an end is one table, `next::RestartDecision::after`:
//!
//! | end | next |
//! | --- | --- |
//! | stopped, because it was asked to | rest (paused), or start at once (restart) |
//! | failed: its broker is away, its connection broke | start after a back-off, for ever |
//! | panicked, or stood still | start after a back-off; the fifth time within a minute, give it up |
//!
//! The back-off is exponential with full jitter and starts anew after a healthy minute. An actor stands still when it
//! misses two heartbeats or says itself that it makes no progress; it is then started on a thread of its own, for its old
//! thread may be blocked.
//!
//! Each change of a lane's state is made in `Supervisor::enter`, which tells the router and the log.

mod life;
mod next;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use actix::{
    Actor, ActorFutureExt as _, AsyncContext as _, Context, Handler, Message, Recipient,
    ResponseFuture, SpawnHandle, WrapFuture as _,
};
use actix_rt::Arbiter;
use futures_util::{FutureExt as _, future::join_all};
use tokio::{sync::watch, time::Instant};
use tracing::{error, info, warn};

pub use self::life::{
    ActorExited, ActorReady, ActorStarted, Exit, Start, SupervisorHandle, factory,
};
use self::{
    life::Running,
    next::{DesiredState, RestartDecision},
};
use super::{Drain, Introduced, LaneDown, LaneUp, Ping, Publish, Slot, router::Router};
use crate::{backoff::Backoff, lane_id::LaneId, transport::Broker};

/// The first back-off is at most this.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// No back-off is longer: a broker that answers again is found within a second.
pub const BACKOFF_CAP: Duration = Duration::from_secs(1);
/// An actor that has been up for so long starts its back-off anew; crashes older than this are forgotten.
pub const HEALTHY: Duration = Duration::from_mins(1);
/// With so many panics and standstills within [`HEALTHY`], an actor is given up.
pub const CRASHES_MAX: usize = 5;
/// Between two heartbeats, and how long an answer may take.
pub const HEARTBEAT: Duration = Duration::from_secs(3);
/// Heartbeats missed in a row that mean standstill.
pub const MISSES_MAX: u8 = 2;
/// How long an actor that was asked to finish may take before it is ended.
pub const DRAIN_MAX: Duration = Duration::from_secs(4);

/// One supervised actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildId {
    Router,
    Feeder,
    Lane(LaneId),
    Forwarder(LaneId),
}

impl ChildId {
    /// The lane that the actor is a part of.
    #[must_use]
    pub const fn lane(self) -> Option<LaneId> {
        match self {
            Self::Router | Self::Feeder => None,
            Self::Lane(lane) | Self::Forwarder(lane) => Some(lane),
        }
    }
}

/// The state of an actor, for a lane also what the world sees of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Connecting,
    Up,
    Backoff {
        until: Instant,
    },
    Paused,
    /// Given up after repeated crashes.
    Down,
}

impl State {
    /// As `/api/status` names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Backoff { .. } => "backoff",
            Self::Paused => "paused",
            Self::Down => "down",
        }
    }
}

/// What an operator may ask of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Pause,
    Resume,
    Restart,
}

/// An operator's word, which comes too late once all lanes are being ended. The answer is whether there is such a lane.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "bool")]
pub struct LaneCommand {
    pub lane: LaneId,
    pub action: Action,
}

/// How are all?
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Vec<View>")]
pub struct Snapshot;

/// Ends all lanes for good: each finishes what it has in flight, up to [`DRAIN_MAX`]. The answer comes when all have ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct DrainAll;

/// An actor as its supervisor sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub child: ChildId,
    pub state: State,
    pub since: Instant,
    pub restarts: u64,
    pub last_error: Option<String>,
    pub broker: Broker,
}

/// Where an actor runs.
#[derive(Clone)]
pub enum Thread {
    /// On the supervisor's own thread.
    Current,
    /// On a thread that it may share with others.
    Arbiter(Arc<Arbiter>),
}

impl Thread {
    /// A new thread.
    #[must_use]
    pub fn spawn() -> Self {
        Self::Arbiter(Arc::new(Arbiter::new()))
    }
}

struct Child {
    id: ChildId,
    start: Start,
    place: Thread,
    generation: u64,
    state: State,
    since: Instant,
    wish: DesiredState,
    live: Option<Running>,
    /// What the router needs to reach the lane; there while it is up.
    publisher: Option<Recipient<Publish>>,
    broker: Broker,
    restarts: u64,
    last_error: Option<String>,
    backoff: Backoff,
    crashes: VecDeque<Instant>,
    timer: Option<SpawnHandle>,
}

/// One per node. It watches all actors of the node but itself; its own handlers do nothing that can fail.
pub struct Supervisor {
    children: Vec<Child>,
    router: Slot<Router>,
    /// All lanes are being ended for good.
    draining: bool,
    /// How many lanes still run, for whoever waits for their end.
    running: watch::Sender<usize>,
}

impl Supervisor {
    /// The children start in the order of the list when the supervisor does.
    #[must_use]
    pub fn new(router: Slot<Router>, children: Vec<(ChildId, Thread, Start)>) -> Self {
        let children = children.into_iter().map(|(id, place, start)| Child {
            id,
            start,
            place,
            generation: 0,
            state: State::Connecting,
            since: Instant::now(),
            wish: DesiredState::Running,
            live: None,
            publisher: None,
            broker: Broker::default(),
            restarts: 0,
            last_error: None,
            backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_CAP),
            crashes: VecDeque::new(),
            timer: None,
        });
        Self {
            children: children.collect(),
            router,
            draining: false,
            running: watch::Sender::new(0),
        }
    }

    fn at(&self, id: ChildId) -> Option<usize> {
        self.children.iter().position(|child| child.id == id)
    }

    /// The child, if what is said of it comes from its present handle.
    fn present(&self, id: ChildId, generation: u64) -> Option<usize> {
        self.at(id)
            .filter(|&at| self.children[at].generation == generation)
    }

    fn launch(&mut self, at: usize, ctx: &mut Context<Self>) {
        let child = &mut self.children[at];
        child.generation += 1;
        child.wish = DesiredState::Running;
        if let Some(timer) = child.timer.take() {
            ctx.cancel_future(timer);
        }
        let handle = SupervisorHandle::new(child.id, child.generation, ctx.address());
        let start = Arc::clone(&child.start);
        match &child.place {
            Thread::Current => start(handle),
            Thread::Arbiter(thread) => {
                if !thread.spawn_fn({
                    let (start, handle) = (Arc::clone(&start), handle.clone());
                    move || start(handle)
                }) {
                    child.place = Thread::spawn();
                    handle.exited(Exit::Failed("its thread has ended".into()));
                }
            }
        }
        self.enter(at, State::Connecting, ctx);
    }

    /// The one place where a state changes.
    fn enter(&mut self, at: usize, state: State, ctx: &mut Context<Self>) {
        let child = &mut self.children[at];
        let was = std::mem::replace(&mut child.state, state);
        child.since = Instant::now();
        if state != State::Up {
            child.publisher = None;
        }
        if let State::Backoff { until } = state {
            let id = child.id;
            child.timer = Some(ctx.run_later(until - child.since, move |supervisor, ctx| {
                if let Some(at) = supervisor.at(id) {
                    supervisor.children[at].timer = None;
                    supervisor.launch(at, ctx);
                }
            }));
        }
        match child.id {
            ChildId::Router if state == State::Up => self.introduce_lanes(),
            ChildId::Lane(lane) => {
                let reason = child.last_error.as_deref().unwrap_or_default();
                match state {
                    State::Up => info!(%lane, "lane is up"),
                    State::Backoff { until } => {
                        warn!(%lane, reason, retry_in_ms = (until - child.since).as_millis(), "lane is away");
                    }
                    State::Paused => info!(%lane, "lane is paused"),
                    State::Down => error!(%lane, reason, "lane is given up after repeated crashes"),
                    State::Connecting => {}
                }
                if state == State::Up {
                    self.introduce_lanes();
                } else if was == State::Up
                    && let Some(router) = self.router.get()
                {
                    router.do_send(LaneDown(lane));
                }
            }
            ChildId::Router | ChildId::Feeder | ChildId::Forwarder(_) => match state {
                State::Backoff { .. } | State::Down => {
                    error!(actor = ?child.id, reason = child.last_error.as_deref(), state = state.name(), "actor ended");
                }
                State::Connecting | State::Up | State::Paused => {}
            },
        }
    }

    /// Tells the router of each lane that is up; a router that knows it already does not mind.
    fn introduce_lanes(&self) {
        let Some(router) = self.router.get() else {
            return;
        };
        for child in &self.children {
            if let (ChildId::Lane(lane), Some(publisher)) = (child.id, &child.publisher) {
                router.do_send(LaneUp {
                    lane,
                    publisher: publisher.clone(),
                });
            }
        }
        router.do_send(Introduced);
    }

    fn ended(&mut self, at: usize, exit: Exit, ctx: &mut Context<Self>) {
        let child = &mut self.children[at];
        let now = Instant::now();
        // Whatever the old handle still says is not heard.
        child.generation += 1;
        child.live = None;
        if child.state == State::Up && now - child.since >= HEALTHY {
            child.backoff.reset();
        }
        // What was asked to end and took too long has not crashed.
        if child.wish == DesiredState::Running
            && let Exit::Panicked(_) | Exit::Stalled(_) = exit
        {
            child.crashes.push_back(now);
            child.crashes.retain(|&at| now - at < HEALTHY);
        }
        if child.wish == DesiredState::Running
            && let (Exit::Stalled(_), Thread::Arbiter(_)) = (&exit, &child.place)
        {
            child.place = Thread::spawn();
        }
        let next = RestartDecision::after(&exit, child.wish, child.crashes.len());
        if let Exit::Failed(why) | Exit::Panicked(why) | Exit::Stalled(why) = exit {
            child.last_error = Some(why);
        }
        match next {
            RestartDecision::StartNow => self.launch(at, ctx),
            RestartDecision::BackOff => {
                child.restarts += 1;
                let until = now + child.backoff.next_delay();
                self.enter(at, State::Backoff { until }, ctx);
            }
            RestartDecision::Pause => self.enter(at, State::Paused, ctx),
            RestartDecision::GiveUp => self.enter(at, State::Down, ctx),
        }
        self.count_running();
    }

    fn count_running(&self) {
        let lanes = self
            .children
            .iter()
            .filter(|child| matches!(child.id, ChildId::Lane(_)));
        self.running
            .send_replace(lanes.filter(|child| child.live.is_some()).count());
    }

    /// Asks a running lane to finish, and ends it when it takes too long. The router hears of it first.
    fn finish(&mut self, at: usize, wish: DesiredState, ctx: &mut Context<Self>) {
        self.children[at].wish = wish;
        if self.children[at].live.is_none() {
            let child = &mut self.children[at];
            if let Some(timer) = child.timer.take() {
                ctx.cancel_future(timer);
            }
            // A start that is under way is of an old handle from now on.
            child.generation += 1;
            match wish {
                DesiredState::Paused => self.enter(at, State::Paused, ctx),
                DesiredState::Running | DesiredState::Restarted => self.launch(at, ctx),
            }
            return;
        }
        self.enter(
            at,
            if wish == DesiredState::Paused {
                State::Paused
            } else {
                State::Connecting
            },
            ctx,
        );
        let child = &self.children[at];
        if let Some(live) = &child.live {
            live.drain.do_send(Drain);
        }
        let (id, generation) = (child.id, child.generation);
        ctx.run_later(DRAIN_MAX, move |supervisor, ctx| {
            if let Some(at) = supervisor.present(id, generation) {
                supervisor.end_by_force(at, Exit::Stalled("did not finish in time".into()), ctx);
            }
        });
    }

    fn end_by_force(&mut self, at: usize, exit: Exit, ctx: &mut Context<Self>) {
        if let Some(live) = &self.children[at].live {
            live.task.abort();
        }
        self.ended(at, exit, ctx);
    }

    fn heartbeat(&mut self, ctx: &mut Context<Self>) {
        let pings = self.children.iter().filter_map(|child| {
            let ping = child.live.as_ref()?.ping.send(Ping).timeout(HEARTBEAT);
            let (id, generation) = (child.id, child.generation);
            Some(ping.map(move |answer| (id, generation, answer)))
        });
        ctx.spawn(join_all(pings.collect::<Vec<_>>()).into_actor(self).map(
            |answers, supervisor, ctx| {
                for (id, generation, answer) in answers {
                    let Some(at) = supervisor.present(id, generation) else {
                        continue;
                    };
                    let Some(live) = &mut supervisor.children[at].live else {
                        continue;
                    };
                    match answer {
                        Ok(Ok(())) => live.misses = 0,
                        Ok(Err(why)) => supervisor.end_by_force(at, Exit::Stalled(why), ctx),
                        Err(_) => {
                            live.misses += 1;
                            if live.misses >= MISSES_MAX {
                                let why =
                                    format!("missed {MISSES_MAX} heartbeats of {HEARTBEAT:?}");
                                supervisor.end_by_force(at, Exit::Stalled(why), ctx);
                            }
                        }
                    }
                }
            },
        ));
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        for at in 0..self.children.len() {
            self.launch(at, ctx);
        }
        ctx.run_interval(HEARTBEAT, Self::heartbeat);
    }
}

impl Handler<ActorStarted> for Supervisor {
    type Result = ();

    fn handle(
        &mut self,
        ActorStarted {
            child,
            generation,
            live,
        }: ActorStarted,
        _: &mut Self::Context,
    ) {
        match self.present(child, generation) {
            Some(at) => {
                self.children[at].live = Some(live);
                self.count_running();
            }
            None => live.task.abort(),
        }
    }
}

impl Handler<ActorReady> for Supervisor {
    type Result = ();

    fn handle(
        &mut self,
        ActorReady {
            child,
            generation,
            lane,
        }: ActorReady,
        ctx: &mut Self::Context,
    ) {
        let Some(at) = self.present(child, generation) else {
            return;
        };
        if self.children[at].wish != DesiredState::Running {
            return;
        }
        if let Some((publisher, broker)) = lane {
            for warning in &broker.warnings {
                warn!(actor = ?child, warning, "the broker's settings weaken the guarantee");
            }
            self.children[at].publisher = Some(publisher);
            self.children[at].broker = broker;
        }
        self.enter(at, State::Up, ctx);
    }
}

impl Handler<ActorExited> for Supervisor {
    type Result = ();

    fn handle(
        &mut self,
        ActorExited {
            child,
            generation,
            exit,
        }: ActorExited,
        ctx: &mut Self::Context,
    ) {
        if let Some(at) = self.present(child, generation) {
            self.ended(at, exit, ctx);
        }
    }
}

impl Handler<LaneCommand> for Supervisor {
    type Result = bool;

    fn handle(
        &mut self,
        LaneCommand { lane, action }: LaneCommand,
        ctx: &mut Self::Context,
    ) -> bool {
        let Some(at) = self.at(ChildId::Lane(lane)) else {
            return false;
        };
        if self.draining {
            return true;
        }
        let child = &mut self.children[at];
        match (action, child.state) {
            (Action::Pause, State::Paused) | (Action::Resume, State::Connecting | State::Up) => {}
            (Action::Pause, _) => self.finish(at, DesiredState::Paused, ctx),
            // Still finishing after a pause: it starts again when it has.
            (Action::Resume, State::Paused) if child.live.is_some() => {
                child.wish = DesiredState::Restarted
            }
            (Action::Resume, _) => {
                child.crashes.clear();
                self.launch(at, ctx);
            }
            (Action::Restart, _) => {
                child.crashes.clear();
                child.restarts += 1;
                self.finish(at, DesiredState::Restarted, ctx);
            }
        }
        true
    }
}

impl Handler<Snapshot> for Supervisor {
    type Result = Vec<View>;

    fn handle(&mut self, _: Snapshot, _: &mut Self::Context) -> Vec<View> {
        let views = self.children.iter().map(|child| View {
            child: child.id,
            state: child.state,
            since: child.since,
            restarts: child.restarts,
            last_error: child.last_error.clone(),
            broker: child.broker.clone(),
        });
        views.collect()
    }
}

impl Handler<DrainAll> for Supervisor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: DrainAll, ctx: &mut Self::Context) -> Self::Result {
        let lanes = self
            .children
            .iter()
            .enumerate()
            .filter(|(_, child)| matches!(child.id, ChildId::Lane(_)));
        self.draining = true;
        for at in lanes.map(|(at, _)| at).collect::<Vec<_>>() {
            self.finish(at, DesiredState::Paused, ctx);
        }
        self.count_running();
        let mut running = self.running.subscribe();
        Box::pin(async move {
            // Each lane is ended by force after DRAIN_MAX, so this ends.
            if running.wait_for(|&lanes| lanes == 0).await.is_err() {
                warn!("the supervisor ended before its lanes");
            }
        })
    }
}
