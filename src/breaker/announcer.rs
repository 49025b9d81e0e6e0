//! The breaker's news for the log and the event stream, in order, and without its lock: a log that
//! cannot be written holds up the one that speaks, and nobody else.

use std::{collections::VecDeque, mem};

use tracing::{info, warn};
use tracing_mutex::parkinglot::Mutex;

use crate::changes::{Change, ChangeLog, ShortReason};

/// The most changes that wait to be told.
const WAITING_MAX: usize = 16;

/// A change of the breaker.
#[derive(Debug, PartialEq)]
pub(super) enum ApiChange {
    Down {
        why: String,
        retry_in_s: f64,
    },
    Up {
        down_s: f64,
        /// Records that the outage has kept waiting.
        waiting: u64,
    },
}

/// Tells of changes, one after the other.
#[derive(Default)]
pub(super) struct Announcer {
    /// Changes that nobody has heard of.
    untold: Mutex<VecDeque<ApiChange>>,
    /// Held by whoever speaks.
    voice: Mutex<()>,
}

impl Announcer {
    /// Notes a change, to be called under the breaker's lock. Downs and ups alternate, so two that
    /// follow each other can be left out.
    pub fn note(&self, change: ApiChange) {
        let mut untold = self.untold.lock();
        if untold.len() >= WAITING_MAX {
            untold.drain(..2);
        }
        untold.push_back(change);
    }

    /// Tells what is noted, unless somebody else is about to. To be called without the breaker's lock.
    pub fn tell(&self, api: &str, change_log: &ChangeLog) {
        // The one that speaks looks again after it, so that nothing stays untold.
        while self.has_untold()
            && let Some(_voice) = self.voice.try_lock()
        {
            let untold = mem::take(&mut *self.untold.lock());
            for change in untold {
                change.tell(api, change_log);
            }
        }
    }

    fn has_untold(&self) -> bool {
        !self.untold.lock().is_empty()
    }
}

impl ApiChange {
    fn tell(self, api: &str, change_log: &ChangeLog) {
        let (state, last_error, retry_in_s) = match &self {
            Self::Down { why, retry_in_s } => {
                warn!(api, reason = why, retry_in_s, "API is down: records wait");
                ("down", Some(ShortReason(why)), Some(*retry_in_s))
            }
            Self::Up { down_s, waiting } => {
                info!(api, down_s, waiting, "API is up again");
                ("up", None, None)
            }
        };
        change_log.add(Change::Api {
            url: api,
            state,
            last_error,
            retry_in_s,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
        task::{self, Wake, Waker},
        thread,
    };

    use tracing::{Event, Subscriber, subscriber};
    use tracing_subscriber::{
        Layer, Registry,
        layer::{Context, SubscriberExt as _},
    };

    use super::*;
    use crate::{
        api::answer::{Answer, FailureClass},
        breaker::{Breaker, DENIALS_MAX, Trial, failures::FAILURES_MAX},
    };

    /// Looks at each line whether the breaker is locked meanwhile.
    #[derive(Clone)]
    struct LockWatch {
        breaker: Arc<Breaker>,
        free: Arc<Mutex<Vec<bool>>>,
    }

    impl LockWatch {
        fn look(&self) {
            let is_free = self.breaker.state.try_lock().is_some();
            self.free.lock().push(is_free);
        }
    }

    impl<S: Subscriber> Layer<S> for LockWatch {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            self.look();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_breaker_is_not_locked_while_it_logs() {
        let breaker = Arc::new(Breaker::default());
        let watch = LockWatch {
            breaker: Arc::clone(&breaker),
            free: Arc::default(),
        };
        let _log = subscriber::set_default(Registry::default().with(watch.clone()));
        let seen = || mem::take(&mut *watch.free.lock());
        let none = Answer::NoAnswer {
            class: FailureClass::Connect,
            why: "refused".into(),
        };
        for _ in 0..FAILURES_MAX {
            let pass = breaker.pass(&Trial::default()).await;
            pass.failed(&none, &mut Trial::default());
        }
        assert_eq!(seen(), [true], "down");
        let probe = breaker.pass(&Trial::default()).await;
        let waiting = || {
            watch.look();
            7
        };
        probe.succeeded(waiting);
        assert_eq!(seen(), [true; 2], "what waits, and up");
        let denied = (0..DENIALS_MAX).map(async |_| {
            let pass = breaker.pass(&Trial::default()).await;
            pass.denied(401).await
        });
        futures_util::future::join_all(denied).await;
        assert_eq!(seen(), [true], "down by denials");
        assert!(breaker.is_open());
    }

    /// Whether it was woken; as a layer, whether it was at each line.
    #[derive(Clone, Default)]
    struct WakeWatch(Arc<Woken>);

    #[derive(Default)]
    struct Woken {
        is: AtomicBool,
        at_lines: Mutex<Vec<bool>>,
    }

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.is.store(true, Relaxed);
        }
    }

    impl<S: Subscriber> Layer<S> for WakeWatch {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            let is_woken = self.0.is.load(Relaxed);
            self.0.at_lines.lock().push(is_woken);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_wait_go_on_before_the_log_is_written() {
        let breaker = Breaker::default();
        let denied = (0..DENIALS_MAX).map(async |_| {
            let pass = breaker.pass(&Trial::default()).await;
            pass.denied(401).await
        });
        futures_util::future::join_all(denied).await;
        let probe = breaker.pass(&Trial::default()).await;
        let watch = WakeWatch::default();
        let _log = subscriber::set_default(Registry::default().with(watch.clone()));
        let trial = Trial::default();
        let mut waiting = pin!(breaker.pass(&trial));
        let waker = Waker::from(Arc::clone(&watch.0));
        let mut task = task::Context::from_waker(&waker);
        assert!(waiting.as_mut().poll(&mut task).is_pending());
        probe.succeeded(|| 0);
        assert_eq!(*watch.0.at_lines.lock(), [true], "up");
        assert!(waiting.as_mut().poll(&mut task).is_ready());
    }

    #[test]
    fn what_waits_for_a_log_has_a_bound_and_its_order() {
        let announcer = Announcer::default();
        for number in 0..100 {
            announcer.note(ApiChange::Down {
                why: number.to_string(),
                retry_in_s: 0.1,
            });
            announcer.note(ApiChange::Up {
                down_s: 0.1,
                waiting: number,
            });
        }
        announcer.note(ApiChange::Down {
            why: "100".into(),
            retry_in_s: 0.1,
        });
        {
            let _voice = announcer.voice.lock();
            // Somebody else speaks, and will tell it. No thread asks for a voice that it has.
            let tell = || announcer.tell("http://api/", &ChangeLog::default());
            thread::scope(|scope| scope.spawn(tell).join()).unwrap();
        }
        let untold = announcer.untold.lock();
        let last = |change: &ApiChange| match change {
            ApiChange::Down { why, .. } => why.parse::<u64>().unwrap() * 2,
            ApiChange::Up { waiting, .. } => waiting * 2 + 1,
        };
        let numbers: Vec<_> = untold.iter().map(last).collect();
        // Its hearer knows of an API that is up.
        assert_eq!(numbers, (186..=200).collect::<Vec<_>>());
        assert!(untold.len() <= WAITING_MAX);
    }
}
