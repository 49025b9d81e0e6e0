//! NATS JetStream: a file-backed work-queue stream and a durable pull consumer with explicit acks.
//!
//! Each connection has a client of its own, which does not reconnect: the lane takes back the records under way, instead of
//! the client's buffers hiding them. Three tasks serve a connection: `confirm` matches confirms with publishes, `pull` pulls
//! messages, and `settle` sends acks.

mod confirm;
mod consumer_check;
mod declare;
mod open;
mod pull;
mod settle;

use std::{sync::Arc, time::Duration};

use async_nats::{
    Client, HeaderMap, HeaderName, HeaderValue, PublishErrorKind, Subject,
    connection::State,
    header::NATS_MESSAGE_ID,
    jetstream::{
        self,
        context::ContextBuilder,
        stream::{RawMessageErrorKind, Stream},
    },
};
use futures_util::FutureExt as _;
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
    settle::Settler,
};
use super::{
    Broker, CLOSE_TIMEOUT, CONNECT_TIMEOUT, PREFETCH, Transport, TransportError,
    bundle::{Kind, Known, Opener},
    header,
    lost::Lost,
};
use crate::{
    config,
    delivery::Delivery,
    lane_id::LaneId,
    record::{Origin, Record, is_visible_ascii},
};

// The client checks and copies a name that is text each time that it is used.
static ID: HeaderName = HeaderName::from_static(header::ID);
static ORIGIN: HeaderName = HeaderName::from_static(header::ORIGIN);
static BUNDLE: HeaderName = HeaderName::from_static(header::BUNDLE);
static TRACEPARENT: HeaderName = HeaderName::from_static(header::TRACEPARENT);

/// How long the server may take for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A record that is published again within this, under its id, is stored once.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);
/// The server takes a message for lost when it was not settled for so long; while a delivery lives it is told otherwise.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Messages that may be unsettled, over all nodes: those that wait for a later try count too.
const ACK_PENDING_MAX: i64 = 16_384;
/// Messages that one pull asks for: while these are on their way, as many lie ready.
const PULL_MAX: usize = PREFETCH as usize / 2;
/// The server answers every pull within this. It is short, since a pull cannot be taken back, and `close` waits for its end.
const PULL_EXPIRES: Duration = Duration::from_secs(1);

/// The configuration, and what is known of bundles, which outlives connections. Clones share both.
#[derive(Clone)]
pub struct Settings {
    config: Arc<config::Nats>,
    known: Known,
}

impl Settings {
    #[must_use]
    pub fn new(config: config::Nats) -> Self {
        Self {
            config: Arc::new(config),
            known: Known::default(),
        }
    }
}

/// One connection.
pub struct Nats {
    client: Client,
    stream: Stream,
    subject: Subject,
    /// In bytes.
    bundle_max: usize,
    ready: Mutex<Ready>,
    settler: Settler,
    confirms: Confirms,
    lost: Lost,
    tasks: [JoinHandle<()>; 3],
    broker: Broker,
}

/// What was pulled and nobody has taken yet.
struct Ready {
    messages: mpsc::Receiver<(Delivery, Kind)>,
    opener: Opener,
}

impl Ready {
    /// Nothing once the pulling has ended. Dropping the future loses nothing.
    async fn next(&mut self) -> Option<Delivery> {
        if let Some(delivery) = self.opener.next() {
            return Some(delivery);
        }
        loop {
            let (message, kind) = self.messages.recv().await?;
            if let Some(delivery) = self.opener.open(message, kind) {
                return Some(delivery);
            }
        }
    }
}

fn cannot(why: impl ToString) -> TransportError {
    TransportError::Connect(why.to_string())
}

impl Transport for Nats {
    const LANE: LaneId = LaneId::Nats;
    type Settings = Settings;

    async fn connect(settings: &Settings) -> Result<Self, TransportError> {
        timeout(CONNECT_TIMEOUT, Self::begin(settings))
            .await
            .map_err(|_| cannot(format!("no answer within {CONNECT_TIMEOUT:?}")))?
    }

