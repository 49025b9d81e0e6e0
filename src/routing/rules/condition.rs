//! `when` of a route: one test of one part of a record.

use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use super::scalar::{Number, Scalar};
use crate::record::pointer::Pointer;

/// The most memory of a compiled regular expression. A repeat of a repeat may ask for gigabytes.
const REGEX_BYTES_MAX: usize = 256 << 10;

/// `when = { pointer = "/state", equals = "symptomatic" }`, or another test, or a header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "When", into = "When")]
pub struct Condition {
    /// The part of the record.
    pub subject: Subject,
    /// The test.
    pub predicate: Predicate,
}

/// A part of a record that is tested.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The value at a JSON pointer.
    Pointer(Pointer),
    /// The value of a header, by its name in lower case. Of `content-type`, only the type counts,
    /// in lower case and without parameters. The attributes of CloudEvents are headers that begin
    /// with `ce-`.
    Header(String),
}

/// A test of a value. One that is missing passes only `exists = false`.
#[derive(Clone, Debug)]
pub enum Predicate {
    /// `equals`, or `in`: it is one of these texts, numbers or booleans. Types count: `"1"` is not
    /// `1`, but `1.0` is.
    OneOf(Vec<Scalar<'static>>),
    /// `prefix`: it is a text that begins so.
    Prefix(String),
    /// `range`: it is a number of at least `min` and at most `max`.
    Range {
        /// The smallest number; `None` for no limit.
        min: Option<Number>,
        /// The largest number; `None` for no limit.
        max: Option<Number>,
    },
    /// `exists`: it is there, `null` included, or it is not.
    Exists(bool),
    /// `matches`: it is a text in which this regular expression finds a match. The time is linear
    /// in the text.
    Matches(Regex),
}

impl Predicate {
    /// Whether `value` passes; `None` is a value that is missing.
    pub fn holds(&self, value: Option<&Scalar<'_>>) -> bool {
        let Some(value) = value else {
            return matches!(self, Self::Exists(false));
        };
        match self {
            Self::OneOf(allowed) => allowed.iter().any(|allowed| value.equals(allowed)),
            Self::Prefix(prefix) => value.as_text().is_some_and(|text| text.starts_with(prefix)),
            Self::Range { min, max } => value.as_number().is_some_and(|number| {
                min.is_none_or(|min| min <= number) && max.is_none_or(|max| number <= max)
            }),
            Self::Exists(is_there) => *is_there,
            Self::Matches(regex) => value.as_text().is_some_and(|text| regex.is_match(text)),
        }
    }
}

impl PartialEq for Predicate {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::OneOf(one), Self::OneOf(other)) => one == other,
            (Self::Prefix(one), Self::Prefix(other)) => one == other,
            (
                Self::Range { min, max },
                Self::Range {
                    min: other_min,
                    max: other_max,
                },
            ) => (min, max) == (other_min, other_max),
            (Self::Exists(one), Self::Exists(other)) => one == other,
            (Self::Matches(one), Self::Matches(other)) => one.as_str() == other.as_str(),
            _ => false,
        }
    }
}

impl Eq for Predicate {}

/// The name of a header in lower case, if it is one (RFC 9110, 5.6.2).
///
/// # Errors
/// If it is none.
pub fn header_name(name: &str) -> Result<String, String> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Err(format!(
            "{name:?} is no header's name; allowed are letters, digits and -"
        ));
    }
    Ok(name.to_ascii_lowercase())
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pointer(pointer) => pointer.fmt(f),
            Self::Header(name) => write!(f, "header {name}"),
        }
    }
}

impl fmt::Display for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneOf(allowed) => match &allowed[..] {
                [value] => write!(f, "equals {value}"),
                allowed => {
                    let allowed: Vec<_> = allowed.iter().map(Scalar::to_string).collect();
                    write!(f, "is in [{}]", allowed.join(", "))
                }
            },
            Self::Prefix(prefix) => write!(f, "begins with {prefix:?}"),
            Self::Range { min, max } => match (min, max) {
                (Some(min), Some(max)) => write!(f, "is from {min} to {max}"),
                (Some(min), None) => write!(f, "is at least {min}"),
                (None, Some(max)) => write!(f, "is at most {max}"),
                (None, None) => f.write_str("is a number"),
            },
            Self::Exists(true) => f.write_str("exists"),
            Self::Exists(false) => f.write_str("does not exist"),
            Self::Matches(regex) => write!(f, "matches {:?}", regex.as_str()),
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.subject, self.predicate)
    }
}

