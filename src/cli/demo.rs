//! `waypost demo`: the whole way of a record in one process: a replay posts `traffic.json` to a node, whose API is a
//! built-in sink.

use std::{
    cell::RefCell,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::json;

use super::{NodeArgs, USAGE, progress::Progress, run::stop_signal};
use crate::{
    actors::supervisor::{ChildId, Snapshot, State},
    api::answer::Answer,
    api::{self, Api},
    config::{self, Config},
    lane_id::LaneId,
    load,
    node::Node,
    record::Record,
    sink::Sink,
};

/// The records that the demo replays unless it is given others.
pub(super) const TRAFFIC: &str = include_str!("../../traffic.json");
/// Clients of the replay.
const USERS: usize = 32;
/// How long the lanes may take to come up.
const LANES_PATIENCE: Duration = Duration::from_secs(30);
/// How long the ledger may take to balance once the replay has begun.
const BALANCE_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Replay these records instead of the built-in ones: a JSON array, or NDJSON
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// Exit when all is delivered: 0, or 1 if the ledger does not balance within 30 s
    #[arg(long)]
    once: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the demo; without `--once` it stays up until Ctrl-C.
pub async fn demo(args: Args) -> ExitCode {
    let config = match args.node.load() {
        Ok(config) => config,
        Err(status) => return status,
    };
    let text = match args.records.as_ref().map(fs::read_to_string).transpose() {
        Ok(text) => text,
        Err(failure) => {
            eprintln!(
                "waypost: {}: {failure}",
                args.records.unwrap_or_default().display()
            );
            return ExitCode::from(USAGE);
        }
    };
    let records = match load::records(text.as_deref().unwrap_or(TRAFFIC)) {
        Ok(records) => records,
        Err(why) => {
            eprintln!("waypost: --records: {why}");
            return ExitCode::from(USAGE);
        }
    };
    match play(config, records, &args).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("waypost: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every record was delivered.
async fn play(
    mut config: Config,
    records: Vec<Bytes>,
    args: &Args,
) -> Result<bool, Box<dyn std::error::Error>> {
    let total = records.len() as u64;
    // Removed when the demo ends.
    let scratch = args
        .node
        .data
        .is_none()
        .then(tempfile::tempdir)
        .transpose()?;
    if let Some(scratch) = &scratch {
        scratch.path().clone_into(&mut config.spool.dir);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    config.api.url = format!("http://{}/", listener.local_addr()?).into();
    let sink = Sink::start(listener, None)?;
    if config.ingest.listen.ip().is_unspecified() {
        // What is shown on one machine is not served to others.
        config.ingest.listen.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    config.ingest.listen = free_or_any(config.ingest.listen);
    config.admin.listen = free_or_any(config.admin.listen);
    let grpc = config.lanes.grpc.get_or_insert_default();
    grpc.listen = free_or_any(grpc.listen);

    let node = Node::start(&config)?;
    // It takes a record as an API does, but for the status.
    let ingest = api::Settings::read(&config::Api {
        url: format!("http://{}/", node.ingest).into(),
        ..config::Api::default()
    })?;
    if !lanes_up(&node).await {
        eprintln!(
            "waypost: not every lane is up after {LANES_PATIENCE:?}; see http://{}/api/status",
            node.admin
        );
    }
    let progress = Progress::new(total, "records taken");
    let began = Instant::now();
    let refused = replay(&ingest, records, &progress).await;
    let balanced = refused == 0 && settled(&node, &sink, total, &progress).await;
    let elapsed = began.elapsed();
    progress.end();

    let stats = sink.stats();
    let lanes = config.lanes.in_order();
    if args.json {
        println!("{}", report_json(&node, &lanes, &stats, elapsed));
    } else {
        print_report(&node, &lanes, &stats, elapsed);
    }
    if !balanced {
        eprintln!(
            "waypost: the ledger does not balance: {total} sent, {refused} refused, {} at the API",
            stats.records
        );
    }
    if !args.once {
        eprintln!(
            "The node stays up: post to http://{}/, status at http://{}/api/status, Ctrl-C ends it.",
            node.ingest, node.admin
        );
        stop_signal().await?;
    }
    node.drain().await;
    sink.stop().await;
    Ok(balanced)
}

/// `address`, or a free port of the same host where it is taken.
fn free_or_any(address: SocketAddr) -> SocketAddr {
    match TcpListener::bind(address) {
        Ok(_) => address,
        Err(_) => SocketAddr::new(address.ip(), 0),
    }
}

/// Whether all lanes came up in time.
async fn lanes_up(node: &Node) -> bool {
    let deadline = Instant::now() + LANES_PATIENCE;
    while Instant::now() < deadline {
        let views = node.supervisor.send(Snapshot).await.unwrap_or_default();
        let mut lanes = views
            .iter()
            .filter(|view| matches!(view.child, ChildId::Lane(_)));
        if !views.is_empty() && lanes.all(|view| view.state == State::Up) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

/// Posts each record once, trying again where the node asks for it. Returns how many were not taken.
async fn replay(ingest: &api::Settings, records: Vec<Bytes>, progress: &Progress) -> u64 {
    let left = RefCell::new(records.into_iter());
    let node = Api::new(ingest);
    let users = (0..USERS).map(|_| async {
        let mut refused = 0;
        loop {
            let Some(record) = left.borrow_mut().next() else {
                return refused;
            };
            if !taken(&node, &Record::new_id(), record).await {
                refused += 1;
            }
            progress.one_more();
        }
    });
    join_all(users).await.into_iter().sum()
}

/// Tries under one id, so that the API keeps a record once however often it goes.
async fn taken(node: &Api, id: &str, record: Bytes) -> bool {
    let deadline = Instant::now() + BALANCE_PATIENCE;
    loop {
        match node.post(record.clone(), id, None).await {
            Answer::Status { status: 202, .. } => return true,
            Answer::Status { status: 503, .. } | Answer::NoAnswer(_)
                if Instant::now() < deadline => {}
            _ => return false,
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Whether every record came to rest at the sink in time, and the ledger agrees.
async fn settled(node: &Node, sink: &Sink, total: u64, progress: &Progress) -> bool {
    let deadline = Instant::now() + BALANCE_PATIENCE;
    loop {
        let counts = node.ledger.totals();
        progress.note(format!("{} delivered", counts.delivered));
        if counts.accepted == total && counts.in_flight() == 0 && sink.stats().records == total {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn print_report(
    node: &Node,
    lanes: &[(LaneId, String)],
    stats: &crate::sink::Stats,
    elapsed: Duration,
) {
    println!(
        "{:<10} {:>9} {:>9} {:>10} {:>9} {:>14}",
        "path", "accepted", "delivered", "in flight", "at API", "p50 / p99 ms"
    );
    let row = |name: &str, counts: crate::ledger::Counts, at_api: u64, times: &str| {
        println!(
            "{name:<10} {:>9} {:>9} {:>10} {at_api:>9} {times:>14}",
            counts.accepted,
            counts.delivered,
            counts.in_flight()
        );
    };
    for (lane, tag) in lanes {
        let times = node.ledger.delivery_times(*lane).quantiles_ms();
        let at_api = stats.paths.get(tag).copied().unwrap_or_default();
        row(
            tag,
            node.ledger.counts(*lane),
            at_api,
            &format!("{:.1} / {:.1}", times.p50, times.p99),
        );
    }
    row("all", node.ledger.totals(), stats.records, "");
    println!(
        "{} records in {:.2} s, {} sent twice.",
        stats.records,
        elapsed.as_secs_f64(),
        stats.redeliveries
    );
}

fn report_json(
    node: &Node,
    lanes: &[(LaneId, String)],
    stats: &crate::sink::Stats,
    elapsed: Duration,
) -> serde_json::Value {
    let line = |counts: crate::ledger::Counts| json!({"accepted": counts.accepted, "delivered": counts.delivered, "in_flight": counts.in_flight()});
    let paths: serde_json::Map<_, _> = lanes
        .iter()
        .map(|(lane, tag)| (tag.clone(), line(node.ledger.counts(*lane))))
        .collect();
    json!({
        "ledger": line(node.ledger.totals()),
        "paths": paths,
        "api": {"records": stats.records, "redeliveries": stats.redeliveries, "paths": stats.paths},
        "elapsed_s": elapsed.as_secs_f64(),
    })
}
