//! Pulls messages.
//!
//! The client crate's own message stream reads ahead unseen. With a slow API, messages in its
//! buffer exceed their ack wait, and they cannot be nakked when the lane closes. Here each
//! message becomes an [`Incoming`] as soon as it arrives, so the settler extends its ack wait. The
//! server ends each pull, so no message is on its way after that. Two pulls take turns: while one
//! ends and its next is on its way, the other brings what comes.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::{
    Message, StatusCode, Subscriber,
    jetstream::{
        self, Context,
        consumer::{PullConsumer, pull::BatchConfig},
        stream::Stream,
    },
};
use futures_util::{StreamExt as _, future::join};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tracing::debug;
use tracing_mutex::parkinglot::Mutex;

use super::{
    super::{Incoming, lost::Lost},
    PULL_EXPIRES, PULL_MAX, PULLS,
    consumer_check::{Skew, check},
    message,
    settle::Settler,
};

/// Without any answer for this long, a pull is lost.
const SILENCE: Duration = Duration::from_secs(3);
/// After this many lost pulls in a row, so is the connection.
const SILENCES_MAX: u32 = 2;
/// The least time between the ends of the two pulls. A longer round trip is a gap.
const PULLS_APART: Duration = Duration::from_millis(330);
/// How often the consumer is compared with its stream.
const CHECK_PERIOD: Duration = Duration::from_secs(10);

/// How one pull ended.
enum PullEnd {
    /// It brought all that it could, or it expired.
    Done,
    Silent,
    Failed(String),
}

/// When the pulls in flight expire.
#[derive(Default)]
struct PullEnds(Mutex<[Option<Instant>; PULLS]>);

impl PullEnds {
    /// How long the next pull of one of the two lasts: to an end that is apart from that of the
    /// other one, so that no record waits for a round trip between two pulls.
    fn next(&self, turn: usize, now: Instant) -> Duration {
        let mut ends = self.0.lock();
        let latest = now + PULL_EXPIRES;
        let end = match ends[1 - turn] {
            Some(other) if other + PULLS_APART > latest => other - PULLS_APART,
            _ => latest,
        };
        ends[turn] = Some(end);
        end - now
    }
}

/// The pulling task of one connection.
pub struct Puller {
    pub context: Context,
    pub stream: Stream,
    pub subject: String,
    pub consumer: PullConsumer,
    pub ready: mpsc::Sender<Incoming>,
    /// Counts the messages that came, redeliveries included.
    pub received: Arc<AtomicU64>,
    pub settler: Settler,
    pub lost: Lost,
}

impl Puller {
    /// Pulls into `ready` as it empties, until the connection is lost or closed. A pull under way
    /// is not interrupted: `close` naks the messages that it brings.
    pub async fn run(self) {
        let ends = PullEnds::default();
        let skips = AtomicBool::new(false);
        // The failure of one ends the connection, and so the other one: once its pull has brought
        // what is on its way.
        let pull_in_turn = async |turn| {
            if let Err(why) = self.pull_in_turn(turn, &ends, &skips).await {
                self.lost.set(why);
            }
        };
        tokio::select! {
            _ = join(pull_in_turn(0), pull_in_turn(1)) => {}
            // Beside the pulls: it takes several round trips, in which no record would come.
            never = self.watch_consumer(&skips) => match never {},
        }
    }

