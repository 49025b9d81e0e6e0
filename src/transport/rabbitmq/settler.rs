//! Tells the broker what became of deliveries.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::{try_join, try_join_all};
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{super::PREFETCH, Life};
use crate::delivery::Verdict;

/// How long a settlement waits for others: one acknowledgement does for all below the lowest tag that is not settled.
const LINGER: Duration = Duration::from_millis(1);
/// The broker sends again at once what is given back: this keeps a fault that repeats from becoming a hot loop.
const PAUSE: Duration = Duration::from_millis(200);
/// How long it may take to write settlements to the socket.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) enum Settlement {
    /// The delivery of that tag has ended like this.
    Of(u64, Verdict),
    /// Answered once all that was said before it is written.
    Flush(oneshot::Sender<()>),
}

/// Writes settlements until `life` ends, and ends it where that fails. `outstanding` are the tags that were handed out and
/// are not settled; this takes them out.
pub(super) async fn settle(
    channel: Channel,
    mut settlements: mpsc::UnboundedReceiver<Settlement>,
    outstanding: Arc<Mutex<BTreeSet<u64>>>,
    life: Life,
) {
    let mut batch = Vec::new();
    let mut held = BinaryHeap::new();
    loop {
        let due = held.peek().map(|&Reverse((at, _))| at);
        tokio::select! {
            _ = life.ended() => return,
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
                    held.push(Reverse((now + delay, tag)))
                }
                Settlement::Of(tag, Verdict::Unsettled) => held.push(Reverse((now + PAUSE, tag))),
                Settlement::Flush(done) => flushes.push(done),
            }
        }
        let mut nacks = Vec::new();
        while let Some(&Reverse((_, tag))) = held.peek().filter(|Reverse((at, _))| *at <= now) {
            held.pop();
            nacks.push(tag);
        }
        let acks = {
            let mut outstanding = outstanding.lock().unwrap_or_else(PoisonError::into_inner);
            let acks = Acks::plan(acks, &mut outstanding);
            nacks.retain(|tag| outstanding.remove(tag));
            acks
        };
        match timeout(WRITE_TIMEOUT, write(&channel, acks, nacks)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return life.end(why),
            Err(_) => return life.end("the broker does not take acknowledgements"),
        }
        for done in flushes {
            // Whoever asked may have gone.
            done.send(()).ok();
        }
    }
}

/// How a set of tags is acknowledged in the fewest frames.
#[derive(Debug, PartialEq, Eq)]
struct Acks {
    /// Everything up to and including this tag.
    up_to: Option<u64>,
    /// And these.
    single: Vec<u64>,
}

impl Acks {
    /// Takes `tags` out of `outstanding`. Tags below the lowest that remains there are all settled, and the client's
    /// buffer holds only higher ones than were ever handed out, so "up to" covers nothing that is alive.
    fn plan(tags: Vec<u64>, outstanding: &mut BTreeSet<u64>) -> Self {
        for tag in &tags {
            outstanding.remove(tag);
        }
        let lowest = outstanding.first().copied().unwrap_or(u64::MAX);
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
