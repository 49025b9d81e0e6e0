//! Validates the JSON of a record without building a tree.

mod reader;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::{Deserializer, IgnoredAny};

use self::reader::Reader;
use super::{
    limits::{self, BrokenRule, JsonLimits},
    pointer::{PointerSet, Values},
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
    let mut reader = Reader::new(schema, pointers);
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
