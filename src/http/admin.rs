//! The operator's side: health, readiness, status, metrics, dead letters, and orders.

use std::{sync::atomic::Ordering::Relaxed, time::Instant};

use actix_web::{
    Error, FromRequest, Handler, HttpMessage as _, HttpRequest, HttpResponse, Resource, Responder,
    body::BoxBody,
    dev::{ServiceRequest, ServiceResponse},
    error::JsonPayloadError,
    guard,
    http::{
        StatusCode,
        header::{HeaderName, HeaderValue},
    },
    middleware::{Next, from_fn},
    web,
};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::json;

use super::{
    dead_letters, events, explain, foreign, history, metrics,
    openapi::{self, ApiDocument, admin::AdminSide},
    operators,
    order_body::{OrderBody, whole_number},
    page,
    problem::{Problem, ProblemKind},
    status::{AdminState, no_supervisor},
    tap,
    tokens::TOKEN_TRUST,
};
use crate::{
    actors::supervisor::{Action, ChildId, View},
    config::{Ack, WEIGHT_MAX},
    control::ReloadOutcome,
    lane_id::LaneId,
    transport::Durability,
};

/// The media type of the probes.
const TEXT: &str = "text/plain; charset=utf-8";
/// The most bytes of an order.
pub const ORDER_MAX: usize = 2 << 20;

/// Adds the routes of `[admin].listen`. If there are tokens, or certificates of clients, all but the
/// probes are for those who have one. Probes and scrapers come by any name; what is below `/api` is for this site only: see
/// `foreign`.
pub fn routes(app: &mut web::ServiceConfig, state: AdminState) {
    let json = web::JsonConfig::default().limit(ORDER_MAX);
    app.app_data(json.error_handler(|why, _| malformed(&why).into()))
        .app_data(web::QueryConfig::default().error_handler(|why, _| {
            Problem::bad_request(ProblemKind::Query, why.to_string()).into()
        }))
        .service(
            read("/healthz", async || {
                HttpResponse::Ok().content_type(TEXT).body("ok\n")
            })
            .wrap(from_fn(operators::probe)),
        )
        .service(read("/readyz", ready).wrap(from_fn(operators::probe)));
    if state.is_guarded() {
        let guarded = web::scope("").wrap(from_fn(operators::only_operators));
        app.service(guarded.configure(open_routes));
    } else {
        open_routes(app);
    }
    app.app_data(web::Data::new(document(&state)))
        .app_data(web::Data::new(state));
}

/// The description of this side.
fn document(state: &AdminState) -> ApiDocument {
    let lanes: Vec<_> = state.lanes.iter().map(|(lane, _)| lane.name()).collect();
    let apis: Vec<_> = state.apis.names().collect();
    let side = AdminSide {
        lanes: &lanes,
        apis: &apis,
        needs_token: state.tokens.is_some(),
        needs_certificate: state.needs_certificate,
        is_read_only: state.read_only,
    };
    ApiDocument::new(&side.document())
}

fn open_routes(app: &mut web::ServiceConfig) {
    app.configure(page::routes)
        .service(read("/metrics", metrics::scrape))
        .service(read("/openapi.json", openapi::describe).wrap(from_fn(only_this_site)))
        .service(
            web::scope("/api")
                .wrap(from_fn(only_this_site))
                .service(read("/status", status))
                .service(read("/events", events::stream))
                .service(read("/tap", tap::stream))
                .service(read("/explain", explain::of_record))
                .service(read("/history", history::of_range))
                .service(read("/dead", dead_letters::list))
                .service(order("/dead/replay", dead_letters::replay))
                .service(order("/dead/drop", dead_letters::drop_dead))
                .service(order("/lanes/{lane}/weight", set_weight))
                .service(order("/lanes/{action}", command_all))
                .service(order("/lanes/{lane}/{action}", command))
                .service(order("/reload", reload))
                .default_service(web::to(not_found)),
        )
        .default_service(web::to(not_found));
}

/// A resource that a client can only read.
pub(super) fn read<F, Args>(path: &str, handler: F) -> Resource
where
    F: Handler<Args>,
    Args: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let method = guard::Any(guard::Get()).or(guard::Head());
    resource(path, "GET, HEAD").route(web::route().guard(method).to(handler))
}

