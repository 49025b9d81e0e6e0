//! NATS JetStream: a file-backed work-queue stream and a durable pull consumer with explicit acks.
//!
//! Each connection has a client of its own, which does not reconnect: the lane publishes the
//! records in flight again, instead of leaving them in the client's buffers. Three tasks serve a
//! connection: `confirm` matches confirms with publishes, `pull` pulls messages, and `settle` sends
//! acks and naks.

mod confirm;
mod consumer_check;
mod declare;
mod durability;
mod open;
mod pull;
mod seen_stream;
mod settle;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::{
    Client, HeaderMap, HeaderName, HeaderValue, PublishErrorKind, Subject,
    connection::State,
    header::NATS_MESSAGE_ID,
    jetstream::{
        self, Context,
        consumer::PullConsumer,
        context::{ConsumerInfoError, ConsumerInfoErrorKind, ContextBuilder},
        stream::{RawMessageErrorKind, Stream},
    },
};
use bytes::Bytes;
use futures_util::future::join;
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
    time::timeout,
};
use tracing::warn;

use self::{
    confirm::{Confirms, Stored},
    declare::declare,
    open::open,
    pull::Puller,
    seen_stream::SeenStream,
    settle::Settler,
};
use super::{
    Backlog, BrokerInfo, CLOSE_TIMEOUT, Durability, Headers, Incoming, Inspection, Message,
    PREFETCH, Remedy, Transport, TransportError, header, lost::Lost, publish_each,
};
use crate::{
    config,
    record::{Origin, Record, is_visible_ascii},
};

/// The most bytes of a message, unless the server's configuration sets another `max_payload`.
pub(super) const DEFAULT_MAX_PAYLOAD: usize = 1 << 20;
/// How long the server may take for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A record that is published again within this, under its id, is stored once.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);
/// The server redelivers a message that is not settled within this. [`settle`] extends it while the
/// delivery lives.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Messages that may be unsettled, over all nodes, those that wait for a retry included.
const ACK_PENDING_MAX: i64 = 16_384;
/// Pulls in flight.
const PULLS: usize = 2;
/// The most messages of one pull. As many as those of all pulls are ready meanwhile.
const PULL_MAX: usize = PREFETCH as usize / 2 / PULLS;
/// The server answers a pull within this. It is short, because a pull cannot be cancelled and
/// `close` waits for its end.
const PULL_EXPIRES: Duration = Duration::from_secs(1);

/// The configuration, and what this run has seen of the stream. Clones share that.
#[derive(Clone)]
pub struct Settings {
    config: Arc<config::NatsConfig>,
    seen: Arc<SeenStream>,
}

impl Settings {
    pub fn new(config: config::NatsConfig) -> Self {
        Self {
            config: Arc::new(config),
            seen: Arc::default(),
        }
    }
}

/// One connection.
pub struct Nats {
    client: Client,
    stream: Stream,
    consumer: PullConsumer,
    subject: Subject,
    /// Messages that were pulled, in their order.
    ready: Mutex<mpsc::Receiver<Incoming>>,
    settler: Settler,
    confirms: Confirms,
    lost: Lost,
    tasks: [JoinHandle<()>; 3],
    info: BrokerInfo,
    received: Arc<AtomicU64>,
    /// The consumer's deliveries that this connection has not received, when it last had nothing
    /// else to deliver.
    not_received: AtomicU64,
}

fn context(client: &Client) -> Context {
    let context = ContextBuilder::new().timeout(REQUEST_TIMEOUT);
    context.build(client.clone())
}

fn cannot(why: impl ToString) -> TransportError {
    TransportError::Connect(why.to_string())
}

