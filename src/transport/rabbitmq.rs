//! `RabbitMQ` (AMQP 0-9-1): a durable quorum queue behind the default exchange.
//!
//! A transport has two connections, one to publish and one to consume: a broker that blocks
//! publishers blocks their whole connection, acks included. Nothing is recovered. The first fault
//! of either connection ends both (`Lost`), and the lane connects again.

mod declare;
mod link;
mod message;
mod publisher;
mod settler;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::join, stream::select};
use lapin::{
    Consumer, Event,
    message::Delivery,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions},
    types::{FieldTable, ShortString},
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{interval, timeout},
};
use tracing::warn;

use self::{
    declare::{declare, failed, find},
    link::{CONSUME_FRAME_MAX, Link, PUBLISH_FRAME_MAX, Target},
    message::from_properties,
    publisher::{PublishRequest, publish_and_confirm},
    settler::{Settlement, settle},
};
use super::{
    Backlog, BrokerInfo, CLOSE_TIMEOUT, Durability, Incoming, Look, Message, PREFETCH, Remedy,
    Transport, TransportError, lost::Lost,
};
use crate::{config, lane_id::LaneId, record::Record};

/// A publish without a confirm fails after this. Callers with a shorter time-out fail earlier.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the connections' states are looked at: not every end is announced to an idle client.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Requests to publish that wait for their turn on the connection.
const PUBLISH_QUEUE: usize = 256;

/// The most bytes of a body in version 4, unless its configuration sets another `max_message_size`.
/// Earlier versions take more.
pub(super) const DEFAULT_MAX_MESSAGE: usize = 16 << 20;

/// The bytes that the properties of a message need beside its id, its trace context and the name of
/// its run.
const PROPERTIES_ROOM: usize = 1024;

/// See the module's documentation.
pub struct RabbitMq {
    publish: Link,
    consume: Link,
    queue: ShortString,
    publisher: mpsc::Sender<PublishRequest>,
    /// Why the broker blocks publishers, while it does.
    blocked: watch::Receiver<Option<TransportError>>,
    /// Bounded by [`PREFETCH`]: each message is settled once.
    settler: mpsc::UnboundedSender<Settlement>,
    /// Delivery tags of the messages that were handed out and are not settled.
    unsettled: Arc<Mutex<BTreeSet<u64>>>,
    consumer: tokio::sync::Mutex<Consumer>,
    /// A task waits for a message: none is in the client's buffer.
    is_waiting: AtomicBool,
    lost: Lost,
    info: BrokerInfo,
}

