//! A lane: connect, then publish what the router hands over and pull what comes out, until the connection
//! breaks or the supervisor asks for the end. Back-off, pause and restart are the supervisor's.

use std::{
    cell::Cell,
    mem,
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use actix::{
    Actor, ActorContext as _, ActorFutureExt as _, AsyncContext as _, Context, Handler, Message,
    ResponseActFuture, WrapFuture as _,
};
use futures_util::FutureExt as _;
use smallvec::{SmallVec, smallvec};
use tokio::{sync::Semaphore, time::timeout};
use tracing::{debug, warn};

use super::{
    Drain, FED_MAX, Forward, Job, Ping, Publish, RECORDS_MAX, Returned, Supervised,
    forwarder::Forwarder,
    receipts::PendingRecord,
    router::Router,
    slot::Slot,
    supervisor::{Exit, SupervisorHandle},
    tasks::{InFlight, Task},
};
use crate::{
    delivery::Receipt,
    lane_id::LaneId,
    ledger::Ledger,
    record::Record,
    transport::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, Transport, TransportError},
};

/// How long a restart of the forwarder may keep a delivery waiting.
const FORWARDER_PATIENCE: Duration = Duration::from_secs(5);
/// Deliveries that go to the forwarder in one message at most.
const TOGETHER_MAX: usize = 256;
/// How long what has come out may take to be settled when the lane drains, before it is given back.
const SETTLING: Duration = Duration::from_millis(500);
/// Records of different requests that travel as one message at most: where it must come again, it may bring those again that were
/// delivered.
const GATHERED_MAX: usize = 16;
/// The time that a lane has for a publish at least.
const PUBLISH_MIN: Duration = Duration::from_millis(100);

/// What a lane is wired to; the same for each of its lives.
#[derive(Clone)]
pub struct LaneParams {
    pub router: Slot<Router>,
    pub forwarder: Slot<Forwarder>,
    /// One permit per delivery that the forwarder may have: the lane pulls no more than that.
    pub deliveries: Arc<Semaphore>,
    /// How many of them there are.
    pub deliveries_max: u32,
    pub ledger: Arc<Ledger>,
    pub publish_timeout: Duration,
}

/// The lane of transport `T`.
pub struct Lane<T: Transport> {
    settings: T::Settings,
    params: LaneParams,
    supervisor: SupervisorHandle,
    /// There while the lane is up.
    transport: Option<Rc<T>>,
    pull: Option<Task>,
    publishing: InFlight,
    /// What has come in one go, and leaves in as few messages as the system allows.
    gathered: Vec<Job>,
    draining: bool,
    /// When a record was last confirmed.
    confirmed: Rc<Cell<Option<Instant>>>,
}

/// Publish what was gathered.
#[derive(Message)]
#[rtype(result = "()")]
struct Leave;

/// The lane cannot go on.
#[derive(Message)]
#[rtype(result = "()")]
struct Broken(Exit);

impl<T: Transport> Lane<T> {
    #[must_use]
    pub fn new(settings: T::Settings, params: LaneParams, supervisor: SupervisorHandle) -> Self {
        Self {
            settings,
            params,
            supervisor,
            transport: None,
            pull: None,
            publishing: InFlight::default(),
            gathered: Vec::new(),
            draining: false,
            confirmed: Rc::default(),
        }
    }

    fn connected(&mut self, transport: T, ctx: &mut Context<Self>) {
        let broker = transport.broker();
        let transport = Rc::new(transport);
        self.transport = Some(Rc::clone(&transport));
        let (params, lane) = (self.params.clone(), ctx.address());
        self.pull = Some(Task::spawn(async move {
            let exit = match AssertUnwindSafe(pull(&*transport, &params))
                .catch_unwind()
                .await
            {
                Ok(lost) => Exit::Failed(lost.to_string()),
                Err(_) => Exit::Panicked("panicked while pulling".into()),
            };
            lane.do_send(Broken(exit));
        }));
        self.supervisor
            .ready(Some((ctx.address().recipient(), broker)));
    }

    /// Confirms the records of `jobs`.
    fn publish(&self, transport: Rc<T>, jobs: SmallVec<[Job; 1]>, ctx: &Context<Self>) {
        let (params, confirmed) = (self.params.clone(), Rc::clone(&self.confirmed));
        let (underway, lane) = (self.publishing.begin(), ctx.address());
        actix_rt::spawn(async move {
            if let Some(exit) = publish(&*transport, jobs, &params, &confirmed).await {
                lane.do_send(Broken(exit));
            }
            drop(underway);
        });
    }

    /// Whether `job` may leave with others. A record that may have been sent before goes alone: if it was alone then, a system that
    /// tells messages by their ids knows it. One that is short of time leaves it to the others.
    fn may_join(&self, job: &Job) -> bool {
        let [it] = &*job.records else { return false };
        job.began.elapsed() < self.params.publish_timeout / 2
            && !self.params.ledger.is_maybe_published(&it.record)
    }

