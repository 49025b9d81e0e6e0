//! `RabbitMQ` (AMQP 0-9-1): a durable quorum queue behind the default exchange.
//!
//! A transport has two connections, one to publish and one to consume: a broker that blocks
//! publishers blocks their whole connection, acks included. Nothing is recovered. The first fault
//! of either connection ends both (`Lost`), and the lane connects again.

mod link;
mod message;
mod publisher;
mod settler;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::join, stream::select};
use lapin::{
    Consumer, Event,
    message::Delivery,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{interval, sleep, timeout},
};
use tracing::warn;

use self::{
    link::{CONSUME_FRAME_MAX, Link, PUBLISH_FRAME_MAX, Target},
    message::from_properties,
    publisher::{PublishRequest, publish_and_confirm},
    settler::{Settlement, settle},
};
use super::{
    BrokerInfo, CLOSE_TIMEOUT, Durability, Incoming, Message, PREFETCH, Transport, TransportError,
    lost::Lost,
};
use crate::{config, lane_id::LaneId, record::Record};

/// A publish without a confirm fails after this. Callers with a shorter time-out fail earlier.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// The broker writes the name of a new quorum queue to disk only when its list of names has been
/// still for two times 500 ms. Killed before, it forgets the queue with all that it has confirmed
/// there.
const NAME_ON_DISK: Duration = Duration::from_millis(1500);
/// How often the connections' states are looked at: not every end is announced to an idle client.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Requests to publish that wait for their turn on the connection.
const PUBLISH_QUEUE: usize = 256;

/// How often the broker may send one message before it drops it: in effect, no limit. Version 4
/// has a limit of 20 by default, and takes -1 for "none". Version 3 takes -1 too, but drops a
/// message the first time that it is nacked.
const DELIVERY_LIMIT: i64 = i32::MAX as i64;

/// The bytes that the properties of a message need beside its id, its trace context and the name of
/// its run.
const PROPERTIES_ROOM: usize = 1024;

/// See the module's documentation.
pub struct RabbitMq {
    publish: Link,
    consume: Link,
    publisher: mpsc::Sender<PublishRequest>,
    /// Why the broker blocks publishers, while it does.
    blocked: watch::Receiver<Option<TransportError>>,
    /// Bounded by [`PREFETCH`]: each message is settled once.
    settler: mpsc::UnboundedSender<Settlement>,
    /// Delivery tags of the messages that were handed out and are not settled.
    unsettled: Arc<Mutex<BTreeSet<u64>>>,
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
        mut settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        // One outcome per message at most.
        let (outcomes, mut reported) = mpsc::unbounded_channel();
        let mut request = PublishRequest {
            messages: Vec::with_capacity(messages.len()),
            outcomes,
        };
        for (index, message) in messages.iter().enumerate() {
            if self.fits(message) {
                request.messages.push((index, message.clone()));
            } else {
                let why = "its id and trace context are too long for the broker";
                let failure = TransportError::Publish(why.into());
                // The receiver is above.
                request.outcomes.send((index, Err(failure))).ok();
            }
        }
        let mut is_settled = vec![false; messages.len()];
        let all_reported = timeout(CONFIRM_TIMEOUT, async {
            // This fails if the connection is lost.
            self.publisher.send(request).await.ok();
            while let Some((index, outcome)) = reported.recv().await {
                is_settled[index] = true;
                settled(index, outcome);
            }
        });
        let failure = tokio::select! {
            biased;
            blocked = self.blocked() => blocked,
            all_reported = all_reported => match all_reported {
                Ok(()) if is_settled.iter().all(|&is_settled| is_settled) => return,
                Ok(()) => self.lost.wait().await,
                Err(_) => TransportError::Publish(format!("no confirm within {CONFIRM_TIMEOUT:?}")),
            },
        };
        for index in (0..messages.len()).filter(|&index| !is_settled[index]) {
            settled(index, Err(failure.clone()));
        }
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let mut consumer = self.consumer.lock().await;
        let before = into.len();
        let mut next = tokio::select! {
            biased;
            lost = self.lost.wait() => return Err(lost),
            first = consumer.next() => Some(first),
        };
        while let Some(received) = next {
            next = match received {
                Some(Ok(delivery)) => {
                    into.push(self.incoming(delivery));
                    let has_room = into.len() < before + max;
                    has_room.then(|| consumer.next().now_or_never()).flatten()
                }
                Some(Err(why)) => {
                    self.lost.set(why);
                    None
                }
                None => {
                    self.lost.set("the broker cancelled the consumer");
                    None
                }
            };
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
                // An error means that the connection is lost.
                flushed.await.ok();
            }
            // The broker redelivers the messages of a closed channel that are not settled, those in
            // the client's buffer included.
            join(self.consume.close(), self.publish.close()).await;
        });
        if flushed_and_closed.await.is_err() {
            warn!(lane = %LaneId::Rabbitmq, "no answer to the close within {CLOSE_TIMEOUT:?}");
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
        let queue = ShortString::try_new(&*settings.queue)
            .map_err(|_| "a queue's name has at most 255 bytes".to_owned())?;
        let publish = Link::open(target, "waypost publisher", PUBLISH_FRAME_MAX)
            .await
            .map_err(failed("connect to publish"))?;
        publish
            .channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(failed("ask for confirms"))?;
        declare(&publish, &queue).await?;
        let (consume, consumer, events) =
            subscribe(target, &queue).await.map_err(failed("consume"))?;

        let lost = Lost::default();
        let (publisher, requests) = mpsc::channel(PUBLISH_QUEUE);
        let channel = publish.channel.clone();
        tokio::spawn(publish_and_confirm(channel, queue, requests, lost.clone()));
        let (settler, settlements) = mpsc::unbounded_channel();
        let unsettled = Arc::default();
        let channel = consume.channel.clone();
        tokio::spawn(settle(
            channel,
            settlements,
            Arc::clone(&unsettled),
            lost.clone(),
        ));
        let (is_blocked, blocked) = watch::channel(None);
        let links = [publish.watch(), consume.watch()];
        let events = select(publish.events(), events);
        tokio::spawn(watch_over(links, events, is_blocked, lost.clone()));

        let info = BrokerInfo {
            warnings: publish.warnings(),
            // A quorum queue syncs before it confirms.
            outlives_power_cut: Durability::Yes,
            ..BrokerInfo::default()
        };
        Ok(Self {
            publish,
            consume,
            publisher,
            blocked,
            settler,
            unsettled,
            consumer: tokio::sync::Mutex::new(consumer),
            lost,
            info,
        })
    }

    /// Whether its properties fit into a frame. If not, the broker would end the connection and
    /// every publish on it.
    fn fits(&self, message: &Message) -> bool {
        let headers = &message.headers;
        let origin = headers.origin.as_ref().map_or(0, |origin| origin.run.len());
        let traceparent = headers.traceparent.as_ref().map_or(0, |text| text.len());
        let length = headers.id.len() + origin + traceparent;
        length + PROPERTIES_ROOM <= self.publish.frame_max()
    }

    /// Resolves with the reason while the broker blocks publishers.
    async fn blocked(&self) -> TransportError {
        let mut blocked = self.blocked.clone();
        let reason = blocked.wait_for(Option::is_some).await;
        match reason.ok().and_then(|reason| reason.clone()) {
            Some(reason) => reason,
            // Its sender is gone.
            None => self.lost.wait().await,
        }
    }

    fn incoming(&self, delivery: Delivery) -> Incoming {
        let tag = delivery.delivery_tag;
        self.unsettled.lock().insert(tag);
        let settler = self.settler.clone();
        let message = from_properties(&delivery.properties, delivery.data.into());
        Incoming::new(message, delivery.redelivered, move |verdict| {
            // An error means that the connection is lost. The broker redelivers the message.
            settler.send(Settlement::Of(tag, verdict)).ok();
        })
    }
}

