//! Nodes on the `grpc` lane, their clients, and a connection that can fall silent.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use tonic::transport::Channel;
use waypost::{
    breaker::ApiBreakers,
    config,
    proto::{self, waypost_client::WaypostClient},
    record::{Origin, Record, Schema, TraceHeaders},
    tap::Tap,
    transport::{
        Transport as _,
        grpc::{Grpc, Settings},
    },
};

use super::{process::free_port, rig::Rig, spool};

/// A node that calls itself. It has no broker that could be killed.
pub struct OwnNode;

impl Rig for OwnNode {
    type T = Grpc;
    const SURVIVES_KILL: bool = false;
    const CONFIRMS_ON_SETTLE: bool = true;
    const CARRIES_BUNDLES: bool = false;

    async fn start() -> Option<Self> {
        Some(Self)
    }

    fn settings(&mut self) -> Settings {
        settings()
    }

    async fn kill(&mut self) {}

    async fn revive(&mut self) {}
}

/// A node on a free port. Its records may be any JSON objects.
pub fn settings() -> Settings {
    settings_at(free_port())
}

pub fn settings_at(port: u16) -> Settings {
    let config = config::GrpcConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        ..config::GrpcConfig::default()
    };
    let (spool, _) = spool();
    Settings {
        server_tls: None,
        config,
        tap: Tap::default(),
        rules: Schema::Any.into(),
        run: Arc::from("this run"),
        spool,
        breakers: ApiBreakers::default(),
        publish_timeout: Duration::from_secs(2),
    }
}

pub fn uri(settings: &Settings) -> String {
    format!("http://{}", settings.config.listen)
}

pub async fn connect(settings: &Settings) -> Grpc {
    Grpc::connect(settings).await.expect("the node starts")
}

pub async fn channel(node: &Grpc) -> Channel {
    let endpoint =
        Channel::from_shared(format!("http://{}", node.address())).expect("an address makes a URI");
    endpoint
        .connect()
        .await
        .expect("the node accepts connections")
}

pub async fn client(node: &Grpc) -> WaypostClient<Channel> {
    WaypostClient::new(channel(node).await)
}

/// A record as a node sends it.
pub fn record(id: &str) -> Record {
    Record {
        id: Arc::from(id),
        body: Bytes::from(format!(r#"{{"id":"{id}"}}"#)),
        trace: TraceHeaders::read(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            None,
        ),
        origin: Some(Origin {
            run: Arc::from("node-a/1"),
            at_us: 17,
        }),
        api: None,
        event: None,
    }
}

/// A record as a client sends it.
pub fn message(id: &str, body: &str) -> proto::Record {
    proto::Record {
        id: id.into(),
        body: Bytes::copy_from_slice(body.as_bytes()),
        ..proto::Record::default()
    }
}

/// A proxy between two nodes that can hold back bytes, with both connections open.
pub struct Wire {
    pub address: SocketAddr,
    silent: Arc<AtomicBool>,
}

impl Wire {
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let silent = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&silent);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(target) else {
                    continue;
                };
                let (Ok(near_back), Ok(far_back)) = (near.try_clone(), far.try_clone()) else {
                    continue;
                };
                let there = Arc::clone(&flag);
                let back = Arc::clone(&flag);
                thread::spawn(move || pass(near, far, &there));
                thread::spawn(move || pass(far_back, near_back, &back));
            }
        });
        Self { address, silent }
    }

    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        while silent.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
}
