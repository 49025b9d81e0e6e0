//! gRPC: the node serves the service, and carries its records to peer nodes, or to itself where it has none.
//!
//! There is no broker between the two ends. A record is in the sender's hands until the receiver's API has it, or the receiver's
//! disk; only then does the receipt come and [`Transport::publish`] resolve. So a receiver that dies loses nothing.

mod buffer;
mod client;
mod inbound;
mod peer_stream;
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
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};

use self::{buffer::BufferOut, client::Peers, service::Service, tls::Tls};
use super::{BrokerInfo, CLOSE_TIMEOUT, Incoming, Message, Transport, TransportError};
use crate::{breaker::Breaker, config, record::Schema, spool::Spool, tap::Tap};

/// Pings on a connection, so that a peer that falls silent is noticed within their sum.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 flow control: what may be under way unread, in bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// The largest message, in bytes.
const MAX_MESSAGE: usize = 4 << 20;
/// How long `connect` waits for a predecessor on the same address to be gone.
const BIND_PATIENCE: Duration = Duration::from_secs(1);
const BIND_RETRY: Duration = Duration::from_millis(20);
/// How long `connect` waits for the first stream to a peer. A peer that is away does not keep this node from serving: two nodes
/// that are each other's peers must both be able to start.
const FIRST_STREAM: Duration = Duration::from_secs(1);
/// The same for the stream to itself, without which the lane is of no use.
const OWN_STREAM: Duration = Duration::from_secs(5);
/// How long `close` waits for open calls to end by themselves.
const GRACE: Duration = CLOSE_TIMEOUT.saturating_sub(Duration::from_millis(500));

/// What a connection needs.
#[derive(Clone)]
pub struct Settings {
    pub config: config::GrpcConfig,
    /// What the call `Watch` shows.
    pub tap: Tap,
    /// What a record that comes from a client, not from a node, must look like.
    pub schema: Schema,
    /// This run of the node: what it took in itself it has read.
    pub run: Arc<str>,
    /// Where the node keeps what the API does not take soon.
    pub spool: Spool,
    /// Of the API that the node's forwarders POST to: while it is open, what comes in goes to disk at once.
    pub breaker: Arc<Breaker>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// Nothing new is taken in; what is unsettled goes back to its senders; streams end.
    Closing,
    /// Connections are broken off.
    Cut,
}

/// Resolves at `phase` or later; that no one is left to announce phases counts as the last.
async fn reached(mut phases: watch::Receiver<Phase>, phase: Phase) {
    drop(phases.wait_for(|now| *now >= phase).await);
}

/// One life of the node's gRPC server, and of its streams to the peers. Dropping it ends both.
pub struct Grpc {
    address: SocketAddr,
    buffer: BufferOut,
    peers: Peers,
    phase: watch::Sender<Phase>,
    /// Closed when the server has ended.
    server: watch::Sender<()>,
    /// The task that reloads records from disk.
    reloading: AbortHandle,
}

impl Drop for Grpc {
    fn drop(&mut self) {
        self.reloading.abort();
    }
}

impl Grpc {
    /// Where the node serves, the real port included.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Transport for Grpc {
    type Settings = Settings;
    /// A receipt waits for the receiver's API.
    const CONFIRMS_ALONE: bool = false;

    async fn connect(settings: &Settings) -> Result<Self, TransportError> {
        let Settings {
            config,
            tap,
            schema,
            run,
            spool,
            breaker,
        } = settings;
        let tls = Tls::read(config).await?;
        let listener = bind(config.listen)
            .await
            .map_err(|e| connect_error(config.listen, &e))?;
        let address = listener
            .local_addr()
            .map_err(|e| connect_error(config.listen, &e))?;
        let endpoints = if config.peers.is_empty() {
            vec![tls.own(reachable(address))?]
        } else {
            config
                .peers
                .iter()
                .map(|uri| tls.peer(uri))
                .collect::<Result<_, _>>()?
        };

        let (phase, phases) = watch::channel(Phase::Serving);
        let (buffer_in, buffer) = buffer::new(spool.clone(), Arc::clone(breaker));
        let service = Service {
            buffer: buffer_in.clone(),
            schema: *schema,
            run: Arc::clone(run),
            tap: tap.clone(),
            phase: phases.clone(),
        };
        let serving = server::serve(listener, tls.server(), service, phases.clone())?;
        let (server, alive) = watch::channel(());
        tokio::spawn(async move {
            serving.await;
            drop(alive);
        });

        let peers = Peers::start(endpoints, &phases);
        if config.peers.is_empty() {
            peers
                .first(OWN_STREAM)
                .await
                .map_err(TransportError::Connect)?;
        } else if let Err(why) = peers.first(FIRST_STREAM).await {
            tracing::warn!(%why, "serving without a peer to carry records to");
        }
        let reloading = tokio::spawn(buffer_in.reload()).abort_handle();
        Ok(Self {
            address,
            buffer,
            peers,
            phase,
            server,
            reloading,
        })
    }

    async fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        self.peers.publish(messages, settled).await;
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        let first = tokio::select! {
            biased;
            lost = self.lost() => return Err(lost),
            first = self.buffer.next() => first,
        };
        // Once the node is closing, the senders have their records back.
        let serving = *self.phase.borrow() == Phase::Serving;
        if !serving {
            return Err(TransportError::Lost("closed".into()));
        }
        let others = std::iter::from_fn(|| self.buffer.try_next());
        into.extend(std::iter::once(first).chain(others).take(max));
        Ok(())
    }

    async fn lost(&self) -> TransportError {
        self.server.closed().await;
        TransportError::Lost("the server has ended".into())
    }

    async fn close(&self) {
        self.reloading.abort();
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
            largest_message: MAX_MESSAGE,
            ..BrokerInfo::default()
        }
    }
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

/// Where a listener on `address` can be called from its own machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn connect_error(address: SocketAddr, error: &io::Error) -> TransportError {
    TransportError::Connect(format!("{address}: {error}"))
}
