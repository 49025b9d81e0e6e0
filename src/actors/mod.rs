//! The actor system: the actors, and their messages.
//!
//! ```text
//! ingest ──Route──▶ Router ──Publish──▶ Lane ══▶ broker ══▶ Lane's pull ──Forward──▶ Forwarder ──▶ API
//!                     ▲                   │
//!                     └───────Route───────┘   a lane that cannot confirm a record gives it back
//!
//! spool ──▶ Feeder ──Route──▶ Router ──▶ spool   a record that no lane confirms in time waits on disk
//!
//! Forwarder ──▶ spool ──▶ Retrier ──▶ API   a record that the API fails at is parked between tries
//! ```
//!
//! | message | from | to | means |
//! | --- | --- | --- | --- |
//! | [`Route`] | admission | router | make the records of this [`Job`] safe, and reply for each |
//! | [`Route`] | lane | router | this lane has not confirmed these records: try another |
//! | [`Publish`] | router | lane | confirm these records |
//! | [`Forward`] | lane | forwarder | POST these deliveries and settle each |
//! | [`Drain`] | supervisor, lane, node | lane, forwarder, feeder, retrier | finish what is in flight |
//! | [`Ping`] | supervisor | all | report progress |
//! | `ActorEvent` | all | supervisor | the actor has started, is ready, or has exited |
//! | [`supervisor::LaneCommand`] | control | supervisor | pause, drain, resume or restart a lane |
//! | [`supervisor::Snapshot`] | admin | supervisor | send a view of each actor |
//! | [`supervisor::DrainAll`] | node | supervisor | stop all lanes |
//!
//! The supervisor publishes the start and the end of each lane in one shared table,
//! [`live_lanes::LiveLanes`], not by messages. The limits and the last failures are there too.
//!
//! Records are sent with `try_send` only, and each carries the permit that admitted it, so no
//! mailbox holds more records than were admitted. Control messages are few and use `do_send`.

pub mod admission;
pub mod apis;
pub mod copies;
mod copy_table;
pub mod dead_letters;
pub mod fallback;
pub mod feeder;
pub mod forwarder;
pub mod held;
pub mod lane;
pub mod live_lanes;
pub mod parking;
pub mod receipts;
pub mod retrier;
pub mod router;
pub mod slot;
mod stored_route;
pub mod supervisor;

use std::{slice, sync::Arc};

use actix::{Actor, Context, Handler, Message};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use self::receipts::{PendingRecord, Refused};
use crate::{
    delivery::Delivery,
    lane_id::{LaneId, LaneSet},
    routing::{rules::CompiledRoute, scores::SentRecords},
    spool::Queue,
};

/// Records that a node may have in hand: enough to fill every lane's window, few enough to answer
/// quickly.
pub const RECORDS_MAX: usize = 8192;
/// Records of one spool queue that are on their way from the disk to a lane.
pub const FEEDER_WINDOW: usize = 256;
/// Records of all spool queues that are on their way from the disk to a lane.
pub const FED_MAX: usize = FEEDER_WINDOW * (1 + 2 * LaneId::ALL.len() + Queue::ROUTED);

/// Records on their way to their receipts. The records of one request that have one route go
/// together, by one lane, until some are confirmed and others are not.
///
/// One actor owns a job at a time. If it drops records without a reply (a panic, a stopped actor),
/// admission sends them again.
pub struct Job {
    pub records: Vec<PendingRecord>,
    pub route: Arc<CompiledRoute>,
    /// The only lane that they may take, if the client named one.
    pub pinned: Option<LaneId>,
    /// Lanes that have had them.
    pub tried: LaneSet,
    /// There while a lane has them.
    pub sent: Option<SentRecords>,
    pub source: Source,
    /// When admission sent them.
    pub began: Instant,
    pub permit: Arc<Permit>,
}

/// The origin of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A client waits for them.
    Client,
    /// They are in the spool, and stay there if no lane confirms them.
    Spool,
    /// They are copies in the spool of records that a lane has confirmed. The run that accepted
    /// them has counted that.
    Copies,
}

/// The records' place among those that this node may have in hand, by count and by bytes.
pub struct Permit {
    _records: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

impl Job {
    /// Bytes of the largest record as a message.
    pub fn largest_message(&self) -> usize {
        let sizes = self
            .records
            .iter()
            .map(|pending| pending.record.message_size());
        sizes.max().unwrap_or_default()
    }

    /// The lanes that may take them.
    pub fn lanes(&self) -> &[LaneId] {
        let pinned = self.pinned.as_ref().map(slice::from_ref);
        pinned.unwrap_or(&self.route.lanes)
    }

    /// Replies that nobody has the records.
    pub fn refuse(self, why: &Refused) {
        for pending in self.records {
            // A client that has hung up got no receipt either.
            pending.reply(Err(why.clone()));
        }
    }

    /// Keeps the records that have no reply yet.
    pub fn retain_unanswered(&mut self) {
        self.records.retain_mut(PendingRecord::is_unanswered);
    }

    /// Keeps the records whose client still waits for a reply.
    pub fn retain_waited_for(&mut self) {
        self.records.retain_mut(PendingRecord::client_waits);
    }
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct Route(pub Job);

#[derive(Message)]
#[rtype(result = "()")]
pub struct Publish(pub Job);

/// One permit for each delivery: the forwarder holds no more deliveries than there are permits, but
/// for those that have failed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forward {
    pub deliveries: Vec<Delivery>,
    pub permits: OwnedSemaphorePermit,
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct Drain;

/// An error says why the actor makes no progress.
#[derive(Message)]
#[rtype(result = "Result<(), String>")]
pub struct Ping;

/// An actor that the supervisor can start and watch.
pub trait Supervised: Actor<Context = Context<Self>> + Handler<Ping> + Handler<Drain> {
    /// The most messages that may wait: at least one for each permit of the records that are sent
    /// to the actor, so that an admitted record is never turned away.
    const MAILBOX: usize;
}
