//! The actor system: who there is, and who tells whom what.
//!
//! ```text
//! ingest ──Route──▶ Router ──Publish──▶ Lane ──▶ transport ══▶ broker ══▶ Lane's pull ──Forward──▶ Forwarder ──▶ API
//!                     ▲                  │
//!                     └─────Returned─────┘   a lane that cannot confirm a record gives it back
//!
//! spool ──▶ Feeder ──Route──▶ Router ──▶ spool   what no lane confirms in time waits on disk, and comes again
//! ```
//!
//! | message | from | to | means |
//! | --- | --- | --- | --- |
//! | [`Route`] | ingest, feeder | router | make the records of this [`Job`] safe, and answer each |
//! | [`Publish`] | router | lane | confirm these records |
//! | [`Returned`] | lane | router | these are not confirmed here: try another |
//! | [`LaneUp`], [`LaneDown`] | supervisor | router | a lane takes records, or no longer does |
//! | [`Introduced`] | supervisor | router | these were all that are up |
//! | [`Forward`] | lane | forwarder | POST these deliveries and settle each |
//! | [`Drain`] | supervisor, lane, node | lane, forwarder, feeder | finish what is in flight |
//! | [`Ping`] | supervisor | all | are you alive, and getting on? |
//! | [`supervisor::ActorStarted`], [`supervisor::ActorReady`], [`supervisor::ActorExited`] | all | supervisor | the life of an actor |
//! | [`supervisor::LaneCommand`], [`supervisor::Snapshot`], [`supervisor::DrainAll`] | admin, node | supervisor | pause, resume, restart; how are all; stop |
//!
//! Records are sent with `try_send` only, and each carries the permit that admitted it, so no mailbox holds more than was
//! admitted. Control messages are few and use `do_send`.

pub mod admission;
pub mod fallback;
pub mod feeder;
pub mod forwarder;
pub mod lane;
pub mod receipts;
pub mod router;
pub mod supervisor;

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use actix::{Actor, Addr, Context, Handler, Message, Recipient};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, watch},
    time::Instant,
};

use self::receipts::PendingRecord;
use crate::{delivery::Delivery, lane_id::LaneId, spool::NotSafe};

/// Records that a node may have in hand: enough to keep every lane's window full, few enough to answer quickly.
pub const RECORDS_MAX: usize = 8192;
/// Records of one spool queue that are on their way from the disk to a lane.
pub const FEEDER_WINDOW: usize = 256;
/// Records of all spool queues that are on their way from the disk to a lane.
pub const FED_MAX: usize = FEEDER_WINDOW * (1 + LaneId::ALL.len());

/// Records on their way to their receipts: those of one request go together, by one lane, until some are confirmed and the others
/// are not. One actor owns them at a time; those that it drops without an answer (a panic, a stopped actor) are sent again by ingest.
pub struct Job {
    pub records: Vec<PendingRecord>,
    /// The only lane they may take, where the client named one.
    pub pinned: Option<LaneId>,
    /// Lanes that have failed to confirm them.
    pub tried: LaneSet,
    /// They lie in the spool already, and stay there if no lane confirms them.
    pub on_disk: bool,
    /// When they set out.
    pub began: Instant,
    _permit: Arc<admission::Permit>,
}

impl Job {
    /// Replies that nobody has the records.
    pub fn refuse(self, why: &Refused) {
        for pending in self.records {
            // Who has hung up got no receipt either.
            pending.reply(Err(why.clone()));
        }
    }

    /// Keeps those that have no answer yet.
    pub fn retain_unanswered(&mut self) {
        self.records.retain_mut(PendingRecord::is_unanswered);
    }

    /// Keeps those that somebody waits to hear of.
    pub fn retain_waited_for(&mut self) {
        self.records.retain_mut(PendingRecord::client_waits);
    }
}

