//! Publishes messages and matches the broker's confirms with them.

use std::{collections::VecDeque, future::ready, pin::Pin};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{Either, MaybeDone, maybe_done},
    stream::FuturesUnordered,
};
use lapin::{
    Channel, Confirmation, PublisherConfirm, options::BasicPublishOptions, types::ShortString,
};
use tokio::sync::mpsc;

use super::{
    super::{Message, TransportError, lost::Lost},
    declare::failed,
    message::to_properties,
};

/// The most publishes without a confirm, abandoned ones included. No request is taken beyond it,
/// because the client's queue has no limit.
const UNCONFIRMED_MAX: usize = 1024;
/// Confirms handled in one turn, so that other tasks of this thread wait no longer.
const TURN_MAX: usize = 64;

/// The broker gives no reason when it rejects a message.
const REJECTED: &str = "the broker rejects messages: the queue is at its limit (overflow `reject-publish`), or has no leader";

type PublishResult = Result<(), TransportError>;

/// Messages to publish, each with its index.
pub(super) struct PublishRequest {
    pub(super) messages: Vec<(usize, Message)>,
    /// Gets the index and the outcome of each message: it is durable, or is known not to be. Closed
    /// if the connection is lost first.
    pub(super) outcomes: mpsc::UnboundedSender<(usize, PublishResult)>,
}

/// The receiver of the outcome of one message.
struct Caller {
    index: usize,
    outcomes: mpsc::UnboundedSender<(usize, PublishResult)>,
}

impl Caller {
    fn settle(self, outcome: PublishResult) {
        // This fails if the caller has given up waiting.
        self.outcomes.send((self.index, outcome)).ok();
    }
}

/// The next step of the publishes under way.
enum PublishStep {
    /// The broker has answered a publish.
    Answer(Caller, PublishResult),
    /// All answers before this one have been seen.
    Barrier,
}

/// Messages that are being written to the socket, in the order of their writing.
type Writes<F> = VecDeque<(Caller, Pin<Box<MaybeDone<F>>>)>;

/// Publishes the messages of `requests` until the connection is lost.
///
/// A good confirm alone proves nothing: the client pairs a returned message with the next confirm
/// that it handles, which may belong to another message. It does so before it resolves the confirm
/// of the returned message, and a `FuturesUnordered` yields in the order of resolving. So a good
/// confirm counts once every answer that was resolved before it has been seen, without a return
/// among them. The first return ends the connection, and all unanswered publishes with it.
pub(super) async fn publish_and_confirm(
    channel: Channel,
    queue: ShortString,
    mut requests: mpsc::Receiver<PublishRequest>,
    lost: Lost,
) {
    let mut writes = Writes::new();
    let mut steps = FuturesUnordered::new();
    let mut confirmed = ConfirmedPublishes::default();
    let is_lost = lost.wait();
    tokio::pin!(is_lost);
    loop {
        let has_room = writes.len() + steps.len() < UNCONFIRMED_MAX;
        tokio::select! {
            biased;
            _ = &mut is_lost => return,
            Some(first) = steps.next() => {
                // If the set is pending here, the `select!` polls it again and leaves it a waker.
                let others = std::iter::from_fn(|| steps.next().now_or_never().flatten());
                for step in std::iter::once(first).chain(others).take(TURN_MAX) {
                    if let Err(why) = confirmed.advance(step) {
                        return lost.set(why);
                    }
                }
            }
            Some(()) = all_written(&mut writes) => {}
            request = requests.recv(), if has_room => {
                let Some(PublishRequest { messages, outcomes }) = request else {
                    // The transport is gone.
                    return lost.set("dropped");
                };
                for (index, message) in messages {
                    let write = write(&channel, queue.clone(), message);
                    let mut write = Box::pin(maybe_done(write));
                    // This queues the message. A result is kept.
                    write.as_mut().now_or_never();
                    let outcomes = outcomes.clone();
                    writes.push_back((Caller { index, outcomes }, write));
                }
            }
        }
        // A message is written before it is confirmed. So each confirm that was resolved before one
        // of `confirmed` is in the set before the barrier is.
        while let Some((caller, written)) = next_written(&mut writes) {
            match written {
                Ok(confirm) => {
                    steps.push(Either::Left(confirm.map(move |answer| {
                        PublishStep::Answer(caller, is_durable(answer))
                    })));
                }
                Err(why) => return lost.set(refused_write(why)),
            }
        }
        if confirmed.needs_barrier() {
            steps.push(Either::Right(ready(PublishStep::Barrier)));
        }
    }
}

/// Publishes with a good confirm that may not count yet.
#[derive(Default)]
struct ConfirmedPublishes {
    /// Since the latest barrier was set.
    latest: Vec<Caller>,
    /// Before that barrier.
    before_barrier: Vec<Caller>,
}

