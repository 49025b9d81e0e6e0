//! A supervised actor's side: its start from a factory, its handle to the supervisor, and its exit.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use actix::{Addr, AsyncContext as _, Context, Message, Recipient};
use actix_rt::Arbiter;
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::{sync::watch, task::AbortHandle};

use super::{ChildId, Supervisor};
use crate::{
    actors::{Drain, Ping, Publish, Supervised, slot::Slot},
    transport::BrokerInfo,
};

/// How an actor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was asked to.
    Stopped,
    /// Something that it depends on failed, such as its broker.
    Failed(String),
    /// Its own code panicked.
    Panicked(String),
    /// It was alive and made no progress.
    Stalled(String),
}

/// The thread that an actor runs on.
#[derive(Clone)]
pub enum Thread {
    /// The supervisor's own.
    Current,
    /// One that it may share with other actors.
    Arbiter(Arc<Arbiter>),
}

impl Thread {
    /// A new thread.
    pub fn spawn() -> Self {
        Self::Arbiter(Arc::new(Arbiter::new()))
    }
}

/// Starts an actor on the current thread; made by [`factory`].
pub type Factory = Arc<dyn Fn(SupervisorHandle) + Send + Sync>;

/// Builds a new actor with `make` at each start, and puts its address into `slot`.
pub fn factory<A>(
    slot: Slot<A>,
    make: impl Fn(SupervisorHandle) -> A + Send + Sync + 'static,
) -> Factory
where
    A: Supervised,
{
    Arc::new(move |handle| {
        let actor = match catch_unwind(AssertUnwindSafe(|| make(handle.clone()))) {
            Ok(actor) => actor,
            Err(panic) => return handle.exited(Exit::Panicked(panic_text(&*panic))),
        };
        let mut context = Context::new();
        context.set_mailbox_capacity(A::MAILBOX);
        let address = context.address();
        let body = context.into_future(actor);
        let watched = {
            let slot = slot.clone();
            let handle = handle.clone();
            async move {
                let exit = match AssertUnwindSafe(body).catch_unwind().await {
                    Ok(()) => handle.exit(),
                    Err(panic) => Exit::Panicked(panic_text(&*panic)),
                };
                // If this one was killed, the slot may hold its successor already.
                if slot.get().is_none() {
                    slot.set(None);
                }
                handle.exited(exit);
            }
        };
        let task = actix_rt::spawn(watched).abort_handle();
        slot.set(Some(address.clone()));
        handle.tell(Event::Started(Running {
            ping: address.clone().recipient(),
            drain: address.recipient(),
            task,
            misses: 0,
            ended: watch::Sender::new(()),
        }));
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// An actor tells its supervisor through this that it is ready, and why it exits.
#[derive(Clone)]
pub struct SupervisorHandle {
    child: ChildId,
    /// The start of the child that this belongs to. The supervisor ignores messages of earlier ones.
    generation: u64,
    supervisor: Addr<Supervisor>,
    exit: Arc<Mutex<Option<Exit>>>,
}

impl SupervisorHandle {
    pub(super) fn new(child: ChildId, generation: u64, supervisor: Addr<Supervisor>) -> Self {
        Self {
            child,
            generation,
            supervisor,
            exit: Arc::default(),
        }
    }

    /// The actor does its work from now on. A lane says where it takes records.
    pub fn ready(&self, lane: Option<(Recipient<Publish>, BrokerInfo)>) {
        self.tell(Event::Ready(lane));
    }

    /// Sets the reason for an exit, before the actor stops itself. The first reason counts.
    pub fn set_exit(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
    }

    fn exit(&self) -> Exit {
        let exit = self.exit.lock().take();
        exit.unwrap_or_else(|| Exit::Failed("stopped without a reason".into()))
    }

    pub(super) fn exited(&self, exit: Exit) {
        self.tell(Event::Exited(exit));
    }

    fn tell(&self, event: Event) {
        self.supervisor.do_send(ActorEvent {
            child: self.child,
            generation: self.generation,
            event,
        });
    }
}

/// Carries an event of an actor to its supervisor.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct ActorEvent {
    pub(super) child: ChildId,
    pub(super) generation: u64,
    pub(super) event: Event,
}

pub(super) enum Event {
    Started(Running),
    /// It does its work, a lane with this.
    Ready(Option<(Recipient<Publish>, BrokerInfo)>),
    Exited(Exit),
}

/// The supervisor's side of a running actor.
pub(super) struct Running {
    pub(super) ping: Recipient<Ping>,
    pub(super) drain: Recipient<Drain>,
    pub(super) task: AbortHandle,
    /// Heartbeats missed in a row.
    pub(super) misses: u8,
    /// Its receivers see it closed when the actor has ended.
    pub(super) ended: watch::Sender<()>,
}
