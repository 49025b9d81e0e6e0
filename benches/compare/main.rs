//! Waypost against its floors, lane by lane, in one run: `cargo bench --bench compare -- --help`.
//!
//! Broker, API, load and the program under test are separate processes. Floor and Waypost take turns, round by round, on the
//! same broker; what counts is the ratio within a round, and its median over the rounds. CPU is what the operating system
//! accounts to the program under test alone.

mod api;
mod floor;
mod load;
#[allow(dead_code, unused_imports, reason = "what the tests need besides")]
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use clap::{Parser, Subcommand};
use serde::Serialize;
use serde_json::Value;
use support::{
    eventually,
    lanes::{Lane as _, Nats, Pubsub, Rabbitmq, grpc_variables},
    process::{free_port, start},
    rig::Rig as _,
};

const PATIENCE: Duration = Duration::from_mins(2);
const WARM_UP: usize = 2000;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    /// Lanes, separated by commas: none, grpc, nats, rabbitmq, pubsub
    #[arg(long, value_delimiter = ',', default_value = "none,grpc,nats,rabbitmq,pubsub")]
    lanes: Vec<String>,
    /// How often floor and Waypost take turns
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Records of a round, as a part of what each lane usually gets
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Clients that post at the same time
    #[arg(long, default_value_t = 64)]
    users: usize,
    /// Print what was measured as JSON
    #[arg(long)]
    json: bool,
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a process of the benchmark is.
#[derive(Subcommand)]
enum Role {
    #[command(hide = true)]
    Floor { lane: String, listen: SocketAddr },
    #[command(hide = true)]
    Api { listen: SocketAddr },
    #[command(hide = true)]
    Load { host: String, users: usize, first: usize, count: usize, times: PathBuf, rate: Option<f64> },
}

/// What one program did in one round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    ingest_per_s: f64,
    end_to_end_per_s: f64,
    cpu_us_per_record: f64,
    memory_mib: f64,
    lost: u64,
    duplicated: u64,
    /// At the fixed rate: p50, p99, p99.9.
    ingest_ms: [f64; 3],
    delivery_ms: [f64; 3],
    rate_cpu_us_per_record: f64,
}

/// What one round of a lane measured.
#[derive(Debug, Serialize)]
pub struct Round {
    rate: f64,
    floor: Measured,
    waypost: Measured,
}

fn main() {
    rustls::crypto::ring::default_provider().install_default().expect("no other was installed");
    let cli = Cli::parse();
    actix_rt::System::new().block_on(async {
        match cli.role {
            Some(Role::Floor { lane, listen }) => floor::run(&lane, listen).await,
            Some(Role::Api { listen }) => api::run(listen).await,
            Some(Role::Load { host, users, first, count, times, rate }) => {
                load::run(&host, users, first, count, rate, &times).await;
            }
            None => compare(&cli).await,
        }
    });
}

