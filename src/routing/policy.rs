//! The names of the policies, and what `hash` hashes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::rules::header_name;
use crate::record::pointer::Pointer;

/// How a route chooses among its lanes that are up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Each lane in its turn.
    RoundRobin,
    /// Each lane in its turn, as often as its weight says.
    Weighted,
    /// The first lane that is steady.
    Failover,
    /// One lane for each key.
    Hash,
    /// The lane with the lowest score.
    Adaptive,
    /// Each lane takes a copy.
    Broadcast,
}

impl Policy {
    pub const ALL: [Self; 6] = [
        Self::RoundRobin,
        Self::Weighted,
        Self::Failover,
        Self::Hash,
        Self::Adaptive,
        Self::Broadcast,
    ];

    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Weighted => "weighted",
            Self::Failover => "failover",
            Self::Hash => "hash",
            Self::Adaptive => "adaptive",
            Self::Broadcast => "broadcast",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }

    /// Whether it reads outcomes and times of the lanes.
    pub const fn measures(self) -> bool {
        matches!(self, Self::Adaptive | Self::Failover)
    }
}

/// The part of a record that `hash` hashes. A record without that part hashes by its id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HashOn {
    #[default]
    Id,
    /// A text counts by its characters, any other value by its bytes.
    Pointer(Pointer),
    /// A header, by its name in lower case.
    Header(String),
}

impl FromStr for HashOn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("header:") {
            Some(name) => header_name(name).map(Self::Header),
            None if text == "id" => Ok(Self::Id),
            None if text.starts_with('/') => text.parse().map(Self::Pointer),
            None => Err(format!(
                "{text:?} does not fit; allowed is \"id\", a JSON pointer as in \"/location\", or \
                 \"header:NAME\""
            )),
        }
    }
}

impl TryFrom<String> for HashOn {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for HashOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id => f.write_str("id"),
            Self::Pointer(pointer) => pointer.fmt(f),
            Self::Header(name) => write!(f, "header:{name}"),
        }
    }
}

impl From<HashOn> for String {
    fn from(on: HashOn) -> Self {
        on.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_to_hash_is_printed_as_it_is_read() {
        for text in ["id", "/location", "/a~1b/0", "header:ce-subject"] {
            assert_eq!(text.parse::<HashOn>().unwrap().to_string(), text);
        }
        assert_eq!(
            "header:CE-Subject".parse(),
            Ok(HashOn::Header("ce-subject".into()))
        );
        for wrong in ["", "location", "header:", "header:a b", "/a~2"] {
            assert!(wrong.parse::<HashOn>().is_err(), "{wrong}");
        }
    }
}
