//! Routing: which lane takes a record, and why. Pure: no actors, no I/O, and the time is an
//! argument.
//!
//! ```text
//! lane, forwarder: outcomes ──▶ Scores     any number of routers read them at once
//! ingest: values, headers ──Routes::assign──▶ Assignment, travels with the record
//! router: Assignment, Scores ──Chooser::choose──▶ Choice, kept as an Explanation
//! ```
//!
//! | part | its job |
//! | --- | --- |
//! | [`policy`] | their names |
//! | [`rules`] | `[[routes]]`: which route a record takes |
//! | [`choose`] | the policies |
//! | [`explain`] | a choice as JSON and as text |
//! | [`scores`] | what is known of each lane: latency, load, successes, ejection |
//! | [`settings`] | the routes in effect, swapped as one |
//! | [`hash`] | rendezvous hashing |
//! | [`simulation`] | all of it in simulated time, with lanes that behave as a plan says |

pub mod choose;
pub mod explain;
pub mod hash;
pub mod policy;
pub mod rules;
pub mod scores;
pub mod settings;
pub mod simulation;

#[cfg(test)]
mod tests;
