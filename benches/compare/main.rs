//! Compares Waypost with its floors, and with itself, lane by lane, in one run. For the options:
//! `cargo bench --bench compare -- --help`.
//!
//! Broker, API, load and the program under test are separate processes. The two sides of a case
//! take turns, round by round, on the same broker. The result is the median over the rounds of the
//! ratio within a round. CPU is user and system time of the program under test alone.

mod api;
mod door;
mod floor;
mod idle;
mod load;
mod neighbour;
mod page;
mod slow;
mod soak;
mod stage;
#[allow(dead_code, unused_imports, reason = "the tests need the rest")]
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;
mod waiting;

use std::{net::SocketAddr, num::ParseIntError, path::PathBuf, str::FromStr};

use clap::{Parser, Subcommand, ValueEnum};
use door::Door;
use neighbour::SecondApi;
use serde::Serialize;
use stage::{Measured, Program, Side};
use support::{
    lanes::{Lane as _, Nats, Pubsub, Rabbitmq, grpc_variables},
    rig::Rig as _,
};

/// No copies on disk, as the floors have none.
const ACK_LANE: (&str, &str) = ("INGEST__ACK", "lane");
/// Records per request and per POST of the batch cases.
const BATCH: usize = 100;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    /// Lanes, separated by commas: none, grpc, nats, rabbitmq, pubsub
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "none,grpc,nats,rabbitmq,pubsub"
    )]
    lanes: Vec<String>,
    /// Cases to run on each lane, separated by commas
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "floor,batch,bundle,durable,disk"
    )]
    cases: Vec<Case>,
    /// Another build of Waypost to compare with, as FILE or BUNDLE:FILE; may be given again
    #[arg(long, value_name = "[BUNDLE:]FILE")]
    beside: Vec<Beside>,
    /// Rounds; in each, both sides of a case run once
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Records per round, as a multiple of the lane's default
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Concurrent clients
    #[arg(long, default_value_t = 64)]
    users: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write a page of charts here
    #[arg(long, value_name = "FILE")]
    page: Option<PathBuf>,
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Waypost against the barest program for the lane
    Floor,
    /// A hundred records per request and per POST against one
    Batch,
    /// The same with up to 128 records per message
    Bundle,
    /// `ack = "durable"` against `ack = "lane"`
    Durable,
    /// `ack = "disk"` against `ack = "lane"`
    Disk,
    /// `ack = "lane"` against itself: how far the ratios scatter
    Control,
    /// 1 % of the records traced against none
    Traces,
    /// Clients that need one of a thousand tokens against none
    Tokens,
    /// TLS against none, over connections that are kept
    Tls,
    /// A healthy API with one that hangs and gets 1,000 records a second, against it alone
    Apis,
    /// The same, but the second one answers: what its records cost anyway
    BothApis,
    /// A healthy API with one that hangs, against it with one that answers; both get as many records
    DeadApi,
}

/// A program to compare with: `FILE`, or `BUNDLE:FILE` to run this build with that `bundle`.
#[derive(Clone, Debug)]
struct Beside {
    program: PathBuf,
    bundle: Option<u8>,
}

impl FromStr for Beside {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (bundle, program) = match text.split_once(':') {
            Some((bundle, program)) => (Some(bundle.parse()?), program),
            None => (None, text),
        };
        Ok(Self {
            program: program.into(),
            bundle,
        })
    }
}

impl Beside {
    fn sides(&self) -> [Side; 2] {
        let other = Side {
            name: "other build".into(),
            program: Program::OtherWaypost(self.program.clone()),
            variables: &[ACK_LANE],
            ..Side::waypost()
        };
        let name = match self.bundle {
            Some(bundle) => format!("bundle {bundle}"),
            None => "waypost".into(),
        };
        let waypost = Side {
            name,
            bundle: self.bundle,
            variables: &[ACK_LANE],
            ..Side::waypost()
        };
        [other, waypost]
    }
}

