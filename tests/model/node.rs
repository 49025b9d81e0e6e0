//! A node without its HTTP ends: the real admission, router, lanes, supervisor, feeder and spool.
//! Its brokers are lists of records, and a step of the model decides the outcome of each publish.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use actix::Addr;
use bytes::Bytes;
use tokio::{
    runtime::{Builder, Runtime},
    sync::{oneshot, watch},
    task::LocalSet,
    time::{Instant, sleep},
};
use waypost::{
    actors::{
        Drain,
        admission::Admission,
        apis::{Apis, SharedApi},
        copies::Copies,
        fallback::DiskFallback,
        feeder::{self, Feeder},
        forwarder::LaneWindow,
        lane::{self, Lane, bundle::SettledRecords},
        live_lanes::LiveLanes,
        receipts::Refused,
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{ChildId, DrainAll, Factory, Supervisor, Thread, factory},
    },
    api::Limits,
    config::{Ack, ApiConfig, Policy},
    delivery::Receipt,
    lane_id::LaneId,
    ledger::Ledger,
    record::{Origin, Record},
    routing::{explain::Explanations, settings::CurrentRouting},
    spool::{NotSafe, OpenError, Queue, Spool, SpoolStats, Spools, Undelivered},
    trace::LaneTracer,
    transport::{
        Backlog, BrokerInfo, Durability, Incoming, Inspection, Message, Transport, TransportError,
    },
};

use crate::support::{assigned, live_lanes, one_route};

pub const LANES: [LaneId; 3] = [LaneId::Nats, LaneId::Rabbitmq, LaneId::Pubsub];
const LIMITS: Limits = Limits { posts: 1, batch: 1 };
/// How long after its confirm a power cut of each lane's broker may take a record.
const DURABLE_AFTER: [Duration; LANES.len()] =
    [Duration::MAX, Duration::from_secs(4), Duration::ZERO];
pub const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing here rests for longer before it is tried again.
pub const RETRY: Duration = Duration::from_secs(1);
/// Each lane has compared its records with its broker's count, twice and more.
pub const COMPARED: Duration = Duration::from_secs(9);

/// A publish that waits for the broker's word.
pub struct Publish {
    pub lane: usize,
    pub record: Record,
    answer: oneshot::Sender<Result<(), TransportError>>,
}

impl Publish {
    pub fn confirm(self) {
        self.answer
            .send(Ok(()))
            .expect("a publish whose end was not seen");
    }

    pub fn refuse(self) {
        self.answer
            .send(Err(TransportError::Publish("refused".into())))
            .expect("a publish whose end was not seen");
    }
}

/// The message systems. They outlive the node.
#[derive(Clone)]
pub struct Brokers(Arc<[Broker; LANES.len()]>);

struct Broker {
    /// Odd while it can be reached; each connection is of one number.
    epoch: watch::Sender<u64>,
    publishes: Mutex<Vec<Publish>>,
    records: Mutex<Vec<Stored>>,
    /// How often it has forgotten records.
    incarnation: AtomicUsize,
    /// Another node consumes, too.
    is_shared: AtomicBool,
}

/// A record in a broker.
#[derive(Clone)]
pub struct Stored {
    pub record: Record,
    at: Instant,
}

impl Brokers {
    pub fn new() -> Self {
        let broker = |_| Broker {
            epoch: watch::Sender::new(1),
            publishes: Mutex::default(),
            records: Mutex::default(),
            is_shared: AtomicBool::default(),
            incarnation: AtomicUsize::new(0),
        };
        Self(Arc::new([0, 1, 2].map(broker)))
    }

    pub fn is_up(&self, lane: usize) -> bool {
        *self.0[lane].epoch.borrow() % 2 == 1
    }

    /// Lets a broker come back, or go away with its connection.
    pub fn switch(&self, lane: usize, up: bool) {
        if self.is_up(lane) != up {
            self.0[lane].epoch.send_modify(|epoch| *epoch += 1);
            self.publishes(lane).clear();
        }
    }

    /// The broker loses its connection, and the returned records, which a power cut takes. Then it
    /// is up or not.
    pub fn forget(&self, lane: usize, up: bool, now: Instant) -> Vec<Record> {
        self.switch(lane, false);
        let mut records = self.records(lane);
        let lost = records.extract_if(.., |stored| !is_durable(lane, stored.at, now));
        let lost = lost.map(|stored| stored.record).collect();
        drop(records);
        self.0[lane].incarnation.fetch_add(1, Relaxed);
        // Even if it is up again at once, the connection is another.
        self.switch(lane, up);
        lost
    }

