//! `RabbitMQ` (AMQP 0-9-1): a durable quorum queue behind the default exchange.
//!
//! A transport has two connections, one to publish and one to consume: a broker that blocks publishers blocks their whole
//! connection, acks included. Nothing is recovered. The first fault of either connection ends both (`Lost`), and the lane
//! connects again.

mod link;
mod publisher;
mod settler;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream, StreamExt as _, future::join};
use lapin::{
    BasicProperties, Consumer, Event,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, interval, sleep, timeout, timeout_at},
};

use self::{
    link::{CONSUME_FRAME_MAX, Link, PUBLISH_FRAME_MAX, Target},
    publisher::{PublishRequest, publish_and_confirm},
    settler::{Settlement, settle},
};
use super::{
    Broker, CLOSE_TIMEOUT, CONNECT_TIMEOUT, PREFETCH, Transport, TransportError,
    bundle::{Kind, Known, Opener},
    header,
    lost::Lost,
};
use crate::{
    config,
    delivery::{Delivery, Verdict},
    lane_id::LaneId,
    record::{Origin, Record, is_visible_ascii},
};

/// Without a confirm for so long, a publish fails; callers that cannot wait so long give up earlier.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// The broker writes the name of a new quorum queue to disk only when its list of names has been still for two times
/// 500 ms. Killed before, it forgets the queue with all that it has confirmed there.
const NAME_ON_DISK: Duration = Duration::from_millis(1500);
/// How often the connections' states are looked at: not every way of ending them is announced to an idle client.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Publishes that wait for their turn on the connection.
const PUBLISH_QUEUE: usize = 256;

/// How often the broker may send one message before it drops it: in effect, no limit. Version 4 has one of 20 unless told
/// otherwise, and takes -1 for "none"; version 3 takes -1 too, but drops a message the first time it is given back.
const DELIVERY_LIMIT: i64 = i32::MAX as i64;

/// What the properties of a message need beside the texts in them, in bytes.
const PROPERTIES_ROOM: usize = 1024;

/// The configuration, and what is known of bundles, which outlives connections. Clones share both.
#[derive(Clone)]
pub struct Settings {
    config: Arc<config::Rabbitmq>,
    known: Known,
}

impl Settings {
    #[must_use]
    pub fn new(config: config::Rabbitmq) -> Self {
        Self {
            config: Arc::new(config),
            known: Known::default(),
        }
    }
}

/// See the module's documentation.
pub struct RabbitMq {
    publish: Link,
    consume: Link,
    publisher: mpsc::Sender<PublishRequest>,
    /// Without a bound of its own: each is one of at most [`PREFETCH`] messages being settled once.
    settler: mpsc::UnboundedSender<Settlement>,
    /// Deliveries that were handed out and are not settled, by delivery tag.
    outstanding: Arc<Mutex<BTreeSet<u64>>>,
    consumer: tokio::sync::Mutex<(Consumer, Opener)>,
    lost: Lost,
    broker: Broker,
}

impl Transport for RabbitMq {
    const LANE: LaneId = LaneId::Rabbitmq;
    type Settings = Settings;

    async fn connect(settings: &Self::Settings) -> Result<Self, TransportError> {
        let target = Target::read(&settings.config).await?;
        let opened = Self::open(&target, settings).await;
        opened.map_err(|why| TransportError::Connect(format!("{}: {why}", target.address())))
    }

