//! Opens the two connections, checks the queue or creates it, and starts the tasks.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use futures_util::{Stream, StreamExt as _, stream::select};
use lapin::{
    Consumer, Event,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions},
    types::{FieldTable, ShortString},
};
use tokio::{
    sync::{mpsc, watch},
    time::interval,
};
use tracing::warn;

use super::{
    BrokerInfo, Durability, Inspection, Lost, RabbitMq, TransportError, UNSETTLED_MAX,
    declare::{self, ExistingQueue, failed},
    link::{CONSUME_FRAME_MAX, Link, PUBLISH_FRAME_MAX, Target},
    publisher::publish_and_confirm,
    settler::settle,
};
use crate::{config, lane_id::LaneId, record::Record};

/// Requests to publish that wait for their turn on the connection.
const PUBLISH_QUEUE: usize = 256;
/// How often the connections' states are looked at: not every end is announced to an idle client.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

pub(super) async fn open(
    target: &Target,
    settings: &config::RabbitmqConfig,
) -> Result<RabbitMq, String> {
    let (publish, queue) = open_to_publish(target, settings).await?;
    publish
        .channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .map_err(|why| format!("ask for confirms: {why}"))?;
    let existing = declare::inspect(&publish, &queue).await?;
    if let ExistingQueue::Missing = existing {
        declare::create(&publish, &queue).await?;
    }
    let subscribed = subscribe(target, &queue).await;
    let (consume, consumer, events) = subscribed.map_err(failed("consume", "read", &queue))?;

    let lost = Lost::default();
    let (publisher, requests) = mpsc::channel(PUBLISH_QUEUE);
    let channel = publish.channel.clone();
    tokio::spawn(publish_and_confirm(
        channel,
        queue.clone(),
        requests,
        lost.clone(),
    ));
    let (settler, settlements) = mpsc::unbounded_channel();
    let unsettled = Arc::default();
    let channel = consume.channel.clone();
    tokio::spawn(settle(
        channel,
        settlements,
        Arc::clone(&unsettled),
        lost.clone(),
    ));
    let (is_blocked, blocked) = watch::channel(None);
    let links = [publish.watch(), consume.watch()];
    let down = move || {
        links
            .iter()
            .find(|link| !link.is_up())
            .map(|link| link.name)
    };
    let events = select(publish.events(), events);
    tokio::spawn(watch_over(down, events, is_blocked, lost.clone()));

    let info = info(&publish, existing);
    Ok(RabbitMq {
        publish,
        consume,
        queue,
        publisher,
        blocked,
        settler,
        unsettled,
        consumer: tokio::sync::Mutex::new(consumer),
        is_waiting: AtomicBool::new(false),
        lost,
        info,
    })
}

/// Connects, and checks the queue. Creates nothing.
pub(super) async fn inspect(
    target: &Target,
    settings: &config::RabbitmqConfig,
) -> Result<Inspection, String> {
    let (link, queue) = open_to_publish(target, settings).await?;
    let existing = declare::inspect(&link, &queue).await?;
    let found = match existing {
        ExistingQueue::Missing => format!("queue {queue} is missing: a node creates it"),
        ExistingQueue::Fits => format!("queue {queue} fits"),
        ExistingQueue::Unchecked(_) => format!("queue {queue} exists"),
    };
    let inspection = Inspection {
        info: info(&link, existing),
        found: vec!["connected and logged in".into(), found],
    };
    link.close().await;
    Ok(inspection)
}

/// Opens the connection to publish. Returns it with the queue's name.
async fn open_to_publish(
    target: &Target,
    settings: &config::RabbitmqConfig,
) -> Result<(Link, ShortString), String> {
    let queue = ShortString::try_new(&*settings.queue)
        .map_err(|_| "a queue's name has at most 255 bytes".to_owned())?;
    let link = Link::open(target, "waypost publisher", PUBLISH_FRAME_MAX).await;
    let link = link.map_err(|why| format!("connect to publish: {why}"))?;
    Ok((link, queue))
}

fn info(link: &Link, existing: ExistingQueue) -> BrokerInfo {
    let mut warnings = link.warnings();
    // A quorum queue syncs before it confirms, and is there after a restart of its broker.
    let mut info = BrokerInfo {
        outlives_power_cut: Durability::Yes,
        ..BrokerInfo::default()
    };
    if let ExistingQueue::Unchecked(why) = existing {
        warnings.push(why);
        info.outlives_power_cut = Durability::default();
        // A broker does not tell its clients that it has restarted.
        info.incarnation = Record::new_id().to_string();
    }
    BrokerInfo { warnings, ..info }
}

/// Opens a connection and consumes from the queue.
async fn subscribe(
    target: &Target,
    queue: &ShortString,
) -> lapin::Result<(Link, Consumer, impl Stream<Item = Event> + Unpin + use<>)> {
    let link = Link::open(target, "waypost consumer", CONSUME_FRAME_MAX).await?;
    link.channel
        .basic_qos(UNSETTLED_MAX, BasicQosOptions::default())
        .await?;
    // Before anything can come, so that no failure is missed.
    let events = link.events();
    let tag = ShortString::from(format!("waypost-{}", Record::new_id()));
    let options = BasicConsumeOptions::default();
    let consumer = link
        .channel
        .basic_consume(queue.clone(), tag, options, FieldTable::default())
        .await?;
    Ok((link, consumer, events))
}

/// Declares the transport lost when a connection or a channel is closed, and keeps `blocked`. `down`
/// names a connection that is closed.
async fn watch_over(
    down: impl Fn() -> Option<&'static str>,
    mut events: impl Stream<Item = Event> + Unpin,
    blocked: watch::Sender<Option<TransportError>>,
    lost: Lost,
) {
    let mut ticks = interval(WATCH_INTERVAL);
    // At the latest tick. An end shows a moment before its event, which has the reason.
    let mut was_down = false;
    loop {
        tokio::select! {
            biased;
            Some(event) = events.next() => match event {
                Event::Error(why) => return lost.set(why),
                Event::ConnectionBlocked(reason) => {
                    warn!(lane = %LaneId::Rabbitmq, reason, "the broker blocks publishers");
                    let why = format!("the broker blocks publishers: {reason}");
                    blocked.send_replace(Some(TransportError::Refused(why)));
                }
                Event::ConnectionUnblocked => drop(blocked.send_replace(None)),
                _ => {}
            },
            _ = lost.wait() => return,
            _ = ticks.tick() => match down() {
                Some(name) if was_down => {
                    return lost.set(format_args!("the connection of the {name} was closed"));
                }
                down => was_down = down.is_some(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream::{once, pending};
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_end_is_told_with_the_reason_that_its_event_brings() {
        let announced = once(async {
            sleep(WATCH_INTERVAL / 2).await;
            Event::Error(lapin::ErrorKind::MissingHeartbeatError.into())
        });
        for (events, why) in [
            (
                announced.boxed(),
                "no heartbeat received from server for too long",
            ),
            (
                pending().boxed(),
                "the connection of the publisher was closed",
            ),
        ] {
            let lost = Lost::default();
            watch_over(
                || Some("publisher"),
                events,
                watch::channel(None).0,
                lost.clone(),
            )
            .await;
            assert_eq!(lost.wait().await, TransportError::Lost(why.into()));
        }
    }
}
