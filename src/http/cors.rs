//! Web pages of other origins that may use the ingest side (CORS, WHATWG Fetch, 3.2).
//!
//! Without an origin in the configuration no answer has a header of CORS, so no page of another
//! origin sends a record as JSON, or reads an answer.

use actix_web::{
    Error, HttpResponse,
    body::BoxBody,
    dev::{ServiceRequest, ServiceResponse},
    http::{
        Method,
        header::{self, HeaderValue},
    },
    middleware::Next,
    web,
};

/// The origins that the configuration names.
#[derive(Clone)]
pub struct CorsOrigins(pub Vec<String>);

/// The headers of answers that a page may read.
const EXPOSED: &str = "Accept-Encoding, Allow, Idempotent-Replayed, RateLimit, RateLimit-Policy, \
    Retry-After, WWW-Authenticate";
/// The methods of the ingest side.
const METHODS: &str = "GET, HEAD, POST";
/// Seconds for which a browser asks no second time.
const MAX_AGE: &str = "3600";

/// Answers the questions that a browser asks before a page of another origin may send something, and
/// lets the pages of named origins read the answers.
pub async fn only_named_origins(
    origins: web::Data<CorsOrigins>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let headers = request.headers();
    let origin = headers.get(header::ORIGIN);
    let named = origin.filter(|origin| origins.0.iter().any(|named| *origin == named.as_str()));
    let Some(named) = named.cloned() else {
        let mut answer = next.call(request).await?;
        // A cache gives it to no page of a named origin.
        varies(&mut answer);
        return Ok(answer);
    };
    // A browser sends it without a token.
    let is_question = request.method() == Method::OPTIONS
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut answer = if is_question {
        let mut allowed = HttpResponse::NoContent();
        allowed
            .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, METHODS))
            .insert_header((header::ACCESS_CONTROL_MAX_AGE, MAX_AGE));
        // Whatever it wants: the attributes of events are headers of any name.
        if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            allowed.insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone()));
        }
        request.into_response(allowed.finish())
    } else {
        let mut answer = next.call(request).await?;
        let exposed = HeaderValue::from_static(EXPOSED);
        let name = header::ACCESS_CONTROL_EXPOSE_HEADERS;
        answer.headers_mut().insert(name, exposed);
        answer
    };
    let headers = answer.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, named);
    varies(&mut answer);
    Ok(answer)
}

/// The answer to another origin is another one.
fn varies(answer: &mut ServiceResponse<BoxBody>) {
    let origin = HeaderValue::from_static("Origin");
    answer.headers_mut().append(header::VARY, origin);
}