    /// The publishes that someone still waits for.
    fn publishes(&self, lane: usize) -> MutexGuard<'_, Vec<Publish>> {
        let mut publishes = self.0[lane].publishes.lock().unwrap();
        publishes.retain(|publish| !publish.answer.is_closed());
        publishes
    }

    pub fn records(&self, lane: usize) -> MutexGuard<'_, Vec<Stored>> {
        self.0[lane].records.lock().unwrap()
    }

    /// Whether another node consumes.
    pub fn share(&self, lane: usize, is_shared: bool) {
        self.0[lane].is_shared.store(is_shared, Relaxed);
    }

    /// The records that are being published, each with its lane.
    pub fn publishing(&self) -> Vec<(usize, Record)> {
        let of = |lane| {
            self.publishes(lane)
                .iter()
                .map(|publish| (lane, publish.record.clone()))
                .collect::<Vec<_>>()
        };
        (0..LANES.len()).flat_map(of).collect()
    }

    /// Takes out the publish that is `at` in the order of [`Brokers::publishing`], and stores its
    /// record if it `is_stored`.
    pub fn end(&self, mut at: usize, is_stored: bool, now: Instant) -> Publish {
        for lane in 0..LANES.len() {
            let mut publishes = self.publishes(lane);
            if at < publishes.len() {
                let publish = publishes.remove(at);
                if is_stored {
                    let record = publish.record.clone();
                    self.records(lane).push(Stored { record, at: now });
                }
                return publish;
            }
            at -= publishes.len();
        }
        panic!("there is no such publish")
    }

    /// Stores the record of a publish and says nothing.
    pub fn store(&self, at: usize, now: Instant) -> Record {
        let (lane, record) = self.publishing().swap_remove(at);
        let stored = Stored {
            record: record.clone(),
            at: now,
        };
        self.records(lane).push(stored);
        record
    }
}

/// Whether a power cut may take what the broker of `lane` has confirmed.
pub fn forgets(lane: usize) -> bool {
    DURABLE_AFTER[lane] > Duration::ZERO
}

/// Whether a confirm of the broker of `lane` survives its power cut after a while only.
pub fn becomes_durable(lane: usize) -> bool {
    forgets(lane) && DURABLE_AFTER[lane] < Duration::MAX
}

/// Whether what the broker of `lane` has had since `at` survives a power cut.
pub fn is_durable(lane: usize, at: Instant, now: Instant) -> bool {
    now - at >= DURABLE_AFTER[lane]
}

/// A connection to the broker of a lane.
struct Link<const LANE: usize> {
    brokers: Brokers,
    epoch: u64,
    incarnation: usize,
}

impl<const LANE: usize> Transport for Link<LANE> {
    type Settings = Brokers;

    fn address(_: &Brokers) -> String {
        LANE.to_string()
    }

    async fn inspect(_: &Brokers) -> Result<Inspection, TransportError> {
        Ok(Inspection::default())
    }

    async fn connect(brokers: &Brokers) -> Result<Self, TransportError> {
        let epoch = *brokers.0[LANE].epoch.borrow();
        if !brokers.is_up(LANE) {
            return Err(TransportError::Connect("away".into()));
        }
        Ok(Self {
            brokers: brokers.clone(),
            epoch,
            incarnation: brokers.0[LANE].incarnation.load(Relaxed),
        })
    }

    async fn publish(
        &self,
        messages: &[Message],
        mut settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        // Nothing shares a message here, and no request has two records.
        for (index, message) in messages.iter().enumerate() {
            settled(index, self.store(message).await);
        }
    }

    /// Never returns a message: the model takes records out of the broker, as a forwarder would.
    async fn receive(&self, _: &mut Vec<Incoming>, _: usize) -> Result<(), TransportError> {
        Err(self.lost().await)
    }

    async fn lost(&self) -> TransportError {
        self.brokers.0[LANE]
            .epoch
            .subscribe()
            .wait_for(|epoch| *epoch != self.epoch)
            .await
            .ok();
        TransportError::Lost("away".into())
    }

    async fn close(&self) {}

    fn info(&self) -> BrokerInfo {
        let after = DURABLE_AFTER[LANE];
        BrokerInfo {
            outlives_power_cut: if forgets(LANE) {
                Durability::No { after }
            } else {
                Durability::Yes
            },
            incarnation: self.incarnation.to_string(),
            ..BrokerInfo::default()
        }
    }

    async fn backlog(&self) -> Result<Backlog, String> {
        if *self.brokers.0[LANE].epoch.borrow() != self.epoch {
            return Err("away".into());
        }
        Ok(Backlog {
            messages: self.brokers.records(LANE).len() as u64,
            is_shared: self.brokers.0[LANE].is_shared.load(Relaxed),
            is_exact: true,
        })
    }
}

