//! The names of the policies.

use serde::{Deserialize, Serialize};

/// How the router chooses among the lanes that are up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Each lane in its turn.
    RoundRobin,
    /// Each lane in its turn, as often as its weight says.
    Weighted,
    /// The first lane that is steady.
    Failover,
    /// One lane for each id.
    Hash,
    /// The lane with the lowest score.
    Adaptive,
}

impl Policy {
    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Weighted => "weighted",
            Self::Failover => "failover",
            Self::Hash => "hash",
            Self::Adaptive => "adaptive",
        }
    }
}
