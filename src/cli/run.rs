//! `waypost run`: a node until it is told to stop.

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::{
    NodeArgs,
    output::failed,
    signals::{Signals, Wish},
};
use crate::{log, node::Node};

/// A drain that takes longer is cut off. With the wait for the last lines of the log, a stop takes less
/// than 10 s.
const DRAIN_MAX: Duration = Duration::from_secs(9);

/// Runs a node until SIGTERM, SIGINT or SIGQUIT, then drains it. A second one ends the process at
/// once.
pub async fn run(args: NodeArgs) -> Result<(), ExitCode> {
    let mut signals = Signals::take()?;
    let config = args.load()?;
    let source = Arc::new(move || args.read());
    let node = Node::start(&config, source)
        .map_err(|why| failed(format_args!("the node does not start: {why}")))?;
    while let (signal, Wish::Reload | Wish::Nothing) = signals.next().await {
        let control = node.control.clone();
        // A file that cannot be read for a while holds up no stop.
        actix_rt::spawn(async move { control.reload(signal).await });
    }
    actix_rt::spawn(async move {
        while let (signal, Wish::Reload | Wish::Nothing) = signals.next().await {
            info!(signal, "the signal has no effect: the node is stopping");
        }
        warn!("second signal: ending at once");
        log::flush();
        std::process::exit(1);
    });
    if tokio::time::timeout(DRAIN_MAX, node.drain()).await.is_err() {
        warn!("the drain was cut off; the records that are left are in the brokers and on disk");
    }
    Ok(())
}

/// Resolves at the next SIGTERM or SIGINT, for commands that run no node.
pub async fn stop_signal() -> Result<(), ExitCode> {
    let cannot_wait = |why: std::io::Error| failed(format_args!("cannot wait for signals: {why}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot_wait)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_wait)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
