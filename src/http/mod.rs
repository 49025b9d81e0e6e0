//! The HTTP that a node serves: ingest for clients, admin for operators.

pub mod admin;
pub mod ingest;
mod metrics;
pub mod problem;
