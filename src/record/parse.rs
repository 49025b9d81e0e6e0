//! Validates the JSON of a record without building a tree.

use std::{
    cell::{Cell, RefCell},
    fmt,
    ops::Range,
};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Unexpected, Visitor},
};
use serde_json::value::RawValue;

/// What a record must look like to be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schema {
    /// `name`, `location` (non-empty strings), `age` (integer 0 to 150), `infectedtype`, `state` (strings), and any other member.
    Case,
    /// Any JSON object.
    Any,
}

/// Why a body is not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Not JSON. Line and column count from 1.
    #[error("malformed JSON at line {line}, column {column}: {detail}")]
    Malformed {
        line: usize,
        column: usize,
        detail: String,
    },
    /// JSON, but not what the schema asks for.
    #[error("{}{detail}", field.map(|f| format!("field `{f}`: ")).unwrap_or_default())]
    Schema {
        field: Option<&'static str>,
        detail: String,
    },
}

impl Invalid {
    /// serde's message without line and column, which stand in fields of their own.
    fn detail_of(e: &serde_json::Error) -> String {
        let full = e.to_string();
        full.rsplit_once(" at line ")
            .map_or(full.as_str(), |(text, _)| text)
            .to_owned()
    }

    /// The same error if the text that was read begins at `at` of `text`.
    pub(super) fn further_on(self, text: &str, at: usize) -> Self {
        let (lines, columns) = place(text.as_bytes(), at);
        match self {
            Self::Malformed {
                line: 1,
                column,
                detail,
            } => Self::Malformed {
                line: lines,
                column: column + columns - 1,
                detail,
            },
            other => other.further_down(lines - 1),
        }
    }

    /// The same error, `lines` lines further down.
    #[must_use]
    pub(super) fn further_down(mut self, lines: usize) -> Self {
        if let Self::Malformed { line, .. } = &mut self {
            *line += lines;
        }
        self
    }
}

/// The error for a body that is UTF-8 up to `valid_up_to` only.
pub(super) fn invalid_utf8(body: &[u8], valid_up_to: usize) -> Invalid {
    let (line, column) = place(body, valid_up_to);
    Invalid::Malformed {
        line,
        column,
        detail: "not UTF-8".into(),
    }
}

/// Checks `body` against `schema` and returns the bytes that travel: without surrounding white space and without top-level
/// `path` members, else byte for byte as they came.
///
/// # Errors
/// [`Invalid`] says what is wrong and where.
pub fn parse(body: &Bytes, schema: Schema) -> Result<Bytes, Invalid> {
    let text = std::str::from_utf8(body).map_err(|e| invalid_utf8(body, e.valid_up_to()))?;
    let (record, end) = parse_first(body, text, schema)?;
    match skip_space(&text[end..]) {
        "" => Ok(record),
        rest => Err(trailing(text, text.len() - rest.len())),
    }
}

/// The same for the first value of `text`, which is `body` or a part of it. Also returns where it ends in `text`.
pub(super) fn parse_first(
    body: &Bytes,
    text: &str,
    schema: Schema,
) -> Result<(Bytes, usize), Invalid> {
    let start = text.len() - skip_space(text).len();
    let (paths, end) = match schema {
        Schema::Case => first::<true>(text),
        Schema::Any => first::<false>(text),
    }
    // Only a bad record is read again, to find out which field is wrong.
    .ok_or_else(|| explain(text, schema))?;
    let record = &text[start..end];
    if paths.is_empty() {
        return Ok((body.slice_ref(record.as_bytes()), end));
    }
    let within = |value: &str| {
        let from = value.as_ptr() as usize - record.as_ptr() as usize;
        from..from + value.len()
    };
    Ok((
        without(
            record.as_bytes(),
            &paths.into_iter().map(within).collect::<Vec<_>>(),
        ),
        end,
    ))
}

/// The values of the `path` members of the first object in `text`, and where it ends; `None` if there is no valid one.
fn first<const CASE: bool>(text: &str) -> Option<(Vec<&str>, usize)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Checked<'_, CASE>>();
    let Checked(paths) = values.next()?.ok()?;
    Some((paths, values.byte_offset()))
}

/// Why the first value of `text` is not a record.
fn explain(text: &str, schema: Schema) -> Invalid {
    let reader = Reader::new(schema);
    match (&reader).deserialize(&mut serde_json::Deserializer::from_str(text)) {
        Err(e) => reader.explain(&e),
        Ok(()) => trailing(text, text.len()),
    }
}

/// `text` without the JSON white space at its start.
pub(super) fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

/// The error for characters at `at`, after the end of the record.
fn trailing(text: &str, at: usize) -> Invalid {
    let (line, column) = place(text.as_bytes(), at);
    Invalid::Malformed {
        line,
        column,
        detail: "trailing characters".into(),
    }
}

