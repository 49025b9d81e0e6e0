//! Google Cloud Pub/Sub, or its emulator.
//!
//! A publisher, its probe and the deliveries belong to one connection. The stream of messages belongs to the settings
//! (`stream::SharedStream`), and serves the latest connection.

mod access;
mod declare;
mod stream;

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::FutureExt as _;
use google_cloud_gax::{error::rpc::Code, retry_policy::RetryPolicyExt as _};
use google_cloud_pubsub::{
    client::Publisher, error::PublishError, model, publisher::PublishFuture,
    retry_policy::RetryableErrors, subscriber::handler::Handler,
};
use tokio::{
    runtime::Handle,
    sync::{AcquireError, Mutex as AsyncMutex, Notify, OwnedSemaphorePermit, Semaphore, mpsc},
    task::AbortHandle,
    time::{sleep, timeout},
};

use self::{
    access::Access,
    declare::{Probe, PubsubAdmin},
    stream::{LEASED_MAX, Leased, SharedStream},
};
use super::{
    BrokerInfo, Headers, Incoming, Message, Transport, TransportError, lost::Lost, publish_each,
};
use crate::{config, delivery::Verdict};

/// A batch leaves when it has so many messages, or after so long.
const BATCH_MESSAGES: u32 = 200;
const BATCH_DELAY: Duration = Duration::from_millis(2);
/// The client sends a batch again and again for so long.
const RETRY_LIMIT: Duration = Duration::from_secs(5);
/// The last attempt may begin just before [`RETRY_LIMIT`].
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(7);
/// What the publisher may hold, in KiB: 32 MiB, and by [`CHARGE_MIN_KIB`] no more than 4096 messages. Its own queue has no bound.
const PUBLISHING_KIB: u32 = 32 << 10;
const CHARGE_MIN_KIB: u32 = 8;
/// The most bytes of a message that the service takes.
const MESSAGE_MAX: usize = 10_000_000;
/// How long an ack waits for others, so that together they wake the client's thread once. The client sends acks every 100 ms.
const LINGER: Duration = Duration::from_millis(10);
/// The client sends acks every 100 ms and does not say when they have arrived: one period and a slow round trip.
const FLUSH: Duration = Duration::from_millis(400);
/// While nothing comes in, the subscription is looked up so often: an outage is otherwise hidden by the client's own retries.
const PROBE_PERIOD: Duration = Duration::from_millis(2500);
/// Two probes that fail, so far apart, are an outage.
const PROBE_GAP: Duration = Duration::from_millis(300);

/// The configuration, and the stream of messages, which outlives connections. Clones share both.
#[derive(Clone)]
pub struct Settings {
    config: Arc<config::Pubsub>,
    stream: Arc<SharedStream>,
}

impl Settings {
    #[must_use]
    pub fn new(config: config::Pubsub) -> Self {
        Self {
            config: Arc::new(config),
            stream: Arc::default(),
        }
    }
}

/// One connection to one topic and one subscription of it.
pub struct Pubsub {
    publisher: Publisher,
    publishing: Arc<Semaphore>,
    ready: AsyncMutex<mpsc::Receiver<Leased>>,
    outstanding: Arc<Outstanding>,
    state: Arc<State>,
    /// Of the stream's thread. Delayed nacks run there because they must outlive the connection.
    runtime: Handle,
    probe: AbortHandle,
    info: BrokerInfo,
    stream: Arc<SharedStream>,
}

impl Transport for Pubsub {
    type Settings = Settings;

    async fn connect(settings: &Settings) -> Result<Self, TransportError> {
        let Settings { config, stream } = settings;
        let access = Access::new(config).await?;
        let (admin, declared) = PubsubAdmin::declare(&access, config).await?;
        if declared.created {
            stream.distrust();
        }
        let publisher = Publisher::builder(admin.topic())
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .set_message_count_threshold(BATCH_MESSAGES)
            .set_delay_threshold(BATCH_DELAY)
            .with_retry_policy(RetryableErrors.with_time_limit(RETRY_LIMIT))
            .build()
            .await
            .map_err(|e| TransportError::Connect(format!("publisher: {e}")))?;

        let state = Arc::<State>::default();
        let (out, ready) = mpsc::channel(LEASED_MAX as usize);
        let on_end = Arc::clone(&state);
        let on_end = Box::new(move |why| on_end.lost.set(why));
        let runtime = stream
            .attach(&access, admin.subscription(), out, on_end)
            .await?;
        let mut warnings = declared.warnings;
        if access.is_emulator {
            warnings
                .push("an emulator keeps messages in memory: it loses them when it ends".into());
        }
        let probe =
            tokio::spawn(probe(admin, Arc::clone(&state), Arc::clone(stream))).abort_handle();
        Ok(Self {
            publisher,
            publishing: Arc::new(Semaphore::new(PUBLISHING_KIB as usize)),
            ready: AsyncMutex::new(ready),
            outstanding: Arc::default(),
            state,
            runtime,
            probe,
            info: BrokerInfo {
                version: None,
                warnings,
                largest_message: MESSAGE_MAX,
            },
            stream: Arc::clone(stream),
        })
    }

