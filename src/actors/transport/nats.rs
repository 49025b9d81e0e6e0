//! NATS JetStream: a file-backed work-queue stream and a durable pull consumer with explicit acks.
//!
//! One client per connection: it does not reconnect by itself, so that what was under way when it broke is given back by the lane
//! rather than hidden in the client's buffers. A message that was published twice under one id within the stream's duplicate
//! window is stored once.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_nats::{
    Client, ConnectOptions, Event, HeaderMap, HeaderValue, ServerAddr, Subject,
    jetstream::{
        AckKind, Context, Message,
        consumer::{
            AckPolicy,
            pull::{Config as ConsumerConfig, MessagesErrorKind, Stream as Messages},
        },
        context::{ContextBuilder, PublishErrorKind},
        stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{debug, warn};

use super::{Broker, CLOSE_TIMEOUT, PREFETCH, Transport, TransportError, header};
use crate::{
    config,
    delivery::{Delivery, LaneId, Verdict},
    record::{Origin, Record},
};

/// By this header the stream tells duplicates.
const MESSAGE_ID: &str = "Nats-Msg-Id";
/// How long the server may take for a request; a publish is given less by its lane.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(3);
/// A silent peer is noticed after two pings, or two heartbeats of the pull, whichever come first.
const PING: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_secs(2);
const HEARTBEATS_MISSED_MAX: u32 = 2;
/// A pull request that got lost heals itself after this.
const PULL_EXPIRES: Duration = Duration::from_secs(5);
/// Publishes that wait for their confirm.
const PUBLISHES_MAX: usize = 16_384;
/// A record that is published again within this, under its id, is stored once.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);
/// The server takes a message for lost when it was not settled for so long; while a delivery lives it is told otherwise.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Messages that may be unsettled, over all nodes: those that wait for a later try count too.
const ACK_PENDING_MAX: i64 = 16_384;

/// One connection.
pub struct Nats {
    context: Context,
    subject: Subject,
    messages: tokio::sync::Mutex<Option<Messages>>,
    held: Held,
    orders: mpsc::Sender<Order>,
    /// Why the connection is no longer of use.
    lost: watch::Sender<Option<String>>,
    broker: Broker,
}

/// Where each unsettled delivery is acknowledged, and when the server last heard of it.
type Held = Arc<Mutex<HashMap<u64, (Subject, Instant)>>>;

fn lock(held: &Held) -> MutexGuard<'_, HashMap<u64, (Subject, Instant)>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Order {
    Acknowledge(Subject, AckKind),
    /// Everything ordered so far is on its way to the server when the answer comes. The pump ends.
    Close(oneshot::Sender<()>),
}

impl Transport for Nats {
    const LANE: LaneId = LaneId::Nats;
    type Settings = config::Nats;

    async fn connect(settings: &config::Nats) -> Result<Self, TransportError> {
        let lost = watch::Sender::new(None);
        let client = connect(settings, lost.clone()).await?;
        let context = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .ack_timeout(REQUEST_TIMEOUT)
            .max_ack_inflight(PUBLISHES_MAX)
            .build(client.clone());
        let (messages, warnings) = declare(&context, settings).await?;
        let held = Held::default();
        // Each order settles a delivery, and there are no more of those.
        let (orders, inbox) = mpsc::channel(usize::try_from(ACK_PENDING_MAX).unwrap_or(usize::MAX) + 1);
        tokio::spawn(pump(client.clone(), inbox, Arc::clone(&held)));
        Ok(Self {
            broker: Broker { version: Some(client.server_info().version), warnings },
            context,
            subject: settings.subject.as_str().into(),
            messages: tokio::sync::Mutex::new(Some(messages)),
            held,
            orders,
            lost,
        })
    }

    async fn publish(&self, record: &Record) -> Result<(), TransportError> {
        let headers = headers(record)?;
        let failed = |why: async_nats::jetstream::context::PublishError| match why.kind() {
            // The stream was deleted, or the connection: connecting anew mends both.
            PublishErrorKind::StreamNotFound | PublishErrorKind::BrokenPipe => TransportError::Lost(why.to_string()),
            _ => TransportError::Publish(why.to_string()),
        };
        let confirm = self.context.publish_with_headers(self.subject.clone(), headers, record.body.clone());
        confirm.await.map_err(failed)?.await.map_err(failed)?;
        Ok(())
    }