/// Declares the transport lost when a connection or a channel is closed, and keeps `blocked`.
async fn watch_over(
    links: [link::Watch; 2],
    mut events: impl Stream<Item = Event> + Unpin,
    blocked: watch::Sender<Option<TransportError>>,
    lost: Lost,
) {
    let mut ticks = interval(WATCH_INTERVAL);
    loop {
        tokio::select! {
            biased;
            Some(event) = events.next() => match event {
                Event::Error(why) => return lost.set(why),
                Event::ConnectionBlocked(reason) => {
                    warn!(lane = %LaneId::Rabbitmq, reason, "the broker blocks publishers");
                    let why = format!("the broker blocks publishers: {reason}");
                    blocked.send_replace(Some(TransportError::Publish(why)));
                }
                Event::ConnectionUnblocked => drop(blocked.send_replace(None)),
                _ => {}
            },
            _ = lost.wait() => return,
            _ = ticks.tick() => {}
        }
        if let Some(down) = links.iter().find(|link| !link.is_up()) {
            let why = format_args!("the connection of the {} was closed", down.name);
            return lost.set(why);
        }
    }
}

/// An error that names the step of the connect that failed.
fn failed(step: &str) -> impl FnOnce(lapin::Error) -> String {
    move |why| format!("{step}: {why}")
}

/// Declares the queue: durable, replicated, and without a limit of redeliveries.
async fn declare(link: &Link, queue: &ShortString) -> Result<(), String> {
    let existed = link.has_queue(queue).await;
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let limit = AMQPValue::LongLongInt(DELIVERY_LIMIT);
    arguments.insert("x-delivery-limit".into(), limit);
    let declared = link
        .channel
        .queue_declare(queue.clone(), options, arguments)
        .await;
    let declared = declared
        .map_err(failed("declare the queue"))
        .map_err(|why| {
            if why.contains("PRECONDITION_FAILED") {
                format!("queue `{queue}` exists with other settings: {why}")
            } else {
                why
            }
        })?;
    let may_be_new = declared.message_count() == 0 && declared.consumer_count() == 0;
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
