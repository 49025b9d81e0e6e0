//! What a message system must offer to be a lane, and one file per system that does. Each file is the only one that knows
//! its client crate.
//!
//! # The contract
//! The suite `tests/transport_contract.rs` holds every transport, `memory` included, to it:
//!
//! - [`Transport::publish`] resolves with `Ok` only when the message is durable in the system: a broker killed right after
//!   still has it. An error or a dropped future says nothing: the message may come out or not.
//! - A record comes out with the id, the bytes, the trace context and the origin it went in with, also where several travel as
//!   one message (`bundle`): each comes out, and is settled, by itself.
//! - A [`Delivery`] that is acked or rejected does not come again. One that is dropped comes again soon; one that is given
//!   back for later comes again, not before its delay has passed. While a delivery lives, the system does not send it to anyone else.
//! - [`Transport::close`] flushes what was settled and gives back what was not, what lies in client buffers included. Dropping a
//!   transport without `close` may skip that, but frees its connections, tasks and sockets.
//! - Every wait inside has a deadline, and a peer that falls silent is noticed within ten seconds: `next` then fails.

mod bundle;
pub mod grpc;
mod lost;
pub mod memory;
pub mod nats;
pub mod pubsub;
pub mod rabbitmq;
mod secret;

use std::{future::ready, time::Duration};

pub use self::bundle::Kind;
use crate::{
    delivery::Delivery,
    lane_id::LaneId,
    proto,
    record::{Origin, Record},
};

/// How long `connect` may take, declarations included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long `close` may take.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many messages a transport holds ready ahead of the forwarder.
pub const PREFETCH: u16 = 256;

/// Names under which the parts of a record other than its body cross a broker as headers or attributes.
pub mod header {
    pub const ID: &str = "Waypost-Id";
    pub const ORIGIN: &str = "Waypost-Origin";
    /// How many records the message has; absent from those that have one as their body.
    pub const BUNDLE: &str = "Waypost-Bundle";
    pub const TRACEPARENT: &str = "traceparent";
}

/// One connection to one message system, for both directions. It lives on one thread; its methods run there at the same
/// time. A value that has failed with [`TransportError::Lost`] is not used again: the lane closes it and connects anew.
pub trait Transport: Sized + 'static {
    const LANE: LaneId;
    /// What `connect` needs. It outlives connections, so what must survive a reconnect is kept here.
    type Settings: Clone + Send + Sync + Unpin + 'static;
    /// Whether a confirm depends on the message system alone. Where it does, a publish that times out while no other was
    /// confirmed either means that the connection is dead.
    const CONFIRMS_ALONE: bool = true;

    /// Connects, declares what is missing and checks what is there.
    ///
    /// # Errors
    /// When the system cannot be reached, or has something of the same name with other settings, which is never changed.
    fn connect(settings: &Self::Settings) -> impl Future<Output = Result<Self, TransportError>>;

    /// Resolves when the message is durable in the system. Called for many at once. `kind` is that of its body: a bundle only where
    /// [`Self::bundle_max`] allows one.
    ///
    /// # Errors
    /// The message may or may not be in the system.
    fn publish_as(
        &self,
        message: &Record,
        kind: Kind,
    ) -> impl Future<Output = Result<(), TransportError>>;

    /// The most bytes of a message of many records; 0 where each goes alone.
    fn bundle_max(&self) -> usize {
        0
    }

    /// Resolves when the record is durable in the system, in a message of its own.
    ///
    /// # Errors
    /// The record may or may not be in the system.
    fn publish(&self, record: &Record) -> impl Future<Output = Result<(), TransportError>> {
        self.publish_as(record, Kind::Single)
    }

    /// The same for each of `records`, in as few messages as the system allows; `settled` is told of each, by its place among them, as
    /// soon as it is known. Those that it was not told of when the future is dropped may or may not be in the system.
    fn publish_all(
        &self,
        records: &[impl AsRef<Record>],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) -> impl Future<Output = ()> {
        let publish = async |message: &Record, kind| self.publish_as(message, kind).await;
        bundle::publish_all(records, self.bundle_max(), settled, publish)
    }

    /// The next message; waits until there is one. Called by one task at a time. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When the connection is lost, however quiet the lane is.
    fn next(&self) -> impl Future<Output = Result<Delivery, TransportError>>;

    /// The next message, if it is here already. Not called while `next` waits.
    fn try_next(&self) -> Option<Delivery> {
        None
    }

    /// The next record of a message of which some have come out already, if there is one.
    fn next_opened(&self) -> impl Future<Output = Option<Delivery>> {
        ready(None)
    }

    /// Resolves once the connection is lost, however quiet the lane is and whether or not anyone waits in `next`.
    fn lost(&self) -> impl Future<Output = TransportError>;

    /// Flushes, gives back, disconnects, within [`CLOSE_TIMEOUT`].
    fn close(&self) -> impl Future<Output = ()>;

    /// What the system said of itself at `connect`.
    fn broker(&self) -> Broker;
}

/// The system behind a lane, and where its settings weaken the guarantee.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Broker {
    pub version: Option<String>,
    pub warnings: Vec<String>,
}

impl From<&Record> for proto::Record {
    fn from(record: &Record) -> Self {
        Self {
            id: record.id.to_string(),
            body: record.body.clone(),
            traceparent: record.traceparent.as_deref().unwrap_or_default().to_owned(),
            origin: record
                .origin
                .as_ref()
                .map(Origin::to_text)
                .unwrap_or_default(),
        }
    }
}

/// Why a transport failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// It cannot be reached, refuses our credentials, or its settings do not fit.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// This record is not confirmed. The connection may be well.
    #[error("not confirmed: {0}")]
    Publish(String),
    /// The connection is gone, or the system has fallen silent.
    #[error("connection lost: {0}")]
    Lost(String),
}
