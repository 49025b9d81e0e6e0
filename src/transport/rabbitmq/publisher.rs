//! Publishes and matches the broker's confirms with those who wait for them.

use std::{collections::HashMap, future::ready};

use bytes::Bytes;
use foldhash::fast::RandomState;
use futures_util::{
    FutureExt as _, Stream, StreamExt as _, future::Either, stream::FuturesUnordered,
};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, options::BasicPublishOptions, types::ShortString,
};
use tokio::sync::{mpsc, oneshot};

use super::{super::TransportError, Life};

/// Publishes that the broker has not confirmed, those that nobody waits for any more included.
const UNCONFIRMED_MAX: usize = 4096;
/// How many steps, or publishes, are handled in one go at most, so that nothing else waits for long.
const TOGETHER_MAX: usize = 64;

/// Who waits for a confirm, by the number of the publish.
type Waiting = HashMap<u64, oneshot::Sender<Result<(), TransportError>>, RandomState>;

/// A message to publish, and who wants to know that it is durable.
pub(super) struct Publish {
    pub(super) properties: BasicProperties,
    pub(super) body: Bytes,
    pub(super) done: oneshot::Sender<Result<(), TransportError>>,
}

/// What happens next to the publishes under way.
enum Step {
    /// What the answer to the publish of that number proves.
    Answer(u64, Result<(), TransportError>),
    /// All that was answered before this was put in line has been seen.
    Barrier,
}

/// Publishes what comes through `queued` until `life` ends. Whoever waits is answered, or finds the `done` closed.
///
/// The client pairs a returned message with the next confirm that it handles, which may be that of another message, so a
/// good confirm alone proves nothing. It does so before it resolves the confirm of the message that was returned, and the
/// set yields in the order of resolving; so a good confirm counts once all that was resolved before it has been seen
/// without a return among it. The first return ends the generation, and with it all that is not answered.
pub(super) async fn publish_and_confirm(
    channel: Channel,
    queue: ShortString,
    mut events: impl Stream<Item = Event> + Unpin,
    mut queued: mpsc::Receiver<Publish>,
    life: Life,
) {
    let mut steps = FuturesUnordered::new();
    let mut number = 0;
    let mut waiting = Waiting::default();
    let mut publishes = Vec::new();
    let mut confirmed = Vec::new();
    let mut before_barrier = Vec::new();
    let mut blocked: Option<TransportError> = None;
    let ended = life.ended();
    tokio::pin!(ended);
    loop {
        let room = UNCONFIRMED_MAX.saturating_sub(steps.len());
        tokio::select! {
            biased;
            _ = &mut ended => return,
            Some(event) = events.next() => match event {
                Event::ConnectionBlocked(reason) => {
                    tracing::warn!(lane = "rabbitmq", reason, "the broker blocks publishers");
                    let why = TransportError::Publish(format!("the broker blocks publishers: {reason}"));
                    for (_, done) in waiting.drain() {
                        // A caller that has gone needs no answer, here and below.
                        drop(done.send(Err(why.clone())));
                    }
                    blocked = Some(why);
                }
                Event::ConnectionUnblocked => blocked = None,
                Event::Error(why) => return life.end(why),
                _ => {}
            },
            Some(first) = steps.next() => {
                // Found pending here, the set is polled again by the `select!`, which leaves it a waker.
                let others = std::iter::from_fn(|| steps.next().now_or_never().flatten());
                for step in std::iter::once(first).chain(others).take(TOGETHER_MAX) {
                    match step {
                        Step::Answer(number, Ok(())) => confirmed.push(number),
                        Step::Answer(_, Err(TransportError::Lost(why))) => return life.end(why),
                        Step::Answer(number, Err(why)) => answer_to(&mut waiting, number, Err(why)),
                        Step::Barrier => {
                            for number in before_barrier.drain(..) {
                                answer_to(&mut waiting, number, Ok(()));
                            }
                        }
                    }
                }
            }
            taken = queued.recv_many(&mut publishes, room.min(TOGETHER_MAX)), if room > 0 => {
                if taken == 0 {
                    // Nobody holds the connection any more.
                    return life.end("dropped");
                }
                for Publish { properties, body, done } in publishes.drain(..) {
                    if let Some(why) = &blocked {
                        drop(done.send(Err(why.clone())));
                        continue;
                    }
                    number += 1;
                    waiting.insert(number, done);
                    let (channel, queue) = (&channel, queue.clone());
                    steps.push(Either::Left(async move {
                        Step::Answer(number, is_durable(send(channel, queue, &body, properties).await))
                    }));
                }
            }
        }
        if before_barrier.is_empty() && !confirmed.is_empty() {
            std::mem::swap(&mut before_barrier, &mut confirmed);
            steps.push(Either::Right(ready(Step::Barrier)));
        }
    }
}

fn answer_to(waiting: &mut Waiting, number: u64, answer: Result<(), TransportError>) {
    if let Some(done) = waiting.remove(&number) {
        drop(done.send(answer));
    }
}

/// Resolves with the broker's confirm.
async fn send(
    channel: &Channel,
    queue: ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> lapin::Result<Confirmation> {
    // Not `mandatory`, a message without a queue would be confirmed and dropped.
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    channel
        .basic_publish(ShortString::default(), queue, options, body, properties)
        .await?
        .await
}

/// What an answer proves. `Lost` where it casts doubt on others too.
fn is_durable(answer: lapin::Result<Confirmation>) -> Result<(), TransportError> {
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

    /// What the barrier stands on: see [`publish_and_confirm`].
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
