//! `waypost sink`: the reference API as a command.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::ExitCode,
};

use tracing::info;

use super::{output::failed, run::stop_signal};
use crate::sink::Sink;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost sink
  waypost sink --listen 0.0.0.0:5000 --db records.sqlite")]
pub struct Args {
    /// Take records at this address
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Keep the records in this SQLite file [default: in memory]
    #[arg(long, value_name = "FILE")]
    db: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT.
pub async fn sink(args: Args) -> Result<(), ExitCode> {
    let db = args
        .db
        .as_ref()
        .map_or_else(|| "memory".into(), |file| file.display().to_string());
    let listener = TcpListener::bind(args.listen);
    let sink = listener
        .and_then(|listener| Sink::start(listener, args.db))
        .map_err(|why| {
            let listen = args.listen;
            failed(format_args!(
                "the sink does not start: --listen {listen}, --db {db}: {why}"
            ))
        })?;
    info!(address = %sink.address(), %db, "sink is up");
    stop_signal().await?;
    let stats = sink.stats();
    info!(
        records = stats.records,
        redeliveries = stats.redeliveries,
        "sink ends"
    );
    sink.stop().await;
    Ok(())
}
