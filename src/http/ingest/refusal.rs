//! The problems of requests that are not taken.

use actix_web::http::StatusCode;

use super::{IngestState, KeySource, Request};
use crate::{
    actors::{apis::SharedApi, receipts::Refused},
    http::problem::{Problem, ProblemKind},
    spool::NotSafe,
};

impl IngestState {
    /// The problem of a request that has no receipt for each record.
    pub(super) fn refused(&self, request: &Request, why: &Refused) -> Problem {
        let detail = format!("Not taken: {why}");
        if let Refused::TooLarge(_) | Refused::NotSafe(NotSafe::TooLarge) = why {
            let problem = too_large(detail);
            let records = request.records.iter().enumerate();
            let largest = records.max_by_key(|(_, assigned)| assigned.record.message_size());
            return match (request.form, largest) {
                (Some(_), Some((index, _))) => problem.with("index", index),
                _ => problem,
            };
        }
        let problem = Problem::unavailable(ProblemKind::Unavailable, detail);
        match why {
            Refused::NotSafe(NotSafe::Full) => problem.retry_after(self.pause(request, None)),
            _ => problem,
        }
    }

    /// The problem of a request with a record for an API whose room on this node's disk is taken: it
    /// would find none there if the API did not take it.
    pub(super) fn full_api(&self, request: &Request) -> Option<Problem> {
        let mut records = request.records.iter();
        let full = records.find(|assigned| self.apis.is_full(assigned.record.api.as_deref()))?;
        let api = self.apis.get(full.record.api.as_deref());
        let section = match api.and_then(|api| api.name.as_deref()) {
            None => "api".into(),
            Some(name) => format!("apis.{name}"),
        };
        let detail = format!(
            "Not taken: the API of [{section}] does not take its records as fast as they come, and \
             its room on this node's disk ([{section}].spool_max) is nearly full"
        );
        let problem = Problem::unavailable(ProblemKind::Unavailable, detail);
        Some(problem.retry_after(self.pause(request, api)))
    }

    /// Seconds until the disk of an API, or the node's own, may have room for the request.
    fn pause(&self, request: &Request, api: Option<&SharedApi>) -> u64 {
        let records = request.records.iter();
        let bytes: usize = records.map(|assigned| assigned.record.message_size()).sum();
        let held = api.and_then(|api| api.held.as_ref());
        let stats = held.map_or_else(|| self.apis.spools().stats(), |held| held.spool().stats());
        let over = held.map_or(0, |held| held.bytes_over(&stats));
        let disk = api.map(SharedApi::shown_name);
        self.forecast.pause(disk, &stats, over, bytes as u64)
    }
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
