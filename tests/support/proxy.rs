//! A faulty network: a TCP proxy whose directions pass, hold back, delay or throttle bytes, and
//! whose connections can be cut or reset.

use std::{
    collections::VecDeque,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

/// How one direction treats bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Passes,
    /// A black hole: nothing arrives, without an error. The bytes under flow arrive when it passes
    /// again, as after a retransmission.
    Swallows,
    /// Each piece holds up those behind it.
    Delays(Duration),
    /// Each byte arrives so much later, as over a long line.
    Lags(Duration),
    /// Bytes per second.
    Trickles(usize),
}

/// The state of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// From the client to the server.
    pub to_server: Flow,
    /// From the server to the client.
    pub to_client: Flow,
    /// Whether new connections are refused.
    pub refuses: bool,
}

impl Network {
    pub const WELL: Self = Self {
        to_server: Flow::Passes,
        to_client: Flow::Passes,
        refuses: false,
    };
    pub const BLACK_HOLE: Self = Self {
        to_server: Flow::Swallows,
        to_client: Flow::Swallows,
        refuses: false,
    };
}

/// How the proxy ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disconnect {
    /// FIN to both sides.
    Cut,
    /// RST to both sides.
    Reset,
}

/// A proxy on a free port. Dropping it ends it.
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    /// The number of disconnects so far, and the latest one.
    ends: watch::Sender<(u64, Disconnect)>,
    stop: Arc<Mutex<Option<tokio::sync::oneshot::Sender<()>>>>,
}

impl Proxy {
    /// Starts a proxy for `server`, which may listen later.
    pub fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let network = watch::Sender::new(Network::WELL);
        let ends = watch::Sender::new((0, Disconnect::Cut));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let served_network = network.clone();
        let served_ends = ends.clone();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, server, served_network, served_ends) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            address,
            network,
            ends,
            stop: Arc::new(Mutex::new(Some(stop))),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.ends
            .send_modify(|(count, end)| (*count, *end) = (*count + 1, Disconnect::Cut));
    }

    /// Resets all connections.
    pub fn reset(&self) {
        self.ends
            .send_modify(|(count, end)| (*count, *end) = (*count + 1, Disconnect::Reset));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.lock().expect("nobody panics with it").take();
    }
}

async fn serve(
    listener: TcpListener,
    server: SocketAddr,
    network: watch::Sender<Network>,
    ends: watch::Sender<(u64, Disconnect)>,
) {
    listener.set_nonblocking(true).expect("a socket");
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    loop {
        let Ok((client, _)) = listener.accept().await else {
            continue;
        };
        if network.borrow().refuses {
            reset(client);
            continue;
        }
        tokio::spawn(connection(
            client,
            server,
            network.subscribe(),
            ends.subscribe(),
        ));
    }
}

async fn connection(
    mut client: TcpStream,
    server: SocketAddr,
    mut network: watch::Receiver<Network>,
    mut ends: watch::Receiver<(u64, Disconnect)>,
) {
    // A black hole takes no connections.
    if network
        .wait_for(|network| {
            network.to_server != Flow::Swallows && network.to_client != Flow::Swallows
        })
        .await
        .is_err()
    {
        return;
    }
    let Ok(socket) = TcpSocket::new_v4() else {
        return;
    };
    let Ok(mut upstream) = socket.connect(server).await else {
        return reset(client);
    };
    client.set_nodelay(true).expect("a socket");
    upstream.set_nodelay(true).expect("a socket");
    let ended = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = upstream.split();
        tokio::select! {
            () = carry(from_client, to_server, network.clone(), |network| network.to_server) => None,
            () = carry(from_server, to_client, network, |network| network.to_client) => None,
            _ = ends.changed() => Some(ends.borrow().1),
        }
    };
    if ended == Some(Disconnect::Reset) {
        reset(client);
        reset(upstream);
    }
}

fn reset(stream: TcpStream) {
    // An error means that the connection is gone already.
    stream.set_zero_linger().ok();
}

/// Ends when one side has closed and the network passes that on.
async fn carry(
    mut from: tokio::net::tcp::ReadHalf<'_>,
    mut to: tokio::net::tcp::WriteHalf<'_>,
    mut network: watch::Receiver<Network>,
    flow: impl Fn(&Network) -> Flow,
) {
    let mut buffer = vec![0; 64 << 10];
    // The bytes of a long line, by the times at which they arrive.
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    loop {
        let next = under_way.front().map(|(due, _)| *due);
        let read = tokio::select! {
            biased;
            () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => {
                let Some((_, bytes)) = under_way.pop_front() else { continue };
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
                continue;
            }
            read = from.read(&mut buffer) => read.unwrap_or(0),
        };
        if network
            .wait_for(|network| flow(network) != Flow::Swallows)
            .await
            .is_err()
            || read == 0
        {
            return;
        }
        let now = flow(&network.borrow());
        let written = match now {
            Flow::Delays(delay) => {
                sleep(delay).await;
                to.write_all(&buffer[..read]).await
            }
            Flow::Lags(lag) => {
                under_way.push_back((Instant::now() + lag, buffer[..read].to_vec()));
                Ok(())
            }
            Flow::Trickles(rate) => trickle(&mut to, &buffer[..read], rate).await,
            Flow::Passes | Flow::Swallows => to.write_all(&buffer[..read]).await,
        };
        if written.is_err() {
            return;
        }
    }
}

async fn trickle(
    to: &mut tokio::net::tcp::WriteHalf<'_>,
    bytes: &[u8],
    rate: usize,
) -> std::io::Result<()> {
    for piece in bytes.chunks((rate / 20).max(1)) {
        to.write_all(piece).await?;
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
