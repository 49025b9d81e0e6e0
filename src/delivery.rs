//! What happens to a record at either end of a lane: the [`Receipt`] that proves that it is safe, the [`Delivery`] that
//! must be settled, and the classification of the API's answers.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::broadcast, time::Instant};

use crate::record::Record;

/// One way from ingest to the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LaneId {
    Grpc,
    Nats,
    Rabbitmq,
    Pubsub,
    /// In memory, for tests.
    Memory,
}

impl LaneId {
    pub const ALL: [Self; 5] = [Self::Grpc, Self::Nats, Self::Rabbitmq, Self::Pubsub, Self::Memory];

    /// The name in the configuration, in URLs and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Nats => "nats",
            Self::Rabbitmq => "rabbitmq",
            Self::Pubsub => "pubsub",
            Self::Memory => "memory",
        }
    }

    /// The tag that the lane writes unless it is configured otherwise.
    #[must_use]
    pub const fn default_tag(self) -> &'static str {
        match self {
            Self::Grpc => "GRPC",
            Self::Nats => "NATS",
            Self::Rabbitmq => "RabbitMQ",
            Self::Pubsub => "PubSub",
            Self::Memory => "Memory",
        }
    }

    /// The lane of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The proof that a record is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// The lane's broker has confirmed it.
    Lane(LaneId),
    /// It is on this node's disk.
    Spool,
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The API has it: the broker may forget it.
    Ack,
    /// Not delivered: the broker sends it again, not before this time has passed.
    RetryAfter(Duration),
    /// It will never be delivered, and it is kept elsewhere: the broker may forget it.
    Reject,
    /// Nobody decided (a panic, a dropped task, a drain): not delivered, the broker sends it again.
    Unsettled,
}

/// A record that came out of a transport, held by it until it is settled, which happens exactly once. Dropped, it is
/// *not delivered*. While it lives the transport keeps the broker's hold on it, however long that takes.
pub struct Delivery {
    pub record: Record,
    /// The broker says that it has sent this message before.
    pub redelivered: bool,
    /// When the message came, out of the client crate at the latest.
    pub since: Instant,
    settle: Option<Box<dyn FnOnce(Verdict) + Send>>,
}

impl Delivery {
    /// `settle` is called exactly once. It must not block; what it has to send, the transport's `close` waits for.
    #[must_use]
    pub fn new(record: Record, redelivered: bool, settle: impl FnOnce(Verdict) + Send + 'static) -> Self {
        Self { record, redelivered, since: Instant::now(), settle: Some(Box::new(settle)) }
    }

    /// Settles it: the API's 2xx is here.
    pub fn ack(self) {
        self.end(Verdict::Ack);
    }

    /// Gives it back to the broker for another try after `delay`.
    pub fn retry_after(self, delay: Duration) {
        self.end(Verdict::RetryAfter(delay));
    }

    /// Settles it without the API: its dead letter is on disk.
    pub fn reject(self) {
        self.end(Verdict::Reject);
    }

    fn end(mut self, verdict: Verdict) {
        if let Some(settle) = self.settle.take() {
            settle(verdict);
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(settle) = self.settle.take() {
            settle(Verdict::Unsettled);
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("id", &self.record.id)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

/// What came of one POST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The API answered; `excerpt` is the start of its answer, empty for a 2xx.
    Status { status: u16, retry_after: Option<Duration>, excerpt: String },
    /// No answer: refused, cut, or timed out. The API may have the record.
    NoAnswer(String),
}

/// What follows from an [`Answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Delivered,
    /// Try again, not before `at_least` where the API asked for a pause.
    Retry {
        at_least: Option<Duration>,
    },
    /// The API will never take this record.
    Refused,
}

/// The longest pause that an API can ask for with `Retry-After`.
pub const RETRY_AFTER_MAX: Duration = Duration::from_mins(5);

impl Answer {
    /// Any 2xx is delivered; 408, 425, 429, 5xx and no answer are tried again; all else is refused.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match *self {
            Self::Status { status: 200..=299, .. } => Outcome::Delivered,
            Self::Status { status: 408 | 425 | 429 | 500..=599, retry_after, .. } => {
                Outcome::Retry { at_least: retry_after.map(|d| d.min(RETRY_AFTER_MAX)) }
            }
            Self::Status { .. } => Outcome::Refused,
            Self::NoAnswer(_) => Outcome::Retry { at_least: None },
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status { status, excerpt, .. } if excerpt.is_empty() => write!(f, "status {status}"),
            Self::Status { status, excerpt, .. } => write!(f, "status {status}: {excerpt}"),
            Self::NoAnswer(why) => f.write_str(why),
        }
    }
}

