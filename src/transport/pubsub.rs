//! Google Cloud Pub/Sub, or its emulator.
//!
//! The publisher, the probe and the deliveries belong to one connection. The stream of messages
//! goes from one connection to the next (`stream::KeptStream`).

mod access;
mod declare;
mod orphan;
mod probe;
mod retry;
mod stream;
mod unsent;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::FutureExt as _;
use google_cloud_gax::{error::rpc::Code, retry_policy::RetryPolicyExt as _};
use google_cloud_pubsub::{
    client::Publisher, error::PublishError, model, publisher::PublishFuture,
};
use tokio::{
    runtime::Handle,
    sync::{AcquireError, Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore, mpsc},
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use tracing_mutex::parkinglot::Mutex;

use self::{
    access::Access,
    declare::{DeclaredSubscription, describe},
    probe::{State, TOPIC_GONE, watch},
    retry::{RetryUnlessRefused, is_refusal},
    stream::{KeptStream, LEASED_MAX, Leased, MessageStream, UnackedHandlers},
    unsent::Unsent,
};
use super::{
    Backlog, BrokerInfo, Durability, Headers, Incoming, Inspection, Message, Remedy, Transport,
    TransportError, header, lost::Lost, publish_each,
};
use crate::{config, record::EVENT_PART};

/// A batch is sent when it has this many messages, or after this delay.
const BATCH_MESSAGES: u32 = 200;
const BATCH_DELAY: Duration = Duration::from_millis(2);
/// How long the client retries a batch.
const RETRY_LIMIT: Duration = Duration::from_secs(5);
/// The last attempt may begin just before [`RETRY_LIMIT`].
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(7);
/// Limit of the messages in the publisher, in KiB: 32 MiB, and at most 4096 messages by
/// [`CHARGE_MIN_KIB`]. The client's own queue has no limit.
const PUBLISHING_KIB: u32 = 32 << 10;
const CHARGE_MIN_KIB: u32 = 8;
/// The most bytes of a message. The service takes requests of 10 MB; the rest of the request is the
/// topic's name.
pub(super) const MAX_MESSAGE: usize = 10_000_000 - 1024;
/// The client sends acks every 100 ms and does not say when they have arrived: one period and a
/// slow round trip.
const FLUSH: Duration = Duration::from_millis(400);
/// The configuration, and the stream of messages, which outlives connections. Clones share the
/// stream.
#[derive(Clone)]
pub struct Settings {
    config: Arc<config::PubsubConfig>,
    kept: KeptStream,
    /// Subscriptions that were created: a new one has nothing that was confirmed before.
    created: Arc<AtomicU64>,
}

impl Settings {
    pub fn new(config: config::PubsubConfig) -> Self {
        Self {
            config: Arc::new(config),
            kept: KeptStream::default(),
            created: Arc::default(),
        }
    }
}

/// One connection to one topic and one subscription of it.
pub struct Pubsub {
    publisher: Publisher,
    publishing: Arc<Semaphore>,
    ready: AsyncMutex<mpsc::Receiver<Leased>>,
    unacked: Arc<UnackedHandlers>,
    state: Arc<State>,
    /// The runtime of the thread that connected. Delayed nacks outlive the connection.
    runtime: Handle,
    /// The tasks that read the stream and probe the subscription.
    tasks: [AbortHandle; 2],
    info: BrokerInfo,
    /// `None` once the connection has left it.
    stream: Mutex<Option<Arc<MessageStream>>>,
    kept: KeptStream,
    /// Its number among those that shared `kept`.
    connection: u64,
    /// See [`orphan`].
    is_orphaned: bool,
    unsent: Mutex<Unsent>,
}

impl Transport for Pubsub {
    type Settings = Settings;
    const REMEDIES: &'static [Remedy] = &[
        (
            "received unexpected message",
            "the server speaks no gRPC without TLS there: correct `endpoint`, or use https://",
        ),
        (
            "default credentials",
            "set `credentials_file`, or GOOGLE_APPLICATION_CREDENTIALS; for an emulator, `endpoint`",
        ),
        (
            "PERMISSION_DENIED",
            "the account needs roles/pubsub.editor, or somebody who has that role must create the topic and the subscription",
        ),
    ];

    fn address(settings: &Settings) -> String {
        access::endpoint(settings.config.endpoint.as_deref())
    }

    async fn inspect(settings: &Settings) -> Result<Inspection, TransportError> {
        let access = Access::new(&settings.config).await?;
        let (found, warnings) = DeclaredSubscription::inspect(&access, &settings.config).await?;
        let info = info(&access, warnings);
        Ok(Inspection { info, found })
    }

    async fn connect(settings: &Settings) -> Result<Self, TransportError> {
        let Settings {
            config,
            kept,
            created,
        } = settings;
        let access = Access::new(config).await?;
        let mut declared = DeclaredSubscription::declare(&access, config).await?;
        let is_orphaned = declared.is_orphaned;
        let created_now = u64::from(declared.is_new);
        let incarnation = created_now + created.fetch_add(created_now, Ordering::Relaxed);
        let info = BrokerInfo {
            incarnation: incarnation.to_string(),
            ..info(&access, std::mem::take(&mut declared.warnings))
        };
        let publisher = Publisher::builder(&declared.topic)
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .set_message_count_threshold(BATCH_MESSAGES)
            .set_delay_threshold(BATCH_DELAY)
            .with_retry_policy(RetryUnlessRefused.with_time_limit(RETRY_LIMIT))
            .build()
            .await
            .map_err(|e| TransportError::Connect(format!("publisher: {e}")))?;

        let (connection, kept_stream) = kept.take();
        let stream = match kept_stream {
            Some(stream) if !declared.is_new => stream,
            _ => Arc::new(MessageStream::open(&access, &declared.name).await?),
        };
        let state = Arc::<State>::default();
        let (out, ready) = mpsc::channel(LEASED_MAX as usize);
        let read = {
            let state = Arc::clone(&state);
            let stream = Arc::clone(&stream);
            async move {
                let why = stream.read(out).await;
                // A deletion ends the stream, and is the reason.
                let _deleted = state.deletion.lock().await;
                state.fail(why);
            }
        };
        let watched = watch(declared, Arc::clone(&stream), Arc::clone(&state));
        let tasks = [
            tokio::spawn(read).abort_handle(),
            tokio::spawn(watched).abort_handle(),
        ];
        Ok(Self {
            publisher,
            publishing: Arc::new(Semaphore::new(PUBLISHING_KIB as usize)),
            ready: AsyncMutex::new(ready),
            unacked: Arc::default(),
            state,
            runtime: Handle::current(),
            tasks,
            info,
            stream: Mutex::new(Some(stream)),
            kept: kept.clone(),
            connection,
            is_orphaned,
            unsent: Mutex::default(),
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
        let first = self.state.lost.guard(ready.recv()).await?;
        let Some(first) = first else {
            // The reader has ended, and gives its reason.
            return Err(self.state.lost.wait().await);
        };
        let others = std::iter::from_fn(|| ready.try_recv().ok());
        let all = std::iter::once(first).chain(others).take(max);
        let before = into.len();
        into.extend(all.map(|leased| leased.deliver(&self.unacked, &self.runtime)));
        let received = into.len() - before;
        self.state.received.fetch_add(received, Ordering::Relaxed);
        Ok(())
    }

    async fn lost(&self) -> TransportError {
        self.state.lost.wait().await
    }

    async fn close(&self) {
        // This ends a waiting `receive`, which holds the lock.
        self.state.lost.set("closed");
        let mut ready = self.ready.lock().await;
        ready.close();
        // Dropping a message nacks it.
        while ready.try_recv().is_ok() {}
        self.unacked.nack_all();
        if let Some(stream) = self.leave_stream()
            && stream.nack_unread().await
        {
            self.kept.put(self.connection, stream, &self.runtime);
        }
        sleep(FLUSH).await;
    }

    fn info(&self) -> BrokerInfo {
        self.info.clone()
    }

    /// What another node has in hand does not count: that node has taken it. Nobody can ask whether
    /// there is another node.
    async fn backlog(&self) -> Result<Backlog, String> {
        let stream = self.stream.lock().clone();
        let stream = stream.ok_or("the connection is closed")?;
        let unsent = self.unsent.lock().count(Instant::now(), stream.has_room());
        let unsent = unsent.ok_or("what the subscription has is not known yet")?;
        Ok(Backlog {
            messages: unsent + u64::from(stream.in_hand()),
            is_shared: true,
            is_exact: true,
        })
    }
}

fn info(access: &Access, mut warnings: Vec<String>) -> BrokerInfo {
    let mut outlives_power_cut = Durability::Yes;
    if access.is_emulator {
        warnings.push("an emulator keeps messages in memory: it loses them when it ends".into());
        outlives_power_cut = Durability::No {
            after: Duration::MAX,
        };
    }
    BrokerInfo {
        warnings,
        largest_message: Some(MAX_MESSAGE),
        outlives_power_cut,
        ..BrokerInfo::default()
    }
}

impl Pubsub {
    /// Resolves when the service has given the message an id.
    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        if self.is_orphaned {
            return Err(TransportError::Refused(orphan::REASON.into()));
        }
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
            Ok(Ok(())) => {
                self.unsent.lock().published += 1;
                return Ok(());
            }
            Ok(Err(failure)) => failure,
            Err(_) => {
                return Err(TransportError::Publish(format!(
                    "no answer within {PUBLISH_TIMEOUT:?}"
                )));
            }
        };
        if is_not_found(&failure) {
            // The subscription and its stream go on.
            self.state.lost.set(TOPIC_GONE);
            return Err(self.lost().await);
        }
        if let PublishError::Rpc(e) = &failure
            && is_refusal(e)
        {
            return Err(TransportError::Refused(describe(e)));
        }
        self.state.suspicion.notify_one();
        Err(TransportError::Publish(failure.to_string()))
    }

    /// Ends the tasks of the connection. Returns the stream the first time, if the next connection
    /// may have it.
    fn leave_stream(&self) -> Option<Arc<MessageStream>> {
        self.tasks.iter().for_each(AbortHandle::abort);
        let stream = self.stream.lock().take()?;
        self.state.stream_is_good().then_some(stream)
    }
}