impl Transport for Nats {
    type Settings = Settings;
    const REMEDIES: &'static [Remedy] = &[(
        "authorization violation",
        "correct the user and password of `url`, or set `token_file`, `password_file` or \
         `creds_file`",
    )];

    fn address(settings: &Settings) -> String {
        settings.config.url.to_string()
    }

    async fn connect(Settings { config, seen }: &Settings) -> Result<Self, TransportError> {
        let settings = &**config;
        let lost = Lost::default();
        let client = open(settings, lost.clone()).await?;
        let context = context(&client);
        let declared = declare(&context, settings).await?;
        let server = client.server_info();
        let stream_max = declared.stream.cached_info().config.max_message_size;
        let stream_info = declared.stream.cached_info();
        // Boxed: an HTTP exchange would make the future of each connect large.
        let judging = Box::pin(durability::judge(&client, settings, stream_info));
        let (durability, warning) = judging.await;
        let info = BrokerInfo {
            version: Some(server.version),
            warnings: declared.warnings.into_iter().chain(warning).collect(),
            largest_message: Some(largest_message(server.max_payload, stream_max)),
            outlives_power_cut: durability,
            // A server that starts anew may have lost files that it had not synced.
            incarnation: seen.found(
                format!("{} {}", server.server_id, stream_info.created),
                stream_info.state.last_sequence,
            ),
            last_message: stream_info.state.last_sequence,
        };
        let ack_wait = declared.consumer.cached_info().config.ack_wait;
        let (settler, settling) = settle::new(client.clone(), ack_wait);
        let seen = Arc::clone(seen);
        let (confirms, confirming) =
            confirm::new(&client, &settings.stream, seen, lost.clone()).await?;
        let (inbox, ready) = mpsc::channel(usize::from(PREFETCH));
        let received = Arc::<AtomicU64>::default();
        let consumer = declared.consumer.clone();
        let delivered = consumer.cached_info().delivered.consumer_sequence;
        let puller = Puller {
            context,
            stream: declared.stream.clone(),
            subject: settings.subject.clone(),
            consumer: declared.consumer,
            ready: inbox,
            received: Arc::clone(&received),
            settler: settler.clone(),
            lost: lost.clone(),
        };
        Ok(Self {
            client,
            stream: declared.stream,
            consumer,
            subject: settings.subject.as_str().into(),
            ready: Mutex::new(ready),
            settler,
            confirms,
            lost,
            tasks: [
                tokio::spawn(settling),
                tokio::spawn(puller.run()),
                tokio::spawn(confirming),
            ],
            info,
            received,
            not_received: delivered.into(),
        })
    }

    async fn inspect(Settings { config, .. }: &Settings) -> Result<Inspection, TransportError> {
        let settings = &**config;
        let client = open(settings, Lost::default()).await?;
        let context = context(&client);
        let inspected = declare::inspect(&context, settings).await?;
        let (durability, warning) = match &inspected.stream {
            Some(stream) => Box::pin(durability::judge(&client, settings, stream)).await,
            None => (Durability::default(), None),
        };
        let server = client.server_info();
        let stream_max = inspected
            .stream
            .map_or(-1, |stream| stream.config.max_message_size);
        let info = BrokerInfo {
            version: Some(server.version),
            warnings: inspected.warnings.into_iter().chain(warning).collect(),
            outlives_power_cut: durability,
            largest_message: Some(largest_message(server.max_payload, stream_max)),
            ..BrokerInfo::default()
        };
        let found = ["connected and logged in".into()];
        Ok(Inspection {
            info,
            found: found.into_iter().chain(inspected.found).collect(),
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
        match self.lost.guard(ready.recv_many(into, max)).await? {
            0 => Err(TransportError::Lost("the pulling task has ended".into())),
            _ => Ok(()),
        }
    }

    async fn lost(&self) -> TransportError {
        self.lost.wait().await
    }

    async fn close(&self) {
        // This ends a waiting `receive`, which holds the lock. The pulling ends with the pulls in
        // flight.
        self.lost.set("closed");
        let close = async {
            let mut ready = self.ready.lock().await;
            while let Some(message) = ready.recv().await {
                drop(message);
            }
            self.settler.nak_all().await;
            // The server handles the requests of a connection in their order: once it answers, it
            // has the acks.
            self.stream.get_info().await.is_ok()
        };
        if self.client.connection_state() == State::Connected
            && timeout(CLOSE_TIMEOUT, close).await != Ok(true)
        {
            warn!("NATS did not take the last acks in time: their messages are redelivered");
        }
        self.end_tasks();
    }

    fn info(&self) -> BrokerInfo {
        self.info.clone()
    }

    fn last_message(&self) -> u64 {
        self.confirms.last_message()
    }

    async fn backlog(&self) -> Result<Backlog, String> {
        let last = self.confirms.last_message();
        let (consumer, stream) = join(self.consumer.get_info(), self.stream.get_info()).await;
        let kind = consumer.as_ref().err().map(ConsumerInfoError::kind);
        if let Some(ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound) = kind
        {
            // A lane that neither publishes nor pulls would not notice. The next connection makes
            // both anew, and the node has copies of what was in them.
            let why = "the stream or the consumer was deleted";
            self.lost.set(why);
            return Err(why.into());
        }
        let consumer = consumer.map_err(|why| why.to_string())?;
        let stream = stream.map_err(|why| why.to_string())?;
        // A server of a cluster may come back with an older stream behind a connection that lives.
        if stream.state.last_sequence < last {
            self.confirms.forget_last_message();
            let why = format!("the stream has lost messages: it had number {last}");
            self.lost.set(why.as_str());
            return Err(why);
        }
        // A purge takes the messages that this node has in hand, too, and it delivers them.
        let in_hand = self.settler.unsettled().max(consumer.num_ack_pending);
        let mut messages = consumer.num_pending + in_hand as u64;
        if stream.config.subjects == [&*self.subject] {
            // The consumer may be about to skip some: see `consumer_check`.
            messages = messages.max(stream.state.messages);
        }
        let delivered = consumer.delivered.consumer_sequence;
        Ok(Backlog {
            messages,
            is_shared: consumer.num_waiting > PULLS
                || self.others_received(delivered, messages == 0),
            is_exact: true,
        })
    }
}

impl Nats {
    /// Whether another connection has received some of the messages that the consumer has
    /// `delivered`. If it has no others to deliver, none is on its way here.
    fn others_received(&self, delivered: u64, is_empty: bool) -> bool {
        let not_received = delivered.wrapping_sub(self.received.load(Relaxed));
        let since = not_received.wrapping_sub(self.not_received.load(Relaxed));
        if is_empty {
            self.not_received.store(not_received, Relaxed);
        }
        let on_their_way = if is_empty { 0 } else { PULLS * PULL_MAX };
        // Negative if more came here after the server had counted.
        since.cast_signed() > 0 && since > on_their_way as u64
    }

    /// Resolves when the message is durable in the stream.
    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        let headers = headers(&message.headers, &message.headers.id)?;
        let stored = self.send(message.body.clone(), headers).await?;
        // Rare, and boxed to keep the future of every publish small.
        if stored.duplicate
            && !Box::pin(self.lost.guard(self.has(stored.sequence, message))).await??
        {
            // The message was settled meanwhile and is published again on purpose, as a replayed
            // dead letter is; or its key was accepted again, here or at another node. The stream must
            // store it again.
            let headers = self::headers(&message.headers, &Record::new_id())?;
            Box::pin(self.send(message.body.clone(), headers)).await?;
        }
        Ok(())
    }

    async fn send(&self, body: Bytes, headers: HeaderMap) -> Result<Stored, TransportError> {
        let (reply, confirm) = self.lost.guard(self.confirms.expect()).await?;
        let subject = self.subject.clone();
        let publish =
            self.client
                .publish_with_reply_and_headers(subject, reply.clone(), headers, body);
        if let Err(why) = self.lost.guard(publish).await? {
            self.confirms.forget(&reply);
            return Err(match why.kind() {
                PublishErrorKind::Send => TransportError::Lost(why.to_string()),
                PublishErrorKind::MaxPayloadExceeded => {
                    TransportError::TooLarge(Some(self.client.server_info().max_payload))
                }
                PublishErrorKind::InvalidSubject => TransportError::Publish(why.to_string()),
            });
        }
        match confirm.await {
            Ok(confirm) => confirm,
            // The connection is over.
            Err(_) => Err(self.lost().await),
        }
    }

    /// Whether the message of this number is there, and is `message`: of the same acceptance. Its time
    /// tells, since the next run of a node adopts the records that it finds on disk.
    async fn has(&self, sequence: u64, message: &Message) -> Result<bool, TransportError> {
        match self.stream.get_raw_message(sequence).await {
            Ok(stored) => {
                let origin = stored.headers.get(header::ORIGIN);
                let origin = origin.and_then(|text| Origin::parse(text.as_str()));
                let accepted_at = |origin: &Option<Origin>| origin.as_ref().map(|one| one.at_us);
                let is_bundle = message.headers.bundle.is_some();
                // The origins of a bundle are in its body.
                Ok(accepted_at(&origin) == accepted_at(&message.headers.origin)
                    && (!is_bundle || stored.payload == message.body))
            }
            Err(why) if why.kind() == RawMessageErrorKind::NoMessageFound => Ok(false),
            Err(why) => Err(TransportError::Publish(format!(
                "message {sequence} cannot be looked up: {why}"
            ))),
        }
    }

    fn end_tasks(&self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.end_tasks();
    }
}

