//! The stream of messages, kept open from one connection of a lane to the next.
//!
//! The emulator ends a stream only when the client half-closes it. The client crate resets it, so
//! the emulator goes on leasing messages to the ended stream, for ten seconds each time. Measured
//! with a stream per connection: after a reconnect the first record took 10 to 30 s, against 0.1 s
//! on the first connection.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use google_cloud_pubsub::{
    Result as PubsubResult,
    client::Subscriber,
    model,
    subscriber::{ShutdownBehavior, handler::Handler},
};
use slab::Slab;
use tokio::{
    runtime::Handle,
    sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep},
};
use tracing_mutex::parkinglot::Mutex;

use super::{Access, charge, from_service};
use crate::{
    delivery::Verdict,
    transport::{Incoming, TransportError, UNSETTLED_MAX},
};

/// Limit of the messages that are ready, delivered or delayed, in KiB: 16 MiB, and so at most
/// [`LEASED_MAX`] messages. The service is asked to send far less. The emulator ignores that, and
/// sends unread messages again after each lease.
const LEASED_KIB: u32 = 16 << 10;
const CHARGE_MIN_KIB: u32 = 2;
pub(super) const LEASED_MAX: u32 = LEASED_KIB / CHARGE_MIN_KIB;
/// How long a stream waits for the next connection. Then it ends, and other nodes get its messages.
pub(super) const GRACE: Duration = Duration::from_secs(15);
/// The shortest that the service allows. Messages sent to a dead stream are redelivered after it.
const LEASE: Duration = Duration::from_secs(10);

type Messages = Pin<Box<dyn Stream<Item = PubsubResult<(model::Message, Handler)>> + Send>>;

/// One stream of messages. When it is dropped, its messages are nacked.
pub(super) struct MessageStream {
    messages: AsyncMutex<Messages>,
    /// Room for leased messages, in KiB.
    room: Arc<Semaphore>,
}

impl MessageStream {
    pub(super) async fn open(access: &Access, subscription: &str) -> Result<Self, TransportError> {
        let subscriber = Subscriber::builder()
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .build()
            .await
            .map_err(|why| TransportError::Connect(format!("subscriber: {why}")))?;
        let messages = subscriber
            .subscribe(subscription)
            .set_max_lease_extension(LEASE)
            // A lease lasts as long as its delivery lives.
            .set_max_lease(Duration::MAX)
            .set_max_outstanding_messages(UNSETTLED_MAX)
            .set_max_outstanding_bytes(i64::from(LEASED_KIB) << 10)
            // Handlers must do nothing after their stream: a restarted emulator may have given
            // their ids to other messages.
            .set_shutdown_behavior(ShutdownBehavior::NackImmediately)
            .build();
        // `unfold` keeps a pending call of `next` when its waiter is dropped. On a quiet
        // subscription that call is still opening the stream, and dropping it would leave a dead
        // stream behind.
        let messages = stream::unfold(messages, async |mut messages| {
            let next = messages.next().await?;
            Some((next, messages))
        });
        Ok(Self {
            messages: AsyncMutex::new(Box::pin(messages)),
            room: Arc::new(Semaphore::new(LEASED_KIB as usize)),
        })
    }

    /// Sends messages to `out` until it is closed or the stream fails. Returns the reason.
    pub(super) async fn read(&self, out: mpsc::Sender<Leased>) -> String {
        let mut messages = self.messages.lock().await;
        while let Some(next) = messages.next().await {
            let (message, handler) = match next {
                Ok(next) => next,
                Err(why) => return why.to_string(),
            };
            let cost = charge(message.data.len(), CHARGE_MIN_KIB, LEASED_KIB);
            // Nobody closes the semaphore.
            let Ok(permit) = Arc::clone(&self.room).acquire_many_owned(cost).await else {
                break;
            };
            let leased = Leased {
                message,
                handler,
                permit,
            };
            if out.send(leased).await.is_err() {
                break;
            }
        }
        "the stream has ended".into()
    }

