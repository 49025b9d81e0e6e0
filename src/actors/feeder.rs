//! The feeder: gives the records that wait in the spool back to the router, oldest first.
//!
//! It is admitted apart from clients, for few records at a time, so that the backlog does not crowd out new records. A record
//! that no lane confirms stays on disk, and is tried again after a back-off.

use std::{sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::{
    sync::{Semaphore, watch},
    time::sleep,
};

use super::{
    Drain, FEEDER_WINDOW, Ping, Supervised,
    admission::Admission,
    dead_letters::DeadLetters,
    supervisor::SupervisorHandle,
    tasks::{InFlight, Task},
};
use crate::{
    backoff::Backoff,
    lane_id::LaneId,
    ledger::Ledger,
    spool::{DeathReason, Entry, EntryKey, Queue, Spool},
};

/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// No retry waits longer, so that a lane that is up again is used soon.
const RETRY_CAP: Duration = Duration::from_secs(1);

/// The parts of the feeder.
#[derive(Clone)]
pub struct FeederParams {
    pub spool: Spool,
    pub dead_letters: DeadLetters,
    pub admission: Admission,
    pub ledger: Arc<Ledger>,
    pub lanes: Arc<[LaneId]>,
}

/// One per node.
pub struct Feeder {
    params: FeederParams,
    supervisor: SupervisorHandle,
    queues: Vec<Task>,
    in_flight: InFlight,
    /// Changes once, when it drains.
    stop: watch::Sender<bool>,
}

impl Feeder {
    pub fn new(params: FeederParams, supervisor: SupervisorHandle) -> Self {
        Self {
            params,
            supervisor,
            queues: Vec::new(),
            in_flight: InFlight::default(),
            stop: watch::Sender::new(false),
        }
    }

    /// Resends the entries of `queue`, up to the window at a time, until the spool ends.
    fn feed(&self, queue: Queue, pinned: Option<LaneId>) -> impl Future<Output = ()> + use<> {
        let params = self.params.clone();
        let in_flight = self.in_flight.clone();
        let stop = self.stop.subscribe();
        let admission = params.admission.from_disk(FEEDER_WINDOW);
        async move {
            let window = Arc::new(Semaphore::new(FEEDER_WINDOW));
            let mut tail = params.spool.tail(queue, window);
            while let Some((key, entry, permit)) = tail.next().await {
                fail::fail_point!("feed");
                let resend = Resend {
                    params: params.clone(),
                    admission: admission.clone(),
                    pinned,
                };
                let underway = in_flight.begin();
                let stop = stop.clone();
                actix_rt::spawn(async move {
                    resend.run(key, &entry, stop).await;
                    drop((permit, underway));
                });
            }
        }
    }
}

/// Gives one entry back to the router.
struct Resend {
    params: FeederParams,
    admission: Admission,
    pinned: Option<LaneId>,
}

impl Resend {
    /// Ends when a lane has the record or it is given up. Also ends when the node drains: then the record stays on disk.
    async fn run(&self, key: EntryKey, entry: &Entry, mut stop: watch::Receiver<bool>) {
        // The ledger counted the record when this run took it in or found it.
        let Some(record) = self.params.ledger.adopt(entry.record()) else {
            return self.params.spool.settle(key);
        };
        let dead_letters = &self.params.dead_letters;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        while self
            .admission
            .submit(std::slice::from_ref(&record), self.pinned)
            .await
            .iter()
            .any(Result::is_err)
        {
            if dead_letters.is_overdue(&record)
                && dead_letters.write(&record, self.reason()).await.is_ok()
            {
                break;
            }
            tokio::select! {
                () = sleep(backoff.next_delay()) => {}
                // An error means that the feeder is gone. The next one begins with this entry again.
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
        self.params.spool.settle(key);
    }

    fn reason(&self) -> DeathReason {
        DeathReason {
            lane: self.pinned.map_or("spool", LaneId::name).to_owned(),
            answer: "not POSTed: no lane has taken it".to_owned(),
            given_up: true,
            ..DeathReason::default()
        }
    }
}

impl Actor for Feeder {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        let pinned = self
            .params
            .lanes
            .iter()
            .map(|&lane| (Queue::Pinned(lane), Some(lane)));
        let queues = pinned.chain([(Queue::Waiting, None)]);
        self.queues = queues
            .map(|(queue, lane)| Task::spawn(self.feed(queue, lane)))
            .collect();
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
        self.stop.send_replace(true);
        let in_flight = self.in_flight.clone();
        Box::pin(async move { in_flight.idle().await })
    }
}

impl Handler<Ping> for Feeder {
    type Result = Result<(), String>;

    /// Fails if a queue is no longer fed: its records would wait for ever.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        if self.queues.iter().any(Task::has_ended) {
            Err("a queue is not fed any more".into())
        } else {
            Ok(())
        }
    }
}
