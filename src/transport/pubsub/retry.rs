//! Which failures of a publish are refusals, and which are retried.

use google_cloud_gax::{
    error::rpc::Code, retry_policy::RetryPolicy, retry_result::RetryResult, retry_state::RetryState,
};
use google_cloud_pubsub::{Error, retry_policy::RetryableErrors};

/// Whether the service works, and has refused the request: for a quota, or for missing rights.
pub(super) fn is_refusal(failure: &Error) -> bool {
    let code = failure.status().map(|status| status.code);
    let refused = matches!(
        code,
        Some(
            Code::ResourceExhausted
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::FailedPrecondition
                | Code::InvalidArgument
        )
    );
    refused || failure.http_status_code() == Some(429)
}

/// Retries a publish, but not one that the service has refused: its record goes by another lane, or
/// waits on disk.
#[derive(Debug)]
pub(super) struct RetryUnlessRefused;

impl RetryPolicy for RetryUnlessRefused {
    fn on_error(&self, state: &RetryState, error: Error) -> RetryResult {
        if is_refusal(&error) {
            RetryResult::Permanent(error)
        } else {
            RetryableErrors.on_error(state, error)
        }
    }
}

#[cfg(test)]
mod tests {
    use google_cloud_gax::error::rpc::Status;

    use super::*;

    #[test]
    fn a_refusal_is_told_at_once_and_an_outage_is_retried() {
        let failure = |code| Error::service(Status::default().set_code(code).set_message("why"));
        for (code, is_refused) in [
            (Code::ResourceExhausted, true),
            (Code::PermissionDenied, true),
            (Code::InvalidArgument, true),
            (Code::Unavailable, false),
            (Code::DeadlineExceeded, false),
            (Code::Internal, false),
        ] {
            assert_eq!(is_refusal(&failure(code)), is_refused, "{code:?}");
            let next = RetryUnlessRefused.on_error(&RetryState::new(true), failure(code));
            assert_eq!(next.is_permanent(), is_refused, "{code:?}");
        }
    }
}