/// Line and column of `at` in `text`, counted from 1.
pub(super) fn place(text: &[u8], at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line_start = memchr::memrchr(b'\n', before).map_or(0, |newline| newline + 1);
    (
        memchr::memchr_iter(b'\n', before).count() + 1,
        at - line_start + 1,
    )
}

/// `body` without the members whose values lie at `values`.
fn without(body: &[u8], values: &[Range<usize>]) -> Bytes {
    let skip_space = |mut at: usize| {
        while body[at].is_ascii_whitespace() {
            at += 1;
        }
        at
    };
    let mut kept = BytesMut::with_capacity(body.len());
    let mut from = 0;
    for value in values {
        // The key reads "path" and so contains no quote: it begins at the second quote back from the colon.
        let colon = body[..value.start]
            .iter()
            .rposition(|&b| b == b':')
            .unwrap_or(from);
        let close = body[..colon]
            .iter()
            .rposition(|&b| b == b'"')
            .unwrap_or(from);
        let open = body[..close]
            .iter()
            .rposition(|&b| b == b'"')
            .unwrap_or(from);
        let after = skip_space(value.end);
        kept.put_slice(&body[from..open]);
        if body[after] == b',' {
            from = skip_space(after + 1);
        } else {
            // The last member: the comma before it goes too.
            let end = kept.trim_ascii_end().len();
            if kept[..end].ends_with(b",") {
                kept.truncate(end - 1);
            }
            from = value.end;
        }
    }
    kept.put_slice(&body[from..]);
    kept.freeze()
}
/// Reads one record. Keeps the current field, for errors, and the values of `path` members.
struct Reader<'t> {
    schema: Schema,
    field: Cell<Option<&'static str>>,
    paths: RefCell<Vec<&'t str>>,
}

/// The values of the `path` members of a record that fits schema `case`, or any.
struct Checked<'t, const CASE: bool>(Vec<&'t str>);

impl<'de, const CASE: bool> serde::Deserialize<'de> for Checked<'de, CASE> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let reader = Reader::new(if CASE { Schema::Case } else { Schema::Any });
        (&reader).deserialize(d)?;
        Ok(Self(reader.paths.into_inner()))
    }
}

impl Reader<'_> {
    fn new(schema: Schema) -> Self {
        Self {
            schema,
            field: Cell::new(None),
            paths: RefCell::default(),
        }
    }

    fn explain(&self, e: &serde_json::Error) -> Invalid {
        let detail = Invalid::detail_of(e);
        if e.is_data() {
            Invalid::Schema {
                field: self.field.get(),
                detail,
            }
        } else {
            Invalid::Malformed {
                line: e.line(),
                column: e.column(),
                detail,
            }
        }
    }
}

const FIELDS: [&str; 5] = ["name", "location", "age", "infectedtype", "state"];

/// A member's key: one of [`FIELDS`], by its index, `path`, or any other.
enum MemberKey {
    Field(usize),
    Path,
    Other,
}

impl<'de> serde::Deserialize<'de> for MemberKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = MemberKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, key: &str) -> Result<MemberKey, E> {
                Ok(match FIELDS.iter().position(|&f| f == key) {
                    Some(at) => MemberKey::Field(at),
                    None if key == "path" => MemberKey::Path,
                    None => MemberKey::Other,
                })
            }
        }
        d.deserialize_str(KeyVisitor)
    }
}

impl<'de> DeserializeSeed<'de> for &Reader<'de> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &Reader<'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = [false; FIELDS.len()];
        while let Some(key) = map.next_key::<MemberKey>()? {
            match key {
                MemberKey::Field(at) if self.schema == Schema::Case => {
                    self.field.set(Some(FIELDS[at]));
                    if std::mem::replace(&mut seen[at], true) {
                        return Err(A::Error::custom("given twice"));
                    }
                    match FIELDS[at] {
                        "age" => map.next_value_seed(Age)?,
                        "name" | "location" => map.next_value_seed(Text {
                            may_be_empty: false,
                        })?,
                        _ => map.next_value_seed(Text { may_be_empty: true })?,
                    }
                    self.field.set(None);
                }
                MemberKey::Path => {
                    self.paths
                        .borrow_mut()
                        .push(map.next_value::<&'de RawValue>()?.get());
                }
                MemberKey::Field(_) | MemberKey::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if self.schema == Schema::Case
            && let Some(missing) = seen.iter().position(|seen| !seen)
        {
            self.field.set(Some(FIELDS[missing]));
            return Err(A::Error::custom("missing"));
        }
        Ok(())
    }
}

/// Checks a string without copying it.
struct Text {
    may_be_empty: bool,
}

impl<'de> DeserializeSeed<'de> for Text {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Text {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.may_be_empty {
            "a string"
        } else {
            "a non-empty string"
        })
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        if text.is_empty() && !self.may_be_empty {
            return Err(E::invalid_value(Unexpected::Str(text), &self));
        }
        Ok(())
    }
}

/// Checks an integer from 0 to 150.
struct Age;