    async fn next(&self) -> Result<Delivery, TransportError> {
        let mut lost = self.lost.subscribe();
        let mut messages = self.messages.lock().await;
        let mut missed = 0;
        loop {
            let item = tokio::select! {
                biased;
                why = lost.wait_for(Option::is_some) => {
                    let why = why.ok().and_then(|why| why.clone());
                    return Err(TransportError::Lost(why.unwrap_or_else(|| "closed".into())));
                }
                item = async { messages.as_mut()?.next().await } => item,
            };
            match item {
                Some(Ok(message)) => return Ok(self.deliver(message)),
                Some(Err(why))
                    if why.kind() == MessagesErrorKind::MissingHeartbeat && missed + 1 < HEARTBEATS_MISSED_MAX =>
                {
                    missed += 1;
                }
                Some(Err(why)) => return Err(TransportError::Lost(why.to_string())),
                None => return Err(TransportError::Lost("the consumer's messages have ended".into())),
            }
        }
    }

    async fn close(&self) {
        // Ends a `next` that waits, which holds the lock.
        self.lost.send_replace(Some("closed".into()));
        let close = async {
            if let Some(mut messages) = self.messages.lock().await.take() {
                // What lies in the client's buffer goes back at once, not after the ack wait.
                for _ in 0..2 * PREFETCH {
                    let Some(Some(Ok(message))) = messages.next().now_or_never() else { break };
                    drop(self.deliver(message));
                }
            }
            let unsettled: Vec<_> = lock(&self.held).drain().map(|(_, (reply, _))| reply).collect();
            for reply in unsettled {
                if self.orders.send(Order::Acknowledge(reply, AckKind::Nak(None))).await.is_err() {
                    return;
                }
            }
            let (done, flushed) = oneshot::channel();
            if self.orders.send(Order::Close(done)).await.is_ok() && flushed.await.is_err() {
                debug!("the connection broke while it closed");
            }
        };
        if timeout(CLOSE_TIMEOUT, close).await.is_err() {
            warn!("NATS did not take the last acknowledgements in time; their messages come again");
        }
    }

    fn broker(&self) -> Broker {
        self.broker.clone()
    }
}

impl Nats {
    fn deliver(&self, message: Message) -> Delivery {
        let redelivered = message.info().is_ok_and(|info| info.delivered > 1);
        let message = message.message;
        let text = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str());
        let record = Record {
            id: text(header::ID).or_else(|| text(MESSAGE_ID)).map_or_else(Record::new_id, Arc::from),
            traceparent: text(header::TRACEPARENT).map(Arc::from),
            origin: text(header::ORIGIN).and_then(Origin::parse),
            body: message.payload.clone(),
        };
        let Some(reply) = message.reply else {
            // JetStream always asks for an ack; a message without it needs none.
            return Delivery::new(record, redelivered, |_| {});
        };
        let key = fastrand::u64(..);
        lock(&self.held).insert(key, (reply, Instant::now()));
        let (held, orders) = (Arc::clone(&self.held), self.orders.clone());
        Delivery::new(record, redelivered, move |verdict| {
            // Not there any more: the connection was closed and has given it back.
            let Some((reply, _)) = lock(&held).remove(&key) else { return };
            let kind = match verdict {
                Verdict::Ack => AckKind::Ack,
                Verdict::RetryAfter(delay) => AckKind::Nak(Some(delay)),
                Verdict::Reject => AckKind::Term,
                Verdict::Unsettled => AckKind::Nak(None),
            };
            if orders.try_send(Order::Acknowledge(reply, kind)).is_err() {
                debug!("an acknowledgement met a closed connection; its message comes again");
            }
        })
    }
}

/// Sends acknowledgements in their order, and tells the server of those that take long.
async fn pump(client: Client, mut inbox: mpsc::Receiver<Order>, held: Held) {
    let mut rounds = interval(ACK_WAIT / 6);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            order = inbox.recv() => match order {
                Some(Order::Acknowledge(reply, kind)) => client.publish(reply, kind.into()).await,
                Some(Order::Close(done)) => {
                    // A connection that is gone has nothing to flush; the client forgets what it could not send.
                    client.flush().await.ok();
                    done.send(()).ok();
                    return;
                }
                None => return,
            },
            _ = rounds.tick() => extend(&client, &held).await,
        };
        if let Err(why) = sent {
            debug!(%why, "acknowledgements cannot be sent; their messages come again");
            return;
        }
    }
}

