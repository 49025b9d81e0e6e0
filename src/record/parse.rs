//! Validates the JSON of a record without building a tree.

#[cfg(test)]
mod tests;

use std::{fmt, ops::Range};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Unexpected, Visitor},
};
use serde_json::value::RawValue;

use super::{
    limits::{self, BrokenRule, HALF_A_PAIR, JsonLimits},
    number::whole_number,
    pointer::{PointerNode, PointerSet, Values},
    schema::Schema,
};

/// What a record must be to be accepted.
#[derive(Clone, Debug)]
pub struct RecordRules {
    pub schema: Schema,
    pub limits: JsonLimits,
}

impl From<Schema> for RecordRules {
    fn from(schema: Schema) -> Self {
        Self {
            schema,
            limits: JsonLimits::default(),
        }
    }
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
    /// More bytes than [`JsonLimits::max_size`].
    #[error("The record is larger than {max} bytes")]
    TooLarge { max: usize },
    /// JSON that the schema does not allow.
    #[error("{}{detail}", at_field(field.as_deref()))]
    Schema {
        /// The JSON pointer to the value; empty for the record itself.
        field: Option<String>,
        detail: String,
    },
}

fn at_field(pointer: Option<&str>) -> String {
    match pointer {
        None | Some("") => String::new(),
        Some(pointer) => format!("field `{pointer}`: "),
    }
}

impl Invalid {
    /// Malformed JSON at byte `at` of `text`.
    pub(super) fn malformed(text: &[u8], at: usize, detail: &str) -> Self {
        let (line, column) = place(text, at);
        Self::Malformed {
            line,
            column,
            detail: detail.into(),
        }
    }

    /// The same error for a text of which only the part from byte `at` on was read.
    pub(crate) fn further_on(mut self, text: impl AsRef<[u8]>, at: usize) -> Self {
        if let Self::Malformed { line, column, .. } = &mut self {
            let (first_line, first_column) = place(text.as_ref(), at);
            if *line == 1 {
                *column += first_column - 1;
            }
            *line += first_line - 1;
        }
        self
    }
}

/// `body` as text, if it is UTF-8 and begins without a byte order mark.
///
/// # Errors
/// [`Invalid::Malformed`] at the first byte that is not.
pub fn as_text(body: &[u8]) -> Result<&str, Invalid> {
    if body.starts_with(b"\xff\xfe") || body.starts_with(b"\xfe\xff") {
        let detail = "a byte order mark (BOM) of UTF-16; JSON is UTF-8, without one";
        return Err(Invalid::malformed(body, 0, detail));
    }
    let text = std::str::from_utf8(body)
        .map_err(|why| Invalid::malformed(body, why.valid_up_to(), "not UTF-8"))?;
    no_mark(text, 0).map(|()| text)
}

/// Refuses a byte order mark before the value at byte `at` (RFC 8259, 8.1).
fn no_mark(text: &str, at: usize) -> Result<(), Invalid> {
    if text[at..].starts_with('\u{feff}') {
        let detail = "a byte order mark (BOM), which is no part of JSON; send the text without it";
        return Err(Invalid::malformed(text.as_bytes(), at, detail));
    }
    Ok(())
}

/// Checks `body` against `rules`. Returns the bytes that travel: `body` without surrounding white
/// space and without top-level `path` members. Every other byte stays as it came.
///
/// # Errors
/// [`Invalid`] names the mistake and its place.
pub fn parse(body: &Bytes, rules: &RecordRules) -> Result<Bytes, Invalid> {
    let (record, _) = parse_body(body, rules, &PointerSet::default())?;
    Ok(record)
}

/// The same for a JSON object that another node has checked, or another publisher has not.
///
/// # Errors
/// [`Invalid`] says why it is none.
pub fn parse_any(body: &Bytes) -> Result<Bytes, Invalid> {
    let text = as_text(body)?;
    let (record, _, end) = read(body, text, &Schema::Any, &PointerSet::default())?;
    whole(text, end).map(|()| record)
}

/// The same. Also returns the values of `pointers`.
pub fn parse_body<'t>(
    body: &'t Bytes,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<(Bytes, Values<'t>), Invalid> {
    parse_text(body, as_text(body)?, rules, pointers)
}

/// The same for `text`, which is `body` or a part of it.
pub(super) fn parse_text<'t>(
    body: &Bytes,
    text: &'t str,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<(Bytes, Values<'t>), Invalid> {
    let (record, values, end) = parse_first(body, text, rules, pointers)?;
    whole(text, end).map(|()| (record, values))
}

