//! A node: wires its actors in the order in which data flows, and drains them in that order.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::available_parallelism,
    time::Duration,
};

use actix::Addr;
use actix_web::dev::ServerHandle;
use bytes::Bytes;
use tracing::{error, info, warn};

use crate::{
    actors::{
        Drain,
        admission::Admission,
        apis::{Apis, ApisError},
        copies::Copies,
        fallback::DiskFallback,
        feeder::{Feeder, FeederParams},
        forwarder::{Forwarder, ForwarderParams, LaneWindow, PosterParams},
        lane::{Lane, LaneParams, bundle::SettledRecords},
        live_lanes::LiveLanes,
        retrier::{Retrier, RetrierParams},
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{ChildId, DrainAll, Factory, Supervisor, Thread, factory},
    },
    api::gate::Gate,
    changes::{self, Change, ChangeLog},
    config::{Config, GrpcConfig},
    control::{ConfigSource, Control, ControlParams, Orders},
    history::History,
    http::{
        self, ServerLimits, admin, client_rate::ClientRate, cors::CorsOrigins,
        early_ends::EarlyEnds, events::EventHub, ingest, signatures::Signatures,
        status::AdminState, tap::TapStreams, tokens::Tokens,
    },
    idempotency::IdempotencyStore,
    lane_id::LaneId,
    ledger::{self, Ledger, TakenFile},
    record::{Record, Tag},
    routing::{explain::Explanations, rules::RouteError, scores::Scores, settings::CurrentRouting},
    secrets::{FileHealth, ServingTls, TlsFiles},
    spool::{BusySince, OpenError, Queue, Spool, SpoolStats},
    tap::Tap,
    trace::Exporter,
    transport::{
        Transport,
        grpc::{self, Grpc},
        nats::{self, Nats},
        pubsub::{self, Pubsub},
        rabbitmq::RabbitMq,
    },
};

/// The longest wait for requests in flight when the node drains.
const INGEST_DRAIN: Duration = Duration::from_secs(4);
const ADMIN_DRAIN: Duration = Duration::from_secs(1);
/// The longest wait for clients that read events. The spool is closed behind it.
const EVENTS_DRAIN: Duration = Duration::from_millis(300);

/// Without a limit, the system would hold megabytes for a reader of events that takes none.
const ADMIN_SEND_BUFFER: u32 = 32 << 10;

/// A running node.
pub struct Node {
    /// The address that takes records.
    pub ingest: SocketAddr,
    pub admin: SocketAddr,
    pub ledger: Arc<Ledger>,
    pub supervisor: Addr<Supervisor>,
    pub control: Control,
    pub spool: Spool,
    pub apis: Apis,
    feeder: Slot<Feeder>,
    taken_file: TakenFile,
    retrier: Slot<Retrier>,
    exporter: Exporter,
    draining: Arc<AtomicBool>,
    events: Arc<EventHub>,
    ingest_server: ServerHandle,
    admin_server: ServerHandle,
}

