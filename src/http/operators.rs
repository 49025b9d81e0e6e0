//! Who may use the admin side: those with a certificate or a token, if the node asks for one.

use actix_web::{
    Error,
    body::BoxBody,
    dev::{ServiceRequest, ServiceResponse},
    http::{StatusCode, header::WWW_AUTHENTICATE},
    middleware::Next,
    web,
};

use super::{
    close_behind, foreign, has_certificate,
    problem::{Problem, ProblemKind},
    status::AdminState,
};

impl AdminState {
    /// Not everybody who reaches the address is an operator.
    pub const fn is_guarded(&self) -> bool {
        self.tokens.is_some() || self.needs_certificate
    }
}

/// Refuses requests without a certificate or a token of operators.
pub async fn only_operators(
    state: web::Data<AdminState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    // A browser asks for no password under somebody else's name. Scrapers come by any name.
    if request.path() != "/metrics" {
        foreign::refuse_unless_link(request.uri(), request.headers(), &state.hosts)?;
    }
    if state.needs_certificate && !has_certificate(&request) {
        return Err(no_certificate().into());
    }
    if let Some(tokens) = &state.tokens {
        tokens.check_operator(request.headers())?;
    }
    next.call(request).await
}

/// Lets everybody read. Where other requests are for operators, nobody else keeps a connection.
pub async fn probe(
    state: web::Data<AdminState>,
    request: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let mut answer = next.call(request).await?;
    if state.is_guarded() {
        close_behind(&mut answer);
    }
    Ok(answer)
}

fn no_certificate() -> Problem {
    let detail = "This needs a client's certificate that [admin].client_ca_file has signed";
    Problem::new(StatusCode::UNAUTHORIZED, ProblemKind::Certificate, detail)
        .with_header(WWW_AUTHENTICATE, "ClientCertificate realm=\"waypost\"")
}
