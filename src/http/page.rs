//! `GET /` of the admin side: the live page, for browsers with and without scripts, and for `curl`.
//!
//! The node renders the page with the status of that moment. The script then follows
//! `GET /api/events` and replaces the values: each has the JSON pointer of its place in the status
//! (`data-v`) and its format (`data-f`), so the page knows no number that the status does not.

mod assets;
mod format;
mod html;
mod text;

use actix_web::{
    Error, HttpRequest, HttpResponse,
    body::BoxBody,
    dev::{ServiceRequest, ServiceResponse},
    http::header::{self, HeaderName, HeaderValue},
    middleware::{Next, from_fn},
    web,
};
use flate2::Compression;

pub use self::assets::PackedText;
use self::assets::{SCRIPT, STYLES};
use super::{accept, admin::read, foreign, problem::Problem, status::AdminState};

/// Nothing is loaded from elsewhere, no script is in the HTML, and no other page shows this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// Adds the page and its files.
pub fn routes(app: &mut web::ServiceConfig) {
    app.service(read("/", page).wrap(from_fn(only_this_site_or_links)))
        .service(read("/page.css", styles).wrap(from_fn(only_this_site_or_links)))
        .service(read("/page.js", script).wrap(from_fn(only_this_site_or_links)));
}

/// A page of another site may have a link to this page, and no more.
async fn only_this_site_or_links(
    state: web::Data<AdminState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    foreign::refuse_unless_link(request.uri(), request.headers(), &state.hosts)?;
    let mut answer = next.call(request).await?;
    for (name, value) in [
        ("content-security-policy", POLICY),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
        ("referrer-policy", "no-referrer"),
        ("x-content-type-options", "nosniff"),
    ] {
        let name = HeaderName::from_static(name);
        let value = HeaderValue::from_static(value);
        answer.headers_mut().insert(name, value);
    }
    Ok(answer)
}

/// The node as HTML, or as plain text for a client that prefers it.
async fn page(state: web::Data<AdminState>, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let source = state.status_source().await?;
    let status = serde_json::to_value(state.status(&source));
    let status = status.expect("the keys of a status are text, so it has a JSON");
    let (media_type, text) = if accept::prefers(&request, "text/plain", "text/html") {
        ("text/plain; charset=utf-8", text::page(&status))
    } else {
        let page = html::page(&status, state.read_only).into_string();
        ("text/html; charset=utf-8", page)
    };
    let mut answer = HttpResponse::Ok();
    answer
        .content_type(media_type)
        .append_header((header::VARY, "accept"))
        // It is another one a second later.
        .insert_header((header::CACHE_CONTROL, "no-store"));
    Ok(PackedText::new(text, Compression::fast()).answer(&request, answer))
}

async fn styles(request: HttpRequest) -> HttpResponse {
    STYLES.answer(&request)
}

async fn script(request: HttpRequest) -> HttpResponse {
    SCRIPT.answer(&request)
}
