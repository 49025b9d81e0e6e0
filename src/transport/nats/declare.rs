//! Creates the stream and its consumer if they are missing, and checks their settings if they
//! exist.

use std::{error::Error as _, time::Duration};

use async_nats::jetstream::{
    Context, ErrorCode,
    consumer::{AckPolicy, Config as Consumer, DeliverPolicy, PullConsumer, pull},
    context::{
        ConsumerInfoErrorKind, GetStreamError, GetStreamErrorKind, RequestError, RequestErrorKind,
    },
    stream::{
        Config, ConsumerError, DiscardPolicy, Info, PersistenceMode, RetentionPolicy, StorageType,
        Stream,
    },
};
use tokio::time::sleep;
use tracing::warn;

use super::{
    ACK_PENDING_MAX, ACK_WAIT, DUPLICATE_WINDOW, PULL_EXPIRES, PULL_MAX, cannot, consumer_check,
};
use crate::{config, transport::TransportError};

const JETSTREAM_OFF: &str = "JetStream is not enabled: start the server with `-js`, or enable \
                             JetStream for the account";
/// A server's text, under different codes, if the files of a consumer that is to be created are
/// there and damaged.
const STORE_FAILED: &str = "creating store for consumer";
/// A settled message has left the stream after this, in a cluster too.
const SETTLING: Duration = Duration::from_secs(1);

/// A server removes the files of a deleted stream in the background. A stream created under the
/// same name meanwhile loses its own files, with the messages that it has confirmed. The server
/// does not say when it is done; a small stream takes less than this.
const REMOVAL: Duration = Duration::from_secs(1);

pub struct DeclaredStream {
    pub stream: Stream,
    pub consumer: PullConsumer,
    /// Settings that weaken the guarantee.
    pub warnings: Vec<String>,
}

/// Creates the stream and the consumer if they are missing. Existing ones are checked and never
/// changed.
pub async fn declare(
    context: &Context,
    settings: &config::NatsConfig,
) -> Result<DeclaredStream, TransportError> {
    let stream = &settings.stream;
    let durable = &settings.durable;
    let cannot_have = |what: String, why: String| cannot(format!("{what}: {why}"));
    let found = match context.get_stream(stream).await {
        Err(why) if is_missing(&why) => {
            sleep(REMOVAL).await;
            context
                .get_or_create_stream(stream_wanted(settings))
                .await
                .map_err(|why| why.to_string())
        }
        Err(why) if is_off(&why) => return Err(cannot(JETSTREAM_OFF)),
        found => found.map_err(|why| why.to_string()),
    };
    let found = found.map_err(|why| cannot_have(format!("stream {stream}"), why))?;
    check_stream(found.cached_info(), settings)?;
    let consumer = get_or_create_consumer(&found, settings).await;
    let consumer: PullConsumer =
        consumer.map_err(|why| cannot_have(format!("consumer {durable}"), why.to_string()))?;
    let config = &consumer.cached_info().config;
    check_consumer(config, settings)?;
    let warnings = warnings(found.cached_info(), config);
    let consumer = without_skew(&found, consumer, settings)
        .await
        .map_err(|why| cannot_have(format!("consumer {durable}"), why))?;
    Ok(DeclaredStream {
        stream: found,
        consumer,
        warnings,
    })
}

/// What is known of the stream and its consumer.
pub struct InspectedStream {
    /// `None` if it is missing.
    pub stream: Option<Info>,
    pub found: Vec<String>,
    pub warnings: Vec<String>,
}

