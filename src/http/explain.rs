//! `GET /api/explain`: why a record took its lane, and its steps with their times.

use actix_web::{HttpResponse, http::StatusCode, web};
use serde::Deserialize;
use serde_json::json;

use super::{
    problem::{Problem, ProblemKind},
    status::AdminState,
};
use crate::{
    actors::forwarder::listed,
    lane_id::LaneId,
    ledger::ToldStep,
    routing::explain::{EXPLAINED_MAX, Explanation},
};

#[derive(Deserialize)]
pub struct ExplainQuery {
    id: Option<String>,
}

/// The choices for a record, and its steps: see [`crate::routing::explain`] and
/// [`crate::ledger::StepLog`].
pub async fn of_record(
    state: web::Data<AdminState>,
    query: Result<web::Query<ExplainQuery>, actix_web::Error>,
) -> Result<HttpResponse, Problem> {
    let wrong = |why: String| Problem::bad_request(ProblemKind::Query, why);
    let query = query.map_err(|why| wrong(why.to_string()))?.into_inner();
    let id = query.id.filter(|id| !id.is_empty());
    let id = id.ok_or_else(|| wrong("The id is missing, as in /api/explain?id=ID".into()))?;
    let choices = state.explanations.of(&id);
    let has_copies = choices.iter().any(Explanation::is_of_copies);
    let copies = LaneId::ALL.into_iter().filter(|_| has_copies);
    let copies = copies.map(|lane| format!("{id}/{lane}"));
    let ids = [id.clone()].into_iter().chain(copies);
    let steps = ids.flat_map(|id| state.ledger.steps.of(&id, &listed(&id)));
    let mut steps: Vec<_> = steps.collect();
    ToldStep::sort(&mut steps);
    if choices.is_empty() && steps.is_empty() {
        let detail = format!("No record {id:?} is among the last {EXPLAINED_MAX} of this node");
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            ProblemKind::NotFound,
            detail,
        ));
    }
    let told = json!({"id": id, "choices": choices, "steps": steps});
    Ok(HttpResponse::Ok().json(told))
}