/// A record as the API took it: what `tap` and the gRPC call `Watch` show.
#[derive(Clone, Debug)]
pub struct Passage {
    pub lane: LaneId,
    pub id: Arc<str>,
    /// The body that was POSTed, tag included.
    pub body: Bytes,
    pub status: u16,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// How many passages a slow watcher may lag behind before it misses some.
const TAP_LAG: usize = 1024;

/// Where passages are announced. A watcher that is slow misses some; the records themselves do not wait for it. Clones are
/// one tap.
#[derive(Clone, Default)]
pub struct Tap {
    /// Absent until somebody watches: it has room for [`TAP_LAG`] passages from its beginning.
    passages: Arc<OnceLock<broadcast::Sender<Passage>>>,
}

impl Tap {
    /// What passes from now on.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Passage> {
        self.passages.get_or_init(|| broadcast::Sender::new(TAP_LAG)).subscribe()
    }

    /// Shows a passage to those who watch. It is made only if there are any.
    pub fn show(&self, passage: impl FnOnce() -> Passage) {
        if let Some(passages) = self.passages.get()
            && passages.receiver_count() > 0
        {
            // The last watcher may have left since; passages are for watching only.
            passages.send(passage()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn delivery() -> (Delivery, Arc<Mutex<Vec<Verdict>>>) {
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&verdicts);
        let record = Record { id: Arc::from("1"), body: Bytes::from_static(b"{}"), traceparent: None, origin: None };
        (Delivery::new(record, false, move |verdict| kept.lock().unwrap().push(verdict)), verdicts)
    }

    #[test]
    fn a_delivery_is_settled_exactly_once_and_dropped_means_not_delivered() {
        let (delivery, verdicts) = self::delivery();
        delivery.ack();
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Ack]);
        let (delivery, verdicts) = self::delivery();
        delivery.retry_after(Duration::from_secs(3));
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::RetryAfter(Duration::from_secs(3))]);
        let (delivery, verdicts) = self::delivery();
        delivery.reject();
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Reject]);
        let (delivery, verdicts) = self::delivery();
        drop(delivery);
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Unsettled]);
    }

    #[test]
    fn a_passage_is_made_for_those_who_watch_and_for_nobody_else() {
        let tap = Tap::default();
        let passage = || {
            let (id, body) = (Arc::from("1"), Bytes::from_static(b"{}"));
            Passage { lane: LaneId::Nats, id, body, status: 201, at_ms: 5 }
        };
        let nobody = || unreachable!("nobody watches");
        tap.show(nobody);
        let mut watching = tap.clone().watch();
        tap.show(passage);
        assert_eq!(&*watching.try_recv().unwrap().id, "1");
        drop(watching);
        tap.show(nobody);
    }

    #[test]
    fn answers_are_classified_as_the_contract_says() {
        let status = |status, retry_after| Answer::Status { status, retry_after, excerpt: String::new() };
        let retry = |at_least| Outcome::Retry { at_least };
        let second = Some(Duration::from_secs(1));
        for (answer, outcome) in [
            (status(200, None), Outcome::Delivered),
            (status(202, second), Outcome::Delivered),
            (status(299, None), Outcome::Delivered),
            (status(408, None), retry(None)),
            (status(425, None), retry(None)),
            (status(429, second), retry(second)),
            (status(500, None), retry(None)),
            (status(503, second), retry(second)),
            (status(503, Some(Duration::from_hours(1000))), retry(Some(RETRY_AFTER_MAX))),
            (status(599, None), retry(None)),
            (status(301, None), Outcome::Refused),
            (status(307, second), Outcome::Refused),
            (status(400, None), Outcome::Refused),
            (status(404, None), Outcome::Refused),
            (status(413, None), Outcome::Refused),
            (status(101, None), Outcome::Refused),
            (Answer::NoAnswer("refused".into()), retry(None)),
        ] {
            assert_eq!(answer.outcome(), outcome, "{answer:?}");
        }
    }
}
