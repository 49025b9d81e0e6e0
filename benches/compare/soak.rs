//! A soak: one node at half its peak for an hour, watched for memory, descriptors and latencies
//! that grow. The machine changes within an hour too: in the last minutes the node takes turns with
//! a new one, and a slowdown that both show is the machine's.

use std::time::Duration;

use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::time::sleep;

use super::{
    stage::{Footprint, Side, Stage, WARM_UP},
    table,
};

/// Records that measure the peak.
const PEAK_RECORDS: usize = 200_000;
/// Length of the first and of the last part that are compared, in minutes.
const END: usize = 10;
/// Parts of a minute, in which two nodes take turns.
const TURNS: u64 = 6;
const TURN: Duration = Duration::from_secs(60 / TURNS);

#[derive(Args)]
pub struct Plan {
    /// One of grpc, nats, rabbitmq, pubsub
    #[arg(long, default_value = "grpc")]
    pub lane: String,
    /// Length of the load in minutes. The first ten are compared with the last ten (or half with
    /// half), and the last ten with a new node that takes turns
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(2..))]
    minutes: u32,
    /// Records per second, at least one, instead of half the peak
    #[arg(long)]
    rate: Option<f64>,
    /// Concurrent clients
    #[arg(long, default_value_t = 64)]
    users: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Latencies from when a request was due, in µs.
type Latencies = Histogram<u64>;

fn latencies(deliveries_us: &[u64]) -> Latencies {
    let mut latencies = Latencies::new(3).expect("three digits are allowed");
    for latency_us in deliveries_us {
        latencies.record(*latency_us).expect("it grows");
    }
    latencies
}

#[expect(clippy::cast_precision_loss, reason = "latencies of some ms")]
fn ms(latencies: &Latencies, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1000.0
}

/// The slope of a line through the memory of each turn (least squares), in MiB per hour of turns.
#[expect(clippy::cast_precision_loss, reason = "some hundred turns")]
fn slope_mib_per_hour(footprints: &[Footprint]) -> f64 {
    let count = footprints.len() as f64;
    let hours = |turn: usize| turn as f64 * TURN.as_secs_f64() / 3600.0;
    let (mean_hour, mean_mib) =
        footprints
            .iter()
            .enumerate()
            .fold((0.0, 0.0), |(hour, mib), (turn, footprint)| {
                (
                    hour + hours(turn) / count,
                    mib + footprint.memory_mib / count,
                )
            });
    let (together, alone) =
        footprints
            .iter()
            .enumerate()
            .fold((0.0, 0.0), |(together, alone), (turn, footprint)| {
                let off = hours(turn) - mean_hour;
                (
                    together + off * (footprint.memory_mib - mean_mib),
                    alone + off * off,
                )
            });
    together / alone
}

/// The delivery latencies of a minute.
struct Minute {
    all: Latencies,
    /// p99 of each second, in ms.
    seconds_p99: Vec<f64>,
}

/// A node and its measurements.
struct Node {
    stage: Stage,
    minutes: Vec<Minute>,
    /// Footprint in the middle of each turn.
    footprints: Vec<Footprint>,
}

impl Node {
    /// Starts a node on the lane of `variables`. Returns it and its peak, in records per second.
    async fn start(plan: &Plan, variables: &[(String, String)]) -> (Self, f64) {
        let mut stage = Stage::new(&Side::waypost(), &plan.lane, variables, plan.users).await;
        stage.post(WARM_UP, None).await;
        let records = if plan.rate.is_some() {
            WARM_UP
        } else {
            PEAK_RECORDS
        };
        let peak = stage.post(records, None).await.end_to_end_per_s();
        (
            Self {
                stage,
                minutes: Vec::new(),
                footprints: Vec::new(),
            },
            peak,
        )
    }

    /// Posts the records of one turn. Returns once the API has them all.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "records of a turn"
    )]
    async fn turn(&mut self, rate: f64) -> Minute {
        self.stage.forget().await;
        let watch = self.stage.watch();
        let middle = async {
            sleep(TURN / 2).await;
            watch.footprint()
        };
        let (run, footprint) = tokio::join!(
            self.stage
                .post((rate * TURN.as_secs_f64()) as usize, Some(rate)),
            middle
        );
        self.footprints.push(footprint);
        let deliveries_us: Vec<_> = run.deliveries_us().collect();
        // Records fall due in this order.
        let seconds = deliveries_us.chunks(rate.ceil() as usize).map(latencies);
        Minute {
            all: latencies(&deliveries_us),
            seconds_p99: seconds.map(|second| ms(&second, 0.99)).collect(),
        }
    }

    /// Figures of the latest minute.
    fn told(&self) -> String {
        let [p50, p99, median_second] = figures(&self.minutes[self.minutes.len() - 1..]);
        let Footprint {
            memory_mib,
            descriptors,
        } = self.footprints[self.footprints.len() - 1];
        format!(
            "p50 {p50:.2} ms, p99 {p99:.2} ms, that of the median second {median_second:.2} ms, \
             {memory_mib:.1} MiB, {descriptors} descriptors"
        )
    }
}

