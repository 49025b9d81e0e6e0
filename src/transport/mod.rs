//! The contract of a message system that is a lane: it moves messages. The lane makes messages of
//! records and records of messages (`actors/lane`). Each file here is the only one that knows its
//! client crate.
//!
//! # The contract
//! The suite `tests/transport_contract.rs` holds every transport to it:
//!
//! - [`Transport::publish`] reports `Ok` for a message only when it is durable in the system: a
//!   broker killed right after still has it. An error or a dropped future says nothing: the message
//!   may come out or not.
//! - A message comes out with the headers and the bytes it went in with. A system without a broker
//!   (`grpc`) carries records only, and no bundles.
//! - A message that is acked or rejected is not redelivered. A message whose [`Incoming`] is
//!   dropped is redelivered soon, and one with a retry delay after that delay. While an
//!   [`Incoming`] lives, the system does not send its message to anyone else.
//! - [`Transport::close`] flushes the acks and naks the messages that are not settled, those in
//!   client buffers included. Dropping a transport without `close` may skip that, but frees its
//!   connections, tasks and sockets.
//! - Every wait inside has a deadline, and `receive` fails within ten seconds of a peer's silence.
//! - [`Transport::backlog`] counts a message from its confirm until its ack has arrived, and may
//!   count more.
//! - A message that another publisher sent without our headers comes out as well. Its id does not
//!   change when the system sends it again, as far as the system itself identifies messages.
//!
//! # A fifth system
//! It is one file here, one variant of [`LaneId`], one section of the
//! configuration and one line in the contract suite:
//!
//! 1. `transport/NAME.rs` implements [`Transport`]. Headers are [`Headers::pairs`] and
//!    [`Headers::read`]; `publish_each` implements `publish` by one call per message.
//! 2. The compiler then names each `match` that needs the variant: the lane's name, its default
//!    tag, its section, and the line of `node.rs` that starts it.
//! 3. `contract! { NAME: … }` in `tests/transport_contract.rs`, with a rig that starts the system.

pub mod grpc;
mod lost;
mod message;
pub mod nats;
pub mod pubsub;
pub mod rabbitmq;
mod remedy;
mod secret;

use std::{future::ready, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use tokio::time::{error::Elapsed, timeout};

use self::remedy::with_remedy;
pub use self::{
    message::{Headers, Incoming, Message, header},
    remedy::Remedy,
};
use crate::{
    lane_id::LaneId,
    proto,
    record::{Origin, TraceHeaders},
};

/// How long [`connect`] may take, declarations included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long [`Transport::close`] may take.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many messages a transport holds ready ahead of the forwarder.
pub const PREFETCH: u16 = 256;
/// How many messages a transport may hold unsettled: those that are ready, and those that wait for
/// their next POST.
pub const UNSETTLED_MAX: u16 = 5 * PREFETCH;

/// One connection to one message system, for both directions. It lives on one thread, and its
/// methods run there concurrently. After [`TransportError::Lost`] the lane closes it and connects
/// again.
pub trait Transport: Sized + 'static {
    /// The parameters of `connect`. They outlive connections.
    type Settings: Clone + Send + Sync + Unpin + 'static;
    /// Whether a confirm depends on the message system alone. Then a publish that times out while
    /// no other is confirmed means that the connection is dead.
    const CONFIRMS_ALONE: bool = true;
    /// What to do about errors of `connect`.
    const REMEDIES: &'static [Remedy] = &[];

    /// Where the system is, for messages: without credentials.
    fn address(settings: &Self::Settings) -> String;

    /// Connects, declares what is missing and checks what is there. [`connect`] sets the deadline.
    ///
    /// # Errors
    /// When the system cannot be reached, or has something of the same name with other settings,
    /// which is never changed.
    fn connect(settings: &Self::Settings) -> impl Future<Output = Result<Self, TransportError>>;

    /// Connects, and checks what is there as `connect` does. Creates nothing, and takes no message.
    ///
    /// # Errors
    /// As `connect`. What is missing is no error.
    fn inspect(
        settings: &Self::Settings,
    ) -> impl Future<Output = Result<Inspection, TransportError>>;

    /// Publishes each of `messages`. `settled` gets the index of a message when it is durable in
    /// the system, or when it fails. A message that failed may be in the system, and so may one
    /// that was not reported when the future is dropped. Several calls run concurrently.
    fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) -> impl Future<Output = ()>;

    /// Waits for a message and appends it to `into`, with those that are ready behind it, `max` in
    /// all. Called by one task at a time. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When the connection is lost, however quiet the lane is.
    fn receive(
        &self,
        into: &mut Vec<Incoming>,
        max: usize,
    ) -> impl Future<Output = Result<(), TransportError>>;

    /// Resolves once the connection is lost, however quiet the lane is and whether or not a task
    /// waits in `receive`.
    fn lost(&self) -> impl Future<Output = TransportError>;

    /// Flushes the acks, naks the unsettled messages and disconnects, within [`CLOSE_TIMEOUT`].
    fn close(&self) -> impl Future<Output = ()>;

    /// The system's version, warnings and limit, as of `connect`.
    fn info(&self) -> BrokerInfo;

    /// The number of the last message that the system is known to have had; 0 if it numbers none.
    /// Without that message, it has lost what it has confirmed.
    fn last_message(&self) -> u64 {
        0
    }

    /// How many messages the system has now.
    ///
    /// # Errors
    /// When the system does not answer, or has no such count.
    fn backlog(&self) -> impl Future<Output = Result<Backlog, String>> {
        ready(Err("it has no count of its messages".into()))
    }
}

