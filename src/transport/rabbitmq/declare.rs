//! Finds the queue and checks its settings, or creates it. Says which right the user lacks.

use std::time::Duration;

use lapin::{
    Channel, Error, ErrorKind, Queue,
    options::QueueDeclareOptions,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::time::sleep;

use super::link::Link;

/// The broker writes the name of a new quorum queue to disk only when its list of names has been
/// still for two times 500 ms. Killed before, it forgets the queue with all that it has confirmed
/// there.
const NAME_ON_DISK: Duration = Duration::from_millis(1500);

/// How often the broker may send one message before it drops it: in effect, no limit. Version 4
/// has a limit of 20 by default, and takes -1 for "none". Version 3 takes -1 too, but drops a
/// message the first time that it is nacked.
const DELIVERY_LIMIT: i64 = i32::MAX as i64;

/// What is there under the queue's name.
pub(super) enum ExistingQueue {
    Missing,
    /// Durable, replicated, and without a limit of redeliveries.
    Fits,
    /// Its settings could not be checked. The reason is a warning.
    Unchecked(String),
}

/// Looks for the queue, which needs no right, and checks its settings. Creates nothing.
///
/// # Errors
/// If the queue cannot be found, or has other settings. The error names the right that is missing.
pub(super) async fn inspect(link: &Link, queue: &ShortString) -> Result<ExistingQueue, String> {
    // The broker closes the channel of a declaration that fails.
    let channel = link.new_channel().await;
    let channel = channel.map_err(|why| format!("open a channel: {why}"))?;
    match find(&channel, queue).await {
        Ok(_) => check(&channel, queue).await,
        Err(why) if is(&why, AMQPSoftError::NOTFOUND) => Ok(ExistingQueue::Missing),
        Err(why) => Err(failed("look for the queue", "configure", queue)(why)),
    }
}

/// Creates the queue: durable, replicated, and without a limit of redeliveries.
///
/// # Errors
/// If the broker refuses. The error names the right that is missing.
pub(super) async fn create(link: &Link, queue: &ShortString) -> Result<(), String> {
    let step = "create the queue, which is missing";
    let declared = declare_as_wanted(&link.channel, queue).await;
    declared.map_err(failed(step, "configure", queue))?;
    sleep(NAME_ON_DISK).await;
    Ok(())
}

/// The counts of the queue. The broker closes the channel if there is none.
pub(super) async fn find(channel: &Channel, queue: &ShortString) -> lapin::Result<Queue> {
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declared = channel.queue_declare(queue.clone(), options, FieldTable::default());
    declared.await
}

/// The broker tells the settings of a queue only by comparing them with a declaration, for which
/// the user needs the right to configure it.
async fn check(channel: &Channel, queue: &ShortString) -> Result<ExistingQueue, String> {
    match declare_as_wanted(channel, queue).await {
        Ok(()) => {
            // An error means that the channel is closed already.
            channel.close(super::link::OK, "checked".into()).await.ok();
            Ok(ExistingQueue::Fits)
        }
        Err(why) if is(&why, AMQPSoftError::ACCESSREFUSED) => {
            Ok(ExistingQueue::Unchecked(format!(
                "queue {queue} is not checked, because the user has no right to `configure` it: it may lose records unless it is a quorum queue without a delivery limit"
            )))
        }
        Err(why) if is(&why, AMQPSoftError::PRECONDITIONFAILED) => {
            Err(format!("queue `{queue}` exists with other settings: {why}"))
        }
        Err(why) => Err(format!("check the queue: {why}")),
    }
}

/// Creates the queue, or compares it with what is wanted.
async fn declare_as_wanted(channel: &Channel, queue: &ShortString) -> lapin::Result<()> {
    let options = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    let mut arguments = FieldTable::default();
    let quorum = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    let limit = AMQPValue::LongLongInt(DELIVERY_LIMIT);
    arguments.insert("x-delivery-limit".into(), limit);
    let declared = channel.queue_declare(queue.clone(), options, arguments);
    declared.await.map(drop)
}

/// An error that names the step of the connect that failed, and the right on `resource` that the
/// step needs, if the user lacks it. Version 3 does not name the right.
pub(super) fn failed(
    step: &str,
    right: &str,
    resource: impl std::fmt::Display,
) -> impl FnOnce(Error) -> String {
    move |why| {
        if is(&why, AMQPSoftError::ACCESSREFUSED) {
            format!("{step}: {why}; the user needs the right to `{right}` on `{resource}`")
        } else {
            format!("{step}: {why}")
        }
    }
}

fn is(why: &Error, answer: AMQPSoftError) -> bool {
    matches!(why.kind(), ErrorKind::ProtocolError(e) if *e.kind() == AMQPErrorKind::Soft(answer))
}