/// Checks the stream and the consumer as [`declare`] does, and creates nothing.
pub async fn inspect(
    context: &Context,
    settings: &config::NatsConfig,
) -> Result<InspectedStream, TransportError> {
    let (stream, durable) = (&settings.stream, &settings.durable);
    let mut inspected = InspectedStream {
        stream: None,
        found: Vec::new(),
        warnings: Vec::new(),
    };
    let found = match context.get_stream(stream).await {
        Err(why) if is_missing(&why) => {
            let missing = format!("stream {stream} is missing: a node creates it");
            inspected.found.push(missing);
            return Ok(inspected);
        }
        Err(why) if is_off(&why) => return Err(cannot(JETSTREAM_OFF)),
        found => found.map_err(|why| cannot(format!("stream {stream}: {why}")))?,
    };
    let info = found.cached_info();
    check_stream(info, settings)?;
    inspected.found.push(format!("stream {stream} fits"));
    inspected.stream = Some(info.clone());
    match found.consumer_info(durable).await {
        Err(why) if why.kind() == ConsumerInfoErrorKind::NotFound => {
            let missing = format!("consumer {durable} is missing: a node creates it");
            inspected.found.push(missing);
        }
        consumer => {
            let consumer = consumer.map_err(|why| cannot(format!("consumer {durable}: {why}")))?;
            check_consumer(&consumer.config, settings)?;
            inspected.found.push(format!("consumer {durable} fits"));
            inspected.warnings = warnings(info, &consumer.config);
        }
    }
    Ok(inspected)
}

fn check_stream(found: &Info, settings: &config::NatsConfig) -> Result<(), TransportError> {
    let Some(difference) = stream_difference(&found.config, settings) else {
        return Ok(());
    };
    let stream = &settings.stream;
    let why = format!("stream {stream} exists with other settings: {difference}");
    Err(cannot(why))
}

fn check_consumer(found: &Consumer, settings: &config::NatsConfig) -> Result<(), TransportError> {
    let Some(difference) = consumer_difference(found, settings) else {
        return Ok(());
    };
    let config::NatsConfig {
        stream, durable, ..
    } = settings;
    let why =
        format!("consumer {durable} of stream {stream} exists with other settings: {difference}");
    Err(cannot(why))
}

