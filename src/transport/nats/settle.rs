//! Settling: one task per connection sends the acknowledgements, and tells the server of what takes long.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, PublishError, Subject, jetstream::AckKind};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::debug;

use super::ACK_PENDING_MAX;
use crate::delivery::Verdict;

/// How long an order waits for others: what is written together, the server reads together.
const LINGER: Duration = Duration::from_millis(1);

/// Takes the verdicts. Clones are one.
#[derive(Clone)]
pub struct Settler {
    held: Arc<Mutex<Held>>,
    orders: mpsc::Sender<Order>,
}

/// The unsettled deliveries.
#[derive(Default)]
struct Held {
    next_key: u64,
    messages: HashMap<u64, Unsettled>,
}

struct Unsettled {
    reply: Subject,
    /// When the server last heard of it.
    heard: Instant,
}

enum Order {
    Acknowledge(Subject, AckKind),
    /// Answered when everything ordered before is with the client.
    Reach(oneshot::Sender<()>),
}

/// A settler, and the work that it gives: to be run until the connection ends. `ack_wait` is how long the server holds a
/// message that it does not hear of.
pub fn new(client: Client, ack_wait: Duration) -> (Settler, impl Future<Output = ()> + Send) {
    // Each order settles one of these, so there cannot be more at a time.
    let (orders, inbox) = mpsc::channel(usize::try_from(ACK_PENDING_MAX).unwrap_or(usize::MAX));
    let held = Arc::default();
    (
        Settler {
            held: Arc::clone(&held),
            orders,
        },
        run(client, inbox, held, ack_wait),
    )
}

impl Settler {
    /// Holds the message that is acknowledged at `reply`, until the verdict is given.
    pub fn hold(&self, reply: Subject) -> impl FnOnce(Verdict) + Send + 'static {
        let settler = self.clone();
        let mut held = lock(&self.held);
        let key = held.next_key;
        held.next_key += 1;
        held.messages.insert(
            key,
            Unsettled {
                reply,
                heard: Instant::now(),
            },
        );
        move |verdict| settler.settle(key, verdict)
    }

    fn settle(&self, key: u64, verdict: Verdict) {
        // Not there any more: the connection was closed and has given it back.
        let Some(Unsettled { reply, .. }) = lock(&self.held).messages.remove(&key) else {
            return;
        };
        let kind = match verdict {
            Verdict::Ack => AckKind::Ack,
            Verdict::RetryAfter(delay) => AckKind::Nak(Some(delay)),
            Verdict::Reject => AckKind::Term,
            Verdict::Unsettled => AckKind::Nak(None),
        };
        if self
            .orders
            .try_send(Order::Acknowledge(reply, kind))
            .is_err()
        {
            debug!("an acknowledgement met a closed connection; its message comes again");
        }
    }

    /// Gives back what is unsettled. Returns when that, and every verdict before it, is with the client.
    pub async fn give_back_all(&self) {
        let unsettled: Vec<_> = lock(&self.held)
            .messages
            .drain()
            .map(|(_, unsettled)| unsettled.reply)
            .collect();
        let (reached, end) = oneshot::channel();
        let naks = unsettled
            .into_iter()
            .map(|reply| Order::Acknowledge(reply, AckKind::Nak(None)));
        for order in naks.chain([Order::Reach(reached)]) {
            if self.orders.send(order).await.is_err() {
                return;
            }
        }
        // An error is the end of the task: then there is nothing to wait for.
        end.await.ok();
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run(
    client: Client,
    mut inbox: mpsc::Receiver<Order>,
    held: Arc<Mutex<Held>>,
    ack_wait: Duration,
) {
    let mut rounds = interval(ack_wait / 6);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            first = inbox.recv() => match first {
                Some(first) => {
                    sleep(LINGER).await;
                    carry_out(&client, first, &mut inbox).await
                }
                None => return,
            },
            _ = rounds.tick() => extend(&client, &held, ack_wait / 3).await,
        };
        if let Err(why) = sent {
            debug!(%why, "acknowledgements cannot be sent; their messages come again");
            return;
        }
    }
}

/// Carries out `first`, and what has come after it so far: a stream of orders must not keep `run` from extending holds.
async fn carry_out(
    client: &Client,
    first: Order,
    inbox: &mut mpsc::Receiver<Order>,
) -> Result<(), PublishError> {
    let waiting = inbox.len();
    let others = std::iter::from_fn(|| inbox.try_recv().ok()).take(waiting);
    for order in std::iter::once(first).chain(others) {
        match order {
            Order::Acknowledge(reply, kind) => client.publish(reply, kind.into()).await?,
            // Who asked may have given up waiting.
            Order::Reach(reached) => drop(reached.send(())),
        }
    }
    Ok(())
}

/// Extends the hold on what the server has not heard of for `quiet`.
async fn extend(client: &Client, held: &Mutex<Held>, quiet: Duration) -> Result<(), PublishError> {
    let now = Instant::now();
    let late: Vec<_> = lock(held)
        .messages
        .values_mut()
        .filter(|unsettled| now - unsettled.heard >= quiet)
        .map(|unsettled| {
            unsettled.heard = now;
            unsettled.reply.clone()
        })
        .collect();
    for reply in late {
        client.publish(reply, AckKind::Progress.into()).await?;
    }
    Ok(())
}
