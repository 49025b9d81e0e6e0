//! Routing: which lane takes a record. Pure: no actors, no I/O, and the time is an argument.
//!
//! ```text
//! lane, forwarder: outcomes ──▶ Scores     any number of routers read them at once
//! router: Scores ──Chooser::choose──▶ lane
//! ```
//!
//! | part | its job |
//! | --- | --- |
//! | [`choose`] | the policies |
//! | [`scores`] | what is known of each lane: latency, load, successes, ejection |
//! | [`settings`] | the settings in effect, swapped as one |
//! | [`hash`] | rendezvous hashing |

pub mod choose;
pub mod hash;
pub mod scores;
pub mod settings;

#[cfg(test)]
mod tests;
