//! `RabbitMQ` (AMQP 0-9-1): a durable quorum queue behind the default exchange.
//!
//! A transport has two connections, one to publish and one to consume: a broker that blocks
//! publishers blocks their whole connection, acks included. Nothing is recovered. The first fault
//! of either connection ends both (`Lost`), and the lane connects again.

mod declare;
mod link;
mod message;
mod open;
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

use futures_util::{FutureExt as _, StreamExt as _, future::join};
use lapin::{Consumer, message::Delivery, types::ShortString};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::warn;
use tracing_mutex::parkinglot::Mutex;

use self::{
    declare::find,
    link::{Link, Target},
    message::from_properties,
    open::open,
    publisher::PublishRequest,
    settler::Settlement,
};
use super::{
    Backlog, BrokerInfo, CLOSE_TIMEOUT, Durability, Incoming, Inspection, Message, Remedy,
    Transport, TransportError, UNSETTLED_MAX, lost::Lost,
};
use crate::{config, lane_id::LaneId, record::TraceHeaders};

/// A publish without a confirm fails after this. Callers with a shorter time-out fail earlier.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
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
    /// Bounded by [`UNSETTLED_MAX`]: each message is settled once.
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
        let opened = open(&target, settings).await;
        opened.map_err(TransportError::Connect)
    }

    async fn inspect(settings: &Self::Settings) -> Result<Inspection, TransportError> {
        let target = Target::read(settings).await?;
        let inspected = open::inspect(&target, settings).await;
        inspected.map_err(TransportError::Connect)
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
                let why = "its headers are too long for the broker";
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
        let is_exact = self.is_waiting.load(Relaxed);
        let in_hand = if is_exact {
            self.unsettled.lock().len() as u64
        } else {
            UNSETTLED_MAX.into()
        };
        Ok(Backlog {
            messages: u64::from(queue.message_count()) + in_hand,
            is_shared: queue.consumer_count() > 1,
            is_exact,
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
    /// Whether its properties fit into a frame. If not, the broker would end the connection and
    /// every publish on it.
    fn fits(&self, message: &Message) -> bool {
        let headers = &message.headers;
        let origin = headers.origin.as_ref().map_or(0, |origin| origin.run.len());
        let trace = headers.trace.as_ref().map_or(0, TraceHeaders::size);
        let event = headers.event.as_ref().map_or(0, |text| text.len());
        let length = headers.id.len() + origin + trace + event;
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
