//! Publishes messages and matches the broker's confirms with them.

use std::{collections::HashMap, future::ready};

use bytes::Bytes;
use futures_util::{
    FutureExt as _, Stream, StreamExt as _, future::Either, stream::FuturesUnordered,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, options::BasicPublishOptions, types::ShortString,
};
use tokio::sync::{mpsc, oneshot};

use super::super::{TransportError, lost::Lost};

/// Publishes without a confirm, those whose caller has given up included.
const UNCONFIRMED_MAX: usize = 4096;
/// Confirms or publishes handled in one turn, so that other tasks of this thread wait no longer.
const TURN_MAX: usize = 64;

type PublishResult = Result<(), TransportError>;

/// A message to publish.
pub(super) struct PublishRequest {
    pub(super) properties: BasicProperties,
    pub(super) body: Bytes,
    /// Answered once the message is durable, or is known not to be. Dropped if the connection is
    /// lost first.
    pub(super) done: oneshot::Sender<PublishResult>,
}

/// The next step of the publishes under way.
enum PublishStep {
    /// The broker has answered the publish of that number.
    Answer(u64, PublishResult),
    /// All answers before this one have been seen.
    Barrier,
}

/// Publishes the messages of `queued` until the connection is lost.
///
/// A good confirm alone proves nothing: the client pairs a returned message with the next confirm
/// that it handles, which may belong to another message. It does so before it resolves the confirm
/// of the returned message, and a `FuturesUnordered` yields in the order of resolving. So a good
/// confirm counts once every answer that was resolved before it has been seen, without a return
/// among them. The first return ends the connection, and all unanswered publishes with it.
pub(super) async fn publish_and_confirm(
    channel: Channel,
    queue: ShortString,
    mut events: impl Stream<Item = Event> + Unpin,
    mut queued: mpsc::Receiver<PublishRequest>,
    lost: Lost,
) {
    let mut steps = FuturesUnordered::new();
    let mut unconfirmed = UnconfirmedPublishes::default();
    let mut requests = Vec::new();
    let is_lost = lost.wait();
    tokio::pin!(is_lost);
    loop {
        let room = UNCONFIRMED_MAX.saturating_sub(steps.len());
        tokio::select! {
            biased;
            _ = &mut is_lost => return,
            Some(event) = events.next() => match event {
                Event::ConnectionBlocked(reason) => unconfirmed.block(&reason),
                Event::ConnectionUnblocked => unconfirmed.blocked = None,
                Event::Error(why) => return lost.set(why),
                _ => {}
            },
            Some(first) = steps.next() => {
                // If the set is pending here, the `select!` polls it again and leaves it a waker.
                let others = std::iter::from_fn(|| steps.next().now_or_never().flatten());
                for step in std::iter::once(first).chain(others).take(TURN_MAX) {
                    if let Err(why) = unconfirmed.advance(step) {
                        return lost.set(why);
                    }
                }
            }
            taken = queued.recv_many(&mut requests, room.min(TURN_MAX)), if room > 0 => {
                if taken == 0 {
                    // The transport is gone.
                    return lost.set("dropped");
                }
                for PublishRequest { properties, body, done } in requests.drain(..) {
                    let Some(number) = unconfirmed.insert(done) else {
                        continue;
                    };
                    let queue = queue.clone();
                    let channel = &channel;
                    steps.push(Either::Left(async move {
                        let answer = send(channel, queue, &body, properties).await;
                        PublishStep::Answer(number, is_durable(answer))
                    }));
                }
            }
        }
        if unconfirmed.needs_barrier() {
            steps.push(Either::Right(ready(PublishStep::Barrier)));
        }
    }
}

/// The publishes that wait for their outcome, by number.
#[derive(Default)]
struct UnconfirmedPublishes {
    last_number: u64,
    by_number: HashMap<u64, oneshot::Sender<PublishResult>>,
    /// Publishes with a good confirm since the latest barrier was set.
    confirmed: Vec<u64>,
    /// Publishes with a good confirm that wait for that barrier.
    before_barrier: Vec<u64>,
    /// Why publishes fail while the broker blocks publishers.
    blocked: Option<TransportError>,
}

impl UnconfirmedPublishes {
    /// The number of a new publish. `None` if it has failed because the broker blocks publishers.
    fn insert(&mut self, done: oneshot::Sender<PublishResult>) -> Option<u64> {
        if let Some(why) = &self.blocked {
            // This fails if the caller has given up waiting, here and below.
            done.send(Err(why.clone())).ok();
            return None;
        }
        self.last_number += 1;
        self.by_number.insert(self.last_number, done);
        Some(self.last_number)
    }

