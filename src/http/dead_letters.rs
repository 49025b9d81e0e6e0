//! The dead letters, and the records that are parked: list, replay, drop.

use std::collections::HashSet;

use actix_web::{HttpResponse, web};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    order_body::OrderBody,
    problem::{Problem, ProblemKind},
    status::AdminState,
};
use crate::spool::{Entry, NotSafe, Queue, Undelivered, Which};

/// Dead letters in a list, unless the request asks for another number.
const LIMIT_DEFAULT: usize = 100;
/// The most dead letters in a list.
const LIMIT_MAX: usize = 10_000;

/// A dead letter, or a parked record, as `GET /api/dead` lists it. Times are in milliseconds since
/// the Unix epoch.
fn listed(entry: Entry) -> Value {
    let reason = entry.reason.as_ref();
    let reason = reason.cloned().unwrap_or_default();
    let (time, at_us) = match &entry.parked {
        Some(parked) => ("next_try_ms", parked.due_us),
        None => ("dead_ms", reason.at_us),
    };
    json!({
        "id": entry.id,
        "lane": reason.lane,
        // The API's last answer.
        "status": Some(reason.status).filter(|status| *status > 0),
        "answer": reason.answer,
        "attempts": reason.attempts,
        // Given up, rather than refused.
        "given_up": reason.given_up,
        "accepted_ms": entry.record().origin.map(|origin| origin.at_us / 1000),
        time: at_us / 1000,
        "record": String::from_utf8_lossy(&entry.body),
    })
}

#[derive(Deserialize)]
pub(super) struct ListQuery {
    limit: Option<usize>,
    #[serde(default)]
    parked: bool,
}

pub(super) async fn list(
    state: web::Data<AdminState>,
    query: web::Query<ListQuery>,
) -> Result<HttpResponse, Problem> {
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX);
    let of = undelivered(query.parked);
    let entries = state.spool.list(of, limit).await.map_err(spool_fails)?;
    let entries: Vec<_> = entries.into_iter().map(listed).collect();
    let found = state.spool.stats();
    let (name, total) = match of {
        Undelivered::Dead => ("dead", found.records(Queue::Dead)),
        Undelivered::Parked => ("parked", found.parked()),
    };
    Ok(HttpResponse::Ok().json(json!({"total": total, name: entries})))
}

const fn undelivered(is_parked: bool) -> Undelivered {
    if is_parked {
        Undelivered::Parked
    } else {
        Undelivered::Dead
    }
}

/// The records of a request: `{"ids":[…]}` or `{"all":true}`, of the parked ones with
/// `"parked":true`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Selection {
    ids: Option<HashSet<String>>,
    #[serde(default)]
    all: bool,
    #[serde(default)]
    parked: bool,
}

impl Selection {
    fn which(self) -> Result<(Undelivered, Which), Problem> {
        let of = undelivered(self.parked);
        match (self.ids, self.all) {
            (Some(ids), false) => Ok((of, Which::Ids(ids))),
            (None, true) => Ok((of, Which::All)),
            _ => Err(Problem::bad_request(
                ProblemKind::Selection,
                "Either ids or all, as in {\"all\":true}",
            )),
        }
    }
}

pub(super) async fn replay(
    state: web::Data<AdminState>,
    web::Json(OrderBody(selection)): web::Json<OrderBody<Selection>>,
) -> Result<HttpResponse, Problem> {
    let (of, which) = selection.which()?;
    let replayed = state.spool.replay(of, which).await.map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"replayed": replayed})))
}

pub(super) async fn drop_dead(
    state: web::Data<AdminState>,
    web::Json(OrderBody(selection)): web::Json<OrderBody<Selection>>,
) -> Result<HttpResponse, Problem> {
    let (of, which) = selection.which()?;
    // Counted though the operator has hung up.
    let counted = actix_rt::spawn(async move {
        let dropped = state.spool.forget(of, which).await;
        dropped.inspect(|&dropped| state.ledger.dropped(dropped))
    });
    let dropped = counted.await.unwrap_or(Err(NotSafe::Closed));
    let dropped = dropped.map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"dropped": dropped})))
}

fn spool_fails(why: NotSafe) -> Problem {
    Problem::unavailable(ProblemKind::Spool, why.to_string())
}
