//! The names and values of attributes (core, "Naming Conventions", "Type System" and the
//! constraints of each attribute).

use fluent_uri::{Uri, UriRef};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// The most characters of a name: with its prefix, it is the name of a header.
const NAME_MAX: usize = 253;
/// The most characters of a value in an error.
const SHOWN_MAX: usize = 64;

/// The value of an attribute as its canonical text (core, "Type System").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttributeValue {
    /// A string, a URI, a time, or bytes in Base64. In headers, every value is one.
    Text(String),
    /// A boolean, or an integer: in JSON, the text without quotes.
    Literal(String),
}

impl AttributeValue {
    pub fn text_of(text: &str) -> Self {
        Self::Text(text.to_owned())
    }

    /// The boolean or integer that `json` is (JSON format, 2.2). Another publisher's text may not
    /// be JSON: `007` would break the event that the API gets.
    pub fn literal(json: &str) -> Option<Self> {
        if matches!(json, "true" | "false") {
            return Some(Self::Literal(json.to_owned()));
        }
        let number = json.parse::<i32>().ok()?.to_string();
        (number == json || json == "-0").then_some(Self::Literal(number))
    }

    pub fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Literal(text) => text,
        }
    }
}

/// Checks an attribute. The error says what is wrong and what is allowed.
pub(super) fn check(name: &str, value: &AttributeValue) -> Result<(), String> {
    check_name(name)?;
    let text = value.text();
    if !text.chars().all(is_allowed) {
        return Err(format!(
            "{} has a control character or a noncharacter; allowed is any other text",
            shown(text)
        ));
    }
    let is_right = match name {
        "specversion" => text == "1.0",
        "id" | "type" | "subject" => !text.is_empty(),
        "source" => !text.is_empty() && UriRef::parse(text).is_ok(),
        "dataschema" => Uri::parse(text).is_ok(),
        "time" => is_time(text),
        // It is a header as it is, which other attributes are not (HTTP binding, 3.1.1).
        "datacontenttype" => media_type(text).is_some() && text.is_ascii(),
        _ => return Ok(()),
    };
    // The attributes of the specification are texts, whatever JSON type would fit.
    if is_right && matches!(value, AttributeValue::Text(_)) {
        return Ok(());
    }
    let allowed = match name {
        "specversion" => "the string \"1.0\"",
        "source" => "a URI-reference that is not empty, in ASCII (RFC 3986, 4.1)",
        "dataschema" => "a URI with its scheme (RFC 3986, 3)",
        "time" => "a time with its zone, like 2026-11-29T12:00:00Z (RFC 3339)",
        "datacontenttype" => "a media type in ASCII, like application/json",
        _ => "a string that is not empty",
    };
    Err(format!(
        "{} is not allowed; allowed is {allowed}",
        shown(text)
    ))
}

/// Core, "Naming Conventions". More than 20 characters are advised against, but allowed.
fn check_name(name: &str) -> Result<(), String> {
    if name == "data" {
        return Err("no attribute may have this name".into());
    }
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if name.is_empty() || !name.bytes().all(is_plain) {
        return Err("its name is not allowed; allowed are the characters a to z and 0 to 9".into());
    }
    if name.len() > NAME_MAX {
        return Err(format!(
            "its name is too long; allowed are {NAME_MAX} characters"
        ));
    }
    Ok(())
}

