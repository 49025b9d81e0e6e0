//! Attributes as values of HTTP headers (HTTP binding, 3.1.3.2).

use std::{borrow::Cow, fmt};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// Characters that are coded. Those outside of ASCII always are.
pub(super) const CODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// The header's value for `text`.
pub fn encode(text: &str) -> impl fmt::Display {
    utf8_percent_encode(text, CODED)
}

/// The text of a header's value: first without quotes, then decoded once. Spaces and quotes may be
/// there as they are: earlier versions of the specification did not code them.
///
/// # Errors
/// Says what is malformed.
pub fn decode(value: &[u8]) -> Result<String, String> {
    let is_text = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~');
    let value = std::str::from_utf8(value)
        .ok()
        .filter(|value| value.bytes().all(|byte| is_text(&byte)))
        .ok_or("has characters that are no ASCII; allowed are their UTF-8 bytes as %XX")?;
    let value = unquoted(value).ok_or("begins with a quote that does not end it")?;
    if !codes_are_whole(&value) {
        return Err("has a % without two hexadecimal digits; allowed is %25 for a %".into());
    }
    let decoded = percent_decode_str(&value).decode_utf8();
    let decoded = decoded.map_err(|_| "its %XX are no UTF-8; allowed is UTF-8")?;
    Ok(decoded.into_owned())
}

/// `value` without its quotes and escapes, if it has any (RFC 9110, 5.6.4); `None` if they are not
/// complete.
fn unquoted(value: &str) -> Option<Cow<'_, str>> {
    let Some(quoted) = value.strip_prefix('"') else {
        return Some(value.into());
    };
    let quoted = quoted.strip_suffix('"')?;
    let mut plain = String::with_capacity(quoted.len());
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        plain.push(match character {
            '"' => return None,
            '\\' => characters.next()?,
            other => other,
        });
    }
    Some(plain.into())
}

/// Whether two hexadecimal digits follow each `%`.
fn codes_are_whole(value: &str) -> bool {
    value.split('%').skip(1).all(|code| {
        let digits = code.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_are_coded_as_the_specification_says() {
        for (text, value) in [
            ("Euro € 😀", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
            ("100%", "100%25"),
            ("%20", "%2520"),
            ("a\"b", "a%22b"),
            ("\u{7f}\u{85}", "%7F%C2%85"),
            (
                "!#$&'()*+,-./:;<=>?@[\\]^_`{|}~",
                "!#$&'()*+,-./:;<=>?@[\\]^_`{|}~",
            ),
            ("", ""),
        ] {
            assert_eq!(encode(text).to_string(), value);
            assert_eq!(decode(value.as_bytes()).unwrap(), text);
        }
    }

    #[test]
    fn values_of_other_senders_are_read_too() {
        for (value, text) in [
            ("a b", "a b"),
            ("a\"b", "a\"b"),
            ("%e2%82%ac", "€"),
            ("%61%2F", "a/"),
            ("%2520", "%20"),
            (r#""a b""#, "a b"),
            (r#""a\"b\\c\d""#, r#"a"b\cd"#),
            (r#""a%20b""#, "a b"),
            (r#""%22""#, "\""),
            (r#""""#, ""),
        ] {
            assert_eq!(decode(value.as_bytes()).unwrap(), text, "{value}");
        }
    }

    #[test]
    fn a_malformed_value_is_told() {
        for (value, part) in [
            (&b"%C0%A0"[..], "UTF-8"),
            (b"%ED%A0%80", "UTF-8"),
            (b"%FF", "UTF-8"),
            (b"%E2%82", "UTF-8"),
            (b"100%", "%25"),
            (b"%2", "%25"),
            (b"%zz", "%25"),
            (b"%%41", "%25"),
            ("é".as_bytes(), "ASCII"),
            (b"\xff", "ASCII"),
            (b"a\x7fb", "ASCII"),
            (b"\"", "quote"),
            (b"\"a", "quote"),
            (b"\"a\" b", "quote"),
            (b"\"a\"b\"", "quote"),
            (b"\"a\\\"", "quote"),
        ] {
            let why = decode(value).unwrap_err();
            assert!(why.contains(part), "{value:?}: {why}");
        }
    }

    proptest! {
        #[test]
        fn decoded_is_what_was_encoded(text in any::<String>()) {
            let value = encode(&text).to_string();
            prop_assert!(value.bytes().all(|byte| byte.is_ascii_graphic()), "{}", value);
            prop_assert_eq!(decode(value.as_bytes()).unwrap(), text);
        }

        #[test]
        fn whatever_comes_is_decoded_or_told(value in any::<Vec<u8>>()) {
            decode(&value).ok();
        }
    }
}