async fn compare(cli: &Cli) {
    for lane in &cli.lanes {
        let (rounds, usual) = match &**lane {
            "none" => (rounds(cli, lane, 60_000, Vec::new).await, "gRPC lane against a floor without a message system"),
            "grpc" => (rounds(cli, lane, 60_000, grpc_variables).await, ""),
            "nats" => {
                let Some(mut nats) = Nats::start().await else { continue };
                (rounds(cli, lane, 60_000, || nats.variables()).await, "")
            }
            "rabbitmq" => {
                let Some(mut rabbitmq) = Rabbitmq::start().await else { continue };
                (rounds(cli, lane, 20_000, || rabbitmq.variables()).await, "")
            }
            "pubsub" => {
                let Some(mut pubsub) = Pubsub::start().await else { continue };
                (rounds(cli, lane, 10_000, || pubsub.variables()).await, "")
            }
            lane => panic!("there is no lane {lane}"),
        };
        if cli.json {
            println!("{}", serde_json::json!({"lane": lane, "rounds": rounds}));
        } else {
            table::print(lane, usual, &rounds);
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a few 10,000"
)]
async fn rounds(
    cli: &Cli,
    lane: &str,
    usual: usize,
    mut variables: impl FnMut() -> Vec<(String, String)>,
) -> Vec<Round> {
    let records = ((usual as f64 * cli.scale) as usize).max(1000);
    let mut rounds: Vec<Round> = Vec::new();
    for number in 0..cli.rounds {
        // The first floor says how fast the others are asked to be.
        let rate = rounds.first().map(|round| round.rate);
        let (floor, waypost);
        if number % 2 == 0 {
            floor = measure(Program::Floor, lane, &variables(), records, cli.users, rate).await;
            let rate = rate.unwrap_or(floor.end_to_end_per_s / 2.0);
            waypost = measure(Program::Waypost, lane, &variables(), records, cli.users, Some(rate)).await;
            rounds.push(Round { rate, floor, waypost });
        } else {
            waypost = measure(Program::Waypost, lane, &variables(), records, cli.users, rate).await;
            floor = measure(Program::Floor, lane, &variables(), records, cli.users, rate).await;
            rounds.push(Round { rate: rate.unwrap_or_default(), floor, waypost });
        }
        eprintln!("{lane}: round {} of {}", number + 1, cli.rounds);
    }
    rounds
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Floor,
    Waypost,
}

/// The processes of one measurement. They end with it.
struct Stage {
    program: Child,
    api: Child,
    api_url: String,
    host: String,
    folder: tempfile::TempDir,
    users: usize,
    /// Records that were posted so far.
    posted: usize,
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in [&mut self.program, &mut self.api] {
            child.kill().and_then(|()| child.wait()).expect("a child ends");
        }
    }
}

fn own(arguments: &[&str], set_up: impl FnOnce(&mut std::process::Command)) -> Child {
    let path = std::env::current_exe().expect("a path");
    start(path.to_str().expect("a plain path"), |command| {
        command.args(arguments).stdin(Stdio::null());
        set_up(command);
    })
    .expect("it starts")
}

impl Stage {
    async fn new(program: Program, lane: &str, variables: &[(String, String)], users: usize) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [api_port, port, admin] = [(); 3].map(|()| free_port());
        let (listen, api_listen) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{api_port}"));
        let api = own(&["api", &api_listen], |_| {});
        let (api_url, host) = (format!("http://{api_listen}/"), format!("http://{listen}/"));
        let mut environment = vec![
            ("INGEST__LISTEN".to_owned(), listen.clone()),
            ("ADMIN__LISTEN".to_owned(), format!("127.0.0.1:{admin}")),
            ("API__URL".to_owned(), api_url.clone()),
            ("SPOOL__DIR".to_owned(), folder.path().join("data").display().to_string()),
        ];
        environment.extend_from_slice(variables);
        if program == Program::Waypost && variables.is_empty() {
            environment.extend(grpc_variables());
        }
        let environment = environment.into_iter().map(|(key, value)| (format!("WAYPOST_{key}"), value));
        get(&api_url).await;
        let (program, ready) = match program {
            Program::Floor => {
                let floor = own(&["floor", lane, &listen], |command| {
                    command.envs(environment);
                });
                (floor, host.clone())
            }
            Program::Waypost => {
                let node = start(env!("CARGO_BIN_EXE_waypost"), |command| {
                    command.args(["run", "-q"]).envs(environment).stdin(Stdio::null());
                });
                (node.expect("it starts"), format!("http://127.0.0.1:{admin}/readyz"))
            }
        };
        get(&ready).await;
        Self { program, api, api_url, host, folder, users, posted: 0 }
    }

    /// Posts so many records, and waits until the API has them all, or none came for a while.
    async fn post(&mut self, count: usize, rate: Option<f64>) -> Run {
        let times = self.folder.path().join("times");
        let (first, users) = (self.posted.to_string(), self.users.to_string());
        let (count_text, rate) = (count.to_string(), rate.map(|rate| rate.to_string()));
        let mut arguments =
            vec!["load", &self.host, &users, &first, &count_text, times.to_str().expect("a plain path")];
        arguments.extend(rate.as_deref());
        let before = self.stats().await;
        let cpu = self.cpu_us();
        let load = own(&arguments, |command| {
            command.stdout(Stdio::piped());
        });
        let output = tokio::task::spawn_blocking(|| load.wait_with_output()).await.expect("it waits").expect("it ends");
        let load: Value = serde_json::from_slice(&output.stdout).expect("the load's result");
        assert_eq!(load["failures"], 0, "{load}");
        let first = self.posted;
        self.posted += count;
        let mut seen = (0, std::time::Instant::now());
        let stats = loop {
            let stats = self.stats().await;
            if stats.distinct >= self.posted as u64 || seen.1.elapsed() > Duration::from_secs(20) {
                break stats;
            }
            if stats.distinct > seen.0 {
                seen = (stats.distinct, std::time::Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let cpu_us = self.cpu_us() - cpu;
        Run {
            load,
            cpu_us,
            sent_us: words(&fs::read(&times).expect("the load left it")),
            arrived_us: words(&get(&format!("{}arrivals", self.api_url)).await).split_off(first),
            distinct: stats.distinct - before.distinct,
            posts: stats.posts - before.posts,
            last_us: stats.last_us,
        }
    }

    async fn stats(&self) -> Stats {
        serde_json::from_slice(&get(&self.api_url).await).expect("the API's counts")
    }

    /// User and system time of the program under test.
    fn cpu_us(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.program.id())).expect("it runs");
        // The name, in parentheses, may hold anything; user and system time are the 12th and 13th word after it, in 10 ms.
        let words: Vec<_> = stat.rsplit_once(") ").expect("a name").1.split(' ').collect();
        let ticks = |at: usize| words[at].parse::<u64>().expect("a number");
        (ticks(11) + ticks(12)) * 10_000
    }

    fn memory_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.program.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux says");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
    }
}