    /// The most of its messages that this node holds.
    pub(super) fn in_hand(&self) -> u32 {
        let free = u32::try_from(self.room.available_permits()).unwrap_or(LEASED_KIB);
        LEASED_KIB.saturating_sub(free).div_ceil(CHARGE_MIN_KIB)
    }

    /// Whether the service may send more.
    pub(super) fn has_room(&self) -> bool {
        self.in_hand() < u32::from(UNSETTLED_MAX)
    }

    /// Nacks the messages that have come in and were not read, after the end of [`Self::read`].
    /// Returns whether more may come.
    pub(super) async fn nack_unread(&self) -> bool {
        let mut messages = self.messages.lock().await;
        for _ in 0..LEASED_MAX {
            match messages.next().now_or_never() {
                // Dropping a message nacks it.
                Some(Some(Ok(_))) => {}
                end => return end.is_none(),
            }
        }
        true
    }
}

/// The stream of the last connection, until the next one takes it. Clones share it.
#[derive(Clone, Default)]
pub(super) struct KeptStream(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    /// The number of connections so far.
    connections: u64,
    /// The stream, and when it ends unless it is taken.
    stream: Option<(Arc<MessageStream>, Instant)>,
}

impl KeptStream {
    /// Returns the number of the new connection, and the stream of the last one if it was kept.
    pub(super) fn take(&self) -> (u64, Option<Arc<MessageStream>>) {
        let mut kept = self.0.lock();
        kept.connections += 1;
        let stream = kept.stream.take();
        (kept.connections, stream.map(|(stream, _)| stream))
    }

    /// Keeps the `stream` of `connection` for [`GRACE`], unless there is a later connection. Its end
    /// is timed on `runtime`.
    pub(super) fn put(&self, connection: u64, stream: Arc<MessageStream>, runtime: &Handle) {
        let mut kept = self.0.lock();
        if kept.connections != connection {
            return;
        }
        kept.stream = Some((stream, Instant::now() + GRACE));
        drop(kept);
        let kept = self.clone();
        runtime.spawn(async move {
            sleep(GRACE).await;
            let mut kept = kept.0.lock();
            // The stream may have been taken, and kept again later.
            kept.stream.take_if(|(_, end)| *end <= Instant::now());
        });
    }
}

/// The deliveries of one connection that have no verdict.
#[derive(Default)]
pub(super) struct UnackedHandlers(Mutex<Slab<Handler>>);

impl UnackedHandlers {
    /// Nacks them. No delivery may come afterwards: its key could be one of theirs.
    pub(super) fn nack_all(&self) {
        for handler in self.0.lock().drain() {
            handler.nack();
        }
    }
}

/// A message that is leased to this node. Dropped, it is nacked.
pub(super) struct Leased {
    message: model::Message,
    handler: Handler,
    /// Its share of [`LEASED_KIB`].
    permit: OwnedSemaphorePermit,
}

impl Leased {
    /// Delays run on `runtime`.
    pub(super) fn deliver(self, unacked: &Arc<UnackedHandlers>, runtime: &Handle) -> Incoming {
        let Self {
            message,
            handler,
            permit,
        } = self;
        let attempt = handler.delivery_attempt();
        let redelivered = attempt.is_some_and(|attempt| attempt > 1);
        let key = unacked.0.lock().insert(handler);
        let unacked = Arc::clone(unacked);
        let runtime = runtime.clone();
        let settle = move |verdict| {
            // It is absent if `close` has nacked it.
            let Some(handler) = unacked.0.lock().try_remove(key) else {
                return;
            };
            match verdict {
                Verdict::Ack | Verdict::Reject => handler.ack(),
                Verdict::Unsettled => handler.nack(),
                // The service has no delayed nack, so the lease is extended until the delay is
                // over.
                Verdict::RetryAfter(delay) => {
                    runtime.spawn(async move {
                        sleep(delay).await;
                        handler.nack();
                        drop(permit);
                    });
                }
            }
        };
        Incoming::new(from_service(message), redelivered, settle)
    }
}