/// Extends the hold on what the server has not heard of for a third of the ack wait.
async fn extend(client: &Client, held: &Held) -> Result<(), async_nats::PublishError> {
    let now = Instant::now();
    let late: Vec<_> = lock(held)
        .values_mut()
        .filter(|(_, heard)| now - *heard >= ACK_WAIT / 3)
        .map(|(reply, heard)| {
            *heard = now;
            reply.clone()
        })
        .collect();
    for reply in late {
        client.publish(reply, AckKind::Progress.into()).await?;
    }
    Ok(())
}

fn headers(record: &Record) -> Result<HeaderMap, TransportError> {
    let value = |text: &str| {
        text.parse::<HeaderValue>().map_err(|_| TransportError::Publish(format!("{text:?} cannot be a header")))
    };
    let mut headers = HeaderMap::new();
    headers.insert(MESSAGE_ID, value(&record.id)?);
    headers.insert(header::ID, value(&record.id)?);
    if let Some(origin) = &record.origin {
        headers.insert(header::ORIGIN, value(&origin.to_string())?);
    }
    if let Some(traceparent) = &record.traceparent {
        headers.insert(header::TRACEPARENT, value(traceparent)?);
    }
    Ok(headers)
}

fn cannot(why: impl ToString) -> TransportError {
    TransportError::Connect(why.to_string())
}

async fn connect(settings: &config::Nats, lost: watch::Sender<Option<String>>) -> Result<Client, TransportError> {
    let servers = settings.url.split(',').map(|url| url.trim().parse::<ServerAddr>().map_err(cannot));
    let servers = servers.collect::<Result<Vec<_>, _>>()?;
    let read = |file: &Path| fs::read_to_string(file).map_err(|why| cannot(format!("{}: {why}", file.display())));
    let mut options = ConnectOptions::new()
        .name("waypost")
        .connection_timeout(CONNECTION_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING)
        // 0 would be no limit. One more try is what a broken client makes before it ends.
        .max_reconnects(1)
        .event_callback(move |event| {
            let why = match event {
                Event::Disconnected | Event::Closed | Event::LameDuckMode => Some(event.to_string()),
                _ => None,
            };
            if let Some(why) = why {
                lost.send_if_modified(|lost| lost.is_none() && lost.replace(why).is_none());
            }
            std::future::ready(())
        });
    if let Some(file) = &settings.creds_file {
        options = options.credentials(&read(file)?).map_err(cannot)?;
    }
    if let Some(file) = &settings.token_file {
        options = options.token(read(file)?.trim().to_owned());
    }
    if let Some(file) = &settings.password_file {
        let user = servers.iter().find_map(ServerAddr::username);
        let user = user.ok_or_else(|| cannot("password_file needs a user in the URL"))?;
        options = options.user_and_password(user.to_owned(), read(file)?.trim().to_owned());
    }
    if let Some(file) = &settings.ca_file {
        options = options.add_root_certificates(file.clone());
    }
    if let (Some(certificate), Some(key)) = (&settings.cert_file, &settings.key_file) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options.connect(servers).await.map_err(cannot)
}

