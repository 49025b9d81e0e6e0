//! The operator's side: health, readiness, status, metrics, dead letters, and commands to lanes.

use std::sync::atomic::Ordering::Relaxed;

use actix_web::{HttpRequest, HttpResponse, http::StatusCode, web};

use super::{
    dead_letters,
    metrics::{self, Scrape},
    problem::Problem,
    status::{AdminState, no_supervisor},
};
use crate::{
    actors::supervisor::{Action, ChildId, LaneCommand, State, View},
    config::Ack,
    lane_id::LaneId,
};

/// Adds the routes of `[admin].listen`.
pub fn routes(app: &mut web::ServiceConfig) {
    app.app_data(
        web::JsonConfig::default()
            .error_handler(|why, _| Problem::bad_request("json", why.to_string()).into()),
    )
    .route(
        "/healthz",
        web::get().to(async || HttpResponse::Ok().body("ok\n")),
    )
    .route("/readyz", web::get().to(ready))
    .route("/metrics", web::get().to(scrape))
    .route("/api/status", web::get().to(status))
    .route("/api/lanes/{lane}/{action}", web::post().to(command))
    .configure(dead_letters::routes)
    .default_service(web::to(async |request: HttpRequest| {
        Problem::not_found(request.path())
    }));
}

async fn ready(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let unready = |why: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unready", why);
    if state.draining.load(Relaxed) {
        return Err(unready("The node is stopping"));
    }
    let views = state.views().await?;
    let is_up = |view: &View| view.state == State::Up;
    if !views
        .iter()
        .any(|view| view.child == ChildId::Router && is_up(view))
    {
        return Err(unready("The router is being restarted"));
    }
    let a_lane_is_up = views
        .iter()
        .any(|view| matches!(view.child, ChildId::Lane(_)) && is_up(view));
    let refuses = state.spool.stats().refuses;
    if refuses && (state.ack == Ack::Disk || !a_lane_is_up) {
        return Err(unready(
            "The spool takes no records, and no lane may or can take them instead",
        ));
    }
    Ok(HttpResponse::Ok().body("ready\n"))
}

async fn status(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let views = state.views().await?;
    Ok(HttpResponse::Ok().json(state.status(&views)))
}

async fn scrape(state: web::Data<AdminState>) -> Result<HttpResponse, Problem> {
    let views = state.views().await?;
    let states = state.lanes.iter().filter_map(|&(lane, _)| {
        let status = state.lane_status(lane, &views)?;
        Some((lane, (status.state == State::Up.name(), status.restarts)))
    });
    let oldest = state.spool.oldest().await;
    let scrape = Scrape {
        lanes: &state.lanes,
        states: states.collect(),
        held: state.spool.stats(),
        oldest_us: oldest.and_then(|entry| Some(entry.record().origin?.at_us)),
    };
    let text = metrics::text(&state.ledger, &scrape).map_err(|why| {
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics",
            format!("The metrics cannot be encoded: {why}"),
        )
    })?;
    Ok(HttpResponse::Ok()
        .content_type(prometheus::TEXT_FORMAT)
        .body(text))
}

async fn command(
    state: web::Data<AdminState>,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    let (lane, action) = path.into_inner();
    let action = match action.as_str() {
        "pause" => Action::Pause,
        "resume" => Action::Resume,
        "restart" => Action::Restart,
        _ => return Err(Problem::not_found(&action)),
    };
    if state.draining.load(Relaxed) {
        return Err(Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "The node is stopping",
        ));
    }
    let unknown = || Problem::not_found(&lane);
    let lane = LaneId::from_name(&lane).ok_or_else(unknown)?;
    if !state
        .supervisor
        .send(LaneCommand { lane, action })
        .await
        .map_err(|_| no_supervisor())?
    {
        return Err(unknown());
    }
    let views = state.views().await?;
    Ok(HttpResponse::Accepted().json(state.lane_status(lane, &views)))
}
