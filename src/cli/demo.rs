//! `waypost demo`: a node, an API and a load in one process. The API is a built-in sink.

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
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{NodeArgs, USAGE, progress::Progress, run::stop_signal};
use crate::{
    actors::supervisor::{ChildId, Snapshot, State},
    api::answer::Answer,
    api::{self, Api},
    config::{self, Config},
    ledger::Balance,
    load,
    node::Node,
    record::Record,
    sink::{Sink, Stats, StoredRecord},
};

/// The built-in records.
pub(super) const TRAFFIC: &str = include_str!("../../traffic.json");
/// Clients of the replay.
const USERS: usize = 32;
/// How long the lanes may take to come up.
const LANES_PATIENCE: Duration = Duration::from_secs(30);
/// How long the ledger may take to balance once the replay has begun.
const BALANCE_PATIENCE: Duration = Duration::from_secs(30);
/// The most refused records that are reported one by one.
const REASONS_MAX: usize = 5;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Read the node's configuration from this TOML file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Take records here [default: 127.0.0.1:8000, or a free port]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Serve health and status here [default: 127.0.0.1:8001, or a free port]
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Keep the node's data in this folder [default: a temporary folder]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Post this JSON array or NDJSON [default: 1,000 built-in records]
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// Exit once all is delivered; with status 1 if not within 30 s
    #[arg(long)]
    once: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the demo. Without `--once` the node stays up until Ctrl-C.
