//! Rules for the JSON of a record that hold whatever its schema says. They are the same for names
//! and values:
//!
//! | what | rule |
//! | --- | --- |
//! | a name that is twice in one object | refused: one reader would take the first, another the last |
//! | half of a surrogate pair (`\ud800`) | malformed: it is no character, and no text can hold it |
//! | NUL | a character like any other if it is written `\u0000`; malformed as a byte |
//! | depth, members, numbers | up to the configured limits |
//!
//! One pass over a text that is known to be JSON.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// The limits of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonLimits {
    /// Bytes, as the record travels.
    pub max_size: usize,
    /// Objects and arrays inside of each other, the record included.
    pub max_depth: usize,
    /// Members of all objects.
    pub max_members: usize,
    pub numbers: NumberRange,
}

/// The numbers that a record may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NumberRange {
    /// Those that JSON allows, which has no limit.
    Any,
    /// Those that a float of 64 bits can hold, rounded.
    Double,
    /// The same; and whole numbers from -(2^53 - 1) to 2^53 - 1, which it holds exactly (RFC 7493,
    /// 2.2).
    Exact,
}

/// The most depth that can be configured: the parsers of many languages go no further.
pub const DEPTH_MAX: usize = 120;
/// The largest whole number below which each has a float of its own.
const EXACT_MAX: f64 = 9_007_199_254_740_991.0;
/// Most strings end within so many bytes. A loop finds that sooner than a call of `memchr`.
const SHORT: usize = 24;
/// Up to so many names are compared, each with each. Sorting is faster for more, also if a client has
/// chosen them badly.
const FEW: usize = 8;

impl Default for JsonLimits {
    fn default() -> Self {
        Self {
            max_size: usize::MAX,
            max_depth: 64,
            max_members: 10_000,
            numbers: NumberRange::Any,
        }
    }
}

/// A rule that a text breaks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BrokenRule {
    /// The text at this byte is no JSON.
    Malformed { at: usize, detail: &'static str },
    /// The value at this pointer is not allowed.
    Limit { pointer: String, detail: String },
}

/// Checks `text`, a JSON value.
pub(super) fn check(text: &str, limits: &JsonLimits) -> Result<(), BrokenRule> {
    let mut names = Vec::with_capacity(16);
    let mut open = Vec::with_capacity(8);
    let mut members = 0;
    let bytes = text.as_bytes();
    let broken = |at, detail| BrokenRule::Limit {
        pointer: pointer(text, at),
        detail,
    };
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'{' | b'[' => {
                open.push(names.len());
                if open.len() > limits.max_depth {
                    let detail = format!(
                        "is deeper than {} objects and arrays inside of each other; that many are \
                         allowed",
                        limits.max_depth
                    );
                    return Err(broken(at, detail));
                }
            }
            b'}' => {
                // An array has no names.
                let from = open.pop().unwrap_or_default();
                if let Some(name) = duplicate(&mut names[from..]) {
                    let mut pointer = pointer(text, at);
                    push(&mut pointer, &name);
                    let detail = "is there twice; allowed is each name once in an object".into();
                    return Err(BrokenRule::Limit { pointer, detail });
                }
                names.truncate(from);
            }
            b']' => {
                open.pop();
            }
            b'"' => {
                let QuotedString { end, is_plain } = quoted_string(bytes, at)?;
                let after = skip_space(bytes, end);
                if bytes.get(after) == Some(&b':') {
                    members += 1;
                    if members > limits.max_members {
                        let detail =
                            format!("is one member too many; allowed are {}", limits.max_members);
                        return Err(broken(end, detail));
                    }
                    names.push(unescaped(&text[at..end], is_plain));
                }
                at = end;
                continue;
            }
            b'-' | b'0'..=b'9' => {
                let end = number_end(bytes, at);
                check_number(&text[at..end], limits.numbers)
                    .map_err(|detail| broken(at, detail))?;
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// A string in its quotes.
struct QuotedString {
    end: usize,
    /// It has no escapes.
    is_plain: bool,
}

/// The string that begins at `at`.
fn quoted_string(bytes: &[u8], at: usize) -> Result<QuotedString, BrokenRule> {
    let mut from = at + 1;
    let mut is_plain = true;
    loop {
        // A valid string has an end.
        let Some(found) = quote_or_escape(&bytes[from..]) else {
            let end = bytes.len();
            return Ok(QuotedString { end, is_plain });
        };
        let found = from + found;
        if bytes[found] == b'"' {
            let end = found + 1;
            return Ok(QuotedString { end, is_plain });
        }
        is_plain = false;
        from = found + 2;
        match code_unit(bytes, found) {
            Some(0xD800..=0xDBFF)
                if matches!(code_unit(bytes, found + 6), Some(0xDC00..=0xDFFF)) =>
            {
                from = found + 12;
            }
            Some(0xD800..=0xDFFF) => {
                return Err(BrokenRule::Malformed {
                    at: found,
                    detail: HALF_A_PAIR,
                });
            }
            _ => {}
        }
    }
}

/// The place of the first quote or escape.
fn quote_or_escape(bytes: &[u8]) -> Option<usize> {
    let (short, long) = bytes.split_at(bytes.len().min(SHORT));
    let found = short.iter().position(|byte| matches!(byte, b'"' | b'\\'));
    found.or_else(|| Some(short.len() + memchr::memchr2(b'"', b'\\', long)?))
}

/// The code unit of the escape `\uXXXX` at `at`.
fn code_unit(bytes: &[u8], at: usize) -> Option<u16> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(b"\\u")?;
    digits.iter().try_fold(0, |unit, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(unit << 4 | u16::try_from(digit).ok()?)
    })
}

