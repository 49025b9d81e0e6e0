//! The stream of messages, kept open from one connection of a lane to the next.
//!
//! The emulator leases messages to a stream that was closed, until each lease lapses. Measured with
//! a stream per connection, closed with nack: after a reconnect the first record took 10 to 25 s,
//! against 0.1 s on the first connection. So one stream serves all connections, on a thread of its
//! own because each connection lives on the thread of its lane. A new stream is opened after a
//! failure, after the topic or subscription was created, and when the old one may be dead.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use google_cloud_pubsub::{
    Result as PubsubResult,
    client::Subscriber,
    model::Message,
    subscriber::{ShutdownBehavior, ShutdownToken, handler::Handler},
};
use parking_lot::Mutex;
use tokio::{
    runtime::{Builder, Handle},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{Access, TransportError, charge};
use crate::transport::PREFETCH;

/// Limit of the messages that are ready, delivered or delayed, in KiB: 16 MiB, and so at most
/// [`LEASED_MAX`] messages. The service is asked to send far less. The emulator ignores that, and
/// sends unread messages again after each lease.
const LEASED_KIB: u32 = 16 << 10;
const CHARGE_MIN_KIB: u32 = 2;
pub(super) const LEASED_MAX: u32 = LEASED_KIB / CHARGE_MIN_KIB;
/// Messages that the service may send before they are settled, those that wait for a retry
/// included.
const OUTSTANDING_MAX: u32 = 4 * PREFETCH as u32;

/// How long a stream waits for the next connection. Then it is closed, and other nodes get its
/// messages.
const GRACE: Duration = Duration::from_secs(15);
/// A stream that brought nothing to a connection of this age is not given to the next one.
const QUIET: Duration = Duration::from_secs(30);
/// How long the last acks of a stream may take.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The shortest that the service allows. Messages sent to a dead stream are redelivered after it.
const LEASE: Duration = Duration::from_secs(10);

/// A message that is leased to this node. Dropped, it is nacked.
pub(super) struct Leased {
    pub message: Message,
    pub handler: Handler,
    /// Its share of [`LEASED_KIB`].
    pub permit: OwnedSemaphorePermit,
}

/// Called with the reason when the stream has failed.
pub(super) type OnEnd = Box<dyn FnOnce(String) + Send>;

/// Handle to the thread that owns the stream. The thread starts with the first connection and ends
/// with this value.
#[derive(Default)]
pub(super) struct SharedStream {
    attaches: Mutex<Option<mpsc::Sender<Attach>>>,
    is_distrusted: Arc<AtomicBool>,
}

/// Asks the thread to serve a new connection.
struct Attach {
    access: Access,
    subscription: String,
    /// Open a new stream even if there is one.
    anew: bool,
    out: mpsc::Sender<Leased>,
    on_end: OnEnd,
    done: oneshot::Sender<Result<Handle, String>>,
}

impl SharedStream {
    /// The next connection opens a new stream: this one may belong to a system that is gone.
    pub fn distrust(&self) {
        self.is_distrusted.store(true, Ordering::Relaxed);
    }

    /// Sends messages to `out` only, until its receiver is closed or the next connection attaches.
    /// Returns the runtime of the stream's thread.
    ///
    /// # Errors
    /// If the thread cannot start or the client cannot be built.
    pub async fn attach(
        &self,
        access: &Access,
        subscription: &str,
        out: mpsc::Sender<Leased>,
        on_end: OnEnd,
    ) -> Result<Handle, TransportError> {
        let failed = |why: String| TransportError::Connect(format!("subscriber: {why}"));
        let ended = || failed("its thread has ended".into());
        let (done, reply) = oneshot::channel();
        let attach = Attach {
            access: access.clone(),
            subscription: subscription.into(),
            anew: self.is_distrusted.swap(false, Ordering::Relaxed),
            out,
            on_end,
            done,
        };
        let attaches = self.thread().map_err(|why| failed(why.to_string()))?;
        attaches.send(attach).await.map_err(|_| ended())?;
        reply.await.map_err(|_| ended())?.map_err(failed)
    }

    /// The way to the thread, which is started if there is none.
    fn thread(&self) -> std::io::Result<mpsc::Sender<Attach>> {
        let mut attaches = self.attaches.lock();
        if let Some(attaches) = attaches.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(attaches.clone());
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (sender, receiver) = mpsc::channel(1);
        let is_distrusted = Arc::clone(&self.is_distrusted);
        thread::Builder::new()
            .name("pubsub-stream".into())
            .spawn(move || runtime.block_on(run(receiver, &is_distrusted)))?;
        Ok(attaches.insert(sender).clone())
    }
}

/// Serves one connection after the other.
async fn run(mut attaches: mpsc::Receiver<Attach>, is_distrusted: &AtomicBool) {
    let budget = Arc::new(Semaphore::new(LEASED_KIB as usize));
    let mut kept: Option<MessageStream> = None;
    let mut next = attaches.recv().await;
    while let Some(attach) = next {
        let inherited = kept
            .take()
            .filter(|stream| !attach.anew && stream.is_trusted());
        let (stream, end) = serve(attach, inherited, &mut attaches, &budget).await;
        next = match (end, stream) {
            (ServeEnd::Replaced(next), stream) => {
                kept = stream;
                next
            }
            (ServeEnd::Detached, Some(mut stream)) => {
                stream.give_back();
                // The client would resume a stream of no more use on a subscription that is created
                // meanwhile, and take its first messages.
                let is_of_use = !is_distrusted.load(Ordering::Relaxed);
                let grace = if is_of_use { GRACE } else { Duration::ZERO };
                if let Ok(next) = timeout(grace, attaches.recv()).await {
                    kept = Some(stream);
                    next
                } else {
                    stream.shut_down().await;
                    attaches.recv().await
                }
            }
            (ServeEnd::Detached | ServeEnd::Failed, _) => attaches.recv().await,
        };
    }
    if let Some(stream) = kept {
        stream.shut_down().await;
    }
}

/// Serves one connection from the stream of the last one, or from a new one. Returns a stream that
/// is still of use.
async fn serve(
    attach: Attach,
    inherited: Option<MessageStream>,
    attaches: &mut mpsc::Receiver<Attach>,
    budget: &Arc<Semaphore>,
) -> (Option<MessageStream>, ServeEnd) {
    let open = || MessageStream::open(&attach.access, &attach.subscription);
    let is_inherited = inherited.is_some();
    let opened = match inherited {
        Some(stream) => Ok(stream),
        None => open().await,
    };
    let mut stream = match opened {
        Ok(stream) => stream,
        Err(why) => {
            // This fails if the connection was given up meanwhile.
            attach.done.send(Err(why)).ok();
            return (None, ServeEnd::Failed);
        }
    };
    attach.done.send(Ok(Handle::current())).ok();

    let mut end = stream.serve(attaches, &attach.out, budget).await;
    if is_inherited && end.is_err() {
        // The stream broke between two connections. That is no failure of this one.
        end = match open().await {
            Ok(opened) => {
                stream = opened;
                stream.serve(attaches, &attach.out, budget).await
            }
            Err(why) => Err(why),
        };
    }
    match end {
        Ok(end) => (Some(stream), end),
        Err(why) => {
            (attach.on_end)(why);
            (None, ServeEnd::Failed)
        }
    }
}

/// Why a connection is no longer served.
enum ServeEnd {
    /// The next connection attached, or, with `None`, no other will.
    Replaced(Option<Attach>),
    /// The connection was closed.
    Detached,
    Failed,
}

type Messages = Pin<Box<dyn Stream<Item = PubsubResult<(Message, Handler)>> + Send>>;

/// One stream of messages.
struct MessageStream {
    messages: Messages,
    shutdown: ShutdownToken,
    /// When the latest connection began.
    since: Instant,
    /// Whether it brought that connection anything.
    heard: bool,
}

impl MessageStream {
    async fn open(access: &Access, subscription: &str) -> Result<Self, String> {
        let subscriber = Subscriber::builder()
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .build()
            .await
            .map_err(|why| why.to_string())?;
        let messages = subscriber
            .subscribe(subscription)
            .set_max_lease_extension(LEASE)
            // A lease lasts as long as its delivery lives.
            .set_max_lease(Duration::MAX)
            .set_max_outstanding_messages(OUTSTANDING_MAX)
            .set_max_outstanding_bytes(i64::from(LEASED_KIB) << 10)
            // Handlers must do nothing after their stream: a restarted emulator may have given
            // their ids to other messages.
            .set_shutdown_behavior(ShutdownBehavior::NackImmediately)
            .build();
        let shutdown = messages.shutdown_token();
        // `unfold` keeps a pending call of `next` when its waiter is dropped. On a quiet
        // subscription that call is still opening the stream, and dropping it would leave a dead
        // stream behind.
        let messages = stream::unfold(messages, async |mut messages| {
            let next = messages.next().await?;
            Some((next, messages))
        });
        Ok(Self {
            messages: Box::pin(messages),
            shutdown,
            since: Instant::now(),
            heard: false,
        })
    }

    fn is_trusted(&self) -> bool {
        self.heard || self.since.elapsed() < QUIET
    }

    /// Sends messages to `out`. An error is the reason why the stream failed.
    async fn serve(
        &mut self,
        attaches: &mut mpsc::Receiver<Attach>,
        out: &mpsc::Sender<Leased>,
        budget: &Arc<Semaphore>,
    ) -> Result<ServeEnd, String> {
        self.since = Instant::now();
        self.heard = false;
        loop {
            let next = tokio::select! {
                biased;
                next = attaches.recv() => return Ok(ServeEnd::Replaced(next)),
                () = out.closed() => return Ok(ServeEnd::Detached),
                next = self.messages.next() => next,
            };
            let next = next.ok_or("the stream has ended")?;
            let (message, handler) = next.map_err(|why| why.to_string())?;
            self.heard = true;
            let cost = charge(message.data.len(), CHARGE_MIN_KIB, LEASED_KIB);
            let room = async {
                let permit = Arc::clone(budget).acquire_many_owned(cost).await.ok()?;
                Some((permit, out.reserve().await.ok()?))
            };
            tokio::select! {
                biased;
                next = attaches.recv() => return Ok(ServeEnd::Replaced(next)),
                () = out.closed() => return Ok(ServeEnd::Detached),
                room = room => match room {
                    Some((permit, slot)) => slot.send(Leased { message, handler, permit }),
                    None => return Ok(ServeEnd::Detached),
                },
            }
        }
    }

    /// Nacks the messages that have come in and were not handed out.
    fn give_back(&mut self) {
        for _ in 0..LEASED_MAX {
            if !matches!(self.messages.next().now_or_never(), Some(Some(Ok(_)))) {
                break;
            }
        }
    }

    /// Waits until acks have arrived and all other messages are nacked.
    async fn shut_down(self) {
        // A time-out means that the system is away: its messages are redelivered after their lease.
        timeout(SHUTDOWN_TIMEOUT, self.shutdown.shutdown())
            .await
            .ok();
    }
}
