//! Matches confirms with publishes. All publishes share one inbox, and one task hands each confirm
//! to its publish.
//!
//! The client crate's own publish needs a random name and two timers per record, and parses each
//! answer twice: 3 to 5 % more instructions of the node per record.

use std::{borrow::Cow, collections::HashMap, sync::Arc, time::Duration};

use async_nats::{
    Client, Message, StatusCode, Subject,
    jetstream::{self, ErrorCode},
};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::coop::unconstrained,
    time::{MissedTickBehavior, interval},
};
use tracing::debug;
use tracing_mutex::parkinglot::Mutex;

use super::{super::lost::Lost, cannot, seen_stream::SeenStream};
use crate::transport::TransportError;

/// Publishes without a confirm, those whose caller has given up included.
const UNCONFIRMED_MAX: usize = 16_384;
/// A publish without a confirm fails after this, or after twice this at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// Confirms handled in one turn, so that other tasks of this thread wait no longer.
const TURN_MAX: usize = 64;

/// The server's report on a message that it has stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    pub sequence: u64,
    /// It had stored the message before.
    pub duplicate: bool,
}

pub type Confirm = Result<Stored, TransportError>;

/// The publishes that wait for their confirms. Clones share them.
#[derive(Clone)]
pub struct Confirms {
    /// Only this stream's confirms count. Another stream may have taken over the subject.
    stream: Arc<str>,
    seen: Arc<SeenStream>,
    /// The inbox's subject, without the number of the publish.
    inbox: Arc<str>,
    pending: Arc<Mutex<PendingConfirms>>,
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct PendingConfirms {
    is_over: bool,
    next: u64,
    /// Publishes with a lower number were pending at the last round already.
    old_below: u64,
    by_number: HashMap<u64, PendingConfirm>,
}

struct PendingConfirm {
    publish: oneshot::Sender<Confirm>,
    /// The stream's last message when this one was published.
    last: u64,
    _permit: OwnedSemaphorePermit,
}

/// Makes the confirms of one connection and their task, which runs until the connection ends.
pub async fn new(
    client: &Client,
    stream: &str,
    seen: Arc<SeenStream>,
    lost: Lost,
) -> Result<(Confirms, impl Future<Output = ()> + Send + use<>), TransportError> {
    let inbox = client.new_inbox() + ".";
    let answers = client
        .subscribe(format!("{inbox}*"))
        .await
        .map_err(cannot)?;
    let confirms = Confirms {
        stream: stream.into(),
        seen,
        inbox: inbox.into(),
        pending: Arc::default(),
        room: Arc::new(Semaphore::new(UNCONFIRMED_MAX)),
    };
    Ok((
        confirms.clone(),
        run(answers, ConfirmTask { confirms, lost }),
    ))
}

impl Confirms {
    /// Waits for room, and returns the reply subject for one publish and its confirm. The receiver
    /// fails if the connection ends first.
    pub async fn expect(&self) -> (Subject, oneshot::Receiver<Confirm>) {
        let (publish, receiver) = oneshot::channel();
        // Nobody closes the semaphore. If it were closed, the receiver would fail.
        let permit = Arc::clone(&self.room).acquire_owned().await;
        let mut pending = self.pending.lock();
        let number = pending.next;
        pending.next += 1;
        if let (false, Ok(permit)) = (pending.is_over, permit) {
            let confirm = PendingConfirm {
                publish,
                last: self.seen.last(),
                _permit: permit,
            };
            pending.by_number.insert(number, confirm);
        }
        (format!("{}{number}", self.inbox).into(), receiver)
    }

    /// The last message that the stream is known to have; 0 if it has lost some.
    pub fn last_message(&self) -> u64 {
        self.seen.last_present()
    }

    /// The stream has lost its last message. The next connection finds another stream.
    pub fn forget_last_message(&self) {
        self.seen.lose();
    }

    /// Frees the room of a publish that was not sent.
    pub fn forget(&self, reply: &Subject) {
        drop(self.take(reply));
    }

    fn confirm(&self, answer: &Message) {
        match self.take(&answer.subject) {
            Some(PendingConfirm { publish, last, .. }) => {
                let confirm =
                    read(answer, &self.stream).and_then(|stored| self.seen.confirmed(stored, last));
                // This fails if the caller has given up waiting.
                drop(publish.send(confirm));
            }
            None => debug!(
                subject = answer.subject.as_str(),
                "no publish waits for this confirm"
            ),
        }
    }

    fn take(&self, reply: &Subject) -> Option<PendingConfirm> {
        let number: u64 = reply.strip_prefix(&*self.inbox)?.parse().ok()?;
        self.pending.lock().by_number.remove(&number)
    }