/// Why a record was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no lane could confirm the record")]
    NoLane,
    #[error("no lane could confirm the record, and {0}")]
    NotSafe(#[from] NotSafe),
    #[error("this node has as many records in hand as it may have")]
    Overloaded,
}

/// A set of lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneSet(u8);

impl LaneSet {
    pub const fn insert(&mut self, lane: LaneId) {
        self.0 |= 1 << lane as u8;
    }

    #[must_use]
    pub const fn contains(self, lane: LaneId) -> bool {
        self.0 & (1 << lane as u8) != 0
    }
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct Route(pub Job);

#[derive(Message)]
#[rtype(result = "()")]
pub struct Publish(pub Job);

#[derive(Message)]
#[rtype(result = "()")]
pub struct Returned {
    pub job: Job,
    pub lane: LaneId,
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct LaneUp {
    pub lane: LaneId,
    pub publisher: Recipient<Publish>,
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct LaneDown(pub LaneId);

/// The router has been told of each lane that is up.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Introduced;

/// Each delivery has one of the permits: the forwarder has no more of them than there are.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forward {
    pub deliveries: Vec<Delivery>,
    pub permits: OwnedSemaphorePermit,
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct Drain;

/// The answer is the progress that the actor makes, or why it makes none.
#[derive(Message)]
#[rtype(result = "Result<(), String>")]
pub struct Ping;

/// What the supervisor asks of an actor.
pub trait Supervised: Actor<Context = Context<Self>> + Handler<Ping> + Handler<Drain> {
    /// How many messages may wait. It is at least the number of permits for what the actor is sent, so that a record that
    /// was admitted is never turned away.
    const MAILBOX: usize;
}

/// The address of an actor that may be restarted: it outlives the actor, and only the supervisor changes it.
pub struct Slot<A: Actor>(Arc<watch::Sender<Option<Addr<A>>>>);

impl<A: Actor> Slot<A> {
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// The present address, if the actor lives.
    #[must_use]
    pub fn get(&self) -> Option<Addr<A>> {
        self.0
            .borrow()
            .as_ref()
            .filter(|address| address.connected())
            .cloned()
    }

    /// The address, waiting for a restart up to `patience`.
    pub async fn wait(&self, patience: Duration) -> Option<Addr<A>> {
        if let Some(address) = self.get() {
            return Some(address);
        }
        let mut changes = self.0.subscribe();
        let lives = |address: &Option<Addr<A>>| address.as_ref().is_some_and(Addr::connected);
        let address = tokio::time::timeout(patience, changes.wait_for(lives))
            .await
            .ok()?
            .ok()?;
        address.clone()
    }

    fn set(&self, address: Option<Addr<A>>) {
        self.0.send_replace(address);
    }
}

impl<A: Actor> Clone for Slot<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A: Actor> Default for Slot<A> {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts work under way on one thread, so that a drain can wait for its end.
#[derive(Clone, Default)]
pub struct InFlight(Rc<InFlightState>);

#[derive(Default)]
struct InFlightState {
    count: Cell<usize>,
    idle: Notify,
}

/// One piece of work under way; it ends when this is dropped.
pub struct Underway(InFlight);

impl InFlight {
    #[must_use]
    pub fn begin(&self) -> Underway {
        self.0.count.set(self.0.count.get() + 1);
        Underway(self.clone())
    }

    /// Resolves when nothing is under way.
    pub async fn idle(&self) {
        while self.0.count.get() > 0 {
            self.0.idle.notified().await;
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let state = &self.0.0;
        state.count.set(state.count.get() - 1);
        if state.count.get() == 0 {
            state.idle.notify_one();
        }
    }
}

/// A task that ends with the value that holds this.
pub struct Task(tokio::task::AbortHandle);

impl Task {
    /// Starts it on the present thread.
    pub fn spawn(work: impl Future<Output = ()> + 'static) -> Self {
        Self(actix_rt::spawn(work).abort_handle())
    }

    /// It has come to its end, or has panicked.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
