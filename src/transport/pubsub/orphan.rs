//! A subscription whose topic was deleted. It still has the messages that were not delivered, and
//! cannot be given another topic.
//!
//! A connection to such a subscription delivers what is left and publishes nothing. Once the
//! subscription is empty it is deleted, and the next connection creates both anew.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::time::{Instant, sleep, timeout};

use super::{
    PROBE_TIMEOUT, State,
    declare::{DeclaredSubscription, describe},
    stream::MessageStream,
};

pub(super) const REASON: &str = "the topic was deleted: the lane first delivers what its subscription still has, then creates both anew";
/// Pub/Sub does not tell how many messages a subscription has. It is empty once nothing has come
/// for its ack deadline and this: a message that another node has held comes again by then.
const MARGIN: Duration = Duration::from_secs(5);
/// Nodes do not delete it at the same moment.
const JITTER_MS: u64 = 2000;
const STEP: Duration = Duration::from_millis(250);

/// Ends when the subscription is deleted, and the connection lost.
pub(super) async fn drain(
    subscription: &DeclaredSubscription,
    stream: &MessageStream,
    state: &State,
) {
    let jitter = Duration::from_millis(fastrand::u64(0..JITTER_MS));
    let quiet = subscription.ack_deadline + MARGIN + jitter;
    let mut received = 0;
    let mut idle_since = Instant::now();
    loop {
        sleep(STEP).await;
        let before = std::mem::replace(&mut received, state.received.load(Relaxed));
        if received != before || !stream.is_idle() {
            idle_since = Instant::now();
        }
        if idle_since.elapsed() < quiet {
            continue;
        }
        match timeout(PROBE_TIMEOUT, subscription.delete_orphan()).await {
            Ok(Ok(())) => return state.fail("the subscription of the deleted topic is empty"),
            Ok(Err(why)) => return state.fail(describe(&why)),
            Err(_) => {
                return state
                    .lost
                    .set("no answer to the deletion of the subscription");
            }
        }
    }
}