    /// Publishes what was gathered, or gives it back where there is no connection any more.
    fn leave(&mut self, ctx: &Context<Self>) {
        let mut gathered = mem::take(&mut self.gathered).into_iter();
        loop {
            let jobs: SmallVec<_> = gathered.by_ref().take(GATHERED_MAX).collect();
            match &self.transport {
                _ if jobs.is_empty() => return,
                Some(transport) => self.publish(Rc::clone(transport), jobs, ctx),
                None => jobs
                    .into_iter()
                    .for_each(|job| give_back(&self.params.router, job, T::LANE)),
            }
        }
    }

    fn end(&mut self, exit: Exit, ctx: &mut Context<Self>) {
        self.supervisor.set_exit(exit);
        ctx.stop();
    }
}

/// A record that is to be confirmed.
#[derive(Clone, Copy)]
struct Owed<'a> {
    pending: &'a PendingRecord,
    on_disk: bool,
}

impl AsRef<Record> for Owed<'_> {
    fn as_ref(&self) -> &Record {
        self.pending.as_ref()
    }
}

/// Hands what comes out of the transport to the forwarder, no faster than it POSTs. Returns when the connection is lost.
async fn pull<T: Transport>(transport: &T, params: &LaneParams) -> TransportError {
    loop {
        // An API that is away must not hide a connection that is lost.
        let permit = tokio::select! {
            biased;
            permit = Arc::clone(&params.deliveries).acquire_owned() => permit,
            lost = transport.lost() => return lost,
        };
        let Ok(mut permits) = permit else {
            return TransportError::Lost("the node is stopping".into());
        };
        let mut deliveries = match transport.next().await {
            Ok(delivery) => vec![delivery],
            Err(lost) => return lost,
        };
        // What is here as well goes along.
        let room = params.deliveries.available_permits().min(TOGETHER_MAX - 1);
        if let Ok(mut more) =
            Arc::clone(&params.deliveries).try_acquire_many_owned(u32::try_from(room).unwrap_or(0))
        {
            deliveries.extend(std::iter::from_fn(|| transport.try_next()).take(more.num_permits()));
            if let Some(taken) = more.split(deliveries.len() - 1) {
                permits.merge(taken);
            }
        }
        fail::fail_point!("pull");
        let Some(forwarder) = params.forwarder.wait(FORWARDER_PATIENCE).await else {
            return TransportError::Lost("there is no forwarder".into());
        };
        // A forwarder that has just died drops the deliveries, and so gives them back.
        if forwarder
            .try_send(Forward {
                deliveries,
                permits,
            })
            .is_err()
        {
            debug!(lane = %T::LANE, "forwarder did not take deliveries");
        }
    }
}

/// Confirms the records of `jobs`, and gives those that it cannot back to the router. The answer says why the lane cannot go on.
async fn publish<T: Transport>(
    transport: &T,
    jobs: SmallVec<[Job; 1]>,
    params: &LaneParams,
    confirmed: &Cell<Option<Instant>>,
) -> Option<Exit> {
    let began = Instant::now();
    // Lanes that have tried them before have used up a part of their time.
    let used_up = jobs
        .iter()
        .map(|job| job.began.elapsed())
        .max()
        .unwrap_or_default();
    let patience = params
        .publish_timeout
        .saturating_sub(used_up)
        .max(PUBLISH_MIN);
    let records = jobs.iter().flat_map(|job| {
        job.records.iter().map(|pending| Owed {
            pending,
            on_disk: job.on_disk,
        })
    });
    let records: SmallVec<[_; 1]> = records.collect();
    let mut failure = None;
    let publishing = transport.publish_all(&records, |at, outcome| match outcome {
        Ok(()) => {
            let now = Instant::now();
            confirmed.set(Some(now));
            let Owed { pending, on_disk } = records[at];
            match (pending.reply(Ok(Receipt::Lane(T::LANE))), on_disk) {
                (true, false) => params.ledger.accepted(T::LANE, now - began),
                (true, true) => params.ledger.resent(T::LANE, now - began),
                // Nothing was promised: should it come out of the lane, it is counted there.
                (false, false) => {}
                (false, true) => params.ledger.maybe_published(&pending.record),
            }
        }
        // That the connection is lost matters more than what became of one record.
        Err(why) if !matches!(failure, Some(TransportError::Lost(_))) => failure = Some(why),
        Err(_) => {}
    });
    if timeout(patience, publishing).await.is_err()
        && !matches!(failure, Some(TransportError::Lost(_)))
    {
        let silent = T::CONFIRMS_ALONE && confirmed.get().is_none_or(|at| at < began);
        let why = format!("no confirm within {:?}", params.publish_timeout);
        failure = Some(if silent && patience >= params.publish_timeout / 2 {
            TransportError::Lost(why)
        } else {
            TransportError::Publish(why)
        });
    }
    let failure = failure?;
    drop(records);
    for mut job in jobs {
        job.retain_unanswered();
        if job.records.is_empty() {
            continue;
        }
        debug!(lane = %T::LANE, records = job.records.len(), %failure, "records not confirmed");
        for pending in &job.records {
            params.ledger.maybe_published(&pending.record);
        }
        give_back(&params.router, job, T::LANE);
    }
    matches!(failure, TransportError::Lost(_)).then(|| Exit::Failed(failure.to_string()))
}

