//! Many records in one body: a JSON array, or one record per line (NDJSON).

use bytes::Bytes;

use super::parse::{Invalid, Schema, invalid_utf8, parse, parse_first, place, skip_space};

/// Records of one request at most; a power of two.
pub const MAX: usize = 1024;

/// How a body holds more than one record.
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
    Body(Invalid),
    /// One of its records is invalid. `index` counts from 0.
    #[error("record {index}: {why}")]
    Record { index: usize, why: Invalid },
}

/// The records of `body` in their order, each checked and trimmed as [`parse`] does. Lines and columns in errors count from the
/// start of the body.
///
/// # Errors
/// [`InvalidBatch`] says what is wrong with the first record that is bad, or with the whole.
pub fn parse_all(body: &Bytes, form: Form, schema: Schema) -> Result<Vec<Bytes>, InvalidBatch> {
    let text = std::str::from_utf8(body)
        .map_err(|e| InvalidBatch::Body(invalid_utf8(body, e.valid_up_to())))?;
    match form {
        Form::Array => {
            let mut records = Vec::new();
            let mut at =
                after(text, 0, "[").ok_or_else(|| unexpected(text, 0, "expected an array"))?;
            if let Some(end) = after(text, at, "]") {
                at = end;
            } else {
                loop {
                    let (record, end) =
                        parse_first(body, &text[at..], schema).map_err(|why| match why {
                            // Malformed JSON spoils the whole body.
                            Invalid::Malformed { .. } => {
                                InvalidBatch::Body(why.further_on(text, at))
                            }
                            Invalid::Schema { .. } => InvalidBatch::Record {
                                index: records.len(),
                                why,
                            },
                        })?;
                    records.push(record);
                    if let Some(next) = after(text, at + end, ",") {
                        at = next;
                    } else {
                        at = after(text, at + end, "]")
                            .ok_or_else(|| unexpected(text, at + end, "expected `,` or `]`"))?;
                        break;
                    }
                }
            }
            if skip_space(&text[at..]).is_empty() {
                Ok(records)
            } else {
                Err(unexpected(text, at, "trailing characters"))
            }
        }
        Form::Lines => {
            let lines = text
                .lines()
                .enumerate()
                .filter(|(_, line)| !line.trim_ascii().is_empty());
            let records = lines.enumerate().map(|(index, (before, line))| {
                let part = body.slice_ref(line.as_bytes());
                parse(&part, schema).map_err(|why| InvalidBatch::Record {
                    index,
                    why: why.further_down(before),
                })
            });
            records.collect()
        }
    }
}

/// Where `what` ends, if only white space is between `at` and it.
fn after(text: &str, at: usize, what: &str) -> Option<usize> {
    let rest = skip_space(&text[at..]).strip_prefix(what)?;
    Some(text.len() - rest.len())
}

/// The error for the first character after `at` that is no white space.
fn unexpected(text: &str, at: usize, detail: &str) -> InvalidBatch {
    let at = text.len() - skip_space(&text[at..]).len();
    let (line, column) = place(text.as_bytes(), at);
    InvalidBatch::Body(Invalid::Malformed {
        line,
        column,
        detail: detail.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str, form: Form) -> Result<Vec<Bytes>, InvalidBatch> {
        parse_all(&Bytes::copy_from_slice(text.as_bytes()), form, Schema::Any)
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
            malformed(parse_all(&latin1, Form::Array, Schema::Any)),
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
