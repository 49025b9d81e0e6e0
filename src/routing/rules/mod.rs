//! `[[routes]]`: ordered rules over a record's JSON and headers. The first that matches chooses
//! policy, lanes and API.
//!
//! A record's values are read once, at ingest: [`Routes::pointers`] are those that the rules need.
//! What follows from them, an [`Assignment`], travels with the record.

mod condition;
mod routes;
mod scalar;
mod unreachable;

pub use self::{
    condition::{Condition, Predicate, Subject, header_name},
    routes::{Assignment, CompiledRoute, RouteDefaults, RouteError, RouteRule, Routes},
    scalar::{Number, Scalar},
};
