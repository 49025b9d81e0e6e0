//! One task per connection sends acks and naks, and extends the ack wait of deliveries that take
//! long.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_nats::{Client, PublishError, Subject, jetstream::AckKind};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::debug;
use tracing_mutex::parkinglot::Mutex;

use super::ACK_PENDING_MAX;
use crate::delivery::Verdict;

/// How long an ack waits for others, so that they share a write.
const LINGER: Duration = Duration::from_millis(1);

/// Takes the verdicts. Clones share one task.
#[derive(Clone)]
pub struct Settler {
    unacked: Arc<Mutex<UnackedTable>>,
    requests: mpsc::Sender<AckRequest>,
}

/// The deliveries without a verdict.
#[derive(Default)]
struct UnackedTable {
    next_key: u64,
    messages: HashMap<u64, Unacked>,
}

struct Unacked {
    reply: Subject,
    /// When the server last extended its ack wait.
    extended: Instant,
}

enum AckRequest {
    Send(Subject, AckKind),
    /// Answered once all earlier requests are with the client.
    Flush(oneshot::Sender<()>),
}

/// Makes a settler and its task, which runs until the connection ends. `ack_wait` is the
/// consumer's.
pub fn new(client: Client, ack_wait: Duration) -> (Settler, impl Future<Output = ()> + Send) {
    // Each request settles one unacked message, so the channel is never full.
    let (requests, inbox) = mpsc::channel(usize::try_from(ACK_PENDING_MAX).unwrap_or(usize::MAX));
    let unacked = Arc::default();
    let settler = Settler {
        unacked: Arc::clone(&unacked),
        requests,
    };
    (settler, run(client, inbox, unacked, ack_wait))
}

impl Settler {
    /// Extends the ack wait of the message with this `reply` until the returned function gets the
    /// verdict.
    pub fn track(&self, reply: Subject) -> impl FnOnce(Verdict) + Send + 'static {
        let settler = self.clone();
        let extended = Instant::now();
        let mut unacked = self.unacked.lock();
        let key = unacked.next_key;
        unacked.next_key += 1;
        unacked.messages.insert(key, Unacked { reply, extended });
        move |verdict| settler.settle(key, verdict)
    }

    /// Messages without a verdict.
    pub fn unsettled(&self) -> usize {
        self.unacked.lock().messages.len()
    }

    fn settle(&self, key: u64, verdict: Verdict) {
        // It is absent if `close` has given it back.
        let Some(Unacked { reply, .. }) = self.unacked.lock().messages.remove(&key) else {
            return;
        };
        let kind = match verdict {
            Verdict::Ack => AckKind::Ack,
            Verdict::RetryAfter(delay) => AckKind::Nak(Some(delay)),
            Verdict::Reject => AckKind::Term,
            Verdict::Unsettled => AckKind::Nak(None),
        };
        let request = AckRequest::Send(reply, kind);
        if self.requests.try_send(request).is_err() {
            debug!("the connection is closed: a message is redelivered instead of acked");
        }
    }

    /// Naks all unacked messages. Returns when the client has these naks and all earlier acks.
    pub async fn nak_all(&self) {
        let unacked = std::mem::take(&mut self.unacked.lock().messages);
        let (done, flushed) = oneshot::channel();
        let naks = unacked
            .into_values()
            .map(|unacked| AckRequest::Send(unacked.reply, AckKind::Nak(None)));
        for request in naks.chain([AckRequest::Flush(done)]) {
            if self.requests.send(request).await.is_err() {
                return;
            }
        }
        // An error means that the task has ended, and there is nothing to wait for.
        flushed.await.ok();
    }
}

async fn run(
    client: Client,
    mut inbox: mpsc::Receiver<AckRequest>,
    unacked: Arc<Mutex<UnackedTable>>,
    ack_wait: Duration,
) {
    let mut rounds = interval(ack_wait / 6);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            first = inbox.recv() => match first {
                Some(first) => {
                    sleep(LINGER).await;
                    send_batch(&client, first, &mut inbox).await
                }
                None => return,
            },
            _ = rounds.tick() => extend(&client, &unacked, ack_wait / 3).await,
        };
        if let Err(why) = sent {
            debug!(reason = %why, "acks cannot be sent: their messages are redelivered");
            return;
        }
    }
}

/// Sends `first` and the requests that wait now, but no later ones: [`run`] must get to extend ack
/// waits.
async fn send_batch(
    client: &Client,
    first: AckRequest,
    inbox: &mut mpsc::Receiver<AckRequest>,
) -> Result<(), PublishError> {
    let waiting = inbox.len();
    let others = std::iter::from_fn(|| inbox.try_recv().ok()).take(waiting);
    for request in std::iter::once(first).chain(others) {
        match request {
            AckRequest::Send(reply, kind) => client.publish(reply, kind.into()).await?,
            // This fails if the caller has given up waiting.
            AckRequest::Flush(done) => drop(done.send(())),
        }
    }
    Ok(())
}

/// Extends each ack wait that was not extended for `quiet`.
async fn extend(
    client: &Client,
    unacked: &Mutex<UnackedTable>,
    quiet: Duration,
) -> Result<(), PublishError> {
    let now = Instant::now();
    let late: Vec<_> = unacked
        .lock()
        .messages
        .values_mut()
        .filter(|unacked| now - unacked.extended >= quiet)
        .map(|unacked| {
            unacked.extended = now;
            unacked.reply.clone()
        })
        .collect();
    for reply in late {
        client.publish(reply, AckKind::Progress.into()).await?;
    }
    Ok(())
}
