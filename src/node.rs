//! A node: wires its actors in the order in which data flows, and drains them in that order.

mod graph;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use actix::{Actor, Addr, Handler, dev::ToEnvelope};
use actix_web::dev::ServerHandle;
use tokio::{join, time::timeout};
use tracing::{info, warn};

use self::graph::Graph;
use crate::{
    actors::{
        Drain,
        apis::{Apis, ApisError},
        feeder::Feeder,
        retrier::Retrier,
        slot::Slot,
        supervisor::{DrainAll, Supervisor},
    },
    changes::Change,
    config::Config,
    control::{ConfigSource, Control},
    http::{self, events::EventHub},
    ledger::{Ledger, TakenFile},
    routing::rules::RouteError,
    spool::{OpenError, Spool},
    trace::Exporter,
};

/// The longest wait for requests in flight when the node drains, and for records on their way from the
/// disk. With those for the lanes and for the exporter, it leaves a stop some time.
const INGEST_DRAIN: Duration = Duration::from_secs(3);
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
        // None of these waits for another, and a stop has 10 s in all.
        join!(
            self.ingest_server.stop(true),
            drain_disk(&self.feeder, "feeder"),
            drain_disk(&self.retrier, "retrier"),
        );
        if self.supervisor.send(DrainAll).await.is_err() {
            warn!("the supervisor ended before the drain");
        }
        self.taken_file.close();
        let closing = async {
            self.events.end(EVENTS_DRAIN).await;
            self.admin_server.stop(false).await;
            self.apis.spools().close().await;
        };
        join!(closing, self.exporter.close());
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

/// Lets an actor that reads the disk end what is on its way. What is left stays on disk.
async fn drain_disk<A: Handler<Drain, Context: ToEnvelope<A, Drain>> + Actor>(
    actor: &Slot<A>,
    name: &str,
) {
    let Some(actor) = actor.get() else { return };
    match timeout(INGEST_DRAIN, actor.send(Drain)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => warn!("the {name} ended before the drain"),
        Err(_) => warn!("the {name} had records on their way: they are left on disk"),
    }
}
