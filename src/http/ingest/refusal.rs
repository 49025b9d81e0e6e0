//! The problems of requests that are not taken.

use actix_web::http::StatusCode;

use super::{KeySource, Request};
use crate::{
    actors::receipts::Refused,
    http::problem::{Problem, ProblemKind},
};

/// The problem of a request that has no receipt for each record.
pub(super) fn refused(request: &Request, why: &Refused) -> Problem {
    let detail = format!("Not taken: {why}");
    if !matches!(why, Refused::TooLarge(_)) {
        return Problem::unavailable(ProblemKind::Unavailable, detail);
    }
    let problem = too_large(detail);
    let records = request.records.iter().enumerate();
    let largest = records.max_by_key(|(_, assigned)| assigned.record.message_size());
    match (request.form, largest) {
        (Some(_), Some((index, _))) => problem.with("index", index),
        _ => problem,
    }
}

/// The problem of a request for an API whose room on this node's disk is taken.
pub(super) fn no_room(api: Option<&str>) -> Problem {
    let section = api.map_or_else(|| "api".into(), |name| format!("apis.{name}"));
    let detail = format!(
        "Not taken: the API of [{section}] does not take its records as fast as they come, and its \
         room on this node's disk ([{section}].spool_max) is nearly full"
    );
    Problem::unavailable(ProblemKind::Unavailable, detail)
}

/// The problem of a request whose record at `index` has the key of another record.
pub(super) fn key_reused(request: &Request, index: usize) -> Problem {
    let record = request.records.get(index);
    let id = record.map_or("", |assigned| &assigned.record.id);
    let detail = match request.keys {
        KeySource::Event => format!(
            "An event with this source and id had other data (its key is {id}); this one needs an \
             id of its own"
        ),
        _ => format!(
            "The Idempotency-Key {id} was used for another record; this one needs a key of its own"
        ),
    };
    let problem = Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        ProblemKind::KeyReused,
        detail,
    );
    match request.form {
        None => problem,
        Some(_) => problem.with("index", index),
    }
}

/// The problem of a signed request that was taken with another `Content-Type`, or as no event.
pub(super) fn form_reused() -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        ProblemKind::KeyReused,
        "The request of this webhook-id came in another form before (plain JSON, NDJSON or an \
         event); sent again, it has the same form",
    )
}

pub(super) fn too_large(detail: String) -> Problem {
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, ProblemKind::TooLarge, detail)
}
