//! A record: its id, its bytes and its trace context. Everything here is pure.
//!
//! A body is read once, at ingest, for validation. After that its bytes travel untouched; [`Tag::splice`] writes the tag
//! into them at the end without building a JSON tree.

pub mod batch;

use std::{
    cell::{Cell, RefCell},
    fmt,
    ops::Range,
    sync::Arc,
};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{
    Deserialize, Serialize,
    de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Unexpected, Visitor},
};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::clock::unix_us;

/// A JSON object on its way from a client to the API. Clones share the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Stays the same on every hop, retry and lane, and becomes the API's `Idempotency-Key`.
    pub id: Arc<str>,
    /// A JSON object without surrounding white space and without a `path` member.
    pub body: Bytes,
    /// W3C Trace Context, carried along as it came.
    pub traceparent: Option<Arc<str>>,
    /// Which run of which node took the record in, and when. `None` for a message that no Waypost node published.
    pub origin: Option<Origin>,
}

impl AsRef<Self> for Record {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Record {
    /// A new id: a UUID version 7 (RFC 9562), unique without coordination and in order of time.
    #[must_use]
    pub fn new_id() -> Arc<str> {
        to_id(Uuid::now_v7())
    }

    /// New ids, [`batch::MAX`] at most, for records that come together: they differ in the last bits, in their order.
    pub fn new_ids() -> impl Iterator<Item = Arc<str>> {
        let first = Uuid::now_v7().as_u128() & !(batch::MAX as u128 - 1);
        (0..batch::MAX as u128).map(move |at| to_id(Uuid::from_u128(first | at)))
    }
}

fn to_id(uuid: Uuid) -> Arc<str> {
    Arc::from(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) as &str)
}

/// The run of a node that took a record in, and the time at which it did. It crosses a broker as one string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Unique per start of a node.
    pub run: Arc<str>,
    /// Microseconds since the Unix epoch.
    pub at_us: u64,
}

impl Origin {
    /// The origin of a record that run `run` takes in now.
    #[must_use]
    pub fn now(run: Arc<str>) -> Self {
        Self {
            run,
            at_us: unix_us(),
        }
    }

    /// As it crosses a broker.
    #[must_use]
    pub fn to_text(&self) -> String {
        [&*self.run, "/", &self.at_us.to_string()].concat()
    }

    /// Reads what [`Origin::to_text`] wrote; `None` if it is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (run, at_us) = text.rsplit_once('/')?;
        Some(Self {
            run: Arc::from(run),
            at_us: at_us.parse().ok()?,
        })
    }
}

/// Whether `text` is one or more visible ASCII characters: then it passes through the headers of every hop unchanged.
#[must_use]
pub fn is_visible_ascii(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// What a record must look like to be taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schema {
    /// `name`, `location` (non-empty strings), `age` (integer 0 to 150), `infectedtype`, `state` (strings), and whatever else.
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
    /// What serde says without the place, which is told apart.
    fn detail_of(e: &serde_json::Error) -> String {
        let full = e.to_string();
        full.rsplit_once(" at line ")
            .map_or(full.as_str(), |(text, _)| text)
            .to_owned()
    }

    /// The same, where what was read begins at `at` of `text`.
    fn further_on(self, text: &str, at: usize) -> Self {
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

    /// The same, so many lines further down in a longer text.
    #[must_use]
    fn further_down(mut self, lines: usize) -> Self {
        if let Self::Malformed { line, .. } = &mut self {
            *line += lines;
        }
        self
    }
}

/// `body` is UTF-8 up to there, and no further.
fn invalid_utf8(body: &[u8], valid_up_to: usize) -> Invalid {
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

/// The same for what stands first in `text`, which is `body` or a part of it, and where it ends there.
fn parse_first(body: &Bytes, text: &str, schema: Schema) -> Result<(Bytes, usize), Invalid> {
    let start = text.len() - skip_space(text).len();
    let (paths, end) = match schema {
        Schema::Case => first::<true>(text),
        Schema::Any => first::<false>(text),
    }
    // What is wrong is worth a second look: it tells of the field.
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

/// The values of the `path` members of the object that stands first in `text`, and where it ends; `None` if there is no such object.
fn first<const CASE: bool>(text: &str) -> Option<(Vec<&str>, usize)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Checked<'_, CASE>>();
    let Checked(paths) = values.next()?.ok()?;
    Some((paths, values.byte_offset()))
}

/// What is wrong with what stands first in `text`.
fn explain(text: &str, schema: Schema) -> Invalid {
    let reader = Reader::new(schema);
    match (&reader).deserialize(&mut serde_json::Deserializer::from_str(text)) {
        Err(e) => reader.explain(&e),
        Ok(()) => trailing(text, text.len()),
    }
}

/// `text` from where something other than JSON's white space begins.
fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

/// More stands at `at` than there should be.
fn trailing(text: &str, at: usize) -> Invalid {
    let (line, column) = place(text.as_bytes(), at);
    Invalid::Malformed {
        line,
        column,
        detail: "trailing characters".into(),
    }
}

/// Line and column of `at` in `text`, counted from 1.
fn place(text: &[u8], at: usize) -> (usize, usize) {
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
        // The key is a string that reads "path", so it holds no quote: its first quote is the second one from the colon back.
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

/// The tag of a lane, ready to be written into a body.
#[derive(Clone, Debug)]
pub struct Tag {
    /// `"path":"NATS"}`
    ending: Arc<[u8]>,
}

impl Tag {
    /// `name` may be any text; it is escaped as JSON asks.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            ending: format!("\"path\":{}}}", serde_json::Value::from(name))
                .into_bytes()
                .into(),
        }
    }

    /// `body` with the tag as its last member, or `None` if `body` has not the outline of a JSON object
    /// (a message that something else put into the broker).
    #[must_use]
    pub fn splice(&self, body: &[u8]) -> Option<Bytes> {
        let mut tagged = BytesMut::with_capacity(body.len() + self.ending.len() + 1);
        self.splice_onto(body, &mut tagged).then(|| tagged.freeze())
    }

    /// The same, at the end of `tagged`. Says whether `body` could be tagged; else nothing was written.
    #[must_use]
    pub fn splice_onto(&self, body: &[u8], tagged: &mut BytesMut) -> bool {
        let Some(open) = body
            .strip_suffix(b"}")
            .filter(|rest| rest.starts_with(b"{"))
        else {
            return false;
        };
        tagged.put_slice(open);
        if open.trim_ascii_end().len() > 1 {
            tagged.put_u8(b',');
        }
        tagged.put_slice(&self.ending);
        true
    }
}

/// Reads one record, keeping the field it is at for the error, and the values of `path` members.
struct Reader<'t> {
    schema: Schema,
    field: Cell<Option<&'static str>>,
    paths: RefCell<Vec<&'t str>>,
}

