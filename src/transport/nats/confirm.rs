//! Confirms: every publish asks for its own at an inbox that all share, and one task gives each to the one that waits for it.
//!
//! The client crate does the same for any request. Once a record, that is three random names, two timers and an answer that is
//! parsed twice.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_nats::{Client, Message, StatusCode, Subject, jetstream};
use foldhash::fast::RandomState;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::coop::unconstrained,
    time::{MissedTickBehavior, interval},
};
use tracing::debug;

use super::{Lost, cannot, lose};
use crate::transport::TransportError;

/// Publishes that wait for their confirm, those that nobody waits for any more included.
const PUBLISHES_MAX: usize = 16_384;
/// A publish that has not been confirmed for so long, or twice as long at most, is given up.
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
    /// Of the stream that stores them. Another that has taken its subject over confirms nothing.
    stream: Arc<str>,
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
    by_number: HashMap<u64, Waiter, RandomState>,
}

/// One that waits, and its place.
type Waiter = (oneshot::Sender<Confirm>, OwnedSemaphorePermit);

/// Confirms of one connection, and the work that they give: to be run until it ends.
pub async fn new(
    client: &Client,
    stream: &str,
    lost: Lost,
) -> Result<(Confirms, impl Future<Output = ()> + Send + use<>), TransportError> {
    let inbox = client.new_inbox() + ".";
    let answers = client
        .subscribe(format!("{inbox}*"))
        .await
        .map_err(cannot)?;
    let room = Arc::new(Semaphore::new(PUBLISHES_MAX));
    let confirms = Confirms {
        stream: stream.into(),
        inbox: inbox.into(),
        waiting: Arc::default(),
        room,
    };
    Ok((confirms.clone(), run(answers, Run { confirms, lost })))
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

    /// The publish whose confirm was to be sent to `subject` was not sent.
    pub fn forget(&self, subject: &Subject) {
        drop(self.take(subject));
    }

    fn answer(&self, answer: &Message) {
        match self.take(&answer.subject) {
            // Who asked may have given up waiting.
            Some((waiting, _)) => drop(waiting.send(read(answer, &self.stream))),
            None => debug!(
                subject = answer.subject.as_str(),
                "nobody waits for this confirm"
            ),
        }
    }

    /// Who waits for what comes to `subject`.
    fn take(&self, subject: &Subject) -> Option<Waiter> {
        let number: u64 = subject.strip_prefix(&*self.inbox)?.parse().ok()?;
        self.lock().by_number.remove(&number)
    }

    /// Gives up what was old at the last look already.
    fn give_up(&self) {
        let mut waiting = self.lock();
        let old_below = waiting.old_below;
        waiting.old_below = waiting.next;
        for (_, (waiting, _)) in waiting
            .by_number
            .extract_if(|number, _| *number < old_below)
        {
            drop(waiting.send(Err(TransportError::Publish(format!(
                "no answer within {PATIENCE:?}"
            )))));
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

async fn run(mut answers: impl Stream<Item = Message> + Unpin, run: Run) {
    let mut is_lost = run.lost.subscribe();
    let mut looks = interval(PATIENCE);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = is_lost.wait_for(Option::is_some);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            biased;
            _ = &mut ended => break,
            _ = looks.tick() => {
                // What has come in time counts, however late it is seen.
                run.answer_all(&mut answers, PUBLISHES_MAX);
                run.confirms.give_up();
            }
            answer = answers.next() => {
                // Without one the client has ended.
                let Some(answer) = answer else { break };
                run.confirms.answer(&answer);
                run.answer_all(&mut answers, TOGETHER_MAX - 1);
            }
        }
    }
    // What was stored was stored.
    run.answer_all(&mut answers, PUBLISHES_MAX);
}

impl Run {
    /// Hands on what has come. Found empty here, `answers` has no waker until it is polled again.
    fn answer_all(&self, answers: &mut (impl Stream<Item = Message> + Unpin), most: usize) {
        // Else a channel passes for empty once the task has had its turn.
        let come = std::iter::from_fn(|| unconstrained(answers.next()).now_or_never().flatten());
        come.take(most)
            .for_each(|answer| self.confirms.answer(&answer));
    }
}

/// A `PubAck` of JetStream.
#[derive(Deserialize)]
struct PubAck<'a> {
    error: Option<jetstream::Error>,
    #[serde(default, borrow)]
    stream: Cow<'a, str>,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
}

