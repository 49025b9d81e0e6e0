//! A soak: one node at half its peak for an hour, watched for what creeps.

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
    /// How long; the first ten minutes are compared with the last ten, or half with half
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

/// Posts a minute's records, minute after minute. The API has all records of a minute before the next begins.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "records of a minute")]
pub async fn run(plan: &Plan, variables: &[(String, String)]) {
    let mut stage = Stage::new(&Side::WAYPOST, &plan.lane, variables, plan.users).await;
    stage.post(WARM_UP, None).await;
    let rate = match plan.rate {
        Some(rate) => rate,
        None => stage.post(PEAK_RECORDS, None).await.end_to_end_per_s() / 2.0,
    };
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
    let mut minutes: Vec<Latencies> = Vec::new();
    let (mut lost, mut duplicated) = (0, 0);
    for minute in 1..=plan.minutes {
        stage.forget().await;
        let count = (rate * 60.0) as usize;
        let run = stage.post(count, Some(rate)).await;
        lost += count as u64 - run.distinct;
        duplicated += run.times - run.distinct;
        let mut latencies = Latencies::new(3).expect("three digits are allowed");
        for latency_us in run.deliveries_us() {
            latencies.record(latency_us).expect("it grows");
        }
        let latest = samples.borrow().last().map_or_else(Footprint::default, |(_, footprint)| *footprint);
        eprintln!(
            "minute {minute}: p50 {:.2} ms, p99 {:.2} ms, {:.1} MiB, {} descriptors",
            ms(&latencies, 0.5),
            ms(&latencies, 0.99),
            latest.memory_mib,
            latest.descriptors
        );
        minutes.push(latencies);
    }
    watching.abort();

    let end = END.min(minutes.len() / 2);
    let together = |minutes: &[Latencies]| {
        minutes.iter().fold(Latencies::new(3).expect("three digits are allowed"), |mut all, minute| {
            all.add(minute).expect("it grows");
            all
        })
    };
    let ends = [together(&minutes[..end]), together(&minutes[minutes.len() - end..])];
    let [p50, p99] = [0.5, 0.99].map(|quantile| ends.each_ref().map(|latencies| ms(latencies, quantile)));
    let samples = samples.take();
    let slope = slope_mib_per_hour(&samples);
    let descriptors = samples.iter().map(|(_, footprint)| footprint.descriptors);
    let descriptors = [descriptors.clone().min(), descriptors.max()].map(Option::unwrap_or_default);
    if plan.json {
        println!(
            "{}",
            json!({
                "lane": plan.lane, "rate": rate, "minutes": plan.minutes, "memory_mib_per_hour": slope, "descriptors": descriptors,
                "p50_ms": p50, "p99_ms": p99, "lost": lost, "duplicated": duplicated,
            })
        );
        return;
    }
    println!("\n{:<30} {:>12} {:>12} {:>8}", format!("delivery, {end} minutes"), "first", "last", "ratio");
    for (name, [first, last]) in [("p50 ms", p50), ("p99 ms", p99)] {
        println!("{name:<30} {first:>12.2} {last:>12.2} {:>8.2}", last / first);
    }
    println!("{:<30} {slope:>12.2}", "memory MiB/hour");
    println!("{:<30} {:>12} {:>12}", "descriptors, least and most", descriptors[0], descriptors[1]);
    println!("{:<30} {lost:>12}\n{:<30} {duplicated:>12}", "lost", "duplicated");
}
