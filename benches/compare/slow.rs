//! Slow lanes among four: p99 of delivery with each policy, beside a node without those lanes; and
//! how soon a lane that is well again has its share back.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;
use tokio::time::sleep;

use super::{
    stage::{Side, Stage, StatusReader, WARM_UP},
    support::{
        lanes::through_proxy,
        proxy::{Flow, Network, Proxy},
    },
    table,
};

/// A share is counted over this long.
const SHARE_WINDOW: Duration = Duration::from_secs(1);
/// A lane has its share back with this part of it.
const MOST_OF_IT: f64 = 0.8;
/// Seconds of load before a measurement, so that the node knows its lanes.
const SETTLE_S: f64 = 5.0;
/// Seconds of load after the lanes are well again.
const RECOVERY_S: f64 = 20.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SlowLane {
    Nats,
    Rabbitmq,
}

#[derive(Args)]
pub struct Plan {
    /// The lanes that are slow, separated by commas
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "nats,rabbitmq"
    )]
    slow: Vec<SlowLane>,
    /// The delay of all that their brokers send, in milliseconds
    #[arg(long, default_value_t = 200)]
    delay_ms: u64,
    /// Records per second
    #[arg(long, default_value_t = 1000.0)]
    rate: f64,
    /// Records of each measurement
    #[arg(long, default_value_t = 20_000)]
    records: usize,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Concurrent clients
    #[arg(long, default_value_t = 64)]
    users: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Names and values of variables.
type Variables = Vec<(String, String)>;

/// The lanes of a node: streams, queues and subscriptions of its own.
pub struct FourLanes {
    pub nats: Variables,
    pub rabbitmq: Variables,
    /// gRPC and Pub/Sub.
    pub others: Variables,
}

/// One round, in milliseconds from when a record was due to when the API had it.
#[derive(Debug, Serialize)]
struct SlowRound {
    /// `adaptive` on a node that does not have the slow lanes.
    without_p99_ms: f64,
    adaptive_p99_ms: f64,
    round_robin_p99_ms: f64,
    /// Of the slow lanes together, with `adaptive`.
    share_before: f64,
    share_slow: f64,
    /// Seconds until they have most of their share back; null if that takes longer than the load.
    back_after_s: Option<f64>,
    lost: u64,
    duplicated: u64,
}

impl SlowLane {
    fn name(self) -> &'static str {
        match self {
            Self::Nats => "nats",
            Self::Rabbitmq => "rabbitmq",
        }
    }

    fn of(self, lanes: &mut FourLanes) -> &mut Variables {
        match self {
            Self::Nats => &mut lanes.nats,
            Self::Rabbitmq => &mut lanes.rabbitmq,
        }
    }
}

/// The records that the slow lanes and all lanes have taken so far.
#[derive(Clone, Copy)]
struct Taken {
    slow: f64,
    all: f64,
}

impl Taken {
    async fn now(status: &StatusReader, plan: &Plan) -> Self {
        let status = status.read().await;
        let lanes = status["lanes"].as_array().expect("a list of lanes");
        let sum = |counts: &dyn Fn(&Value) -> bool| {
            let taken = lanes.iter().filter(|lane| counts(lane));
            taken
                .map(|lane| lane["accepted"].as_f64().expect("a count"))
                .sum()
        };
        let is_slow = |lane: &Value| plan.slow.iter().any(|slow| lane["lane"] == slow.name());
        Self {
            slow: sum(&is_slow),
            all: sum(&|_| true),
        }
    }

    /// The share of the slow lanes since `earlier`; 0 if nothing was taken.
    fn share_since(self, earlier: Self) -> f64 {
        (self.slow - earlier.slow) / (self.all - earlier.all).max(1.0)
    }
}

/// A node, with a proxy before each lane that is to be slow.
struct Contestant<'p> {
    plan: &'p Plan,
    stage: Stage,
    proxies: Vec<Proxy>,
}

impl<'p> Contestant<'p> {
    /// `has_slow`: the node has the lanes that are to be slow.
    async fn start(
        plan: &'p Plan,
        policy: &'static [(&'static str, &'static str)],
        has_slow: bool,
        mut lanes: FourLanes,
    ) -> Self {
        let mut proxies = Vec::new();
        for slow in &plan.slow {
            let variables = slow.of(&mut lanes);
            if has_slow {
                let (proxy, behind) = through_proxy(std::mem::take(variables));
                proxies.push(proxy);
                *variables = behind;
            } else {
                variables.clear();
            }
        }
        let side = Side {
            variables: policy,
            ..Side::waypost()
        };
        let variables = [lanes.others, lanes.nats, lanes.rabbitmq].concat();
        let mut stage = Stage::new(&side, "all", &variables, plan.users).await;
        let count = if has_slow { 4 } else { 4 - plan.slow.len() };
        stage.lanes_are(count, "up").await;
        stage.post(WARM_UP, None).await;
        let mut contestant = Self {
            plan,
            stage,
            proxies,
        };
        contestant.post_for(SETTLE_S).await;
        contestant
    }

    fn set(&self, network: Network) {
        for proxy in &self.proxies {
            proxy.set(network);
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "records of some seconds"
    )]
    async fn post_for(&mut self, seconds: f64) {
        let records = (self.plan.rate * seconds) as usize;
        self.stage.post(records, Some(self.plan.rate)).await;
    }