    async fn publish_as(&self, record: &Record, kind: Kind) -> Result<(), TransportError> {
        // The broker would end the connection, and with it every publish under way.
        if length_of_texts(record) + PROPERTIES_ROOM > self.publish.frame_max() {
            return Err(TransportError::Publish(
                "its id and trace context are too long for the broker".into(),
            ));
        }
        let (done, answer) = oneshot::channel();
        let publish = PublishRequest {
            properties: properties(record, kind),
            body: record.body.clone(),
            done,
        };
        let confirmed = timeout(CONFIRM_TIMEOUT, async {
            // Both fail only once the publisher's task has ended, which happens when this generation has.
            self.publisher.send(publish).await.ok()?;
            answer.await.ok()
        });
        match confirmed.await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(self.lost.wait().await),
            Err(_) => Err(TransportError::Publish(format!(
                "no confirm within {CONFIRM_TIMEOUT:?}"
            ))),
        }
    }

    fn bundle_max(&self) -> usize {
        usize::MAX
    }

    async fn next(&self) -> Result<Delivery, TransportError> {
        let mut consumer = self.consumer.lock().await;
        tokio::select! {
            biased;
            lost = self.lost.wait() => return Err(lost),
            delivery = self.take(&mut consumer) => if let Some(delivery) = delivery {
                return Ok(delivery);
            },
        }
        Err(self.lost.wait().await)
    }

    async fn next_opened(&self) -> Option<Delivery> {
        self.consumer.lock().await.1.next()
    }

    fn try_next(&self) -> Option<Delivery> {
        self.take(&mut *self.consumer.try_lock().ok()?)
            .now_or_never()?
    }

    async fn lost(&self) -> TransportError {
        self.lost.wait().await
    }

    async fn close(&self) {
        let flushed_and_closed = timeout(CLOSE_TIMEOUT, async {
            let (done, flushed) = oneshot::channel();
            if self.settler.send(Settlement::Flush(done)).is_ok() {
                // An error means that the generation has ended: there is nobody to flush to.
                flushed.await.ok();
            }
            // Closing the channel gives back what is not settled, what lies in the client's buffer included.
            join(self.consume.close(), self.publish.close()).await;
        });
        if flushed_and_closed.await.is_err() {
            tracing::warn!(lane = %Self::LANE, "the broker did not answer the close within {CLOSE_TIMEOUT:?}");
        }
        self.lost.set("closed");
        self.consume.cut();
        self.publish.cut();
    }

    fn broker(&self) -> Broker {
        self.broker.clone()
    }
}

impl Drop for RabbitMq {
    /// Ends the tasks, which share the channels; the links cut their sockets themselves.
    fn drop(&mut self) {
        self.lost.set("dropped");
    }
}

impl RabbitMq {
    async fn open(target: &Target, settings: &Settings) -> Result<Self, String> {
        let queue = &*settings.config.queue;
        let name = ShortString::try_new(queue)
            .map_err(|_| "a queue's name has at most 255 bytes".to_owned())?;
        let in_time = Deadline(Instant::now() + CONNECT_TIMEOUT);
        let publish = Link::open(target, "waypost publisher", PUBLISH_FRAME_MAX);
        let publish = in_time.step("connect to publish", publish).await?;
        let confirms = publish
            .channel
            .confirm_select(ConfirmSelectOptions::default());
        in_time.step("ask for confirms", confirms).await?;
        in_time
            .step("declare the queue", declare(&publish, &name))
            .await
            .map_err(|why| {
                let exists = why.contains("PRECONDITION_FAILED");
                if exists {
                    format!("queue `{name}` exists with other settings: {why}")
                } else {
                    why
                }
            })?;
        let subscribed = subscribe(target, &name);
        let (consume, consumer, events) = in_time.step("consume", subscribed).await?;

        let lost = Lost::default();
        let (publisher, queued) = mpsc::channel(PUBLISH_QUEUE);
        tokio::spawn(publish_and_confirm(
            publish.channel.clone(),
            name,
            publish.events(),
            queued,
            lost.clone(),
        ));
        let (settler, settlements) = mpsc::unbounded_channel();
        let outstanding = Arc::default();
        tokio::spawn(settle(
            consume.channel.clone(),
            settlements,
            Arc::clone(&outstanding),
            lost.clone(),
        ));
        let links = [publish.watch(), consume.watch()];
        tokio::spawn(watch_over(links, events, lost.clone()));

        let broker = Broker {
            // The client keeps the version to itself.
            version: None,
            warnings: publish.warnings(),
        };
        Ok(Self {
            publish,
            consume,
            publisher,
            settler,
            outstanding,
            consumer: tokio::sync::Mutex::new((consumer, Opener::new(settings.known.clone()))),
            lost,
            broker,
        })
    }

