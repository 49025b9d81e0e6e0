//! HTTP on either side: ingest and admin serve, `api` posts.

pub mod admin;
pub mod api;
pub mod client;
pub mod ingest;
pub mod problem;
