//! The last step of a start: the actors run, then the node serves HTTP.

use std::{
    io,
    net::TcpListener,
    sync::{Arc, atomic::AtomicBool},
};

use actix_web::dev::ServerHandle;
use tracing::info;

use super::{Graph, half_the_cores};
use crate::{
    actors::supervisor::Supervisor,
    config::Config,
    control::{ConfigSource, Control, ControlParams},
    history::History,
    http::{
        self, ServerLimits, admin, early_ends::EarlyEnds, events::EventHub, ingest,
        status::AdminState, tap::TapStreams,
    },
    node::{ADMIN_DRAIN, INGEST_DRAIN, Node, StartError},
    secrets::ServingTls,
};

impl Graph<'_> {
    /// Starts the actors, then HTTP.
    pub fn serve(
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
                // Clients take no room from operators.
                room: ingest::BodyRoom::default(),
                ..ingest_state.body.clone()
            },
            is_own_peer: config
                .lanes
                .grpc
                .as_ref()
                .is_some_and(|grpc| grpc.peers.is_empty()),
            hosts: config.admin.hosts.as_slice().into(),
            read_only: config.admin.read_only,
            events: Arc::clone(&events),
            tap: TapStreams::new(self.tap.clone()),
            history,
            exporter: self.exporter.clone(),
        };
        let ingest = ingest_socket.local_addr()?;
        let admin = admin_socket.local_addr()?;
        let ingest_server = serve_ingest(config, ingest_socket, ingest_tls, &ends, ingest_state)?;
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

fn serve_ingest(
    config: &Config,
    socket: TcpListener,
    tls: Option<ServingTls>,
    ends: &EarlyEnds,
    state: ingest::IngestState,
) -> io::Result<ServerHandle> {
    let limits = ServerLimits {
        workers: half_the_cores(),
        max_connections: config.ingest.max_connections,
        header_timeout: config.ingest.header_timeout,
        keep_alive: config.ingest.keep_alive,
        drain: INGEST_DRAIN,
    };
    http::serve(socket, limits, tls, ends, move |app| {
        ingest::routes(app, state.clone());
    })
}
