//! The rate of POSTs to one API: each POST takes a turn, over all lanes and the retrier.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::Clock as _,
    state::{InMemoryState, NotKeyed},
};
use schemars::JsonSchema;
use serde::Serialize;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};
use tracing::info;

use crate::{clock::SinceStart, config::Rate};

/// The turns of this time may be taken at once, so that a timer that is late costs none.
const BURST: Duration = Duration::from_millis(50);
/// A POST that has waited for longer is worth a line in the log.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// The least time between two such lines.
const TOLD_EACH: Duration = Duration::from_mins(10);

/// One per API. A retry, a probe and a POST of a parked record take a turn like any other.
pub struct RateLimit {
    /// The API's address, for the log.
    api: Arc<str>,
    /// `None` if nothing limits the rate.
    turns: Option<Turns>,
}

/// The rate, and the POSTs that wait for their turn.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct RateStatus {
    #[schemars(with = "String")]
    pub limit: Rate,
    pub waiting: usize,
}

struct Turns {
    rate: Rate,
    limiter: RateLimiter<NotKeyed, InMemoryState, SinceStart>,
    /// Its owner is the next; the others come in their order.
    queue: Mutex<TurnQueue>,
    waiting: AtomicUsize,
}

#[derive(Default)]
struct TurnQueue {
    /// A turn that was taken for whoever comes next.
    spare: bool,
    told_at: Option<Instant>,
}

/// A POST that waits. Dropped, it does not any more.
struct Waiting<'t>(&'t AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl RateLimit {
    /// No more POSTs to the API at `api` than `rate` allows.
    pub fn new(api: Arc<str>, rate: Option<Rate>) -> Self {
        let turns = rate.and_then(Turns::new);
        Self { api, turns }
    }

    /// Resolves when a POST may be made.
    pub async fn turn(&self) {
        self.turn_unless(|| false).await;
    }

    /// The same; false, without a turn, if `is_off` is true when its turn has come.
    pub async fn turn_unless(&self, is_off: impl Fn() -> bool) -> bool {
        let Some(turns) = &self.turns else {
            return true;
        };
        turns.waiting.fetch_add(1, Relaxed);
        let _waiting = Waiting(&turns.waiting);
        let began = Instant::now();
        let mut queue = turns.queue.lock().await;
        while !is_off() && !queue.spare {
            turns.fetch(&mut queue).await;
        }
        if is_off() {
            return false;
        }
        queue.spare = false;
        self.tell(turns, &mut queue, began.elapsed());
        true
    }

    /// Resolves when the next POST need not wait, and leaves its turn to it.
    pub async fn has_room(&self) {
        let Some(turns) = &self.turns else { return };
        let mut queue = turns.queue.lock().await;
        while !queue.spare {
            turns.fetch(&mut queue).await;
        }
    }

    /// `None` if nothing limits the rate.
    pub fn status(&self) -> Option<RateStatus> {
        self.turns.as_ref().map(|turns| RateStatus {
            limit: turns.rate,
            waiting: turns.waiting.load(Relaxed),
        })
    }

    fn tell(&self, turns: &Turns, queue: &mut TurnQueue, waited: Duration) {
        let is_due = queue.told_at.is_none_or(|at| at.elapsed() >= TOLD_EACH);
        if waited >= LONG_WAIT && is_due {
            queue.told_at = Some(Instant::now());
            let (api, rate) = (&*self.api, turns.rate);
            let waiting = turns.waiting.load(Relaxed);
            let waited_s = waited.as_secs_f64();
            info!(api, %rate, waiting, waited_s, "POSTs wait for their turn: [api].rate binds");
        }
    }
}

impl Turns {
    fn new(rate: Rate) -> Option<Self> {
        let interval = rate.interval();
        let burst = BURST.as_nanos() / interval.as_nanos().max(1);
        let burst = u32::try_from(burst).unwrap_or(u32::MAX);
        let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
        // `None` for an interval of zero, which no rate has.
        let quota = Quota::with_period(interval)?.allow_burst(burst);
        Some(Self {
            rate,
            limiter: RateLimiter::direct_with_clock(quota, SinceStart::default()),
            queue: Mutex::default(),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Takes the next turn for whoever comes next, or waits until there may be one.
    async fn fetch(&self, queue: &mut TurnQueue) {
        match self.limiter.check() {
            Ok(()) => queue.spare = true,
            Err(early) => sleep(early.wait_time_from(self.limiter.clock().now())).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    fn limit(rate: &str) -> RateLimit {
        RateLimit::new("api".into(), Some(rate.parse().unwrap()))
    }

    /// Turns that are taken within `time`.
    async fn turns(limit: &RateLimit, time: Duration) -> usize {
        let taken = Cell::new(0);
        let take = async {
            loop {
                limit.turn().await;
                taken.set(taken.get() + 1);
            }
        };
        timeout(time, take).await.ok();
        taken.get()
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_at_the_rate_and_few_at_once() {
        for (rate, seconds, most) in [
            ("1/s", 10, 11),
            ("500/s", 10, 5025),
            ("1000/s", 2, 2050),
            ("30/m", 60, 31),
            ("10/h", 3600, 11),
        ] {
            let limit = limit(rate);
            let at_once = std::iter::from_fn(|| limit.turn().now_or_never()).count();
            let taken = at_once + turns(&limit, Duration::from_secs(seconds)).await;
            // The last one may come just behind the end.
            assert!(
                (most - most / 100 - 1..=most).contains(&taken),
                "{rate}: {taken}"
            );
            // A time without POSTs saves up no more turns.
            sleep(Duration::from_hours(1)).await;
            let again = std::iter::from_fn(|| limit.turn().now_or_never()).count();
            assert_eq!(again, at_once, "{rate}");
        }
        let none = RateLimit::new("api".into(), None);
        assert!((0..1000).all(|_| none.turn().now_or_never().is_some()));
        assert!(none.status().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_wait_are_counted_and_come_in_their_order() {
        let limit = limit("1/s");
        limit.turn().await;
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(limit.turn())).collect();
        for turn in &mut waiting {
            assert!(turn.now_or_never().is_none());
        }
        assert_eq!(limit.status().unwrap().waiting, 3);
        drop(waiting.remove(1));
        assert_eq!(limit.status().unwrap().waiting, 2);
        for next in 0..2 {
            sleep(Duration::from_secs(1)).await;
            let came: Vec<_> = waiting
                .iter_mut()
                .map(|turn| turn.now_or_never().is_some())
                .collect();
            assert_eq!(came.iter().position(|came| *came), Some(0), "{next}");
            drop(waiting.remove(0));
        }
        assert_eq!(limit.status().unwrap().waiting, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_is_not_wanted_any_more_goes_to_the_next() {
        let limit = limit("1/m");
        limit.turn().await;
        let is_off = Cell::new(false);
        let unwanted = limit.turn_unless(|| is_off.get());
        let next = async {
            is_off.set(true);
            let began = Instant::now();
            limit.turn().await;
            began.elapsed()
        };
        let (taken, waited) = tokio::join!(unwanted, next);
        assert!(!taken);
        assert!(waited <= Duration::from_secs(61), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_there_once_a_turn_is_and_takes_none() {
        let limit = limit("1/m");
        limit.turn().await;
        assert!(limit.has_room().now_or_never().is_none());
        limit.has_room().await;
        limit.has_room().await;
        assert_eq!(limit.status().unwrap().waiting, 0);
        assert!(limit.turn().now_or_never().is_some());
        assert!(limit.turn().now_or_never().is_none());
    }
}