/// Creates what is missing, checks what is there, and begins to pull.
async fn declare(context: &Context, settings: &config::Nats) -> Result<(Messages, Vec<String>), TransportError> {
    let stream = context.get_or_create_stream(StreamConfig {
        name: settings.stream.clone(),
        subjects: vec![settings.subject.clone()],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        num_replicas: settings.replicas,
        duplicate_window: DUPLICATE_WINDOW,
        ..StreamConfig::default()
    });
    let stream = stream.await.map_err(cannot)?;
    let info = stream.cached_info();
    let name = &settings.stream;
    if let Some(difference) = stream_difference(&info.config, &settings.subject) {
        return Err(cannot(format!("stream {name} exists, and {difference}")));
    }
    let consumer = stream.get_or_create_consumer(
        &settings.durable,
        ConsumerConfig {
            durable_name: Some(settings.durable.clone()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: ACK_PENDING_MAX,
            ..ConsumerConfig::default()
        },
    );
    let consumer = consumer.await.map_err(cannot)?;
    let found = &consumer.cached_info().config;
    if let Some(difference) = consumer_difference(found) {
        return Err(cannot(format!("consumer {} of stream {name} exists, and {difference}", settings.durable)));
    }
    let mut warnings = Vec::new();
    if info.config.storage == StorageType::Memory {
        warnings.push(format!("stream {name} is in memory: what was confirmed is gone when the server ends"));
    }
    if info.cluster.is_some() && info.config.num_replicas < 2 {
        warnings.push(format!("stream {name} has one replica: what was confirmed is as safe as one server's disk"));
    }
    if info.config.duplicate_window < DUPLICATE_WINDOW {
        warnings.push(format!("stream {name} knows duplicates for {:?} only", info.config.duplicate_window));
    }
    let messages = consumer
        .stream()
        .max_messages_per_batch(usize::from(PREFETCH))
        .heartbeat(HEARTBEAT)
        .expires(PULL_EXPIRES)
        .messages();
    Ok((messages.await.map_err(cannot)?, warnings))
}

/// What of a stream that exists would lose records.
fn stream_difference(found: &StreamConfig, subject: &str) -> Option<String> {
    let limited = found.max_messages > 0 || found.max_bytes > 0 || found.max_messages_per_subject > 0;
    if found.retention != RetentionPolicy::WorkQueue {
        Some(format!("its retention is {:?}, not WorkQueue", found.retention))
    } else if !found.subjects.iter().any(|taken| taken == subject) {
        Some(format!("its subjects are {:?}, without {subject}", found.subjects))
    } else if !found.max_age.is_zero() {
        Some(format!("its max_age of {:?} drops messages", found.max_age))
    } else if limited && found.discard == DiscardPolicy::Old {
        Some("its limits with discard Old drop messages".into())
    } else if found.no_ack {
        Some("its no_ack leaves messages unconfirmed".into())
    } else {
        None
    }
}

/// What of a consumer that exists would lose records.
fn consumer_difference(found: &async_nats::jetstream::consumer::Config) -> Option<String> {
    if found.deliver_subject.is_some() {
        Some("it is a push consumer".into())
    } else if found.ack_policy != AckPolicy::Explicit {
        Some(format!("its ack policy is {:?}, not Explicit", found.ack_policy))
    } else if found.max_deliver > 0 {
        Some(format!("it gives a message up after {} deliveries", found.max_deliver))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_would_lose_records_is_told_apart() {
        let good = StreamConfig {
            subjects: vec!["a".into(), "b".into()],
            retention: RetentionPolicy::WorkQueue,
            discard: DiscardPolicy::New,
            max_messages: 10,
            ..StreamConfig::default()
        };
        assert_eq!(stream_difference(&good, "b"), None);
        for (bad, names) in [
            (StreamConfig { retention: RetentionPolicy::Limits, ..good.clone() }, "retention"),
            (StreamConfig { subjects: vec!["c".into()], ..good.clone() }, "subjects"),
            (StreamConfig { max_age: Duration::from_secs(1), ..good.clone() }, "max_age"),
            (StreamConfig { discard: DiscardPolicy::Old, ..good.clone() }, "discard"),
            (StreamConfig { no_ack: true, ..good.clone() }, "no_ack"),
        ] {
            let difference = stream_difference(&bad, "b").unwrap_or_default();
            assert!(difference.contains(names), "{names}: {difference}");
        }
    }

    #[test]
    fn a_consumer_that_would_lose_records_is_told_apart() {
        let good = async_nats::jetstream::consumer::Config { max_deliver: -1, ..Default::default() };
        assert_eq!(consumer_difference(&good), None);
        for (bad, names) in [
            (async_nats::jetstream::consumer::Config { ack_policy: AckPolicy::None, ..good.clone() }, "ack policy"),
            (async_nats::jetstream::consumer::Config { max_deliver: 20, ..good.clone() }, "20 deliveries"),
            (async_nats::jetstream::consumer::Config { deliver_subject: Some("x".into()), ..good.clone() }, "push"),
        ] {
            let difference = consumer_difference(&bad).unwrap_or_default();
            assert!(difference.contains(names), "{names}: {difference}");
        }
    }
}
