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
    time::{interval, sleep, timeout},
};

use self::{
    link::{CONSUME_FRAME_MAX, Link, PUBLISH_FRAME_MAX, Target},
    publisher::{PublishRequest, publish_and_confirm},
    settler::{Settlement, settle},
};
use super::{
    BrokerInfo, CLOSE_TIMEOUT, Headers, Incoming, Message, PREFETCH, Transport, TransportError,
    lost::Lost, publish_each,
};
use crate::{
    config,
    lane_id::LaneId,
    record::{Record, is_visible_ascii},
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

/// See the module's documentation.
pub struct RabbitMq {
    publish: Link,
    consume: Link,
    publisher: mpsc::Sender<PublishRequest>,
    /// Without a bound of its own: each is one of at most [`PREFETCH`] messages being settled once.
    settler: mpsc::UnboundedSender<Settlement>,
    /// Deliveries that were handed out and are not settled, by delivery tag.
    outstanding: Arc<Mutex<BTreeSet<u64>>>,
    consumer: tokio::sync::Mutex<Consumer>,
    lost: Lost,
    info: BrokerInfo,
}

impl Transport for RabbitMq {
    type Settings = config::RabbitmqConfig;

    async fn connect(settings: &Self::Settings) -> Result<Self, TransportError> {
        let target = Target::read(settings).await?;
        let opened = Self::open(&target, settings).await;
        opened.map_err(|why| TransportError::Connect(format!("{}: {why}", target.address())))
    }

    async fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        publish_each(messages, settled, async |message| self.store(message).await).await;
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let mut consumer = self.consumer.lock().await;
        let before = into.len();
        tokio::select! {
            biased;
            lost = self.lost.wait() => return Err(lost),
            first = consumer.next() => self.accept(first, into),
        }
        while into.len() < before + max
            && let Some(next) = consumer.next().now_or_never()
        {
            let is_delivery = matches!(next, Some(Ok(_)));
            self.accept(next, into);
            if !is_delivery {
                break;
            }
        }
        if into.len() > before {
            Ok(())
        } else {
            Err(self.lost.wait().await)
        }
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
            tracing::warn!(lane = %LaneId::Rabbitmq, "the broker did not answer the close within {CLOSE_TIMEOUT:?}");
        }
        self.lost.set("closed");
        self.consume.cut();
        self.publish.cut();
    }

    fn info(&self) -> BrokerInfo {
        self.info.clone()
    }
}

impl Drop for RabbitMq {
    /// Ends the tasks, which share the channels; the links cut their sockets themselves.
    fn drop(&mut self) {
        self.lost.set("dropped");
    }
}

impl RabbitMq {
    async fn open(target: &Target, settings: &config::RabbitmqConfig) -> Result<Self, String> {
        let queue = &*settings.queue;
        let name = ShortString::try_new(queue)
            .map_err(|_| "a queue's name has at most 255 bytes".to_owned())?;
        let publish = Link::open(target, "waypost publisher", PUBLISH_FRAME_MAX)
            .await
            .map_err(failed("connect to publish"))?;
        publish
            .channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(failed("ask for confirms"))?;
        declare(&publish, &name)
            .await
            .map_err(failed("declare the queue"))
            .map_err(|why| {
                let exists = why.contains("PRECONDITION_FAILED");
                if exists {
                    format!("queue `{name}` exists with other settings: {why}")
                } else {
                    why
                }
            })?;
        let (consume, consumer, events) =
            subscribe(target, &name).await.map_err(failed("consume"))?;

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

        let info = BrokerInfo {
            // The client keeps the version to itself.
            version: None,
            warnings: publish.warnings(),
            ..BrokerInfo::default()
        };
        Ok(Self {
            publish,
            consume,
            publisher,
            settler,
            outstanding,
            consumer: tokio::sync::Mutex::new(consumer),
            lost,
            info,
        })
    }