/// The reason why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{key}: cannot listen on {address}: {source}")]
    Listen {
        key: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("spool.dir: {0}")]
    Spool(#[from] OpenError),
    #[error(transparent)]
    Apis(#[from] ApisError),
    #[error("cannot serve: {0}")]
    Serve(#[from] io::Error),
    #[error("{0}")]
    Routes(String),
    /// A key, and why its file cannot be used.
    #[error("{0}: {1}")]
    File(&'static str, String),
}

impl StartError {
    fn routes(mistakes: Vec<RouteError>) -> Self {
        let mistakes = mistakes.iter().map(|mistake| {
            let RouteError { key, what } = mistake;
            format!("{key}: {what}")
        });
        Self::Routes(mistakes.collect::<Vec<_>>().join("; "))
    }
}

impl Node {
    /// Starts all actors and servers of a node on the current actix system. Its lanes connect in
    /// their own time. A reload reads `source`.
    ///
    /// # Errors
    /// If an address is taken, or a file that `config` names cannot be used.
    pub fn start(config: &Config, source: ConfigSource) -> Result<Self, StartError> {
        let listen = |key, address, send_buffer| {
            let fails = |source| StartError::Listen {
                key,
                address,
                source,
            };
            http::listen(address, send_buffer).map_err(fails)
        };
        let ingest_socket = listen("ingest.listen", config.ingest.listen, None)?;
        let admin_buffer = Some(ADMIN_SEND_BUFFER);
        let admin_socket = listen("admin.listen", config.admin.listen, admin_buffer)?;
        let mut graph = Graph::new(config)?;
        let ingest_state = graph.ingest()?;
        graph.feeder(&ingest_state.admission);
        graph.retrier();
        graph.lanes()?;
        graph.serve(ingest_state, ingest_socket, admin_socket, source)
    }

    /// Ends the node in the order in which data flows, so that nothing in flight is cut off: not
    /// ready, no new connection, requests answered, lanes drained, brokers closed, spool closed.
    /// The records that are left are in the brokers and in the spool.
    pub async fn drain(self) {
        info!("draining");
        self.draining.store(true, Relaxed);
        self.events.changes().add(Change::Node { draining: true });
        self.apis.stop();
        self.ingest_server.stop(true).await;
        if let Some(feeder) = self.feeder.get()
            && feeder.send(Drain).await.is_err()
        {
            warn!("the feeder ended before the drain");
        }
        if let Some(retrier) = self.retrier.get()
            && retrier.send(Drain).await.is_err()
        {
            warn!("the retrier ended before the drain");
        }
        if self.supervisor.send(DrainAll).await.is_err() {
            warn!("the supervisor ended before the drain");
        }
        self.taken_file.close();
        self.events.end(EVENTS_DRAIN).await;
        self.admin_server.stop(false).await;
        self.apis.spools().close().await;
        self.exporter.close().await;
        let balance = self.ledger.balance(&self.apis.spools().stats());
        info!(
            accepted = balance.accepted,
            recovered = balance.recovered,
            delivered = balance.delivered,
            handed_over = balance.handed_over,
            dead = balance.dead,
            spooled = balance.spooled,
            parked = balance.parked,
            in_flight = balance.in_flight,
            missing = balance.missing,
            "drained"
        );
    }
}

/// The actors of a node before they start, and the parts that they share.
struct Graph<'a> {
    config: &'a Config,
    change_log: ChangeLog,
    ledger: Arc<Ledger>,
    spool: Spool,
    apis: Apis,
    tap: Tap,
    exporter: Exporter,
    /// The lanes in configuration order, with their tags.
    lanes: Arc<[(LaneId, String)]>,
    live_lanes: LiveLanes,
    routing: CurrentRouting,
    explanations: Explanations,
    orders: Orders,
    router: Slot<Router>,
    feeder: Slot<Feeder>,
    taken_file: TakenFile,
    retrier: Slot<Retrier>,
    /// The files that are read again while the node runs.
    files: Vec<Arc<FileHealth>>,
    /// Half of the cores carry lanes, the other half HTTP: a record that stays on one thread wakes
    /// no other. The router shares the first lane's thread.
    threads: Vec<Thread>,
    children: Vec<(ChildId, Thread, Factory)>,
}

impl<'a> Graph<'a> {
    /// Opens the spool, and counts what an earlier run has left there.
    fn new(config: &'a Config) -> Result<Self, StartError> {
        let run = Record::new_id();
        let change_log = ChangeLog::new(Arc::clone(&run));
        let ledger = Ledger::new(run).with_change_log(change_log.clone());
        let ledger = Arc::new(ledger);
        let exporter = Exporter::start(config, &ledger.run);
        let spool = Spool::open(&config.spool.dir, config.spool.max)?;
        let apis = Apis::open(config, &spool, &ledger.run, &change_log)?;
        let on_all = apis.spools().stats();
        let left = on_all.waiting() + on_all.parked() + on_all.records(Queue::Dead);
        let found = spool.stats();
        ledger.recovered_from_disk(left);
        let lanes = config.lanes.in_order();
        let is_gone = |lane: &LaneId| lanes.iter().all(|(known, _)| known != lane);
        for lane in LaneId::ALL.into_iter().filter(is_gone) {
            // Any lane may take them.
            spool.read_kept(lane, None);
            let records = left_to(lane, &found);
            if records > 0 {
                error!(%lane, records, "the spool has records for a lane that is not configured any more");
            }
        }
        for queue in Queue::routed().filter(|queue| queue.lanes().all(|lane| is_gone(&lane))) {
            let lanes: Vec<_> = queue.lanes().map(LaneId::name).collect();
            let records = found.records(queue);
            if records > 0 {
                let lanes = lanes.join(", ");
                error!(
                    lanes,
                    records, "the spool has records for lanes that are not configured any more"
                );
            }
        }
        let busy = apis.spools().busy_since();
        actix_rt::spawn(ledger::audit(
            Arc::clone(&ledger),
            apis.spools().watch_stats(),
            move || busy.iter().any(BusySince::is_behind),
        ));
        for spool in apis.spools().iter() {
            actix_rt::spawn(spool.tell_of_stalls());
        }
        actix_rt::spawn(changes::log_spool(
            change_log.clone(),
            spool.watch_refuses(),
        ));
        let taken_file = TakenFile::open(&config.spool.dir, &ledger);
        actix_rt::spawn(taken_file.clone().keep());
        let routes = config.routes().map_err(StartError::routes)?;
        let scores = Scores::new(routes.measure(), config.router.publish_timeout);
        let orders = Orders::open(&config.spool.dir, config.admin.keep_orders);
        for (lane, _) in &lanes {
            let ordered = orders.of(*lane).weight.map(|order| order.what);
            let weight = ordered.or_else(|| config.lanes.weight(*lane));
            scores.set_weight(*lane, weight.unwrap_or(1));
        }
        let threads = half_the_cores().min(lanes.len().max(1));
        let signing_keys = apis.all().iter();
        let signing_keys = signing_keys.filter_map(|api| api.settings.signing_keys());
        let signing_keys = signing_keys.map(|keys| {
            actix_rt::spawn(Arc::clone(keys).keep_reading());
            Arc::clone(keys.health())
        });
        let files: Vec<_> = signing_keys.collect();
        Ok(Self {
            config,
            ledger,
            spool,
            apis,
            tap: Tap::default(),
            exporter,
            live_lanes: LiveLanes::new(Arc::new(scores)).with_change_log(change_log.clone()),
            change_log,
            routing: CurrentRouting::new(routes),
            explanations: Explanations::default(),
            orders,
            lanes: lanes.into(),
            router: Slot::default(),
            feeder: Slot::default(),
            taken_file,
            retrier: Slot::default(),
            files,
            threads: (0..threads).map(|_| Thread::spawn()).collect(),
            children: Vec::new(),
        })
    }

    fn lane_ids(&self) -> Arc<[LaneId]> {
        self.lanes.iter().map(|(lane, _)| *lane).collect()
    }

    /// HTTP → admission → router → lane, or spool.
    fn ingest(&mut self) -> Result<ingest::IngestState, StartError> {
        let config = &self.config.ingest;
        let publish_timeout = self.config.router.publish_timeout;
        let fallback = DiskFallback {
            spool: self.spool.clone(),
            ledger: Arc::clone(&self.ledger),
        };
        let params = RouterParams {
            routing: self.routing.clone(),
            live_lanes: self.live_lanes.clone(),
            fallback,
            explanations: self.explanations.clone(),
            publish_timeout,
        };
        let start = factory(self.router.clone(), move |supervisor| {
            Router::new(params.clone(), supervisor)
        });
        self.children
            .push((ChildId::Router, self.threads[0].clone(), start));
        let tokens = self.tokens("ingest.tokens_file", config.tokens_file.as_deref())?;
        let file = config.signing_keys_file.as_deref();
        let signatures = self.signatures("ingest.signing_keys_file", file)?;
        Ok(ingest::IngestState {
            admission: Admission::new(
                self.router.clone(),
                publish_timeout,
                Arc::clone(&self.ledger),
            ),
            apis: self.apis.clone(),
            lanes: Arc::clone(&self.lanes),
            routing: self.routing.clone(),
            schema: Bytes::copy_from_slice(config.schema.to_json().as_bytes()),
            rules: config.record_rules(),
            tokens,
            needs_certificate: config.client_ca_file.is_some(),
            signatures,
            cors: (!config.cors_origins.is_empty())
                .then(|| CorsOrigins(config.cors_origins.clone())),
            rate: config.rate.and_then(ClientRate::new),
            max_headers: config.max_headers,
            body: ingest::BodyLimits {
                max: config.max_body,
                timeout: config.body_timeout,
                min_rate: config.min_body_rate,
            },
            run: Arc::clone(&self.ledger.run),
            keys: IdempotencyStore::open(&self.config.spool.dir, config.key_window)?,
            require_key: config.require_key,
            forecast: ingest::DiskForecast::default(),
            ledger: Arc::clone(&self.ledger),
            tracer: self.exporter.tracer(),
            scheme: if config.tls_cert_file.is_some() {
                "https"
            } else {
                "http"
            },
        })
    }

    /// The tokens of the file that `key` names, which is read again from now on.
    fn tokens(
        &mut self,
        key: &'static str,
        file: Option<&Path>,
    ) -> Result<Option<Tokens>, StartError> {
        let Some(file) = file else {
            return Ok(None);
        };
        let tokens = Tokens::open(key, file).map_err(|why| StartError::File(key, why))?;
        self.files.push(Arc::clone(tokens.health()));
        Ok(Some(tokens))
    }

    /// The keys of the file that `key` names, which is read again from now on.
    fn signatures(
        &mut self,
        key: &'static str,
        file: Option<&Path>,
    ) -> Result<Option<Signatures>, StartError> {
        let Some(file) = file else {
            return Ok(None);
        };
        let keys = Signatures::open(key, file).map_err(|why| StartError::File(key, why))?;
        self.files.push(Arc::clone(keys.health()));
        Ok(Some(keys))
    }

    /// The TLS of a server by the files of its section, which are read again from now on.
    fn tls(
        &mut self,
        key: &'static str,
        files: Option<TlsFiles>,
    ) -> Result<Option<ServingTls>, StartError> {
        let Some(files) = files else {
            return Ok(None);
        };
        let tls = ServingTls::open(key, files).map_err(|why| StartError::File(key, why))?;
        actix_rt::spawn(tls.clone().keep_reading());
        self.files.push(Arc::clone(tls.health()));
        Ok(Some(tls))
    }

    /// Spool → feeder → router.
    fn feeder(&mut self, admission: &Admission) {
        let params = FeederParams {
            spools: self.apis.spools().clone(),
            admission: admission.clone(),
            ledger: Arc::clone(&self.ledger),
            lanes: self.lane_ids(),
            routing: self.routing.clone(),
            live_lanes: self.live_lanes.clone(),
            apis: self.apis.clone(),
        };
        let start = factory(self.feeder.clone(), move |supervisor| {
            Feeder::new(params.clone(), supervisor)
        });
        self.children
            .push((ChildId::Feeder, Thread::Current, start));
    }

    /// Spool → retrier → API, for each API.
    fn retrier(&mut self) {
        let params = RetrierParams {
            apis: self.apis.clone(),
            ledger: Arc::clone(&self.ledger),
            tap: self.tap.clone(),
            tracer: self.exporter.tracer(),
        };
        let start = factory(self.retrier.clone(), move |supervisor| {
            Retrier::new(params.clone(), supervisor)
        });
        self.children
            .push((ChildId::Retrier, Thread::Current, start));
    }

    /// Router → lane → transport ══▶ lane → forwarder → API, once per lane.
    fn lanes(&mut self) -> Result<(), StartError> {
        let config = &self.config.lanes;
        for index in 0..self.lanes.len() {
            match self.lanes[index].0 {
                LaneId::Grpc => {
                    let files = config.grpc.as_ref().and_then(GrpcConfig::tls);
                    let server_tls = self.tls("lanes.grpc.cert_file", files)?;
                    let settings = config.grpc.clone().map(|config| grpc::Settings {
                        config,
                        server_tls,
                        tap: self.tap.clone(),
                        rules: self.config.ingest.record_rules(),
                        run: Arc::clone(&self.ledger.run),
                        spool: self.spool.clone(),
                        breakers: self.apis.breakers(),
                        publish_timeout: self.config.router.publish_timeout,
                    });
                    self.add_lane::<Grpc>(index, settings);
                }
                LaneId::Nats => {
                    let settings = config.nats.clone().map(nats::Settings::new);
                    self.add_lane::<Nats>(index, settings);
                }
                LaneId::Rabbitmq => self.add_lane::<RabbitMq>(index, config.rabbitmq.clone()),
                LaneId::Pubsub => {
                    let settings = config.pubsub.clone().map(pubsub::Settings::new);
                    self.add_lane::<Pubsub>(index, settings);
                }
            }
        }
        Ok(())
    }

    /// The lanes whose records on disk the lane at `index` POSTs: its own, and the first lane those
    /// of lanes that are not configured any more.
    fn held_lanes(&self, index: usize) -> Vec<LaneId> {
        let is_gone = |lane: &LaneId| self.lanes.iter().all(|(known, _)| known != lane);
        let gone = LaneId::ALL.into_iter().filter(is_gone);
        let gone = gone.filter(|_| index == 0);
        [self.lanes[index].0].into_iter().chain(gone).collect()
    }

    /// Adds the lane at `index` and its forwarder, on one thread: a delivery does not cross threads
    /// between them.
    fn add_lane<T: Transport>(&mut self, index: usize, settings: Option<T::Settings>) {
        let Some(settings) = settings else {
            return;
        };
        let (lane, tag) = &self.lanes[index];
        let lane = *lane;
        let thread = self.threads[index % self.threads.len()].clone();
        let copies = Copies::new(lane, self.spool.clone());
        let tracer = self.exporter.tracer().lane(lane);
        let window = LaneWindow::new(&self.apis.limits());
        let posters = self.apis.all().iter().zip(window.slots());
        let posters = posters.map(|(api, slots)| PosterParams {
            lane,
            tag: Tag::new(tag),
            gate: Arc::new(Gate::new(Arc::clone(&api.limit), Arc::clone(&api.rate))),
            api: api.clone(),
            ledger: Arc::clone(&self.ledger),
            scores: Arc::clone(&self.live_lanes.scores),
            copies: copies.clone(),
            tap: self.tap.clone(),
            slots: slots.clone(),
            tracer: tracer.clone(),
        });
        let params = ForwarderParams {
            posters: posters.collect(),
            unclaimed: self.apis.unclaimed().clone(),
            held_lanes: self.held_lanes(index),
            stopping: self.apis.stopping().clone(),
        };
        let forwarder = Slot::default();
        let start = factory(forwarder.clone(), move |supervisor| {
            Forwarder::new(params.clone(), supervisor)
        });
        self.children
            .push((ChildId::Forwarder(lane), thread.clone(), start));
        let params = LaneParams {
            lane,
            router: self.router.clone(),
            forwarder,
            window,
            ledger: Arc::clone(&self.ledger),
            live_lanes: self.live_lanes.clone(),
            publish_timeout: self.config.router.publish_timeout,
            bundle: self.config.lanes.bundle(lane),
            settled: SettledRecords::default(),
            copies,
            ack: self.config.ingest.ack,
            tracer,
        };
        let start = factory(Slot::default(), move |supervisor| {
            Lane::<T>::new(settings.clone(), params.clone(), supervisor)
        });
        self.children.push((ChildId::Lane(lane), thread, start));
    }

    /// Starts the actors, then HTTP.
    fn serve(
        mut self,
        ingest_state: ingest::IngestState,
        ingest_socket: TcpListener,
        admin_socket: TcpListener,
        source: ConfigSource,
    ) -> Result<Node, StartError> {
        let config = self.config;
        let tokens = self.tokens("admin.token_file", config.admin.token_file.as_deref())?;
        let ingest_tls = self.tls("ingest.tls_cert_file", config.ingest.tls())?;
        let admin_tls = self.tls("admin.tls_cert_file", config.admin.tls())?;
        let commands = self.orders.commands();
        self.apis.claim();
        let supervisor = Supervisor::start_with(&self.live_lanes, self.children, commands);
        let scores = Arc::clone(&self.live_lanes.scores);
        let control = Control::new(ControlParams {
            supervisor: supervisor.clone(),
            scores: Arc::clone(&scores),
            routing: self.routing,
            orders: self.orders,
            config: config.clone(),
            source,
            change_log: self.change_log.clone(),
        });
        let (ends, admin_ends) = (EarlyEnds::default(), EarlyEnds::default());
        actix_rt::spawn(ends.clone().keep_telling("ingest"));
        actix_rt::spawn(admin_ends.clone().keep_telling("admin"));
        let draining = Arc::new(AtomicBool::new(false));
        let history = History::new(self.lanes.iter().map(|(lane, _)| *lane));
        let counting = history.clone();
        actix_rt::spawn(counting.keep(Arc::clone(&self.ledger), self.apis.spools().clone()));
        let events = Arc::new(EventHub::new(self.change_log.clone()));
        let admin_state = AdminState {
            supervisor: supervisor.clone(),
            ledger: Arc::clone(&self.ledger),
            scores,
            control: control.clone(),
            explanations: self.explanations,
            spool: self.spool.clone(),
            spool_max: config.spool.max,
            publish_timeout: config.router.publish_timeout,
            apis: self.apis.clone(),
            node: gethostname::gethostname().to_string_lossy().into(),
            lanes: Arc::clone(&self.lanes),
            draining: Arc::clone(&draining),
            ack: config.ingest.ack,
            tokens,
            needs_certificate: config.admin.client_ca_file.is_some(),
            files: self.files.into(),
            early_ends: [("ingest", ends.clone()), ("admin", admin_ends.clone())],
            order_limits: ingest::BodyLimits {
                max: admin::ORDER_MAX,
                ..ingest_state.body
            },
            hosts: config.admin.hosts.as_slice().into(),
            read_only: config.admin.read_only,
            events: Arc::clone(&events),
            tap: TapStreams::new(self.tap.clone()),
            history,
            exporter: self.exporter.clone(),
        };
        let ingest = ingest_socket.local_addr()?;
        let admin = admin_socket.local_addr()?;
        let ingest_limits = ServerLimits {
            workers: half_the_cores(),
            max_connections: config.ingest.max_connections,
            header_timeout: config.ingest.header_timeout,
            keep_alive: config.ingest.keep_alive,
            drain: INGEST_DRAIN,
        };
        let ingest_server = http::serve(
            ingest_socket,
            ingest_limits,
            ingest_tls,
            &ends,
            move |app| ingest::routes(app, ingest_state.clone()),
        )?;
        let admin_limits = ServerLimits::of_one_thread(ADMIN_DRAIN);
        let admin_server = http::serve(
            admin_socket,
            admin_limits,
            admin_tls,
            &admin_ends,
            move |app| admin::routes(app, admin_state.clone()),
        )?;
        let lanes: Vec<_> = self.lanes.iter().map(|(lane, _)| lane.name()).collect();
        let lanes = lanes.join(", ");
        let policy = config.router.policy.name();
        let spool = config.spool.dir.display();
        info!(%ingest, %admin, lanes, api = %config.api.url, %spool, policy, "node is up");
        Ok(Node {
            ingest,
            admin,
            ledger: self.ledger,
            supervisor,
            control,
            spool: self.spool,
            apis: self.apis,
            feeder: self.feeder,
            taken_file: self.taken_file,
            retrier: self.retrier,
            exporter: self.exporter,
            draining,
            events,
            ingest_server,
            admin_server,
        })
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
