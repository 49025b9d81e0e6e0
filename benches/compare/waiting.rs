//! What waits costs nothing: few records that wait against many, each time until the API has the last of them.

use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{
    BATCH, api,
    stage::{Side, Stage, WARM_UP},
    table,
};

/// So many are few. They are soon gone: the median of some turns tells.
const FEW: usize = 10_000;
const TURNS: usize = 5;
/// The load holds what it is about to post: it is told part by part.
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
    /// One of nats, rabbitmq, pubsub
    #[arg(long, default_value = "nats")]
    pub lane: String,
    /// Where the records wait
    #[arg(long, value_enum, default_value = "spool")]
    place: Place,
    /// How many are many
    #[arg(long, default_value_t = 10_000_000)]
    records: usize,
    /// Clients that post at the same time
    #[arg(long, default_value_t = 16)]
    users: usize,
    /// Print what was measured as JSON
    #[arg(long)]
    json: bool,
}

impl Place {
    /// Lets nothing pass.
    async fn close(self, stage: &Stage) {
        match self {
            Self::Spool => stage.pause().await,
            Self::Broker => stage.set_api(api::AWAY).await,
        }
    }

    async fn open(self, stage: &Stage) {
        match self {
            Self::Spool => stage.resume().await,
            Self::Broker => stage.set_api(api::BACK).await,
        }
    }
}

async fn fill(stage: &mut Stage, count: usize) {
    for at in (0..count).step_by(PART) {
        stage.load(PART.min(count - at), None).await;
    }
}

/// Has so many wait, then lets them go. CPU of the node for each, in µs, from then on, and how many a second.
#[expect(clippy::cast_precision_loss, reason = "some minutes, and some million records")]
async fn pass(stage: &mut Stage, place: Place, count: usize) -> [f64; 2] {
    place.close(stage).await;
    fill(stage, count).await;
    let (cpu, began) = (stage.cpu_us(), Instant::now());
    place.open(stage).await;
    stage.all_arrived().await;
    [(stage.cpu_us() - cpu) as f64 / count as f64, count as f64 / began.elapsed().as_secs_f64()]
}

pub async fn run(plan: &Plan, variables: &[(String, String)]) {
    let side = Side { batch: BATCH, variables: &[("SPOOL__MAX", "40GiB")], ..Side::WAYPOST };
    let mut stage = Stage::new(&side, &plan.lane, variables, plan.users).await;
    stage.post(WARM_UP, None).await;
    let mut turns = Vec::new();
    for _ in 0..TURNS {
        turns.push(pass(&mut stage, plan.place, FEW).await);
    }
    let few = [0, 1].map(|at| table::median(turns.iter().map(|turn| turn[at]).collect()));
    let many = pass(&mut stage, plan.place, plan.records).await;
    let [lost, duplicated] = stage.lost_and_duplicated().await;
    let mut memory_mib = stage.watch().peak_memory_mib();
    let mut ready_s = None;
    if plan.place == Place::Spool {
        plan.place.close(&stage).await;
        fill(&mut stage, plan.records).await;
        memory_mib = memory_mib.max(stage.watch().peak_memory_mib());
        stage.restart().await;
        ready_s = Some(stage.ready_after.as_secs_f64());
        memory_mib = memory_mib.max(stage.watch().peak_memory_mib());
    }
    if plan.json {
        println!(
            "{}",
            json!({
                "lane": plan.lane, "place": format!("{:?}", plan.place).to_lowercase(), "records": [FEW, plan.records],
                "cpu_us_per_record": [few[0], many[0]], "records_per_s": [few[1], many[1]], "memory_mib": memory_mib,
                "ready_s": ready_s, "lost": lost, "duplicated": duplicated,
            })
        );
        return;
    }
    println!("\n{:<26} {FEW:>12} {:>12} {:>8}", format!("{} {:?}", plan.lane, plan.place), plan.records, "ratio");
    for (name, at) in [("CPU µs/record", 0), ("records/s", 1)] {
        println!("{name:<26} {:>12.2} {:>12.2} {:>8.2}", few[at], many[at], many[at] / few[at]);
    }
    println!("{:<26} {:>12} {memory_mib:>12.2}", "peak memory MiB", "");
    if let Some(ready_s) = ready_s {
        println!("{:<26} {:>12} {ready_s:>12.3}", "start to ready s", "");
    }
    println!("{:<26} {:>12} {lost:>12}\n{:<26} {:>12} {duplicated:>12}", "lost", "", "duplicated", "");
}
