//! The HTTP side that clients post to: request → record → receipt → status.
//!
//! | request | answer |
//! | --- | --- |
//! | `POST /`, `POST /{lane}` with a record | 202 once it is safe |
//! | the same with a JSON array or NDJSON | 202 once all are safe; a bad one, and none is taken |
//! | the same with an event of CloudEvents, or a batch of them | the same; its data is the record |
//! | `GET /schema` | 200, the JSON Schema that a record must fit |
//! | `GET /openapi.json` | 200, this table as OpenAPI 3.1 |
//! | malformed JSON, headers or events | 400 |
//! | no token of `[ingest].tokens_file` | 401, `WWW-Authenticate` |
//! | no signature by a key of `[ingest].signing_keys_file` | 401, `WWW-Authenticate` |
//! | unknown lane or route | 404 |
//! | another method | 405 |
//! | a body or a record over its limit, or over each lane's | 413 |
//! | more requests than `[ingest].rate` | 429, `Retry-After`, `RateLimit`, `RateLimit-Policy` |
//! | a body that comes too slowly | 408 |
//! | another type or encoding | 415 |
//! | a record that breaks the schema, or a key that has another record | 422 |
//! | no lane and no spool could make it safe, or too many records in hand | 503, `Retry-After` |
//! | the API does not keep up, and its room on disk is nearly full | 503, `Retry-After` |

mod body;
mod content;
mod forecast;
mod headers;
mod permit;
mod read;
mod refusal;

use std::{sync::Arc, time::Instant};

use actix_web::{HttpRequest, HttpResponse, ResponseError as _, middleware::from_fn, web};
use bytes::Bytes;
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::json;

pub use self::{
    body::{BodyLimits, BodyRoom},
    content::{Content, EVENT_PREFIX},
    forecast::DiskForecast,
    headers::{idempotency_key, value_text},
};
use self::{
    permit::only_permitted,
    refusal::{form_reused, key_reused},
};
use super::{
    admin::read,
    client_rate::ClientRate,
    cors::{CorsOrigins, only_named_origins},
    openapi::{self, ApiDocument, ingest::IngestSide},
    problem::Problem,
    signatures::Signatures,
    tokens::Tokens,
};
use crate::{
    actors::{
        admission::Admission,
        apis::Apis,
        receipts::{AssignedRecord, Refused},
    },
    delivery::Receipt,
    idempotency::{Claim, IdempotencyStore},
    lane_id::LaneId,
    ledger::Ledger,
    record::{Record, RecordRules, batch::Form},
    routing::settings::CurrentRouting,
    trace::{RequestTrace, Tracer},
};

/// Shared by all HTTP workers.
#[derive(Clone)]
pub struct IngestState {
    pub admission: Admission,
    pub apis: Apis,
    /// The lanes of this node, with their tags: a receipt names the tag.
    pub lanes: Arc<[(LaneId, String)]>,
    pub routing: CurrentRouting,
    pub rules: RecordRules,
    /// The schema of the rules, as JSON.
    pub schema: Bytes,
    /// The tokens of those who may send records; `None` if everybody may.
    pub tokens: Option<Tokens>,
    /// A client without a certificate has no connection.
    pub needs_certificate: bool,
    /// The keys that sign requests; `None` if none is asked for.
    pub signatures: Option<Signatures>,
    /// The origins whose pages may send records; `None` if there are none.
    pub cors: Option<CorsOrigins>,
    /// How often a client may ask; `None` if as often as it likes.
    pub rate: Option<ClientRate>,
    /// The most headers of a request.
    pub max_headers: usize,
    pub body: BodyLimits,
    /// This run of the node; part of each record's origin.
    pub run: Arc<str>,
    pub keys: IdempotencyStore,
    /// Each request needs an `Idempotency-Key`, or is an event, which has one.
    pub require_key: bool,
    /// When those that find no room on disk may send again.
    pub forecast: DiskForecast,
    /// Counts the answers, by status.
    pub ledger: Arc<Ledger>,
    pub tracer: Tracer,
    /// `https` if the node speaks TLS here, as its traces say.
    pub scheme: &'static str,
}

/// The receipt of one record.
#[derive(Serialize)]
struct Accepted<'a> {
    id: &'a str,
    path: &'a str,
}

/// The receipts of a batch.
#[derive(Serialize)]
struct AllAccepted<'a> {
    accepted: usize,
    records: Vec<Accepted<'a>>,
}

/// Adds the routes of `[ingest].listen`. Each but `GET /` is for those who are permitted.
pub fn routes(app: &mut web::ServiceConfig, state: IngestState) {
    let permitted = || web::scope("").wrap(from_fn(only_permitted));
    if let Some(origins) = &state.cors {
        // The last one is the first to see a request: a browser asks without a token.
        let guarded = permitted().wrap(from_fn(only_named_origins));
        app.app_data(web::Data::new(origins.clone()))
            .service(guarded.configure(open_routes));
    } else if state.has_terms() {
        app.service(permitted().configure(open_routes));
    } else {
        open_routes(app);
    }
    app.app_data(web::Data::new(state.document()))
        .app_data(web::Data::new(state));
}

