//! A soak: one node at half its peak for an hour, watched for what creeps. An hour changes the machine too: in the
//! last minutes the node takes turns with one that has just started, and what is as slow with the new one does not come of age.

use std::{cell::RefCell, rc::Rc, time::Duration};

use clap::Args;
use hdrhistogram::Histogram;
use serde_json::json;
use tokio::time::Instant;

use super::{
    stage::{Footprint, Side, Stage, WARM_UP},
    table,
};

/// Records by which the peak is found.
const PEAK_RECORDS: usize = 200_000;
/// What is compared at the two ends, in minutes.
const END: usize = 10;
/// A minute is posted in so many parts, so that two nodes take turns within it.
const TURNS: usize = 6;
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct Plan {
    /// One of grpc, nats, rabbitmq, pubsub
    #[arg(long, default_value = "grpc")]
    pub lane: String,
    /// How long; the first ten minutes are compared with the last ten, or half with half, and these with as many of a new node,
    /// which takes turns with the old one
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(2..))]
    minutes: u32,
    /// Records a second, instead of half the peak
    #[arg(long)]
    rate: Option<f64>,
    /// Clients that post at the same time
    #[arg(long, default_value_t = 64)]
    users: usize,
    /// Print what was measured as JSON
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

/// What a straight line through the samples, by least squares, rises in an hour, in MiB.
#[expect(clippy::cast_precision_loss, reason = "some hundred samples")]
fn slope_mib_per_hour(samples: &[(Instant, Footprint)]) -> f64 {
    let count = samples.len() as f64;
    let hours = |at: &Instant| at.duration_since(samples[0].0).as_secs_f64() / 3600.0;
    let (mean_hour, mean_mib) = samples.iter().fold((0.0, 0.0), |(hour, mib), (at, footprint)| {
        (hour + hours(at) / count, mib + footprint.memory_mib / count)
    });
    let (together, alone) = samples.iter().fold((0.0, 0.0), |(together, alone), (at, footprint)| {
        let off = hours(at) - mean_hour;
        (together + off * (footprint.memory_mib - mean_mib), alone + off * off)
    });
    together / alone
}

/// How long the deliveries of a minute took.
#[derive(Default)]
struct Minute {
    turns: Vec<Latencies>,
    /// p99 of each second, in ms.
    seconds_p99: Vec<f64>,
}

/// A node, and what came of its minutes.
struct Node {
    stage: Stage,
    deliveries: Vec<Minute>,
    lost: u64,
    duplicated: u64,
}

impl Node {
    /// One on a lane that `variables` names, and its peak, in records a second.
    async fn start(plan: &Plan, variables: &[(String, String)]) -> (Self, f64) {
        let mut stage = Stage::new(&Side::WAYPOST, &plan.lane, variables, plan.users).await;
        stage.post(WARM_UP, None).await;
        let records = if plan.rate.is_some() { WARM_UP } else { PEAK_RECORDS };
        let peak = stage.post(records, None).await.end_to_end_per_s();
        (Self { stage, deliveries: Vec::new(), lost: 0, duplicated: 0 }, peak)
    }

    /// Posts the records of a part of a minute. The API has them all before it ends.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "records of a minute")]
    async fn turn(&mut self, rate: f64) -> (Latencies, Vec<f64>) {
        self.stage.forget().await;
        let count = (rate * 60.0) as usize / TURNS;
        let run = self.stage.post(count, Some(rate)).await;
        self.lost += count as u64 - run.distinct;
        self.duplicated += run.times - run.distinct;
        let deliveries_us: Vec<_> = run.deliveries_us().collect();
        // They fall due in this order.
        let seconds = deliveries_us.chunks(rate.ceil() as usize).map(latencies);
        (latencies(&deliveries_us), seconds.map(|second| ms(&second, 0.99)).collect())
    }
}

/// Has each node post the records of a minute, in turns, and in turns as the first.
async fn minute(nodes: &mut [&mut Node], rate: f64) {
    let mut minutes: Vec<_> = nodes.iter().map(|_| Minute::default()).collect();
    for turn in 0..TURNS {
        for at in 0..nodes.len() {
            let at = (at + turn) % nodes.len();
            let (deliveries, seconds_p99) = nodes[at].turn(rate).await;
            minutes[at].turns.push(deliveries);
            minutes[at].seconds_p99.extend(seconds_p99);
        }
    }
    for (node, minute) in nodes.iter_mut().zip(minutes) {
        node.deliveries.push(minute);
    }
}