    /// The next delivery; nothing at the end of the consumer, which ends this generation. Dropping the future loses nothing.
    async fn take(&self, (consumer, opener): &mut (Consumer, Opener)) -> Option<Delivery> {
        if let Some(delivery) = opener.next() {
            return Some(delivery);
        }
        loop {
            match consumer.next().await {
                Some(Ok(message)) => {
                    let (message, kind) = self.delivery(message);
                    if let Some(delivery) = opener.open(message, kind) {
                        return Some(delivery);
                    }
                }
                Some(Err(why)) => break self.lost.set(why),
                None => break self.lost.set("the broker cancelled the consumer"),
            }
        }
        None
    }

    fn delivery(&self, message: lapin::message::Delivery) -> (Delivery, Kind) {
        let tag = message.delivery_tag;
        self.outstanding.lock().insert(tag);
        let settler = self.settler.clone();
        let (record, kind) = record(&message.properties, message.data.into());
        let delivery = Delivery::new(record, message.redelivered, move |verdict: Verdict| {
            // Where nobody listens the generation has ended, and the broker sends the message again.
            settler.send(Settlement::Of(tag, verdict)).ok();
        });
        (delivery, kind)
    }
}

/// Declares the transport lost when a connection or a channel is closed. `events` are those of the consuming connection.
async fn watch_over(
    links: [link::Watch; 2],
    mut events: impl Stream<Item = Event> + Unpin,
    lost: Lost,
) {
    let mut ticks = interval(WATCH_INTERVAL);
    loop {
        tokio::select! {
            biased;
            Some(event) = events.next() => if let Event::Error(why) = event {
                return lost.set(why);
            },
            _ = lost.wait() => return,
            _ = ticks.tick() => {}
        }
        if let Some(down) = links.iter().find(|link| !link.is_up()) {
            return lost.set(format_args!(
                "the connection of the {} was closed",
                down.name
            ));
        }
    }
}

/// By when a connection must stand.
struct Deadline(Instant);

