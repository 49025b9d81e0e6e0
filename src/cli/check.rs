//! `waypost check`: validates the configuration, and tries what it names.

use std::{process::ExitCode, sync::Arc, time::Duration};

use awc::http::Uri;
use tokio::{net::TcpStream, time::timeout};

use super::NodeArgs;
use crate::{
    config::{self, Config},
    record::Record,
    spool::Spool,
    tap::Tap,
    transport::{
        CONNECT_TIMEOUT, Transport, TransportError, grpc,
        nats::{self, Nats},
        pubsub, rabbitmq,
    },
};

/// How long the API may take to accept a connection.
const API_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Also connect to each lane and to the API
    #[arg(long)]
    connect: bool,
}

/// Prints the effective configuration, or each mistake in a line of its own.
pub async fn check(args: Args) -> ExitCode {
    let config = match args.node.load() {
        Ok(config) => config,
        Err(status) => return status,
    };
    print!("{}", config.to_toml());
    if !args.connect {
        return ExitCode::SUCCESS;
    }
    let mut all_well = true;
    let mut report = |what: &str, result: Result<String, String>| match result {
        Ok(detail) => eprintln!("{what}: ok{detail}"),
        Err(why) => {
            all_well = false;
            eprintln!("{what}: {why}");
        }
    };
    let lanes = &config.lanes;
    if let Some(lane) = lanes.grpc.clone() {
        report("lanes.grpc", connect_grpc(lane, &config).await);
    }
    if let Some(lane) = lanes.nats.clone() {
        report(
            "lanes.nats",
            connect::<Nats>(nats::Settings::new(lane)).await,
        );
    }
    if let Some(lane) = lanes.rabbitmq.clone() {
        report(
            "lanes.rabbitmq",
            connect::<rabbitmq::RabbitMq>(rabbitmq::Settings::new(lane)).await,
        );
    }
    if let Some(lane) = lanes.pubsub.clone() {
        report(
            "lanes.pubsub",
            connect::<pubsub::Pubsub>(pubsub::Settings::new(lane)).await,
        );
    }
    report("api", reach_api(&config).await);
    if all_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Connects as a node would, creating what is missing, and disconnects.
async fn connect<T: Transport>(settings: T::Settings) -> Result<String, String> {
    let connected = timeout(CONNECT_TIMEOUT, T::connect(&settings)).await;
    let transport = connected
        .unwrap_or_else(|_| {
            Err(TransportError::Connect(format!(
                "no answer within {CONNECT_TIMEOUT:?}"
            )))
        })
        .map_err(|failure| failure.to_string())?;
    let broker = transport.broker();
    transport.close().await;
    let version = broker
        .version
        .map(|version| format!(", version {version}"))
        .unwrap_or_default();
    Ok(broker
        .warnings
        .iter()
        .fold(version, |told, warning| told + "; warning: " + warning))
}

/// With a spool of its own, since a node that runs has the real one open.
async fn connect_grpc(lane: config::Grpc, config: &Config) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|why| why.to_string())?;
    let settings = grpc::Settings {
        config: lane,
        tap: Tap::default(),
        schema: config.ingest.schema,
        run: Record::new_id(),
        spool: Spool::open(folder.path(), config.spool.max).map_err(|why| why.to_string())?,
        breaker: Arc::default(),
    };
    connect::<grpc::Grpc>(settings).await
}

async fn reach_api(config: &Config) -> Result<String, String> {
    let url: Uri = config.api.url.parse().map_err(|why| format!("{why}"))?;
    let port = url
        .port_u16()
        .unwrap_or(if url.scheme_str() == Some("https") {
            443
        } else {
            80
        });
    let host = url
        .host()
        .unwrap_or_default()
        .trim_matches(['[', ']'])
        .to_owned();
    match timeout(API_PATIENCE, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Ok(String::new()),
        Ok(Err(why)) => Err(format!("cannot connect to {}: {why}", config.api.url)),
        Err(_) => Err(format!(
            "cannot connect to {}: no answer within {API_PATIENCE:?}",
            config.api.url
        )),
    }
}
