//! An entry on disk: a protobuf message, so that later versions may add fields.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use crate::record::{Origin, Record, TraceHeaders};

/// A record on disk.
#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub body: Bytes,
    #[prost(string, optional, tag = "3")]
    pub traceparent: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub origin: Option<String>,
    /// Set for dead letters, and for parked and held records.
    #[prost(message, optional, tag = "5")]
    pub reason: Option<DeathReason>,
    /// Set for parked and held records.
    #[prost(message, optional, tag = "6")]
    pub parked: Option<Parked>,
    /// The route of a record that waits for a lane. None of an entry of a version without routes,
    /// and of a dead letter that is replayed.
    #[prost(message, optional, tag = "7")]
    pub route: Option<EntryRoute>,
    /// See [`Record::api`]. None of an entry of a version with one API.
    #[prost(string, optional, tag = "8")]
    pub api: Option<String>,
    /// See [`Record::event`]. None of an entry of a version without events.
    #[prost(string, optional, tag = "9")]
    pub event: Option<String>,
    /// None of an entry of a version without it.
    #[prost(string, optional, tag = "10")]
    pub tracestate: Option<String>,
}

/// The route of a record, as its rule was when the record was accepted.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct EntryRoute {
    /// The name in explanations.
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub policy: String,
    /// The only lanes that may take it, in the order of the rule; empty for any lane.
    #[prost(string, repeated, tag = "3")]
    pub lanes: Vec<String>,
    /// The hash of its key, of policy `hash` only.
    #[prost(fixed64, tag = "4")]
    pub key: u64,
}

/// The next try of a record that is parked.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Parked {
    /// Not before this time, in microseconds since the Unix epoch.
    #[prost(uint64, tag = "1")]
    pub due_us: u64,
    /// How often it was parked: 1 for the first pause.
    #[prost(uint32, tag = "2")]
    pub pauses: u32,
    /// The tag of the lane that it came out of.
    #[prost(string, tag = "3")]
    pub tag: String,
    /// The API has taken another record after this one had failed.
    #[prost(bool, tag = "4")]
    pub proven: bool,
}

/// Why a record is dead, or parked.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeathReason {
    /// The lane that it came out of.
    #[prost(string, tag = "1")]
    pub lane: String,
    /// The status of the API's last answer; 0 if none came.
    #[prost(uint32, tag = "2")]
    pub status: u32,
    /// The first 1 KiB of that answer, or what went wrong.
    #[prost(string, tag = "3")]
    pub answer: String,
    /// The number of POSTs since it came out of the lane last, those from the disk included.
    #[prost(uint32, tag = "4")]
    pub attempts: u32,
    /// The time of death, or of the last failure, in microseconds since the Unix epoch.
    #[prost(uint64, tag = "5")]
    pub at_us: u64,
    /// It was given up though a later try might have succeeded.
    #[prost(bool, tag = "6")]
    pub given_up: bool,
}

impl Entry {
    pub fn new(record: &Record, reason: Option<DeathReason>) -> Self {
        let trace = record.trace.as_ref();
        Self {
            id: record.id.as_ref().into(),
            body: record.body.clone(),
            traceparent: trace.map(|trace| trace.parent().into()),
            tracestate: trace.and_then(TraceHeaders::state).map(Into::into),
            origin: record.origin.as_ref().map(Origin::to_text),
            reason,
            parked: None,
            route: None,
            api: record.api.as_deref().map(Into::into),
            event: record.event.as_deref().map(Into::into),
        }
    }

    /// Gives the record of another publisher this run and time as its origin: without a time, it
    /// would never be given up.
    pub fn set_missing_origin(&mut self, run: &Arc<str>, at_us: u64) {
        self.origin.get_or_insert_with(|| {
            let run = Arc::clone(run);
            Origin { run, at_us }.to_text()
        });
    }

    pub fn record(&self) -> Record {
        Record {
            id: self.id.as_str().into(),
            body: self.body.clone(),
            trace: self
                .traceparent
                .as_deref()
                .and_then(|parent| TraceHeaders::read(parent, self.tracestate.as_deref())),
            origin: self.origin.as_deref().and_then(Origin::parse),
            api: self.api.as_deref().map(Into::into),
            event: self.event.as_deref().map(Into::into),
        }
    }
}