#[derive(serde::Deserialize)]
struct Stats {
    distinct: u64,
    posts: u64,
    last_us: u64,
}

/// What came of posting some records.
struct Run {
    load: Value,
    cpu_us: u64,
    sent_us: Vec<u64>,
    arrived_us: Vec<u64>,
    distinct: u64,
    posts: u64,
    last_us: u64,
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

async fn get(url: &str) -> Vec<u8> {
    let client = awc::Client::default();
    eventually(url, PATIENCE, async || {
        let mut answer = client.get(url).send().await.ok().filter(|answer| answer.status().is_success())?;
        Some(answer.body().limit(64 << 20).await.ok()?.to_vec())
    })
    .await
}

#[expect(clippy::cast_precision_loss, reason = "times and counts of a short run")]
async fn measure(
    program: Program,
    lane: &str,
    variables: &[(String, String)],
    records: usize,
    users: usize,
    rate: Option<f64>,
) -> Measured {
    let mut stage = Stage::new(program, lane, variables, users).await;
    stage.post(WARM_UP, None).await;
    let peak = stage.post(records, None).await;
    let first = peak.sent_us.iter().min().copied().unwrap_or_default();
    let end_to_end_per_s = peak.distinct as f64 * 1e6 / (peak.last_us - first) as f64;
    // As long as the other one took at its peak.
    let steady = stage.post(records / 2, Some(rate.unwrap_or(end_to_end_per_s / 2.0))).await;
    let mut delivery: Vec<_> = std::iter::zip(&steady.sent_us, &steady.arrived_us)
        .filter(|(_, arrived)| **arrived > 0)
        .map(|(sent, arrived)| arrived.saturating_sub(*sent) as f64 / 1000.0)
        .collect();
    delivery.sort_by(f64::total_cmp);
    let quantile = |part: f64| table::quantile(&delivery, part);
    let latency = |name: &str| steady.load["latency_ms"][name].as_f64().expect("a latency");
    Measured {
        ingest_per_s: peak.load["requests_per_s"].as_f64().expect("a rate"),
        end_to_end_per_s,
        cpu_us_per_record: peak.cpu_us as f64 / records as f64,
        memory_mib: stage.memory_mib(),
        lost: (records + records / 2) as u64 - peak.distinct - steady.distinct,
        duplicated: peak.posts + steady.posts - peak.distinct - steady.distinct,
        ingest_ms: ["p50", "p99", "p99.9"].map(latency),
        delivery_ms: [0.5, 0.99, 0.999].map(quantile),
        rate_cpu_us_per_record: steady.cpu_us as f64 / (records / 2) as f64,
    }
}
