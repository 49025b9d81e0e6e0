//! Pulling. The client crate's own stream of messages reads ahead unseen: what lies in its buffer runs out of its ack wait
//! when the API is slow, and cannot be given back when the lane closes. Here a message is a [`Delivery`] as soon as it has
//! come, so the server is told of it while it waits, and the end of a pull is the server's to say, so nothing is on its way
//! after it.

use std::time::Duration;

use async_nats::{
    StatusCode, Subscriber,
    jetstream::{
        self, Context,
        consumer::{PullConsumer, pull::BatchConfig},
        stream::Stream,
    },
};
use futures_util::StreamExt as _;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tracing::debug;

use super::{
    super::bundle::Kind, Lost, PULL_EXPIRES, PULL_MAX, astray, lose, record, settle::Settler,
};
use crate::delivery::Delivery;

/// Without a word for so long, a pull is taken for lost.
const SILENCE: Duration = Duration::from_secs(3);
/// A peer that leaves so many pulls in a row without a word is gone.
const SILENCES_MAX: u32 = 2;
/// How often the consumer is held against the stream: no record may lie there that it will not deliver.
const LOOK: Duration = Duration::from_secs(10);

/// How one pull ended.
enum End {
    /// As it should: it brought all it could, or its time is over.
    Done,
    Silent,
    Failed(String),
}

/// Pulls into `ready` as it empties, until the connection is lost or closed.
pub async fn pull(
    context: Context,
    (stream, subject): (Stream, String),
    consumer: PullConsumer,
    ready: mpsc::Sender<(Delivery, Kind)>,
    settler: Settler,
    lost: Lost,
) {
    let mut ended = lost.subscribe();
    let client = context.client();
    let inbox = client.new_inbox();
    let mut messages = match client.subscribe(inbox.clone()).await {
        Ok(messages) => messages,
        Err(why) => return lose(&lost, why.to_string()),
    };
    let mut silences = 0;
    let (mut looked, mut passed_over) = (Instant::now(), None);
    loop {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            let look = tokio::select! {
                biased;
                _ = ended.wait_for(Option::is_some) => return,
                look = timeout(SILENCE, astray::look(&stream, &consumer, &subject)) => look,
            };
            match look {
                Ok(Ok(None)) => passed_over = None,
                Ok(Ok(astray)) if astray != passed_over => passed_over = astray,
                Ok(Ok(_)) => {
                    return lose(
                        &lost,
                        "the consumer passes over records of its stream".into(),
                    );
                }
                Ok(Err(why)) => debug!(why, "the consumer cannot be held against its stream"),
                Err(_) => debug!("the consumer cannot be held against its stream: no answer"),
            }
        }
        let room = tokio::select! {
            biased;
            _ = ended.wait_for(Option::is_some) => return,
            room = ready.reserve_many(PULL_MAX) => room,
        };
        // Nobody takes deliveries any more.
        let Ok(mut room) = room else { return };
        let batch = BatchConfig {
            batch: PULL_MAX,
            expires: Some(PULL_EXPIRES),
            ..BatchConfig::default()
        };
        if let Err(why) = consumer.request_batch(batch, inbox.clone().into()).await {
            return lose(&lost, why.to_string());
        }
        match one_pull(&mut messages, &context, &mut room, &settler).await {
            End::Done => silences = 0,
            End::Silent if silences + 1 < SILENCES_MAX => silences += 1,
            End::Silent => {
                return lose(
                    &lost,
                    format!("no answer to a pull within {SILENCE:?}, {SILENCES_MAX} times"),
                );
            }
            End::Failed(why) => return lose(&lost, why),
        }
    }
}

async fn one_pull(
    messages: &mut Subscriber,
    context: &Context,
    room: &mut mpsc::PermitIterator<'_, (Delivery, Kind)>,
    settler: &Settler,
) -> End {
    for place in room {
        let message = match timeout(SILENCE, messages.next()).await {
            Ok(Some(message)) => message,
            Ok(None) => return End::Failed("the client has ended".into()),
            Err(_) => return End::Silent,
        };
        match message.status {
            None => place.send(deliver(
                jetstream::Message {
                    message,
                    context: context.clone(),
                },
                settler,
            )),
            Some(StatusCode::TIMEOUT | StatusCode::NOT_FOUND) => return End::Done,
            Some(status) => {
                let detail = message.description.as_deref().unwrap_or("no reason given");
                return End::Failed(format!("pull refused: {status}, {detail}"));
            }
        }
    }
    End::Done
}

fn deliver(message: jetstream::Message, settler: &Settler) -> (Delivery, Kind) {
    let redelivered = message.info().is_ok_and(|info| info.delivered > 1);
    let (record, kind) = record(&message);
    let delivery = match message.message.reply {
        Some(reply) => Delivery::new(record, redelivered, settler.hold(reply)),
        // JetStream always asks for an ack; a message without it needs none.
        None => Delivery::new(record, redelivered, |_| {}),
    };
    (delivery, kind)
}