/// Has each node post the records of a minute. They take turns, and each is as often the first.
async fn minute(nodes: &mut [&mut Node], rate: f64) {
    for node in &mut *nodes {
        node.minutes.push(Minute {
            all: latencies(&[]),
            seconds_p99: Vec::new(),
        });
    }
    for _ in 0..TURNS {
        for node in &mut *nodes {
            let Minute { all, seconds_p99 } = node.turn(rate).await;
            let minute = node.minutes.last_mut().expect("it has just begun");
            minute.all.add(all).expect("it grows");
            minute.seconds_p99.extend(seconds_p99);
        }
        nodes.reverse();
    }
}

/// The compared latencies in ms: p50, p99, and p99 of the median second. The last one ignores
/// stalls in less than half of the seconds, such as those of a shared machine; a node's own rare
/// stalls show in p99 only.
const FIGURES: [&str; 3] = ["p50", "p99", "p99_median_second"];

fn figures(minutes: &[Minute]) -> [f64; 3] {
    let mut all = latencies(&[]);
    for minute in minutes {
        all.add(&minute.all).expect("it grows");
    }
    let seconds = minutes
        .iter()
        .flat_map(|minute| minute.seconds_p99.iter().copied())
        .collect();
    [ms(&all, 0.5), ms(&all, 0.99), table::median(seconds)]
}

/// The result: figures of the first and the last minutes of the old node, and of the new node.
struct Report {
    rate: f64,
    /// Length of the compared parts, in minutes.
    end: usize,
    compared: [(&'static str, [f64; 3]); FIGURES.len()],
    memory_mib_per_hour: f64,
    /// The least and the most.
    descriptors: [usize; 2],
    lost: u64,
    duplicated: u64,
}

/// Loads the old node alone, then in turns with a new one. Each has its own stream, queue or
/// subscription from `variables`, so neither gets the other's records.
pub async fn run(plan: &Plan, mut variables: impl FnMut() -> Vec<(String, String)>) {
    let (mut old, peak) = Node::start(plan, &variables()).await;
    let rate = plan.rate.unwrap_or(peak / 2.0);
    assert!(rate >= 1.0, "a rate of {rate} a second is too low");
    eprintln!(
        "{}: {rate:.0} records/s for {} minutes",
        plan.lane, plan.minutes
    );

    let minutes = plan.minutes as usize;
    let end = END.min(minutes / 2);
    for at in 1..=minutes - end {
        minute(&mut [&mut old], rate).await;
        eprintln!("minute {at}: {}", old.told());
    }
    let (mut new, _) = Node::start(plan, &variables()).await;
    for at in minutes - end + 1..=minutes {
        minute(&mut [&mut old, &mut new], rate).await;
        eprintln!("minute {at}: {}\n  a new node: {}", old.told(), new.told());
    }
    let report = Report::new(rate, end, &old, &new).await;
    if plan.json {
        println!("{}", report.json(plan));
    } else {
        report.print();
    }
}

impl Report {
    async fn new(rate: f64, end: usize, old: &Node, new: &Node) -> Self {
        let mut lost = 0;
        let mut duplicated = 0;
        for node in [old, new] {
            let [missing, again] = node.stage.lost_and_duplicated().await;
            lost += missing;
            duplicated += again;
        }
        let end_began = old.minutes.len() - end;
        let parts = [&old.minutes[..end], &old.minutes[end_began..], &new.minutes].map(figures);
        let descriptors = old.footprints.iter().map(|footprint| footprint.descriptors);
        let descriptors = [descriptors.clone().min(), descriptors.max()];
        Self {
            rate,
            end,
            compared: std::array::from_fn(|at| (FIGURES[at], parts.map(|part| part[at]))),
            memory_mib_per_hour: slope_mib_per_hour(&old.footprints),
            descriptors: descriptors.map(Option::unwrap_or_default),
            lost,
            duplicated,
        }
    }

    fn json(&self, plan: &Plan) -> Value {
        let named = |(figure, [first, last, new]): (&str, [f64; 3])| {
            (
                figure.to_owned(),
                json!({"first": first, "last": last, "new": new}),
            )
        };
        json!({
            "lane": plan.lane,
            "rate": self.rate,
            "minutes": plan.minutes,
            "memory_mib_per_hour": self.memory_mib_per_hour,
            "descriptors": self.descriptors,
            "delivery_ms": self.compared.into_iter().map(named).collect::<Map<_, _>>(),
            "lost": self.lost,
            "duplicated": self.duplicated,
        })
    }

    fn print(&self) {
        let head = format!("delivery in ms, {} minutes", self.end);
        println!(
            "\n{head:<30} {:>12} {:>12} {:>8} {:>12} {:>8}",
            "first", "last", "ratio", "a new node", "last/new"
        );
        for (figure, [first, last, new]) in self.compared {
            println!(
                "{figure:<30} {first:>12.2} {last:>12.2} {:>8.2} {new:>12.2} {:>8.2}",
                last / first,
                last / new
            );
        }
        println!(
            "{:<30} {:>12.2}",
            "memory MiB/hour", self.memory_mib_per_hour
        );
        let [least, most] = self.descriptors;
        println!(
            "{:<30} {least:>12} {most:>12}",
            "descriptors, least and most"
        );
        println!("{:<30} {:>12}", "lost", self.lost);
        println!("{:<30} {:>12}", "duplicated", self.duplicated);
    }
}