/// A condition as the configuration has it.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct When {
    #[serde(skip_serializing_if = "Option::is_none")]
    pointer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    header: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    equals: Option<Scalar<'static>>,
    #[serde(rename = "in", skip_serializing_if = "Option::is_none")]
    one_of: Option<Vec<Scalar<'static>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    range: Option<Bounds>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exists: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    matches: Option<String>,
}

/// `range = { min = 0, max = 17 }`, both inclusive; one of them may be missing.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bounds {
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<Number>,
}

impl TryFrom<When> for Condition {
    type Error = String;

    fn try_from(when: When) -> Result<Self, String> {
        let subject = match (when.pointer, when.header) {
            (Some(pointer), None) => Subject::Pointer(pointer.parse()?),
            (None, Some(name)) => Subject::Header(header_name(&name)?),
            _ => return Err("needs a pointer or a header; allowed is one of them".into()),
        };
        let tests = [
            when.equals.map(|value| Ok(Predicate::OneOf(vec![value]))),
            when.one_of.map(|values| match &values[..] {
                [] => Err("in is empty; allowed is a list of texts, numbers and booleans".into()),
                _ => Ok(Predicate::OneOf(values)),
            }),
            when.prefix.map(|prefix| Ok(Predicate::Prefix(prefix))),
            when.range.map(range),
            when.exists.map(|exists| Ok(Predicate::Exists(exists))),
            when.matches.map(|text| regex(&text)),
        ];
        let mut tests = tests.into_iter().flatten();
        match (tests.next(), tests.next()) {
            (Some(predicate), None) => Ok(Self {
                subject,
                predicate: predicate?,
            }),
            _ => Err(format!(
                "needs one test of {subject}; allowed is equals, in, prefix, range, exists or \
                 matches"
            )),
        }
    }
}

fn range(Bounds { min, max }: Bounds) -> Result<Predicate, String> {
    match (min, max) {
        (None, None) => Err("range has no limit; allowed is min, max or both".into()),
        (Some(min), Some(max)) if min > max => Err(format!(
            "range is empty, since min {min} is over max {max}; allowed is min up to max"
        )),
        _ => Ok(Predicate::Range { min, max }),
    }
}

fn regex(text: &str) -> Result<Predicate, String> {
    let regex = RegexBuilder::new(text).size_limit(REGEX_BYTES_MAX).build();
    regex.map(Predicate::Matches).map_err(|why| {
        let why = why.to_string();
        // The last line says what is wrong; the others draw where.
        let why = why.lines().last().unwrap_or_default();
        format!(
            "matches {text:?} is no regular expression: {}",
            why.trim_start_matches("error: ")
        )
    })
}