/// What is compared, all in ms: p50, p99, and p99 of the median second. A machine that stops for some ms each second moves p99
/// as it likes, and not that of the median second; a node that does so itself shows in p99 alone.
const FIGURES: [&str; 3] = ["p50", "p99", "p99_median_second"];

fn figures(minutes: &[Minute]) -> [f64; 3] {
    let mut all = latencies(&[]);
    for turn in minutes.iter().flat_map(|minute| &minute.turns) {
        all.add(turn).expect("it grows");
    }
    let seconds = minutes.iter().flat_map(|minute| minute.seconds_p99.iter().copied()).collect();
    [ms(&all, 0.5), ms(&all, 0.99), table::median(seconds)]
}

/// What the latest minute was like.
fn told(node: &Node) -> String {
    let [p50, p99, median_second] = figures(&node.deliveries[node.deliveries.len() - 1..]);
    format!("p50 {p50:.2} ms, p99 {p99:.2} ms, that of the median second {median_second:.2} ms")
}

/// The old node alone, then with the new one, each on a lane that `variables` names anew: what one leaves there is not for the other.
pub async fn run(plan: &Plan, mut variables: impl FnMut() -> Vec<(String, String)>) {
    let (mut old, peak) = Node::start(plan, &variables()).await;
    let rate = plan.rate.unwrap_or(peak / 2.0);
    eprintln!("{}: {rate:.0} records/s for {} minutes", plan.lane, plan.minutes);

    let watch = old.stage.watch();
    let samples = Rc::new(RefCell::new(Vec::new()));
    let taken = Rc::clone(&samples);
    let watching = actix_rt::spawn(async move {
        loop {
            tokio::time::sleep(SAMPLE_EVERY).await;
            taken.borrow_mut().push((Instant::now(), watch.footprint()));
        }
    });
    let tell = |at: usize, old: &Node| {
        let Footprint { memory_mib, descriptors } = samples.borrow().last().map(|(_, at)| *at).unwrap_or_default();
        eprintln!("minute {at}: {}, {memory_mib:.1} MiB, {descriptors} descriptors", told(old));
    };
    let minutes = plan.minutes as usize;
    let end = END.min(minutes / 2);
    for at in 1..=minutes - end {
        minute(&mut [&mut old], rate).await;
        tell(at, &old);
    }
    let (mut new, _) = Node::start(plan, &variables()).await;
    for at in minutes - end + 1..=minutes {
        minute(&mut [&mut old, &mut new], rate).await;
        tell(at, &old);
        eprintln!("  a new node: {}", told(&new));
    }
    watching.abort();

    let [lost, duplicated] = [old.lost + new.lost, old.duplicated + new.duplicated];
    let ends = [&old.deliveries[..end], &old.deliveries[minutes - end..], &new.deliveries];
    let ends = ends.map(figures);
    let samples = samples.take();
    let slope = slope_mib_per_hour(&samples);
    let descriptors = samples.iter().map(|(_, footprint)| footprint.descriptors);
    let descriptors = [descriptors.clone().min(), descriptors.max()].map(Option::unwrap_or_default);
    let compared = FIGURES.iter().enumerate().map(|(at, figure)| (*figure, ends.map(|end| end[at])));
    if plan.json {
        let named = |(figure, [first, last, new]): (&str, [f64; 3])| {
            (figure.to_owned(), json!({"first": first, "last": last, "new": new}))
        };
        println!(
            "{}",
            json!({
                "lane": plan.lane, "rate": rate, "minutes": plan.minutes, "memory_mib_per_hour": slope, "descriptors": descriptors,
                "delivery_ms": compared.map(named).collect::<serde_json::Map<_, _>>(), "lost": lost, "duplicated": duplicated,
            })
        );
        return;
    }
    let head = format!("delivery in ms, {end} minutes");
    println!("\n{head:<30} {:>12} {:>12} {:>8} {:>12} {:>8}", "first", "last", "ratio", "a new node", "last/new");
    for (figure, [first, last, new]) in compared {
        println!("{figure:<30} {first:>12.2} {last:>12.2} {:>8.2} {new:>12.2} {:>8.2}", last / first, last / new);
    }
    println!("{:<30} {slope:>12.2}", "memory MiB/hour");
    println!("{:<30} {:>12} {:>12}", "descriptors, least and most", descriptors[0], descriptors[1]);
    println!("{:<30} {lost:>12}\n{:<30} {duplicated:>12}", "lost", "duplicated");
}
