//! The rate of each client's requests, and what a client is told of it
//! (draft-ietf-httpapi-ratelimit-headers-11).
//!
//! A client is known by its token, else by its address: a provider gives one customer a whole /64 of
//! IPv6, so that is one address here.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use actix_web::http::{
    StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use governor::{
    NotUntil, Quota, RateLimiter,
    middleware::{StateInformationMiddleware, StateSnapshot},
    nanos::Nanos,
    state::StateStore,
};
use tokio::time::Instant;
use tracing::info;
use tracing_mutex::parkinglot::Mutex;

use super::problem::{Problem, ProblemKind};
use crate::{
    clock::SinceStart,
    config::Rate,
    recent::{Fingerprint, Hasher128, Recent},
};

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const STATE: HeaderName = HeaderName::from_static("ratelimit");
/// The name of the only policy.
const NAME: &str = "client";
/// A client is forgotten once so many others have come: some 5 MiB.
const CLIENTS_MAX: usize = 65_536;
/// The least time between two lines of the log.
const TOLD_EACH: Duration = Duration::from_mins(10);

/// One for all HTTP workers. Clones share it.
#[derive(Clone)]
pub struct ClientRate(Arc<SharedRates>);

struct SharedRates {
    rate: Rate,
    limiter: RateLimiter<Fingerprint, Clients, SinceStart, StateInformationMiddleware>,
    hasher: Hasher128,
    policy: String,
    told_at: Mutex<Option<Instant>>,
}

/// The sender of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestClient<'r> {
    /// The owner of a token that counts.
    Token(&'r [u8]),
    Address(IpAddr),
}

/// The theoretical arrival time of each client's next request (GCRA). Its size is bounded.
#[derive(Default)]
struct Clients(Mutex<Recent<Nanos>>);

impl StateStore for Clients {
    type Key = Fingerprint;

    fn measure_and_replace<T, F, E>(&self, client: &Fingerprint, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut clients = self.0.lock();
        let (outcome, next) = decide(clients.get(client).copied())?;
        clients.insert(*client, next);
        if clients.young_len() >= CLIENTS_MAX {
            clients.rotate();
        }
        Ok(outcome)
    }
}

/// The room that a client has after a request. Its headers go with the answer.
pub struct RequestRoom {
    policy: HeaderValue,
    left: HeaderValue,
}

impl RequestRoom {
    pub fn tell(self, headers: &mut HeaderMap) {
        headers.insert(POLICY, self.policy);
        headers.insert(STATE, self.left);
    }
}

impl ClientRate {
    /// `None` for a rate that limits nothing, which no configuration has.
    pub fn new(rate: Rate) -> Option<Self> {
        let quota = Quota::with_period(rate.interval())?.allow_burst(rate.count());
        let limiter = RateLimiter::new(quota, Clients::default(), SinceStart::default());
        Some(Self(Arc::new(SharedRates {
            rate,
            limiter,
            hasher: Hasher128::default(),
            policy: format!(
                "\"{NAME}\";q={};w={}",
                rate.count(),
                rate.window().as_secs()
            ),
            told_at: Mutex::default(),
        })))
    }

    /// Counts a request of `client`.
    ///
    /// # Errors
    /// The problem of a request that is one too many.
    pub fn count(&self, client: RequestClient<'_>) -> Result<RequestRoom, Problem> {
        let of = match client {
            RequestClient::Address(address) => RequestClient::Address(network(address)),
            token @ RequestClient::Token(_) => token,
        };
        let counted = self.0.limiter.check_key(&self.0.hasher.fingerprint(of));
        let room = counted.map_err(|early| self.too_many(client, &early))?;
        Ok(self.room(&room))
    }