    /// Resolves when the broker has confirmed the message.
    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        // The broker would end the connection, and with it every publish under way.
        let room_for_texts = self.publish.frame_max().saturating_sub(PROPERTIES_ROOM);
        let length: usize = message.headers.pairs().map(|(_, value)| value.len()).sum();
        if length > room_for_texts {
            return Err(TransportError::Publish(
                "its id and trace context are too long for the broker".into(),
            ));
        }
        let (done, answer) = oneshot::channel();
        let publish = PublishRequest {
            properties: properties(&message.headers),
            body: message.body.clone(),
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

    /// Appends what the consumer yields to `into`. Its end, or an error, ends this generation.
    fn accept(
        &self,
        next: Option<lapin::Result<lapin::message::Delivery>>,
        into: &mut Vec<Incoming>,
    ) {
        let delivery = match next {
            Some(Ok(delivery)) => delivery,
            Some(Err(why)) => return self.lost.set(why),
            None => return self.lost.set("the broker cancelled the consumer"),
        };
        let tag = delivery.delivery_tag;
        self.outstanding.lock().insert(tag);
        let settler = self.settler.clone();
        let message = message(&delivery.properties, delivery.data.into());
        into.push(Incoming::new(
            message,
            delivery.redelivered,
            move |verdict| {
                // Where nobody listens the generation has ended, and the broker sends the message again.
                settler.send(Settlement::Of(tag, verdict)).ok();
            },
        ));
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

/// An error that names the step of the connect that failed.
fn failed(step: &str) -> impl FnOnce(lapin::Error) -> String {
    move |why| format!("{step}: {why}")
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

/// How a message crosses the broker. Its id is a header too, because a `message_id` has at most 255
/// bytes.
fn properties(headers: &Headers) -> BasicProperties {
    const PERSISTENT: u8 = 2;
    let mut table = FieldTable::default();
    for (name, value) in headers.pairs() {
        table.insert(name.into(), AMQPValue::LongString((*value).into()));
    }
    let content_type = match headers.bundle {
        None => "application/json",
        Some(_) => "application/x-protobuf",
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type(content_type.into())
        .with_headers(table);
    match ShortString::try_new(&*headers.id) {
        Ok(id) => properties.with_message_id(id),
        Err(_) => properties,
    }
}

/// The message that the broker sent, whoever has published it.
fn message(properties: &BasicProperties, body: Bytes) -> Message {
    let table = properties.headers().as_ref();
    let header = |name: &str| match table?.inner().get(name)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    };
    // AMQP identifies a message by nothing else: without it, each delivery gets an id of its own. A hash
    // of the body would make one record of two that are equal.
    let other_id = || {
        let id = properties.message_id().as_ref().map(ShortString::as_str);
        id.filter(|id| is_visible_ascii(id))
            .map_or_else(Record::new_id, Arc::from)
    };
    Message {
        headers: Headers::read(header, other_id),
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_out_as_it_went_in_even_with_an_id_too_long_for_message_id() {
        for (id, bundle) in [
            ("id-1".to_owned(), None),
            ("k".repeat(255) + "/12", Some(2)),
        ] {
            let sent = Message {
                headers: Headers {
                    id: id.as_str().into(),
                    origin: None,
                    traceparent: Some("00-1-2-01".into()),
                    bundle,
                },
                body: Bytes::from_static(br#"{"a":1}"#),
            };
            let properties = properties(&sent.headers);
            assert_eq!(properties.message_id().is_some(), id.len() <= 255);
            assert_eq!(*properties.delivery_mode(), Some(2), "persistent");
            assert_eq!(message(&properties, sent.body.clone()), sent);
        }
    }

    #[test]
    fn a_foreign_message_keeps_its_message_id_if_it_can_be_a_header_else_gets_a_new_id() {
        let id = |properties: BasicProperties| message(&properties, Bytes::new()).headers.id;
        let foreign = |id: &str| BasicProperties::default().with_message_id(id.into());
        assert_eq!(&*id(foreign("theirs")), "theirs");
        for unusable in ["", "a\nb", "naïve"] {
            assert_eq!(id(foreign(unusable)).len(), 36, "{unusable:?}");
        }
        assert_eq!(id(BasicProperties::default()).len(), 36);
    }
}
