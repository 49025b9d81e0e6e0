//! The dead letters: list, replay, drop.

use std::{collections::HashSet, sync::Arc};

use actix_web::{HttpResponse, web};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{problem::Problem, status::AdminState};
use crate::spool::{DeathReason, Entry, NotSafe, Queue, Which};

/// Dead letters in a list, unless the request asks for another number.
const LIMIT_DEFAULT: usize = 100;
/// The most dead letters in a list.
const LIMIT_MAX: usize = 10_000;

/// Adds the routes of the dead letters.
pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/api/dead", web::get().to(list))
        .route("/api/dead/replay", web::post().to(replay))
        .route("/api/dead/drop", web::post().to(forget));
}

/// A dead letter, as `GET /api/dead` lists it.
#[derive(Debug, Serialize)]
struct DeadLetter {
    id: String,
    lane: String,
    /// The API's last answer; `null` if there was none.
    status: Option<u32>,
    answer: String,
    attempts: u32,
    /// Given up, rather than refused.
    given_up: bool,
    /// Milliseconds since the Unix epoch: taken in, and dead.
    accepted_ms: Option<u64>,
    dead_ms: u64,
    record: String,
}

impl From<Entry> for DeadLetter {
    fn from(entry: Entry) -> Self {
        let record = String::from_utf8_lossy(&entry.body).into_owned();
        let accepted_ms = entry.record().origin.map(|origin| origin.at_us / 1000);
        let DeathReason {
            lane,
            status,
            answer,
            attempts,
            at_us,
            given_up,
        } = entry.letter.unwrap_or_default();
        let status = Some(status).filter(|status| *status > 0);
        Self {
            id: entry.id,
            lane,
            status,
            answer,
            attempts,
            given_up,
            accepted_ms,
            dead_ms: at_us / 1000,
            record,
        }
    }
}

#[derive(Deserialize)]
struct ListQuery {
    limit: Option<usize>,
}

async fn list(
    state: web::Data<AdminState>,
    query: web::Query<ListQuery>,
) -> Result<HttpResponse, Problem> {
    let letters = state
        .spool
        .dead(query.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX))
        .await
        .map_err(spool_fails)?;
    let letters: Vec<_> = letters.into_iter().map(DeadLetter::from).collect();
    Ok(HttpResponse::Ok()
        .json(json!({"total": state.spool.stats().records(Queue::Dead), "dead": letters})))
}

/// Which dead letters: `{"ids":[…]}` or `{"all":true}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Selection {
    ids: Option<HashSet<String>>,
    #[serde(default)]
    all: bool,
}

impl Selection {
    fn which(self) -> Result<Which, Problem> {
        match (self.ids, self.all) {
            (Some(ids), false) => Ok(Which::Ids(ids)),
            (None, true) => Ok(Which::All),
            _ => Err(Problem::bad_request(
                "selection",
                "Either ids or all, as in {\"all\":true}",
            )),
        }
    }
}

async fn replay(
    state: web::Data<AdminState>,
    selection: web::Json<Selection>,
) -> Result<HttpResponse, Problem> {
    let replayed = state
        .spool
        .replay(selection.into_inner().which()?)
        .await
        .map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"replayed": replayed})))
}

async fn forget(
    state: web::Data<AdminState>,
    selection: web::Json<Selection>,
) -> Result<HttpResponse, Problem> {
    let which = selection.into_inner().which()?;
    let (spool, ledger) = (state.spool.clone(), Arc::clone(&state.ledger));
    // Counted though the operator has hung up.
    let counted = actix_rt::spawn(async move {
        spool
            .forget(which)
            .await
            .inspect(|&dropped| ledger.dropped(dropped))
    });
    let dropped = counted
        .await
        .unwrap_or(Err(NotSafe::Closed))
        .map_err(spool_fails)?;
    Ok(HttpResponse::Ok().json(json!({"dropped": dropped})))
}

fn spool_fails(why: NotSafe) -> Problem {
    Problem::unavailable("spool", why.to_string())
}