/// The messages of a lane that are in its system, or in this node's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// The most messages that this node has published there and that are not settled. Those of
    /// others count as well, where they cannot be distinguished.
    pub messages: u64,
    /// Whether another node takes messages, too.
    pub is_shared: bool,
    /// Whether so many may be there if nothing moves. Otherwise some of them are the most that may be
    /// on their way, and are no proof that a record is there.
    pub is_exact: bool,
}

/// The system behind a lane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BrokerInfo {
    pub version: Option<String>,
    /// Settings that weaken the guarantee.
    pub warnings: Vec<String>,
    /// The most bytes of a message, headers included; `None` if the system does not tell.
    pub largest_message: Option<usize>,
    /// Whether a confirm survives a power cut of the system.
    #[schemars(with = "String", extend("enum" = ["yes", "no", "unknown"]))]
    pub outlives_power_cut: Durability,
    /// Changes when the system may have lost what it has confirmed.
    #[serde(skip)]
    pub incarnation: String,
    /// See [`Transport::last_message`], as of `connect`.
    #[serde(skip)]
    pub last_message: u64,
}

/// What a system has, as far as it can be known without a change.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    pub info: BrokerInfo,
    /// What was tried and found, one after the other.
    pub found: Vec<String>,
}

/// Whether a confirm survives a power cut of the system that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    Yes,
    /// It does after this time; never for the longest duration.
    No {
        after: Duration,
    },
    /// The system does not tell. It is taken to do so after this time.
    Unknown {
        after: Duration,
    },
}

impl Durability {
    /// The name in `/api/status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::No { .. } => "no",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// How long after a confirm a power cut may still take the message.
    pub const fn after(self) -> Duration {
        match self {
            Self::Yes => Duration::ZERO,
            Self::No { after } | Self::Unknown { after } => after,
        }
    }

    /// Copies whose records have left the system, and that stay all the same: another node has
    /// taken the records, and no confirm of this system becomes durable.
    pub fn stranded(self, copies: u64, in_flight: u64) -> u64 {
        if self.after() == Duration::MAX {
            copies.saturating_sub(in_flight)
        } else {
            0
        }
    }
}

impl Default for Durability {
    fn default() -> Self {
        Self::Unknown {
            after: Duration::MAX,
        }
    }
}

impl Serialize for Durability {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.serialize_str(self.name())
    }
}

/// The most bytes of a message on `lane` by the defaults of its system: an estimate, for as long as
/// the lane has not connected.
pub const fn default_largest_message(lane: LaneId) -> usize {
    match lane {
        LaneId::Grpc => grpc::MAX_MESSAGE,
        LaneId::Nats => nats::DEFAULT_MAX_PAYLOAD,
        LaneId::Rabbitmq => rabbitmq::DEFAULT_MAX_MESSAGE,
        LaneId::Pubsub => pubsub::MAX_MESSAGE,
    }
}