fn is_missing(why: &GetStreamError) -> bool {
    matches!(why.kind(), GetStreamErrorKind::JetStream(why) if why.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Whether the server says that it, or the account, has no `JetStream`. A server that has none says
/// so by having nobody to ask.
fn is_off(why: &GetStreamError) -> bool {
    match why.kind() {
        GetStreamErrorKind::JetStream(why) => [
            ErrorCode::JETSTREAM_NOT_ENABLED,
            ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT,
        ]
        .contains(&why.error_code()),
        GetStreamErrorKind::Request => why
            .source()
            .and_then(|source| source.downcast_ref::<RequestError>())
            .is_some_and(|why| why.kind() == RequestErrorKind::NoResponders),
        _ => false,
    }
}

/// A power cut empties the files of a consumer that was just created. The server then has no such
/// consumer, and cannot create it on disk; in memory it can. That loses nothing: the stream keeps
/// each message until it is settled.
async fn get_or_create_consumer(
    stream: &Stream,
    settings: &config::NatsConfig,
) -> Result<PullConsumer, ConsumerError> {
    let durable = &settings.durable;
    let wanted = consumer_wanted(settings);
    let found = stream.get_or_create_consumer(durable, wanted.clone()).await;
    match found {
        Err(why) if why.to_string().contains(STORE_FAILED) => {
            warn!(
                stream = settings.stream,
                consumer = durable,
                reason = %why,
                "the server cannot open the consumer's files: the consumer is created in memory; \
                 to have it on file again, stop the server, remove the folder `obs/{durable}` of \
                 the stream, and start it"
            );
            let in_memory = pull::Config {
                memory_storage: true,
                ..wanted
            };
            stream.create_consumer(in_memory).await
        }
        found => found,
    }
}

/// `consumer`, or a new one if it would skip records of the stream.
async fn without_skew(
    stream: &Stream,
    consumer: PullConsumer,
    settings: &config::NatsConfig,
) -> Result<PullConsumer, String> {
    let check = || consumer_check::check(stream, &consumer, &settings.subject);
    let skew = match check().await {
        Ok(None) => return Ok(consumer),
        Ok(first) => {
            sleep(SETTLING).await;
            check().await.map(|again| again.filter(|_| again == first))
        }
        Err(why) => Err(why),
    };
    match skew {
        Ok(None) => Ok(consumer),
        Ok(Some(skew)) => {
            warn!(
                stream = settings.stream,
                consumer = settings.durable,
                reason = %skew,
                "the consumer would skip records: it is recreated"
            );
            consumer_check::recreate(stream, &consumer)
                .await
                .map_err(|why| why.to_string())
        }
        Err(why) => {
            warn!(
                stream = settings.stream,
                reason = why,
                "the consumer cannot be compared with its stream"
            );
            Ok(consumer)
        }
    }
}

fn stream_wanted(settings: &config::NatsConfig) -> Config {
    Config {
        name: settings.stream.clone(),
        subjects: vec![settings.subject.clone()],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        num_replicas: settings.replicas,
        duplicate_window: DUPLICATE_WINDOW,
        ..Config::default()
    }
}

fn consumer_wanted(settings: &config::NatsConfig) -> pull::Config {
    pull::Config {
        durable_name: Some(settings.durable.clone()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_ack_pending: ACK_PENDING_MAX,
        // The stream may have other subjects too.
        filter_subject: settings.subject.clone(),
        ..pull::Config::default()
    }
}

/// The setting of an existing stream that could lose records, or is weaker than the configuration.
fn stream_difference(found: &Config, settings: &config::NatsConfig) -> Option<String> {
    let subject = &settings.subject;
    if found.retention != RetentionPolicy::WorkQueue {
        Some(format!(
            "its retention is {:?}, not WorkQueue",
            found.retention
        ))
    } else if !found.subjects.contains(subject) {
        Some(format!(
            "its subjects are {:?}, without {subject}",
            found.subjects
        ))
    } else if found.num_replicas < settings.replicas {
        Some(format!(
            "it has {} replicas, not {}",
            found.num_replicas, settings.replicas
        ))
    } else if !found.max_age.is_zero() {
        Some(format!("its max_age of {:?} drops messages", found.max_age))
    } else if found.discard == DiscardPolicy::Old && (found.max_messages > 0 || found.max_bytes > 0)
    {
        Some("its limits with discard Old drop messages".into())
    } else if found.max_messages_per_subject > 0 && !found.discard_new_per_subject {
        Some("its max_msgs_per_subject without discard_new_per_subject drops messages".into())
    } else if found.no_ack {
        Some("its no_ack leaves messages unconfirmed".into())
    } else if found.persist_mode == Some(PersistenceMode::Async) {
        Some("its persist_mode is Async: it confirms what it has not stored".into())
    } else if found.sealed {
        Some("it is sealed and takes no messages".into())
    } else {
        None
    }
}

/// The setting of an existing consumer that could lose records or leave them undelivered.
fn consumer_difference(found: &Consumer, settings: &config::NatsConfig) -> Option<String> {
    let filters = || {
        [&found.filter_subject]
            .into_iter()
            .chain(&found.filter_subjects)
            .filter(|filter| !filter.is_empty())
    };
    if found.deliver_subject.is_some() {
        Some("it is a push consumer".into())
    } else if found.ack_policy != AckPolicy::Explicit {
        Some(format!(
            "its ack policy is {:?}, not Explicit",
            found.ack_policy
        ))
    } else if found.max_deliver > 0 {
        Some(format!(
            "it gives a message up after {} deliveries",
            found.max_deliver
        ))
    } else if found.deliver_policy != DeliverPolicy::All {
        Some(format!(
            "its deliver policy is {:?}, not All",
            found.deliver_policy
        ))
    } else if filters().next().is_some() && !filters().any(|filter| *filter == settings.subject) {
        Some(format!(
            "it filters {:?}, not {}",
            filters().collect::<Vec<_>>(),
            settings.subject
        ))
    } else if found.headers_only {
        Some("it delivers headers only".into())
    } else if !found.backoff.is_empty() {
        Some("its backoff sends again what is still held".into())
    } else if found.max_batch > 0 && found.max_batch < i64::try_from(PULL_MAX).unwrap_or(i64::MAX) {
        Some(format!(
            "its max_batch is {}, under {PULL_MAX}",
            found.max_batch
        ))
    } else if !found.max_expires.is_zero() && found.max_expires < PULL_EXPIRES {
        Some(format!(
            "its max_expires is {:?}, under {PULL_EXPIRES:?}",
            found.max_expires
        ))
    } else {
        None
    }
}

fn warnings(stream: &Info, consumer: &Consumer) -> Vec<String> {
    let config = &stream.config;
    let name = &config.name;
    let mut warnings = Vec::new();
    if config.storage == StorageType::Memory {
        warnings.push(format!(
            "stream {name} is in memory: what was confirmed is gone when the server ends"
        ));
    }
    if stream.cluster.is_some() && config.num_replicas < 2 {
        warnings.push(format!(
            "stream {name} has one replica: what was confirmed is as safe as one server's disk"
        ));
    }
    if config.duplicate_window < DUPLICATE_WINDOW {
        warnings.push(format!(
            "stream {name} knows duplicates for {:?} only",
            config.duplicate_window
        ));
    }
    if consumer.memory_storage {
        warnings
            .push("the consumer's state is in memory: what was acknowledged may come again".into());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    // One row per case, so it is long.
    #[test]
    fn a_stream_that_would_lose_records_is_detected() {
        let settings = config::NatsConfig {
            subject: "b".into(),
            replicas: 3,
            ..config::NatsConfig::default()
        };
        let good = Config {
            subjects: vec!["a".into(), "b".into()],
            max_messages: 10,
            ..stream_wanted(&settings)
        };
        assert_eq!(stream_difference(&good, &settings), None);
        for (bad, names) in [
            (
                Config {
                    retention: RetentionPolicy::Limits,
                    ..good.clone()
                },
                "retention",
            ),
            (
                Config {
                    subjects: vec!["c".into()],
                    ..good.clone()
                },
                "subjects",
            ),
            (
                Config {
                    num_replicas: 1,
                    ..good.clone()
                },
                "1 replicas, not 3",
            ),
            (
                Config {
                    max_age: Duration::from_secs(1),
                    ..good.clone()
                },
                "max_age",
            ),
            (
                Config {
                    discard: DiscardPolicy::Old,
                    ..good.clone()
                },
                "discard Old",
            ),
            (
                Config {
                    max_messages_per_subject: 5,
                    ..good.clone()
                },
                "max_msgs_per_subject",
            ),
            (
                Config {
                    no_ack: true,
                    ..good.clone()
                },
                "no_ack",
            ),
            (
                Config {
                    persist_mode: Some(PersistenceMode::Async),
                    ..good.clone()
                },
                "persist_mode",
            ),
            (
                Config {
                    sealed: true,
                    ..good.clone()
                },
                "sealed",
            ),
        ] {
            let difference = stream_difference(&bad, &settings).unwrap_or_default();
            assert!(difference.contains(names), "{names}: {difference}");
        }
    }

    // One row per case, so it is long.
    #[test]
    fn a_consumer_that_would_lose_records_is_detected() {
        let settings = config::NatsConfig {
            subject: "b".into(),
            ..config::NatsConfig::default()
        };
        let good = Consumer {
            max_deliver: -1,
            filter_subject: "b".into(),
            ..Consumer::default()
        };
        assert_eq!(consumer_difference(&good, &settings), None);
        assert_eq!(
            consumer_difference(
                &Consumer {
                    filter_subject: String::new(),
                    ..good.clone()
                },
                &settings
            ),
            None
        );
        for (bad, names) in [
            (
                Consumer {
                    deliver_subject: Some("x".into()),
                    ..good.clone()
                },
                "push",
            ),
            (
                Consumer {
                    ack_policy: AckPolicy::None,
                    ..good.clone()
                },
                "ack policy",
            ),
            (
                Consumer {
                    max_deliver: 20,
                    ..good.clone()
                },
                "20 deliveries",
            ),
            (
                Consumer {
                    deliver_policy: DeliverPolicy::New,
                    ..good.clone()
                },
                "deliver policy",
            ),
            (
                Consumer {
                    filter_subject: "c".into(),
                    ..good.clone()
                },
                "filters [\"c\"], not b",
            ),
            (
                Consumer {
                    headers_only: true,
                    ..good.clone()
                },
                "headers only",
            ),
            (
                Consumer {
                    backoff: vec![Duration::from_secs(1)],
                    ..good.clone()
                },
                "backoff",
            ),
            (
                Consumer {
                    max_batch: 1,
                    ..good.clone()
                },
                "max_batch",
            ),
            (
                Consumer {
                    max_expires: Duration::from_millis(1),
                    ..good.clone()
                },
                "max_expires",
            ),
        ] {
            let difference = consumer_difference(&bad, &settings).unwrap_or_default();
            assert!(difference.contains(names), "{names}: {difference}");
        }
    }
}