/// A router that has just died drops the job, and ingest sends it again.
fn give_back(router: &Slot<Router>, job: Job, lane: LaneId) {
    if let Some(router) = router.get()
        && router.try_send(Returned { job, lane }).is_err()
    {
        debug!(%lane, "router did not take records back");
    }
}

/// Lets what has come out be settled, the other records of its messages included: a message that is given back brings all of them again.
async fn settle<T: Transport>(transport: &T, params: &LaneParams) {
    while let Some(delivery) = transport.next_opened().await {
        let Ok(permits) = Arc::clone(&params.deliveries).acquire_owned().await else {
            return;
        };
        let Some(forwarder) = params.forwarder.get() else {
            return;
        };
        if forwarder
            .try_send(Forward {
                deliveries: vec![delivery],
                permits,
            })
            .is_err()
        {
            return debug!(lane = %T::LANE, "forwarder did not take deliveries");
        }
    }
    // Whatever is out has one.
    drop(params.deliveries.acquire_many(params.deliveries_max).await);
}

async fn close<T: Transport>(transport: Rc<T>) {
    if timeout(CLOSE_TIMEOUT, transport.close()).await.is_err() {
        warn!(lane = %T::LANE, "connection did not close in time");
    }
}

impl<T: Transport> Actor for Lane<T> {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let settings = self.settings.clone();
        let connecting = async move {
            match timeout(CONNECT_TIMEOUT, T::connect(&settings)).await {
                Ok(result) => result,
                Err(_) => Err(TransportError::Connect(format!(
                    "no answer within {CONNECT_TIMEOUT:?}"
                ))),
            }
        };
        ctx.spawn(
            connecting
                .into_actor(self)
                .map(|result, lane, ctx| match result {
                    Ok(transport) => lane.connected(transport, ctx),
                    Err(failure) => lane.end(Exit::Failed(failure.to_string()), ctx),
                }),
        );
    }

    fn stopped(&mut self, ctx: &mut Self::Context) {
        self.pull = None;
        let transport = self.transport.take();
        self.leave(ctx);
        if let Some(transport) = transport {
            actix_rt::spawn(close(transport));
        }
    }
}

impl<T: Transport> Supervised for Lane<T> {
    /// Each record that may be in hand, and control messages.
    const MAILBOX: usize = RECORDS_MAX + FED_MAX + 64;
}

impl<T: Transport> Handler<Publish> for Lane<T> {
    type Result = ();

    fn handle(&mut self, Publish(job): Publish, ctx: &mut Self::Context) {
        fail::fail_point!("lane");
        let Some(transport) = self.transport.clone().filter(|_| !self.draining) else {
            return give_back(&self.params.router, job, T::LANE);
        };
        if transport.bundle_max() == 0 || !self.may_join(&job) {
            return self.publish(transport, smallvec![job], ctx);
        }
        if self.gathered.is_empty() {
            // It is handled after all that lies in the mailbox by now.
            ctx.notify(Leave);
        }
        self.gathered.push(job);
    }
}

impl<T: Transport> Handler<Leave> for Lane<T> {
    type Result = ();

    fn handle(&mut self, _: Leave, ctx: &mut Self::Context) {
        self.leave(ctx);
    }
}

impl<T: Transport> Handler<Broken> for Lane<T> {
    type Result = ();

    fn handle(&mut self, Broken(exit): Broken, ctx: &mut Self::Context) {
        self.end(exit, ctx);
    }
}

impl<T: Transport> Handler<Drain> for Lane<T> {
    type Result = ResponseActFuture<Self, ()>;

    /// Confirms what is being published, stops pulling, lets what has come out be settled, or the forwarder end its POSTs at least,
    /// disconnects, stops.
    fn handle(&mut self, _: Drain, ctx: &mut Self::Context) -> Self::Result {
        self.leave(ctx);
        self.draining = true;
        let publishing = self.publishing.clone();
        let finish = async move { publishing.idle().await }
            .into_actor(self)
            .then(|(), lane, _| {
                lane.pull = None;
                let (params, transport) = (lane.params.clone(), lane.transport.take());
                async move {
                    if let Some(transport) = &transport
                        && timeout(SETTLING, settle(&**transport, &params)).await.is_err()
                    {
                        debug!(lane = %T::LANE, "deliveries are given back: they were not settled in time");
                    }
                    let forwarder = params.forwarder.get();
                    if let Some(forwarder) = forwarder
                        && forwarder.send(Drain).await.is_err()
                    {
                        debug!(lane = %T::LANE, "forwarder ended while it drained");
                    }
                    if let Some(transport) = transport {
                        close(transport).await;
                    }
                }
                .into_actor(lane)
            })
            .map(|(), lane, ctx| lane.end(Exit::Stopped, ctx));
        Box::pin(finish)
    }
}

impl<T: Transport> Handler<Ping> for Lane<T> {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        Ok(())
    }
}