/// The most bytes of a message. `server` is the server's limit, and `stream` the stream's, if
/// positive.
fn largest_message(server: usize, stream: i32) -> usize {
    let stream = usize::try_from(stream).ok().filter(|most| *most > 0);
    server.min(stream.unwrap_or(usize::MAX))
}

/// The headers of a message that is published under `message_id`.
fn headers(headers: &Headers, message_id: &str) -> Result<HeaderMap, TransportError> {
    let value = |text: String| {
        if is_visible_ascii(&text) {
            Ok(HeaderValue::from(text))
        } else {
            let why = format!("{text:?} cannot be a header");
            Err(TransportError::Publish(why))
        }
    };
    let mut map = HeaderMap::new();
    // The stream drops a message whose id it has stored within its duplicate window.
    map.insert(NATS_MESSAGE_ID, value(message_id.to_owned())?);
    for (name, text) in headers.pairs() {
        // One header is enough where both are the same.
        if name != header::ID || text != message_id {
            map.insert(HeaderName::from_static(name), value(text.into_owned())?);
        }
    }
    Ok(map)
}

/// The message in a message of the stream, also if another publisher sent it.
fn message(stored: &jetstream::Message) -> Message {
    let header = |name: HeaderName| Some(stored.headers.as_ref()?.get(name)?.as_str());
    let other_id = || {
        if let Some(id) = header(NATS_MESSAGE_ID).filter(|id| is_visible_ascii(id)) {
            return id.into();
        }
        // Name, sequence and time are the same at each delivery, and differ between messages.
        stored.info().map_or_else(
            |_| Record::new_id(),
            |info| {
                let published = info.published.unix_timestamp_nanos();
                format!("{}-{}-{published}", info.stream, info.stream_sequence).into()
            },
        )
    };
    // `Headers` knows no other names than these.
    let known = |name: &str| {
        let names = [
            header::ID,
            header::ORIGIN,
            header::API,
            header::EVENT,
            header::BUNDLE,
            header::TRACEPARENT,
            header::TRACESTATE,
        ];
        let name = names.into_iter().find(|known| *known == name)?;
        header(HeaderName::from_static(name))
    };
    Message {
        headers: Headers::read(known, other_id),
        body: stored.payload.clone(),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{
        proto,
        record::{Origin, TraceHeaders},
    };

    #[test]
    fn a_message_whose_id_or_api_cannot_be_a_header_is_not_published() {
        let good = Headers {
            id: "a/0".into(),
            origin: None,
            trace: None,
            bundle: None,
            api: None,
            event: None,
        };
        assert!(headers(&good, "1").is_ok());
        let with_id = |id: &str| Headers {
            id: id.into(),
            ..good.clone()
        };
        let with_api = Headers {
            api: Some("a\nb".into()),
            ..good.clone()
        };
        for bad in [with_id(""), with_id("a\r\nb"), with_id("ñ"), with_api] {
            let refused = headers(&bad, "1");
            assert!(
                matches!(refused, Err(TransportError::Publish(_))),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_message_has_no_more_bytes_than_its_record_says() {
        let record = Record {
            id: "k".repeat(300).into(),
            body: Bytes::from_static(b"{}"),
            trace: TraceHeaders::read(
                &("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-".to_owned()
                    + &"t".repeat(199)),
                Some(
                    &["a", "b"]
                        .map(|key| key.to_owned() + "=" + &"v".repeat(253))
                        .join(","),
                ),
            ),
            origin: Some(Origin {
                run: Record::new_id(),
                at_us: u64::MAX,
            }),
            api: Some("a".repeat(40).into()),
            event: Some("e".repeat(6 << 10).into()),
        };
        let message = Message::from(&record);
        // Published again, it has both ids.
        let headers = headers(&message.headers, &Record::new_id()).unwrap();
        let lines = headers.iter().flat_map(|(name, values)| {
            let length = |value: &HeaderValue| name.to_string().len() + value.as_str().len();
            values
                .iter()
                .map(move |value| length(value) + ": \r\n".len())
        });
        let bytes = "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>() + record.body.len();
        assert!(bytes <= record.message_size(), "NATS: {bytes}");
        let bytes = proto::Record::from(&message).encoded_len();
        assert!(bytes <= record.message_size(), "gRPC: {bytes}");
    }

    #[test]
    fn the_largest_message_fits_into_what_server_and_stream_take() {
        for (server, stream, most) in [
            (1 << 20, -1, 1 << 20),
            (1 << 20, 0, 1 << 20),
            (1 << 20, 1000, 1000),
            (100, 1000, 100),
        ] {
            assert_eq!(largest_message(server, stream), most, "{server} {stream}");
        }
    }
}
