//! The HTTP side that clients post to: request → record → receipt → status.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /`, `POST /{lane}` with a record | 202 once it is safe |
//! | malformed JSON or headers | 400 |
//! | unknown lane or route | 404 |
//! | another method | 405 |
//! | a body or a record over its limit | 413 |
//! | another type or encoding | 415 |
//! | a record that breaks the schema | 422 |
//! | no lane and no spool could make it safe, or too many records in hand | 503 with `Retry-After` |

use std::{sync::Arc, time::Instant};

use actix_web::{
    HttpRequest, HttpResponse, ResponseError as _,
    http::{StatusCode, header},
    web,
};
use serde::Serialize;

use super::problem::Problem;
use crate::{
    actors::{Refused, ingest::Ingest},
    delivery::{LaneId, Receipt},
    keys::{Claim, Keys},
    ledger::Ledger,
    record::{Invalid, Origin, Record, Schema, is_visible_ascii, parse},
};

/// What the handlers need; shared by all HTTP workers.
#[derive(Clone)]
pub struct Door {
    pub ingest: Ingest,
    /// The lanes of this node, with their tags.
    pub lanes: Arc<[(LaneId, String)]>,
    pub schema: Schema,
    pub max_body: usize,
    pub max_record: usize,
    /// This run of the node, for the records' origin.
    pub run: Arc<str>,
    pub keys: Keys,
    pub ledger: Arc<Ledger>,
}

impl Door {
    /// Counts the answer to a request that came then.
    fn answered(&self, began: Instant, answer: Result<HttpResponse, Problem>) -> HttpResponse {
        let response = answer.unwrap_or_else(|problem| problem.error_response());
        self.ledger.answered(response.status().as_u16(), began);
        response
    }
}

/// The receipt that a client gets.
#[derive(Serialize)]
struct Accepted<'a> {
    id: &'a str,
    path: &'a str,
}

/// Adds the routes of `[ingest].listen`.
pub fn routes(app: &mut web::ServiceConfig) {
    app.service(
        web::resource("/")
            .route(web::get().to(async || HttpResponse::Ok().json(serde_json::json!({"message": "ok"}))))
            .route(web::head().to(HttpResponse::Ok))
            .route(web::post().to(async |door: web::Data<Door>, request: HttpRequest, body: web::Payload| {
                let began = Instant::now();
                door.answered(began, take(&door, None, &request, body).await)
            }))
            .default_service(web::to(async || Problem::method_not_allowed("GET, HEAD, POST"))),
    )
    .service(
        web::resource("/{lane}")
            .route(web::post().to(async |door: web::Data<Door>, request: HttpRequest, body: web::Payload| {
                let began = Instant::now();
                let lane = LaneId::from_name(&request.match_info()["lane"]);
                let answer = match lane.filter(|lane| door.lanes.iter().any(|(known, _)| known == lane)) {
                    Some(lane) => take(&door, Some(lane), &request, body).await,
                    None => Err(Problem::not_found(request.path())),
                };
                door.answered(began, answer)
            }))
            .default_service(web::to(async |door: web::Data<Door>, request: HttpRequest| {
                if door.lanes.iter().any(|(lane, _)| lane.name() == &request.match_info()["lane"]) {
                    Problem::method_not_allowed("POST")
                } else {
                    Problem::not_found(request.path())
                }
            })),
    )
    .default_service(web::to(async |request: HttpRequest| Problem::not_found(request.path())));
}

async fn take(
    door: &Door,
    pinned: Option<LaneId>,
    request: &HttpRequest,
    body: web::Payload,
) -> Result<HttpResponse, Problem> {
    let headers = request.headers();
    check_type(headers.get(header::CONTENT_TYPE))?;
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "encoding", "The body must not be encoded"));
    }
    let key = match headers.get("Idempotency-Key") {
        Some(key) => Some(visible(key).map(Arc::<str>::from).ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "idempotency-key",
                "An Idempotency-Key is 1 to 255 visible ASCII characters",
            )
        })?),
        None => None,
    };
    let id = key.clone().unwrap_or_else(Record::new_id);
    // What is no trace context is not carried, and is no reason to refuse a record (W3C Trace Context, 3.2).
    let traceparent = headers.get("traceparent").and_then(visible).map(Arc::from);

    let origin = Some(Origin::now(Arc::clone(&door.run)));
    let too_large = |what: &str, limit: usize| {
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", format!("{what} is larger than {limit} bytes"))
    };
    let body = match body.to_bytes_limited(door.max_body).await {
        Ok(Ok(body)) => body,
        Ok(Err(cut)) => {
            return Err(Problem::new(StatusCode::BAD_REQUEST, "body", format!("The body did not arrive: {cut}")));
        }
        Err(_) => return Err(too_large("The request", door.max_body)),
    };
    let body = parse(&body, door.schema).map_err(invalid)?;
    if body.len() > door.max_record {
        return Err(too_large("The record", door.max_record));
    }

    let record = Record { id: Arc::clone(&id), body, traceparent, origin };
    let answer = match key {
        None => door.ingest.submit(record, pinned).await,
        Some(key) => {
            // Goes on when the client hangs up, so that its next try finds the receipt of this one.
            let submitted = actix_rt::spawn(once(door.clone(), key, record, pinned)).await;
            submitted.unwrap_or(Err(Refused::NoLane))
        }
    };
    match answer {
        Ok(receipt) => {
            let path = match receipt {
                Receipt::Lane(lane) => door.lanes.iter().find(|(known, _)| *known == lane).map_or("", |(_, tag)| tag),
                Receipt::Spool => "spool",
            };
            Ok(HttpResponse::Accepted().json(Accepted { id: &id, path }))
        }
        Err(refused) => {
            Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", format!("Not taken: {refused}"))
                .retry_after(1))
        }
    }
}

/// Submits the record unless its key was taken before.
async fn once(door: Door, key: Arc<str>, record: Record, pinned: Option<LaneId>) -> Result<Receipt, Refused> {
    match door.keys.claim(&key).await {
        Claim::Taken(receipt) => Ok(receipt),
        Claim::First(first) => {
            let receipt = door.ingest.submit(record, pinned).await?;
            first.taken(receipt).await;
            Ok(receipt)
        }
    }
}

/// `application/json`, `application/*+json`, or nothing.
fn check_type(content_type: Option<&header::HeaderValue>) -> Result<(), Problem> {
    let Some(content_type) = content_type else { return Ok(()) };
    let essence = content_type.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let subtype =
        essence.split_once('/').filter(|(class, _)| class.eq_ignore_ascii_case("application")).map(|(_, sub)| sub);
    match subtype.map(str::to_ascii_lowercase) {
        Some(subtype) if subtype == "json" || subtype.ends_with("+json") => Ok(()),
        _ => Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "media-type",
            format!("A record is application/json, not {essence:?}"),
        )),
    }
}

fn visible(value: &header::HeaderValue) -> Option<&str> {
    let text = value.to_str().ok()?;
    (text.len() <= 255 && is_visible_ascii(text)).then_some(text)
}

fn invalid(why: Invalid) -> Problem {
    let detail = why.to_string();
    match why {
        Invalid::Malformed { line, column, .. } => {
            Problem::new(StatusCode::BAD_REQUEST, "json", detail).with("line", line).with("column", column)
        }
        Invalid::Schema { field: Some(field), .. } => {
            Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail).with("field", field)
        }
        Invalid::Schema { field: None, .. } => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail),
    }
}