impl Drop for Pubsub {
    fn drop(&mut self) {
        if let Some(stream) = self.leave_stream() {
            self.kept.put(self.connection, stream, &self.runtime);
        }
    }
}

/// A message in the publisher. If it is dropped before its confirm, the message stays there, and
/// its permit is held until the confirm comes.
struct Publishing<'a> {
    underway: Option<(PublishFuture, Result<OwnedSemaphorePermit, AcquireError>)>,
    runtime: &'a Handle,
}

impl Future for Publishing<'_> {
    type Output = Result<(), PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // `None` means that it was polled after its end.
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

/// The charge for `bytes` against a budget of `max_kib`, at most all of it.
fn charge(bytes: usize, min_kib: u32, max_kib: u32) -> u32 {
    u32::try_from(bytes.div_ceil(1024))
        .unwrap_or(u32::MAX)
        .clamp(min_kib, max_kib)
}

fn is_not_found(failure: &PublishError) -> bool {
    matches!(failure, PublishError::Rpc(e) if e.status().is_some_and(|status| status.code == Code::NotFound))
}

fn to_service(Message { headers, body }: &Message) -> model::Message {
    let short = headers.pairs().filter(|(name, _)| *name != header::EVENT);
    let short = short.map(|(name, value)| (name.to_owned(), value.into_owned()));
    let event = headers.event.as_deref().unwrap_or_default();
    let event = event.as_bytes().chunks(EVENT_PART).enumerate();
    let event = event.map(|(number, part)| {
        let part = String::from_utf8_lossy(part).into_owned();
        (event_part(number), part)
    });
    model::Message::new()
        .set_data(body.clone())
        .set_attributes(short.chain(event))
}