fn open_routes(app: &mut web::ServiceConfig) {
    app.service(
        web::resource("/")
            .route(web::get().to(health))
            .route(web::head().to(health))
            .route(web::post().to(post))
            .default_service(web::to(async || {
                Problem::method_not_allowed("GET, HEAD, POST")
            })),
    )
    .service(read("/schema", schema))
    .service(read("/openapi.json", openapi::describe))
    .service(
        web::resource("/{lane}")
            .route(web::post().to(post))
            .default_service(web::to(
                async |state: web::Data<IngestState>, request: HttpRequest| {
                    let lane = state.pinned_lane(&request);
                    lane.map_or_else(|unknown| unknown, |_| Problem::method_not_allowed("POST"))
                },
            )),
    )
    .default_service(web::to(async |request: HttpRequest| {
        Problem::not_found(request.path())
    }));
}

async fn health() -> HttpResponse {
    HttpResponse::Ok().json(json!({"message": "ok"}))
}

/// The JSON Schema that a record must fit.
async fn schema(state: web::Data<IngestState>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type("application/schema+json")
        .body(state.schema.clone())
}

/// Ingests a request, and counts the answer by its status.
async fn post(
    state: web::Data<IngestState>,
    request: HttpRequest,
    body: web::Payload,
) -> Result<HttpResponse, Problem> {
    let began = Instant::now();
    let client = || headers::trace(request.headers());
    let mut trace = state
        .tracer
        .request(client, || described(&request, state.scheme));
    let answer = ingest(&state, &request, body, &mut trace).await;
    let status = match &answer {
        Ok(response) => response.status(),
        Err(problem) => problem.status_code(),
    };
    state.ledger.answered(status.as_u16(), began);
    trace.answered(status.as_u16());
    answer
}

/// The parts of a request that its trace names: scheme, path and route.
fn described<'r>(
    request: &'r HttpRequest,
    scheme: &'static str,
) -> (&'static str, &'r str, &'static str) {
    let route = match request.match_info().get("lane") {
        Some(_) => "/{lane}",
        None => "/",
    };
    (scheme, request.path(), route)
}

/// A request that was read: a single record is a batch of one.
struct Request {
    records: Vec<AssignedRecord>,
    /// `None` for a single record, whose answer is not a list.
    form: Option<Form>,
    keys: KeySource,
    /// `None` if requests are not signed.
    signed: Option<SignedForm>,
}

/// The form in which a signed request was read. Its signature does not cover that.
struct SignedForm {
    /// The `webhook-id`.
    id: Arc<str>,
    form: &'static str,
}

/// The source of the ids of a request's records.
enum KeySource {
    /// Nothing: they are new.
    None,
    /// The client's `Idempotency-Key`.
    Header(Arc<str>),
    /// `source` and `id` of each event.
    Event,
}

/// The receipts of all records of a request.
struct Submitted {
    receipts: Vec<Receipt>,
    /// Earlier requests with the same keys got all of them, and nothing was routed.
    is_replay: bool,
}

/// Why no record of a request counts as taken.
enum NotTaken {
    Refused(Refused),
    /// Another record has the key of the record at this index.
    KeyReused(usize),
    /// The signed request was taken in another form.
    FormReused,
}

impl From<Refused> for NotTaken {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// Reads the request, makes its records safe, and answers.
async fn ingest(
    state: &web::Data<IngestState>,
    request: &HttpRequest,
    body: web::Payload,
    trace: &mut RequestTrace,
) -> Result<HttpResponse, Problem> {
    let pinned = state.pinned_lane(request)?;
    let request = state.read_request(request, body, pinned, trace).await?;
    if let Some(problem) = state.full_api(&request) {
        return Err(problem);
    }
    match submit(state, &request).await {
        Ok(submitted) => {
            trace.created(&submitted.receipts, submitted.is_replay);
            Ok(state.respond(&request, submitted))
        }
        Err(NotTaken::Refused(why)) => Err(state.refused(&request, &why)),
        Err(NotTaken::KeyReused(index)) => Err(key_reused(&request, index)),
        Err(NotTaken::FormReused) => Err(form_reused()),
    }
}

impl IngestState {
    /// The description of this side.
    fn document(&self) -> ApiDocument {
        let lanes = self.lanes.iter();
        let lanes: Vec<_> = lanes.map(|(lane, tag)| (lane.name(), &**tag)).collect();
        let side = IngestSide {
            schema: &self.rules.schema,
            lanes: &lanes,
            needs_key: self.require_key,
            needs_token: self.tokens.is_some(),
            needs_certificate: self.needs_certificate,
            needs_signature: self.signatures.is_some(),
            has_rate: self.rate.is_some(),
        };
        ApiDocument::new(&side.document())
    }

