//! Waypost: an actor-based message router. One process per node takes JSON records over HTTP,
//! carries each over one of several lanes, tags it with the path that it took, and POSTs it to an
//! API.
//!
//! ```text
//!              HTTP                                                                          HTTP
//! client ──▶ ingest ──▶ router ──▶ lane: transport ══▶ broker ══▶ lane: pull ──▶ forwarder ──▶ API
//!               ▲        │ │  ▲        │ (publish, confirm)        (receive)        │ (tag, POST, settle)
//!               │ receipt│ │  │        └── fails ──▶ supervisor: back-off, new one  │
//!               └────────┤ │  └──── live lanes ───────────┘                         ├──▶ ack to the broker
//!                        ▼ ▼                                                        ▼
//!                      spool: waiting records ──▶ feeder ──▶ back to the router   spool: dead letters
//! ```
//!
//! # The walk of a record
//!
//! A record passes these modules in this order: [`cli::run`] → [`node`] → [`http::ingest`] →
//! [`actors::admission`] → [`actors::router`] → [`actors::lane`] → [`transport`] →
//! [`actors::forwarder`] → [`api`]. The table in [`actors`] lists the messages between actors; the
//! table in [`actors::supervisor`] says what follows the end of an actor.
//!
//! # Words
//!
//! - **Record**: a JSON object with its id and its trace context ([`record::Record`]).
//! - **Lane**: one way from ingest to the API: a transport, its pull and its forwarder, with one
//!   state and one set of counts ([`actors::lane`]).
//! - **Rule**: one of `[[routes]]`, which gives the records that it matches a **route**: policy and
//!   lanes ([`routing::rules`]).
//! - **Policy**: how the router chooses a lane ([`routing::choose`]); **score**: what it knows of one
//!   ([`routing::scores`]); **explanation**: why a record took it ([`routing::explain`]).
//! - **Message**: what a transport moves: headers and a body. By default one message is one record,
//!   and its body is the client's JSON ([`transport::Message`]).
//! - **Transport**: a message system behind one small trait: `connect`, `publish`, `receive`, `lost`,
//!   `close`, `info`, `backlog`; `inspect` looks at it for `waypost check` ([`transport::Transport`]).
//! - **Delivery**: a record that came out of a transport, settled exactly once
//!   ([`delivery::Delivery`]).
//! - **Receipt**: the proof that a record is safe ([`delivery::Receipt`]).
//! - **Spool**: the node's disk ([`spool::Spool`]): records that wait for a lane, records that the
//!   gRPC lane carries, copies of records that a broker's power cut could take, parked records, and
//!   dead letters. One sync serves all records that wait for one.
//! - **Parked**: a record that the API fails at while it takes others; it waits on disk for its next
//!   try ([`actors::parking`], [`actors::retrier`]).
//! - **API**: `[api]`, or one of `[apis.NAME]` that a rule has chosen; each has a share of every lane
//!   ([`actors::apis`]).
//! - **Held**: a record that came out of a lane while its API had no place for it; it waits on disk
//!   ([`actors::held`], [`actors::forwarder`]).
//! - **Order**: what an operator asks of a running node: pause a lane, read the configuration again
//!   ([`control`]).
//! - **Ledger**: one count per transition of a record ([`ledger::Ledger`]).
//!
//! # Invariants, and the places that keep them
//!
//! 1. A 2xx leaves only after a receipt, and a receipt exists only after the broker's confirm or a
//!    sync of the spool. [`http::ingest`] waits for [`actors::admission::Admission::submit`]. A
//!    lane makes a receipt after [`transport::Transport::publish`],
//!    [`actors::fallback::DiskFallback`] after [`spool::Spool::put`]. With `ack = "durable"`, a
//!    receipt outlives a power cut of node and broker: [`actors::copies`].
//! 2. A message is acked to its broker only after the API's 2xx, or the sync of its dead letter or
//!    of the parked or held record: [`actors::forwarder`] acks, and for records that share a message,
//!    [`actors::lane`] once each has ended.
//! 3. A record keeps one id on every hop, retry and lane: [`transport::Headers`].
//! 4. Unknown means not delivered. A [`delivery::Delivery`] that is dropped unsettled goes back to
//!    its broker; an [`actors::receipts::PendingRecord`] that is dropped without a reply is sent
//!    again.
//! 5. Every queue is bounded. Records are admitted by permit ([`actors::admission`]) and pulled by
//!    permit ([`actors::lane`]). A record that no lane takes in time goes to the spool; if the
//!    spool takes none, the client gets 503.
//! 6. Nothing blocks an event loop: the spool, the idempotency keys and the [`log`] have their own
//!    threads.
//! 7. Only the supervisor starts, restarts and stops actors, each time from a factory:
//!    [`actors::supervisor`].
//! 8. Alive means progress: a missed heartbeat, a missing confirm or a silent connection ends an
//!    actor like any failure, and the lane's `last_error` has the reason.
//! 9. At rest the ledger balances: [`ledger::audit`] checks it. [`ledger::Ledger::compare`] finds
//!    what a broker does not have any more.
//! 10. Shutdown is a sequence: [`node::Node::drain`].
//!
//! # The store
//!
//! The spool is files of checksummed frames and not an embedded database, because it must promise
//! what such databases leave open. A flipped bit costs the entry that holds it, and is reported; in
//! a database it costs a whole page or block, or the store does not open. Disk space is freed when
//! a segment is settled, without compaction. A start reads the end of a sealed segment, not all of
//! it. After a failed write or sync the file is abandoned, so an unconfirmed entry cannot come
//! back. [`spool`] has the details, and its tests flip every bit.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod actors;
pub mod api;
pub mod backoff;
pub mod breaker;
pub mod build_info;
pub mod changes;
pub mod cli;
pub mod clock;
pub mod cloud_events;
pub mod config;
pub mod control;
pub mod delivery;
pub mod file_work;
pub mod history;
pub mod http;
pub mod idempotency;
pub mod lane_id;
pub mod ledger;
pub mod load;
pub mod log;
pub mod node;
pub mod recent;
pub mod record;
pub mod routing;
pub mod secrets;
pub mod sink;
pub mod spool;
pub mod summary;
pub mod tap;
pub mod trace;
pub mod transport;

/// The gRPC service, compiled from `proto/waypost/v1/waypost.proto`.
#[allow(clippy::pedantic, missing_docs, reason = "generated")]
pub mod proto {
    tonic::include_proto!("waypost.v1");

    /// The service's descriptors, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/waypost.bin"));
}
