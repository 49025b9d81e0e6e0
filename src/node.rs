//! A node: wires the graph in the order in which data flows, and drains it in that order.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::available_parallelism,
    time::Duration,
};

use actix::{Actor as _, Addr};
use actix_web::{App, HttpServer, dev::ServerHandle, web};
use tokio::{net::TcpSocket, sync::Semaphore};
use tracing::{error, info, warn};

use crate::{
    actors::{
        Drain,
        admission::Admission,
        fallback::DiskFallback,
        feeder::{self, Feeder},
        forwarder::{self, Forwarder},
        lane::{self, Lane},
        live_lanes::LiveLanes,
        router::{self, Router},
        slot::Slot,
        supervisor::{ChildId, DrainAll, Factory, Supervisor, Thread, factory},
    },
    api,
    breaker::Breaker,
    config::{Ack, Config},
    http::{admin, ingest},
    idempotency::IdempotencyStore,
    lane_id::LaneId,
    ledger::{self, Ledger},
    record::Record,
    spool::{OpenError, Queue, Spool, SpoolStats},
    tap::Tap,
    transport::{
        Transport, grpc,
        nats::{self, Nats},
        pubsub::{self, Pubsub},
        rabbitmq::{self, RabbitMq},
    },
};

/// How long requests under way may take once the node drains.
const INGEST_DRAIN: Duration = Duration::from_secs(4);
const ADMIN_DRAIN: Duration = Duration::from_secs(1);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// A running node.
pub struct Node {
    /// Where it takes records.
    pub ingest: SocketAddr,
    pub admin: SocketAddr,
    pub ledger: Arc<Ledger>,
    pub supervisor: Addr<Supervisor>,
    pub spool: Spool,
    feeder: Slot<Feeder>,
    draining: Arc<AtomicBool>,
    ingest_server: ServerHandle,
    admin_server: ServerHandle,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("spool: {0}")]
    Spool(#[from] OpenError),
    #[error("api: {0}")]
    Api(#[from] api::ApiError),
    #[error("cannot serve: {0}")]
    Serve(#[from] io::Error),
}

impl Node {
    /// Starts all actors and servers of a node on the present actix system. Its lanes connect in their own time.
    ///
    /// # Errors
    /// When an address is taken, or a file that `config` names cannot be used.
    pub fn start(config: &Config) -> Result<Self, StartError> {
        let (ingest_socket, admin_socket) =
            (listen(config.ingest.listen)?, listen(config.admin.listen)?);
        let ledger = Arc::new(Ledger::new(Record::new_id()));
        let spool = Spool::open(&config.spool.dir, config.spool.max)?;
        let found = spool.stats();
        let lanes = config.lanes.in_order();
        ledger.found_waiting(found.waiting() + found.records(Queue::Dead));
        for (lane, lies) in LaneId::ALL.map(|lane| (lane, left_to(lane, &found))) {
            if lies > 0 && lanes.iter().all(|(known, _)| *known != lane) {
                error!(%lane, records = lies, "records lie on disk for a lane that is not configured any more");
            }
        }
        actix_rt::spawn(ledger::audit(Arc::clone(&ledger), spool.watch_stats()));
        let (draining, router) = (Arc::new(AtomicBool::new(false)), Slot::new());

        // HTTP → ingest → router → spool.
        let publish_timeout = config.router.publish_timeout;
        let on_disk = DiskFallback {
            spool: spool.clone(),
            ledger: Arc::clone(&ledger),
        };
        let disk_first = (config.ingest.ack == Ack::Disk).then(|| on_disk.clone());
        let admission = Admission::new(
            router.clone(),
            publish_timeout,
            Arc::clone(&ledger),
            disk_first,
        );
        let ingest_state = ingest::IngestState {
            admission: admission.clone(),
            lanes: lanes.clone().into(),
            schema: config.ingest.schema,
            max_body: config.ingest.max_body,
            max_record: config.ingest.max_record,
            run: Arc::clone(&ledger.run),
            keys: IdempotencyStore::open(&config.spool.dir)?,
            ledger: Arc::clone(&ledger),
        };
        // Half of the cores carry lanes, the other half HTTP: a record that crosses no thread wakes none. The router shares the
        // first lane's.
        let threads: Vec<_> = (0..half_the_cores().min(lanes.len().max(1)))
            .map(|_| Thread::spawn())
            .collect();
        let (policy, ids) = (
            config.router.policy,
            lanes.iter().map(|(lane, _)| *lane).collect::<Arc<[_]>>(),
        );
        let live_lanes = LiveLanes::default();
        let routing = router::RouterParams {
            policy,
            lanes: Arc::clone(&ids),
            live_lanes: live_lanes.clone(),
            fallback: on_disk,
            publish_timeout,
        };
        let start_router = factory(router.clone(), move |supervisor| {
            Router::new(routing.clone(), supervisor)
        });
        let mut graph = vec![(ChildId::Router, threads[0].clone(), start_router)];

        // Spool → feeder → router.
        let feeding = feeder::FeederParams {
            spool: spool.clone(),
            admission,
            ledger: Arc::clone(&ledger),
            lanes: ids,
            give_up_after: config.api.give_up_after,
        };
        let feeder = Slot::new();
        let start_feeder = factory(feeder.clone(), move |supervisor| {
            Feeder::new(feeding.clone(), supervisor)
        });
        graph.push((ChildId::Feeder, Thread::Current, start_feeder));

        // Router → lane → transport ══▶ lane → forwarder → API, once per lane.
        let tap = Tap::default();
        let wiring = forwarder::ForwarderParams {
            ledger: Arc::clone(&ledger),
            breaker: Arc::new(Breaker::default()),
            spool: spool.clone(),
            tap: tap.clone(),
            give_up_after: config.api.give_up_after,
            limits: forwarder::Limits {
                posts: config.api.concurrency,
                batch: config.api.batch,
            },
        };
        for ((lane, tag), place) in lanes.iter().zip(threads.iter().cycle()) {
            let (place, api) = (place.clone(), api::Settings::read(&config.api)?);
            let branch = Branch {
                config,
                tag,
                router: &router,
                wiring: &wiring,
                api,
                place,
            };
            let on = &config.lanes;
            match lane {
                LaneId::Grpc => {
                    let settings = on.grpc.clone().map(|lane| grpc::Settings {
                        config: lane,
                        tap: tap.clone(),
                        schema: config.ingest.schema,
                        run: Arc::clone(&ledger.run),
                        spool: spool.clone(),
                        breaker: Arc::clone(&wiring.breaker),
                    });
                    branch.grow::<grpc::Grpc>(settings, &mut graph);
                }
                LaneId::Nats => {
                    branch.grow::<Nats>(on.nats.clone().map(nats::Settings::new), &mut graph)
                }
                LaneId::Rabbitmq => {
                    branch.grow::<RabbitMq>(
                        on.rabbitmq.clone().map(rabbitmq::Settings::new),
                        &mut graph,
                    );
                }
                LaneId::Pubsub => {
                    branch.grow::<Pubsub>(on.pubsub.clone().map(pubsub::Settings::new), &mut graph)
                }
                LaneId::Memory => {}
            }
        }

        let supervisor = Supervisor::new(&live_lanes, graph).start();
        let admin_state = admin::AdminState {
            supervisor: supervisor.clone(),
            ledger: Arc::clone(&ledger),
            spool: spool.clone(),
            breaker: Arc::clone(&wiring.breaker),
            node: gethostname::gethostname().to_string_lossy().into(),
            lanes: lanes.into(),
            api_url: config.api.url.to_string().into(),
            api_limit: config.api.concurrency,
            draining: Arc::clone(&draining),
            ack: config.ingest.ack,
        };
        let (ingest, admin) = (ingest_socket.local_addr()?, admin_socket.local_addr()?);
        let ingest_server = serve(ingest_socket, half_the_cores(), INGEST_DRAIN, move |app| {
            ingest::routes(app.app_data(web::Data::new(ingest_state.clone())));
        })?;
        let admin_server = serve(admin_socket, 1, ADMIN_DRAIN, move |app| {
            admin::routes(app.app_data(web::Data::new(admin_state.clone())));
        })?;
        info!(%ingest, %admin, "node is up");
        Ok(Self {
            ingest,
            admin,
            ledger,
            supervisor,
            spool,
            feeder,
            draining,
            ingest_server,
            admin_server,
        })
    }

    /// Ends the node in the order in which data flows, so that nothing under way is cut off: not ready, no new connection,
    /// requests answered, pulling stopped, POSTs ended, settled, brokers closed, spool closed. What is left is in the brokers
    /// and in the spool.
    pub async fn drain(self) {
        info!("draining");
        self.draining.store(true, Relaxed);
        self.ingest_server.stop(true).await;
        if let Some(feeder) = self.feeder.get()
            && feeder.send(Drain).await.is_err()
        {
            warn!("the feeder ended before the drain");
        }
        if self.supervisor.send(DrainAll).await.is_err() {
            warn!("the supervisor ended before the drain");
        }
        self.admin_server.stop(false).await;
        self.spool.close().await;
        let balance = self.ledger.balance(&self.spool.stats());
        info!(?balance, "drained");
    }
}

fn half_the_cores() -> usize {
    available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))
}

