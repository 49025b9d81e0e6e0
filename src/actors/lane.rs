//! A lane: connects, publishes what the router hands over, and pulls what comes out, until the
//! connection breaks or the supervisor asks for the end. Back-off, pause and restart are the
//! supervisor's.

pub mod bundle;
mod compare;
mod publish;
mod pull;

use std::{
    cell::{Cell, RefCell},
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
use tokio::time::timeout;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tracing::{debug, warn};

use self::{
    bundle::{BundleSize, SettledRecords, Unbundler},
    compare::compare,
    publish::{publish, return_job},
    pull::{pull, settle_open},
};
use super::{
    Drain, FED_MAX, Job, Ping, Publish, RECORDS_MAX, Source, Supervised,
    copies::{self, Copies},
    forwarder::{Forwarder, LaneWindow},
    live_lanes::LiveLanes,
    router::Router,
    slot::Slot,
    supervisor::{Exit, SupervisorHandle},
};
use crate::{
    config::Ack,
    lane_id::LaneId,
    ledger::Ledger,
    spool::CopyWriter,
    trace::LaneTracer,
    transport::{self, CLOSE_TIMEOUT, Durability, Transport},
};

/// How long a drain waits for open bundles to be settled, before it nacks them.
const SETTLE_TIMEOUT: Duration = Duration::from_millis(500);
/// The shortest time between two looks for copies that are not needed any more.
const EXPIRE_MIN: Duration = Duration::from_millis(100);

/// The parts of a lane beside its transport's settings; each restart uses the same ones.
#[derive(Clone)]
pub struct LaneParams {
    pub lane: LaneId,
    pub router: Slot<Router>,
    pub forwarder: Slot<Forwarder>,
    /// It bounds the deliveries that the forwarder may have: the lane pulls no more than that.
    pub window: LaneWindow,
    pub ledger: Arc<Ledger>,
    pub live_lanes: LiveLanes,
    pub publish_timeout: Duration,
    /// The most records of one message.
    pub bundle: usize,
    pub settled: SettledRecords,
    pub copies: Copies,
    pub ack: Ack,
    pub tracer: LaneTracer,
}

/// The lane of transport `T`.
pub struct Lane<T: Transport> {
    settings: T::Settings,
    params: Rc<LaneParams>,
    supervisor: SupervisorHandle,
    /// There while the lane is up.
    connection: Option<Connected<T>>,
    pull: Option<AbortOnDropHandle<()>>,
    compare: Option<AbortOnDropHandle<()>>,
    unbundler: Rc<RefCell<Unbundler>>,
    publishing: TaskTracker,
    /// Jobs whose records share messages, until the next [`Flush`].
    batch: Vec<Job>,
    draining: bool,
    /// The time of the last answer to a publish.
    answered: Rc<Cell<Option<Instant>>>,
}

struct Connected<T> {
    transport: Rc<T>,
    bundle: BundleSize,
    /// There if each record needs a copy on disk before its reply.
    copy_writer: Option<Rc<CopyWriter>>,
}

/// Publish the batch.
#[derive(Message)]
#[rtype(result = "()")]
struct Flush;

/// The lane cannot go on.
#[derive(Message)]
#[rtype(result = "()")]
struct Broken(Exit);

impl<T: Transport> Lane<T> {
    pub fn new(settings: T::Settings, params: LaneParams, supervisor: SupervisorHandle) -> Self {
        let unbundler = Unbundler::new(params.settled.clone());
        let unbundler = unbundler.with_tracer(params.tracer.clone());
        Self {
            settings,
            params: Rc::new(params),
            supervisor,
            connection: None,
            pull: None,
            compare: None,
            unbundler: Rc::new(RefCell::new(unbundler)),
            publishing: TaskTracker::new(),
            batch: Vec::new(),
            draining: false,
            answered: Rc::default(),
        }
    }

    fn connected(&mut self, transport: T, ctx: &mut Context<Self>) {
        let info = transport.info();
        let transport = Rc::new(transport);
        let durability = info.outlives_power_cut;
        let needs_copies = match self.params.ack {
            Ack::Lane => false,
            Ack::Durable => durability != Durability::Yes,
            Ack::Disk => true,
        };
        self.connection = Some(Connected {
            transport: Rc::clone(&transport),
            bundle: BundleSize::new(
                self.params.bundle,
                info.largest_message.unwrap_or(usize::MAX),
            ),
            copy_writer: needs_copies.then(|| Rc::new(self.params.copies.writer())),
        });
        self.params.copies.connected(&info);
        let durable_after = durability.after();
        if !durable_after.is_zero() && durable_after < Duration::MAX {
            let step = (durable_after / copies::PARTS).max(EXPIRE_MIN);
            ctx.run_interval(step, |lane, _| {
                lane.params.copies.expire(lane.params.publish_timeout);
                if let Some(Connected { transport, .. }) = &lane.connection {
                    lane.params.copies.broker_had(transport.last_message());
                }
            });
        }
        let params = Rc::clone(&self.params);
        let compared = Rc::clone(&transport);
        self.compare = Some(AbortOnDropHandle::new(actix_rt::spawn(async move {
            compare(&*compared, &params).await;
        })));
        let params = Rc::clone(&self.params);
        let unbundler = Rc::clone(&self.unbundler);
        let lane = ctx.address();
        self.pull = Some(AbortOnDropHandle::new(actix_rt::spawn(async move {
            let pulling = AssertUnwindSafe(pull(&*transport, &params, &unbundler));
            let exit = match pulling.catch_unwind().await {
                Ok(lost) => Exit::Failed(lost.to_string()),
                Err(_) => Exit::Panicked("panicked while pulling".into()),
            };
            lane.do_send(Broken(exit));
        })));
        self.supervisor
            .ready(Some((ctx.address().recipient(), info)));
    }

    /// Publishes the records of `jobs`, or returns them to the router if there is no connection.
    fn publish(&self, jobs: Vec<Job>, ctx: &Context<Self>) {
        let Some(connection) = &self.connection else {
            return jobs
                .into_iter()
                .for_each(|job| return_job(job, &self.params));
        };
        let transport = Rc::clone(&connection.transport);
        let bundle = connection.bundle;
        let copy_writer = connection.copy_writer.clone();
        let params = Rc::clone(&self.params);
        let answered = Rc::clone(&self.answered);
        let lane = ctx.address();
        // Boxed: a task is moved several times before it runs, and its future is large.
        self.publishing.spawn_local(Box::pin(async move {
            let copy_writer = copy_writer.as_deref();
            let publishing = publish(&*transport, jobs, bundle, &params, copy_writer, &answered);
            if let Some(exit) = publishing.await {
                lane.do_send(Broken(exit));
            }
        }));
    }

    /// Whether this record may share a message. A record that may already be published, as a copy
    /// is, goes alone, so that the broker can drop a duplicate by its id. One past half its time-out
    /// goes alone too.
    fn may_batch(&self, job: &Job) -> bool {
        let [pending] = &*job.records else {
            return false;
        };
        self.params.bundle > 1
            && job.source != Source::Copies
            && job.began.elapsed() < self.params.publish_timeout / 2
            && !self.params.ledger.is_maybe_published(&pending.record)
    }

    fn flush(&mut self, ctx: &Context<Self>) {
        let mut batch = mem::take(&mut self.batch).into_iter();
        loop {
            let jobs: Vec<_> = batch.by_ref().take(self.params.bundle).collect();
            if jobs.is_empty() {
                return;
            }
            self.publish(jobs, ctx);
        }
    }

    fn end(&mut self, exit: Exit, ctx: &mut Context<Self>) {
        self.supervisor.set_exit(exit);
        ctx.stop();
    }
}

async fn close<T: Transport>(transport: &T, lane: LaneId) {
    if timeout(CLOSE_TIMEOUT, transport.close()).await.is_err() {
        warn!(%lane, "connection did not close in time");
    }
}

impl<T: Transport> Actor for Lane<T> {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let settings = self.settings.clone();
        let connecting = async move { transport::connect(&settings).await };
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
        self.compare = None;
        self.unbundler.borrow_mut().nack_all();
        let connection = self.connection.take();
        self.flush(ctx);
        if let Some(connection) = connection {
            let lane = self.params.lane;
            let last_message = connection.transport.last_message();
            self.params.copies.broker_had(last_message);
            actix_rt::spawn(async move { close(&*connection.transport, lane).await });
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
        if self.draining {
            return return_job(job, &self.params);
        }
        if self.connection.is_none() || !self.may_batch(&job) {
            return self.publish(vec![job], ctx);
        }
        if self.batch.is_empty() {
            // The lane handles it after the jobs that are in its mailbox by now.
            ctx.notify(Flush);
        }
        self.batch.push(job);
    }
}

impl<T: Transport> Handler<Flush> for Lane<T> {
    type Result = ();

    fn handle(&mut self, _: Flush, ctx: &mut Self::Context) {
        self.flush(ctx);
    }
}

impl<T: Transport> Handler<Broken> for Lane<T> {
    type Result = ();

    fn handle(&mut self, Broken(exit): Broken, ctx: &mut Self::Context) {
        let exit = match exit {
            Exit::Failed(why) => Exit::Failed(format!("{}: {why}", T::address(&self.settings))),
            exit => exit,
        };
        self.end(exit, ctx);
    }
}

impl<T: Transport> Handler<Drain> for Lane<T> {
    type Result = ResponseActFuture<Self, ()>;

    /// Confirms the records being published, stops pulling, waits until open bundles are settled
    /// and the forwarder has ended its POSTs, disconnects, stops.
    fn handle(&mut self, _: Drain, ctx: &mut Self::Context) -> Self::Result {
        self.flush(ctx);
        self.draining = true;
        let publishing = self.publishing.clone();
        publishing.close();
        let finish = async move { publishing.wait().await }
            .into_actor(self)
            .then(|(), lane, _| {
                lane.pull = None;
                lane.compare = None;
                let connection = lane.connection.take();
                let params = Rc::clone(&lane.params);
                let unbundler = Rc::clone(&lane.unbundler);
                drain(connection, params, unbundler).into_actor(lane)
            })
            .map(|(), lane, ctx| lane.end(Exit::Stopped, ctx));
        Box::pin(finish)
    }
}

async fn drain<T: Transport>(
    connection: Option<Connected<T>>,
    params: Rc<LaneParams>,
    unbundler: Rc<RefCell<Unbundler>>,
) {
    let lane = params.lane;
    if connection.is_some() {
        let settling = timeout(SETTLE_TIMEOUT, settle_open(&params, &unbundler));
        if settling.await.is_err() {
            debug!(%lane, "deliveries are nacked: they were not settled in time");
        }
        unbundler.borrow_mut().nack_all();
    }
    if let Some(forwarder) = params.forwarder.get()
        && forwarder.send(Drain).await.is_err()
    {
        debug!(%lane, "forwarder ended while it drained");
    }
    if let Some(connection) = connection {
        params
            .copies
            .broker_had(connection.transport.last_message());
        close(&*connection.transport, lane).await;
    }
}

impl<T: Transport> Handler<Ping> for Lane<T> {
    type Result = Result<(), String>;

    fn handle(&mut self, _: Ping, _: &mut Self::Context) -> Self::Result {
        Ok(())
    }
}
