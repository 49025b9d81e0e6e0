//! The names of the lanes.

use std::fmt;

use serde::Serialize;

/// Declares the lanes, each with its name in the configuration, in URLs and in metrics.
macro_rules! lanes {
    ($($lane:ident = $name:literal,)+) => {
        /// One way from ingest to the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        pub enum LaneId {
            $(
                #[serde(rename = $name)]
                $lane,
            )+
        }

        impl LaneId {
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$lane),+];

            /// The name in the configuration, in URLs and in metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$lane => $name,)+
                }
            }
        }
    };
}

lanes! {
    Grpc = "grpc",
    Nats = "nats",
    Rabbitmq = "rabbitmq",
    Pubsub = "pubsub",
}

impl LaneId {
    /// The lane of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

/// One value per lane, by `LaneId as usize`.
pub type PerLane<T> = [T; LaneId::ALL.len()];

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
