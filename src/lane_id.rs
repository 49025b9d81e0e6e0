//! The names of the lanes.

use std::fmt;

/// One way from ingest to the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LaneId {
    Grpc,
    Nats,
    Rabbitmq,
    Pubsub,
}

impl LaneId {
    pub const ALL: [Self; 4] = [Self::Grpc, Self::Nats, Self::Rabbitmq, Self::Pubsub];

    /// The name in the configuration, in URLs and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Nats => "nats",
            Self::Rabbitmq => "rabbitmq",
            Self::Pubsub => "pubsub",
        }
    }

    /// The tag that the lane writes unless it is configured otherwise.
    pub const fn default_tag(self) -> &'static str {
        match self {
            Self::Grpc => "GRPC",
            Self::Nats => "NATS",
            Self::Rabbitmq => "RabbitMQ",
            Self::Pubsub => "PubSub",
        }
    }

    /// The lane of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