    async fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        publish_each(messages, settled, async |message| self.store(message).await).await;
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let mut ready = self.ready.lock().await;
        let first = tokio::select! {
            biased;
            lost = self.lost() => return Err(lost),
            first = ready.recv() => first,
        };
        let ended = || TransportError::Lost("the stream has ended".into());
        let first = first.ok_or_else(ended)?;
        self.state.heard.store(true, Ordering::Relaxed);
        let others = std::iter::from_fn(|| ready.try_recv().ok());
        let all = std::iter::once(first).chain(others).take(max);
        let received = into.len();
        into.extend(all.map_while(|leased| self.outstanding.deliver(leased, &self.runtime)));
        // After `close` the messages go back.
        if into.len() > received {
            Ok(())
        } else {
            Err(ended())
        }
    }

    async fn lost(&self) -> TransportError {
        self.state.lost.wait().await
    }

    async fn close(&self) {
        self.probe.abort();
        // A `receive` that waits ends here, and makes way.
        self.state.lost.set("closed");
        let mut ready = self.ready.lock().await;
        ready.close();
        // A handle that is dropped gives its message back.
        while ready.try_recv().is_ok() {}
        self.outstanding.give_back();
        sleep(FLUSH).await;
    }

    fn info(&self) -> BrokerInfo {
        self.info.clone()
    }
}

impl Pubsub {
    /// Resolves when the service has given the message an id.
    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        let outcome = timeout(PUBLISH_TIMEOUT, async {
            let charge = charge(message.body.len(), CHARGE_MIN_KIB, PUBLISHING_KIB);
            let permit = Arc::clone(&self.publishing)
                .acquire_many_owned(charge)
                .await;
            let confirm = self.publisher.publish(to_service(message));
            Publishing {
                underway: Some((confirm, permit)),
                runtime: &self.runtime,
            }
            .await
        })
        .await;
        let failure = match outcome {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(_) => {
                return Err(TransportError::Publish(format!(
                    "no answer within {PUBLISH_TIMEOUT:?}"
                )));
            }
        };
        if is_not_found(&failure) {
            let why = "the topic is gone".to_owned();
            self.stream.distrust();
            self.state.lost.set(why.clone());
            return Err(TransportError::Lost(why));
        }
        self.state.suspicion.notify_one();
        Err(TransportError::Publish(failure.to_string()))
    }
}

impl Drop for Pubsub {
    fn drop(&mut self) {
        self.probe.abort();
    }
}

/// What one connection knows of its health.
#[derive(Default)]
struct State {
    lost: Lost,
    /// A message came in since the last probe.
    heard: AtomicBool,
    /// Something failed that may be an outage.
    suspicion: Notify,
}

/// Looks the subscription up while the lane is quiet, or when something failed. Ends once it has found the connection lost.
async fn probe(admin: PubsubAdmin, state: Arc<State>, stream: Arc<SharedStream>) {
    loop {
        tokio::select! {
            () = sleep(PROBE_PERIOD) => if state.heard.swap(false, Ordering::Relaxed) { continue },
            () = state.suspicion.notified() => {}
        }
        let mut answer = admin.probe().await;
        if matches!(answer, Probe::Failed(_) | Probe::Silent) {
            sleep(PROBE_GAP).await;
            answer = admin.probe().await;
        }
        match answer {
            Probe::Well => sleep(PROBE_GAP).await,
            // A system that stalls may go on later with the stream that it has.
            Probe::Silent => return state.lost.set("no answer to a probe"),
            Probe::Gone => {
                stream.distrust();
                return state.lost.set("the subscription is gone");
            }
            Probe::Failed(why) => {
                stream.distrust();
                return state.lost.set(why);
            }
        }
    }
}

/// A message that the publisher has. Dropped before its confirm, it leaves the message there, and its permit is held until the confirm
/// comes.
struct Publishing<'a> {
    underway: Option<(PublishFuture, Result<OwnedSemaphorePermit, AcquireError>)>,
    runtime: &'a Handle,
}

impl Future for Publishing<'_> {
    type Output = Result<(), PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // Only a poll after its end, which nobody should make, finds nothing.
        let Some((confirm, _)) = &mut self.underway else {
            return Poll::Ready(Err(PublishError::Shutdown));
        };
        let outcome = ready!(confirm.poll_unpin(context));
        self.underway = None;
        Poll::Ready(outcome.map(drop))
    }
}