/// Core, "Type System", `String`.
fn is_allowed(character: char) -> bool {
    let code = u32::from(character);
    let is_noncharacter = (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE;
    !character.is_control() && !is_noncharacter
}

/// Whether `text` is a `date-time` of RFC 3339, 5.6.
fn is_time(text: &str) -> bool {
    let separator = text.as_bytes().get(10);
    matches!(separator, Some(b'T' | b't')) && OffsetDateTime::parse(text, &Rfc3339).is_ok()
}

/// Whether `data_content_type` says that the data is JSON (JSON format, 3.1.1).
pub fn is_json(data_content_type: &str) -> bool {
    media_type(data_content_type).is_some_and(|(_, subtype)| {
        let subtype = subtype.to_ascii_lowercase();
        subtype == "json" || subtype.ends_with("+json")
    })
}

/// Type and subtype of a media type, without its parameters (RFC 9110, 8.3.1).
fn media_type(text: &str) -> Option<(&str, &str)> {
    let essence = text.split(';').next()?.trim_end_matches([' ', '\t']);
    let (top, subtype) = essence.split_once('/')?;
    let is_token = |part: &str| {
        let is_in_token =
            |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        !part.is_empty() && part.bytes().all(is_in_token)
    };
    (is_token(top) && is_token(subtype)).then_some((top, subtype))
}

/// The begin of a value, for an error.
fn shown(text: &str) -> String {
    let begin: String = text.chars().take(SHOWN_MAX).collect();
    let more = if begin.len() < text.len() { "…" } else { "" };
    format!("{begin:?}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, value: &str) -> Result<(), String> {
        check(name, &AttributeValue::text_of(value))
    }

    #[test]
    fn names_have_lower_case_letters_and_digits() {
        for good in [
            "a",
            "id",
            "0a",
            "comexampleextension1",
            "averyveryveryverylongname",
        ] {
            assert!(text(good, "1.0").is_ok() || good == "id", "{good}");
        }
        for bad in [
            "",
            "data",
            "Id",
            "some_thing",
            "some-thing",
            "é",
            "a b",
            "data_base64",
        ] {
            assert!(text(bad, "1").is_err(), "{bad}");
        }
    }

    #[test]
    fn a_value_that_its_attribute_allows_is_taken() {
        for (name, good) in [
            ("specversion", &["1.0"][..]),
            ("id", &["1", " ", "é😀%\""]),
            ("type", &["org.example.case", "é"]),
            ("subject", &["a b"]),
            ("note", &["", "é😀%\" ", "\u{e000}"]),
            (
                "source",
                &[
                    "/",
                    "a",
                    "?q",
                    "#f",
                    "//host/a",
                    "https://example.com/a?b#c",
                    "urn:a:b",
                    "mailto:a@b",
                    "1-555-123-4567",
                    "/a%20b",
                    ".",
                ],
            ),
            ("dataschema", &["https://example.com/s#1", "urn:s"]),
            (
                "time",
                &[
                    "2018-04-05T17:31:00Z",
                    "2018-04-05t17:31:00z",
                    "2018-04-05T17:31:00.123456789123+02:00",
                    "1996-12-19T16:39:57-08:00",
                    "1990-12-31T23:59:60Z",
                    "1990-12-31T15:59:60-08:00",
                    "2024-02-29T00:00:00-00:00",
                    "0000-01-01T00:00:00Z",
                ],
            ),
            (
                "datacontenttype",
                &[
                    "application/json",
                    "TEXT/Plain; CharSet=utf-8",
                    "application/vnd.a+json ; a=\"b;c\"",
                ],
            ),
        ] {
            for good in good {
                assert_eq!(text(name, good), Ok(()), "{name}: {good}");
            }
        }
    }

    #[test]
    fn another_value_is_not() {
        for (name, bad) in [
            ("specversion", &["", "0.3", "1.1", "1", "1.0.2", "1.0 "][..]),
            (
                "id",
                &[
                    "",
                    "a\0",
                    "a\u{1f}",
                    "a\u{7f}",
                    "a\u{85}",
                    "\u{fffe}",
                    "\u{fdd0}",
                    "\u{10ffff}",
                ],
            ),
            ("type", &[""]),
            ("subject", &[""]),
            ("note", &["\n", "\u{9f}"]),
            (
                "source",
                &[
                    "", "a b", "é", "/a|b", "/%zz", "http://[", "1a:b", "a\"", "<a>", "\\",
                ],
            ),
            ("dataschema", &["", "/a", "a", "http://a b"]),
            (
                "time",
                &[
                    "",
                    "2018-04-05",
                    "2018-04-05T17:31:00",
                    "2018-04-05 17:31:00Z",
                    "2018-04-05T17:31Z",
                    "2018-04-05T17:31:00+0200",
                    "2018-02-29T17:31:00Z",
                    "2018-04-05T24:00:00Z",
                    "2018-04-05T17:31:61Z",
                    "2018-04-05T17:31:00.Z",
                    "2018-04-05T17:31:00Z ",
                    "2018-04-05T17:31:00,5Z",
                    "20180405T173100Z",
                    "1522949460",
                ],
            ),
            (
                "datacontenttype",
                &[
                    "",
                    "json",
                    "application/",
                    "/json",
                    "a b/c",
                    "; charset=utf-8",
                ],
            ),
        ] {
            for bad in bad {
                assert!(text(name, bad).is_err(), "{name}: {bad:?}");
            }
        }
    }

    #[test]
    fn literals_are_booleans_and_integers_and_none_of_the_specifications_attributes_is_one() {
        for good in ["true", "false", "0", "-0", "-2147483648", "2147483647"] {
            let value = AttributeValue::literal(good).unwrap();
            assert_eq!(check("note", &value), Ok(()), "{good}");
            assert!(check("subject", &value).is_err(), "{good}");
        }
        for bad in [
            "2147483648",
            "-2147483649",
            "1.0",
            "1e3",
            "null",
            "True",
            "+1",
            "007",
            "-00",
            "-07",
            "",
            "-",
        ] {
            assert_eq!(AttributeValue::literal(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_error_shows_no_more_than_the_begin_of_a_value() {
        let why = text("time", &"é".repeat(1000)).unwrap_err();
        assert!(why.contains("é…\"") || why.contains("\"…"), "{why}");
        assert!(why.chars().count() < 200, "{why}");
    }

    #[test]
    fn json_is_told_by_its_subtype() {
        for json in [
            "application/json",
            "text/JSON; charset=utf-8",
            "application/vnd.a+json",
        ] {
            assert!(is_json(json), "{json}");
        }
        for other in [
            "application/jsonl",
            "text/plain",
            "json",
            "application/xml+jsonx",
        ] {
            assert!(!is_json(other), "{other}");
        }
    }
}