pub async fn demo(args: Args) -> ExitCode {
    let node = NodeArgs {
        config: args.config.clone(),
        api: None,
        listen: args.listen.clone(),
        admin: args.admin.clone(),
        data: args.data.clone(),
    };
    let config = match node.load() {
        Ok(config) => config,
        Err(status) => return status,
    };
    let records = match read_records(args.records.as_ref()) {
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

fn read_records(file: Option<&PathBuf>) -> Result<Vec<Bytes>, String> {
    let Some(file) = file else {
        return load::records(TRAFFIC);
    };
    let text = fs::read_to_string(file).map_err(|why| format!("{}: {why}", file.display()))?;
    load::records(&text)
}

/// Whether every record was delivered.
async fn play(
    mut config: Config,
    records: Vec<Bytes>,
    args: &Args,
) -> Result<bool, Box<dyn std::error::Error>> {
    let total = records.len() as u64;
    // The folder is removed when the demo ends.
    let scratch = args.data.is_none().then(tempfile::tempdir).transpose()?;
    if let Some(scratch) = &scratch {
        scratch.path().clone_into(&mut config.spool.dir);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    config.api.url = format!("http://{}/", listener.local_addr()?).into();
    let sink = Sink::start(listener, None)?;
    choose_addresses(&mut config, args);

    let node = Node::start(&config)?;
    if !lanes_up(&node).await {
        eprintln!(
            "waypost: not every lane is up after {LANES_PATIENCE:?}; see http://{}/api/status",
            node.admin
        );
    }
    let progress = Progress::new(total, "records taken");
    let began = Instant::now();
    let refused = replay(&node, records, &progress).await?;
    let delivered = refused.is_empty() && settled(&node, &sink, total, &progress).await;
    let elapsed = began.elapsed();
    progress.end();

    let record = sink.records(1).await.map_err(|why| why.to_string())?.pop();
    let report = Report::new(&node, &config, sink.stats(), record, elapsed);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    for why in refused.iter().take(REASONS_MAX) {
        eprintln!("waypost: {why}");
    }
    if !refused.is_empty() {
        eprintln!("waypost: {} of {total} records were refused", refused.len());
    } else if !delivered {
        eprintln!("waypost: not all is delivered, or the ledger does not balance");
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
    Ok(delivered)
}

/// A flag's address is used as it is. Any other becomes a free port if it is taken, and is not
/// served to other machines.
fn choose_addresses(config: &mut Config, args: &Args) {
    if args.listen.is_none() {
        let listen = &mut config.ingest.listen;
        if listen.ip().is_unspecified() {
            listen.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        *listen = free_or_any(*listen);
    }
    if args.admin.is_none() {
        config.admin.listen = free_or_any(config.admin.listen);
    }
    let grpc = config.lanes.grpc.get_or_insert_default();
    grpc.listen = free_or_any(grpc.listen);
}

/// `address`, or port 0 of its host if the port is taken.
fn free_or_any(address: SocketAddr) -> SocketAddr {
    match TcpListener::bind(address) {
        Ok(_) => address,
        Err(_) => SocketAddr::new(address.ip(), 0),
    }
}

/// Whether all lanes come up in time.
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

/// Posts each record once, and again where the node asks for it. Returns the reason of each record
/// that was refused.
async fn replay(
    node: &Node,
    records: Vec<Bytes>,
    progress: &Progress,
) -> Result<Vec<String>, api::ApiError> {
    // Ingest takes records as an API does.
    let ingest = Api::new(&api::Settings::read(&config::ApiConfig {
        url: format!("http://{}/", node.ingest).into(),
        ..config::ApiConfig::default()
    })?);
    let left = RefCell::new((1..).zip(records));
    let refused = RefCell::new(Vec::new());
    let users = (0..USERS).map(|_| async {
        loop {
            let Some((number, record)) = left.borrow_mut().next() else {
                return;
            };
            if let Err(why) = post(&ingest, record).await {
                refused.borrow_mut().push(format!("record {number}: {why}"));
            }
            progress.one_more();
        }
    });
    join_all(users).await;
    Ok(refused.into_inner())
}

/// Posts a record until it is accepted or refused. All tries have one id, so that the API stores
/// the record once.
async fn post(ingest: &Api, record: Bytes) -> Result<(), String> {
    let id = Record::new_id();
    let deadline = Instant::now() + BALANCE_PATIENCE;
    loop {
        match ingest.post(record.clone(), &id, None).await {
            Answer::Status { status: 202, .. } => return Ok(()),
            Answer::Status { status: 503, .. } | Answer::NoAnswer(_)
                if Instant::now() < deadline => {}
            answer => return Err(reason(&answer)),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The problem's detail where the answer has one (RFC 9457).
fn reason(answer: &Answer) -> String {
    if let Answer::Status {
        status, excerpt, ..
    } = answer
        && let Ok(problem) = serde_json::from_str::<Value>(excerpt)
        && let Some(detail) = problem["detail"].as_str()
    {
        return format!("status {status}: {detail}");
    }
    answer.to_string()
}

/// Whether every record reaches the sink in time, and the ledger balances.
async fn settled(node: &Node, sink: &Sink, total: u64, progress: &Progress) -> bool {
    let deadline = Instant::now() + BALANCE_PATIENCE;
    loop {
        let balance = node.ledger.balance(&node.spool.stats());
        progress.note(format!("{} delivered", balance.delivered));
        let is_at_rest = balance.in_flight == 0 && balance.spooled == 0;
        let has_all = balance.accepted == total && sink.stats().records >= total;
        if is_at_rest && has_all && balance.holds() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The result of a demo, with the words of `GET /api/status`.
#[derive(Serialize)]
struct Report {
    ledger: Balance,
    /// The counts of each lane, by its tag.
    paths: Map<String, Value>,
    api: Stats,
    /// The newest record of the API.
    record: Option<StoredRecord>,
    elapsed_s: f64,
}

impl Report {
    fn new(
        node: &Node,
        config: &Config,
        api: Stats,
        record: Option<StoredRecord>,
        elapsed: Duration,
    ) -> Self {
        let lanes = config.lanes.in_order().into_iter();
        let paths = lanes.map(|(lane, tag)| {
            let counts = node.ledger.counts(lane);
            let times = node.ledger.delivery_times(lane).quantiles_ms();
            let path = json!({
                "accepted": counts.accepted,
                "delivered": counts.delivered,
                "dead": counts.dead,
                "in_flight": counts.in_flight(),
                "delivery_ms": {"p50": times.p50, "p99": times.p99},
            });
            (tag, path)
        });
        Self {
            paths: paths.collect(),
            ledger: node.ledger.balance(&node.spool.stats()),
            api,
            record,
            elapsed_s: elapsed.as_secs_f64(),
        }
    }

    fn print(&self) {
        if let Some(StoredRecord { id, record, .. }) = &self.record {
            println!("A record as the API received it, Idempotency-Key {id}:");
            println!("{record}\n");
        }
        println!(
            "{:<10} {:>9} {:>9} {:>9} {:>9} {:>18}",
            "path", "accepted", "delivered", "dead", "in_flight", "p50 / p99 ms"
        );
        for (tag, path) in &self.paths {
            let count = |name: &str| path[name].as_u64().unwrap_or_default();
            let ms = |name: &str| path["delivery_ms"][name].as_f64().unwrap_or_default();
            println!(
                "{tag:<10} {:>9} {:>9} {:>9} {:>9} {:>18}",
                count("accepted"),
                count("delivered"),
                count("dead"),
                count("in_flight"),
                format!("{:.1} / {:.1}", ms("p50"), ms("p99")),
            );
        }
        let Balance {
            accepted,
            recovered,
            delivered,
            dead,
            dropped,
            spooled,
            in_flight,
            redelivered,
        } = self.ledger;
        println!(
            "\nledger: {accepted} accepted + {recovered} recovered\n\
             \x20     = {delivered} delivered + {dead} dead + {dropped} dropped \
             + {spooled} spooled + {in_flight} in_flight\n\
             {} records at the API after {:.2} s; {redelivered} redelivered by a broker.",
            self.api.records, self.elapsed_s
        );
    }
}
