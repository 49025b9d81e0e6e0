//! The feeder: gives the records that wait in the spool back to the router, oldest first.
//!
//! It is admitted apart from clients, for few records at a time, so that the backlog does not crowd
//! out new records. A record that no lane confirms stays on disk, and is tried again after a
//! back-off.

use std::{rc::Rc, slice, sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::{
    sync::{Semaphore, watch},
    time::sleep,
};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::{
    Drain, FEEDER_WINDOW, Ping, Source, Supervised,
    admission::Admission,
    apis::Apis,
    dead_letters::not_posted,
    live_lanes::LiveLanes,
    receipts::{AssignedRecord, Refused},
    stored_route,
    supervisor::SupervisorHandle,
};
use crate::{
    backoff::Backoff,
    lane_id::LaneId,
    ledger::Ledger,
    routing::{rules::Assignment, settings::CurrentRouting},
    spool::{DeathReason, Entry, EntryKey, Queue, Spool, Spools},
};

/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// No retry waits longer, so that a lane that is up again is used soon.
const RETRY_CAP: Duration = Duration::from_secs(1);

/// The parts of the feeder.
#[derive(Clone)]
pub struct FeederParams {
    /// The first is the node's own. The others have records of APIs that an operator has replayed.
    pub spools: Spools,
    pub admission: Admission,
    pub ledger: Arc<Ledger>,
    pub lanes: Arc<[LaneId]>,
    pub routing: CurrentRouting,
    pub live_lanes: LiveLanes,
    pub apis: Apis,
}

/// One per node.
pub struct Feeder {
    params: FeederParams,
    supervisor: SupervisorHandle,
    queues: Vec<AbortOnDropHandle<()>>,
    in_flight: TaskTracker,
    /// Changes when it drains.
    drains: watch::Sender<()>,
}

/// Feeds the records of one queue.
struct QueueFeeder {
    params: FeederParams,
    spool: Spool,
    admission: Admission,
    queue: Queue,
    /// The only lane that they may take, if there is one.
    pinned: Option<LaneId>,
    drain: watch::Receiver<()>,
}

impl Feeder {
    pub fn new(params: FeederParams, supervisor: SupervisorHandle) -> Self {
        Self {
            params,
            supervisor,
            queues: Vec::new(),
            in_flight: TaskTracker::new(),
            drains: watch::Sender::new(()),
        }
    }

    /// Resends the entries of a queue, up to the window at a time, until the spool ends.
    fn feed(&self, spool: &Spool, queue: Queue) -> AbortOnDropHandle<()> {
        let pinned = match queue {
            Queue::Pinned(lane) => Some(lane),
            // Copies go to the lane that has confirmed them, so that its broker knows them again.
            Queue::Kept(lane) => self.params.lanes.contains(&lane).then_some(lane),
            _ => None,
        };
        let source = match queue {
            Queue::Kept(_) => Source::Copies,
            _ => Source::Spool,
        };
        let admission = &self.params.admission;
        let feeder = Rc::new(QueueFeeder {
            params: self.params.clone(),
            spool: spool.clone(),
            admission: admission.from_disk(source, FEEDER_WINDOW),
            queue,
            pinned,
            drain: self.drains.subscribe(),
        });
        let in_flight = self.in_flight.clone();
        AbortOnDropHandle::new(actix_rt::spawn(async move {
            let window = Arc::new(Semaphore::new(FEEDER_WINDOW));
            let mut tail = feeder.spool.tail(queue, window);
            while let Some((key, entry, permit)) = tail.next().await {
                fail::fail_point!("feed");
                let feeder = Rc::clone(&feeder);
                in_flight.spawn_local(async move {
                    feeder.resend(key, &entry).await;
                    drop(permit);
                });
            }
        }))
    }
}

impl QueueFeeder {
    /// Ends when a lane has the record, however old that is. Also ends when the node drains: then
    /// the record stays on disk.
    async fn resend(&self, key: EntryKey, entry: &Entry) {
        let spool = &self.spool;
        let ledger = &self.params.ledger;
        let record = entry.record();
        let (lane, record) = match self.queue {
            // Its run has counted it when the lane confirmed it. This one counts its end.
            Queue::Kept(lane) => (Some(lane), (!ledger.has_ended(&record)).then_some(record)),
            // The ledger counted it when this run took it in or found it.
            _ => (None, ledger.adopt(record)),
        };
        let Some(record) = record else {
            return spool.settle(key);
        };
        let assigned = AssignedRecord {
            assignment: Assignment {
                pinned: self.pinned,
                ..stored_route::assignment(entry, &self.params.routing.get())
            },
            record,
        };
        let record = &assigned.record;
        let mut drain = self.drain.clone();
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        loop {
            let records = slice::from_ref(&assigned);
            let receipts = self.admission.submit(records).await;
            let Some(refused) = receipts.into_iter().find_map(Result::err) else {
                break;
            };
            // A record of an API that is not configured waits for that.
            if let Some(api) = self.params.apis.get(record.api.as_deref())
                && let Some(reason) = self.death_reason(&refused, &assigned.assignment)
            {
                let path = self.pinned.map_or("spool", LaneId::name);
                if api.dead_letters.write(path, record, reason).await.is_ok() {
                    if let Some(lane) = lane {
                        ledger.dead(lane, record);
                    }
                    break;
                }
            }
            tokio::select! {
                () = sleep(backoff.next_delay()) => {}
                // An error means that the feeder is gone. The next one begins with this entry
                // again.
                _ = drain.changed() => return,
            }
        }
        spool.settle(key);
    }
}

impl QueueFeeder {
    /// Why a record that no lane has taken is dead: no lane will ever carry it. No record dies of
    /// its age here, where no API has had it.
    fn death_reason(&self, refused: &Refused, assignment: &Assignment) -> Option<DeathReason> {
        if !matches!(refused, Refused::TooLarge(_)) {
            return None;
        }
        let pinned = assignment.pinned.as_ref().map(slice::from_ref);
        let lanes = pinned.unwrap_or(&assignment.route.lanes);
        let failures = self.params.live_lanes.last_failures(lanes);
        Some(not_posted(&format!("{refused}; last failures: {failures}")))
    }
}

impl Actor for Feeder {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        let pinned = self.params.lanes.iter().copied().map(Queue::Pinned);
        // An earlier run may have kept copies of a lane that is not configured any more.
        let kept = LaneId::ALL.map(Queue::Kept);
        // Records whose lanes are all gone from the configuration stay on disk.
        let is_on = |lane: &LaneId| self.params.lanes.contains(lane);
        let routed = Queue::routed().filter(|queue| queue.lanes().any(|lane| is_on(&lane)));
        let queues = pinned.chain(kept).chain(routed).chain([Queue::Waiting]);
        let spools: Vec<_> = self.params.spools.iter().collect();
        let [own, of_apis @ ..] = &*spools else {
            return;
        };
        let replayed = of_apis.iter().map(|spool| self.feed(spool, Queue::Waiting));
        let fed = queues.map(|queue| self.feed(own, queue)).chain(replayed);
        self.queues = fed.collect();
        self.supervisor.ready(None);
    }
}

impl Supervised for Feeder {
    /// Control messages only.
    const MAILBOX: usize = 64;
}

impl Handler<Drain> for Feeder {
    type Result = ResponseFuture<()>;

    /// Reads nothing more from the disk. Records on their way arrive, or stay on disk.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.queues.clear();
        self.drains.send_replace(());
        let in_flight = self.in_flight.clone();
        in_flight.close();
        Box::pin(async move { in_flight.wait().await })
    }
}

impl Handler<Ping> for Feeder {
    type Result = Result<(), String>;

    /// Fails if a queue is no longer fed: its records would wait for ever.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        if self.queues.iter().any(AbortOnDropHandle::is_finished) {
            Err("a queue is not fed any more".into())
        } else {
            Ok(())
        }
    }
}
