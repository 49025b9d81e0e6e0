//! One handle of an actor: how it is started from its factory, what it holds of its supervisor, and how its end is caught.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use actix::{Addr, AsyncContext as _, Context, Message, Recipient};
use futures_util::FutureExt as _;
use tokio::task::AbortHandle;

use super::{ChildId, Supervisor};
use crate::{
    actors::{Drain, Ping, Publish, Slot, Supervised},
    transport::Broker,
};

/// How an actor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was asked to.
    Stopped,
    /// What it depends on failed.
    Failed(String),
    /// Its own code failed.
    Panicked(String),
    /// It lived and did nothing.
    Stalled(String),
}

/// Starts an actor on the present thread; made by [`factory`].
pub type Start = Arc<dyn Fn(SupervisorHandle) + Send + Sync>;

/// How to start an actor: `make` builds a new value each time, and `slot` gets its address.
pub fn factory<A>(
    slot: Slot<A>,
    make: impl Fn(SupervisorHandle) -> A + Send + Sync + 'static,
) -> Start
where
    A: Supervised,
{
    Arc::new(move |handle| {
        let actor = match catch_unwind(AssertUnwindSafe(|| make(handle.clone()))) {
            Ok(actor) => actor,
            Err(panic) => return handle.exited(Exit::Panicked(text_of(&*panic))),
        };
        let mut context = Context::new();
        context.set_mailbox_capacity(A::MAILBOX);
        let address = context.address();
        let body = context.into_future(actor);
        let watched = {
            let (slot, handle) = (slot.clone(), handle.clone());
            async move {
                let exit = match AssertUnwindSafe(body).catch_unwind().await {
                    Ok(()) => handle.reason(),
                    Err(panic) => Exit::Panicked(text_of(&*panic)),
                };
                // A successor may have its place by now, if this one was ended by force.
                if slot.get().is_none() {
                    slot.set(None);
                }
                handle.exited(exit);
            }
        };
        let task = actix_rt::spawn(watched).abort_handle();
        slot.set(Some(address.clone()));
        handle.supervisor.do_send(ActorStarted {
            child: handle.child,
            generation: handle.generation,
            live: Running {
                ping: address.clone().recipient(),
                drain: address.recipient(),
                task,
                misses: 0,
            },
        });
    })
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// What an actor holds of its supervisor: how to say that it is up, and why it ends.
#[derive(Clone)]
pub struct SupervisorHandle {
    child: ChildId,
    /// Which handle of the child this is; what an earlier one still says is not heard.
    generation: u64,
    supervisor: Addr<Supervisor>,
    reason: Arc<Mutex<Option<Exit>>>,
}

impl SupervisorHandle {
    pub(super) fn new(child: ChildId, generation: u64, supervisor: Addr<Supervisor>) -> Self {
        Self {
            child,
            generation,
            supervisor,
            reason: Arc::default(),
        }
    }

    /// The actor does its work from now on. A lane says where it takes records.
    pub fn ready(&self, lane: Option<(Recipient<Publish>, Broker)>) {
        self.supervisor.do_send(ActorReady {
            child: self.child,
            generation: self.generation,
            lane,
        });
    }

    /// Says why the actor ends, before it stops itself. The first reason counts.
    pub fn set_exit(&self, exit: Exit) {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(exit);
    }

    fn reason(&self) -> Exit {
        let reason = self
            .reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        reason.unwrap_or_else(|| Exit::Failed("stopped without a reason".into()))
    }

    pub(super) fn exited(&self, exit: Exit) {
        self.supervisor.do_send(ActorExited {
            child: self.child,
            generation: self.generation,
            exit,
        });
    }
}

/// An actor runs.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ActorStarted {
    pub(super) child: ChildId,
    pub(super) generation: u64,
    pub(super) live: Running,
}

/// An actor does its work.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ActorReady {
    pub(super) child: ChildId,
    pub(super) generation: u64,
    pub(super) lane: Option<(Recipient<Publish>, Broker)>,
}

/// An actor has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ActorExited {
    pub(super) child: ChildId,
    pub(super) generation: u64,
    pub(super) exit: Exit,
}

/// What the supervisor holds of a running actor.
pub(super) struct Running {
    pub(super) ping: Recipient<Ping>,
    pub(super) drain: Recipient<Drain>,
    pub(super) task: AbortHandle,
    pub(super) misses: u8,
}
