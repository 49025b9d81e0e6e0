//! A subscription whose topic was deleted. It still has the messages that were not delivered, and
//! cannot be given another topic.
//!
//! A connection to such a subscription delivers what is left and publishes nothing. Once the
//! subscription is empty it is deleted, and the next connection creates both anew.
//!
//! Pub/Sub does not tell how many messages a subscription has. It is taken to be empty once nothing
//! has come here for a while, and no other node has said meanwhile that it holds messages. A node
//! says so by a new mark on the subscription every [`LOOK`]. If it dies or is cut off, its marks
//! end, and its messages come again within the ack deadline. If its lane ends, its stream may hold
//! messages for [`GRACE`] before. Only the emulator may hold them for longer: it leases messages to
//! a stream that was reset.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::{
    declare::{DeclaredSubscription, describe},
    probe::{State, TIMEOUT},
    stream::{GRACE, MessageStream},
};
use crate::lane_id::LaneId;

pub(super) const REASON: &str = "the topic was deleted: the lane first delivers what its subscription still has, then creates both anew";
/// What another node has held comes again within the ack deadline, [`GRACE`] and this.
const MARGIN: Duration = Duration::from_secs(5);
/// Nodes do not delete it at the same moment.
const JITTER_MS: u64 = 2000;
const STEP: Duration = Duration::from_millis(250);
/// How often a node marks the subscription, or looks for the marks of others.
const LOOK: Duration = Duration::from_secs(2);

/// Ends when the subscription is deleted, and the connection lost.
pub(super) async fn drain(
    subscription: &DeclaredSubscription,
    stream: &MessageStream,
    state: &State,
) {
    let jitter = Duration::from_millis(fastrand::u64(0..JITTER_MS));
    let quiet = subscription.ack_deadline + GRACE + MARGIN + jitter;
    let mut received = 0;
    let mut mark = None;
    let mut looked_at = None::<Instant>;
    let mut idle_since = Instant::now();
    let mut is_marked = true;
    loop {
        sleep(STEP).await;
        let before = std::mem::replace(&mut received, state.received.load(Relaxed));
        let holds = received != before || stream.in_hand() > 0;
        if holds {
            idle_since = Instant::now();
        }
        if looked_at.is_some_and(|at| at.elapsed() < LOOK) {
            continue;
        }
        looked_at = Some(Instant::now());
        if holds {
            let marked = timeout(TIMEOUT, subscription.mark()).await;
            let failure = marked.map_or(Some("no answer".into()), |marked| {
                marked.err().map(|why| describe(&why))
            });
            if let Some(why) = failure.filter(|_| is_marked) {
                is_marked = false;
                warn!(
                    lane = %LaneId::Pubsub,
                    reason = why,
                    "the subscription of the deleted topic cannot be updated: another node may \
                     delete it while this one holds its records"
                );
            }
            continue;
        }
        // The probe tells of failures.
        let Ok(Ok(Some(found))) = timeout(TIMEOUT, subscription.find()).await else {
            continue;
        };
        let earlier = mark.replace(found.message_retention_duration);
        if earlier != mark {
            idle_since = Instant::now();
        }
        if idle_since.elapsed() < quiet {
            continue;
        }
        let _deletion = state.deletion.lock().await;
        match timeout(TIMEOUT, subscription.delete_orphan()).await {
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
