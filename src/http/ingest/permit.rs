//! What is decided before a request is looked at: whether its client may ask, and may ask now.

use std::time::Instant;

use actix_web::{
    Error, HttpResponse, ResponseError as _,
    body::BoxBody,
    dev::{ServiceRequest, ServiceResponse},
    http::{Method, StatusCode},
    middleware::Next,
    web,
};

use super::IngestState;
use crate::{
    config::HEADERS_MAX,
    http::{
        client_rate::{RequestClient, RequestRoom},
        close_behind,
        problem::{Problem, ProblemKind},
    },
};

impl IngestState {
    /// Whether a request may be refused before it is looked at.
    pub(super) const fn has_terms(&self) -> bool {
        self.tokens.is_some() || self.rate.is_some() || self.max_headers < HEADERS_MAX
    }

    /// The room that the client has left, if there is a limit.
    fn permit(&self, request: &ServiceRequest) -> Result<Option<RequestRoom>, Problem> {
        let max = self.max_headers;
        if request.headers().len() > max {
            return Err(Problem::new(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                ProblemKind::LargeHead,
                format!("The head of the request has more than {max} headers"),
            ));
        }
        let known = self
            .tokens
            .as_ref()
            .map(|tokens| tokens.check(request.headers()));
        let Some(rate) = &self.rate else {
            return known.unwrap_or(Ok(b"")).map(|_| None);
        };
        let address = || {
            let address = request.peer_addr().map(|peer| peer.ip());
            // A connection that has ended has none.
            RequestClient::Address(address.unwrap_or([0, 0, 0, 0].into()))
        };
        match known {
            None => rate.count(address()).map(Some),
            Some(Ok(token)) => rate.count(RequestClient::Token(token)).map(Some),
            // Guesses are limited too.
            Some(Err(unknown)) => {
                rate.count(address())?;
                Err(unknown)
            }
        }
    }
}

/// Refuses a request before its body is read. Everybody may ask for the health, as often as it likes.
pub(super) async fn only_permitted(
    state: web::Data<IngestState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let is_health =
        request.path() == "/" && matches!(*request.method(), Method::GET | Method::HEAD);
    if is_health {
        let mut answer = next.call(request).await?;
        // Nobody without a token keeps a connection.
        if state.tokens.is_some() {
            close_behind(&mut answer);
        }
        return Ok(answer);
    }
    let began = Instant::now();
    match state.permit(&request) {
        Ok(room) => {
            let mut answer = next.call(request).await?;
            if let Some(room) = room {
                room.tell(answer.headers_mut());
            }
            Ok(answer)
        }
        Err(problem) => {
            let status = problem.status_code().as_u16();
            state.ledger.answered(status, began);
            Ok(request.into_response(HttpResponse::from_error(problem)))
        }
    }
}