/// A record of schema `case`, or of any, as the values of its `path` members.
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

/// A member's key: one of [`FIELDS`] by its place there, `path`, or one that is carried along.
enum Key {
    Field(usize),
    Path,
    Other,
}

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl Visitor<'_> for KeyVisitor {
            type Value = Key;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, key: &str) -> Result<Key, E> {
                Ok(match FIELDS.iter().position(|&f| f == key) {
                    Some(at) => Key::Field(at),
                    None if key == "path" => Key::Path,
                    None => Key::Other,
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
        while let Some(key) = map.next_key::<Key>()? {
            match key {
                Key::Field(at) if self.schema == Schema::Case => {
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
                Key::Path => {
                    self.paths
                        .borrow_mut()
                        .push(map.next_value::<&'de RawValue>()?.get());
                }
                Key::Field(_) | Key::Other => {
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

/// A string whose content does not matter, read without a copy.
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

/// An integer from 0 to 150.
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
    fn ids_of_a_batch_are_as_new_as_any_and_in_their_order() {
        let ids: Vec<_> = Record::new_ids().chain(Record::new_ids()).collect();
        assert_eq!(ids.len(), 2 * batch::MAX);
        assert_eq!(
            ids.iter().collect::<std::collections::HashSet<_>>().len(),
            ids.len()
        );
        assert!(ids[..batch::MAX].is_sorted());
        let id = Uuid::parse_str(&ids[batch::MAX - 1]).unwrap();
        assert_eq!(
            (id.get_version_num(), id.get_variant()),
            (7, uuid::Variant::RFC4122)
        );
    }

    #[test]
    fn the_tag_is_the_last_member() {
        let tag = Tag::new("NATS");
        assert_eq!(tag.splice(b"{}").unwrap(), r#"{"path":"NATS"}"#);
        assert_eq!(tag.splice(b"{ }").unwrap(), r#"{ "path":"NATS"}"#);
        assert_eq!(
            tag.splice(br#"{"a":1 }"#).unwrap(),
            r#"{"a":1 ,"path":"NATS"}"#
        );
        assert_eq!(
            Tag::new("a\"b").splice(b"{}").unwrap(),
            r#"{"path":"a\"b"}"#
        );
        for foreign in ["", "}", "[]", "null", "{", "\"}"] {
            assert_eq!(tag.splice(foreign.as_bytes()), None, "{foreign}");
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
                    assert_eq!((line, column), at, "{text:?}")
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
                    assert_eq!(found, field, "{from} -> {to}")
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

    #[test]
    fn an_origin_reads_back() {
        let origin = Origin::now(Arc::from("node/a/1"));
        assert_eq!(Origin::parse(&origin.to_text()), Some(origin));
        assert_eq!(Origin::parse("no slash"), None);
        assert_eq!(Origin::parse("a/b"), None);
    }
}
