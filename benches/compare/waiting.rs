//! The cost of many waiting records: few against many, each time until all are settled.

use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{
    BATCH,
    stage::{Side, Stage, WARM_UP},
};

/// The small number. These drain within a few ticks of the CPU clock, so the measurement repeats.
const FEW: usize = 10_000;
const TURNS: usize = 10;
/// Records per run of the load, which holds them in memory.
const PART: usize = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Place {
    /// The lane is paused
    Spool,
    /// The API answers 503
    Broker,
}

#[derive(Args)]
pub struct Plan {
    /// One of nats, rabbitmq, pubsub; grpc for the spool only
    #[arg(long, default_value = "nats")]
    pub lane: String,
    /// The place where the records wait
    #[arg(long, value_enum, default_value = "spool")]
    place: Place,
    /// The large number. A request has a hundred records; a broker may keep them as one message
    #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    records: u32,
    /// Concurrent clients
    #[arg(long, default_value_t = 16)]
    users: usize,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Place {
    /// Blocks records at the place, or lets them pass.
    async fn set(self, stage: &Stage, is_open: bool) {
        match self {
            Self::Spool => stage.set_lane(is_open).await,
            Self::Broker => stage.set_api(is_open).await,
        }
    }
}

/// Makes `count` records wait.
async fn fill(stage: &mut Stage, place: Place, count: usize) {
    place.set(stage, false).await;
    let before = stage.arrived().await;
    for at in (0..count).step_by(PART) {
        stage.load(PART.min(count - at), None).await;
    }
    assert_eq!(
        stage.arrived().await,
        before,
        "records that came while none should"
    );
}

/// CPU of the node, in µs, while `count` waiting records drain.
async fn pass(stage: &mut Stage, place: Place, count: usize) -> u64 {
    fill(stage, place, count).await;
    let cpu = stage.cpu_us();
    place.set(stage, true).await;
    stage.all_is_settled().await;
    stage.cpu_us() - cpu
}

#[expect(
    clippy::cast_precision_loss,
    reason = "some minutes, and some million records"
)]
pub async fn run(plan: &Plan, variables: &[(String, String)]) {
    let Plan { lane, place, .. } = plan;
    assert!(
        lane != "grpc" || *place == Place::Spool,
        "no broker keeps the records of the gRPC lane"
    );
    let records = plan.records as usize;
    let side = Side {
        batch: BATCH,
        variables: &[("SPOOL__MAX", "40GiB")],
        ..Side::waypost()
    };
    let mut stage = Stage::new(&side, lane, variables, plan.users).await;
    stage.post(WARM_UP, None).await;

    let mut cpu_us = 0;
    for _ in 0..TURNS {
        cpu_us += pass(&mut stage, *place, FEW).await;
    }
    let few = (
        cpu_us as f64 / (FEW * TURNS) as f64,
        stage.watch().peak_memory_mib(),
    );
    let began = Instant::now();
    let cpu_us = pass(&mut stage, *place, records).await;
    eprintln!(
        "{lane}, {place:?}: {records} came and went in {:?}",
        began.elapsed()
    );
    let many = (
        cpu_us as f64 / records as f64,
        stage.watch().peak_memory_mib(),
    );
    let mut start = None;
    if *place == Place::Spool {
        fill(&mut stage, *place, records).await;
        stage.restart().await;
        let ready_s = stage.ready_after.as_secs_f64();
        stage.all_is_settled().await;
        start = Some((ready_s, stage.watch().peak_memory_mib()));
    }
    let [lost, duplicated] = stage.lost_and_duplicated().await;

    if plan.json {
        println!(
            "{}",
            json!({
                "lane": lane, "place": format!("{place:?}").to_lowercase(), "records": [FEW, records],
                "cpu_us_per_record": [few.0, many.0], "memory_mib": [few.1, many.1],
                "start": start.map(|(ready_s, memory_mib)| json!({"ready_s": ready_s, "memory_mib": memory_mib})),
                "lost": lost, "duplicated": duplicated,
            })
        );
        return;
    }
    println!(
        "\n{:<30} {FEW:>12} {records:>12} {:>8}",
        format!("{lane}, {place:?}"),
        "ratio"
    );
    for (name, few, many) in [
        ("CPU µs/record", few.0, many.0),
        ("peak memory MiB", few.1, many.1),
    ] {
        println!("{name:<30} {few:>12.2} {many:>12.2} {:>8.2}", many / few);
    }
    if let Some((ready_s, memory_mib)) = start {
        println!(
            "{:<30} {:>12} {ready_s:>12.3}",
            "killed, start to ready s", ""
        );
        println!(
            "{:<30} {:>12} {memory_mib:>12.2}",
            "its peak memory MiB", ""
        );
    }
    println!(
        "{:<30} {:>12} {lost:>12}\n{:<30} {:>12} {duplicated:>12}",
        "lost", "", "duplicated", ""
    );
}
