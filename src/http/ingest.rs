//! The HTTP side that clients post to: request → record → receipt → status.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /`, `POST /{lane}` with a record | 202 once it is safe |
//! | the same with a JSON array or NDJSON | 202 once all are safe; a bad one, and none is taken |
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
use futures_util::future::join_all;
use serde::Serialize;

use super::problem::Problem;
use crate::{
    actors::{Refused, admission::Admission},
    delivery::Receipt,
    idempotency::{Claim, IdempotencyStore},
    lane_id::LaneId,
    ledger::Ledger,
    record::{
        Invalid, Origin, Record, Schema,
        batch::{self, Form, InvalidBatch, parse_all},
        is_visible_ascii, parse,
    },
};

/// What the handlers need; shared by all HTTP workers.
#[derive(Clone)]
pub struct IngestState {
    pub admission: Admission,
    /// The lanes of this node, with their tags.
    pub lanes: Arc<[(LaneId, String)]>,
    pub schema: Schema,
    pub max_body: usize,
    pub max_record: usize,
    /// This run of the node, for the records' origin.
    pub run: Arc<str>,
    pub keys: IdempotencyStore,
    pub ledger: Arc<Ledger>,
}

impl IngestState {
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

/// The receipts for a batch.
#[derive(Serialize)]
struct AllAccepted<'a> {
    accepted: usize,
    records: Vec<Accepted<'a>>,
}

/// Adds the routes of `[ingest].listen`.
pub fn routes(app: &mut web::ServiceConfig) {
    app.service(
        web::resource("/")
            .route(
                web::get()
                    .to(async || HttpResponse::Ok().json(serde_json::json!({"message": "ok"}))),
            )
            .route(web::head().to(HttpResponse::Ok))
            .route(web::post().to(
                async |state: web::Data<IngestState>, request: HttpRequest, body: web::Payload| {
                    let began = Instant::now();
                    state.answered(began, take(&state, None, &request, body).await)
                },
            ))
            .default_service(web::to(async || {
                Problem::method_not_allowed("GET, HEAD, POST")
            })),
    )
    .service(
        web::resource("/{lane}")
            .route(web::post().to(
                async |state: web::Data<IngestState>, request: HttpRequest, body: web::Payload| {
                    let began = Instant::now();
                    let lane = LaneId::from_name(&request.match_info()["lane"]);
                    let answer = match lane
                        .filter(|lane| state.lanes.iter().any(|(known, _)| known == lane))
                    {
                        Some(lane) => take(&state, Some(lane), &request, body).await,
                        None => Err(Problem::not_found(request.path())),
                    };
                    state.answered(began, answer)
                },
            ))
            .default_service(web::to(
                async |state: web::Data<IngestState>, request: HttpRequest| {
                    if state
                        .lanes
                        .iter()
                        .any(|(lane, _)| lane.name() == &request.match_info()["lane"])
                    {
                        Problem::method_not_allowed("POST")
                    } else {
                        Problem::not_found(request.path())
                    }
                },
            )),
    )
    .default_service(web::to(async |request: HttpRequest| {
        Problem::not_found(request.path())
    }));
}

async fn take(
    state: &IngestState,
    pinned: Option<LaneId>,
    request: &HttpRequest,
    body: web::Payload,
) -> Result<HttpResponse, Problem> {
    let headers = request.headers();
    let is_lines = check_type(headers.get(header::CONTENT_TYPE))?;
    if headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|encoding| encoding != "identity")
    {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "encoding",
            "The body must not be encoded",
        ));
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
    // What is no trace context is not carried, and is no reason to refuse a record (W3C Trace Context, 3.2).
    let traceparent = headers.get("traceparent").and_then(visible).map(Arc::from);

    let origin = Some(Origin::now(Arc::clone(&state.run)));
    let body = match body.to_bytes_limited(state.max_body).await {
        Ok(Ok(body)) => body,
        Ok(Err(cut)) => {
            return Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "body",
                format!("The body did not arrive: {cut}"),
            ));
        }
        Err(_) => {
            return Err(too_large(format!(
                "The request is larger than {} bytes",
                state.max_body
            )));
        }
    };
    let form = match body.trim_ascii_start().first() {
        _ if is_lines => Some(Form::Lines),
        Some(b'[') => Some(Form::Array),
        _ => None,
    };
    match form {
        None => {
            let body = parse(&body, state.schema).map_err(|why| invalid(why, None))?;
            state.check_size(&body)?;
            let id = key.clone().unwrap_or_else(Record::new_id);
            let record = Record {
                id: Arc::clone(&id),
                body,
                traceparent,
                origin,
            };
            let receipt = state
                .submit(record, key.is_some(), pinned)
                .await
                .map_err(|refused| unavailable(&refused))?;
            Ok(HttpResponse::Accepted().json(Accepted {
                id: &id,
                path: state.path(receipt),
            }))
        }
        Some(form) => {
            let bodies = parse_all(&body, form, state.schema).map_err(|why| match why {
                InvalidBatch::Body(why) => invalid(why, None),
                InvalidBatch::Record { index, why } => invalid(why, Some(index)),
            })?;
            if bodies.len() > batch::MAX {
                return Err(too_large(format!(
                    "A request has at most {} records",
                    batch::MAX
                )));
            }
            let mut new_ids = key.is_none().then(Record::new_ids).into_iter().flatten();
            let mut new_id = || new_ids.next().unwrap_or_else(Record::new_id);
            let records = bodies.into_iter().enumerate().map(|(index, body)| {
                state
                    .check_size(&body)
                    .map_err(|problem| problem.with("index", index))?;
                let id = key
                    .as_ref()
                    .map_or_else(&mut new_id, |key| format!("{key}/{index}").into());
                Ok(Record {
                    id,
                    body,
                    traceparent: traceparent.clone(),
                    origin: origin.clone(),
                })
            });
            let records = records.collect::<Result<Vec<_>, Problem>>()?;
            let ids: Vec<_> = records
                .iter()
                .map(|record| Arc::clone(&record.id))
                .collect();
            let receipts = state
                .submit_all(records, key.is_some(), pinned)
                .await
                .map_err(|refused| unavailable(&refused))?;
            let records = ids.iter().zip(receipts).map(|(id, receipt)| Accepted {
                id,
                path: state.path(receipt),
            });
            Ok(HttpResponse::Accepted().json(AllAccepted {
                accepted: ids.len(),
                records: records.collect(),
            }))
        }
    }
}