impl Deadline {
    /// Waits for one step; the error names it.
    async fn step<T>(
        &self,
        what: &str,
        step: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, String> {
        match timeout_at(self.0, step).await {
            Ok(done) => done.map_err(|why| format!("{what}: {why}")),
            Err(_) => Err(format!("{what}: no answer within {CONNECT_TIMEOUT:?}")),
        }
    }
}

/// Declares the queue: durable, replicated, and never dropping a message because it was given back often.
async fn declare(link: &Link, queue: &ShortString) -> lapin::Result<()> {
    let existed = link.has_queue(queue).await;
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let mut arguments = FieldTable::default();
    arguments.insert(
        "x-queue-type".into(),
        AMQPValue::LongString("quorum".into()),
    );
    arguments.insert(
        "x-delivery-limit".into(),
        AMQPValue::LongLongInt(DELIVERY_LIMIT),
    );
    let queue = link
        .channel
        .queue_declare(queue.clone(), options, arguments)
        .await?;
    let may_be_new = queue.message_count() == 0 && queue.consumer_count() == 0;
    if may_be_new && !existed {
        sleep(NAME_ON_DISK).await;
    }
    Ok(())
}

/// Opens a connection and consumes from the queue.
async fn subscribe(
    target: &Target,
    queue: &ShortString,
) -> lapin::Result<(Link, Consumer, impl Stream<Item = Event> + Unpin + use<>)> {
    let link = Link::open(target, "waypost consumer", CONSUME_FRAME_MAX).await?;
    link.channel
        .basic_qos(PREFETCH, BasicQosOptions::default())
        .await?;
    // Before anything can come, so that no failure is missed.
    let events = link.events();
    let tag = ShortString::from(format!("waypost-{}", Record::new_id()));
    let options = BasicConsumeOptions::default();
    let consumer = link
        .channel
        .basic_consume(queue.clone(), tag, options, FieldTable::default())
        .await?;
    Ok((link, consumer, events))
}

/// Of what goes into the properties of `record`, in bytes.
fn length_of_texts(record: &Record) -> usize {
    let Record {
        id,
        traceparent,
        origin,
        ..
    } = record;
    id.len()
        + traceparent.as_ref().map_or(0, |text| text.len())
        + origin.as_ref().map_or(0, |origin| origin.run.len())
}

/// How a record crosses the broker. Its id is a header too, because a `message_id` has at most 255 bytes.
fn properties(record: &Record, kind: Kind) -> BasicProperties {
    const PERSISTENT: u8 = 2;
    let mut headers = FieldTable::default();
    let mut set = |name: &str, value: &str| {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    };
    set(header::ID, &record.id);
    if let Some(traceparent) = &record.traceparent {
        set(header::TRACEPARENT, traceparent);
    }
    if let Some(origin) = &record.origin {
        set(header::ORIGIN, &origin.to_text());
    }
    let content_type = match kind {
        Kind::Single => "application/json",
        Kind::Bundle(count) => {
            set(header::BUNDLE, &count.to_string());
            "application/x-protobuf"
        }
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type(content_type.into())
        .with_headers(headers);
    match ShortString::try_new(&*record.id) {
        Ok(id) => properties.with_message_id(id),
        Err(_) => properties,
    }
}

/// The record in a message, or what a bundle is told by, which something other than Waypost may have published.
fn record(properties: &BasicProperties, body: Bytes) -> (Record, Kind) {
    let header = |name: &str| match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes())
            .ok()
            .map(Arc::<str>::from),
        AMQPValue::ShortString(text) => Some(Arc::from(text.as_str())),
        _ => None,
    };
    // The id becomes an HTTP header, so one that cannot be a header's value does not count.
    let usable = |id: &Arc<str>| is_visible_ascii(id);
    let message_id = || {
        properties
            .message_id()
            .as_ref()
            .map(|id| Arc::from(id.as_str()))
    };
    let kind = Kind::of(header(header::BUNDLE).as_deref());
    let record = Record {
        id: header(header::ID)
            .filter(usable)
            .or_else(|| message_id().filter(usable))
            .unwrap_or_else(Record::new_id),
        body,
        traceparent: header(header::TRACEPARENT),
        origin: header(header::ORIGIN).and_then(|origin| Origin::parse(&origin)),
    };
    (record, kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: &str) -> Record {
        Record {
            id: Arc::from(id),
            body: Bytes::from_static(br#"{"a":1}"#),
            traceparent: Some(Arc::from("00-1-2-01")),
            origin: Some(Origin {
                run: Arc::from("node/1"),
                at_us: 7,
            }),
        }
    }

    #[test]
    fn a_record_comes_out_as_it_went_in_even_with_an_id_too_long_for_message_id() {
        for id in ["id-1".to_owned(), "k".repeat(255) + "/12"] {
            let sent = sample(&id);
            let properties = properties(&sent, Kind::Single);
            assert_eq!(properties.message_id().is_some(), id.len() <= 255);
            assert_eq!(*properties.delivery_mode(), Some(2), "persistent");
            assert_eq!(record(&properties, sent.body.clone()), (sent, Kind::Single));
        }
    }

    #[test]
    fn a_foreign_message_keeps_its_message_id_if_it_can_be_a_header_else_gets_a_new_id() {
        let foreign = |id: &str| BasicProperties::default().with_message_id(id.into());
        assert_eq!(&*record(&foreign("theirs"), Bytes::new()).0.id, "theirs");
        for unusable in ["", "a\nb", "naïve"] {
            assert_eq!(
                record(&foreign(unusable), Bytes::new()).0.id.len(),
                36,
                "{unusable:?}"
            );
        }
        let (bare, _) = record(&BasicProperties::default(), Bytes::new());
        assert_eq!(
            (bare.id.len(), bare.traceparent, bare.origin),
            (36, None, None)
        );
    }
}
