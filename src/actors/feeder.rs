//! The feeder: what waits in the spool goes back to the router, oldest first, when a lane takes it.
//!
//! It has a admission of its own to the router, for few records at a time, so what waits does not crowd out what comes in. A
//! record that no lane confirms stays on disk, and is tried again after a back-off.

use std::{sync::Arc, time::Duration};

use actix::{Actor, Context, Handler, ResponseFuture};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::sleep,
};
use tracing::warn;

use super::{
    Drain, FEEDER_WINDOW, Ping, Supervised,
    admission::Admission,
    supervisor::SupervisorHandle,
    tasks::{InFlight, Task},
};
use crate::{
    backoff::Backoff,
    clock::{age, unix_us},
    lane_id::LaneId,
    ledger::Ledger,
    record::Record,
    spool::{DeathReason, Entry, EntryKey, Queue, Spool},
};

/// How many are taken from the disk at once.
const BATCH: u32 = 64;
/// The first retry waits at most this.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// No retry waits longer: a lane that is up again is found soon.
const RETRY_CAP: Duration = Duration::from_secs(1);

/// What the feeder is wired to.
#[derive(Clone)]
pub struct FeederParams {
    pub spool: Spool,
    pub admission: Admission,
    pub ledger: Arc<Ledger>,
    pub lanes: Arc<[LaneId]>,
    /// A record that is older than this is given up; `None` for never.
    pub give_up_after: Option<Duration>,
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
    #[must_use]
    pub fn new(params: FeederParams, supervisor: SupervisorHandle) -> Self {
        Self {
            params,
            supervisor,
            queues: Vec::new(),
            in_flight: InFlight::default(),
            stop: watch::Sender::new(false),
        }
    }

    /// Takes what lies in `queue`, as far as the window allows, for ever.
    fn feed(&self, queue: Queue, pinned: Option<LaneId>) -> impl Future<Output = ()> + use<> {
        let (params, in_flight, stop) = (
            self.params.clone(),
            self.in_flight.clone(),
            self.stop.subscribe(),
        );
        let admission = params.admission.from_disk(FEEDER_WINDOW);
        async move {
            let window = Arc::new(Semaphore::new(FEEDER_WINDOW));
            let mut held = params.spool.watch_stats();
            // What an earlier run of this actor has taken and not settled.
            params.spool.rewind(queue);
            loop {
                // The semaphore is never closed.
                let Ok(mut places) = Arc::clone(&window).acquire_many_owned(BATCH).await else {
                    return;
                };
                held.borrow_and_update();
                let taken = params.spool.take(queue, places.num_permits()).await;
                if taken.is_empty() {
                    if Spool::until_more(&mut held, queue).await {
                        continue;
                    }
                    return;
                }
                fail::fail_point!("feed");
                for (key, entry) in taken {
                    let Some(place) = places.split(1) else { return };
                    let way = Way {
                        params: params.clone(),
                        admission: admission.clone(),
                        pinned,
                        _place: place,
                    };
                    let (underway, stop) = (in_flight.begin(), stop.clone());
                    actix_rt::spawn(async move {
                        way.until_settled(key, &entry, stop).await;
                        drop(underway);
                    });
                }
            }
        }
    }
}

/// One entry's way back.
struct Way {
    params: FeederParams,
    admission: Admission,
    pinned: Option<LaneId>,
    _place: OwnedSemaphorePermit,
}

impl Way {
    /// No lane has taken `record` for too long, and may never.
    fn is_overdue(&self, record: &Record) -> bool {
        let age = record.origin.as_ref().map(|origin| age(origin.at_us));
        self.params
            .give_up_after
            .is_some_and(|patience| age.is_some_and(|age| age >= patience))
    }

    /// Makes a dead letter of `record`. Whether it is on disk.
    async fn bury(&self, record: &Record) -> bool {
        let lane = self
            .pinned
            .map_or_else(|| "spool".to_owned(), |lane| lane.to_string());
        let answer = "not POSTed: no lane has taken it".to_owned();
        let letter = DeathReason {
            lane,
            answer,
            at_us: unix_us(),
            given_up: true,
            ..DeathReason::default()
        };
        warn!(
            id = &*record.id,
            lane = letter.lane,
            answer = letter.answer,
            "dead letter"
        );
        self.params
            .spool
            .put(Queue::Dead, &Entry::new(record, Some(letter)))
            .await
            .is_ok()
    }

    /// Ends when a lane has the record, or it is given up, or when the node drains: then it stays on disk.
    async fn until_settled(&self, key: EntryKey, entry: &Entry, mut stop: watch::Receiver<bool>) {
        // It was counted when it was found, or when it was taken in.
        let Some(record) = self.params.ledger.answers_for(entry.record()) else {
            return self.params.spool.settle(key);
        };
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        while self
            .admission
            .submit(std::slice::from_ref(&record), self.pinned)
            .await
            .iter()
            .any(Result::is_err)
        {
            if self.is_overdue(&record) && self.bury(&record).await {
                break;
            }
            tokio::select! {
                () = sleep(backoff.next_delay()) => {}
                // An error means that the feeder is gone, and another has begun anew.
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
        self.params.spool.settle(key);
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

    /// Takes nothing more from the disk, and lets what is on its way arrive or stay.
    fn handle(&mut self, _: Drain, _: &mut Self::Context) -> Self::Result {
        self.queues.clear();
        self.stop.send_replace(true);
        let in_flight = self.in_flight.clone();
        Box::pin(async move { in_flight.idle().await })
    }
}

impl Handler<Ping> for Feeder {
    type Result = Result<(), String>;

    /// A queue that nobody feeds would wait for ever.
    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        if self.queues.iter().any(Task::has_ended) {
            Err("a queue is not fed any more".into())
        } else {
            Ok(())
        }
    }
}