    async fn slow_down(&mut self) {
        let delay = Duration::from_millis(self.plan.delay_ms);
        self.set(Network {
            to_client: Flow::Delays(delay),
            ..Network::WELL
        });
        self.post_for(SETTLE_S).await;
    }

    /// p99 in milliseconds, and the share of the slow lanes.
    #[expect(clippy::cast_precision_loss, reason = "times of a short run")]
    async fn measure(&mut self) -> (f64, f64) {
        let status = self.stage.status_reader();
        let before = Taken::now(&status, self.plan).await;
        let run = self
            .stage
            .post(self.plan.records, Some(self.plan.rate))
            .await;
        let share = Taken::now(&status, self.plan).await.share_since(before);
        let mut delivery: Vec<_> = run.deliveries_us().map(|us| us as f64 / 1000.0).collect();
        delivery.sort_by(f64::total_cmp);
        (table::quantile(&delivery, 0.99), share)
    }

    /// Makes the lanes well under load. Returns after how many seconds they have taken most of
    /// `share` for a while.
    async fn recover(&mut self, share: f64) -> Option<f64> {
        let status = self.stage.status_reader();
        let plan = self.plan;
        let has_ended = Cell::new(false);
        self.set(Network::WELL);
        let began = Instant::now();
        let load = async {
            self.post_for(RECOVERY_S).await;
            has_ended.set(true);
        };
        let watch = async {
            while !has_ended.get() {
                let before = Taken::now(&status, plan).await;
                sleep(SHARE_WINDOW).await;
                let now = Taken::now(&status, plan).await;
                if now.share_since(before) >= MOST_OF_IT * share {
                    return Some(began.elapsed().as_secs_f64());
                }
            }
            None
        };
        tokio::join!(load, watch).1
    }
}

/// `lanes` makes new streams, queues and subscriptions.
pub async fn run(plan: &Plan, mut lanes: impl FnMut() -> FourLanes) {
    const ADAPTIVE: &[(&str, &str)] = &[("ROUTER__POLICY", "adaptive")];
    let mut rounds = Vec::new();
    for number in 1..=plan.rounds {
        let mut without = Contestant::start(plan, ADAPTIVE, false, lanes()).await;
        let (without_p99_ms, _) = without.measure().await;
        drop(without);

        let mut adaptive = Contestant::start(plan, ADAPTIVE, true, lanes()).await;
        let (_, share_before) = adaptive.measure().await;
        adaptive.slow_down().await;
        let (adaptive_p99_ms, share_slow) = adaptive.measure().await;
        let back_after_s = adaptive.recover(share_before).await;
        let [lost, duplicated] = adaptive.stage.lost_and_duplicated().await;
        drop(adaptive);

        let policy = &[("ROUTER__POLICY", "round-robin")];
        let mut round_robin = Contestant::start(plan, policy, true, lanes()).await;
        round_robin.slow_down().await;
        let (round_robin_p99_ms, _) = round_robin.measure().await;
        rounds.push(SlowRound {
            without_p99_ms,
            adaptive_p99_ms,
            round_robin_p99_ms,
            share_before,
            share_slow,
            back_after_s,
            lost,
            duplicated,
        });
        eprintln!("slow lanes: round {number} of {}", plan.rounds);
    }
    if plan.json {
        println!("{}", serde_json::to_string(&rounds).expect("numbers"));
    } else {
        print(plan, &rounds);
    }
}

fn print(plan: &Plan, rounds: &[SlowRound]) {
    let median =
        |figure: &dyn Fn(&SlowRound) -> f64| table::median(rounds.iter().map(figure).collect());
    let slow: Vec<_> = plan.slow.iter().map(|lane| lane.name()).collect();
    println!(
        "\n{} of four lanes slower by {} ms: {}; {} records/s",
        slow.len(),
        plan.delay_ms,
        slow.join(", "),
        plan.rate
    );
    println!("{:<36} {:>10} {:>8}", "p99 of delivery", "ms", "ratio");
    let line = |name: &str, figure: fn(&SlowRound) -> f64| {
        let ratio = median(&|round| figure(round) / round.without_p99_ms);
        println!("{name:<36} {:>10.2} {ratio:>8.2}", median(&figure));
    };
    line("adaptive, without the slow lanes", |round| {
        round.without_p99_ms
    });
    line("adaptive", |round| round.adaptive_p99_ms);
    line("round-robin", |round| round.round_robin_p99_ms);
    let share = |name: &str, figure: fn(&SlowRound) -> f64| {
        println!("{name:<36} {:>10.3}", median(&figure));
    };
    share("their share before", |round| round.share_before);
    share("their share while slow", |round| round.share_slow);
    share("most of it back after s", |round| {
        round.back_after_s.unwrap_or(f64::INFINITY)
    });
    let sum = |count: fn(&SlowRound) -> u64| rounds.iter().map(count).sum::<u64>();
    println!("{:<36} {:>10}", "lost", sum(|round| round.lost));
    println!("{:<36} {:>10}", "duplicated", sum(|round| round.duplicated));
}