/// Records on disk that only `lane` takes.
fn left_to(lane: LaneId, found: &SpoolStats) -> u64 {
    found.records(Queue::Pinned(lane))
        + if lane == LaneId::Grpc {
            found.records(Queue::Carried)
        } else {
            0
        }
}

/// Serves until the handle says stop; requests under way may then take up to `drain`.
fn serve(
    socket: TcpListener,
    workers: usize,
    drain: Duration,
    routes: impl Fn(&mut web::ServiceConfig) + Clone + Send + 'static,
) -> io::Result<ServerHandle> {
    let server = HttpServer::new(move || App::new().configure(routes.clone()))
        .workers(workers)
        .shutdown_timeout(drain.as_secs())
        .disable_signals()
        .listen(socket)?
        .run();
    let handle = server.handle();
    actix_rt::spawn(async move {
        if let Err(failure) = server.await {
            error!(%failure, "HTTP server ended");
        }
    });
    Ok(handle)
}

fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    let bind = || {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)?.into_std()
    };
    bind().map_err(|source| StartError::Listen { address, source })
}

/// One lane of the graph, before it is wired.
struct Branch<'a> {
    config: &'a Config,
    tag: &'a str,
    router: &'a Slot<Router>,
    wiring: &'a forwarder::ForwarderParams,
    api: api::Settings,
    /// Where both actors live: a delivery does not cross threads between them.
    place: Thread,
}

