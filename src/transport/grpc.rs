//! gRPC: the node serves the service, and sends its records to peer nodes, or to itself if it has
//! none.
//!
//! There is no broker between the two ends. The sender keeps a record until the receiver's API or
//! the receiver's disk has it. Only then does the receipt come and [`Transport::publish`] resolve.
//! So a receiver that dies loses nothing.

mod buffer;
mod inbound;
mod peer;
mod peers;
mod server;
mod service;
mod tls;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use self::{
    buffer::{BufferIn, BufferOut},
    inbound::{Intake, disk_after},
    peer::{describe, with_causes},
    peers::Peers,
    service::Service,
    tls::Tls,
};
use super::{
    Backlog, BrokerInfo, CLOSE_TIMEOUT, Durability, Incoming, Inspection, Message, Remedy,
    Transport, TransportError,
};
use crate::{
    breaker::ApiBreakers, config, record::RecordRules, secrets::ServingTls, spool::Spool, tap::Tap,
};

/// Pings on a connection, so that a peer that falls silent is noticed within their sum.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 flow control: the most bytes in flight.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// The largest message, in bytes.
pub(super) const MAX_MESSAGE: usize = 4 << 20;
/// How long `connect` waits for a predecessor on the same address to be gone.
const BIND_PATIENCE: Duration = Duration::from_secs(1);
const BIND_RETRY: Duration = Duration::from_millis(20);
/// How long `connect` waits for the first stream to a peer. A peer that is away does not keep this
/// node from serving: two nodes that are each other's peers must both be able to start.
const FIRST_STREAM: Duration = Duration::from_secs(1);
/// The same for the stream to itself, without which the lane is of no use.
const OWN_STREAM: Duration = Duration::from_secs(5);
/// How long `close` waits for open calls to end by themselves.
const GRACE: Duration = CLOSE_TIMEOUT.saturating_sub(Duration::from_millis(500));

/// The settings of a connection.
#[derive(Clone)]
pub struct Settings {
    pub config: config::GrpcConfig,
    /// By `cert_file` and `key_file`, if the configuration has them.
    pub server_tls: Option<ServingTls>,
    /// The source of the call `Watch`.
    pub tap: Tap,
    /// Checks a record that comes from a client, not from a node.
    pub rules: RecordRules,
    /// This run of the node. It has checked the records that it took in itself.
    pub run: Arc<str>,
    /// Keeps the records that the API does not take soon.
    pub spool: Spool,
    /// The breakers of the APIs. While that of a record is open, it goes to disk at once.
    pub breakers: ApiBreakers,
    /// How long this node waits for a confirm. Its records are on disk well before.
    pub publish_timeout: Duration,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// No record is taken in, unsettled records go back to their senders, and streams end.
    Closing,
    /// Connections are cut.
    Cut,
}

/// Resolves at `phase` or later, and when the sender of phases is dropped.
async fn reached(mut phases: watch::Receiver<Phase>, phase: Phase) {
    drop(phases.wait_for(|now| *now >= phase).await);
}

/// The node's gRPC server, and its streams to the peers. Dropping it ends both.
pub struct Grpc {
    address: SocketAddr,
    buffer_in: BufferIn,
    buffer: BufferOut,
    peers: Peers,
    has_peers: bool,
    phase: watch::Sender<Phase>,
    /// Closed when the server has ended.
    server: watch::Sender<()>,
}

