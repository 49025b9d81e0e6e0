//! Waypost.

pub mod actors;
pub mod backoff;
pub mod config;
pub mod delivery;
pub mod http;
pub mod ledger;
pub mod node;
pub mod record;

/// The gRPC service, compiled from `proto/waypost/v1/waypost.proto`.
pub mod proto {
    tonic::include_proto!("waypost.v1");

    /// The service's descriptors, for server reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/waypost.bin"));
}