    fn room(&self, room: &StateSnapshot) -> RequestRoom {
        let left = format!("\"{NAME}\";r={}", room.remaining_burst_capacity());
        let text = |text: &str| HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""));
        RequestRoom {
            policy: text(&self.0.policy),
            left: text(&left),
        }
    }

    fn too_many(&self, client: RequestClient<'_>, early: &NotUntil<Nanos>) -> Problem {
        let rate = self.0.rate;
        self.tell(client);
        let wait = early.wait_time_from(governor::clock::Clock::now(self.0.limiter.clock()));
        // The whole second by which the next request has room.
        let wait = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let wait = wait.max(1);
        let detail = format!(
            "This client sends more than {rate} requests ([ingest].rate); the next one has room in \
             {wait} s"
        );
        Problem::new(
            StatusCode::TOO_MANY_REQUESTS,
            ProblemKind::QuotaExceeded,
            detail,
        )
        .with("violated-policies", vec![NAME])
        .with_header(POLICY, &*self.0.policy)
        .with_header(STATE, format!("\"{NAME}\";r=0;t={wait}"))
        .retry_after(wait)
    }

    /// Tells the operator, who may not know why clients see errors.
    fn tell(&self, client: RequestClient<'_>) {
        let mut told_at = self.0.told_at.lock();
        if told_at.is_some_and(|at| at.elapsed() < TOLD_EACH) {
            return;
        }
        *told_at = Some(Instant::now());
        let rate = self.0.rate;
        match client {
            RequestClient::Address(client) => {
                info!(%client, %rate, "requests are answered 429: [ingest].rate binds");
            }
            // The token is a secret.
            RequestClient::Token(_) => {
                info!(%rate, "requests of a token are answered 429: [ingest].rate binds");
            }
        }
    }
}

/// The addresses that count as this one.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(network).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use actix_web::ResponseError as _;
    use tokio::time::advance;

    use super::*;

    fn rate(text: &str) -> ClientRate {
        ClientRate::new(text.parse().unwrap()).unwrap()
    }

    fn address(text: &str) -> RequestClient<'static> {
        RequestClient::Address(text.parse().unwrap())
    }

    fn header(headers: &HeaderMap, name: &str) -> String {
        headers.get(name).unwrap().to_str().unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_waits_as_it_is_told_gets_in() {
        for (text, count, first_wait) in [("10/s", 10, 1), ("30/m", 30, 2), ("2/h", 2, 1800)] {
            let rate = rate(text);
            let client = address("192.0.2.1");
            for left in (0..count).rev() {
                let mut headers = HeaderMap::new();
                rate.count(client).unwrap().tell(&mut headers);
                assert_eq!(
                    header(&headers, "ratelimit"),
                    format!("\"client\";r={left}")
                );
            }
            for _ in 0..5 {
                let problem = rate.count(client).err().unwrap();
                assert_eq!(problem.status_code(), StatusCode::TOO_MANY_REQUESTS);
                let answer = problem.error_response();
                let wait = header(answer.headers(), "retry-after");
                let expected = format!("\"client\";r=0;t={wait}");
                assert_eq!(header(answer.headers(), "ratelimit"), expected);
                let wait: u64 = wait.parse().unwrap();
                assert!((1..=first_wait).contains(&wait), "{text}: {wait}");
                advance(Duration::from_secs(wait)).await;
                assert!(rate.count(client).is_ok(), "{text}: after {wait} s");
                // Whatever else has become free is taken too.
                while rate.count(client).is_ok() {}
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_client_has_a_rate_of_its_own() {
        let rate = rate("1/h");
        for (client, is_new) in [
            (address("192.0.2.1"), true),
            (address("192.0.2.1"), false),
            (address("::ffff:192.0.2.1"), false),
            (address("192.0.2.2"), true),
            (address("2001:db8::1"), true),
            (address("2001:db8::ffff:1"), false),
            (address("2001:db8:0:1::1"), true),
            (RequestClient::Token(b"one"), true),
            (RequestClient::Token(b"two"), true),
            (RequestClient::Token(b"one"), false),
        ] {
            assert_eq!(rate.count(client).is_ok(), is_new, "{client:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_problem_is_that_of_the_registry() {
        let rate = rate("1/m");
        assert!(rate.count(address("192.0.2.1")).is_ok());
        let problem = rate.count(address("192.0.2.1")).err().unwrap();
        let body: serde_json::Value = serde_json::from_str(&problem.body()).unwrap();
        let kind = "https://iana.org/assignments/http-problem-types#quota-exceeded";
        assert_eq!(body["type"], kind);
        assert_eq!(body["violated-policies"], serde_json::json!(["client"]));
        let answer = problem.error_response();
        assert_eq!(
            header(answer.headers(), "ratelimit-policy"),
            "\"client\";q=1;w=60"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_clients_are_bounded_and_the_last_ones_are_known() {
        let rate = rate("1/h");
        let count = u32::try_from(3 * CLIENTS_MAX).unwrap();
        let client = |number: u32| RequestClient::Address(IpAddr::V4(number.into()));
        for number in 0..count {
            assert!(rate.count(client(number)).is_ok());
        }
        for number in count - 1000..count {
            assert!(rate.count(client(number)).is_err());
        }
        assert!(rate.count(client(0)).is_ok(), "forgotten");
    }
}