impl<const LANE: usize> Link<LANE> {
    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        if *self.brokers.0[LANE].epoch.borrow() != self.epoch {
            return Err(TransportError::Lost("away".into()));
        }
        let (answer, answered) = oneshot::channel();
        self.brokers.publishes(LANE).push(Publish {
            lane: LANE,
            record: message.clone().into(),
            answer,
        });
        answered
            .await
            .unwrap_or_else(|_| Err(TransportError::Lost("cut".into())))
    }
}

/// The outcomes of clients' requests.
type Answers = Rc<RefCell<Vec<(usize, Result<Receipt, Refused>)>>>;

/// One run of the node.
pub struct Node {
    clock: Rc<Runtime>,
    /// For what the spool's thread answers: meanwhile nothing else moves, the clock least of all.
    apart: Runtime,
    /// All that lives in this process's memory.
    tasks: LocalSet,
    pub spool: Spool,
    pub ledger: Arc<Ledger>,
    /// The records on disk at the start.
    pub found: SpoolStats,
    /// Of each lane.
    pub copies: [Copies; LANES.len()],
    admission: Admission,
    router: Slot<Router>,
    feeder: Slot<Feeder>,
    supervisor: Addr<Supervisor>,
    answers: Answers,
}

/// A clock that stands still, and jumps to the next timer whenever all actors wait.
pub fn clock() -> Rc<Runtime> {
    Rc::new(
        Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without I/O"),
    )
}

impl Node {
    /// Starts a node as `waypost::node` does, on what an earlier run has left in `folder`.
    pub fn start(
        clock: Rc<Runtime>,
        brokers: &Brokers,
        folder: &Path,
        room: u64,
        run: usize,
    ) -> Self {
        let apart = Builder::new_current_thread()
            .build()
            .expect("a runtime without I/O");
        let spool = open(folder, room);
        let ledger = Arc::new(Ledger::new(Arc::from(format!("run{run}"))));
        let found = spool.stats();
        ledger.recovered_from_disk(found.waiting() + found.records(Queue::Dead));
        let router = Slot::default();
        let feeder = Slot::default();
        let fallback = DiskFallback {
            spool: spool.clone(),
            ledger: Arc::clone(&ledger),
        };
        let admission = Admission::new(router.clone(), PUBLISH_TIMEOUT, Arc::clone(&ledger));
        let live_lanes = live_lanes(Policy::RoundRobin);
        let copies = LANES.map(|lane| Copies::new(lane, spool.clone()));
        let params = |lane: usize| lane::LaneParams {
            lane: LANES[lane],
            router: router.clone(),
            forwarder: Slot::default(),
            window: LaneWindow::new(&[LIMITS]),
            ledger: Arc::clone(&ledger),
            live_lanes: live_lanes.clone(),
            publish_timeout: PUBLISH_TIMEOUT,
            bundle: 1,
            settled: SettledRecords::default(),
            copies: copies[lane].clone(),
            ack: Ack::Durable,
            tracer: LaneTracer::default(),
        };
        let graph = vec![
            start_router(&router, &live_lanes, fallback),
            start_feeder(&feeder, &spool, &admission, &ledger, &live_lanes),
            start_lane::<0>(params(0), brokers),
            start_lane::<1>(params(1), brokers),
            start_lane::<2>(params(2), brokers),
        ];
        let tasks = LocalSet::new();
        let supervisor =
            clock.block_on(tasks.run_until(async { Supervisor::start(&live_lanes, graph) }));
        Self {
            clock,
            apart,
            tasks,
            spool,
            ledger,
            found,
            copies,
            admission,
            router,
            feeder,
            supervisor,
            answers: Rc::default(),
        }
    }

    /// A record that is taken in now.
    pub fn record(&self, number: usize) -> Record {
        let origin = Some(Origin::now(Arc::clone(&self.ledger.run)));
        Record {
            id: id(number),
            body: body(number),
            trace: None,
            origin,
            api: None,
            event: None,
        }
    }

    /// A client posts a record.
    pub fn ingest(&self, record: Record, pinned: Option<usize>) {
        let admission = self.admission.clone();
        let answers = Rc::clone(&self.answers);
        self.tasks.spawn_local(async move {
            let number = number(&record);
            let record = assigned(record, &routing(), pinned.map(|lane| LANES[lane]));
            let answer = admission.submit(&[record]).await.remove(0);
            answers.borrow_mut().push((number, answer));
        });
    }

    /// The answers that clients have had since the last call.
    pub fn answers(&self) -> Vec<(usize, Result<Receipt, Refused>)> {
        self.answers.take()
    }

