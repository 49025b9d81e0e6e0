//! The names of the lanes.

use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

/// Declares the lanes, each with its name in the configuration, in URLs and in metrics.
macro_rules! lanes {
    ($($lane:ident = $name:literal,)+) => {
        /// One way from ingest to the API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
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

/// A set of lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneSet(u8);

impl LaneSet {
    /// Every set, by its [`LaneSet::bits`].
    pub fn all() -> impl Iterator<Item = Self> {
        (0..1 << LaneId::ALL.len()).map(Self)
    }

    pub const fn insert(&mut self, lane: LaneId) {
        self.0 |= 1 << lane as u8;
    }

    pub const fn contains(self, lane: LaneId) -> bool {
        self.0 & (1 << lane as u8) != 0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The lanes, in the order of their declaration.
    pub fn lanes(self) -> impl Iterator<Item = LaneId> {
        let lanes = LaneId::ALL.into_iter();
        lanes.filter(move |lane| self.contains(*lane))
    }

    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl FromIterator<LaneId> for LaneSet {
    fn from_iter<I: IntoIterator<Item = LaneId>>(lanes: I) -> Self {
        let mut set = Self::default();
        lanes.into_iter().for_each(|lane| set.insert(lane));
        set
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
