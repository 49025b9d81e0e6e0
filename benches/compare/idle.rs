//! Memory and CPU of an idle node with four lanes up; and how soon a node on the gRPC lane is
//! ready.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::time::sleep;

use super::{
    stage::{Side, Stage},
    support::lanes::grpc_variables,
    table,
};

const STARTS: usize = 7;
const LANES: usize = 4;
/// Clients of brokers that have just started reconnect and discover for a while.
const SETTLE: Duration = Duration::from_secs(40);

#[derive(Args)]
pub struct Plan {
    /// How long to measure, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Starts a node on the gRPC lane a few times, then one on the lanes of `variables`.
#[expect(clippy::cast_precision_loss, reason = "the time of a few minutes")]
pub async fn run(plan: &Plan, variables: &[(String, String)]) {
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts.push(
            Stage::new(&Side::waypost(), "grpc", &grpc_variables(), 1)
                .await
                .ready_after
                .as_secs_f64()
                * 1e3,
        );
    }
    let start_ms = table::median(starts);
    let stage = Stage::new(&Side::waypost(), "all", variables, 1).await;
    stage.lanes_are(LANES, "up").await;
    sleep(SETTLE).await;
    let cpu = stage.cpu_us();
    sleep(Duration::from_secs(plan.seconds.into())).await;
    let cpu_percent = (stage.cpu_us() - cpu) as f64 / (f64::from(plan.seconds) * 1e4);
    let memory_mib = stage.watch().footprint().memory_mib;
    if plan.json {
        println!(
            "{}",
            json!({"start_to_ready_ms": start_ms, "cpu_percent": cpu_percent, "memory_mib": memory_mib})
        );
        return;
    }
    println!("{:<30} {start_ms:>12.1}", "start to ready ms");
    println!("{:<30} {cpu_percent:>12.2}", "CPU % of a core");
    println!("{:<30} {memory_mib:>12.2}", "memory MiB");
}