impl Transport for RabbitMq {
    type Settings = config::RabbitmqConfig;
    const REMEDIES: &'static [Remedy] = &[
        (
            "Login was refused",
            "correct the user and password of `url`, or the password in `password_file`",
        ),
        (
            "NOT_ALLOWED - vhost",
            "the path of `url` names the virtual host: `/%2f` is the default one",
        ),
        (
            "failed to parse",
            "the server speaks no AMQP at this port; if it is its TLS port, use amqps://",
        ),
        (
            "Connection reset",
            "the server speaks no AMQP at this port; if it is its TLS port, use amqps://",
        ),
    ];

    fn address(settings: &Self::Settings) -> String {
        link::address(&settings.url)
    }

    async fn connect(settings: &Self::Settings) -> Result<Self, TransportError> {
        let target = Target::read(settings).await?;
        let opened = Self::open(&target, settings).await;
        opened.map_err(TransportError::Connect)
    }

    async fn look(settings: &Self::Settings) -> Result<Look, TransportError> {
        let target = Target::read(settings).await?;
        let looked = async {
            let (link, queue) = open_to_publish(&target, settings).await?;
            let (found, unchecked) = declare::look(&link, &queue).await?;
            let look = Look {
                info: info(&link, unchecked),
                found: vec!["connected and logged in".into(), found],
            };
            link.close().await;
            Ok(look)
        };
        looked.await.map_err(TransportError::Connect)
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
        let most = most_bytes(&failure);
        for index in (0..messages.len()).filter(|&index| !is_settled[index]) {
            let is_too_large = most.is_some_and(|most| messages[index].body.len() > most);
            settled(
                index,
                Err(if is_too_large {
                    TransportError::TooLarge(most)
                } else {
                    failure.clone()
                }),
            );
        }
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let mut consumer = self.consumer.lock().await;
        let before = into.len();
        self.is_waiting.store(true, Relaxed);
        let mut next = tokio::select! {
            biased;
            lost = self.lost.wait() => return Err(lost),
            first = consumer.next() => Some(first),
        };
        self.is_waiting.store(false, Relaxed);
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

    /// What another node has in hand does not count: that node has taken it.
    async fn backlog(&self) -> Result<Backlog, String> {
        // Not over the other connection: a broker that blocks publishers does not read it.
        let queue = async {
            let channel = self.consume.new_channel().await?;
            let queue = find(&channel, &self.queue).await?;
            channel.close(link::OK, "counted".into()).await?;
            Ok::<_, lapin::Error>(queue)
        };
        let queue = queue.await.map_err(|why| why.to_string())?;
        let in_hand = if self.is_waiting.load(Relaxed) {
            self.unsettled.lock().len() as u64
        } else {
            PREFETCH.into()
        };
        Ok(Backlog {
            messages: u64::from(queue.message_count()) + in_hand,
            is_shared: queue.consumer_count() > 1,
        })
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
        let (publish, queue) = open_to_publish(target, settings).await?;
        publish
            .channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(|why| format!("ask for confirms: {why}"))?;
        let unchecked = declare(&publish, &queue).await?;
        let subscribed = subscribe(target, &queue).await;
        let (consume, consumer, events) = subscribed.map_err(failed("consume", "read", &queue))?;

        let lost = Lost::default();
        let (publisher, requests) = mpsc::channel(PUBLISH_QUEUE);
        let channel = publish.channel.clone();
        tokio::spawn(publish_and_confirm(
            channel,
            queue.clone(),
            requests,
            lost.clone(),
        ));
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

        let info = info(&publish, unchecked);
        Ok(Self {
            publish,
            consume,
            queue,
            publisher,
            blocked,
            settler,
            unsettled,
            consumer: tokio::sync::Mutex::new(consumer),
            is_waiting: AtomicBool::new(false),
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

/// The limit of a body, if one was over it. The broker tells its limit in no other way: it closes
/// the channel with `message size N is larger than configured max size N`.
fn most_bytes(failure: &TransportError) -> Option<usize> {
    let TransportError::Lost(why) = failure else {
        return None;
    };
    let (_, limit) = why.split_once("message size")?.1.split_once("max size ")?;
    let digits = limit.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
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
                    blocked.send_replace(Some(TransportError::Refused(why)));
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

/// Opens the connection to publish. Returns it with the queue's name.
async fn open_to_publish(
    target: &Target,
    settings: &config::RabbitmqConfig,
) -> Result<(Link, ShortString), String> {
    let queue = ShortString::try_new(&*settings.queue)
        .map_err(|_| "a queue's name has at most 255 bytes".to_owned())?;
    let link = Link::open(target, "waypost publisher", PUBLISH_FRAME_MAX).await;
    let link = link.map_err(|why| format!("connect to publish: {why}"))?;
    Ok((link, queue))
}

/// `unchecked` says why the queue's settings are not known.
fn info(link: &Link, unchecked: Option<String>) -> BrokerInfo {
    // A quorum queue syncs before it confirms.
    let outlives_power_cut = match unchecked {
        None => Durability::Yes,
        Some(_) => Durability::default(),
    };
    BrokerInfo {
        warnings: link.warnings().into_iter().chain(unchecked).collect(),
        outlives_power_cut,
        ..BrokerInfo::default()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_body_is_read_from_the_refusal() {
        let lost = |why: &str| TransportError::Lost(why.into());
        for (failure, most) in [
            (
                lost(
                    "PRECONDITION-FAILED: PRECONDITION_FAILED - message size 20 is larger than configured max size 16, x",
                ),
                Some(16),
            ),
            (
                lost(
                    "PRECONDITION_FAILED - message size 536870913 is larger than max size 536870912",
                ),
                Some(536_870_912),
            ),
            (lost("PRECONDITION_FAILED - unknown delivery tag 3"), None),
            (lost("message size 20 is larger than max size"), None),
            (
                TransportError::Refused("message size 20 is larger than max size 16".into()),
                None,
            ),
        ] {
            assert_eq!(most_bytes(&failure), most, "{failure}");
        }
    }
}
