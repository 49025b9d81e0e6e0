//! Pulling: hands the records that come out of the transport to the forwarder, no faster than it
//! POSTs.

use std::{cell::RefCell, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::{sync::OwnedSemaphorePermit, time::sleep};
use tracing::debug;

use super::{LaneParams, bundle::Unbundler};
use crate::{
    actors::Forward,
    delivery::Delivery,
    transport::{Transport, TransportError},
};

/// How long a restart of the forwarder may keep a delivery waiting.
const FORWARDER_PATIENCE: Duration = Duration::from_secs(5);
/// The pause between two receives if a POST has many records. Messages that come meanwhile wake the
/// lane once, and a batch that has begun waits longer for them.
const BATCH_PAUSE: Duration = Duration::from_millis(1);
/// The most deliveries that go to the forwarder in one message.
const FORWARD_MAX: usize = 256;

/// Pulls until the connection is lost, and returns why it was.
pub async fn pull<T: Transport>(
    transport: &T,
    params: &LaneParams,
    unbundler: &RefCell<Unbundler>,
) -> TransportError {
    let mut messages = Vec::new();
    loop {
        // An API that is away must not hide a connection that is lost.
        let permit = tokio::select! {
            biased;
            permit = Arc::clone(&params.window.deliveries).acquire_owned() => permit,
            lost = transport.lost() => return lost,
        };
        let Ok(mut permits) = permit else {
            return TransportError::Lost("the node is stopping".into());
        };
        let mut ready = unbundler.borrow_mut().next();
        // Nor may records that came before it was lost: they come again, perhaps to another node.
        if ready.is_some()
            && let Some(lost) = transport.lost().now_or_never()
        {
            return lost;
        }
        // A message whose records are all settled brings none.
        let first = loop {
            if let Some(first) = ready {
                break first;
            }
            let room = 1 + params.window.deliveries.available_permits();
            let received = transport.receive(&mut messages, room.min(FORWARD_MAX));
            if let Err(lost) = received.await {
                return lost;
            }
            unbundler.borrow_mut().add(&mut messages);
            ready = unbundler.borrow_mut().next();
        };
        let mut deliveries = vec![first];
        take_ready(params, unbundler, &mut deliveries, &mut permits);
        fail::fail_point!("pull");
        if !params.forwarder.is_alive_within(FORWARDER_PATIENCE).await {
            return TransportError::Lost("there is no forwarder".into());
        }
        // A forwarder that has just died drops the deliveries, which nacks them.
        let forward = Forward {
            deliveries,
            permits,
        };
        if params.forwarder.try_send(forward).is_err() {
            debug!(lane = %params.lane, "forwarder did not take deliveries");
        }
        if params.window.is_batched {
            sleep(BATCH_PAUSE).await;
        }
    }
}

/// Adds the deliveries that are ready as well, as far as there are permits.
fn take_ready(
    params: &LaneParams,
    unbundler: &RefCell<Unbundler>,
    deliveries: &mut Vec<Delivery>,
    permits: &mut OwnedSemaphorePermit,
) {
    let room = params
        .window
        .deliveries
        .available_permits()
        .min(FORWARD_MAX - 1);
    let room = u32::try_from(room).unwrap_or(0);
    let Ok(mut more) = Arc::clone(&params.window.deliveries).try_acquire_many_owned(room) else {
        return;
    };
    deliveries.extend(unbundler.borrow_mut().by_ref().take(more.num_permits()));
    if let Some(taken) = more.split(deliveries.len() - 1) {
        permits.merge(taken);
    }
}

/// Waits until the open bundles are settled: a message that is nacked brings all of its records
/// again. Messages of which no record is out go back at once.
pub async fn settle_open(params: &LaneParams, unbundler: &RefCell<Unbundler>) {
    unbundler.borrow_mut().nack_unopened();
    loop {
        let Some(delivery) = unbundler.borrow_mut().next() else {
            break;
        };
        let Ok(permits) = Arc::clone(&params.window.deliveries).acquire_owned().await else {
            return;
        };
        let forward = Forward {
            deliveries: vec![delivery],
            permits,
        };
        if params.forwarder.try_send(forward).is_err() {
            return debug!(lane = %params.lane, "forwarder did not take deliveries");
        }
    }
    params.window.all_free().await;
}