impl Case {
    fn sides(self) -> [Side; 2] {
        let waypost = Side {
            variables: &[ACK_LANE],
            ..Side::waypost()
        };
        let named = |name: &str| Side {
            name: name.into(),
            ..waypost.clone()
        };
        let batches = |name: &str| Side {
            batch: BATCH,
            variables: &[("API__BATCH", "100"), ACK_LANE],
            ..named(name)
        };
        match self {
            Self::Floor => {
                let floor = Side {
                    program: Program::Floor,
                    ..named("floor")
                };
                [floor, waypost.clone()]
            }
            Self::Batch => [named("single"), batches("batches")],
            Self::Bundle => {
                let bundles = Side {
                    bundle: Some(128),
                    ..batches("bundles")
                };
                [named("single"), bundles]
            }
            Self::Durable => {
                let durable = Side {
                    variables: &[("INGEST__ACK", "durable")],
                    ..named("ack durable")
                };
                [named("ack lane"), durable]
            }
            Self::Disk => {
                let disk = Side {
                    variables: &[("INGEST__ACK", "disk")],
                    ..named("ack disk")
                };
                [named("ack lane"), disk]
            }
            Self::Apis | Self::BothApis | Self::DeadApi => {
                let alone = |second_api| Side {
                    second_api: Some(second_api),
                    ..named("healthy API alone")
                };
                let beside = |second_api| Side {
                    name: match second_api {
                        SecondApi::Hangs => "with a dead neighbour".into(),
                        SecondApi::Answers => "with a healthy neighbour".into(),
                    },
                    has_neighbour: true,
                    ..alone(second_api)
                };
                match self {
                    Self::DeadApi => [beside(SecondApi::Answers), beside(SecondApi::Hangs)],
                    Self::Apis => [alone(SecondApi::Hangs), beside(SecondApi::Hangs)],
                    _ => [alone(SecondApi::Answers), beside(SecondApi::Answers)],
                }
            }
            Self::Traces => {
                let traces = Side {
                    traced: Some("0.01"),
                    ..named("1 % traces")
                };
                [named("no traces"), traces]
            }
            Self::Tokens => {
                let tokens = Side {
                    door: Some(Door::Token),
                    ..named("tokens")
                };
                [named("no tokens"), tokens]
            }
            Self::Tls => {
                let tls = Side {
                    door: Some(Door::Tls),
                    ..named("TLS")
                };
                [named("no TLS"), tls]
            }
            Self::Control => [named("ack lane"), named("ack lane again")],
        }
    }
}

/// The role of a process of the benchmark, other than the one that compares.
#[derive(Subcommand)]
enum Role {
    /// One node at half its peak for an hour: memory, descriptors and latencies that grow
    Soak(soak::Plan),
    /// Ten million waiting records, in the spool or in the broker, against ten thousand
    Waiting(waiting::Plan),
    /// An idle node with all four lanes up
    Idle(idle::Plan),
    /// One or two of four lanes slow, with `adaptive` and with `round-robin`
    Slow(slow::Plan),
    #[command(hide = true)]
    Floor { lane: String, listen: SocketAddr },
    #[command(hide = true)]
    Api { listen: SocketAddr },
    #[command(hide = true)]
    Load(load::Options),
}

/// The measurements of both sides of a case in one round.
#[derive(Debug, Serialize)]
pub struct Round {
    /// Rate of the latency measurement, in records per second.
    rate: f64,
    base: Measured,
    other: Measured,
}

impl Round {
    /// Measures both sides, at `rate` or at half the peak of `base`.
    async fn measure(
        base: &Side,
        other: &Side,
        is_base_first: bool,
        rate: Option<f64>,
        mut measure: impl AsyncFnMut(&Side, Option<f64>) -> Measured,
    ) -> Self {
        let early = if is_base_first {
            Some(measure(base, rate).await)
        } else {
            None
        };
        let rate = rate.or_else(|| Some(early.as_ref()?.end_to_end_per_s / 2.0));
        let other = measure(other, rate).await;
        let base = match early {
            Some(base) => base,
            None => measure(base, rate).await,
        };
        Self {
            rate: rate.unwrap_or_default(),
            base,
            other,
        }
    }
}

/// All rounds of a case on a lane.
#[derive(Debug, Serialize)]
pub struct Contest {
    lane: String,
    base: String,
    other: String,
    rounds: Vec<Round>,
}

fn main() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .expect("no other was installed");
    let cli = Cli::parse();
    match &cli.role {
        Some(Role::Soak(plan)) => on_actors(on_broker(&plan.lane, async |variables| {
            soak::run(plan, variables).await;
        })),
        Some(Role::Waiting(plan)) => {
            on_actors(on_broker(&plan.lane, async |variables| {
                waiting::run(plan, &variables()).await;
            }));
        }
        Some(Role::Idle(plan)) => on_actors(idle(plan)),
        Some(Role::Slow(plan)) => on_actors(slow(plan)),
        Some(Role::Floor { lane, listen }) => on_actors(floor::run(lane, *listen)),
        Some(Role::Api { listen }) => on_actors(api::run(*listen)),
        Some(Role::Load(options)) => on_actors(load::run(options)),
        None => on_actors(compare(&cli)),
    }
}

fn on_actors(work: impl Future<Output = ()>) {
    actix_rt::System::new().block_on(work);
}