/// What an answer proves of a message that was published to `stream`. `Lost` where connecting anew mends it.
fn read(answer: &Message, stream: &str) -> Confirm {
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(TransportError::Lost("no stream takes the subject".into()));
    }
    let unclear = |why: String| {
        Err(TransportError::Publish(format!(
            "the confirm is unclear: {why}"
        )))
    };
    match serde_json::from_slice::<PubAck<'_>>(&answer.payload) {
        Err(why) => unclear(why.to_string()),
        Ok(PubAck {
            error: Some(why), ..
        }) => Err(TransportError::Publish(why.to_string())),
        Ok(PubAck { seq: 0, .. }) => unclear("it names no message".into()),
        Ok(PubAck { stream: other, .. }) if other.is_empty() => {
            unclear("it names no stream".into())
        }
        Ok(PubAck { stream: other, .. }) if other != stream => Err(TransportError::Lost(format!(
            "stream `{other}` has taken the subject over"
        ))),
        Ok(PubAck {
            seq: sequence,
            duplicate,
            ..
        }) => Ok(Stored {
            sequence,
            duplicate,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::{poll, stream};
    use tokio::{
        sync::mpsc,
        time::{Instant, sleep, timeout},
    };

    use super::*;

    fn confirms() -> Confirms {
        let room = Arc::new(Semaphore::new(2));
        Confirms {
            stream: "S".into(),
            inbox: "_INBOX.a.".into(),
            waiting: Arc::default(),
            room,
        }
    }

    fn answer(subject: impl Into<Subject>, payload: &str, status: Option<StatusCode>) -> Message {
        let payload = payload.to_owned().into();
        Message {
            subject: subject.into(),
            reply: None,
            payload,
            headers: None,
            status,
            description: None,
            length: 0,
        }
    }

    fn ack(subject: impl Into<Subject>, sequence: u64) -> Message {
        answer(
            subject,
            &format!(r#"{{"stream":"S","seq":{sequence}}}"#),
            None,
        )
    }

    const fn stored(sequence: u64) -> Stored {
        Stored {
            sequence,
            duplicate: false,
        }
    }

    #[test]
    fn only_an_answer_that_names_a_message_of_the_stream_is_a_confirm() {
        let read = |payload: &str, status| read(&answer("a", payload, status), "S");
        assert_eq!(read(r#"{"stream":"S","seq":7}"#, None), Ok(stored(7)));
        let twice = Ok(Stored {
            sequence: 7,
            duplicate: true,
        });
        assert_eq!(
            read(
                r#"{"stream":"\u0053","domain":"d","seq":7,"duplicate":true}"#,
                None
            ),
            twice
        );
        let failure = r#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"S","seq":0}"#;
        assert!(
            matches!(read(failure, None), Err(TransportError::Publish(why)) if why.contains("maximum bytes"))
        );
        for unclear in [
            "",
            "{}",
            r#"{"stream":"S"}"#,
            r#"{"stream":"S","seq":-1}"#,
            r#"{"seq":7}"#,
            "+OK",
        ] {
            assert!(
                matches!(read(unclear, None), Err(TransportError::Publish(_))),
                "{unclear}"
            );
        }
        assert!(matches!(
            read(r#"{"stream":"T","seq":7}"#, None),
            Err(TransportError::Lost(_))
        ));
        assert!(matches!(
            read("", Some(StatusCode::NO_RESPONDERS)),
            Err(TransportError::Lost(_))
        ));
    }

    #[tokio::test]
    async fn each_publish_gets_its_own_confirm() {
        let confirms = confirms();
        let (first, mut of_first) = confirms.expect().await;
        let (second, of_second) = confirms.expect().await;
        assert!(
            confirms.expect().now_or_never().is_none(),
            "there is room for two"
        );
        confirms.answer(&ack("_INBOX.b.0", 9));
        confirms.answer(&ack(second, 2));
        assert_eq!(of_second.await, Ok(Ok(stored(2))));
        assert!(of_first.try_recv().is_err(), "nobody has answered it");
        confirms.answer(&ack(first, 1));
        assert_eq!(of_first.await, Ok(Ok(stored(1))));
        let (third, _) = confirms
            .expect()
            .now_or_never()
            .expect("both have made room");
        confirms.expect().await;
        confirms.forget(&third);
        assert!(
            confirms.expect().now_or_never().is_some(),
            "what was not sent has made room"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_confirmed_is_given_up_in_time() {
        let (confirms, lost) = (confirms(), Lost::new(None));
        let running = tokio::spawn(run(
            stream::pending(),
            Run {
                confirms: confirms.clone(),
                lost: lost.clone(),
            },
        ));
        let began = Instant::now();
        let (_, confirm) = confirms.expect().await;
        assert!(matches!(confirm.await, Ok(Err(TransportError::Publish(_)))));
        assert!(
            (PATIENCE..=2 * PATIENCE).contains(&began.elapsed()),
            "{:?}",
            began.elapsed()
        );
        lose(&lost, "closed".into());
        running.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_when_its_time_is_over_counts() {
        let (confirms, (sender, mut receiver)) = (confirms(), mpsc::channel(1));
        let answers = stream::poll_fn(move |context| receiver.poll_recv(context));
        // Polled by hand: its time passes, as it does for a thread that stands still.
        let mut running = pin!(run(
            answers,
            Run {
                confirms: confirms.clone(),
                lost: Lost::new(None)
            }
        ));
        assert!(poll!(&mut running).is_pending());
        let (subject, mut confirm) = confirms.expect().await;
        sleep(PATIENCE).await;
        assert!(poll!(&mut running).is_pending());
        assert!(confirm.try_recv().is_err(), "it is old, and not given up");
        sender.try_send(ack(subject, 1)).unwrap();
        sleep(PATIENCE).await;
        assert!(poll!(&mut running).is_pending());
        assert_eq!(confirm.try_recv(), Ok(Ok(stored(1))));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_connection_that_is_over() {
        let never_polled = |run: Run| drop(super::run(stream::pending(), run));
        let ended = |run: Run| {
            super::run(stream::empty(), run)
                .now_or_never()
                .expect("the client has ended")
        };
        for end in [&never_polled as &dyn Fn(Run), &ended] {
            let (confirms, lost) = (confirms(), Lost::new(None));
            let (_, before) = confirms.expect().await;
            end(Run {
                confirms: confirms.clone(),
                lost: lost.clone(),
            });
            let over = async { before.await.is_err() && confirms.expect().await.1.await.is_err() };
            assert_eq!(timeout(Duration::from_secs(10), over).await, Ok(true));
            assert!(lost.borrow().is_some());
        }
    }

    #[tokio::test]
    async fn what_was_confirmed_before_the_end_counts() {
        const MANY: usize = 1000;
        let (mut confirms, lost) = (confirms(), Lost::new(Some("closed".into())));
        confirms.room = Arc::new(Semaphore::new(MANY));
        let (sender, mut receiver) = mpsc::channel(MANY);
        let mut waiting = Vec::new();
        for _ in 0..MANY {
            let (subject, confirm) = confirms.expect().await;
            sender.send(ack(subject, 1)).await.unwrap();
            waiting.push(confirm);
        }
        run(
            stream::poll_fn(|context| receiver.poll_recv(context)),
            Run { confirms, lost },
        )
        .await;
        for confirm in waiting {
            assert_eq!(confirm.await, Ok(Ok(stored(1))));
        }
    }
}