/// A resource that takes an order.
fn order<F, Args>(path: &str, handler: F) -> Resource
where
    F: Handler<Args>,
    Args: FromRequest + 'static,
    F::Output: Responder + 'static,
{
    let route = web::post().to(handler).wrap(from_fn(only_orders));
    resource(path, "POST").route(route)
}

fn resource(path: &str, allowed: &'static str) -> Resource {
    let other_method = move || async move { Problem::method_not_allowed(allowed) };
    web::resource(path).default_service(web::to(other_method))
}

async fn not_found(request: HttpRequest) -> Problem {
    Problem::not_found(request.path())
}

/// Refuses the requests of foreign pages.
async fn only_this_site(
    state: web::Data<AdminState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    foreign::refuse(request.uri(), request.headers(), &state.hosts)?;
    let mut answer = next.call(request).await?;
    for (name, value) in [
        // No page has it as a script or an image either.
        ("cross-origin-resource-policy", "same-origin"),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
    ] {
        let name = HeaderName::from_static(name);
        let value = HeaderValue::from_static(value);
        answer.headers_mut().insert(name, value);
    }
    Ok(answer)
}

/// Refuses orders to a node that takes none, those that are not JSON, and those that do not come in
/// time. A browser asks the node before a foreign page may send JSON, and the node does not allow it.
async fn only_orders(
    state: web::Data<AdminState>,
    mut request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    if state.read_only {
        let detail = "The node takes no orders: [admin].read_only is set";
        return Err(Problem::new(StatusCode::FORBIDDEN, ProblemKind::ReadOnly, detail).into());
    }
    if !request
        .content_type()
        .eq_ignore_ascii_case("application/json")
    {
        let detail = "An order is JSON: send Content-Type: application/json";
        return Err(Problem::unsupported(ProblemKind::MediaType, detail).into());
    }
    let limits = &state.order_limits;
    limits.check_length(request.headers())?;
    let mut payload = request.take_payload();
    let body = web::Payload::from_request(request.request(), &mut payload).await?;
    let began = Instant::now();
    let body = limits.receive(body).await?;
    // A token may be removed while a body comes slowly.
    if let Some(tokens) = &state.tokens
        && began.elapsed() > TOKEN_TRUST
    {
        tokens.check_operator(request.headers())?;
    }
    request.set_payload(body.into());
    next.call(request).await
}

fn malformed(why: &JsonPayloadError) -> Problem {
    Problem::bad_request(
        ProblemKind::Json,
        format!("{why}. An order is a JSON object, {{}} if it has no members"),
    )
}

/// The body of an order that is told by its path.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoMembers {}

async fn ready(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    if state.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let views = state.views().await?;
    let mut up = views.iter().filter(|view| view.takes_records());
    if !up.clone().any(|view| view.child == ChildId::Router) {
        return Err(unready("The router is being restarted"));
    }
    // Such a lane needs no disk.
    let confirms = |view: &View| match state.ack {
        Ack::Durable => view.broker.outlives_power_cut == Durability::Yes,
        Ack::Lane => true,
        Ack::Disk => false,
    };
    // Without the disk, the gRPC lane to this node itself waits for the API.
    let has_api = !state.apis.all().iter().all(|api| api.breaker.is_open());
    let takes = |lane| {
        let waits = lane == LaneId::Grpc && state.is_own_peer && !has_api;
        !waits && state.ledger.lane(lane).refusals.reason().is_none()
    };
    let a_lane_confirms = up.any(|view| match view.child {
        ChildId::Lane(lane) => confirms(view) && takes(lane),
        _ => false,
    });
    if state.spool.stats().refuses && !a_lane_confirms {
        return Err(unready(
            "The spool takes no records, and no lane may or can take them instead",
        ));
    }
    Ok(HttpResponse::Ok().content_type(TEXT).body("ready\n"))
}

fn unready(why: &str) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, ProblemKind::Unready, why)
}

async fn status(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let source = state.status_source().await?;
    Ok(HttpResponse::Ok().json(state.status(&source)))
}