    /// Pulls again as soon as a pull has ended. `Ok` once the connection is lost or closed. An error
    /// is a reason for its loss.
    async fn pull_in_turn(
        &self,
        turn: usize,
        ends: &PullEnds,
        skips: &AtomicBool,
    ) -> Result<(), String> {
        let client = self.context.client();
        let inbox = client.new_inbox();
        let mut messages = client
            .subscribe(inbox.clone())
            .await
            .map_err(|why| why.to_string())?;
        let mut silences = 0;
        loop {
            if skips.load(Relaxed) {
                return Err("the consumer skips records of its stream".into());
            }
            let room = self.lost.guard(self.ready.reserve_many(PULL_MAX)).await;
            let Ok(Ok(mut room)) = room else {
                return Ok(());
            };
            let batch = BatchConfig {
                batch: PULL_MAX,
                expires: Some(ends.next(turn, Instant::now())),
                ..BatchConfig::default()
            };
            let request = self.consumer.request_batch(batch, inbox.clone().into());
            request.await.map_err(|why| why.to_string())?;
            match self.one_pull(&mut messages, &mut room).await {
                PullEnd::Done => silences = 0,
                PullEnd::Silent if silences + 1 < SILENCES_MAX => silences += 1,
                PullEnd::Silent => {
                    return Err(format!(
                        "no answer to a pull within {SILENCE:?}, {SILENCES_MAX} times"
                    ));
                }
                PullEnd::Failed(why) => return Err(why),
            }
        }
    }

    /// Sets `skips` once the consumer does not deliver each message of its stream.
    async fn watch_consumer(&self, skips: &AtomicBool) -> Infallible {
        let mut skew = None;
        loop {
            sleep(CHECK_PERIOD).await;
            match self.check().await {
                // The same finding twice is not momentary.
                Ok(Some(found)) if Some(found) == skew => skips.store(true, Relaxed),
                Ok(found) => skew = found,
                Err(why) => debug!(
                    reason = why,
                    "the consumer cannot be compared with its stream"
                ),
            }
        }
    }

    async fn check(&self) -> Result<Option<Skew>, String> {
        let check = check(&self.stream, &self.consumer, &self.subject);
        timeout(SILENCE, check)
            .await
            .unwrap_or_else(|_| Err("no answer".into()))
    }

    async fn one_pull(
        &self,
        messages: &mut Subscriber,
        room: &mut mpsc::PermitIterator<'_, Incoming>,
    ) -> PullEnd {
        for permit in room {
            let message = match timeout(SILENCE, messages.next()).await {
                Ok(Some(message)) => message,
                Ok(None) => return PullEnd::Failed("the client has ended".into()),
                Err(_) => return PullEnd::Silent,
            };
            match message.status {
                None => permit.send(self.deliver(message)),
                Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => return PullEnd::Done,
                Some(status) => {
                    let detail = message.description.as_deref().unwrap_or("no reason given");
                    // The consumer takes few pulls, and others have made them.
                    if detail.contains("MaxWaiting") {
                        sleep(PULL_EXPIRES).await;
                        return PullEnd::Done;
                    }
                    return PullEnd::Failed(format!("pull refused: {status}, {detail}"));
                }
            }
        }
        PullEnd::Done
    }

    fn deliver(&self, message: Message) -> Incoming {
        self.received.fetch_add(1, Relaxed);
        let context = self.context.clone();
        let stored = jetstream::Message { message, context };
        let redelivered = stored.info().is_ok_and(|info| info.delivered > 1);
        let message = self::message(&stored);
        match stored.message.reply {
            Some(reply) => Incoming::new(message, redelivered, self.settler.track(reply)),
            // JetStream always asks for an ack. A message that asks for none needs none.
            None => Incoming::new(message, redelivered, |_| {}),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whenever a pull ends and is made again: it may expire, or bring all that it can before.
    #[test]
    fn the_two_pulls_never_expire_at_the_same_time() {
        let mut random = fastrand::Rng::with_seed(7);
        let pulls = PullEnds::default();
        let mut now = Instant::now();
        let mut ends = [now; PULLS];
        for _ in 0..10_000 {
            now += PULL_EXPIRES.mul_f64(random.f64());
            let turn = random.usize(0..PULLS);
            let lasts = pulls.next(turn, now);
            assert!((PULLS_APART..=PULL_EXPIRES).contains(&lasts), "{lasts:?}");
            ends[turn] = now + lasts;
            let other = ends[1 - turn];
            let apart = ends[turn].max(other) - ends[turn].min(other);
            assert!(other <= now || apart >= PULLS_APART, "{apart:?}");
        }
    }
}
