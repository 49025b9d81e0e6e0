//! `waypost sink`: the reference API as a command.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
};

use tracing::{error, info};

use super::run::stop_signal;
use crate::sink::{Sink, Stats};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Take records at this address
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Keep the records in this SQLite file [default: in memory]
    #[arg(long, value_name = "FILE")]
    db: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub async fn sink(args: Args) -> ExitCode {
    let db = args
        .db
        .as_ref()
        .map_or_else(|| "memory".into(), |file| file.display().to_string());
    let started =
        TcpListener::bind(args.listen).and_then(|listener| Sink::start(listener, args.db));
    let sink = match started {
        Ok(sink) => sink,
        Err(failure) => {
            error!(address = %args.listen, %db, %failure, "sink does not start");
            return ExitCode::FAILURE;
        }
    };
    info!(address = %sink.address(), %db, "sink is up");
    if let Err(failure) = stop_signal().await {
        error!(%failure, "cannot wait for signals");
        return ExitCode::FAILURE;
    }
    let Stats {
        records,
        redeliveries,
        ..
    } = sink.stats();
    info!(records, redeliveries, "sink ends");
    sink.stop().await;
    ExitCode::SUCCESS
}
