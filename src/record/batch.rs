//! Many records in one body: a JSON array, or a line each (NDJSON).

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Invalid, Schema, invalid_utf8, parse};

/// How a body holds more than one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Array,
    Lines,
}

/// Why a body is not a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBatch {
    /// The body as a whole is not what it should be.
    #[error("{0}")]
    Body(Invalid),
    /// One of its records is not; counted from 0.
    #[error("record {index}: {why}")]
    Record { index: usize, why: Invalid },
}

/// The records of `body` in their order, each checked and trimmed as [`parse`] does. Lines and columns in errors count from the
/// start of the body.
///
/// # Errors
/// [`InvalidBatch`] says what is wrong with the first record that is bad, or with the whole.
pub fn parse_all(body: &Bytes, form: Form, schema: Schema) -> Result<Vec<Bytes>, InvalidBatch> {
    let text = std::str::from_utf8(body).map_err(|e| InvalidBatch::Body(invalid_utf8(body, e.valid_up_to())))?;
    match form {
        Form::Array => {
            let items: Vec<&RawValue> = serde_json::from_str(text).map_err(|e| {
                InvalidBatch::Body(Invalid::Malformed {
                    line: e.line(),
                    column: e.column(),
                    detail: Invalid::detail_of(&e),
                })
            })?;
            let records = items.into_iter().enumerate().map(|(index, item)| {
                let part = body.slice_ref(item.get().as_bytes());
                // It is well-formed, so what is wrong is not a matter of lines.
                parse(&part, schema).map_err(|why| InvalidBatch::Record { index, why })
            });
            records.collect()
        }
        Form::Lines => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
            let records = lines.enumerate().map(|(index, (before, line))| {
                let part = body.slice_ref(line.as_bytes());
                parse(&part, schema).map_err(|why| InvalidBatch::Record { index, why: why.further_down(before) })
            });
            records.collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str, form: Form) -> Result<Vec<Bytes>, InvalidBatch> {
        parse_all(&Bytes::copy_from_slice(text.as_bytes()), form, Schema::Any)
    }

    #[test]
    fn each_record_keeps_its_bytes() {
        let expected =
            [r#"{"a" : 1}"#, r#"{"b":[{"path":1}]}"#, "{}"].map(|text: &str| Bytes::copy_from_slice(text.as_bytes()));
        assert_eq!(all(" [ {\"a\" : 1} ,\n{\"b\":[{\"path\":1}]},{\"path\":2}]\n", Form::Array).unwrap(), expected);
        assert_eq!(all("{\"a\" : 1}\r\n\n {\"b\":[{\"path\":1}]} \n{\"path\":2}", Form::Lines).unwrap(), expected);
        assert_eq!(all("[]", Form::Array), Ok(Vec::new()));
        assert_eq!(all("\n", Form::Lines), Ok(Vec::new()));
    }

    #[test]
    fn a_bad_record_is_told_by_its_index_and_a_bad_body_by_its_place() {
        let malformed = |result: Result<Vec<Bytes>, InvalidBatch>| match result.unwrap_err() {
            InvalidBatch::Body(Invalid::Malformed { line, column, .. }) => (None, line, column),
            InvalidBatch::Record { index, why: Invalid::Malformed { line, column, .. } } => (Some(index), line, column),
            other => panic!("{other:?}"),
        };
        assert_eq!(malformed(all("[{},\n{]", Form::Array)), (None, 2, 2));
        assert_eq!(malformed(all("[{}] x", Form::Array)), (None, 1, 6));
        assert_eq!(malformed(all("{}\n\n{\"a\":}\n", Form::Lines)), (Some(1), 3, 6));
        assert_eq!(malformed(all("{} {}", Form::Lines)), (Some(0), 1, 4));
        let latin1 = Bytes::from_static(b"[{}\n,\"\xe9\"]");
        assert_eq!(malformed(parse_all(&latin1, Form::Array, Schema::Any)), (None, 2, 3));
        for (text, form) in [("[{}, 1]", Form::Array), ("{}\n[]", Form::Lines)] {
            let why = all(text, form).unwrap_err();
            assert!(
                matches!(why, InvalidBatch::Record { index: 1, why: Invalid::Schema { field: None, .. } }),
                "{why:?}"
            );
        }
    }
}