/// The same for the first value of `text`. Also returns the end of the value in `text`.
pub(super) fn parse_first<'t>(
    body: &Bytes,
    text: &'t str,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<(Bytes, Values<'t>, usize), Invalid> {
    let start = text.len() - skip_space(text).len();
    let parsed = match read(body, text, &rules.schema, pointers) {
        // The values for rules are read apart, and their errors would be others: the record has the
        // error that it has without rules, at the latest by `limits`.
        Err(_) if !pointers.is_empty() => read(body, text, &rules.schema, &PointerSet::default())?,
        parsed => parsed?,
    };
    // Before the checks that take memory of many times the size.
    let max = rules.limits.max_size;
    if parsed.0.len() > max {
        return Err(Invalid::TooLarge { max });
    }
    let record = &text[start..parsed.2];
    limits::check(record, &rules.limits).map_err(|broken| match broken {
        BrokenRule::Malformed { at, detail } => {
            Invalid::malformed(text.as_bytes(), start + at, detail)
        }
        BrokenRule::Limit { pointer, detail } => Invalid::Schema {
            field: Some(pointer),
            detail,
        },
    })?;
    if let Schema::File(file) = &rules.schema {
        file.check(record)?;
    }
    Ok(parsed)
}

/// The error if there is more than white space behind `end`.
fn whole(text: &str, end: usize) -> Result<(), Invalid> {
    let rest = skip_space(&text[end..]);
    let detail = match rest.bytes().next() {
        None => return Ok(()),
        Some(b'{') => {
            "another value; many records are an array, or lines of Content-Type \
             application/x-ndjson"
        }
        Some(_) => "trailing characters",
    };
    let at = text.len() - rest.len();
    Err(Invalid::malformed(text.as_bytes(), at, detail))
}

/// Reads the first value of `text`, and checks it against `schema`.
fn read<'t>(
    body: &Bytes,
    text: &'t str,
    schema: &Schema,
    pointers: &PointerSet,
) -> Result<(Bytes, Values<'t>, usize), Invalid> {
    let start = text.len() - skip_space(text).len();
    no_mark(text, start)?;
    let mut reader = Reader {
        fields: match schema {
            Schema::Case => &FIELDS[..],
            Schema::Any | Schema::File(_) => &[],
        },
        pointers,
        field: None,
        paths: Vec::new(),
        values: Values::default(),
    };
    let mut json = serde_json::Deserializer::from_str(text);
    json.deserialize_map(&mut reader)
        .map_err(|why| reader.invalid(&why))?;
    let end = json.into_iter::<IgnoredAny>().byte_offset();
    let record = &text[start..end];
    if reader.paths.is_empty() {
        return Ok((body.slice_ref(record.as_bytes()), reader.values, end));
    }
    let paths = reader.paths.iter().map(|value| {
        let from = value.as_ptr() as usize - record.as_ptr() as usize;
        from..from + value.len()
    });
    let record = without(record.as_bytes(), paths);
    Ok((record, reader.values, end))
}

/// `text` without the JSON white space at its start.
pub(super) fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

/// Line and column of byte `at` in `text`, counted from 1.
pub(super) fn place(text: &[u8], at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line_start = memchr::memrchr(b'\n', before).map_or(0, |newline| newline + 1);
    let line = memchr::memchr_iter(b'\n', before).count() + 1;
    (line, at - line_start + 1)
}

/// `body` without the members whose values lie at `values`.
fn without(body: &[u8], values: impl Iterator<Item = Range<usize>>) -> Bytes {
    let skip_space = |mut at: usize| {
        while body[at].is_ascii_whitespace() {
            at += 1;
        }
        at
    };
    let mut kept = BytesMut::with_capacity(body.len());
    let mut from = 0;
    for value in values {
        let last = |byte, end: usize| memchr::memrchr(byte, &body[..end]).unwrap_or(from);
        // The key reads "path" and so contains no quote: it begins at the second quote before the
        // colon.
        let colon = last(b':', value.start);
        let key = last(b'"', last(b'"', colon));
        let after = skip_space(value.end);
        kept.put_slice(&body[from..key]);
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

/// Reads one record. Keeps the current field, for errors, and the values of `path` members and of
/// `pointers`.
struct Reader<'p, 't> {
    /// The fields that the schema wants.
    fields: &'static [(&'static str, FieldCheck)],
    pointers: &'p PointerSet,
    field: Option<&'static str>,
    paths: Vec<&'t str>,
    values: Values<'t>,
}

impl Reader<'_, '_> {
    fn invalid(&self, why: &serde_json::Error) -> Invalid {
        // Line and column have fields of their own.
        let text = why.to_string();
        let detail = text
            .rsplit_once(" at line ")
            .map_or(&*text, |(text, _)| text);
        // The parser finds it in names, and `limits` in values.
        let is_half = HALF_PAIR.contains(&detail);
        let detail = if is_half { HALF_A_PAIR } else { detail }.to_owned();
        // `1e400` is JSON (RFC 8259, 6) and no value of a field.
        if why.is_data() || self.field.is_some() && detail == OUT_OF_RANGE {
            Invalid::Schema {
                field: self.field.map(|field| format!("/{field}")),
                detail,
            }
        } else {
            Invalid::Malformed {
                line: why.line(),
                column: why.column(),
                detail,
            }
        }
    }
}

