//! The forwarder of a lane: tags a delivery with the lane's path, POSTs it to the API, and settles
//! it by the answer.
//!
//! A POST that may succeed later is retried here with back-off, while the transport holds the
//! message. The lane pulls no more deliveries than there are POSTs in flight, so an API that is
//! away stops the pulling. Records that the API fails at while it is up do not count. A record that
//! the API fails at while it takes others is parked on disk; one that the API refuses, or has not
//! taken for too long, becomes a dead letter. Only then may the broker forget it.

mod batch;
mod batch_size;
mod post;
mod slots;

use std::rc::Rc;

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tracing::debug;

pub use self::post::{ForwarderParams, Payload, UNWRITTEN_REST, not_an_object, post};
pub use self::slots::{Limits, PostSlots};
use self::{batch::QueuedDelivery, post::Poster};
use super::{Drain, Forward, Ping, Supervised, supervisor::SupervisorHandle};
use crate::config::CONCURRENCY_MAX;

/// One per lane.
pub struct Forwarder {
    poster: Rc<Poster>,
    supervisor: SupervisorHandle,
    /// Changes with each drain: a retry that waits then gives its delivery back.
    drains: watch::Sender<()>,
    in_flight: TaskTracker,
    /// Only if a POST may have many records.
    batcher: Option<mpsc::Sender<QueuedDelivery>>,
}

impl Forwarder {
    pub fn new(params: ForwarderParams, supervisor: SupervisorHandle) -> Self {
        let limits = params.limits;
        let poster = Rc::new(Poster::new(params));
        let drains = watch::Sender::new(());
        let batcher = (limits.batch > 1)
            .then(|| batch::start(Rc::clone(&poster), limits, drains.subscribe()));
        Self {
            poster,
            supervisor,
            drains,
            in_flight: TaskTracker::new(),
            batcher,
        }
    }
}

impl Actor for Forwarder {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        self.supervisor.ready(None);
    }
}

impl Supervised for Forwarder {
    /// Deliveries, as many as the lane may hand over, and control messages.
    const MAILBOX: usize = CONCURRENCY_MAX + 64;
}

impl Handler<Forward> for Forwarder {
    type Result = ();

    fn handle(&mut self, mut forward: Forward, _: &mut Self::Context) {
        fail::fail_point!("forwarder");
        for delivery in forward.deliveries {
            // There is one for each. A delivery without one is dropped, which naks it.
            let Some(permit) = forward.permits.split(1) else {
                return;
            };
            if let Some(batcher) = &self.batcher {
                let queued = QueuedDelivery {
                    delivery,
                    permit: Some(permit),
                    _in_flight: self.in_flight.token(),
                };
                if batcher.try_send(queued).is_err() {
                    debug!("there is no batcher: a delivery is nakked");
                }
                continue;
            }
            let poster = Rc::clone(&self.poster);
            let drain = self.drains.subscribe();
            self.in_flight.spawn_local(async move {
                poster.deliver(delivery, permit, drain).await;
            });
        }
    }
}

impl Handler<Drain> for Forwarder {
    type Result = ResponseFuture<()>;

    /// Waits for the POSTs in flight. Retries that wait give their deliveries back. New deliveries
    /// are taken afterwards.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.drains.send_replace(());
        let in_flight = self.in_flight.clone();
        in_flight.close();
        Box::pin(async move { in_flight.wait().await })
    }
}

impl Handler<Ping> for Forwarder {
    type Result = Result<(), String>;

    /// Fails if the batcher has panicked: no delivery would be POSTed.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        match &self.batcher {
            Some(batcher) if batcher.is_closed() => Err("batches are not POSTed any more".into()),
            _ => Ok(()),
        }
    }
}
