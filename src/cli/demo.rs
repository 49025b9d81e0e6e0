//! `waypost demo`: a node, an API and a load in one process. The API is a built-in sink.

mod chaos;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::Serialize;

use self::chaos::ChaosReport;
use super::{
    NodeArgs,
    output::{failed, print, tell},
    progress::Progress,
    read_records,
    signals::Signals,
};
use crate::{
    actors::supervisor::{ChildId, Snapshot, State},
    api::client::Endpoint,
    config::{Config, IngestConfig},
    ledger::{Balance, Ledger, Quantiles},
    load::{Load, Plan},
    node::Node,
    sink::{Sink, Stats, StoredRecord},
};

/// Clients of the load.
const USERS: usize = 32;
/// How long the lanes may take to come up.
const LANES_PATIENCE: Duration = Duration::from_secs(30);
/// How long the ledger may take to balance after the load.
const BALANCE_PATIENCE: Duration = Duration::from_secs(30);
/// The most refused records that are reported one by one.
const REASONS_MAX: usize = 5;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost demo
  waypost demo --once --records traffic.json
  waypost demo --chaos
  waypost demo --chaos=2min --once")]
pub struct Args {
    /// Read the node's configuration from this TOML file
    #[arg(long, value_name = "FILE", help_heading = "Node")]
    config: Option<PathBuf>,
    /// Take records here [default: 127.0.0.1:8000, or a free port]
    #[arg(long, value_name = "ADDR", help_heading = "Node")]
    listen: Option<String>,
    /// Serve health and status here [default: 127.0.0.1:8001, or a free port]
    #[arg(long, value_name = "ADDR", help_heading = "Node")]
    admin: Option<String>,
    /// Keep the node's data in this folder [default: a temporary folder]
    #[arg(long, value_name = "DIR", help_heading = "Node")]
    data: Option<String>,
    /// Post this JSON array or NDJSON [default: 1,000 built-in records]
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// Under load for a minute, or for TIME, break the lanes, the API and the disk in turn, and show
    /// that no record is lost
    #[arg(
        long,
        value_name = "TIME",
        value_parser = chaos::length,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "60s"
    )]
    chaos: Option<Duration>,
    /// Exit once all is delivered; with status 1 if not within 30 s
    #[arg(long)]
    once: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the demo. Without `--once` the node stays up until Ctrl-C. Fails if a record was not
/// delivered, or if a signal ends it before.
pub async fn demo(args: Args) -> Result<(), ExitCode> {
    let node = NodeArgs {
        config: args.config.clone(),
        api: None,
        listen: args.listen.clone(),
        admin: args.admin.clone(),
        data: args.data.clone(),
    };
    let mut signals = Signals::take()?;
    let mut config = node.load()?;
    let records = read_records(args.records.as_deref())?;
    // The folder is removed when the demo ends.
    let scratch = args.data.is_none().then(tempfile::tempdir).transpose();
    let scratch = scratch.map_err(failed)?;
    if let Some(scratch) = &scratch {
        scratch.path().clone_into(&mut config.spool.dir);
    }
    let sink = TcpListener::bind("127.0.0.1:0").and_then(|listener| Sink::start(listener, None));
    let mut sink = sink.map_err(failed)?;
    config.api.url = format!("http://{}/", sink.address()).into();
    choose_addresses(&mut config, &args);
    take_without_proof(&mut config.ingest);
    if let Some(length) = args.chaos {
        config.spool.max = chaos::disk_size(&records, length);
        // A lane that is broken when a signal comes is not to stay so.
        config.admin.keep_orders = false;
    }
    let same = config.clone();
    let node = Node::start(&config, Arc::new(move || Ok(same.clone())))
        .map_err(|why| failed(format_args!("the node does not start: {why}")))?;
    tell(format_args!("The live page is http://{}/", node.admin));
    let played = async {
        match args.chaos {
            Some(length) => {
                chaos::play(&node, &config, &mut sink, records, length, args.json).await
            }
            None => play(&node, &config, &sink, records, &args).await,
        }
    };
    // Any signal ends it, SIGHUP too: its terminal has gone.
    let played = tokio::select! {
        outcome = played => Some(outcome),
        _ = signals.next() => None,
    };
    if !args.once && played.is_some() {
        tell(format_args!(
            "The node stays up: post to http://{}/, the live page is http://{}/, Ctrl-C ends it.",
            node.ingest, node.admin
        ));
        signals.next().await;
    }
    node.drain().await;
    sink.stop().await;
    played.unwrap_or_else(|| Err(failed("a signal has ended the demo")))
}