/// The texts of the parser's errors for half of a surrogate pair.
const HALF_PAIR: [&str; 2] = [
    "lone leading surrogate in hex escape",
    "unexpected end of hex escape",
];
/// The text of the parser's error for a number that no float can hold.
const OUT_OF_RANGE: &str = "number out of range";
/// The highest age.
const AGE_MAX: i64 = 150;

/// The fields of schema `case`, in the order of [`MemberKey`].
const FIELDS: [(&str, FieldCheck); 5] = [
    ("name", FieldCheck::NonEmptyText),
    ("location", FieldCheck::NonEmptyText),
    ("age", FieldCheck::Age),
    ("infectedtype", FieldCheck::Text),
    ("state", FieldCheck::Text),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum MemberKey {
    Name,
    Location,
    Age,
    InfectedType,
    State,
    Path,
    Other,
}

/// Reads the name of a member, and what the pointers want of it.
struct MemberName<'p>(&'p PointerSet);

impl<'de, 'p> DeserializeSeed<'de> for MemberName<'p> {
    type Value = (MemberKey, Option<&'p PointerNode>);

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_identifier(self)
    }
}

impl<'p> Visitor<'_> for MemberName<'p> {
    type Value = (MemberKey, Option<&'p PointerNode>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        let key = match name {
            "name" => MemberKey::Name,
            "location" => MemberKey::Location,
            "age" => MemberKey::Age,
            "infectedtype" => MemberKey::InfectedType,
            "state" => MemberKey::State,
            "path" => MemberKey::Path,
            _ => MemberKey::Other,
        };
        Ok((key, self.0.member(name)))
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let fields = self.fields;
        let mut seen = [false; FIELDS.len()];
        while let Some((key, wanted)) = map.next_key_seed(MemberName(self.pointers))? {
            if let Some((name, check)) = fields.get(key as usize) {
                self.field = Some(name);
                if std::mem::replace(&mut seen[key as usize], true) {
                    return Err(A::Error::custom("given twice"));
                }
                if let Some(node) = wanted {
                    let text = map.next_value::<&'de RawValue>()?.get();
                    let mut json = serde_json::Deserializer::from_str(text);
                    let checked = check.deserialize(&mut json);
                    let checked = checked.and_then(|()| node.capture(text, &mut self.values));
                    checked.map_err(A::Error::custom)?;
                } else {
                    map.next_value_seed(*check)?;
                }
                self.field = None;
            } else if key == MemberKey::Path {
                self.paths.push(map.next_value::<&'de RawValue>()?.get());
            } else if let Some(node) = wanted {
                let text = map.next_value::<&'de RawValue>()?.get();
                let captured = node.capture(text, &mut self.values);
                captured.map_err(A::Error::custom)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if let Some(((name, _), _)) = fields.iter().zip(seen).find(|(_, seen)| !seen) {
            self.field = Some(name);
            return Err(A::Error::custom("missing"));
        }
        Ok(())
    }
}

/// Checks the value of a field without copying it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FieldCheck {
    Text,
    NonEmptyText,
    /// An integer from 0 to 150.
    Age,
}

impl<'de> DeserializeSeed<'de> for FieldCheck {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        if self != Self::Age {
            return json.deserialize_any(self);
        }
        // The digits as they came: read as a number, `0` and `1e-400` would be the same float.
        let value = <&RawValue>::deserialize(json)?.get();
        if whole_number(value).is_some_and(|age| (0..=AGE_MAX).contains(&age)) {
            return Ok(());
        }
        let found = limits::shown(value);
        let found = match value.as_bytes()[0] {
            b'{' => Unexpected::Map,
            b'[' => Unexpected::Seq,
            b'"' => Unexpected::Other("a string"),
            _ => Unexpected::Other(&found),
        };
        Err(D::Error::invalid_value(found, &self))
    }
}

impl Visitor<'_> for FieldCheck {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "a string",
            Self::NonEmptyText => "a non-empty string",
            Self::Age => "an integer from 0 to 150",
        })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        match self {
            Self::Text => Ok(()),
            Self::NonEmptyText if !text.is_empty() => Ok(()),
            Self::NonEmptyText => Err(E::invalid_value(Unexpected::Str(text), &self)),
            Self::Age => Err(E::invalid_type(Unexpected::Str(text), &self)),
        }
    }
}
