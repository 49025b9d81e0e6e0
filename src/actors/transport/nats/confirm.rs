//! Confirms: every publish asks for its own at an inbox that all share, and one task gives each to the one that waits for it.
//!
//! The client crate does the same for any request. For one a record, its random names, its timers and its reading of the answer
//! cost a quarter of the publish.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, Message, StatusCode, Subject, Subscriber, jetstream};
use foldhash::fast::RandomState;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{MissedTickBehavior, interval},
};
use tracing::debug;

use super::{Lost, cannot, lose};
use crate::actors::transport::TransportError;

/// Publishes that wait for their confirm, those that nobody waits for any more included.
const PUBLISHES_MAX: usize = 16_384;
/// A publish that has not been confirmed for so long, or twice as long at most, never will be.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many answers are handled in one go at most, so that nothing else waits for long.
const TOGETHER_MAX: usize = 64;

/// What the server says of a message that it has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub sequence: u64,
    /// It had stored the message before.
    pub duplicate: bool,
}

pub type Confirm = Result<Stored, TransportError>;

/// Those that wait. Clones are one.
#[derive(Clone)]
pub struct Confirms {
    /// The inbox, up to the number of a publish.
    inbox: Arc<str>,
    waiting: Arc<Mutex<Waiting>>,
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct Waiting {
    is_over: bool,
    next: u64,
    /// What is below has waited since before the last look.
    old_below: u64,
    by_number: HashMap<u64, (oneshot::Sender<Confirm>, OwnedSemaphorePermit), RandomState>,
}

/// Confirms of one connection, and the work that they give: to be run until it ends.
pub async fn new(
    client: &Client,
    lost: Lost,
) -> Result<(Confirms, impl Future<Output = ()> + Send + use<>), TransportError> {
    let inbox = client.new_inbox() + ".";
    let answers = client.subscribe(format!("{inbox}*")).await.map_err(cannot)?;
    let room = Arc::new(Semaphore::new(PUBLISHES_MAX));
    let confirms = Confirms { inbox: inbox.into(), waiting: Arc::default(), room };
    Ok((confirms.clone(), run(confirms, answers, lost)))
}

impl Confirms {
    /// Where the confirm of one publish is to be sent, and what it comes to: nothing if the connection is over before. Waits for room.
    pub async fn expect(&self) -> (Subject, oneshot::Receiver<Confirm>) {
        let (sender, receiver) = oneshot::channel();
        // Nobody closes the semaphore; if somebody did, it would be as good as over.
        let permit = Arc::clone(&self.room).acquire_owned().await;
        let mut waiting = self.lock();
        let number = waiting.next;
        waiting.next += 1;
        if let (false, Ok(permit)) = (waiting.is_over, permit) {
            waiting.by_number.insert(number, (sender, permit));
        }
        (format!("{}{number}", self.inbox).into(), receiver)
    }

    fn answer(&self, answer: &Message) {
        let number = answer.subject.strip_prefix(&*self.inbox).and_then(|number| number.parse().ok());
        let waiting = number.and_then(|number: u64| self.lock().by_number.remove(&number));
        match waiting {
            // Who asked may have given up waiting.
            Some((waiting, _)) => drop(waiting.send(read(answer))),
            None => debug!(subject = answer.subject.as_str(), "nobody waits for this confirm"),
        }
    }