impl IngestState {
    fn check_size(&self, record: &[u8]) -> Result<(), Problem> {
        if record.len() > self.max_record {
            return Err(too_large(format!(
                "The record is larger than {} bytes",
                self.max_record
            )));
        }
        Ok(())
    }

    /// What a receipt names.
    fn path(&self, receipt: Receipt) -> &str {
        match receipt {
            Receipt::Lane(lane) => self
                .lanes
                .iter()
                .find(|(known, _)| *known == lane)
                .map_or("", |(_, tag)| tag),
            Receipt::Spool => "spool",
        }
    }

    /// Makes `record` safe; one whose id is a client's key, once.
    async fn submit(
        &self,
        record: Record,
        is_keyed: bool,
        pinned: Option<LaneId>,
    ) -> Result<Receipt, Refused> {
        if !is_keyed {
            return self.admission.submit(record, pinned).await;
        }
        self.submit_all(vec![record], true, pinned)
            .await?
            .pop()
            .ok_or(Refused::NoLane)
    }

    /// Makes all of `records` safe. An error says that one of them, at least, is not.
    async fn submit_all(
        &self,
        records: Vec<Record>,
        are_keyed: bool,
        pinned: Option<LaneId>,
    ) -> Result<Vec<Receipt>, Refused> {
        if !are_keyed {
            return self
                .admission
                .submit_all(records, pinned)
                .await?
                .into_iter()
                .collect();
        }
        // Goes on when the client hangs up, so that its next try finds the receipts of this one.
        actix_rt::spawn(once(self.clone(), records, pinned))
            .await
            .unwrap_or(Err(Refused::NoLane))
    }
}

/// Submits those of `records` whose keys were not taken before.
async fn once(
    state: IngestState,
    records: Vec<Record>,
    pinned: Option<LaneId>,
) -> Result<Vec<Receipt>, Refused> {
    let mut receipts = vec![None; records.len()];
    let (mut new, mut firsts) = (Vec::new(), Vec::new());
    // In their order, so that no two batches wait for each other.
    for (at, record) in records.into_iter().enumerate() {
        match state.keys.claim(&record.id).await {
            Claim::Duplicate(receipt) => receipts[at] = Some(receipt),
            Claim::New(first) => {
                new.push(record);
                firsts.push((at, first));
            }
        }
    }
    let answers = state.admission.submit_all(new, pinned).await?;
    let written = firsts
        .into_iter()
        .zip(answers)
        .map(async |((at, first), answer)| {
            let receipt = answer?;
            first.complete(receipt).await;
            Ok::<_, Refused>((at, receipt))
        });
    for written in join_all(written).await {
        let (at, receipt) = written?;
        receipts[at] = Some(receipt);
    }
    receipts
        .into_iter()
        .collect::<Option<_>>()
        .ok_or(Refused::NoLane)
}

/// `application/json`, `application/*+json`, or nothing; or NDJSON, which the answer says.
fn check_type(content_type: Option<&header::HeaderValue>) -> Result<bool, Problem> {
    let Some(content_type) = content_type else {
        return Ok(false);
    };
    let essence = content_type
        .to_str()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    let subtype = essence
        .split_once('/')
        .filter(|(class, _)| class.eq_ignore_ascii_case("application"))
        .map(|(_, sub)| sub);
    match subtype.map(str::to_ascii_lowercase) {
        Some(subtype) if subtype == "json" || subtype.ends_with("+json") => Ok(false),
        Some(subtype) if subtype == "x-ndjson" => Ok(true),
        _ => Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "media-type",
            format!(
                "A record is application/json, and many may be application/x-ndjson; not {essence:?}"
            ),
        )),
    }
}

fn visible(value: &header::HeaderValue) -> Option<&str> {
    let text = value.to_str().ok()?;
    (text.len() <= 255 && is_visible_ascii(text)).then_some(text)
}

fn too_large(detail: String) -> Problem {
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", detail)
}

fn unavailable(refused: &Refused) -> Problem {
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "unavailable",
        format!("Not taken: {refused}"),
    )
    .retry_after(1)
}

/// `index` is the record's in a batch.
fn invalid(why: Invalid, index: Option<usize>) -> Problem {
    let detail = why.to_string();
    let problem = match why {
        Invalid::Malformed { line, column, .. } => {
            Problem::new(StatusCode::BAD_REQUEST, "json", detail)
                .with("line", line)
                .with("column", column)
        }
        Invalid::Schema {
            field: Some(field), ..
        } => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail).with("field", field),
        Invalid::Schema { field: None, .. } => {
            Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail)
        }
    };
    match index {
        Some(index) => problem.with("index", index),
        None => problem,
    }
}
