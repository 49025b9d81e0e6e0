//! `waypost run`: a node until it is told to stop.

use std::{process::ExitCode, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, warn};

use super::NodeArgs;
use crate::node::Node;

/// A drain that takes longer is cut off.
const DRAIN_MAX: Duration = Duration::from_millis(9_500);

/// Runs a node until SIGTERM or SIGINT, then drains it. A second signal ends the process at once.
pub async fn run(args: NodeArgs) -> Result<(), ExitCode> {
    let config = args.load()?;
    let node = Node::start(&config).map_err(|failure| {
        error!(%failure, "node does not start");
        ExitCode::FAILURE
    })?;
    stop_signal().await?;
    actix_rt::spawn(async {
        if stop_signal().await.is_ok() {
            warn!("second signal: ending at once");
            std::process::exit(1);
        }
    });
    if tokio::time::timeout(DRAIN_MAX, node.drain()).await.is_err() {
        warn!("the drain was cut off; the records that are left are in the brokers and on disk");
    }
    Ok(())
}

/// Resolves at the next SIGTERM or SIGINT.
pub async fn stop_signal() -> Result<(), ExitCode> {
    let cannot_wait = |failure: std::io::Error| {
        error!(%failure, "cannot wait for signals");
        ExitCode::FAILURE
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot_wait)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_wait)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
