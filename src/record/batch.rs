//! Many records in one body: a JSON array, or one record per line (NDJSON).

use bytes::Bytes;

use super::{
    parse::{Invalid, RecordRules, as_text, parse_first, parse_text, skip_space},
    pointer::{PointerSet, Values},
};

/// The most records of one request; a power of two.
pub const MAX: usize = 1024;

/// The form of a body with more than one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Array,
    Lines,
}

/// Why a body is not a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBatch {
    /// The body as a whole is malformed.
    #[error("{0}")]
    Body(#[from] Invalid),
    /// One of its records is invalid. `index` counts from 0.
    #[error("record {index}: {why}")]
    Record { index: usize, why: Invalid },
}

/// A record, trimmed, and the values that were wanted of it.
type Parsed<'t> = (Bytes, Values<'t>);

/// The records of `body` in their order, each checked and trimmed as [`parse`](super::parse) does,
/// and the values of `pointers` in each. Lines and columns in errors count from the start of the
/// body. Reads no more than one record over [`MAX`]: a small body may have a million.
///
/// # Errors
/// [`InvalidBatch`] names the first mistake.
pub fn parse_all<'t>(
    body: &'t Bytes,
    form: Form,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<Vec<Parsed<'t>>, InvalidBatch> {
    let text = as_text(body)?;
    match form {
        Form::Array => parse_array(body, text, rules, pointers),
        Form::Lines => parse_lines(body, text, rules, pointers),
    }
}

fn parse_array<'t>(
    body: &Bytes,
    text: &'t str,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<Vec<Parsed<'t>>, InvalidBatch> {
    let mut records = Vec::new();
    let mut at = after(text, 0, "[").ok_or_else(|| unexpected(text, 0, "expected an array"))?;
    let end = loop {
        if records.is_empty()
            && let Some(end) = after(text, at, "]")
        {
            break end;
        }
        let first = parse_first(body, &text[at..], rules, pointers);
        let (record, values, length) = first.map_err(|why| match why {
            // Malformed JSON spoils the whole body.
            Invalid::Malformed { .. } => InvalidBatch::Body(why.further_on(text, at)),
            Invalid::TooLarge { .. } | Invalid::Schema { .. } => InvalidBatch::Record {
                index: records.len(),
                why,
            },
        })?;
        records.push((record, values));
        if records.len() > MAX {
            return Ok(records);
        }
        at += length;
        if let Some(end) = after(text, at, "]") {
            break end;
        }
        at = after(text, at, ",").ok_or_else(|| unexpected(text, at, "expected `,` or `]`"))?;
    };
    if skip_space(&text[end..]).is_empty() {
        Ok(records)
    } else {
        Err(unexpected(text, end, "trailing characters").into())
    }
}

fn parse_lines<'t>(
    body: &Bytes,
    text: &'t str,
    rules: &RecordRules,
    pointers: &PointerSet,
) -> Result<Vec<Parsed<'t>>, InvalidBatch> {
    let lines = text.lines();
    let lines = lines.filter(|line| !skip_space(line).is_empty());
    let records = lines.take(MAX + 1).enumerate().map(|(index, line)| {
        parse_text(body, line, rules, pointers).map_err(|why| {
            let at = line.as_ptr() as usize - text.as_ptr() as usize;
            let why = why.further_on(text, at);
            InvalidBatch::Record { index, why }
        })
    });
    records.collect()
}

/// The end of `token`, if only white space is between `at` and it.
fn after(text: &str, at: usize, token: &str) -> Option<usize> {
    let rest = skip_space(&text[at..]).strip_prefix(token)?;
    Some(text.len() - rest.len())
}

/// The error for the first character after `at` that is no white space.
fn unexpected(text: &str, at: usize, detail: &str) -> Invalid {
    let at = text.len() - skip_space(&text[at..]).len();
    Invalid::malformed(text.as_bytes(), at, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Schema;

    fn all(text: &str, form: Form) -> Result<Vec<Bytes>, InvalidBatch> {
        let body = Bytes::copy_from_slice(text.as_bytes());
        let records = parse_all(&body, form, &Schema::Any.into(), &PointerSet::default())?;
        Ok(records.into_iter().map(|(record, _)| record).collect())
    }

    #[test]
    fn each_record_keeps_its_bytes() {
        let expected = [r#"{"a" : 1}"#, r#"{"b":[{"path":1}]}"#, "{}"]
            .map(|text: &str| Bytes::copy_from_slice(text.as_bytes()));
        assert_eq!(
            all(
                " [ {\"a\" : 1} ,\n{\"b\":[{\"path\":1}]},{\"path\":2}]\n",
                Form::Array
            )
            .unwrap(),
            expected
        );
        assert_eq!(
            all(
                "{\"a\" : 1}\r\n\n {\"b\":[{\"path\":1}]} \n{\"path\":2}",
                Form::Lines
            )
            .unwrap(),
            expected
        );
        assert_eq!(all("[]", Form::Array), Ok(Vec::new()));
        assert_eq!(all("\n", Form::Lines), Ok(Vec::new()));
    }

    #[test]
    fn nothing_is_read_behind_one_record_too_many() {
        let most = vec!["{}"; MAX + 1];
        for (text, form) in [
            (format!("[{},{{", most.join(",")), Form::Array),
            (format!("{}\n{{", most.join("\n")), Form::Lines),
        ] {
            assert_eq!(all(&text, form).map(|all| all.len()), Ok(MAX + 1));
        }
    }

    #[test]
    fn a_bad_record_is_told_by_its_index_and_a_bad_body_by_its_place() {
        let malformed = |result: Result<Vec<Bytes>, InvalidBatch>| match result.unwrap_err() {
            InvalidBatch::Body(Invalid::Malformed { line, column, .. }) => (None, line, column),
            InvalidBatch::Record {
                index,
                why: Invalid::Malformed { line, column, .. },
            } => (Some(index), line, column),
            other => panic!("{other:?}"),
        };
        assert_eq!(malformed(all("[{},\n{]", Form::Array)), (None, 2, 2));
        assert_eq!(malformed(all("[{}] x", Form::Array)), (None, 1, 6));
        assert_eq!(
            malformed(all("{}\n\n{\"a\":}\n", Form::Lines)),
            (Some(1), 3, 6)
        );
        assert_eq!(malformed(all("{} {}", Form::Lines)), (Some(0), 1, 4));
        let latin1 = Bytes::from_static(b"[{}\n,\"\xe9\"]");
        assert_eq!(
            malformed(
                parse_all(
                    &latin1,
                    Form::Array,
                    &Schema::Any.into(),
                    &PointerSet::default()
                )
                .map(|_| Vec::new())
            ),
            (None, 2, 3)
        );
        for (text, form) in [("[{}, 1]", Form::Array), ("{}\n[]", Form::Lines)] {
            let why = all(text, form).unwrap_err();
            assert!(
                matches!(
                    why,
                    InvalidBatch::Record {
                        index: 1,
                        why: Invalid::Schema { field: None, .. }
                    }
                ),
                "{why:?}"
            );
        }
    }
}
