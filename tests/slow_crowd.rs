//! Many slow clients and many idle connections beside honest clients: what those pay for them.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;
use rustls::{ClientConfig, version::TLS13};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::client::TlsStream;

use crate::{
    ingest::RECORD,
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        tls::Authority,
    },
    tls::{Files, client_tls, connect},
};

/// The way in which a slow client holds its connection.
#[derive(Clone, Copy)]
enum Slowness {
    /// It sends the head byte by byte.
    Head,
    /// Its body never comes.
    Body,
    /// It sends the body byte by byte.
    Trickle,
    /// It never begins its handshake.
    Handshake,
}

const HEAD: &str = "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90000\r\n\r\n";
/// A slow client's pause between two bytes.
const PAUSE: Duration = Duration::from_millis(500);
/// An honest client's pause between two requests.
const BETWEEN: Duration = Duration::from_millis(50);

/// Holds connections, one after the other, until it is dropped.
async fn hold(port: u16, tls: Arc<ClientConfig>, slowness: Slowness) {
    loop {
        // The node may have closed it meanwhile.
        hold_once(port, &tls, slowness).await.ok();
        sleep(PAUSE).await;
    }
}

async fn hold_once(port: u16, tls: &Arc<ClientConfig>, slowness: Slowness) -> std::io::Result<()> {
    if matches!(slowness, Slowness::Handshake) {
        let mut silent = TcpStream::connect(("127.0.0.1", port)).await?;
        return silent.read(&mut [0]).await.map(drop);
    }
    let mut stream = connect(port, tls).await;
    match slowness {
        Slowness::Head => trickle(&mut stream, HEAD.as_bytes()).await,
        Slowness::Body | Slowness::Handshake => {
            stream.write_all(HEAD.as_bytes()).await?;
            stream.read(&mut [0]).await.map(drop)
        }
        Slowness::Trickle => {
            stream.write_all(HEAD.as_bytes()).await?;
            trickle(&mut stream, &[b' '; 1000]).await
        }
    }
}

async fn trickle(stream: &mut TlsStream<TcpStream>, bytes: &[u8]) -> std::io::Result<()> {
    for byte in bytes {
        stream.write_all(&[*byte]).await?;
        stream.flush().await?;
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Posts records over one connection until it is over, and notes how long each answer took.
async fn post_records(
    port: u16,
    tls: Arc<ClientConfig>,
    is_over: Rc<Cell<bool>>,
    times: Rc<RefCell<Vec<Duration>>>,
) {
    let length = RECORD.len();
    let record =
        format!("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{RECORD}");
    let mut stream = connect(port, &tls).await;
    while !is_over.get() {
        let began = Instant::now();
        stream
            .write_all(record.as_bytes())
            .await
            .expect("it is open");
        let mut answer = [0; 4096];
        let read = timeout(PATIENCE, stream.read(&mut answer)).await;
        let read = read.expect("an answer in time").expect("it is open");
        let answer = String::from_utf8_lossy(&answer[..read]);
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
        times.borrow_mut().push(began.elapsed());
        sleep(BETWEEN).await;
    }
}

/// The p50 and the p99 of `honest` clients during this time.
async fn served(
    port: u16,
    tls: &Arc<ClientConfig>,
    honest: usize,
    time: Duration,
) -> [Duration; 2] {
    let (is_over, times) = (Rc::default(), Rc::default());
    let clients: Vec<_> = (0..honest)
        .map(|_| {
            let (is_over, times) = (Rc::clone(&is_over), Rc::clone(&times));
            actix_rt::spawn(post_records(port, Arc::clone(tls), is_over, times))
        })
        .collect();
    sleep(time).await;
    is_over.set(true);
    for client in join_all(clients).await {
        client.expect("each is served");
    }
    let mut times = times.borrow().clone();
    times.sort();
    [50, 99].map(|percent| times[(times.len() - 1) * percent / 100])
}

/// Prints what `slow` clients, a quarter of each kind, cost `honest` ones.
async fn crowd(slow: usize, honest: usize, time: Duration) {
    let Some(authority) = Authority::new() else {
        return;
    };
    let (api, files) = (Api::start(), Files::new(&authority));
    let variables = [grpc_variables(), files.variables("INGEST")].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let tls = client_tls(&authority, None, &[&TLS13], &[]);
    let [p50, p99] = served(node.ingest, &tls, honest, time).await;
    println!("{honest} honest clients alone: p50 {p50:?}, p99 {p99:?}");
    let kinds = [
        Slowness::Head,
        Slowness::Body,
        Slowness::Trickle,
        Slowness::Handshake,
    ];
    let held = (0..slow).map(|at| {
        let tls = Arc::clone(&tls);
        actix_rt::spawn(hold(node.ingest, tls, kinds[at % kinds.len()]))
    });
    let held: Vec<_> = held.collect();
    // All are there.
    sleep(2 * PAUSE).await;
    let [p50_beside, p99_beside] = served(node.ingest, &tls, honest, time).await;
    let ratio = p99_beside.as_secs_f64() / p99.as_secs_f64();
    println!(
        "beside {slow} slow ones: p50 {p50_beside:?}, p99 {p99_beside:?}, {ratio:.2} times the p99"
    );
    for slow in held {
        slow.abort();
    }
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["delivered"], ledger["accepted"]);
}

#[actix_rt::test]
async fn honest_clients_are_served_beside_slow_ones() {
    crowd(40, 4, Duration::from_secs(1)).await;
}

#[actix_rt::test]
#[ignore = "a measurement, for an idle machine"]
async fn a_thousand_slow_clients_beside_a_hundred_honest_ones() {
    for _ in 0..3 {
        crowd(1000, 100, Duration::from_secs(20)).await;
    }
}

/// Prints the memory that the node needs for a connection that waits for its next request.
async fn idle(connections: u32) {
    let long = [("INGEST__KEEP_ALIVE".into(), "10m".into())];
    let variables = [&grpc_variables()[..], &long].concat();
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let length = RECORD.len();
    let record = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{RECORD}");
    let ask = async || {
        let mut stream = TcpStream::connect(("127.0.0.1", node.ingest))
            .await
            .expect("a socket");
        stream.write_all(record.as_bytes()).await.expect("room");
        let mut answer = [0; 4096];
        let read = timeout(PATIENCE, stream.read(&mut answer)).await;
        let read = read.expect("an answer in time").expect("it is open");
        assert!(answer[..read].starts_with(b"HTTP/1.1 202"));
        stream
    };
    for _ in 0..100 {
        ask().await;
    }
    node.at_rest(PATIENCE).await;
    let before = node.memory();
    let mut kept = Vec::new();
    for _ in 0..connections {
        kept.push(ask().await);
    }
    node.at_rest(PATIENCE).await;
    let each = node.memory().saturating_sub(before) / u64::from(connections);
    println!("{connections} idle connections: {each} bytes each");
    for stream in [0, kept.len() - 1] {
        kept[stream]
            .write_all(record.as_bytes())
            .await
            .expect("it is open");
        let read = kept[stream].read(&mut [0; 4096]).await.expect("it is open");
        assert!(read > 0, "it is served");
    }
}

#[actix_rt::test]
async fn idle_connections_are_kept_and_served() {
    idle(200).await;
}

#[actix_rt::test]
#[ignore = "a measurement; it needs 10,100 file descriptors here and in the node"]
async fn ten_thousand_idle_connections() {
    idle(10_000).await;
}