    /// Fails all publishes, and later ones until the broker unblocks publishers.
    fn block(&mut self, reason: &str) {
        tracing::warn!(lane = "rabbitmq", reason, "the broker blocks publishers");
        let why = TransportError::Publish(format!("the broker blocks publishers: {reason}"));
        for (_, done) in self.by_number.drain() {
            done.send(Err(why.clone())).ok();
        }
        self.blocked = Some(why);
    }

    /// An error is the reason why the connection is lost.
    fn advance(&mut self, step: PublishStep) -> Result<(), String> {
        match step {
            PublishStep::Answer(number, Ok(())) => self.confirmed.push(number),
            PublishStep::Answer(_, Err(TransportError::Lost(why))) => return Err(why),
            PublishStep::Answer(number, Err(why)) => self.answer(number, Err(why)),
            PublishStep::Barrier => {
                for number in std::mem::take(&mut self.before_barrier) {
                    self.answer(number, Ok(()));
                }
            }
        }
        Ok(())
    }

    fn needs_barrier(&mut self) -> bool {
        if !self.before_barrier.is_empty() || self.confirmed.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.before_barrier, &mut self.confirmed);
        true
    }

    fn answer(&mut self, number: u64, outcome: PublishResult) {
        if let Some(done) = self.by_number.remove(&number) {
            done.send(outcome).ok();
        }
    }
}

/// Resolves with the broker's confirm.
async fn send(
    channel: &Channel,
    queue: ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> lapin::Result<Confirmation> {
    // The broker confirms and drops a message without a queue unless it is `mandatory`.
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    channel
        .basic_publish(ShortString::default(), queue, options, body, properties)
        .await?
        .await
}

/// Reads the answer to one publish. `Lost` if it casts doubt on other publishes too.
fn is_durable(answer: lapin::Result<Confirmation>) -> PublishResult {
    match answer {
        Ok(Confirmation::Ack(None)) => Ok(()),
        Ok(Confirmation::Nack(None)) => {
            Err(TransportError::Publish("the broker refused it".into()))
        }
        Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned))) => {
            Err(TransportError::Lost(format!(
                "the broker returned a message: {} {}",
                returned.reply_code, returned.reply_text
            )))
        }
        Ok(Confirmation::NotRequested) => {
            Err(TransportError::Lost("the channel does not confirm".into()))
        }
        Err(why) => Err(TransportError::Lost(why.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use lapin::message::{BasicReturnMessage, Delivery};

    use super::*;

    #[test]
    fn only_an_ack_without_a_returned_message_is_durable() {
        let returned = || {
            Some(BasicReturnMessage {
                delivery: Delivery::mock(0, "".into(), "waypost".into(), false, Vec::new()),
                reply_code: 312,
                reply_text: "NO_ROUTE".into(),
            })
        };
        let unroutable = TransportError::Lost("the broker returned a message: 312 NO_ROUTE".into());
        for (answer, outcome) in [
            (Ok(Confirmation::Ack(None)), Ok(())),
            (Ok(Confirmation::Ack(returned())), Err(unroutable.clone())),
            (
                Ok(Confirmation::Nack(None)),
                Err(TransportError::Publish("the broker refused it".into())),
            ),
            (Ok(Confirmation::Nack(returned())), Err(unroutable)),
            (
                Ok(Confirmation::NotRequested),
                Err(TransportError::Lost("the channel does not confirm".into())),
            ),
            (
                Err(lapin::ErrorKind::MissingHeartbeatError.into()),
                Err(TransportError::Lost(
                    "no heartbeat received from server for too long".into(),
                )),
            ),
        ] {
            let told = format!("{answer:?}");
            assert_eq!(is_durable(answer), outcome, "{told}");
        }
    }

    /// The barrier of [`publish_and_confirm`] relies on this.
    #[tokio::test]
    async fn a_set_of_futures_yields_in_the_order_of_resolving() {
        let mut set: FuturesUnordered<Pin<Box<dyn Future<Output = usize>>>> =
            FuturesUnordered::new();
        let (resolvers, futures): (Vec<_>, Vec<_>) =
            (0..100).map(|_| oneshot::channel::<()>()).unzip();
        for (at, future) in futures.into_iter().enumerate() {
            set.push(Box::pin(async move {
                future.await.ok();
                at
            }));
        }
        assert!(futures_util::poll!(set.next()).is_pending());
        let mut order: Vec<usize> = (0..100).collect();
        fastrand::shuffle(&mut order);
        let mut resolvers: Vec<_> = resolvers.into_iter().map(Some).collect();
        for &at in &order {
            resolvers[at].take();
        }
        set.push(Box::pin(ready(usize::MAX)));
        for at in order.into_iter().chain([usize::MAX]) {
            assert_eq!(set.next().await, Some(at));
        }
    }
}
