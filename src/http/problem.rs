//! Errors as `application/problem+json` (RFC 9457).

use actix_web::{
    HttpRequest, HttpResponse, Responder, ResponseError,
    body::BoxBody,
    http::{StatusCode, header},
};
use serde_json::{Value, json};

pub const MEDIA_TYPE: &str = "application/problem+json";

/// A problem that ends a request. Its `type` is `urn:waypost:problem:<kind>`, its `title` the
/// reason phrase of the status.
#[derive(Debug, thiserror::Error)]
#[error("{status}: {detail}")]
pub struct Problem {
    status: StatusCode,
    kind: &'static str,
    detail: String,
    /// More members of the body.
    members: Vec<(&'static str, Value)>,
    header: Option<(header::HeaderName, String)>,
}

impl Problem {
    /// `detail` says how to correct this request.
    pub fn new(status: StatusCode, kind: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            detail: detail.into(),
            members: Vec::new(),
            header: None,
        }
    }

    /// The request is wrong.
    pub fn bad_request(kind: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, kind, detail)
    }

    /// The body has a type or an encoding that is not supported.
    pub fn unsupported(kind: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, kind, detail)
    }

    /// The same request may succeed in a second.
    pub fn unavailable(kind: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail).retry_after(1)
    }

    /// There is nothing at `path`.
    pub fn not_found(path: &str) -> Self {
        let detail = format!("There is nothing at {path}");
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    /// The path does not take this method. `allowed` becomes the header `Allow`.
    pub fn method_not_allowed(allowed: &str) -> Self {
        let detail = format!("Allowed here: {allowed}");
        let mut problem = Self::new(StatusCode::METHOD_NOT_ALLOWED, "method", detail);
        problem.header = Some((header::ALLOW, allowed.to_owned()));
        problem
    }

    /// Adds a member, for programs to read.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }

    /// The JSON of its body.
    pub fn body(&self) -> String {
        let mut body = json!({
            "type": format!("urn:waypost:problem:{}", self.kind),
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
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.header = Some((header::RETRY_AFTER, seconds.to_string()));
        self
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if let Some((name, value)) = &self.header {
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
