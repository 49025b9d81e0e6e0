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
//! minute. An actor has stalled if it misses two heartbeats, reports no progress, or does not even
//! start; it is then started on a thread of its own, because its old thread may be blocked.
//!
//! `Child::set_state` makes each change of state: it updates the table of live lanes and the log.
//! `outage` tells of a lane that is away.

mod child;
mod handle;
mod outage;
mod restart;
mod view;

use std::mem;

use actix::{
    Actor, Addr, AsyncContext as _, Context, Handler, Message, MessageResult, ResponseFuture,
};

use self::{
    child::Child,
    handle::{ActorEvent, Event},
    restart::DesiredState,
};
pub use self::{
    child::{Action, CommandOutcome},
    handle::{Factory, SupervisorHandle, Thread, factory},
    restart::{
        BACKOFF_CAP, BACKOFF_FIRST, CRASHES_MAX, DRAIN_MAX, Exit, HEALTHY, HEARTBEAT, MISSES_MAX,
        START_MAX,
    },
    view::{ChildId, State, View},
};
use super::live_lanes::LiveLanes;
use crate::lane_id::LaneId;

/// An operator's command; without effect while the node drains.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "CommandOutcome")]
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
    /// Orders of an earlier run, until the lanes start.
    first_commands: Vec<LaneCommand>,
    /// All lanes are stopping for good.
    draining: bool,
}

impl Supervisor {
    /// Starts a supervisor, and it starts the children in the order of the list.
    pub fn start(live_lanes: &LiveLanes, children: Vec<(ChildId, Thread, Factory)>) -> Addr<Self> {
        Self::start_with(live_lanes, children, Vec::new())
    }

    /// The same. The lanes have the `commands` before they start, so one that is paused does not
    /// connect.
    pub fn start_with(
        live_lanes: &LiveLanes,
        children: Vec<(ChildId, Thread, Factory)>,
        commands: Vec<LaneCommand>,
    ) -> Addr<Self> {
        Self::create(|ctx| {
            let child = |(id, thread, factory)| {
                let supervisor = ctx.address().recipient();
                Child::new(id, thread, factory, live_lanes.clone(), supervisor)
            };
            Self {
                children: children.into_iter().map(child).collect(),
                first_commands: commands,
                draining: false,
            }
        })
    }
}

impl Supervisor {
    fn carry_out(&mut self, command: LaneCommand) -> CommandOutcome {
        let id = ChildId::Lane(command.lane);
        let mut children = self.children.iter_mut();
        let lane = children.find(|child| child.view.child == id);
        match lane {
            None => CommandOutcome::NoSuchLane,
            Some(_) if self.draining => CommandOutcome::Unchanged,
            Some(lane) => lane.command(command.action),
        }
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        for command in mem::take(&mut self.first_commands) {
            self.carry_out(command);
        }
        let awake = self.children.iter_mut().filter(|child| !child.is_paused());
        awake.for_each(Child::start);
        ctx.run_interval(HEARTBEAT, |supervisor, _| {
            supervisor.children.iter_mut().for_each(Child::ping);
        });
    }
}

impl Handler<ActorEvent> for Supervisor {
    type Result = ();

    fn handle(&mut self, message: ActorEvent, _: &mut Self::Context) {
        let mut children = self.children.iter_mut();
        match children.find(|child| child.handle.sent(&message)) {
            Some(child) => child.handle(message.event),
            None => {
                // An actor that was stopped while it started.
                if let Event::Started(running) = message.event {
                    running.abort.abort();
                }
            }
        }
    }
}

impl Handler<LaneCommand> for Supervisor {
    type Result = MessageResult<LaneCommand>;

    fn handle(&mut self, command: LaneCommand, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.carry_out(command))
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

    fn handle(&mut self, _: DrainAll, _: &mut Self::Context) -> Self::Result {
        self.draining = true;
        let mut ended = Vec::new();
        for child in &mut self.children {
            if let ChildId::Lane(_) = child.view.child {
                child.stop(DesiredState::Paused);
                ended.extend(child.ended());
            }
        }
        Box::pin(async move {
            // Each lane is killed after DRAIN_MAX, so each of these closes.
            for mut lane in ended {
                while lane.changed().await.is_ok() {}
            }
        })
    }
}
