//! HTTP that the node serves: ingest and admin.

pub mod admin;
pub mod ingest;
pub mod problem;
