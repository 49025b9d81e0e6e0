//! HTTP on either side: ingest and admin serve, `api` posts, and `client` is what it and the commands ask through.

pub mod admin;
pub mod api;
pub mod client;
pub mod ingest;
pub mod problem;