impl Branch<'_> {
    /// Adds the lane's actors, last one first: each is given the address of the one it sends to.
    fn grow<T: Transport>(
        self,
        settings: Option<T::Settings>,
        graph: &mut Vec<(ChildId, Thread, Factory)>,
    ) {
        let Some(settings) = settings else { return };
        let Self {
            config,
            tag,
            router,
            wiring,
            api,
            place,
        } = self;
        let forwarder = Slot::new();
        let start_forwarder = {
            let (tag, wiring) = (tag.to_owned(), wiring.clone());
            factory(forwarder.clone(), move |supervisor| {
                Forwarder::new(
                    T::LANE,
                    &tag,
                    api::Api::new(&api),
                    wiring.clone(),
                    supervisor,
                )
            })
        };
        graph.push((ChildId::Forwarder(T::LANE), place.clone(), start_forwarder));
        let deliveries = wiring.limits.deliveries();
        let wiring = lane::LaneParams {
            router: router.clone(),
            forwarder,
            deliveries: Arc::new(Semaphore::new(deliveries)),
            deliveries_max: u32::try_from(deliveries).unwrap_or(u32::MAX),
            ledger: Arc::clone(&wiring.ledger),
            publish_timeout: config.router.publish_timeout,
        };
        let start_lane = factory(Slot::new(), move |supervisor| {
            Lane::<T>::new(settings.clone(), wiring.clone(), supervisor)
        });
        graph.push((ChildId::Lane(T::LANE), place, start_lane));
    }
}