    async fn publish_as(&self, record: &Record, kind: Kind) -> Result<(), TransportError> {
        let stored = self
            .send(record, headers(record, kind, &record.id)?)
            .await?;
        // Rare, and not to make the future of every publish larger.
        if stored.duplicate && Box::pin(self.unless_lost(self.is_gone(stored.sequence))).await?? {
            // A record that was settled meanwhile and is sent again on purpose, as a dead letter is, must not pass for stored.
            Box::pin(self.send(record, headers(record, kind, &Record::new_id())?)).await?;
        }
        Ok(())
    }

    fn bundle_max(&self) -> usize {
        self.bundle_max
    }

    async fn next(&self) -> Result<Delivery, TransportError> {
        let mut ready = self.ready.lock().await;
        let delivery = self.unless_lost(ready.next()).await?;
        delivery.ok_or_else(|| TransportError::Lost("the pulling task has ended".into()))
    }

    async fn next_opened(&self) -> Option<Delivery> {
        self.ready.lock().await.opener.next()
    }

    fn try_next(&self) -> Option<Delivery> {
        self.ready.try_lock().ok()?.next().now_or_never()?
    }

    async fn lost(&self) -> TransportError {
        self.lost.wait().await
    }

    async fn close(&self) {
        // Ends a `next` that waits, which holds the lock, and the pulling with the pull that is under way.
        self.lost.set("closed");
        let close = async {
            let mut ready = self.ready.lock().await;
            while let Some(delivery) = ready.next().await {
                drop(delivery);
            }
            self.settler.give_back_all().await;
            // The server works a connection's lines off in their order: once it answers, it has the acknowledgements.
            self.stream.get_info().await.is_ok()
        };
        if self.client.connection_state() == State::Connected
            && timeout(CLOSE_TIMEOUT, close).await != Ok(true)
        {
            warn!("NATS did not take the last acknowledgements in time; their messages come again");
        }
        self.end_tasks();
    }

    fn broker(&self) -> Broker {
        self.broker.clone()
    }
}

impl Nats {
    async fn begin(
        Settings {
            config: settings,
            known,
        }: &Settings,
    ) -> Result<Self, TransportError> {
        let lost = Lost::default();
        let client = open(settings, lost.clone()).await?;
        let context = ContextBuilder::new()
            .timeout(REQUEST_TIMEOUT)
            .build(client.clone());
        let declared = declare(&context, settings).await?;
        let info = client.server_info();
        let bundle_max = bundle_max(
            info.max_payload,
            declared.stream.cached_info().config.max_message_size,
        );
        let broker = Broker {
            version: Some(info.version),
            warnings: declared.warnings,
        };
        let ack_wait = declared.consumer.cached_info().config.ack_wait;
        let (settler, settling) = settle::new(client.clone(), ack_wait);
        let (confirms, confirming) = confirm::new(&client, &settings.stream, lost.clone()).await?;
        let (inbox, messages) = mpsc::channel(usize::from(PREFETCH));
        let puller = Puller {
            context,
            stream: declared.stream.clone(),
            subject: settings.subject.clone(),
            consumer: declared.consumer,
            ready: inbox,
            settler: settler.clone(),
            lost: lost.clone(),
        };
        Ok(Self {
            client,
            stream: declared.stream,
            subject: settings.subject.as_str().into(),
            bundle_max,
            ready: Mutex::new(Ready {
                messages,
                opener: Opener::new(known.clone()),
            }),
            settler,
            confirms,
            lost,
            tasks: [
                tokio::spawn(settling),
                tokio::spawn(puller.run()),
                tokio::spawn(confirming),
            ],
            broker,
        })
    }

    async fn send(&self, record: &Record, headers: HeaderMap) -> Result<Stored, TransportError> {
        let (reply, confirm) = self.unless_lost(self.confirms.expect()).await?;
        let (subject, body) = (self.subject.clone(), record.body.clone());
        let publish =
            self.client
                .publish_with_reply_and_headers(subject, reply.clone(), headers, body);
        if let Err(why) = self.unless_lost(publish).await? {
            self.confirms.forget(&reply);
            return Err(match why.kind() {
                PublishErrorKind::Send => TransportError::Lost(why.to_string()),
                _ => TransportError::Publish(why.to_string()),
            });
        }
        match confirm.await {
            Ok(confirm) => confirm,
            // The connection is over.
            Err(_) => Err(self.lost().await),
        }
    }