    pub fn has_router(&self) -> bool {
        self.router.get().is_some()
    }

    /// Lets time pass, for this process only.
    pub fn pass(&self, time: Duration) {
        self.clock
            .block_on(self.tasks.run_until(async { sleep(time).await }));
    }

    /// Lets all actors do what they can without the disk.
    pub fn turn(&self) {
        // The clock moves when nothing else does.
        self.pass(Duration::from_millis(1));
    }

    /// Lets the disk do what it was asked to.
    pub fn disk_works(&self) {
        self.ask(self.spool.list(Undelivered::Dead, 0)).ok();
    }

    pub fn ask<T>(&self, answer: impl Future<Output = T>) -> T {
        self.apart.block_on(answer)
    }

    pub fn spool_stats(&self) -> SpoolStats {
        self.spool.stats()
    }

    /// The ids of all dead letters.
    pub fn dead(&self) -> Result<Vec<String>, NotSafe> {
        let letters = self.ask(self.spool.list(Undelivered::Dead, usize::MAX))?;
        Ok(letters.into_iter().map(|letter| letter.id).collect())
    }

    /// The node drains and ends, once its clients have their answers.
    pub fn stop(self) {
        self.clock.block_on(self.tasks.run_until(async {
            let feeder = self.feeder.get().expect("nothing ends the feeder");
            feeder.send(Drain).await.expect("nothing ends the feeder");
            self.supervisor
                .send(DrainAll)
                .await
                .expect("nothing ends the supervisor");
        }));
        self.ask(self.spool.close());
        self.crash();
    }

    /// The process is killed. The disk may still do its pending work, and nothing of what the end
    /// of the tasks asks for.
    pub fn crash(self) {
        self.ask(self.spool.close());
        let _entered = self.clock.enter();
        drop(self.tasks);
    }
}

/// A child of the supervisor.
type Child = (ChildId, Thread, Factory);

fn routing() -> CurrentRouting {
    one_route(Policy::RoundRobin, &LANES)
}

fn start_router(slot: &Slot<Router>, live_lanes: &LiveLanes, fallback: DiskFallback) -> Child {
    let params = RouterParams {
        routing: routing(),
        live_lanes: live_lanes.clone(),
        fallback,
        explanations: Explanations::default(),
        publish_timeout: PUBLISH_TIMEOUT,
    };
    let start = factory(slot.clone(), move |supervisor| {
        Router::new(params.clone(), supervisor)
    });
    (ChildId::Router, Thread::Current, start)
}

fn start_feeder(
    slot: &Slot<Feeder>,
    spool: &Spool,
    admission: &Admission,
    ledger: &Arc<Ledger>,
    live_lanes: &LiveLanes,
) -> Child {
    let run = Arc::clone(&ledger.run);
    let api = SharedApi::new(None, &ApiConfig::default(), spool.clone(), None, &run).unwrap();
    let params = feeder::FeederParams {
        spools: Spools::new(spool.clone(), []),
        admission: admission.clone(),
        ledger: Arc::clone(ledger),
        lanes: LANES.into(),
        routing: routing(),
        live_lanes: live_lanes.clone(),
        apis: Apis::only(api, spool, &run),
    };
    let start = factory(slot.clone(), move |supervisor| {
        Feeder::new(params.clone(), supervisor)
    });
    (ChildId::Feeder, Thread::Current, start)
}

fn start_lane<const LANE: usize>(params: lane::LaneParams, brokers: &Brokers) -> Child {
    let brokers = brokers.clone();
    let start = factory(Slot::default(), move |supervisor| {
        Lane::<Link<LANE>>::new(brokers.clone(), params.clone(), supervisor)
    });
    (ChildId::Lane(LANES[LANE]), Thread::Current, start)
}

/// The thread before lets go of the folder a moment after its end was seen.
fn open(folder: &Path, room: u64) -> Spool {
    loop {
        match Spool::open(folder, room) {
            Err(OpenError::InUse(_)) => thread::yield_now(),
            spool => return spool.expect("the folder is ours"),
        }
    }
}

pub fn id(number: usize) -> Arc<str> {
    Arc::from(format!("r{number}"))
}

pub fn body(number: usize) -> Bytes {
    Bytes::from(format!("{{\"number\":{number}}}"))
}

/// The number of a record by [`id`].
pub fn number(record: &Record) -> usize {
    record
        .id
        .strip_prefix('r')
        .and_then(|number| number.parse().ok())
        .unwrap_or(usize::MAX)
}

/// Memory where there is such a place: the disk is not the subject, and a sync costs nothing there.
pub fn folder() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() {
        memory
    } else {
        std::env::temp_dir()
    }
}
