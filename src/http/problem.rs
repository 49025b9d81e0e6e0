//! Errors as `application/problem+json` (RFC 9457).

use actix_web::{
    HttpRequest, HttpResponse, Responder, ResponseError,
    body::BoxBody,
    http::{StatusCode, header},
};
use serde_json::{Value, json};

pub const MEDIA_TYPE: &str = "application/problem+json";

/// The kinds of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    Body,
    Certificate,
    CloudEvent,
    Configuration,
    Database,
    Encoding,
    Host,
    IdempotencyKey,
    KeyReused,
    Json,
    LargeHead,
    MediaType,
    Method,
    Metrics,
    NotFound,
    Origin,
    Query,
    QuotaExceeded,
    ReadOnly,
    Request,
    Schema,
    Selection,
    Signature,
    Slow,
    Spool,
    Streams,
    Supervisor,
    Token,
    TooLarge,
    Unavailable,
    Unready,
}

impl ProblemKind {
    pub const ALL: [Self; 31] = [
        Self::Body,
        Self::Certificate,
        Self::CloudEvent,
        Self::Configuration,
        Self::Database,
        Self::Encoding,
        Self::Host,
        Self::IdempotencyKey,
        Self::KeyReused,
        Self::Json,
        Self::LargeHead,
        Self::MediaType,
        Self::Method,
        Self::Metrics,
        Self::NotFound,
        Self::Origin,
        Self::Query,
        Self::QuotaExceeded,
        Self::ReadOnly,
        Self::Request,
        Self::Schema,
        Self::Selection,
        Self::Signature,
        Self::Slow,
        Self::Spool,
        Self::Streams,
        Self::Supervisor,
        Self::Token,
        Self::TooLarge,
        Self::Unavailable,
        Self::Unready,
    ];

    /// The end of the `type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Body => "body",
            Self::Certificate => "certificate",
            Self::CloudEvent => "cloud-event",
            Self::Configuration => "configuration",
            Self::Database => "database",
            Self::Encoding => "encoding",
            Self::Host => "host",
            Self::IdempotencyKey => "idempotency-key",
            Self::KeyReused => "idempotency-key-reused",
            Self::Json => "json",
            Self::LargeHead => "large-head",
            Self::MediaType => "media-type",
            Self::Method => "method",
            Self::Metrics => "metrics",
            Self::NotFound => "not-found",
            Self::Origin => "origin",
            Self::Query => "query",
            Self::QuotaExceeded => "quota-exceeded",
            Self::ReadOnly => "read-only",
            Self::Request => "request",
            Self::Schema => "schema",
            Self::Selection => "selection",
            Self::Signature => "signature",
            Self::Slow => "slow",
            Self::Spool => "spool",
            Self::Streams => "streams",
            Self::Supervisor => "supervisor",
            Self::Token => "token",
            Self::TooLarge => "too-large",
            Self::Unavailable => "unavailable",
            Self::Unready => "unready",
        }
    }
}

impl ProblemKind {
    /// The `type`: that of the registry of HTTP problem types where it has one.
    pub fn uri(self) -> String {
        let registry = match self {
            Self::QuotaExceeded => "https://iana.org/assignments/http-problem-types#",
            _ => "urn:waypost:problem:",
        };
        format!("{registry}{}", self.name())
    }
}

/// A problem that ends a request. Its `title` is the reason phrase of the status.
#[derive(Debug, thiserror::Error)]
#[error("{status}: {detail}")]
pub struct Problem {
    status: StatusCode,
    kind: ProblemKind,
    detail: String,
    /// More members of the body.
    members: Vec<(&'static str, Value)>,
    headers: Vec<(header::HeaderName, String)>,
}

impl Problem {
    /// `detail` says how to correct this request.
    pub fn new(status: StatusCode, kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            detail: detail.into(),
            members: Vec::new(),
            headers: Vec::new(),
        }
    }

    /// The request is wrong.
    pub fn bad_request(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, kind, detail)
    }

    /// The body has a type or an encoding that is not supported.
    pub fn unsupported(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, kind, detail)
    }

    /// The same request may succeed in a second.
    pub fn unavailable(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail).retry_after(1)
    }

    /// There is nothing at `path`.
    pub fn not_found(path: &str) -> Self {
        let detail = format!("There is nothing at {path}");
        Self::new(StatusCode::NOT_FOUND, ProblemKind::NotFound, detail)
    }

    /// The path does not take this method. `allowed` becomes the header `Allow`.
    pub fn method_not_allowed(allowed: &str) -> Self {
        let detail = format!("Allowed here: {allowed}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, ProblemKind::Method, detail)
            .with_header(header::ALLOW, allowed)
    }

    /// Adds a member, for programs to read.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }

    /// Sets a header that belongs to its status.
    #[must_use]
    pub fn with_header(mut self, name: header::HeaderName, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.into()));
        self
    }

    /// How to correct the request.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The JSON of its body.
    pub fn body(&self) -> String {
        let mut body = json!({
            "type": self.kind.uri(),
            "title": self.status.canonical_reason().unwrap_or_default(),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        for (name, value) in &self.members {
            body[*name] = value.clone();
        }
        body.to_string()
    }

    /// Asks the client to try again after `seconds`.
    #[must_use]
    pub fn retry_after(self, seconds: u64) -> Self {
        self.with_header(header::RETRY_AFTER, seconds.to_string())
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        // A client that is not let in, or sends too much of a head, keeps no connection.
        if matches!(
            self.status,
            StatusCode::UNAUTHORIZED | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
        ) {
            response.force_close();
        }
        for (name, value) in &self.headers {
            response.insert_header((name.clone(), value.as_str()));
        }
        response.content_type(MEDIA_TYPE).body(self.body())
    }
}

impl Responder for Problem {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        HttpResponse::from_error(self)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::ProblemKind;

    #[test]
    fn the_documentation_lists_each_type() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/delivery.md");
        let page = fs::read_to_string(page).unwrap();
        for (number, kind) in ProblemKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number, "each is in the list");
            let row = format!("| `{}` |", kind.name());
            assert!(page.contains(&row), "{row}");
        }
    }
}
