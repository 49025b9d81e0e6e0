//! The answer to a POST, and its consequence for the record.

use std::{fmt, time::Duration};

/// The answer to one POST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `excerpt` is the start of the answer's body; it is empty for a 2xx.
    Status {
        status: u16,
        /// `[api].retry_statuses` has it.
        is_retryable: bool,
        retry_after: Option<Duration>,
        excerpt: String,
    },
    /// No connection, a broken one, or a time-out. The API may have the record.
    NoAnswer { class: FailureClass, why: String },
}

/// The class of a POST that the API has not taken, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    Connect,
    /// The connection was closed before the whole answer.
    Closed,
    Timeout,
    /// The answer's head cannot be read: a malformed line, or more than 96 headers.
    Unusable,
    /// 408, 425, 429 or 503: the API asks for patience.
    Overload,
    /// Any other 5xx.
    ServerError,
    /// Any other status that is retried.
    Retryable,
    /// 401, 403 or 404.
    Denied,
    /// Any other status.
    Refused,
}

/// The consequence of an [`Answer`] for the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Delivered,
    /// POST again, after `at_least` if the API asked for a pause.
    Retry {
        at_least: Option<Duration>,
    },
    /// The API will never take this record.
    Refused,
    /// The same, unless the API denies everything: a wrong token or path.
    Denied,
}

/// The longest pause that an API can ask for with `Retry-After`.
pub const RETRY_AFTER_MAX: Duration = Duration::from_mins(5);

impl FailureClass {
    pub const ALL: [Self; 9] = [
        Self::Connect,
        Self::Closed,
        Self::Timeout,
        Self::Unusable,
        Self::Overload,
        Self::ServerError,
        Self::Retryable,
        Self::Denied,
        Self::Refused,
    ];

    /// The label in the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Closed => "closed",
            Self::Timeout => "timeout",
            Self::Unusable => "unusable",
            Self::Overload => "overload",
            Self::ServerError => "5xx",
            Self::Retryable => "retryable",
            Self::Denied => "denied",
            Self::Refused => "refused",
        }
    }
}

impl Answer {
    /// The class of a failure; `None` for a 2xx.
    pub const fn failure(&self) -> Option<FailureClass> {
        Some(match *self {
            Self::NoAnswer { class, .. } => class,
            Self::Status {
                status,
                is_retryable,
                ..
            } => match status {
                200..=299 => return None,
                401 | 403 | 404 => FailureClass::Denied,
                _ if !is_retryable => FailureClass::Refused,
                408 | 425 | 429 | 503 => FailureClass::Overload,
                500..=599 => FailureClass::ServerError,
                _ => FailureClass::Retryable,
            },
        })
    }

    /// The status; 0 without an answer.
    pub const fn status(&self) -> u16 {
        match *self {
            Self::Status { status, .. } => status,
            Self::NoAnswer { .. } => 0,
        }
    }

    /// 429 or 503: the API has too much to do, which says nothing about the payload.
    pub const fn is_overloaded(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: 429 | 503,
                is_retryable: true,
                ..
            }
        )
    }

    /// A connection to the API could be opened.
    pub fn is_connected(&self) -> bool {
        self.failure() != Some(FailureClass::Connect)
    }

    /// The POST has reached the API, though it was not taken.
    pub fn is_reached(&self) -> bool {
        let unreached = [FailureClass::Connect, FailureClass::Timeout];
        self.failure()
            .is_none_or(|class| !unreached.contains(&class))
    }

    /// The pause that the API asks for before the next try.
    pub fn pause(&self) -> Option<Duration> {
        match self.outcome() {
            Outcome::Retry { at_least } => at_least,
            _ => None,
        }
    }

    /// Each class of failure has one consequence. No answer, and a status that is retryable, are
    /// retried.
    pub fn outcome(&self) -> Outcome {
        match self.failure() {
            None => Outcome::Delivered,
            Some(FailureClass::Denied) => Outcome::Denied,
            Some(FailureClass::Refused) => Outcome::Refused,
            Some(_) => Outcome::Retry {
                at_least: match *self {
                    Self::Status { retry_after, .. } => retry_after.map(|d| d.min(RETRY_AFTER_MAX)),
                    Self::NoAnswer { .. } => None,
                },
            },
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status {
                status, excerpt, ..
            } => {
                let colon = if excerpt.is_empty() { "" } else { ": " };
                write!(f, "status {status}{colon}{excerpt}")
            }
            Self::NoAnswer { why, .. } => f.write_str(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RetryStatuses;

    #[test]
    fn answers_are_classified_as_the_contract_says() {
        let answer = |status, is_retryable, retry_after| Answer::Status {
            status,
            is_retryable,
            retry_after,
            excerpt: String::new(),
        };
        let default = RetryStatuses::default();
        let status = |status, retry_after| answer(status, default.contains(status), retry_after);
        let retry = |at_least| Outcome::Retry { at_least };
        let second = Some(Duration::from_secs(1));
        for (answer, outcome) in [
            (status(200, None), Outcome::Delivered),
            (status(202, second), Outcome::Delivered),
            (status(299, None), Outcome::Delivered),
            (status(408, None), retry(None)),
            (status(425, None), retry(None)),
            (status(429, second), retry(second)),
            (status(500, None), retry(None)),
            (status(503, second), retry(second)),
            (
                status(503, Some(Duration::from_hours(1000))),
                retry(Some(RETRY_AFTER_MAX)),
            ),
            (status(599, None), retry(None)),
            (status(301, None), Outcome::Refused),
            (status(307, second), Outcome::Refused),
            (status(400, None), Outcome::Refused),
            (status(401, None), Outcome::Denied),
            (status(403, None), Outcome::Denied),
            (status(404, None), Outcome::Denied),
            (status(413, None), Outcome::Refused),
            (status(101, None), Outcome::Refused),
            // With other statuses than the defaults.
            (answer(409, true, second), retry(second)),
            (answer(302, true, None), retry(None)),
            (answer(500, false, second), Outcome::Refused),
            (answer(503, false, None), Outcome::Refused),
            (answer(429, false, second), Outcome::Refused),
            // Whatever the statuses are.
            (answer(204, true, None), Outcome::Delivered),
            (answer(401, true, None), Outcome::Denied),
            (answer(403, true, None), Outcome::Denied),
            (answer(404, true, None), Outcome::Denied),
            (
                Answer::NoAnswer {
                    class: FailureClass::Connect,
                    why: "refused".into(),
                },
                retry(None),
            ),
        ] {
            assert_eq!(answer.outcome(), outcome, "{answer:?}");
        }
        for (answer, class, is_overloaded) in [
            (answer(429, true, None), FailureClass::Overload, true),
            (answer(503, true, None), FailureClass::Overload, true),
            (answer(408, true, None), FailureClass::Overload, false),
            (answer(500, true, None), FailureClass::ServerError, false),
            (answer(409, true, None), FailureClass::Retryable, false),
            (answer(503, false, None), FailureClass::Refused, false),
            (answer(409, false, None), FailureClass::Refused, false),
        ] {
            assert_eq!(answer.failure(), Some(class), "{answer:?}");
            assert_eq!(answer.is_overloaded(), is_overloaded, "{answer:?}");
            assert!(answer.is_reached(), "{answer:?}");
        }
    }
}