    /// The lane in the path, if there is one. An error says that this node has no such lane.
    fn pinned_lane(&self, request: &HttpRequest) -> Result<Option<LaneId>, Problem> {
        let Some(name) = request.match_info().get("lane") else {
            return Ok(None);
        };
        let mut lanes = self.lanes.iter().map(|(lane, _)| *lane);
        let lane = lanes.find(|lane| lane.name() == name);
        let unknown = || Problem::not_found(request.path());
        lane.ok_or_else(unknown).map(Some)
    }

    fn respond(&self, request: &Request, submitted: Submitted) -> HttpResponse {
        let mut response = HttpResponse::Accepted();
        if submitted.is_replay {
            response.insert_header(("Idempotent-Replayed", "true"));
        }
        let receipts = request.records.iter().zip(submitted.receipts);
        let mut accepted = receipts.map(|(assigned, receipt)| Accepted {
            id: &assigned.record.id,
            path: self.path(receipt),
        });
        match request.form {
            None => response.json(accepted.next()),
            Some(_) => response.json(AllAccepted {
                accepted: request.records.len(),
                records: accepted.collect(),
            }),
        }
    }

    /// The name of the lane, or of the spool, that holds the record.
    fn path(&self, receipt: Receipt) -> &str {
        match receipt {
            Receipt::Lane(lane) => {
                let mut lanes = self.lanes.iter();
                let lane = lanes.find(|(known, _)| *known == lane);
                lane.map_or("", |(_, tag)| tag)
            }
            Receipt::Spool => "spool",
        }
    }
}

/// Makes all records safe. An error says that at least one of them is not.
async fn submit(state: &web::Data<IngestState>, request: &Request) -> Result<Submitted, NotTaken> {
    if let Some(SignedForm { id, form }) = &request.signed
        && !state.keys.settle_form(id, form).await
    {
        return Err(NotTaken::FormReused);
    }
    if matches!(request.keys, KeySource::None) {
        let replies = state.admission.submit(&request.records).await;
        return Ok(Submitted {
            receipts: replies.into_iter().collect::<Result<_, _>>()?,
            is_replay: false,
        });
    }
    // Goes on if the client hangs up, so that its next try finds the receipts of this one. Boxed: a
    // task is moved several times before it runs, and its future is large.
    let submitting = submit_once(web::Data::clone(state), request.records.clone());
    actix_rt::spawn(Box::pin(submitting))
        .await
        .unwrap_or(Err(Refused::NoLane.into()))
}

/// Submits the records whose keys are new; the others have their receipts already.
async fn submit_once(
    state: web::Data<IngestState>,
    records: Vec<AssignedRecord>,
) -> Result<Submitted, NotTaken> {
    let mut receipts = vec![None; records.len()];
    let mut new = Vec::new();
    let mut repeats = Vec::new();
    let mut claimed: Option<(usize, Record)> = None;
    // In one order of keys for all requests, so that no two of them wait for each other.
    let mut records: Vec<_> = records.into_iter().enumerate().collect();
    records.sort_by(|(_, one), (_, other)| {
        let key = |assigned: &AssignedRecord| assigned.record.id.len();
        let (one_id, other_id) = (&one.record.id, &other.record.id);
        key(one).cmp(&key(other)).then_with(|| one_id.cmp(other_id))
    });
    for (index, assigned) in records {
        // Two events of a batch may be the same one.
        if let Some((first, record)) = &claimed
            && record.id == assigned.record.id
        {
            if record.body != assigned.record.body {
                return Err(NotTaken::KeyReused(index));
            }
            repeats.push((index, *first));
            continue;
        }
        claimed = Some((index, assigned.record.clone()));
        match state.keys.claim(&assigned.record).await {
            Claim::Duplicate(receipt) => receipts[index] = Some(receipt),
            Claim::Reused => return Err(NotTaken::KeyReused(index)),
            Claim::New(reservation) => new.push((index, assigned, reservation)),
        }
    }
    new.sort_by_key(|(index, ..)| *index);
    let is_replay = new.is_empty();
    let (reservations, new): (Vec<_>, Vec<_>) = new
        .into_iter()
        .map(|(index, assigned, reservation)| ((index, reservation), assigned))
        .unzip();
    let replies = state.admission.submit(&new).await;
    let reservations = reservations.into_iter().zip(replies);
    let completed = reservations.map(async |((index, reservation), reply)| {
        let receipt = reply?;
        reservation.complete(receipt).await;
        Ok::<_, Refused>((index, receipt))
    });
    for completed in join_all(completed).await {
        let (index, receipt) = completed?;
        receipts[index] = Some(receipt);
    }
    for (index, first) in repeats {
        receipts[index] = receipts[first];
    }
    let receipts: Option<Vec<_>> = receipts.into_iter().collect();
    Ok(Submitted {
        is_replay: is_replay && receipts.as_ref().is_some_and(|all| !all.is_empty()),
        receipts: receipts.ok_or(Refused::NoLane)?,
    })
}
