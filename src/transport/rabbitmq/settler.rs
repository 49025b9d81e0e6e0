//! Sends acks and nacks.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::{try_join, try_join_all};
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing_mutex::parkinglot::Mutex;

use super::super::{PREFETCH, lost::Lost};
use crate::delivery::Verdict;

/// How long a settlement waits for others: one ack covers all tags below the lowest unsettled one.
const LINGER: Duration = Duration::from_millis(1);
/// Delay before a dropped delivery is nacked. The broker redelivers at once, so a repeating fault
/// would become a hot loop.
const NACK_DELAY: Duration = Duration::from_millis(200);
/// How long settlements may take to reach the socket.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) enum Settlement {
    /// The verdict on the delivery of that tag.
    Of(u64, Verdict),
    /// Answered once all earlier settlements are written.
    Flush(oneshot::Sender<()>),
}

/// Writes settlements until the connection is lost. `unsettled` has the tags of the deliveries that
/// were handed out; this task removes them.
pub(super) async fn settle(
    channel: Channel,
    mut settlements: mpsc::UnboundedReceiver<Settlement>,
    unsettled: Arc<Mutex<BTreeSet<u64>>>,
    lost: Lost,
) {
    let mut batch = Vec::new();
    // Tags to nack later, by due time.
    let mut delayed = BTreeSet::new();
    loop {
        let due = delayed.first().map(|&(due, _)| due);
        tokio::select! {
            _ = lost.wait() => return,
            n = settlements.recv_many(&mut batch, PREFETCH.into()) => {
                if n == 0 {
                    return;
                }
                let room = usize::from(PREFETCH) - n;
                if room > 0 {
                    sleep(LINGER).await;
                    batch.extend(std::iter::from_fn(|| settlements.try_recv().ok()).take(room));
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
        }
        let now = Instant::now();
        let mut acks = Vec::new();
        let mut flushes = Vec::new();
        for settlement in batch.drain(..) {
            match settlement {
                Settlement::Of(tag, Verdict::Ack | Verdict::Reject) => acks.push(tag),
                Settlement::Of(tag, Verdict::RetryAfter(delay)) => {
                    delayed.insert((now + delay, tag));
                }
                Settlement::Of(tag, Verdict::Unsettled) => {
                    delayed.insert((now + NACK_DELAY, tag));
                }
                Settlement::Flush(done) => flushes.push(done),
            }
        }
        let later = delayed.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut delayed, later);
        let nacks: Vec<_> = due.into_iter().map(|(_, tag)| tag).collect();
        // Before the nacked tags are removed, so that no ack covers them.
        let acks = Acks::plan(acks, &mut unsettled.lock());
        for tag in &nacks {
            unsettled.lock().remove(tag);
        }
        match timeout(WRITE_TIMEOUT, write(&channel, acks, nacks)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return lost.set(why),
            Err(_) => return lost.set("the broker does not take acknowledgements"),
        }
        for done in flushes {
            // This fails if the caller has given up waiting.
            done.send(()).ok();
        }
    }
}

/// Acks for a set of tags, in the fewest frames.
#[derive(Debug, PartialEq, Eq)]
struct Acks {
    /// One ack for this tag and all below it.
    up_to: Option<u64>,
    /// One ack for each of these tags.
    single: Vec<u64>,
}

impl Acks {
    /// Removes `tags` from `unsettled`. All tags below the lowest remaining one are settled, and
    /// undelivered messages in the client's buffer have higher tags, so "up to" covers no unsettled
    /// delivery.
    fn plan(tags: Vec<u64>, unsettled: &mut BTreeSet<u64>) -> Self {
        for tag in &tags {
            unsettled.remove(tag);
        }
        let lowest = unsettled.first().copied().unwrap_or(u64::MAX);
        let (below, single): (Vec<u64>, Vec<u64>) = tags.into_iter().partition(|&tag| tag < lowest);
        Self {
            up_to: below.into_iter().max(),
            single,
        }
    }
}

async fn write(channel: &Channel, acks: Acks, nacks: Vec<u64>) -> lapin::Result<()> {
    if let Some(tag) = acks.up_to {
        channel
            .basic_ack(tag, BasicAckOptions { multiple: true })
            .await?;
    }
    let acks = acks
        .single
        .into_iter()
        .map(|tag| channel.basic_ack(tag, BasicAckOptions::default()));
    let requeue = BasicNackOptions {
        requeue: true,
        ..BasicNackOptions::default()
    };
    let nacks = nacks
        .into_iter()
        .map(|tag| channel.basic_nack(tag, requeue));
    try_join(try_join_all(acks), try_join_all(nacks)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ack_of_many_covers_nothing_that_is_alive() {
        for (outstanding, acked, up_to, single, left) in [
            (vec![1, 2, 3], vec![1, 2, 3], Some(3), vec![], vec![]),
            (vec![1, 2, 3], vec![3, 1], Some(1), vec![3], vec![2]),
            (vec![1, 2, 3], vec![2, 3], None, vec![2, 3], vec![1]),
            (vec![4, 7, 9], vec![4, 7], Some(7), vec![], vec![9]),
            (vec![4], vec![], None, vec![], vec![4]),
        ] {
            let mut alive: BTreeSet<u64> = outstanding.iter().copied().collect();
            let acks = Acks::plan(acked.clone(), &mut alive);
            assert_eq!(acks, Acks { up_to, single }, "{outstanding:?} {acked:?}");
            assert_eq!(
                alive.into_iter().collect::<Vec<_>>(),
                left,
                "{outstanding:?} {acked:?}"
            );
        }
    }
}
