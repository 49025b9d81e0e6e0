//! A consumer that has gone astray. A server that was killed may have forgotten how far its stream had counted, when all messages
//! were settled, and gives the same numbers to new ones; the consumer's own memory is another file, and may be better. Then it
//! takes new messages for old, and never delivers them, although the server has confirmed them.

use async_nats::jetstream::{
    consumer::{FromConsumer as _, PullConsumer, pull},
    stream::{RawMessageErrorKind, Stream},
};

/// What a consumer that has gone astray passes over. Seen once, it may be a matter of a moment: in a cluster the two counts come
/// from two servers, and what is settled may go a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Astray {
    /// It counts on from here, where the stream has not come yet.
    Ahead(u64),
    /// It takes the message of this number for settled; the stream has it.
    Past(u64),
}

/// Whether `consumer` would deliver all that `stream` has, and will have, of `subject`.
pub async fn look(
    stream: &Stream,
    consumer: &PullConsumer,
    subject: &str,
) -> Result<Option<Astray>, String> {
    // The consumer's count first: what it has delivered by then, the stream has had.
    let counts = consumer.get_info().await.map_err(|why| why.to_string())?;
    let last = stream
        .get_info()
        .await
        .map_err(|why| why.to_string())?
        .state
        .last_sequence;
    if counts.delivered.stream_sequence > last {
        return Ok(Some(Astray::Ahead(counts.delivered.stream_sequence)));
    }
    match stream.get_first_raw_message_by_subject(subject, 1).await {
        Ok(first) if first.sequence <= counts.ack_floor.stream_sequence => {
            Ok(Some(Astray::Past(first.sequence)))
        }
        Ok(_) => Ok(None),
        Err(why) if why.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(why) => Err(why.to_string()),
    }
}

/// The same consumer without its memory: it delivers whatever the stream has.
pub async fn begin_anew(
    stream: &Stream,
    consumer: &PullConsumer,
) -> Result<PullConsumer, async_nats::Error> {
    let known = consumer.cached_info();
    stream.delete_consumer(&known.name).await?;
    Ok(stream
        .create_consumer(pull::Config::try_from_consumer_config(
            known.config.clone(),
        )?)
        .await?)
}