impl From<Condition> for When {
    fn from(Condition { subject, predicate }: Condition) -> Self {
        let mut when = Self::default();
        match subject {
            Subject::Pointer(pointer) => when.pointer = Some(pointer.to_string()),
            Subject::Header(name) => when.header = Some(name),
        }
        match predicate {
            Predicate::OneOf(mut values) if values.len() == 1 => when.equals = values.pop(),
            Predicate::OneOf(values) => when.one_of = Some(values),
            Predicate::Prefix(prefix) => when.prefix = Some(prefix),
            Predicate::Range { min, max } => when.range = Some(Bounds { min, max }),
            Predicate::Exists(exists) => when.exists = Some(exists),
            Predicate::Matches(regex) => when.matches = Some(regex.as_str().to_owned()),
        }
        when
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(toml: &str) -> Result<Condition, String> {
        toml::from_str(toml).map_err(|why: toml::de::Error| why.message().to_owned())
    }

    #[test]
    fn each_test_of_a_value() {
        let missing = None;
        for (toml, passing, failing) in [
            (
                r#"equals = "a""#,
                &[r#""a""#, r#""\u0061""#][..],
                &[r#""b""#, "1", "null", "[]"][..],
            ),
            ("equals = 1", &["1", "1.0", "1e0"], &["2", r#""1""#, "true"]),
            ("equals = true", &["true"], &["false", r#""true""#]),
            (
                r#"in = ["a", 2, 0.5]"#,
                &[r#""a""#, "2.0", "0.5"],
                &[r#""b""#, "0.6"],
            ),
            (
                r#"prefix = "San ""#,
                &[r#""San Marcos""#],
                &[r#""san ""#, "1", r#"["San "]"#],
            ),
            (
                "range = { min = 1, max = 2 }",
                &["1", "1.5", "2"],
                &["0.9", "3", r#""1""#],
            ),
            ("range = { min = 1 }", &["1", "1e99"], &["0", "-1e99"]),
            ("exists = true", &["null", "{}", "0"], &[]),
            ("exists = false", &[], &["null", "{}", "0"]),
            (
                r#"matches = "^a+$""#,
                &[r#""a""#, r#""aa""#],
                &[r#""ba""#, "1"],
            ),
        ] {
            let Condition { predicate, .. } =
                condition(&format!("pointer = \"/x\"\n{toml}")).unwrap();
            for json in passing {
                assert!(predicate.holds(Some(&Scalar::read(json))), "{toml}: {json}");
            }
            for json in failing {
                assert!(
                    !predicate.holds(Some(&Scalar::read(json))),
                    "{toml}: {json}"
                );
            }
            assert_eq!(predicate.holds(missing), toml == "exists = false", "{toml}");
        }
    }

    #[test]
    fn a_condition_reads_back_and_says_what_it_is() {
        for (toml, said) in [
            ("pointer = \"/x\"\nequals = \"a\"\n", r#"/x equals "a""#),
            (
                "pointer = \"/x\"\nin = [\"a\", 2, 0.5, true]\n",
                r#"/x is in ["a", 2, 0.5, true]"#,
            ),
            (
                "header = \"ce-type\"\nprefix = \"org.\"\n",
                r#"header ce-type begins with "org.""#,
            ),
            ("pointer = \"/x\"\nexists = false\n", "/x does not exist"),
            ("pointer = \"/x\"\nmatches = \"a+\"\n", r#"/x matches "a+""#),
            (
                "pointer = \"/x\"\n\n[range]\nmin = 1\nmax = 2.5\n",
                "/x is from 1 to 2.5",
            ),
            ("pointer = \"/x\"\n\n[range]\nmax = 2\n", "/x is at most 2"),
        ] {
            let read = condition(toml).unwrap();
            assert_eq!(read.to_string(), said);
            assert_eq!(toml::to_string(&read).unwrap(), toml);
        }
    }

    #[test]
    fn what_is_wrong_with_a_condition_is_said() {
        for (toml, said) in [
            ("equals = 1", "needs a pointer or a header"),
            (
                "pointer = \"/x\"\nheader = \"y\"\nequals = 1",
                "needs a pointer or a header",
            ),
            ("pointer = \"/x\"", "needs one test of /x"),
            (
                "pointer = \"/x\"\nequals = 1\nexists = true",
                "needs one test of /x",
            ),
            ("pointer = \"x\"\nequals = 1", "no JSON pointer"),
            ("header = \"a b\"\nequals = 1", "no header's name"),
            ("pointer = \"/x\"\nin = []", "in is empty"),
            ("pointer = \"/x\"\nrange = {}", "range has no limit"),
            (
                "pointer = \"/x\"\nrange = { min = 2, max = 1 }",
                "min 2 is over max 1",
            ),
            ("pointer = \"/x\"\nrange = { min = \"a\" }", "is no number"),
            (
                "pointer = \"/x\"\nmatches = \"a(\"",
                "no regular expression: unclosed group",
            ),
            (
                "pointer = \"/x\"\nmatches = \"(a{999}){999}\"",
                "no regular expression",
            ),
            ("pointer = \"/x\"\nlike = 1", "unknown field `like`"),
            (
                "pointer = \"/x\"\nequals = [1]",
                "a text, a number, true or false",
            ),
        ] {
            let why = condition(toml).unwrap_err();
            assert!(why.contains(said), "{toml}: {why}");
        }
    }
}
