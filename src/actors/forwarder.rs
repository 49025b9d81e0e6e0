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
mod mover;
mod outlet;
mod post;
mod slots;

use std::rc::Rc;

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

use self::outlet::{Outlet, hold_unclaimed};
pub use self::{
    batch::{array_of_one, listed},
    post::{Payload, PosterParams, UNWRITTEN_REST, not_an_object, post},
    slots::{LaneWindow, PostSlots},
};
use super::{Drain, Forward, Ping, Supervised, held::HeldRecords, supervisor::SupervisorHandle};
use crate::{config::CONCURRENCY_MAX, delivery::Delivery, lane_id::LaneId};

/// The parts of a forwarder; each restart uses the same ones.
#[derive(Clone)]
pub struct ForwarderParams {
    /// For each API.
    pub posters: Vec<PosterParams>,
    /// Takes the records of APIs that are not configured.
    pub unclaimed: HeldRecords,
    /// The lanes whose records on disk it POSTs.
    pub held_lanes: Vec<LaneId>,
    /// Cancelled when the node stops.
    pub stopping: CancellationToken,
}

/// One per lane.
pub struct Forwarder {
    params: ForwarderParams,
    /// For each API.
    outlets: Vec<Rc<Outlet>>,
    supervisor: SupervisorHandle,
    /// Changes with each drain: a retry that waits then gives its delivery back.
    drains: watch::Sender<()>,
    in_flight: TaskTracker,
    /// The same for records on disk: they have no part in the drain of a lane.
    held_drains: watch::Sender<()>,
    held_in_flight: TaskTracker,
    held: Vec<AbortOnDropHandle<()>>,
}

impl Forwarder {
    pub fn new(params: ForwarderParams, supervisor: SupervisorHandle) -> Self {
        let drains = watch::Sender::new(());
        let held_drains = watch::Sender::new(());
        let outlets = params.posters.iter().map(|poster| {
            let outlet = Outlet::new(poster.clone(), drains.subscribe(), held_drains.subscribe());
            Rc::new(outlet)
        });
        Self {
            outlets: outlets.collect(),
            params,
            supervisor,
            drains,
            in_flight: TaskTracker::new(),
            held_drains,
            held_in_flight: TaskTracker::new(),
            held: Vec::new(),
        }
    }

    /// Finds the API of `delivery`, and a place there. `waiting` has a permit for each delivery
    /// that has no place yet.
    fn forward(&self, delivery: Delivery, waiting: &mut OwnedSemaphorePermit) {
        let api = delivery.record.api.as_deref();
        let outlet = self.outlets.iter().find(|outlet| outlet.api() == api);
        let is_only = self.outlets.len() == 1;
        let token = self.in_flight.token();
        let place = match outlet {
            // The permit is the place.
            Some(_) if is_only => waiting.split(1),
            Some(outlet) => outlet.place(),
            None => None,
        };
        if let (Some(outlet), Some(place)) = (outlet, place) {
            return outlet.deliver(delivery, place, token);
        }
        // There is one for each. A delivery without one is dropped, which naks it.
        let Some(waiting) = waiting.split(1) else {
            return;
        };
        match (outlet, self.outlets.first()) {
            (Some(outlet), _) => {
                let outlet = Rc::clone(outlet);
                let drain = outlet.next_drain();
                actix_rt::spawn(async move {
                    outlet
                        .deliver_or_hold(delivery, waiting, token, drain)
                        .await;
                });
            }
            (None, Some(any)) => {
                let held = self.params.unclaimed.clone();
                let poster = any.poster();
                actix_rt::spawn(async move {
                    hold_unclaimed(held, poster, delivery, waiting).await;
                    drop(token);
                });
            }
            // There is `[api]` always.
            (None, None) => {}
        }
    }
}

impl Actor for Forwarder {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        for outlet in self.outlets.iter().filter(|outlet| outlet.holds()) {
            for lane in &self.params.held_lanes {
                let delivering = Rc::clone(outlet).deliver_held(
                    *lane,
                    self.held_in_flight.clone(),
                    self.params.stopping.clone(),
                );
                let delivering = actix_rt::spawn(delivering);
                self.held.push(AbortOnDropHandle::new(delivering));
            }
            let moving = Rc::clone(outlet)
                .move_late(self.held_in_flight.clone(), self.params.stopping.clone());
            let moving = actix_rt::spawn(moving);
            self.held.push(AbortOnDropHandle::new(moving));
        }
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
            self.forward(delivery, &mut forward.permits);
        }
    }
}

impl Handler<Drain> for Forwarder {
    type Result = ResponseFuture<()>;

    /// Waits for the POSTs in flight. Retries that wait give their deliveries back. New deliveries
    /// are taken afterwards. Records on disk are POSTed until the node stops.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.drains.send_replace(());
        let in_flight = self.in_flight.clone();
        in_flight.close();
        let held = self.params.stopping.is_cancelled().then(|| {
            self.held.clear();
            self.held_drains.send_replace(());
            let held = self.held_in_flight.clone();
            held.close();
            held
        });
        Box::pin(async move {
            in_flight.wait().await;
            if let Some(held) = held {
                held.wait().await;
            }
        })
    }
}

impl Handler<Ping> for Forwarder {
    type Result = Result<(), String>;

    /// Fails if a batcher has panicked, or records on disk are not read any more: they would not be
    /// POSTed.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        if self.outlets.iter().any(|outlet| outlet.is_broken()) {
            return Err("batches are not POSTed any more".into());
        }
        // They end when the node stops.
        let is_stopping = self.params.stopping.is_cancelled();
        if !is_stopping && self.held.iter().any(AbortOnDropHandle::is_finished) {
            return Err("held records are not POSTed any more".into());
        }
        Ok(())
    }
}
