//! A faulty network: a TCP proxy whose directions pass, hold back, delay or throttle bytes, and
//! whose connections can be cut or reset.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::watch,
    time::sleep,
};

/// How one direction treats bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Passes,
    /// A black hole: nothing arrives, without an error. The bytes under way arrive when it passes
    /// again, as after a retransmission.
    Swallows,
    Delays(Duration),
    /// Bytes per second.
    Trickles(usize),
}

/// The state of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// From the client to the server.
    pub there: Way,
    /// From the server to the client.
    pub back: Way,
    /// Whether new connections are refused.
    pub refuses: bool,
}

impl Network {
    pub const WELL: Self = Self {
        there: Way::Passes,
        back: Way::Passes,
        refuses: false,
    };
    pub const BLACK_HOLE: Self = Self {
        there: Way::Swallows,
        back: Way::Swallows,
        refuses: false,
    };
}

/// How the proxy ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// FIN to both sides.
    Cut,
    /// RST to both sides.
    Reset,
}

/// A proxy on a free port. Dropping it ends it.
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    /// The number of ordered ends, and the latest one.
    ends: watch::Sender<(u64, End)>,
    stop: Arc<Mutex<Option<tokio::sync::oneshot::Sender<()>>>>,
}

impl Proxy {
    /// Starts a proxy for `server`, which may listen later.
    pub fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let (network, ends) = (
            watch::Sender::new(Network::WELL),
            watch::Sender::new((0, End::Cut)),
        );
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (shown, ordered) = (network.clone(), ends.clone());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, server, shown, ordered) => {}
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
            .send_modify(|(count, end)| (*count, *end) = (*count + 1, End::Cut));
    }

    /// Resets all connections.
    pub fn reset(&self) {
        self.ends
            .send_modify(|(count, end)| (*count, *end) = (*count + 1, End::Reset));
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
    ends: watch::Sender<(u64, End)>,
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
        let (network, ends) = (network.subscribe(), ends.subscribe());
        tokio::spawn(connection(client, server, network, ends));
    }
}

async fn connection(
    mut client: TcpStream,
    server: SocketAddr,
    mut network: watch::Receiver<Network>,
    mut ends: watch::Receiver<(u64, End)>,
) {
    // A black hole takes no connections.
    if network
        .wait_for(|network| network.there != Way::Swallows && network.back != Way::Swallows)
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
            () = carry(from_client, to_server, network.clone(), |network| network.there) => None,
            () = carry(from_server, to_client, network, |network| network.back) => None,
            _ = ends.changed() => Some(ends.borrow().1),
        }
    };
    if ended == Some(End::Reset) {
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
    way: impl Fn(&Network) -> Way,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        if network
            .wait_for(|network| way(network) != Way::Swallows)
            .await
            .is_err()
            || read == 0
        {
            return;
        }
        let now = way(&network.borrow());
        let written = match now {
            Way::Delays(delay) => {
                sleep(delay).await;
                to.write_all(&buffer[..read]).await
            }
            Way::Trickles(rate) => trickle(&mut to, &buffer[..read], rate).await,
            Way::Passes | Way::Swallows => to.write_all(&buffer[..read]).await,
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