impl Drop for Publishing<'_> {
    fn drop(&mut self) {
        if let Some((confirm, permit)) = self.underway.take() {
            self.runtime.spawn(confirm.map(|_| drop(permit)));
        }
    }
}

/// The handles of the deliveries that are not settled.
#[derive(Default)]
struct Outstanding {
    inner: parking_lot::Mutex<Handles>,
}

#[derive(Default)]
struct Handles {
    closed: bool,
    next_key: u64,
    by_key: HashMap<u64, Handler>,
    /// To be acknowledged together, each with its share of what may be leased.
    acked: Vec<(Handler, OwnedSemaphorePermit)>,
}

impl Outstanding {
    /// Nothing once it has given all back.
    fn deliver(self: &Arc<Self>, leased: Leased, runtime: &Handle) -> Option<Incoming> {
        let Leased {
            message,
            handler,
            permit,
        } = leased;
        let redelivered = handler
            .delivery_attempt()
            .is_some_and(|attempt| attempt > 1);
        let key = {
            let mut handles = self.inner.lock();
            if handles.closed {
                return None;
            }
            let key = handles.next_key;
            handles.next_key += 1;
            handles.by_key.insert(key, handler);
            key
        };
        let (outstanding, runtime) = (Arc::clone(self), runtime.clone());
        let settle = move |verdict| {
            // It is not there if `close` has given it back.
            let Some(handler) = outstanding.inner.lock().by_key.remove(&key) else {
                return;
            };
            match verdict {
                Verdict::Ack | Verdict::Reject => {
                    outstanding.acknowledge_soon((handler, permit), &runtime);
                }
                Verdict::Unsettled => handler.nack(),
                // The service has no delayed nack: its hold is kept until the delay is over.
                Verdict::RetryAfter(delay) => {
                    runtime.spawn(async move {
                        sleep(delay).await;
                        handler.nack();
                        drop(permit);
                    });
                }
            }
        };
        Some(Incoming::new(from_service(message), redelivered, settle))
    }

    /// The first of those that gather sets the time for all. If the stream's thread has ended, so has the stream, and they are redelivered.
    fn acknowledge_soon(
        self: &Arc<Self>,
        acked: (Handler, OwnedSemaphorePermit),
        runtime: &Handle,
    ) {
        let is_first = {
            let mut handles = self.inner.lock();
            handles.acked.push(acked);
            handles.acked.len() == 1
        };
        if is_first {
            let outstanding = Arc::clone(self);
            runtime.spawn(async move {
                sleep(LINGER).await;
                let acked = std::mem::take(&mut outstanding.inner.lock().acked);
                for (handler, _) in acked {
                    handler.ack();
                }
            });
        }
    }

    /// Gives back all that is not settled. From now on nothing is delivered.
    fn give_back(&self) {
        let mut handles = self.inner.lock();
        handles.closed = true;
        handles
            .acked
            .drain(..)
            .for_each(|(handler, _)| handler.ack());
        handles
            .by_key
            .drain()
            .for_each(|(_, handler)| handler.nack());
    }
}

/// What `bytes` cost of a budget of `max_kib`: never more than all of it.
fn charge(bytes: usize, min_kib: u32, max_kib: u32) -> u32 {
    u32::try_from(bytes.div_ceil(1024))
        .unwrap_or(u32::MAX)
        .clamp(min_kib, max_kib)
}

fn is_not_found(failure: &PublishError) -> bool {
    matches!(failure, PublishError::Rpc(e) if e.status().is_some_and(|status| status.code == Code::NotFound))
}

fn to_service(Message { headers, body }: &Message) -> model::Message {
    let attributes = headers.pairs();
    let attributes = attributes.map(|(name, value)| (name, value.into_owned()));
    model::Message::new()
        .set_data(body.clone())
        .set_attributes(attributes)
}

/// A message of another publisher takes the service's id, which stays the same when it comes again.
fn from_service(message: model::Message) -> Message {
    let attribute = |name: &str| message.attributes.get(name).map(String::as_str);
    Message {
        headers: Headers::read(attribute, || message.message_id.as_str().into()),
        body: message.data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_another_publisher_takes_the_id_that_the_service_gave_it() {
        let sent = Message {
            headers: Headers {
                id: "17".into(),
                origin: None,
                traceparent: None,
                bundle: None,
            },
            body: "hello".into(),
        };
        let foreign = model::Message::new().set_data("hello").set_message_id("17");
        assert_eq!(from_service(foreign), sent);
        assert_eq!(from_service(to_service(&sent)), sent);
    }

    #[test]
    fn a_charge_is_never_more_than_the_whole_budget() {
        for (bytes, cost) in [
            (0, 8),
            (8 << 10, 8),
            ((8 << 10) + 1, 9),
            (1 << 20, 64),
            (usize::MAX, 64),
        ] {
            assert_eq!(charge(bytes, 8, 64), cost, "{bytes}");
        }
    }
}