    async fn is_gone(&self, sequence: u64) -> Result<bool, TransportError> {
        match self.stream.get_raw_message(sequence).await {
            Ok(_) => Ok(false),
            Err(why) if why.kind() == RawMessageErrorKind::NoMessageFound => Ok(true),
            Err(why) => Err(TransportError::Publish(format!(
                "message {sequence} cannot be looked up: {why}"
            ))),
        }
    }

    async fn unless_lost<F: Future>(&self, work: F) -> Result<F::Output, TransportError> {
        if self.lost.is_set() {
            return Err(self.lost().await);
        }
        tokio::select! {
            biased;
            output = work => Ok(output),
            lost = self.lost() => Err(lost),
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

/// The most bytes of a bundle, where the server takes messages of `server`, and the stream of `stream` unless that is not positive.
/// The other half is room for headers, which count as well.
fn bundle_max(server: usize, stream: i32) -> usize {
    server.min(
        usize::try_from(stream)
            .ok()
            .filter(|most| *most > 0)
            .unwrap_or(usize::MAX),
    ) / 2
}

/// The headers of `record`, which the stream tells from others by `message_id`.
fn headers(record: &Record, kind: Kind, message_id: &str) -> Result<HeaderMap, TransportError> {
    let value = |text: String| {
        if is_visible_ascii(&text) {
            Ok(HeaderValue::from(text))
        } else {
            Err(TransportError::Publish(format!(
                "{text:?} cannot be a header"
            )))
        }
    };
    let mut headers = HeaderMap::new();
    // By it the stream tells duplicates.
    headers.insert(NATS_MESSAGE_ID, value(message_id.to_owned())?);
    // Where both are one, one does for both.
    if *record.id != *message_id {
        headers.insert(ID.clone(), value(record.id.to_string())?);
    }
    if let Kind::Bundle(count) = kind {
        headers.insert(BUNDLE.clone(), value(count.to_string())?);
    }
    if let Some(origin) = &record.origin {
        headers.insert(ORIGIN.clone(), value(origin.to_text())?);
    }
    if let Some(traceparent) = &record.traceparent {
        headers.insert(TRACEPARENT.clone(), value(traceparent.to_string())?);
    }
    Ok(headers)
}

/// The record in a message, or what a bundle is told by, whoever has published it.
fn record(message: &jetstream::Message) -> (Record, Kind) {
    let text = |name: &HeaderName| {
        let text = message.headers.as_ref()?.get(name.clone())?.as_str();
        Some(text).filter(|text| is_visible_ascii(text))
    };
    // The same for each delivery of this message, and for no other message.
    let own = || {
        let info = message.info().ok()?;
        Some(format!(
            "{}-{}-{}",
            info.stream,
            info.stream_sequence,
            info.published.unix_timestamp_nanos()
        ))
    };
    let kind = Kind::of(text(&BUNDLE));
    let id = text(&ID).or_else(|| text(&NATS_MESSAGE_ID)).map(Into::into);
    let record = Record {
        id: id
            .or_else(|| own().map(Into::into))
            .unwrap_or_else(Record::new_id),
        traceparent: text(&TRACEPARENT).map(Into::into),
        origin: text(&ORIGIN).and_then(Origin::parse),
        body: message.payload.clone(),
    };
    (record, kind)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_record_whose_id_or_trace_context_cannot_be_a_header_is_not_published() {
        let good = Record {
            id: Arc::from("a/0"),
            body: Bytes::new(),
            traceparent: None,
            origin: None,
        };
        assert!(headers(&good, Kind::Single, "1").is_ok());
        for bad in [
            Record {
                id: Arc::from(""),
                ..good.clone()
            },
            Record {
                id: Arc::from("a\r\nb"),
                ..good.clone()
            },
            Record {
                id: Arc::from("ñ"),
                ..good.clone()
            },
            Record {
                traceparent: Some(Arc::from("a\nb")),
                ..good.clone()
            },
        ] {
            assert!(
                matches!(
                    headers(&bad, Kind::Single, "1"),
                    Err(TransportError::Publish(_))
                ),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_bundle_fits_into_what_server_and_stream_take() {
        for (server, stream, most) in [
            (1 << 20, -1, 1 << 19),
            (1 << 20, 0, 1 << 19),
            (1 << 20, 1000, 500),
            (100, 1000, 50),
        ] {
            assert_eq!(bundle_max(server, stream), most, "{server} {stream}");
        }
    }
}
