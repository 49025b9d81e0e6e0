//! `waypost run`: a node until it is told to stop.

use std::{process::ExitCode, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};

use super::NodeArgs;
use crate::node::Node;

/// A drain that takes longer is cut off; the records that are left are safe in the brokers and on disk.
const DRAIN_MAX: Duration = Duration::from_millis(9_500);

#[derive(Debug, Default, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Runs a node until SIGTERM or SIGINT, then drains it. A second signal ends the process at once.
pub async fn run(args: Args) -> ExitCode {
    let config = match args.node.load() {
        Ok(config) => config,
        Err(status) => return status,
    };
    let node = match Node::start(&config) {
        Ok(node) => node,
        Err(failure) => {
            error!(%failure, "node does not start");
            return ExitCode::FAILURE;
        }
    };
    if let Err(failure) = stop_signal().await {
        error!(%failure, "cannot wait for signals");
        return ExitCode::FAILURE;
    }
    actix_rt::spawn(async {
        if stop_signal().await.is_ok() {
            warn!("second signal: ending at once");
            std::process::exit(1);
        }
    });
    if tokio::time::timeout(DRAIN_MAX, node.drain()).await.is_err() {
        warn!(
            "the drain took too long and was cut off; the records that are left are in the brokers and on disk"
        );
    }
    ExitCode::SUCCESS
}

/// Resolves at the next SIGTERM or SIGINT.
pub async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
