//! Waypost: an actor-based message router. One process per node takes JSON records over HTTP, carries each over one of
//! several lanes, tags it with the path that it took, and POSTs it to an API.
//!
//! ```text
//!              HTTP                                                                          HTTP
//! client ──▶ ingest ──▶ router ──▶ lane: transport ══▶ broker ══▶ lane: pull ──▶ forwarder ──▶ API
//!               ▲        │ │  ▲        │ (publish, confirm)        (receive)        │ (tag, POST, settle)
//!               │ receipt│ │  │        └── fails ──▶ supervisor: back-off, new one  │
//!               └────────┤ │  └───────── up / down ───────┘                         ├──▶ ack to the broker
//!                        ▼ ▼                                                        ▼
//!                      spool: what waits ──▶ feeder ──▶ back to the router        spool: dead letters
//! ```
//!
//! # One reading
//!
//! The way of a record: [`cli::run`] → [`node`] → [`http::ingest`] → [`actors::admission`] → [`actors::router`] →
//! [`actors::lane`] → [`transport`] → [`actors::forwarder`] → [`api`]. Who tells whom what is the table in
//! [`actors`]; who restarts whom, and when, is the table in [`actors::supervisor`].
//!
//! # Words
//!
//! - **Record**: a JSON object with its id and its trace context ([`record::Record`]).
//! - **Lane**: one way from ingest to the API: a transport, its pull and its forwarder, with one state and one set of counts.
//! - **Transport**: what a message system must offer, in four verbs ([`transport::Transport`]).
//! - **Delivery**: a record that came out of a transport, settled exactly once ([`delivery::Delivery`]).
//! - **Receipt**: the proof that a record is safe ([`delivery::Receipt`]).
//! - **Spool**: the node's disk ([`spool::Spool`]): what waits for a lane, what the gRPC lane carries, and the dead letters. One
//!   sync serves all that wait for one.
//! - **Ledger**: one count per transition of a record ([`ledger::Ledger`]).
//!
//! # Invariants, and where they are kept
//!
//! 1. A 2xx leaves only after a receipt, and a receipt exists only after the broker's confirm or a sync of the spool: [`http::ingest`]
//!    waits for [`actors::admission::Admission::submit`], and receipts are made by a lane, after [`transport::Transport::publish`],
//!    and by [`actors::fallback::DiskFallback`], after [`spool::Spool::put`].
//! 2. A message is acked to its broker only after the API's 2xx or the sync of its dead letter: [`actors::forwarder`] is the only one
//!    that acks.
//! 3. A record keeps one id on every hop, retry and lane: [`transport::header`].
//! 4. What is unknown is not delivered: a [`delivery::Delivery`] dropped unsettled goes back to its broker, an
//!    [`actors::receipts::PendingRecord`] dropped unanswered is sent again.
//! 5. Every queue is bounded: records are admitted by permit ([`actors::admission`]), and pulled by permit ([`actors::lane`]). What no
//!    lane takes in time goes to the spool, and what the spool does not take is refused with 503.
//! 6. Nothing blocks an event loop: the spool and the table of keys have their own threads.
//! 7. Only the supervisor starts, restarts and stops actors, each time from a factory: [`actors::supervisor`].
//! 8. Alive means progress: heartbeats that are missed, confirms that do not come and connections that fall silent are
//!    ends like any other, with the reason in the lane's `last_error`.
//! 9. At rest the ledger balances: [`ledger`], where [`ledger::audit`] looks.
//! 10. Shutdown is a sequence: [`node::Node::drain`].
//!
//! # The store
//!
//! The spool is files of checksummed frames, written here rather than by an embedded database: what it must promise is what such
//! databases leave open. A flipped bit costs the entry that it lies in and is named, where a page or a block would take its
//! neighbours along or keep the store from opening; disk space is given back when a segment is settled, without compaction; a start
//! reads the end of what is sealed and not the whole; and after a failed write or sync the file is left, so that what was not
//! confirmed cannot come back. [`spool`] says how, its tests flip every bit.

pub mod actors;
pub mod api;
pub mod backoff;
pub mod breaker;
pub mod cli;
pub mod clock;
pub mod config;
pub mod delivery;
pub mod http;
pub mod idempotency;
pub mod lane_id;
pub mod ledger;
pub mod load;
pub mod node;
pub mod recent;
pub mod record;
pub mod sink;
pub mod spool;
pub mod tap;
pub mod transport;

/// The gRPC service, compiled from `proto/waypost/v1/waypost.proto`.
#[allow(clippy::pedantic, missing_docs, reason = "generated")]
pub mod proto {
    tonic::include_proto!("waypost.v1");

    /// The service's descriptors, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/waypost.bin"));
}
