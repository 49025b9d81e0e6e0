//! The stream of messages, kept open from one connection of a lane to the next.
//!
//! The emulator goes on leasing messages to a stream that was dropped, until each lease lapses: a lane that opened a new
//! stream with each connection would wait longer for its records after each restart. So one stream serves all connections,
//! on a thread of its own, because connections come and go with their arbiters. It is opened anew when it has failed, when
//! topic or subscription were, or when there is reason to think that it is dead.

#[cfg(target_os = "linux")]
use std::num::NonZeroU64;
use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
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
#[cfg(target_os = "linux")]
use rustix::thread::set_current_timer_slack;
use tokio::{
    runtime::{Builder, Handle},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{Access, TransportError, charge};
use crate::transport::PREFETCH;

/// What the feed may hold of the subscription, ready, delivered or delayed, in KiB: 16 MiB, and so no more than [`HELD_MAX`].
/// That is far beyond what the service is asked to send. The emulator sends what it has, and what is left unread for as long
/// as a lease it sends again and again.
const HELD_KIB: u32 = 16 << 10;
const HELD_CHARGE_MIN_KIB: u32 = 2;
pub(super) const HELD_MAX: u32 = HELD_KIB / HELD_CHARGE_MIN_KIB;
/// What the service may have sent that is not settled. Deliveries that wait out a delay count.
const OUTSTANDING_MAX: u32 = 4 * PREFETCH as u32;

/// How long a stream waits for the next connection before it is closed, and other nodes get what it holds.
const GRACE: Duration = Duration::from_secs(15);
/// A stream that brought nothing to a connection of this age is not trusted with the next.
const QUIET: Duration = Duration::from_secs(30);
/// How long the acks of a stream that is closed may take.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// The shortest that the service allows: what a dead stream was sent comes again after it.
const LEASE: Duration = Duration::from_secs(10);

/// How late the timers of the feed's thread may be. The client looks ten times a second whether there is something to ack, and
/// the runtime wakes twice for each look: for the slot of its timer wheel, 64 ms wide, then for the time itself. Late by a
/// slot, the two are one. A quiet feed acks as much later; what comes in wakes the thread as ever.
pub(super) const TIMER_SLACK: Duration = Duration::from_millis(64);

/// A message with the hold on it. Dropped, it is given back.
pub(super) struct Held {
    pub message: Message,
    pub handler: Handler,
    /// Its share of what the feed may hold.
    pub permit: OwnedSemaphorePermit,
}

/// Told why the stream has failed.
pub(super) type OnEnd = Box<dyn FnOnce(String) + Send>;

/// The way to the thread that holds the stream. The thread starts with the first connection and ends with this value.
#[derive(Default)]
pub(super) struct Feed {
    orders: Mutex<Option<mpsc::Sender<Attach>>>,
    distrusted: AtomicBool,
}

struct Attach {
    access: Access,
    subscription: String,
    /// Do not use the stream that is there.
    anew: bool,
    out: mpsc::Sender<Held>,
    on_end: OnEnd,
    done: oneshot::Sender<Result<Handle, String>>,
}

impl Feed {
    /// The stream is of another life of the system: the next connection opens a new one.
    pub fn distrust(&self) {
        self.distrusted.store(true, Ordering::Relaxed);
    }

    /// Sends messages to `out`, and to nobody else, until its receiver is closed or another one is attached. Returns the
    /// runtime of the feed's thread.
    ///
    /// # Errors
    /// When there can be no thread or no client.
    pub async fn attach(
        &self,
        access: &Access,
        subscription: &str,
        out: mpsc::Sender<Held>,
        on_end: OnEnd,
    ) -> Result<Handle, TransportError> {
        let failed = |why: String| TransportError::Connect(format!("subscriber: {why}"));
        let (done, attached) = oneshot::channel();
        let order = Attach {
            access: access.clone(),
            subscription: subscription.into(),
            anew: self.distrusted.swap(false, Ordering::Relaxed),
            out,
            on_end,
            done,
        };
        let orders = self.orders().map_err(|e| failed(e.to_string()))?;
        orders
            .send(order)
            .await
            .map_err(|_| failed("its thread has ended".into()))?;
        attached
            .await
            .map_err(|_| failed("its thread has ended".into()))?
            .map_err(failed)
    }

    fn orders(&self) -> std::io::Result<mpsc::Sender<Attach>> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(orders) = orders.as_ref().filter(|orders| !orders.is_closed()) {
            return Ok(orders.clone());
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (sender, receiver) = mpsc::channel(1);
        thread::Builder::new()
            .name("pubsub-feed".into())
            .spawn(move || {
                #[cfg(target_os = "linux")]
                if let Err(why) =
                    set_current_timer_slack(NonZeroU64::new(TIMER_SLACK.subsec_nanos().into()))
                {
                    tracing::debug!(%why, "timers keep the slack that they have");
                }
                runtime.block_on(run(receiver));
            })?;
        Ok(orders.insert(sender).clone())
    }
}

/// The life of the feed's thread: one connection after the other.
async fn run(mut orders: mpsc::Receiver<Attach>) {
    let budget = Arc::new(Semaphore::new(HELD_KIB as usize));
    let mut kept: Option<Line> = None;
    let mut order = orders.recv().await;
    while let Some(Attach {
        access,
        subscription,
        anew,
        out,
        on_end,
        done,
    }) = order
    {
        let inherited = kept.take().filter(|line| !anew && line.is_trusted());
        let is_inherited = inherited.is_some();
        let opened = match inherited {
            Some(line) => Ok(line),
            None => Line::open(&access, &subscription).await,
        };
        let mut line = match opened {
            Ok(line) => line,
            Err(why) => {
                // Nobody hears it if the connection was given up meanwhile.
                done.send(Err(why)).ok();
                order = orders.recv().await;
                continue;
            }
        };
        done.send(Ok(Handle::current())).ok();

        let mut end = line.serve(&mut orders, &out, &budget).await;
        if is_inherited && matches!(end, End::Failed(_)) {
            // It failed while nobody looked: no fault of this connection.
            match Line::open(&access, &subscription).await {
                Ok(opened) => {
                    line = opened;
                    end = line.serve(&mut orders, &out, &budget).await;
                }
                Err(why) => end = End::Failed(why),
            }
        }
        order = match end {
            End::Failed(why) => {
                on_end(why);
                drop(out);
                orders.recv().await
            }
            End::Replaced(next) => {
                kept = Some(line);
                next
            }
            End::Detached => {
                line.give_back();
                match timeout(GRACE, orders.recv()).await {
                    Ok(next) => {
                        kept = Some(line);
                        next
                    }
                    Err(_) => {
                        line.shut_down().await;
                        orders.recv().await
                    }
                }
            }
        };
    }
    if let Some(line) = kept {
        line.shut_down().await;
    }
}

/// Why a stream no longer serves a connection.
enum End {
    /// By the next one; by none if there will be no other.
    Replaced(Option<Attach>),
    /// It was closed.
    Detached,
    Failed(String),
}

/// What the client gives: a message, and how to settle it.
type Messages = Pin<Box<dyn Stream<Item = PubsubResult<(Message, Handler)>> + Send>>;

/// One stream of messages.
struct Line {
    messages: Messages,
    shutdown: ShutdownToken,
    /// When the present connection, or the last one, began, and whether it was sent anything.
    since: Instant,
    heard: bool,
}

impl Line {
    async fn open(access: &Access, subscription: &str) -> Result<Self, String> {
        let subscriber = Subscriber::builder()
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .build()
            .await
            .map_err(|e| e.to_string())?;
        let messages = subscriber
            .subscribe(subscription)
            .set_max_lease_extension(LEASE)
            // A delivery is held for as long as it lives.
            .set_max_lease(Duration::MAX)
            .set_max_outstanding_messages(OUTSTANDING_MAX)
            .set_max_outstanding_bytes(i64::from(HELD_KIB) << 10)
            // Handles that outlive their stream do nothing: an emulator that was restarted may have given their ids to others.
            .set_shutdown_behavior(ShutdownBehavior::NackImmediately)
            .build();
        let shutdown = messages.shutdown_token();
        // The call that waits for a message stays in `unfold` when the one who waits for it turns away: on a quiet
        // subscription it is still opening the stream, and would leave a dead one behind.
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

    async fn serve(
        &mut self,
        orders: &mut mpsc::Receiver<Attach>,
        out: &mpsc::Sender<Held>,
        budget: &Arc<Semaphore>,
    ) -> End {
        (self.since, self.heard) = (Instant::now(), false);
        loop {
            let next = tokio::select! {
                biased;
                next = orders.recv() => return End::Replaced(next),
                () = out.closed() => return End::Detached,
                next = self.messages.next() => next,
            };
            let (message, handler) = match next {
                Some(Ok(next)) => next,
                Some(Err(e)) => return End::Failed(e.to_string()),
                None => return End::Failed("the stream has ended".into()),
            };
            self.heard = true;
            let cost = charge(message.data.len(), HELD_CHARGE_MIN_KIB, HELD_KIB);
            let room = async {
                let permit = Arc::clone(budget).acquire_many_owned(cost).await.ok()?;
                Some((permit, out.reserve().await.ok()?))
            };
            tokio::select! {
                biased;
                next = orders.recv() => return End::Replaced(next),
                () = out.closed() => return End::Detached,
                room = room => match room {
                    Some((permit, slot)) => slot.send(Held { message, handler, permit }),
                    None => return End::Detached,
                },
            }
        }
    }

    /// Gives back what has come in and was not handed on.
    fn give_back(&mut self) {
        for _ in 0..HELD_MAX {
            if !matches!(self.messages.next().now_or_never(), Some(Some(Ok(_)))) {
                break;
            }
        }
    }

    /// Waits until what was settled has arrived and the rest is given back.
    async fn shut_down(self) {
        // In vain where the system is away; it then has nothing to be told.
        timeout(SHUTDOWN_TIMEOUT, self.shutdown.shutdown())
            .await
            .ok();
    }
}
