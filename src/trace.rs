//! Traces: what a record went through, as spans that a collector of OpenTelemetry takes.
//!
//! ```text
//! POST /             SERVER    a client's request
//! └─ create          PRODUCER  each record of it; this is the context that travels with the record
//!    ├─ send         CLIENT    the lane's publish of its message
//!    ├─ receive      CLIENT    the message came out of the lane
//!    └─ process      CONSUMER  from then on until it is settled, or on disk
//!       ├─ POST      CLIENT    each POST to the API, which gets this span's context
//!       └─ ack       CLIENT    how the message is settled
//! ```
//!
//! A record that waits on disk for its POST is a process again each time that it is POSTed, without
//! receive and ack: no broker has it.
//!
//! On the gRPC lane, send and receive are the two sides of a call. A span of several records (a
//! bundle, a POST of many) has no parent, and a link to each of them.
//!
//! A [`Tracer`] that is off costs a branch. With one that is on, a record that is not sampled costs
//! the reading of its trace context. Spans go to a bounded queue; the `exporter` has its own thread,
//! and no record ever waits for it.

pub mod context;
mod destination;
mod exporter;
mod queue;
mod sampler;
pub mod settings;
mod span;
mod tracer;

pub use self::{
    destination::Destinations,
    exporter::{Exporter, TraceStatus},
    queue::LossReason,
    settings::{OtelVariables, TraceSettings},
    tracer::{LaneTracer, MoveMark, OpenSpan, RequestTrace, Tracer},
};