impl ConfirmedPublishes {
    /// An error is the reason why the connection is lost.
    fn advance(&mut self, step: PublishStep) -> Result<(), String> {
        match step {
            PublishStep::Answer(caller, Ok(())) => self.latest.push(caller),
            PublishStep::Answer(_, Err(TransportError::Lost(why))) => return Err(why),
            PublishStep::Answer(caller, failure) => caller.settle(failure),
            PublishStep::Barrier => {
                let proven = self.before_barrier.drain(..);
                proven.for_each(|caller| caller.settle(Ok(())));
            }
        }
        Ok(())
    }

    fn needs_barrier(&mut self) -> bool {
        if !self.before_barrier.is_empty() || self.latest.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.before_barrier, &mut self.latest);
        true
    }
}

/// Waits until the latest message is written, and so all are. `None` if there is none.
async fn all_written<F: Future>(writes: &mut Writes<F>) -> Option<()> {
    let (_, latest) = writes.back_mut()?;
    latest.as_mut().await;
    Some(())
}

/// Removes the oldest message if it is written.
fn next_written<F: Future>(writes: &mut Writes<F>) -> Option<(Caller, F::Output)> {
    let (_, oldest) = writes.front_mut()?;
    oldest.as_mut().now_or_never()?;
    let (caller, mut oldest) = writes.pop_front()?;
    Some((caller, oldest.as_mut().take_output()?))
}

/// Resolves when the message is written. Its confirm comes later.
async fn write(
    channel: &Channel,
    queue: ShortString,
    message: Message,
) -> lapin::Result<PublisherConfirm> {
    // The broker confirms and drops a message without a queue unless it is `mandatory`.
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    channel
        .basic_publish(
            ShortString::default(),
            queue,
            options,
            &message.body,
            to_properties(&message.headers),
        )
        .await
}

/// A message for the default exchange needs the right to write to this name.
fn refused_write(why: lapin::Error) -> String {
    failed("publish", "write", "amq.default")(why)
}

/// Reads the answer to one publish. `Lost` if it casts doubt on other publishes too.
fn is_durable(answer: lapin::Result<Confirmation>) -> PublishResult {
    match answer {
        Ok(Confirmation::Ack(None)) => Ok(()),
        Ok(Confirmation::Nack(None)) => Err(TransportError::Refused(REJECTED.into())),
        Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned))) => {
            Err(TransportError::Lost(format!(
                "the broker returned a message: {} {}",
                returned.reply_code, returned.reply_text
            )))
        }
        Ok(Confirmation::NotRequested) => {
            Err(TransportError::Lost("the channel does not confirm".into()))
        }
        Err(why) => Err(TransportError::Lost(refused_write(why))),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use lapin::message::{BasicReturnMessage, Delivery};
    use tokio::sync::oneshot;

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
                Err(TransportError::Refused(REJECTED.into())),
            ),
            (Ok(Confirmation::Nack(returned())), Err(unroutable)),
            (
                Ok(Confirmation::NotRequested),
                Err(TransportError::Lost("the channel does not confirm".into())),
            ),
            (
                Err(lapin::ErrorKind::MissingHeartbeatError.into()),
                Err(TransportError::Lost(
                    "publish: no heartbeat received from server for too long".into(),
                )),
            ),
        ] {
            let told = format!("{answer:?}");
            assert_eq!(is_durable(answer), outcome, "{told}");
        }
    }

    #[test]
    fn a_good_confirm_counts_once_no_earlier_answer_is_a_return() {
        let (outcomes, mut inbox) = mpsc::unbounded_channel();
        let good = |index| {
            let outcomes = outcomes.clone();
            PublishStep::Answer(Caller { index, outcomes }, Ok(()))
        };
        let mut told = || std::iter::from_fn(|| inbox.try_recv().ok()).collect::<Vec<_>>();
        let mut confirmed = ConfirmedPublishes::default();
        confirmed.advance(good(0)).unwrap();
        assert_eq!(told(), []);
        assert!(confirmed.needs_barrier());
        confirmed.advance(good(1)).unwrap();
        confirmed.advance(PublishStep::Barrier).unwrap();
        assert_eq!(told(), [(0, Ok(()))], "the other came after the barrier");
        assert!(confirmed.needs_barrier());
        let (index, outcomes) = (2, outcomes.clone());
        let returned = Err(TransportError::Lost("returned".into()));
        let step = PublishStep::Answer(Caller { index, outcomes }, returned);
        assert_eq!(confirmed.advance(step), Err("returned".into()));
        assert_eq!(told(), []);
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
