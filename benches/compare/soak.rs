//! A soak: one node at half its peak for an hour, watched for what creeps. A node that has just started follows it, since an
//! hour changes the machine too: what is as slow with the new one does not come of age.

use std::{cell::RefCell, rc::Rc, time::Duration};

use clap::Args;
use hdrhistogram::Histogram;
use serde_json::json;
use tokio::time::Instant;

use super::stage::{Footprint, Side, Stage, WARM_UP};

/// Records by which the peak is found.
const PEAK_RECORDS: usize = 200_000;
/// What is compared at the two ends, in minutes.
const END: usize = 10;
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct Plan {
    /// One of grpc, nats, rabbitmq, pubsub
    #[arg(long, default_value = "grpc")]
    pub lane: String,
    /// How long; the first ten minutes are compared with the last ten, or half with half, and these with as many of a new node
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

/// What came of a node's minutes.
#[derive(Default)]
struct Minutes {
    latencies: Vec<Latencies>,
    lost: u64,
    duplicated: u64,
}

impl Minutes {
    /// Posts the records of a minute. The API has all of those of one before the next begins.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "records of a minute")]
    async fn pass(&mut self, stage: &mut Stage, rate: f64) -> &Latencies {
        stage.forget().await;
        let count = (rate * 60.0) as usize;
        let run = stage.post(count, Some(rate)).await;
        self.lost += count as u64 - run.distinct;
        self.duplicated += run.times - run.distinct;
        let mut latencies = Latencies::new(3).expect("three digits are allowed");
        for latency_us in run.deliveries_us() {
            latencies.record(latency_us).expect("it grows");
        }
        self.latencies.push(latencies);
        &self.latencies[self.latencies.len() - 1]
    }
}

fn together(minutes: &[Latencies]) -> Latencies {
    minutes.iter().fold(Latencies::new(3).expect("three digits are allowed"), |mut all, minute| {
        all.add(minute).expect("it grows");
        all
    })
}

/// A node on a lane of its own, and its peak, in records a second.
async fn started(plan: &Plan, variables: Vec<(String, String)>) -> (Stage, f64) {
    let mut stage = Stage::new(&Side::WAYPOST, &plan.lane, &variables, plan.users).await;
    stage.post(WARM_UP, None).await;
    let records = if plan.rate.is_some() { WARM_UP } else { PEAK_RECORDS };
    let peak = stage.post(records, None).await.end_to_end_per_s();
    (stage, peak)
}

/// The old node, then the new one, each on a lane that `variables` names anew: what the first leaves there is not for the second.
pub async fn run(plan: &Plan, mut variables: impl FnMut() -> Vec<(String, String)>) {
    let (mut stage, peak) = started(plan, variables()).await;
    let rate = plan.rate.unwrap_or(peak / 2.0);
    eprintln!("{}: {rate:.0} records/s for {} minutes", plan.lane, plan.minutes);

    let watch = stage.watch();
    let samples = Rc::new(RefCell::new(Vec::new()));
    let taken = Rc::clone(&samples);
    let watching = actix_rt::spawn(async move {
        loop {
            tokio::time::sleep(SAMPLE_EVERY).await;
            taken.borrow_mut().push((Instant::now(), watch.footprint()));
        }
    });
    let mut minutes = Minutes::default();
    for minute in 1..=plan.minutes {
        let latencies = minutes.pass(&mut stage, rate).await;
        let latest = samples.borrow().last().map_or_else(Footprint::default, |(_, footprint)| *footprint);
        eprintln!(
            "minute {minute}: p50 {:.2} ms, p99 {:.2} ms, {:.1} MiB, {} descriptors",
            ms(latencies, 0.5),
            ms(latencies, 0.99),
            latest.memory_mib,
            latest.descriptors
        );
    }
    watching.abort();
    drop(stage);

    let (mut stage, _) = started(plan, variables()).await;
    let end = END.min(minutes.latencies.len() / 2);
    let mut new = Minutes::default();
    for minute in 1..=end {
        let latencies = new.pass(&mut stage, rate).await;
        eprintln!("a new node, minute {minute}: p50 {:.2} ms, p99 {:.2} ms", ms(latencies, 0.5), ms(latencies, 0.99));
    }

    let Minutes { latencies, mut lost, mut duplicated } = minutes;
    lost += new.lost;
    duplicated += new.duplicated;
    let ends = [&latencies[..end], &latencies[latencies.len() - end..], &new.latencies].map(together);
    let [p50, p99] = [0.5, 0.99].map(|quantile| ends.each_ref().map(|latencies| ms(latencies, quantile)));
    let samples = samples.take();
    let slope = slope_mib_per_hour(&samples);
    let descriptors = samples.iter().map(|(_, footprint)| footprint.descriptors);
    let descriptors = [descriptors.clone().min(), descriptors.max()].map(Option::unwrap_or_default);
    let named = |[first, last, new]: [f64; 3]| json!({"first": first, "last": last, "new": new});
    if plan.json {
        println!(
            "{}",
            json!({
                "lane": plan.lane, "rate": rate, "minutes": plan.minutes, "memory_mib_per_hour": slope, "descriptors": descriptors,
                "p50_ms": named(p50), "p99_ms": named(p99), "lost": lost, "duplicated": duplicated,
            })
        );
        return;
    }
    let head = format!("delivery, {end} minutes");
    println!("\n{head:<30} {:>12} {:>12} {:>8} {:>12} {:>8}", "first", "last", "ratio", "a new node", "last/new");
    for (name, [first, last, new]) in [("p50 ms", p50), ("p99 ms", p99)] {
        println!("{name:<30} {first:>12.2} {last:>12.2} {:>8.2} {new:>12.2} {:>8.2}", last / first, last / new);
    }
    println!("{:<30} {slope:>12.2}", "memory MiB/hour");
    println!("{:<30} {:>12} {:>12}", "descriptors, least and most", descriptors[0], descriptors[1]);
    println!("{:<30} {lost:>12}\n{:<30} {duplicated:>12}", "lost", "duplicated");
}