/// Posts the records to the node, which posts them to `sink`.
async fn play(
    node: &Node,
    config: &Config,
    sink: &Sink,
    records: Vec<Bytes>,
    args: &Args,
) -> Result<(), ExitCode> {
    let total = records.len() as u64;
    if !within(LANES_PATIENCE, async || lanes_are_up(node).await).await {
        tell(format_args!(
            "waypost: not every lane is up after {LANES_PATIENCE:?}; see http://{}/",
            node.admin
        ));
    }
    let progress = Progress::new(total, "records taken");
    let began = Instant::now();
    let refused = post(node, records, &progress).await?;
    let is_delivered = refused.is_empty()
        && within(BALANCE_PATIENCE, async || is_settled(node, sink, total)).await;
    let elapsed = began.elapsed();
    progress.end();

    let report = Report::new(node, config, sink, elapsed).await?;
    let printed = if args.json {
        print(serde_json::to_string(&report).map_err(failed)?)
    } else {
        print(report)
    };
    for why in refused.iter().take(REASONS_MAX) {
        tell(format_args!("waypost: {why}"));
    }
    let outcome = if !refused.is_empty() {
        let count = refused.len();
        Err(failed(format!("{count} of {total} records were refused")))
    } else if is_delivered {
        Ok(())
    } else {
        let why = "not all is delivered, or the ledger does not balance";
        Err(failed(why))
    };
    printed.and(outcome)
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

/// The demo posts its records itself, in plain HTTP, with no token and no signature.
fn take_without_proof(ingest: &mut IngestConfig) {
    let files = [
        &mut ingest.tokens_file,
        &mut ingest.signing_keys_file,
        &mut ingest.tls_cert_file,
        &mut ingest.tls_key_file,
        &mut ingest.client_ca_file,
    ];
    let files = files.map(Option::take);
    if files.iter().any(Option::is_some) {
        tell("The demo takes records without the token, the signature and the TLS of [ingest].");
    }
}

/// `address`, or port 0 of its host if the port is taken.
fn free_or_any(address: SocketAddr) -> SocketAddr {
    match TcpListener::bind(address) {
        Ok(_) => address,
        Err(_) => SocketAddr::new(address.ip(), 0),
    }
}

/// Whether `holds` becomes true within `patience`.
async fn within(patience: Duration, mut holds: impl AsyncFnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if holds().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    false
}

async fn lanes_are_up(node: &Node) -> bool {
    let views = node.supervisor.send(Snapshot).await.unwrap_or_default();
    let mut lanes = views
        .iter()
        .filter(|view| matches!(view.child, ChildId::Lane(_)));
    !views.is_empty() && lanes.all(|view| view.state == State::Up)
}

/// Whether each record is at the sink, and the ledger balances.
fn is_settled(node: &Node, sink: &Sink, total: u64) -> bool {
    let balance = node.ledger.balance(&node.apis.spools().stats());
    let is_at_rest = balance.in_flight + balance.spooled + balance.parked == 0;
    let has_all = balance.accepted == total && sink.stats().records >= total;
    is_at_rest && has_all && balance.holds()
}

/// Posts each record once. Returns why records were refused.
async fn post(
    node: &Node,
    records: Vec<Bytes>,
    progress: &Progress,
) -> Result<Vec<String>, ExitCode> {
    let ingest =
        Endpoint::with_public_roots(&format!("http://{}/", node.ingest)).map_err(failed)?;
    let refused = Rc::new(RefCell::new(Vec::new()));
    let watched = Rc::clone(&refused);
    let plan = Plan {
        watch: Some(Box::new(move |at, _, answer| {
            if let Err(refusal) = answer {
                watched
                    .borrow_mut()
                    .push(format!("record {}: {}", at + 1, refusal.why));
            }
        })),
        ..Plan::new(records, USERS)
    };
    let load = Load::new(ingest, plan);
    load.run(|tally| progress.reached(tally.requests)).await;
    progress.reached(load.tally().requests);
    Ok(refused.take())
}

/// The result of a demo, with the words of `GET /api/status`.
#[derive(Serialize)]
struct Report {
    ledger: Balance,
    /// By the tag of the lane.
    paths: BTreeMap<String, PathReport>,
    api: Stats,
    /// The newest record of the API.
    record: Option<StoredRecord>,
    elapsed_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    chaos: Option<ChaosReport>,
}

impl Report {
    async fn new(
        node: &Node,
        config: &Config,
        sink: &Sink,
        elapsed: Duration,
    ) -> Result<Self, ExitCode> {
        let newest = sink.records(1).await.map_err(failed)?.pop();
        Ok(Self {
            paths: paths(&node.ledger, config),
            ledger: node.ledger.balance(&node.apis.spools().stats()),
            api: sink.stats(),
            record: newest,
            elapsed_s: elapsed.as_secs_f64(),
            chaos: None,
        })
    }
}

/// The counts of a lane.
#[derive(Serialize)]
struct PathReport {
    accepted: u64,
    delivered: u64,
    dead: u64,
    in_flight: u64,
    delivery_ms: Quantiles,
}

fn paths(ledger: &Ledger, config: &Config) -> BTreeMap<String, PathReport> {
    let lanes = config.lanes.in_order().into_iter();
    let path = |(lane, tag)| {
        let ledger = ledger.lane(lane);
        let path = PathReport {
            accepted: ledger.counts.accepted,
            delivered: ledger.counts.delivered,
            dead: ledger.counts.dead,
            in_flight: ledger.counts.in_flight(),
            delivery_ms: ledger.delivery.quantiles_ms(),
        };
        (tag, path)
    };
    lanes.map(path).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(StoredRecord { id, record, .. }) = &self.record {
            writeln!(f, "A record as the API received it, Idempotency-Key {id}:")?;
            writeln!(f, "{record}\n")?;
        }
        writeln!(
            f,
            "{:<10} {:>9} {:>9} {:>9} {:>9} {:>18}",
            "path", "accepted", "delivered", "dead", "in_flight", "p50 / p99 ms"
        )?;
        for (tag, path) in &self.paths {
            let Quantiles { p50, p99 } = path.delivery_ms;
            writeln!(
                f,
                "{tag:<10} {:>9} {:>9} {:>9} {:>9} {:>18}",
                path.accepted,
                path.delivered,
                path.dead,
                path.in_flight,
                format!("{p50:.1} / {p99:.1}"),
            )?;
        }
        let ledger = &self.ledger;
        writeln!(
            f,
            "\nledger: {} accepted + {} recovered",
            ledger.accepted, ledger.recovered
        )?;
        writeln!(
            f,
            "      = {} delivered + {} handed_over + {} dead + {} dropped",
            ledger.delivered, ledger.handed_over, ledger.dead, ledger.dropped
        )?;
        writeln!(
            f,
            "      + {} spooled + {} parked + {} in_flight + {} missing",
            ledger.spooled, ledger.parked, ledger.in_flight, ledger.missing
        )?;
        write!(
            f,
            "{} records at the API after {:.2} s; {} redelivered by a broker.",
            self.api.records, self.elapsed_s, ledger.redelivered
        )?;
        match &self.chaos {
            Some(chaos) => write!(f, "\n{chaos}"),
            None => Ok(()),
        }
    }
}