    /// Fails the publishes that were pending at the last round already.
    fn give_up_old(&self) {
        let mut pending = self.pending.lock();
        let old_below = pending.old_below;
        pending.old_below = pending.next;
        for (_, confirm) in pending
            .by_number
            .extract_if(|number, _| *number < old_below)
        {
            drop(confirm.publish.send(Err(TransportError::Publish(format!(
                "no answer within {PATIENCE:?}"
            )))));
        }
    }
}

/// When it is dropped, pending publishes fail.
struct ConfirmTask {
    confirms: Confirms,
    lost: Lost,
}

impl Drop for ConfirmTask {
    fn drop(&mut self) {
        // The reason comes first: a publish that fails reads it.
        self.lost.set("the confirms have ended");
        let mut pending = self.confirms.pending.lock();
        pending.is_over = true;
        pending.by_number.clear();
    }
}

async fn run(mut answers: impl Stream<Item = Message> + Unpin, task: ConfirmTask) {
    let mut rounds = interval(PATIENCE);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let lost = task.lost.wait();
    tokio::pin!(lost);
    loop {
        tokio::select! {
            biased;
            _ = &mut lost => break,
            _ = rounds.tick() => {
                // A confirm that came in time counts, however late it is read.
                task.confirm_ready(&mut answers, UNCONFIRMED_MAX);
                task.confirms.give_up_old();
            }
            answer = answers.next() => {
                // `None` means that the client has ended.
                let Some(answer) = answer else { break };
                task.confirms.confirm(&answer);
                task.confirm_ready(&mut answers, TURN_MAX - 1);
            }
        }
    }
    // A message that was confirmed before the loss is stored.
    task.confirm_ready(&mut answers, UNCONFIRMED_MAX);
}

impl ConfirmTask {
    /// Hands on up to `most` confirms that are here. `answers` has no waker afterwards until it is
    /// polled again.
    fn confirm_ready(&self, answers: &mut (impl Stream<Item = Message> + Unpin), most: usize) {
        // `unconstrained`, because a channel looks empty once the task has used up its budget.
        std::iter::from_fn(|| unconstrained(answers.next()).now_or_never().flatten())
            .take(most)
            .for_each(|answer| self.confirms.confirm(&answer));
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

/// Reads the answer to a publish. `Lost` where a new connection may help.
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
        }) => Err(match why.error_code() {
            // The stream's limit is lower than it was at connect.
            ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => TransportError::TooLarge(None),
            _ => TransportError::Refused(why.to_string()),
        }),
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
            seen: Arc::default(),
            inbox: "_INBOX.a.".into(),
            pending: Arc::default(),
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
            matches!(read(failure, None), Err(TransportError::Refused(why)) if why.contains("maximum bytes"))
        );
        let too_large = r#"{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"},"stream":"S","seq":0}"#;
        assert_eq!(read(too_large, None), Err(TransportError::TooLarge(None)));
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
        confirms.confirm(&ack("_INBOX.b.0", 9));
        confirms.confirm(&ack(second, 2));
        assert_eq!(of_second.await, Ok(Ok(stored(2))));
        assert!(of_first.try_recv().is_err(), "nobody has answered it");
        confirms.confirm(&ack(first, 1));
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
        let (confirms, lost) = (confirms(), Lost::default());
        let running = tokio::spawn(run(
            stream::pending(),
            ConfirmTask {
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
        lost.set("closed");
        running.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_come_when_its_time_is_over_counts() {
        let (confirms, (sender, mut receiver)) = (confirms(), mpsc::channel(1));
        let answers = stream::poll_fn(move |context| receiver.poll_recv(context));
        // Polled by hand: its time passes, as it does for a thread that stands still.
        let mut running = pin!(run(
            answers,
            ConfirmTask {
                confirms: confirms.clone(),
                lost: Lost::default()
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
        let never_polled = |task: ConfirmTask| drop(run(stream::pending(), task));
        let ended = |task: ConfirmTask| {
            run(stream::empty(), task)
                .now_or_never()
                .expect("the client has ended");
        };
        for end in [&never_polled as &dyn Fn(ConfirmTask), &ended] {
            let (confirms, lost) = (confirms(), Lost::default());
            let (_, before) = confirms.expect().await;
            end(ConfirmTask {
                confirms: confirms.clone(),
                lost: lost.clone(),
            });
            let over = async { before.await.is_err() && confirms.expect().await.1.await.is_err() };
            assert_eq!(timeout(Duration::from_secs(10), over).await, Ok(true));
            assert!(lost.is_set());
        }
    }

    #[tokio::test]
    async fn what_was_confirmed_before_the_end_counts() {
        const MANY: usize = 1000;
        let mut confirms = confirms();
        let lost = Lost::default();
        lost.set("closed");
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
            ConfirmTask { confirms, lost },
        )
        .await;
        for confirm in waiting {
            assert_eq!(confirm.await, Ok(Ok(stored(1))));
        }
    }
}
