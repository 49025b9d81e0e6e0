//! The actors of a node and the parts that they share, made in the order in which data flows.

mod serve;

use std::{path::Path, sync::Arc, thread::available_parallelism};

use bytes::Bytes;
use tracing::error;

use super::StartError;
use crate::{
    actors::{
        admission::Admission,
        apis::Apis,
        copies::Copies,
        fallback::DiskFallback,
        feeder::{Feeder, FeederParams},
        forwarder::{Forwarder, ForwarderParams, LaneWindow, PosterParams},
        lane::{Lane, LaneParams, bundle::SettledRecords},
        live_lanes::LiveLanes,
        retrier::{Retrier, RetrierParams},
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{ChildId, Factory, Thread, factory},
    },
    api::gate::Gate,
    changes::{self, ChangeLog},
    config::{Config, GrpcConfig},
    control::Orders,
    http::{
        client_rate::ClientRate, cors::CorsOrigins, ingest, signatures::Signatures, tokens::Tokens,
    },
    idempotency::IdempotencyStore,
    lane_id::LaneId,
    ledger::{self, Ledger, TakenFile},
    record::{Record, Tag},
    routing::{explain::Explanations, scores::Scores, settings::CurrentRouting},
    secrets::{FileHealth, ServingTls, TlsFiles},
    spool::{BusySince, Queue, Spool, SpoolStats},
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

/// The actors of a node before they start, and the parts that they share.
pub struct Graph<'a> {
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
    pub fn new(config: &'a Config) -> Result<Self, StartError> {
        let run = Record::new_id();
        let change_log = ChangeLog::new(Arc::clone(&run));
        let ledger = Ledger::new(run).with_change_log(change_log.clone());
        let ledger = Arc::new(ledger);
        let exporter = Exporter::start(config, &ledger.run);
        let spool = Spool::open(&config.spool.dir, config.spool.max)?;
        let apis = Apis::open(config, &spool, &ledger.run, &change_log)?;
        let on_all = apis.spools().stats();
        let left = on_all.waiting() + on_all.parked() + on_all.records(Queue::Dead);
        ledger.recovered_from_disk(left);
        let lanes = config.lanes.in_order();
        release_gone_lanes(&spool, &lanes);
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
    pub fn ingest(&mut self) -> Result<ingest::IngestState, StartError> {
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
                room: ingest::BodyRoom::default(),
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
    pub fn feeder(&mut self, admission: &Admission) {
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
    pub fn retrier(&mut self) {
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
    pub fn lanes(&mut self) -> Result<(), StartError> {
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
}

fn half_the_cores() -> usize {
    available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))
}

/// Gives the copies of lanes that are not configured any more to any lane, and tells of the records
/// that only such lanes take.
fn release_gone_lanes(spool: &Spool, lanes: &[(LaneId, String)]) {
    let found = spool.stats();
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
