//! The places of a lane for POSTs in flight, as many as the API's limit allows, and no more often
//! than its rate.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};
use tracing_mutex::parkinglot::Mutex;

use super::{
    answer::{Answer, FailureClass},
    limit::{AdaptiveLimit, PostResult},
    rate::RateLimit,
};

/// One per lane and API. The lanes share the API's limit, which holds for each of them.
pub struct Gate {
    limit: Arc<Mutex<AdaptiveLimit>>,
    rate: Arc<RateLimit>,
    free: Semaphore,
    /// Places, free or taken. It changes under the lock of the limit only.
    places: AtomicUsize,
    /// Places of POSTs that have begun: others are taken while they wait for their turn.
    in_flight: AtomicUsize,
}

/// The place of one POST. Dropped without an end, the POST says nothing about the API.
pub struct PostPlace<'g> {
    gate: &'g Gate,
    permit: Option<SemaphorePermit<'g>>,
    began: Instant,
    result: Option<PostResult>,
}

impl Gate {
    pub fn new(limit: Arc<Mutex<AdaptiveLimit>>, rate: Arc<RateLimit>) -> Self {
        let places = limit.lock().get();
        Self {
            limit,
            rate,
            free: Semaphore::new(places),
            places: AtomicUsize::new(places),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// Resolves when a POST may begin. Those that wait come in their order. `None` if `is_off` is
    /// true when its turn has come.
    pub async fn enter(&self, is_off: impl Fn() -> bool) -> Option<PostPlace<'_>> {
        // It is never closed.
        let permit = self.free.acquire().await.ok();
        if !self.rate.turn_unless(is_off).await {
            return None;
        }
        let began = Instant::now();
        let mut limit = self.limit.lock();
        self.resize(limit.get());
        let in_flight = 1 + self.in_flight.fetch_add(1, Relaxed);
        let is_last = in_flight >= limit.get();
        limit.begin(began, is_last);
        Some(PostPlace {
            gate: self,
            permit,
            began,
            result: None,
        })
    }

    /// Resolves when a probe may be made, which needs no place.
    pub async fn admit_probe(&self) {
        self.rate.turn().await;
    }

    /// Resolves when a POST need not wait, and takes no place.
    pub async fn has_room(&self) {
        drop(self.free.acquire().await);
        self.rate.has_room().await;
    }

    /// Adds places, or takes free ones away, to have `wanted`.
    fn resize(&self, wanted: usize) {
        let places = self.places.load(Relaxed);
        if wanted > places {
            self.free.add_permits(wanted - places);
            self.places.store(wanted, Relaxed);
        } else {
            let gone = self.free.forget_permits(places - wanted);
            self.places.store(places - gone, Relaxed);
        }
    }
}

impl PostPlace<'_> {
    /// The POST of so many records has ended.
    pub fn end(mut self, answer: &Answer, records: usize) {
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        self.result = Some(match answer.failure() {
            None | Some(FailureClass::Denied | FailureClass::Refused) => {
                PostResult::Settled(records)
            }
            Some(FailureClass::Timeout) => PostResult::TimedOut,
            Some(_) if answer.is_overloaded() => PostResult::Overloaded,
            Some(_) => PostResult::Failed,
        });
    }
}

impl Drop for PostPlace<'_> {
    fn drop(&mut self) {
        let mut limit = self.gate.limit.lock();
        self.gate.in_flight.fetch_sub(1, Relaxed);
        limit.end(self.began, Instant::now(), self.result);
        let wanted = limit.get();
        let places = self.gate.places.load(Relaxed);
        if places > wanted
            && let Some(permit) = self.permit.take()
        {
            // Returned, it would go to the next that waits.
            permit.forget();
            self.gate.places.store(places - 1, Relaxed);
        }
        drop(self.permit.take());
        self.gate.resize(wanted);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::{FutureExt as _, future::join_all};
    use tokio::time::sleep;

    use super::*;

    fn gate(max: usize) -> Gate {
        gate_with(max, None)
    }

    fn gate_with(max: usize, rate: Option<&str>) -> Gate {
        let limit = AdaptiveLimit::new(max, Instant::now());
        let rate = rate.map(|rate| rate.parse().unwrap());
        let rate = RateLimit::new("api".into(), rate);
        Gate::new(Arc::new(Mutex::new(limit)), Arc::new(rate))
    }

    fn taken() -> Answer {
        Answer::Status {
            status: 200,
            is_retryable: false,
            retry_after: None,
            excerpt: String::new(),
        }
    }

    fn timed_out() -> Answer {
        Answer::NoAnswer {
            class: FailureClass::Timeout,
            why: String::new(),
        }
    }

    /// Takes all places that are free.
    fn fill(gate: &Gate) -> Vec<PostPlace<'_>> {
        std::iter::from_fn(|| gate.enter(|| false).now_or_never()?).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn places_go_with_the_limit_though_others_wait_for_them() {
        let gate = gate(32);
        let taken = fill(&gate);
        assert_eq!(taken.len(), 32);
        let mut waiting: Vec<_> = (0..32).map(|_| Box::pin(gate.enter(|| false))).collect();
        for place in &mut waiting {
            assert!(place.now_or_never().is_none());
        }
        sleep(Duration::from_secs(10)).await;
        for place in taken {
            place.end(&timed_out(), 1);
        }
        let limit = gate.limit.lock().get();
        assert!(limit < 32, "{limit}");
        let mut enter = || {
            let mut entered = Vec::new();
            waiting.retain_mut(|place| {
                let place = place.now_or_never();
                let waits = place.is_none();
                entered.extend(place);
                waits
            });
            entered
        };
        // The first time-outs left their places to others: the limit had not fallen yet.
        drop(enter());
        let entered = enter();
        assert_eq!(entered.len(), limit);
        drop(entered);
        drop(waiting);
        assert_eq!(
            fill(&gate).len(),
            limit,
            "a place without an end is free again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_that_binds_changes_no_limit() {
        let gate = gate_with(64, Some("100/s"));
        let until = Instant::now() + Duration::from_mins(1);
        let post = async |_| {
            while Instant::now() < until {
                let Some(place) = gate.enter(|| false).await else {
                    panic!("the API is there");
                };
                sleep(Duration::from_millis(10)).await;
                place.end(&taken(), 1);
                assert_eq!(gate.limit.lock().get(), 64);
            }
        };
        join_all((0..64).map(post)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_waits_for_its_turn_leaves_when_the_api_is_away() {
        let gate = gate_with(1, Some("1/m"));
        let place = gate.enter(|| false).await.unwrap();
        place.end(&taken(), 1);
        assert!(gate.enter(|| true).await.is_none());
        assert_eq!(gate.free.available_permits(), 1);
    }
}