/// Connects within [`CONNECT_TIMEOUT`].
///
/// # Errors
/// As [`Transport::connect`], and when the time is over. The error names the address, and the
/// remedy where one is known.
pub async fn connect<T: Transport>(settings: &T::Settings) -> Result<T, TransportError> {
    let connected = timeout(CONNECT_TIMEOUT, T::connect(settings)).await;
    explained::<T, _>(connected, settings)
}

/// Inspects within [`CONNECT_TIMEOUT`].
///
/// # Errors
/// As [`connect`].
pub async fn inspect<T: Transport>(settings: &T::Settings) -> Result<Inspection, TransportError> {
    let inspected = timeout(CONNECT_TIMEOUT, T::inspect(settings)).await;
    explained::<T, _>(inspected, settings)
}

fn explained<T: Transport, O>(
    tried: Result<Result<O, TransportError>, Elapsed>,
    settings: &T::Settings,
) -> Result<O, TransportError> {
    let why = match tried {
        Ok(Err(TransportError::Connect(why))) => why,
        Ok(tried) => return tried,
        Err(_) => format!("no answer within {CONNECT_TIMEOUT:?}"),
    };
    let why = format!("{}: {why}", T::address(settings));
    Err(TransportError::Connect(with_remedy(why, T::REMEDIES)))
}

/// Implements [`Transport::publish`] by one call of `publish` for each message, all at once.
pub async fn publish_each(
    messages: &[Message],
    mut settled: impl FnMut(usize, Result<(), TransportError>),
    publish: impl AsyncFn(&Message) -> Result<(), TransportError>,
) {
    if let [message] = messages {
        return settled(0, publish(message).await);
    }
    let in_flight = messages.iter().enumerate();
    let in_flight = in_flight.map(async |(index, message)| (index, publish(message).await));
    let mut in_flight: FuturesUnordered<_> = in_flight.collect();
    while let Some((index, outcome)) = in_flight.next().await {
        settled(index, outcome);
    }
}

impl From<&Message> for proto::Record {
    fn from(Message { headers, body }: &Message) -> Self {
        let trace = headers.trace.as_ref();
        let state = trace.and_then(TraceHeaders::state);
        let origin = headers.origin.as_ref().map(Origin::to_text);
        Self {
            id: headers.id.to_string(),
            body: body.clone(),
            traceparent: trace.map_or("", TraceHeaders::parent).to_owned(),
            tracestate: state.unwrap_or_default().to_owned(),
            origin: origin.unwrap_or_default(),
            api: headers.api.as_deref().unwrap_or_default().to_owned(),
            event: headers.event.as_deref().unwrap_or_default().to_owned(),
        }
    }
}

/// Why a transport failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// It cannot be reached, refuses our credentials, or its settings do not fit.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// This message is not confirmed. The connection may still work.
    #[error("not confirmed: {0}")]
    Publish(String),
    /// The system works, and does not take this message for now, because it is full or over a quota.
    #[error("refused: {0}")]
    Refused(String),
    /// This message is larger than the system takes. The number is the limit in bytes, if the
    /// system has told it.
    #[error("larger than the {} that it takes", .0.map_or_else(|| "size".into(), |most| format!("{most} bytes")))]
    TooLarge(Option<usize>),
    /// The connection is gone, or the system has fallen silent.
    #[error("connection lost: {0}")]
    Lost(String),
}

impl TransportError {
    /// The class of the failure, in traces.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Publish(_) => "not_confirmed",
            Self::Refused(_) => "refused",
            Self::TooLarge(_) => "too_large",
            Self::Lost(_) => "connection_lost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_stranded_if_its_record_is_gone_and_no_confirm_releases_it() {
        let (never, soon) = (Duration::MAX, Duration::from_mins(2));
        for (durability, copies, in_flight, expected) in [
            (Durability::No { after: never }, 100, 30, 70),
            (Durability::Unknown { after: never }, 100, 30, 70),
            (Durability::Unknown { after: never }, 30, 100, 0),
            (Durability::Unknown { after: soon }, 100, 30, 0),
            (Durability::No { after: soon }, 100, 30, 0),
            (Durability::Yes, 100, 30, 0),
        ] {
            let found = durability.stranded(copies, in_flight);
            assert_eq!(found, expected, "{durability:?} {copies} {in_flight}");
        }
    }
}
