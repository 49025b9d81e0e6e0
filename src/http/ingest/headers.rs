//! The headers of a request that carries records.

use std::{borrow::Cow, sync::Arc};

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::{
    http::problem::{Problem, ProblemKind},
    record::{TraceHeaders, is_visible_ascii},
};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The most characters of an Idempotency-Key.
const KEY_MAX: usize = 255;

/// A header is given more than once, or is not ASCII.
struct NotOneText;

/// The client's key: bare, or quoted as a Structured Field String (RFC 9651, 3.3.3). Both are the
/// same key.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<Arc<str>>, Problem> {
    let invalid = || {
        Problem::bad_request(
            ProblemKind::IdempotencyKey,
            "An Idempotency-Key is one of 1 to 255 visible ASCII characters, which may be quoted",
        )
    };
    let line = only_line(headers, &IDEMPOTENCY_KEY).map_err(|NotOneText| invalid())?;
    let Some(line) = line else {
        return Ok(None);
    };
    let key = unquoted(line).filter(|key| key.len() <= KEY_MAX && is_visible_ascii(key));
    key.map(|key| Some(key.into())).ok_or_else(invalid)
}

/// The key of a request: the client's, or the id that the request is signed with. No signature covers
/// an Idempotency-Key, so a signed request has no other: who has seen it could send it again under
/// another key, as another record.
pub(super) fn request_key(
    headers: &HeaderMap,
    signed_id: Option<&str>,
) -> Result<Option<Arc<str>>, Problem> {
    match (idempotency_key(headers)?, signed_id) {
        (Some(key), Some(id)) if *key != *id => Err(Problem::bad_request(
            ProblemKind::IdempotencyKey,
            "No signature covers an Idempotency-Key: leave it out, or make it the webhook-id",
        )),
        (key, id) => Ok(key.or_else(|| id.map(Into::into))),
    }
}

/// `text` without its quotes and escapes, if it has any; `None` if they are not complete.
fn unquoted(text: &str) -> Option<Cow<'_, str>> {
    let Some(quoted) = text.strip_prefix('"') else {
        return Some(text.into());
    };
    let quoted = quoted.strip_suffix('"')?;
    let mut key = String::with_capacity(quoted.len());
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        key.push(match character {
            '"' => return None,
            '\\' => characters
                .next()
                .filter(|escaped| matches!(escaped, '"' | '\\'))?,
            plain => plain,
        });
    }
    Some(key.into())
}

/// The trace context. The record is taken without one if it is malformed or given twice (W3C Trace
/// Context, 3.2.1 and 4.3). A `tracestate` may have several lines, which are one list.
pub(super) fn trace(headers: &HeaderMap) -> Option<TraceHeaders> {
    let parent = only_line(headers, &TRACEPARENT).ok()??;
    let state = headers.get_all(&TRACESTATE).map(HeaderValue::to_str);
    let state = state.collect::<Result<Vec<_>, _>>().unwrap_or_default();
    TraceHeaders::read(parent, Some(&state.join(",")))
}

/// The text of a header's value, for rules. One that is no UTF-8 is there, and equal to nothing.
pub fn value_text(value: &HeaderValue) -> &str {
    str::from_utf8(value.as_bytes()).unwrap_or("\u{fffd}")
}

/// The text of the header that `name` names, if there is one.
///
/// # Errors
/// If it has several lines, or is not ASCII.
fn only_line<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, NotOneText> {
    let mut lines = headers.get_all(name);
    let Some(first) = lines.next() else {
        return Ok(None);
    };
    match lines.next() {
        None => first.to_str().map(Some).map_err(|_| NotOneText),
        Some(_) => Err(NotOneText),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_there_for_rules_whatever_its_bytes() {
        let text = |bytes| value_text(&HeaderValue::from_bytes(bytes).unwrap()).to_owned();
        assert_eq!(text("Cobán".as_bytes()), "Cobán");
        assert_eq!(text(b"Cob\xe1n"), "\u{fffd}");
    }
}
