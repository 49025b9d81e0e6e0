//! The APIs in a status.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::Instant;

use super::AdminState;
use crate::{actors::apis::SharedApi, api::rate::RateStatus, spool::Queue};

/// One of several APIs.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct NamedApiStatus<'s> {
    #[serde(flatten)]
    pub api: ApiStatus<'s>,
    /// On disk until the API has a place for them.
    pub held: u64,
    /// On disk between two tries.
    pub parked: u64,
    pub dead: u64,
    pub disk_bytes: u64,
    /// New records for it are refused: its room on disk is nearly full.
    pub refuses: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ApiStatus<'s> {
    pub url: &'s str,
    pub state: &'static str,
    pub since_s: f64,
    pub last_error: Option<String>,
    pub retry_in_s: Option<f64>,
    pub in_flight: u64,
    pub limit: usize,
    /// The time that a POST takes, as the mean of the last ones that the API has answered; null if it
    /// answered none in the last minute.
    pub post_ms: Option<f64>,
    /// Null if nothing limits the rate.
    pub rate: Option<RateStatus>,
}

impl AdminState {
    /// All APIs, if there is more than one.
    pub fn several_apis(&self) -> impl Iterator<Item = &SharedApi> {
        let all = self.apis.all();
        all.iter().filter(|_| all.len() > 1)
    }

    pub(super) fn named<'s>(&'s self, api: &'s SharedApi) -> (&'s str, NamedApiStatus<'s>) {
        let stats = api.stats();
        let named = NamedApiStatus {
            api: self.api_status(api),
            held: stats.held(),
            parked: stats.parked() - stats.held(),
            dead: stats.records(Queue::Dead),
            disk_bytes: api.disk_bytes(),
            refuses: self.apis.is_full(api.name.as_deref()),
        };
        (api.shown_name(), named)
    }

    /// POSTs that may be in flight now, over all lanes.
    pub fn limit_of(&self, api: &SharedApi) -> usize {
        api.limit.lock().get() * self.lanes.len()
    }

    pub(super) fn api_status<'s>(&self, api: &'s SharedApi) -> ApiStatus<'s> {
        let health = api.breaker.health();
        let post_time = api.limit.lock().post_time(Instant::now());
        ApiStatus {
            url: &api.url,
            state: if health.is_up { "up" } else { "down" },
            since_s: health.since.elapsed().as_secs_f64(),
            last_error: health.last_error,
            retry_in_s: health.retry_in.map(|time| time.as_secs_f64()),
            in_flight: api.counts.in_flight(),
            limit: self.limit_of(api),
            post_ms: post_time.map(as_ms),
            rate: api.rate.status(),
        }
    }
}

fn as_ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