/// The name of a part of an event's attributes.
fn event_part(number: usize) -> String {
    match number {
        0 => header::EVENT.to_owned(),
        _ => format!("{}-{number}", header::EVENT),
    }
}

/// A message of another publisher gets the service's id, which is the same at each redelivery.
fn from_service(message: model::Message) -> Message {
    let part = |number| message.attributes.get(&event_part(number));
    let event: String = (0..).map_while(part).map(String::as_str).collect();
    let attribute = |name: &str| match name {
        header::EVENT => Some(&*event),
        _ => message.attributes.get(name).map(String::as_str),
    };
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
                trace: None,
                bundle: None,
                api: None,
                event: None,
            },
            body: "hello".into(),
        };
        let foreign = model::Message::new().set_data("hello").set_message_id("17");
        assert_eq!(from_service(foreign), sent);
        assert_eq!(from_service(to_service(&sent)), sent);
    }

    #[test]
    fn the_attributes_of_an_event_fit_into_those_of_a_message_however_long_they_are() {
        for length in [1, EVENT_PART, EVENT_PART + 1, 6 << 10] {
            let sent = Message {
                headers: Headers {
                    id: "1".into(),
                    origin: None,
                    trace: None,
                    bundle: None,
                    api: None,
                    event: Some("e".repeat(length).into()),
                },
                body: "{}".into(),
            };
            let message = to_service(&sent);
            assert!(message.attributes.len() <= 100);
            for (name, value) in &message.attributes {
                assert!(name.len() <= 256 && value.len() <= 1024, "{name}");
            }
            assert_eq!(from_service(message), sent);
        }
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
