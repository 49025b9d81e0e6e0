//! Whether a connection is lost: the client's own retries would hide an outage.

use std::{
    fmt::Display,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, Notify},
    time::{Instant, sleep, timeout},
};

use super::{
    Lost,
    declare::{DeclaredSubscription, describe, is_orphan},
    orphan::drain,
    stream::MessageStream,
};

/// How often the subscription is looked up while no message comes.
const PERIOD: Duration = Duration::from_millis(2500);
/// How often it is looked up while messages come: its topic may be gone all the same.
const PERIOD_MAX: Duration = Duration::from_secs(10);
/// How long the service may take for an answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);
/// Two failed probes this far apart are an outage.
const GAP: Duration = Duration::from_millis(300);
pub(super) const TOPIC_GONE: &str = "the topic is gone";
/// A stream that brought nothing to a connection of this age is not kept: it may be dead.
const QUIET: Duration = Duration::from_secs(30);

/// The health of one connection.
pub(super) struct State {
    pub lost: Lost,
    /// The stream may belong to a service or a subscription that is gone.
    stream_failed: AtomicBool,
    since: Instant,
    /// The number of messages.
    pub received: AtomicUsize,
    /// A failure may be an outage: probe now.
    pub suspicion: Notify,
    /// Held while the subscription is being deleted.
    pub deletion: Mutex<()>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            lost: Lost::default(),
            stream_failed: AtomicBool::default(),
            since: Instant::now(),
            received: AtomicUsize::default(),
            suspicion: Notify::default(),
            deletion: Mutex::default(),
        }
    }
}

impl State {
    /// The connection is lost, and its stream with it.
    pub fn fail(&self, why: impl Display) {
        self.stream_failed.store(true, Ordering::Relaxed);
        self.lost.set(why);
    }

    pub fn stream_is_good(&self) -> bool {
        let heard = self.received.load(Ordering::Relaxed) > 0;
        !self.stream_failed.load(Ordering::Relaxed) && (heard || self.since.elapsed() < QUIET)
    }
}

/// Ends when the connection is lost.
pub(super) async fn watch(
    subscription: DeclaredSubscription,
    stream: Arc<MessageStream>,
    state: Arc<State>,
) {
    if subscription.is_orphaned {
        tokio::select! {
            () = probe(&subscription, &state) => {}
            () = drain(&subscription, &stream, &state) => {}
        }
    } else {
        probe(&subscription, &state).await;
    }
}

/// Looks the subscription up, most often while the lane is quiet, and after a failure. Ends when it
/// has found the connection lost.
async fn probe(subscription: &DeclaredSubscription, state: &State) {
    let mut seen = 0;
    let mut probed_at = Instant::now();
    loop {
        tokio::select! {
            () = sleep(PERIOD) => {
                let received = state.received.load(Ordering::Relaxed);
                let is_quiet = std::mem::replace(&mut seen, received) == received;
                if !is_quiet && probed_at.elapsed() < PERIOD_MAX {
                    continue;
                }
            }
            () = state.suspicion.notified() => {}
        }
        probed_at = Instant::now();
        let mut answer = timeout(TIMEOUT, subscription.find()).await;
        if !matches!(answer, Ok(Ok(_))) {
            sleep(GAP).await;
            answer = timeout(TIMEOUT, subscription.find()).await;
        }
        match answer {
            Ok(Ok(Some(found))) if is_orphan(&found) != subscription.is_orphaned => {
                return state.lost.set(TOPIC_GONE);
            }
            Ok(Ok(Some(_))) => sleep(GAP).await,
            Ok(Ok(None)) => return state.fail("the subscription is gone"),
            Ok(Err(why)) => return state.fail(describe(&why)),
            // A system that stalls may continue its stream later.
            Err(_) => return state.lost.set("no answer to a probe"),
        }
    }
}