/// A name without quotes and escapes.
fn unescaped(quoted: &str, is_plain: bool) -> Cow<'_, str> {
    let inside = &quoted[1..quoted.len() - 1];
    if is_plain {
        return inside.into();
    }
    // It is a valid string without half pairs, so it is decoded.
    serde_json::from_str::<String>(quoted).map_or_else(|_| inside.into(), Cow::from)
}

/// A name that is there twice.
fn duplicate<'t>(names: &mut [Cow<'t, str>]) -> Option<Cow<'t, str>> {
    let twice = if names.len() <= FEW {
        let mut places = names.iter().enumerate();
        let twice = places.find(|(at, name)| names[..*at].contains(name));
        twice.map(|(_, name)| name)
    } else {
        names.sort_unstable();
        let mut pairs = names.windows(2);
        pairs.find(|pair| pair[0] == pair[1]).map(|pair| &pair[0])
    };
    twice.cloned()
}

fn number_end(bytes: &[u8], at: usize) -> usize {
    let is_in = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
    let length = bytes[at..].iter().take_while(|byte| is_in(byte)).count();
    at + length
}

fn check_number(digits: &str, range: NumberRange) -> Result<(), String> {
    if range == NumberRange::Any {
        return Ok(());
    }
    // JSON's numbers are numbers of Rust; those that no float can hold are infinite.
    let number: f64 = digits.parse().unwrap_or(f64::INFINITY);
    if !number.is_finite() {
        return Err(format!(
            "{} is larger than a float of 64 bits can hold; allowed is up to 1.8e308",
            shown(digits)
        ));
    }
    let is_whole = !digits.contains(['.', 'e', 'E']);
    if range == NumberRange::Exact && is_whole && number.abs() > EXACT_MAX {
        return Err(format!(
            "{} is a whole number that a float of 64 bits cannot hold exactly; allowed is up to \
             9007199254740991",
            shown(digits)
        ));
    }
    Ok(())
}

fn skip_space(bytes: &[u8], at: usize) -> usize {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    let length = bytes[at..].iter().take_while(|byte| is_space(byte)).count();
    at + length
}

/// The most characters of a value in an error.
const SHOWN_MAX: usize = 64;

/// The begin of a value, for an error.
pub(super) fn shown(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN_MAX) {
        None => text.into(),
        Some((end, _)) => format!("{}…", &text[..end]).into(),
    }
}

/// Appends a token to a pointer (RFC 6901).
pub(super) fn push(pointer: &mut String, token: &str) {
    pointer.push('/');
    pointer.push_str(&token.replace('~', "~0").replace('/', "~1"));
}

/// An object or an array around a byte of a text.
enum Around<'t> {
    /// The name of the last member before it.
    Object(Cow<'t, str>),
    /// The number of elements before it.
    Array(usize),
}