const MISSING: &str = "the broker can be had";

/// Starts the broker of a lane. Each call of the argument of `work` returns the variables of a new
/// stream, queue or subscription.
async fn on_broker(lane: &str, work: impl AsyncFnOnce(&mut dyn FnMut() -> Vec<(String, String)>)) {
    match lane {
        "grpc" => work(&mut grpc_variables).await,
        "nats" => {
            let mut nats = Nats::start().await.expect(MISSING);
            work(&mut || nats.variables()).await;
        }
        "rabbitmq" => {
            let mut rabbitmq = Rabbitmq::start().await.expect(MISSING);
            work(&mut || rabbitmq.variables()).await;
        }
        "pubsub" => {
            let mut pubsub = Pubsub::start().await.expect(MISSING);
            work(&mut || pubsub.variables()).await;
        }
        lane => panic!("there is no lane {lane}"),
    }
}

async fn idle(plan: &idle::Plan) {
    let mut nats = Nats::start().await.expect(MISSING);
    let mut rabbitmq = Rabbitmq::start().await.expect(MISSING);
    let mut pubsub = Pubsub::start().await.expect(MISSING);
    let lanes = [
        grpc_variables(),
        nats.variables(),
        rabbitmq.variables(),
        pubsub.variables(),
    ];
    idle::run(plan, &lanes.concat()).await;
}

async fn slow(plan: &slow::Plan) {
    let mut nats = Nats::start().await.expect(MISSING);
    let mut rabbitmq = Rabbitmq::start().await.expect(MISSING);
    let mut pubsub = Pubsub::start().await.expect(MISSING);
    let lanes = || slow::FourLanes {
        nats: nats.variables(),
        rabbitmq: rabbitmq.variables(),
        others: [grpc_variables(), pubsub.variables()].concat(),
    };
    slow::run(plan, lanes).await;
}

async fn compare(cli: &Cli) {
    let mut contests = Vec::new();
    for lane in &cli.lanes {
        contests.extend(match &**lane {
            // Waypost uses its gRPC lane here.
            "none" => on_lane(cli, lane, &[Case::Floor], 60_000, Vec::new).await,
            "grpc" => on_lane(cli, lane, &cli.cases, 60_000, grpc_variables).await,
            "nats" => {
                let Some(mut nats) = Nats::start().await else {
                    continue;
                };
                on_lane(cli, lane, &cli.cases, 60_000, || nats.variables()).await
            }
            "rabbitmq" => {
                let Some(mut rabbitmq) = Rabbitmq::start().await else {
                    continue;
                };
                on_lane(cli, lane, &cli.cases, 20_000, || rabbitmq.variables()).await
            }
            "pubsub" => {
                let Some(mut pubsub) = Pubsub::start().await else {
                    continue;
                };
                on_lane(cli, lane, &cli.cases, 10_000, || pubsub.variables()).await
            }
            lane => panic!("there is no lane {lane}"),
        });
    }
    if let Some(path) = &cli.page {
        std::fs::write(path, page::html(&contests)).expect("the page can be written");
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a few 10,000"
)]
async fn on_lane(
    cli: &Cli,
    lane: &str,
    cases: &[Case],
    usual: usize,
    mut variables: impl FnMut() -> Vec<(String, String)>,
) -> Vec<Contest> {
    let records = ((usual as f64 * cli.scale) as usize)
        .max(1000)
        .next_multiple_of(2 * BATCH);
    let mut contests = Vec::new();
    let contests_of_cases = cases
        .iter()
        .filter(|case| cli.cases.contains(case))
        .map(|case| case.sides());
    let all_sides = contests_of_cases.chain(cli.beside.iter().map(Beside::sides));
    for [base, other] in all_sides {
        let mut contest = Contest {
            lane: lane.into(),
            base: base.name.clone(),
            other: other.name.clone(),
            rounds: Vec::new(),
        };
        for number in 0..cli.rounds {
            // The first base sets the rate of all sides.
            let rate = contest.rounds.first().map(|round| round.rate);
            let measure = async |side: &Side, rate| {
                side.measure(lane, &variables(), records, cli.users, rate)
                    .await
            };
            let is_base_first = number % 2 == 0;
            let round = Round::measure(&base, &other, is_base_first, rate, measure).await;
            contest.rounds.push(round);
            eprintln!(
                "{lane}, {} against {}: round {} of {}",
                contest.other,
                contest.base,
                number + 1,
                cli.rounds
            );
        }
        if cli.json {
            println!(
                "{}",
                serde_json::to_string(&contest).expect("numbers and names")
            );
        } else {
            table::print(&contest);
        }
        contests.push(contest);
    }
    contests
}
