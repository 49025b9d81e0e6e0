//! Detects a consumer that will never deliver some messages of its stream.
//!
//! A server that was killed may forget its stream's last sequence number, once all messages were
//! settled, and number new messages from an earlier one. The consumer keeps its position in another
//! file, which may be newer. It then takes the new messages for settled ones, and never delivers
//! them although the server has confirmed them.

use async_nats::jetstream::{
    consumer::{FromConsumer as _, PullConsumer, pull},
    stream::{RawMessageErrorKind, Stream},
};

/// How a consumer and its stream disagree. One finding may be momentary: in a cluster the two
/// counts come from two servers, and a settled message may be removed a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Skew {
    #[error("the consumer has delivered message {0}, which the stream has not reached")]
    ConsumerAhead(u64),
    #[error("the consumer takes message {0} for settled, and the stream still has it")]
    MessageSkipped(u64),
}

/// Compares `consumer` with `stream`. `None` means that it will deliver every message of `subject`.
pub async fn check(
    stream: &Stream,
    consumer: &PullConsumer,
    subject: &str,
) -> Result<Option<Skew>, String> {
    // The consumer comes first: the stream reached each number before the consumer delivered it.
    let counts = consumer.get_info().await.map_err(|why| why.to_string())?;
    let stream_info = stream.get_info().await.map_err(|why| why.to_string())?;
    let delivered = counts.delivered.stream_sequence;
    if delivered > stream_info.state.last_sequence {
        return Ok(Some(Skew::ConsumerAhead(delivered)));
    }
    match stream.get_first_raw_message_by_subject(subject, 1).await {
        Ok(first) if first.sequence <= counts.ack_floor.stream_sequence => {
            Ok(Some(Skew::MessageSkipped(first.sequence)))
        }
        Ok(_) => Ok(None),
        Err(why) if why.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(why) => Err(why.to_string()),
    }
}

/// Replaces `consumer` by one with the same settings and no position: it delivers all that the
/// stream has.
pub async fn recreate(
    stream: &Stream,
    consumer: &PullConsumer,
) -> Result<PullConsumer, async_nats::Error> {
    let info = consumer.cached_info();
    stream.delete_consumer(&info.name).await?;
    let config = pull::Config::try_from_consumer_config(info.config.clone())?;
    Ok(stream.create_consumer(config).await?)
}
