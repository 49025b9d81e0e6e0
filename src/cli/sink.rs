//! `waypost sink`: the reference API as a program of its own.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
};

use tracing::{error, info};

use super::run::stop_signal;
use crate::sink::Sink;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to serve
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Keep the records in this file; without it they are in memory and gone at the end
    #[arg(long, value_name = "FILE")]
    db: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub async fn sink(args: Args) -> ExitCode {
    let place = args
        .db
        .as_ref()
        .map_or_else(|| "memory".into(), |file| file.display().to_string());
    let sink =
        match TcpListener::bind(args.listen).and_then(|listener| Sink::start(listener, args.db)) {
            Ok(sink) => sink,
            Err(failure) => {
                error!(address = %args.listen, %place, %failure, "sink does not start");
                return ExitCode::FAILURE;
            }
        };
    info!(address = %sink.address(), records_in = %place, "sink is up");
    if let Err(failure) = stop_signal().await {
        error!(%failure, "cannot wait for signals");
        return ExitCode::FAILURE;
    }
    info!(stats = ?sink.stats(), "sink ends");
    sink.stop().await;
    ExitCode::SUCCESS
}