/// The pointer to the value of `text` that has the byte at `until`: a member's value, an element, or
/// a container that ends there.
fn pointer(text: &str, until: usize) -> String {
    let bytes = text.as_bytes();
    let mut around = Vec::new();
    let mut at = 0;
    while at < until {
        match bytes[at] {
            b'{' => around.push(Around::Object("".into())),
            b'[' => around.push(Around::Array(0)),
            b'}' | b']' => {
                around.pop();
            }
            b',' => {
                if let Some(Around::Array(before)) = around.last_mut() {
                    *before += 1;
                }
            }
            b'"' => {
                // Those before it were checked.
                let Ok(QuotedString { end, is_plain }) = quoted_string(bytes, at) else {
                    break;
                };
                let is_name = bytes.get(skip_space(bytes, end)) == Some(&b':');
                if let Some(Around::Object(name)) = around.last_mut().filter(|_| is_name) {
                    *name = unescaped(&text[at..end], is_plain);
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    if matches!(bytes.get(until), Some(b'}' | b']')) {
        around.pop();
    }
    let mut pointer = String::new();
    for level in around {
        match level {
            Around::Object(name) => push(&mut pointer, &name),
            Around::Array(index) => push(&mut pointer, &index.to_string()),
        }
    }
    pointer
}

/// The error of `\ud800` alone.
pub(super) const HALF_A_PAIR: &str = "half of a surrogate pair, which is no character";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with(numbers: NumberRange) -> JsonLimits {
        JsonLimits {
            max_size: usize::MAX,
            max_depth: 4,
            max_members: 6,
            numbers,
        }
    }

    fn limit(text: &str) -> String {
        match check(text, &with(NumberRange::Exact)) {
            Err(BrokenRule::Limit { pointer, detail }) => format!("{pointer} {detail}"),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn what_is_within_the_limits_passes() {
        for text in [
            "{}",
            r#"{"a":{"b":[{}]}}"#,
            r#"{"a":1,"b":2,"c":3,"d":4,"e":5}"#,
            r#"{"a":"a","b":{"a":1},"c":[{"a":1},{"a":2}]}"#,
            r#"{"a":"{[\"\\","b":"\\\\","c":":"}"#,
            r#"{"a":[9007199254740991,-9007199254740991,0.1,1e308,-0,9007199254740993.0]}"#,
            r#"{"a\u0000":"\u0000","😀":"\ud83d\ude00\uD83D\uDE00"}"#,
            r#"{"a":"\\ud800","b":"\\\\ud800"}"#,
        ] {
            assert_eq!(check(text, &with(NumberRange::Exact)), Ok(()), "{text}");
        }
        assert_eq!(check(r#"{"a":1e400}"#, &with(NumberRange::Any)), Ok(()));
        let large = r#"{"a":9007199254740992}"#;
        assert_eq!(check(large, &with(NumberRange::Double)), Ok(()));
    }

    #[test]
    fn what_is_beyond_is_told_by_its_pointer() {
        for (text, pointer) in [
            (r#"{"a":[1,{"b/c":[[]]}]}"#, "/a/1/b~1c/0 is deeper than 4"),
            (
                r#"{"a":1,"b":{"c":2,"d":3,"e":4,"f":5,"g":6}}"#,
                "/b/g is one member too many",
            ),
            (r#"{"a":1,"a":2}"#, "/a is there twice"),
            (r#"{"a":1,"b":2,"\u0061":2}"#, "/a is there twice"),
            (r#"{"x":[0,{"":1,"b":[],"":2}]}"#, "/x/1/ is there twice"),
            (r#"{"~":{"a":1,"b":{},"a":2}}"#, "/~0/a is there twice"),
            (r#"{"a":[0,1e400]}"#, "/a/1 1e400 is larger"),
            (r#"{"a":{"b":-1e999}}"#, "/a/b -1e999 is larger"),
            (
                r#"{"a":9007199254740992}"#,
                "/a 9007199254740992 is a whole number",
            ),
        ] {
            let told = limit(text);
            assert!(told.starts_with(pointer), "{text}: {told}");
        }
        let long = limit(&format!(r#"{{"a":{}}}"#, "9".repeat(1000)));
        assert!(long.len() < 250, "{long}");
    }

    #[test]
    fn a_name_is_found_twice_among_few_and_among_many() {
        for others in [0, FEW - 2, FEW - 1, 100] {
            let others: Vec<_> = (0..others).map(|name| format!("\"{name}\":0,")).collect();
            let others = others.concat();
            for first in ["a", r"\u0061"] {
                let text = format!("{{\"{first}\":1,{others}\"a\":2}}");
                match check(&text, &JsonLimits::default()) {
                    Err(BrokenRule::Limit { pointer, .. }) => assert_eq!(pointer, "/a"),
                    other => panic!("{text}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_string_ends_at_its_last_quote_however_long_it_is() {
        for length in 0..2 * SHORT {
            let long = "x".repeat(length);
            for last in ["", "\\\"", "\\\\", "\\u0041", "é"] {
                let text = format!("{{\"{long}{last}\":\"{long}{last}\",\"b\":1e999}}");
                let told = limit(&text);
                assert!(told.starts_with("/b 1e999"), "{text}: {told}");
            }
        }
    }

    #[test]
    fn half_of_a_surrogate_pair_is_malformed_in_names_and_values() {
        for half in [
            r"\ud800",
            r"\uDFFF",
            r"\udc00\ud800",
            r"\ud800\ud800",
            r"\ud83d\u0061",
            r"\ud800x",
            r"\ud83d\\ude00",
        ] {
            for (text, at) in [
                (format!(r#"{{"{half}":1}}"#), 2),
                (format!(r#"{{"a":"{half}"}}"#), 6),
            ] {
                match check(&text, &with(NumberRange::Any)) {
                    Err(BrokenRule::Malformed { at: found, .. }) => assert_eq!(found, at, "{text}"),
                    other => panic!("{text}: {other:?}"),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn text_is_half_a_pair_for_this_check_if_and_only_if_it_is_for_a_parser(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![r"\ud800", r"\udc00", r"\uD83D\uDE00", r"\\", r"\u0061", "a", "é", r"\n"]),
                0..6,
            ),
        ) {
            let string = format!("\"{}\"", parts.concat());
            let is_text = serde_json::from_str::<String>(&string).is_ok();
            prop_assert_eq!(check(&string, &JsonLimits::default()).is_ok(), is_text);
        }
    }
}
