//! The cost of many waiting records: few against many, each time until all are settled.

use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

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
enum WaitAt {
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
    place: WaitAt,
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

impl WaitAt {
    /// Blocks records at the place, or lets them pass.
    async fn set(self, stage: &Stage, is_open: bool) {
        match self {
            Self::Spool => stage.set_lane(is_open).await,
            Self::Broker => stage.set_api(is_open).await,
        }
    }
}

/// Makes `count` records wait.
async fn fill(stage: &mut Stage, place: WaitAt, count: usize) {
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
async fn pass(stage: &mut Stage, place: WaitAt, count: usize) -> u64 {
    fill(stage, place, count).await;
    let cpu = stage.cpu_us();
    place.set(stage, true).await;
    stage.all_is_settled().await;
    stage.cpu_us() - cpu
}

/// The cost of a number of waiting records.
struct Cost {
    cpu_us_per_record: f64,
    memory_mib: f64,
}

impl Cost {
    #[expect(clippy::cast_precision_loss, reason = "some million records")]
    fn new(stage: &Stage, cpu_us: u64, records: usize) -> Self {
        Self {
            cpu_us_per_record: cpu_us as f64 / records as f64,
            memory_mib: stage.watch().peak_memory_mib(),
        }
    }
}

/// The start of a node that was killed with all records waiting in its spool.
struct Start {
    ready_s: f64,
    memory_mib: f64,
}

impl Start {
    async fn measure(stage: &mut Stage, place: WaitAt, records: usize) -> Self {
        fill(stage, place, records).await;
        stage.restart().await;
        let ready_s = stage.ready_after.as_secs_f64();
        stage.all_is_settled().await;
        Self {
            ready_s,
            memory_mib: stage.watch().peak_memory_mib(),
        }
    }
}

struct Report {
    few: Cost,
    many: Cost,
    /// Only if the records wait in the spool.
    start: Option<Start>,
    lost: u64,
    duplicated: u64,
}

pub async fn run(plan: &Plan, variables: &[(String, String)]) {
    let Plan { lane, place, .. } = plan;
    assert!(
        lane != "grpc" || *place == WaitAt::Spool,
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
    let few = Cost::new(&stage, cpu_us, FEW * TURNS);
    let began = Instant::now();
    let cpu_us = pass(&mut stage, *place, records).await;
    eprintln!(
        "{lane}, {place:?}: {records} came and went in {:?}",
        began.elapsed()
    );
    let many = Cost::new(&stage, cpu_us, records);
    let start = match place {
        WaitAt::Spool => Some(Start::measure(&mut stage, *place, records).await),
        WaitAt::Broker => None,
    };
    let [lost, duplicated] = stage.lost_and_duplicated().await;
    let report = Report {
        few,
        many,
        start,
        lost,
        duplicated,
    };
    if plan.json {
        println!("{}", report.json(plan));
    } else {
        report.print(plan);
    }
}

impl Report {
    fn json(&self, plan: &Plan) -> Value {
        let start = self.start.as_ref();
        json!({
            "lane": plan.lane,
            "place": format!("{:?}", plan.place).to_lowercase(),
            "records": [FEW, plan.records as usize],
            "cpu_us_per_record": [self.few.cpu_us_per_record, self.many.cpu_us_per_record],
            "memory_mib": [self.few.memory_mib, self.many.memory_mib],
            "start": start.map(|start| json!({
                "ready_s": start.ready_s, "memory_mib": start.memory_mib,
            })),
            "lost": self.lost,
            "duplicated": self.duplicated,
        })
    }

    fn print(&self, plan: &Plan) {
        let head = format!("{}, {:?}", plan.lane, plan.place);
        println!("\n{head:<30} {FEW:>12} {:>12} {:>8}", plan.records, "ratio");
        let ratio = |name: &str, few: f64, many: f64| {
            println!("{name:<30} {few:>12.2} {many:>12.2} {:>8.2}", many / few);
        };
        let Self { few, many, .. } = self;
        ratio(
            "CPU µs/record",
            few.cpu_us_per_record,
            many.cpu_us_per_record,
        );
        ratio("peak memory MiB", few.memory_mib, many.memory_mib);
        let value = |name: &str, value: String| println!("{name:<30} {:>12} {value:>12}", "");
        if let Some(start) = &self.start {
            value("killed, start to ready s", format!("{:.3}", start.ready_s));
            value("its peak memory MiB", format!("{:.2}", start.memory_mib));
        }
        value("lost", self.lost.to_string());
        value("duplicated", self.duplicated.to_string());
    }
}