/// An order to one lane.
async fn command(
    state: web::Data<AdminState>,
    request: HttpRequest,
    path: web::Path<(String, String)>,
    _: web::Json<OrderBody<NoMembers>>,
) -> Result<HttpResponse, Problem> {
    let (lane, action) = path.into_inner();
    let action = action_of(&action)?;
    let lane = state.lane_named(&lane)?;
    give_order(&state, &request, vec![lane], action).await?;
    let views = state.views().await?;
    let mut statuses = state.lane_statuses(&views);
    Ok(HttpResponse::Accepted().json(statuses.find(|status| status.lane == lane)))
}

/// An order to all lanes.
async fn command_all(
    state: web::Data<AdminState>,
    request: HttpRequest,
    action: web::Path<String>,
    _: web::Json<OrderBody<NoMembers>>,
) -> Result<HttpResponse, Problem> {
    let action = action_of(&action)?;
    let lanes = state.lanes.iter().map(|(lane, _)| *lane);
    give_order(&state, &request, lanes.collect(), action).await?;
    let views = state.views().await?;
    let statuses: Vec<_> = state.lane_statuses(&views).collect();
    Ok(HttpResponse::Accepted().json(json!({"lanes": statuses})))
}

async fn give_order(
    state: &AdminState,
    request: &HttpRequest,
    lanes: Vec<LaneId>,
    action: Action,
) -> Result<(), Problem> {
    if state.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let control = state.control.clone();
    let by = operator(request);
    // It is noted though the operator has hung up.
    let done = actix_rt::spawn(async move { control.command(&lanes, action, &by).await });
    match done.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(no_supervisor()),
    }
}

async fn reload(
    state: web::Data<AdminState>,
    request: HttpRequest,
    _: web::Json<OrderBody<NoMembers>>,
) -> Result<HttpResponse, Problem> {
    if state.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let (control, by) = (state.control.clone(), operator(&request));
    // It is applied though the operator has hung up.
    let done = actix_rt::spawn(async move { control.reload(&by).await });
    let report = done.await.map_err(|_| no_supervisor())?;
    if report.outcome == ReloadOutcome::Applied {
        return Ok(HttpResponse::Ok().json(report));
    }
    let status = StatusCode::UNPROCESSABLE_ENTITY;
    let detail = "The configuration has mistakes; nothing has changed";
    let problem = Problem::new(status, ProblemKind::Configuration, detail);
    Err(problem.with("reasons", json!(report.reasons)))
}

fn action_of(name: &str) -> Result<Action, Problem> {
    Action::from_name(name).ok_or_else(|| {
        let detail = format!("There is no order {name}");
        Problem::new(StatusCode::NOT_FOUND, ProblemKind::NotFound, detail)
    })
}

/// The name of the one who gives an order: the address.
fn operator(request: &HttpRequest) -> String {
    let address = request.peer_addr();
    address.map_or_else(|| "unknown".into(), |address| address.ip().to_string())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewWeight {
    #[serde(deserialize_with = "allowed_weight")]
    weight: u32,
}

fn allowed_weight<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    let weight = whole_number::<u32, _>(input)?;
    if weight as usize <= WEIGHT_MAX {
        Ok(weight)
    } else {
        Err(D::Error::custom(format!(
            "weight {weight} does not fit; allowed is a whole number from 0 to {WEIGHT_MAX}"
        )))
    }
}

async fn set_weight(
    state: web::Data<AdminState>,
    request: HttpRequest,
    lane: web::Path<String>,
    web::Json(OrderBody(order)): web::Json<OrderBody<NewWeight>>,
) -> Result<HttpResponse, Problem> {
    let lane = state.lane_named(&lane)?;
    let (control, by, weight) = (state.control.clone(), operator(&request), order.weight);
    // It is noted though the operator has hung up.
    let done = actix_rt::spawn(async move { control.set_weight(lane, weight, &by).await });
    done.await.map_err(|_| no_supervisor())?;
    let views = state.views().await?;
    let mut statuses = state.lane_statuses(&views);
    Ok(HttpResponse::Ok().json(statuses.find(|status| status.lane == lane)))
}