    /// Gives up what was old at the last look already.
    fn give_up(&self) {
        let mut waiting = self.lock();
        let old_below = waiting.old_below;
        waiting.old_below = waiting.next;
        for (_, (waiting, _)) in waiting.by_number.extract_if(|number, _| *number < old_below) {
            drop(waiting.send(Err(TransportError::Publish(format!("no answer within {PATIENCE:?}")))));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From its end on, nobody waits.
struct Run {
    confirms: Confirms,
    lost: Lost,
}

impl Drop for Run {
    fn drop(&mut self) {
        // First: who finds the connection over asks why.
        lose(&self.lost, "the confirms have ended".into());
        let mut waiting = self.confirms.lock();
        waiting.is_over = true;
        waiting.by_number.clear();
    }
}

async fn run(confirms: Confirms, mut answers: Subscriber, lost: Lost) {
    let mut is_lost = lost.subscribe();
    let run = Run { confirms, lost };
    let mut looks = interval(PATIENCE);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = is_lost.wait_for(Option::is_some);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            biased;
            _ = &mut ended => return,
            answer = answers.next() => {
                // Without one the client has ended.
                let Some(answer) = answer else { return };
                run.confirms.answer(&answer);
                for _ in 1..TOGETHER_MAX {
                    // Found empty here, it is polled again by the `select!`, which leaves it a waker.
                    let Some(Some(answer)) = answers.next().now_or_never() else { break };
                    run.confirms.answer(&answer);
                }
            }
            _ = looks.tick() => run.confirms.give_up(),
        }
    }
}

/// A `PubAck` of JetStream.
#[derive(Deserialize)]
struct PubAck {
    error: Option<jetstream::Error>,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
}

/// What an answer proves. `Lost` where connecting anew mends it.
fn read(answer: &Message) -> Confirm {
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(TransportError::Lost("no stream takes the subject".into()));
    }
    match serde_json::from_slice(&answer.payload) {
        Ok(PubAck { error: Some(why), .. }) => Err(TransportError::Publish(why.to_string())),
        Ok(PubAck { seq: 0, .. }) => Err(TransportError::Publish("the confirm names no message".into())),
        Ok(PubAck { seq: sequence, duplicate, .. }) => Ok(Stored { sequence, duplicate }),
        Err(why) => Err(TransportError::Publish(format!("the confirm cannot be read: {why}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confirms() -> Confirms {
        Confirms { inbox: "_INBOX.a.".into(), waiting: Arc::default(), room: Arc::new(Semaphore::new(2)) }
    }

    fn answer(subject: impl Into<Subject>, payload: &str, status: Option<StatusCode>) -> Message {
        let payload = payload.to_owned().into();
        Message { subject: subject.into(), reply: None, payload, headers: None, status, description: None, length: 0 }
    }

    #[test]
    fn only_an_answer_that_names_a_message_is_a_confirm() {
        let read = |payload: &str, status| read(&answer("a", payload, status));
        let stored = |sequence, duplicate| Ok(Stored { sequence, duplicate });
        assert_eq!(read(r#"{"stream":"S","seq":7}"#, None), stored(7, false));
        assert_eq!(read(r#"{"stream":"S","domain":"d","seq":7,"duplicate":true}"#, None), stored(7, true));
        let failure =
            r#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"S","seq":0}"#;
        assert!(matches!(read(failure, None), Err(TransportError::Publish(why)) if why.contains("maximum bytes")));
        for unclear in ["", "{}", r#"{"stream":"S"}"#, r#"{"seq":-1}"#, "+OK"] {
            assert!(matches!(read(unclear, None), Err(TransportError::Publish(_))), "{unclear}");
        }
        assert!(matches!(read("", Some(StatusCode::NO_RESPONDERS)), Err(TransportError::Lost(_))));
    }

    #[tokio::test]
    async fn each_publish_gets_its_own_confirm() {
        let confirms = confirms();
        let (first, mut of_first) = confirms.expect().await;
        let (second, of_second) = confirms.expect().await;
        assert!(confirms.expect().now_or_never().is_none(), "there is room for two");
        confirms.answer(&answer("_INBOX.b.0", r#"{"seq":9}"#, None));
        confirms.answer(&answer(second, r#"{"seq":2}"#, None));
        assert_eq!(of_second.await, Ok(Ok(Stored { sequence: 2, duplicate: false })));
        assert!(of_first.try_recv().is_err(), "nobody has answered it");
        confirms.answer(&answer(first, r#"{"seq":1}"#, None));
        assert_eq!(of_first.await, Ok(Ok(Stored { sequence: 1, duplicate: false })));
        assert!(confirms.expect().now_or_never().is_some(), "both have made room");
    }

    #[tokio::test]
    async fn what_is_not_confirmed_is_given_up_after_the_second_look() {
        let confirms = confirms();
        let (_, mut confirm) = confirms.expect().await;
        confirms.give_up();
        assert!(confirm.try_recv().is_err());
        let (_, mut younger) = confirms.expect().await;
        confirms.give_up();
        assert!(matches!(confirm.try_recv(), Ok(Err(TransportError::Publish(_)))));
        assert!(younger.try_recv().is_err());
    }

    #[tokio::test]
    async fn nobody_waits_for_a_connection_that_is_over() {
        let (confirms, lost) = (confirms(), Lost::new(None));
        let (_, before) = confirms.expect().await;
        drop(Run { confirms: confirms.clone(), lost: lost.clone() });
        assert!(before.await.is_err());
        assert!(lost.borrow().is_some());
        assert!(confirms.expect().await.1.await.is_err());
    }
}