impl Grpc {
    /// The address that the node serves, with its real port.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Transport for Grpc {
    type Settings = Settings;
    /// A receipt waits for the receiver's API.
    const CONFIRMS_ALONE: bool = false;
    const REMEDIES: &'static [Remedy] = &[(
        "h2 protocol error",
        "the peer speaks TLS there, or is no node: use https://, or correct its address",
    )];

    fn address(settings: &Settings) -> String {
        settings.config.listen.to_string()
    }

    async fn connect(settings: &Settings) -> Result<Self, TransportError> {
        let config = &settings.config;
        let tls = Tls::read(settings).await?;
        let listener = bind(config.listen).await;
        let bound = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (address, listener) = bound.map_err(|why| TransportError::Connect(why.to_string()))?;
        let endpoints: Result<Vec<_>, _> = match &config.peers[..] {
            [] => tls.own(reachable(address)).map(|own| vec![own]),
            peers => peers.iter().map(|uri| tls.peer(uri)).collect(),
        };
        let endpoints = endpoints?;

        let (phase, phases) = watch::channel(Phase::Serving);
        let (buffer_in, buffer) = buffer::new(settings.spool.clone(), settings.breakers.clone());
        let intake = Intake {
            buffer: buffer_in.clone(),
            rules: settings.rules.clone(),
            run: Arc::clone(&settings.run),
            phase: phases.clone(),
            disk_after: disk_after(settings.publish_timeout),
        };
        let tap = settings.tap.clone();
        let service = Service { intake, tap };
        let server_tls = settings.server_tls.clone();
        let serving = server::serve(listener, server_tls, service, phases.clone())
            .map_err(|why| TransportError::Connect(why.to_string()))?;
        let (server, alive) = watch::channel(());
        tokio::spawn(async move {
            serving.await;
            drop(alive);
        });

        let peers = Peers::start(endpoints, &phases);
        if config.peers.is_empty() {
            peers.first(OWN_STREAM).await?;
        } else {
            // Each peer that is away is logged by its own task.
            peers.first(FIRST_STREAM).await.ok();
        }
        let reloading = buffer_in.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = reloading.reload() => {}
                () = reached(phases, Phase::Closing) => {}
            }
        });
        Ok(Self {
            address,
            buffer_in,
            buffer,
            peers,
            has_peers: !config.peers.is_empty(),
            phase,
            server,
        })
    }

    /// Serves and calls itself for a moment, unless a node serves there already. Asks each peer for
    /// its health.
    async fn inspect(settings: &Settings) -> Result<Inspection, TransportError> {
        let config = &settings.config;
        let tls = Tls::read(settings).await?;
        let in_use = match TcpListener::bind(config.listen).await {
            Err(why) if why.kind() == io::ErrorKind::AddrInUse => Some(why),
            _ => None,
        };
        let mut found = Vec::new();
        if let Some(why) = in_use {
            let own = tls.own(reachable(config.listen))?;
            if ask_health(&own).await.is_err() {
                return Err(TransportError::Connect(why.to_string()));
            }
            found.push("a node serves there".to_owned());
        } else {
            let own = Settings {
                config: config::GrpcConfig {
                    peers: Vec::new(),
                    ..config.clone()
                },
                ..settings.clone()
            };
            Self::connect(&own).await?.close().await;
            found.push("served, and called itself".to_owned());
        }
        for uri in &config.peers {
            let healthy = ask_health(&tls.peer(uri)?).await;
            healthy.map_err(|why| TransportError::Connect(format!("peer {uri}: {why}")))?;
            found.push(format!("peer {uri} is healthy"));
        }
        let info = BrokerInfo {
            version: Some(env!("CARGO_PKG_VERSION").into()),
            // As `info` has it.
            largest_message: Some(MAX_MESSAGE),
            outlives_power_cut: Durability::Yes,
            ..BrokerInfo::default()
        };
        Ok(Inspection { info, found })
    }

    async fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        self.peers.publish(messages, settled).await;
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let before = into.len();
        tokio::select! {
            biased;
            lost = self.lost() => return Err(lost),
            () = self.buffer.receive(into, max) => {}
        }
        if *self.phase.borrow() == Phase::Serving {
            return Ok(());
        }
        // The node is closing: the senders have their records back.
        into.truncate(before);
        Err(TransportError::Lost("closed".into()))
    }

    async fn lost(&self) -> TransportError {
        self.server.closed().await;
        TransportError::Lost("the server has ended".into())
    }

    async fn close(&self) {
        self.phase.send_replace(Phase::Closing);
        let ended = async { timeout(GRACE, self.server.closed()).await };
        let (ended, ()) = tokio::join!(ended, self.peers.close(GRACE));
        self.phase.send_replace(Phase::Cut);
        if ended.is_err()
            && timeout(CLOSE_TIMEOUT.saturating_sub(GRACE), self.server.closed())
                .await
                .is_err()
        {
            tracing::warn!(address = %self.address, "the gRPC server has not ended in time");
        }
    }

    fn info(&self) -> BrokerInfo {
        BrokerInfo {
            version: Some(env!("CARGO_PKG_VERSION").into()),
            largest_message: Some(MAX_MESSAGE),
            // The peer confirms once the API has the record, or its disk.
            outlives_power_cut: Durability::Yes,
            ..BrokerInfo::default()
        }
    }

    /// What a peer has confirmed is with that peer.
    async fn backlog(&self) -> Result<Backlog, String> {
        Ok(Backlog {
            messages: self.buffer_in.records(),
            is_shared: self.has_peers,
            is_exact: true,
        })
    }
}

/// Asks the node at `endpoint` whether it serves.
async fn ask_health(endpoint: &Endpoint) -> Result<(), String> {
    let ask = async {
        let channel = endpoint.connect().await.map_err(|why| with_causes(&why))?;
        let mut health = HealthClient::new(channel);
        let answer = health.check(HealthCheckRequest::default()).await;
        let answer = answer.map_err(|status| describe(&status))?;
        match answer.into_inner().status() {
            ServingStatus::Serving => Ok(()),
            status => Err(format!("its health is {}", status.as_str_name())),
        }
    };
    let answered = timeout(OWN_STREAM, ask).await;
    answered.unwrap_or_else(|_| Err(format!("no answer within {OWN_STREAM:?}")))
}

/// A dropped predecessor's listener is closed by its task, which may not have run yet.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let deadline = Instant::now() + BIND_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                sleep(BIND_RETRY).await;
            }
            bound => return bound,
        }
    }
}

/// The address by which this machine reaches a listener on `address`.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
