//! The supervisor: it alone starts, restarts and stops actors.
//!
//! actix's own supervisor restarts an actor that stops, at once, without end and with the same
//! value; a panic ends an actor for good. Here each start makes a new actor from its factory, and
//! one table, `restart::RestartDecision::after`, says what follows an end:
//!
//! | end | what follows |
//! | --- | --- |
//! | stopped, because it was asked to | pause, or a start at once (restart) |
//! | failed: its broker is away, its connection broke | a start after a back-off, for ever |
//! | panicked, or stalled | a start after a back-off; given up at the fifth crash within a minute |
//!
//! The back-off is exponential with full jitter and starts again at its first step after a healthy
//! minute. An actor has stalled if it misses two heartbeats or reports no progress; it is then
//! started on a thread of its own, because its old thread may be blocked.
//!
//! `Child::set_state` makes each change of state: it updates the table of live lanes and the log.

mod child;
mod handle;
mod restart;
mod view;

use actix::{
    Actor, ActorFutureExt as _, AsyncContext as _, Context, Handler, Message, ResponseFuture,
    WrapFuture as _,
};
use futures_util::future::{FutureExt as _, join_all};

use self::{
    child::Child,
    handle::{ActorEvent, Event},
    restart::DesiredState,
};
pub use self::{
    handle::{Exit, Factory, SupervisorHandle, Thread, factory},
    restart::{BACKOFF_CAP, BACKOFF_FIRST, CRASHES_MAX, DRAIN_MAX, HEALTHY, HEARTBEAT, MISSES_MAX},
    view::{ChildId, State, View},
};
use super::live_lanes::LiveLanes;
use crate::lane_id::LaneId;

/// The commands of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Pause,
    Resume,
    Restart,
}

/// An operator's command; without effect during a drain. The answer says whether the lane exists.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "bool")]
pub struct LaneCommand {
    pub lane: LaneId,
    pub action: Action,
}

/// Requests a [`View`] of every supervised actor.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Vec<View>")]
pub struct Snapshot;

/// Stops all lanes for good: each finishes its records in flight, for up to [`DRAIN_MAX`]. The
/// answer comes when all have ended.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct DrainAll;

/// One per node. It supervises every other actor, so its own handlers do nothing that can fail.
pub struct Supervisor {
    children: Vec<Child>,
    /// All lanes are stopping for good.
    draining: bool,
}

impl Supervisor {
    /// The supervisor starts the children in the order of the list.
    pub fn new(live_lanes: &LiveLanes, children: Vec<(ChildId, Thread, Factory)>) -> Self {
        let children = children
            .into_iter()
            .map(|(id, thread, factory)| Child::new(id, thread, factory, live_lanes.clone()));
        Self {
            children: children.collect(),
            draining: false,
        }
    }

    /// The child, unless `generation` is an earlier one.
    fn current(&mut self, id: ChildId, generation: u64) -> Option<&mut Child> {
        self.children
            .iter_mut()
            .find(|child| child.view.child == id && child.generation == generation)
    }

    fn heartbeat(&mut self, ctx: &mut Context<Self>) {
        let pings = self.children.iter().filter_map(|child| {
            let id = child.view.child;
            let generation = child.generation;
            Some(child.ping()?.map(move |answer| (id, generation, answer)))
        });
        let answers = join_all(pings.collect::<Vec<_>>()).into_actor(self);
        ctx.spawn(answers.map(|answers, supervisor, ctx| {
            for (id, generation, answer) in answers {
                if let Some(child) = supervisor.current(id, generation) {
                    child.pinged(answer, ctx);
                }
            }
        }));
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        for child in &mut self.children {
            child.start(ctx);
        }
        ctx.run_interval(HEARTBEAT, Self::heartbeat);
    }
}

impl Handler<ActorEvent> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ActorEvent, ctx: &mut Self::Context) {
        match self.current(message.child, message.generation) {
            Some(child) => child.handle(message.event, ctx),
            None => {
                // An actor that was stopped while it started.
                if let Event::Started(running) = message.event {
                    running.task.abort();
                }
            }
        }
    }
}

impl Handler<LaneCommand> for Supervisor {
    type Result = bool;

    fn handle(&mut self, command: LaneCommand, ctx: &mut Self::Context) -> bool {
        let id = ChildId::Lane(command.lane);
        let Some(lane) = self
            .children
            .iter_mut()
            .find(|child| child.view.child == id)
        else {
            return false;
        };
        if !self.draining {
            lane.obey(command.action, ctx);
        }
        true
    }
}

impl Handler<Snapshot> for Supervisor {
    type Result = Vec<View>;

    fn handle(&mut self, _: Snapshot, _: &mut Self::Context) -> Vec<View> {
        let views = self.children.iter().map(|child| child.view.clone());
        views.collect()
    }
}

impl Handler<DrainAll> for Supervisor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: DrainAll, ctx: &mut Self::Context) -> Self::Result {
        self.draining = true;
        let mut ended = Vec::new();
        for lane in self
            .children
            .iter_mut()
            .filter(|child| matches!(child.view.child, ChildId::Lane(_)))
        {
            lane.stop(DesiredState::Paused, ctx);
            ended.extend(lane.ended());
        }
        Box::pin(async move {
            // Each lane is killed after DRAIN_MAX, so each of these closes.
            for mut lane in ended {
                while lane.changed().await.is_ok() {}
            }
        })
    }
}
