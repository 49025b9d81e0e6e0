//! A supervised actor's side: its start from a factory, and its handle to the supervisor.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use actix::{AsyncContext as _, Context, MailboxError, Message, Recipient};
use actix_rt::Arbiter;
use futures_util::{
    FutureExt as _,
    future::{AbortHandle, abortable},
};
use tokio::{sync::watch, time::sleep};
use tracing_mutex::parkinglot::Mutex;

use super::{restart::Exit, view::ChildId};
use crate::{
    actors::{Drain, Ping, Publish, Supervised, slot::Slot},
    transport::BrokerInfo,
};

/// The thread that an actor runs on.
#[derive(Clone)]
pub enum Thread {
    /// The supervisor's own.
    Current,
    /// A thread that it may share with other actors.
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
pub fn factory<A: Supervised>(
    slot: Slot<A>,
    make: impl Fn(SupervisorHandle) -> A + Send + Sync + 'static,
) -> Factory {
    let make = Arc::new(make);
    Arc::new(move |handle| {
        let slot = slot.clone();
        let make = Arc::clone(&make);
        let starting = handle.clone();
        let run = async move {
            // It may have waited for this thread until another one had started.
            if !starting.is_newest() {
                return;
            }
            let actor = make(starting.clone());
            let mut context = Context::new();
            context.set_mailbox_capacity(A::MAILBOX);
            let address = context.address();
            let (body, abort) = abortable(context.into_future(actor));
            slot.set(starting.generation, address.clone());
            starting.send(Event::Started(Running {
                ping: address.clone().recipient(),
                drain: address.recipient(),
                abort,
                misses: 0,
                is_asked: false,
                ended: watch::Sender::new(()),
            }));
            // The supervisor ignores the exit of an actor that it has aborted.
            body.await.ok();
        };
        actix_rt::spawn(async move {
            let exit = match AssertUnwindSafe(run).catch_unwind().await {
                Ok(()) => handle.exit(),
                Err(panic) => Exit::Panicked(panic_text(&*panic)),
            };
            handle.send(Event::Exited(exit));
        });
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// Carries an actor's events to its supervisor: it is ready, it exits.
#[derive(Clone)]
pub struct SupervisorHandle {
    child: ChildId,
    /// Counts the starts and the ends of the child.
    generation: u64,
    newest: Arc<AtomicU64>,
    supervisor: Recipient<ActorEvent>,
    exit: Arc<Mutex<Option<Exit>>>,
}

impl SupervisorHandle {
    pub(super) fn new(child: ChildId, supervisor: Recipient<ActorEvent>) -> Self {
        Self {
            child,
            generation: 0,
            newest: Arc::default(),
            supervisor,
            exit: Arc::default(),
        }
    }

    /// The handle of the next generation. The supervisor ignores the events of this one.
    pub(super) fn next(&self) -> Self {
        let generation = self.generation + 1;
        self.newest.store(generation, Relaxed);
        Self {
            generation,
            newest: Arc::clone(&self.newest),
            ..Self::new(self.child, self.supervisor.clone())
        }
    }

    fn is_newest(&self) -> bool {
        self.newest.load(Relaxed) == self.generation
    }

    pub(super) fn sent(&self, event: &ActorEvent) -> bool {
        (self.child, self.generation) == (event.child, event.generation)
    }

    /// The actor is ready for work. A lane also says who takes its records.
    pub fn ready(&self, lane: Option<(Recipient<Publish>, BrokerInfo)>) {
        self.send(Event::Ready(lane));
    }

    /// Sets the reason for an exit, before the actor stops itself. The first reason counts.
    pub fn set_exit(&self, exit: Exit) {
        self.exit.lock().get_or_insert(exit);
    }

    fn exit(&self) -> Exit {
        let exit = self.exit.lock().take();
        exit.unwrap_or_else(|| Exit::Failed("stopped without a reason".into()))
    }

    pub(super) fn send(&self, event: Event) {
        self.supervisor.do_send(ActorEvent {
            child: self.child,
            generation: self.generation,
            event,
        });
    }

    pub(super) fn send_later(&self, delay: Duration, event: Event) {
        let handle = self.clone();
        actix_rt::spawn(async move {
            sleep(delay).await;
            handle.send(event);
        });
    }
}

/// Carries an event of an actor to its supervisor.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct ActorEvent {
    child: ChildId,
    generation: u64,
    pub(super) event: Event,
}

pub(super) enum Event {
    Started(Running),
    /// It is ready for work, a lane with this.
    Ready(Option<(Recipient<Publish>, BrokerInfo)>),
    /// The answer to a heartbeat, or none in time.
    Pinged(Result<Result<(), String>, MailboxError>),
    /// It has not started in time.
    StartTimedOut,
    /// It has not finished in time.
    DrainTimedOut,
    Exited(Exit),
    BackoffEnded,
}

/// The supervisor's side of a running actor.
pub(super) struct Running {
    pub(super) ping: Recipient<Ping>,
    pub(super) drain: Recipient<Drain>,
    pub(super) abort: AbortHandle,
    /// Heartbeats missed in a row.
    pub(super) misses: u8,
    /// The last heartbeat has no answer yet.
    pub(super) is_asked: bool,
    /// Its receivers see it closed when the actor has ended.
    pub(super) ended: watch::Sender<()>,
}
