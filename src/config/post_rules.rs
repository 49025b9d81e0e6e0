//! How often the API may be POSTed to, or a client may ask, and which of the API's answers are retried.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use toml::Value;

use super::value;

/// The highest number in a rate.
const RATE_MAX: u32 = 1_000_000;
/// The units of a rate, in seconds.
const UNITS: [(&str, u64); 3] = [("s", 1), ("m", 60), ("h", 3600)];
/// All statuses from 500 to 599, as one element of a list.
const SERVER_ERRORS: &str = "5xx";
/// A wrong token or path, which `api::answer` tells from a bad record: they are never retried by
/// themselves.
const DENIALS: [u16; 3] = [401, 403, 404];

/// So many in a time, as in `"500/s"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    count: NonZeroU32,
    unit: &'static str,
    seconds: u64,
}

impl Rate {
    pub const fn count(self) -> NonZeroU32 {
        self.count
    }

    /// The time that the count is for.
    pub const fn window(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// The time between two, if they are spread evenly; over zero.
    pub fn interval(self) -> Duration {
        Duration::from_secs(self.seconds) / self.count.get()
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (count, given) = text.split_once('/')?;
            let count = count.trim().parse().ok()?;
            let (unit, seconds) = UNITS.into_iter().find(|(unit, _)| *unit == given.trim())?;
            let fits = (1..=RATE_MAX).contains(&count);
            let count = NonZeroU32::new(count).filter(|_| fits)?;
            Some(Self {
                count,
                unit,
                seconds,
            })
        };
        read().ok_or_else(|| {
            format!(
                "{text:?} does not fit; allowed is a number from 1 to {RATE_MAX} for each second, \
                 minute or hour, as in \"500/s\", \"30/m\" or \"100/h\""
            )
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.unit)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        value::from_text(input)
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

/// The statuses of answers after which a record is retried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct RetryStatuses(Vec<RetryStatus>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum RetryStatus {
    One(u16),
    #[serde(serialize_with = "server_errors")]
    ServerErrors,
}

fn server_errors<S: Serializer>(output: S) -> Result<S::Ok, S::Error> {
    output.serialize_str(SERVER_ERRORS)
}

impl Default for RetryStatuses {
    /// A request time-out, "too early", too many requests, and each error of the server.
    fn default() -> Self {
        let one = [408, 425, 429].map(RetryStatus::One);
        Self([&one[..], &[RetryStatus::ServerErrors]].concat())
    }
}

impl RetryStatuses {
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|listed| match listed {
            RetryStatus::One(one) => *one == status,
            RetryStatus::ServerErrors => (500..=599).contains(&status),
        })
    }
}

impl RetryStatus {
    fn read(text: &str) -> Result<Self, String> {
        if text == SERVER_ERRORS {
            return Ok(Self::ServerErrors);
        }
        match text.parse() {
            Ok(status) if DENIALS.contains(&status) => Err(format!(
                "{status} may mean a wrong token or path, which has rules of its own; leave it out"
            )),
            Ok(status) if (300..=599).contains(&status) => Ok(Self::One(status)),
            _ => Err(format!(
                "{text:?} does not fit; allowed are statuses from 300 to 599 and \
                 \"{SERVER_ERRORS}\", as in [408, 425, 429, \"{SERVER_ERRORS}\"]"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for RetryStatuses {
    /// A list; in a variable, separated by commas.
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let texts: Vec<String> = match Value::deserialize(input)? {
            Value::Array(items) => items
                .into_iter()
                .map(|item| match item {
                    Value::String(text) => text,
                    other => other.to_string(),
                })
                .collect(),
            Value::String(text) => text.split(',').map(|part| part.trim().into()).collect(),
            other => vec![other.to_string()],
        };
        let statuses = texts.iter().map(|text| RetryStatus::read(text));
        let statuses: Result<_, _> = statuses.collect();
        statuses.map(Self).map_err(Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_for_each_second_minute_or_hour() {
        for (text, micros) in [
            ("1/s", 1_000_000),
            ("500/s", 2000),
            ("1000000/s", 1),
            ("30/m", 2_000_000),
            (" 100 / h ", 36_000_000),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.interval(), Duration::from_micros(micros), "{text}");
            assert_eq!(rate.to_string(), text.replace(' ', ""));
        }
        for wrong in [
            "",
            "5",
            "5/",
            "/s",
            "0/s",
            "-1/s",
            "1.5/s",
            "1000001/s",
            "5/d",
            "5/s/s",
            "5/S",
        ] {
            let why = wrong.parse::<Rate>().unwrap_err();
            assert!(why.contains("allowed is a number"), "{wrong}: {why}");
        }
    }

    fn read(toml: &str) -> Result<RetryStatuses, String> {
        #[derive(Deserialize)]
        struct One {
            key: RetryStatuses,
        }
        let read = toml::from_str::<One>(&format!("key = {toml}"));
        read.map(|one| one.key).map_err(|why| why.message().into())
    }

    #[test]
    fn statuses_are_numbers_or_all_errors_of_the_server() {
        let default = RetryStatuses::default();
        assert_eq!(read(r#"[408, 425, 429, "5xx"]"#).unwrap(), default);
        assert_eq!(read(r#""408, 425,429,5xx""#).unwrap(), default);
        assert_eq!(read("409").unwrap(), read("[409]").unwrap());
        let listed = |status| default.contains(status);
        let all: Vec<_> = (100..=999).filter(|status| listed(*status)).collect();
        let expected: Vec<_> = [408, 425, 429].into_iter().chain(500..=599).collect();
        assert_eq!(all, expected);
        let none = read("[]").unwrap();
        assert!(!(100..=999).any(|status| none.contains(status)));
        for (wrong, why) in [
            ("[200]", "allowed are statuses"),
            ("[299]", "allowed are statuses"),
            ("[600]", "allowed are statuses"),
            ("[5.5]", "allowed are statuses"),
            (r#"["4xx"]"#, "allowed are statuses"),
            ("[[500]]", "allowed are statuses"),
            ("true", "allowed are statuses"),
            (r#""""#, "allowed are statuses"),
            ("[500, 401]", "wrong token or path"),
            ("[403]", "wrong token or path"),
            ("[404]", "wrong token or path"),
        ] {
            let told = read(wrong).unwrap_err();
            assert!(told.contains(why), "{wrong}: {told}");
        }
        for allowed in ["[300]", "[599]", "[409]"] {
            read(allowed).unwrap();
        }
    }
}