impl<'de> DeserializeSeed<'de> for Age {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_u64(self)
    }
}

impl Visitor<'_> for Age {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer from 0 to 150")
    }
    fn visit_u64<E: serde::de::Error>(self, age: u64) -> Result<(), E> {
        if age > 150 {
            return Err(E::invalid_value(Unexpected::Unsigned(age), &self));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Tag;

    const CASE: &str = r#"{"name":"Ñusta","location":"San Marcos","age":42,"infectedtype":"imported","state":"symptomatic"}"#;

    fn case(text: &str) -> Result<Bytes, Invalid> {
        parse(&Bytes::copy_from_slice(text.as_bytes()), Schema::Case)
    }

    fn any(text: &str) -> Result<Bytes, Invalid> {
        parse(&Bytes::copy_from_slice(text.as_bytes()), Schema::Any)
    }

    #[test]
    fn a_record_keeps_its_bytes_but_for_surrounding_white_space() {
        assert_eq!(case(CASE).unwrap(), CASE);
        assert_eq!(case(&format!(" \r\n\t{CASE}\n ")).unwrap(), CASE);
        let spaced = "{ \"a\" : [1, 2 ] , \"b\":{\"path\":\"kept\"} }";
        assert_eq!(any(spaced).unwrap(), spaced);
    }

    #[test]
    fn a_path_that_the_client_sent_goes_at_the_top_level_only() {
        for (sent, kept) in [
            (r#"{"path":1}"#, "{}"),
            (r#"{ "path" : "x" }"#, "{  }"),
            (r#"{"a":1,"path":"x"}"#, r#"{"a":1}"#),
            (r#"{"path":"x","a":1}"#, r#"{"a":1}"#),
            (
                r#"{"a":1, "path" : {"path":":,\"}"} , "b":2}"#,
                r#"{"a":1, "b":2}"#,
            ),
            (r#"{"a":1,"path":1,"path":[2]}"#, r#"{"a":1}"#),
            (r#"{"path":1,"path":2,"a":3}"#, r#"{"a":3}"#),
            (r#"{"path":1,"a":3,"path":2}"#, r#"{"a":3}"#),
            (r#"{"a":1,"p\u0061th":"x"}"#, r#"{"a":1}"#),
            (r#"{"a":{"path":1}}"#, r#"{"a":{"path":1}}"#),
            (
                r#"{"a\"path":1,"b":"\"path\":2"}"#,
                r#"{"a\"path":1,"b":"\"path\":2"}"#,
            ),
        ] {
            let body = any(sent).unwrap();
            assert_eq!(body, kept, "{sent}");
            let tagged = Tag::new("NATS").splice(&body).unwrap();
            let value: serde_json::Value = serde_json::from_slice(&tagged).unwrap();
            assert_eq!(value["path"], "NATS", "{sent}");
        }
    }

    #[test]
    fn malformed_json_is_told_by_line_and_column() {
        for (text, at) in [
            ("", (1, 0)),
            ("{\n\"a\": }", (2, 6)),
            ("{} x", (1, 4)),
            ("{\"a\":1,}", (1, 8)),
            ("\u{feff}{}", (1, 1)),
        ] {
            match any(text) {
                Err(Invalid::Malformed { line, column, .. }) => {
                    assert_eq!((line, column), at, "{text:?}");
                }
                other => panic!("{text:?}: {other:?}"),
            }
        }
        let latin1 = Bytes::from_static(b"{\"a\":\n\"\xe9\"}");
        assert_eq!(
            parse(&latin1, Schema::Any),
            Err(Invalid::Malformed {
                line: 2,
                column: 2,
                detail: "not UTF-8".into()
            })
        );
    }

    #[test]
    fn a_record_that_breaks_the_schema_is_told_by_field() {
        for (from, to, field) in [
            ("42", "151", Some("age")),
            ("42", "-1", Some("age")),
            ("42", "4.5", Some("age")),
            ("42", "\"42\"", Some("age")),
            ("\"Ñusta\"", "\"\"", Some("name")),
            ("\"Ñusta\"", "null", Some("name")),
            ("\"San Marcos\"", "\"\"", Some("location")),
            ("\"imported\"", "1", Some("infectedtype")),
            ("\"state\"", "\"State\"", Some("state")),
            ("\"location\"", "\"name\"", Some("name")),
        ] {
            match case(&CASE.replacen(from, to, 1)) {
                Err(Invalid::Schema { field: found, .. }) => {
                    assert_eq!(found, field, "{from} -> {to}");
                }
                other => panic!("{from} -> {to}: {other:?}"),
            }
        }
        for text in ["[]", "1", "null", "\"{}\"", "[\"a\",\"l\",1,\"i\",\"s\"]"] {
            assert!(
                matches!(case(text), Err(Invalid::Schema { field: None, .. })),
                "{text}"
            );
        }
        assert!(
            case(&CASE.replace("imported", "")).is_ok(),
            "infectedtype may be empty"
        );
    }
}
