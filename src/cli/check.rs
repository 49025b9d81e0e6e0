//! `waypost check`: validates the configuration, and tries what it names.

use std::{process::ExitCode, sync::Arc, time::Duration};

use awc::http::Uri;
use tokio::{net::TcpStream, time::timeout};

use super::NodeArgs;
use crate::{
    config::{self, Config},
    lane_id::LaneId,
    record::Record,
    spool::Spool,
    tap::Tap,
    transport::{
        self, Transport, grpc,
        nats::Nats,
        pubsub::{self, Pubsub},
        rabbitmq::RabbitMq,
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
    for lane in LaneId::ALL {
        if let Some(result) = connect_lane(lane, &config).await {
            report(&format!("lanes.{lane}"), result);
        }
    }
    report("api", reach_api(&config).await);
    if all_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// `None` if the lane is not configured.
async fn connect_lane(lane: LaneId, config: &Config) -> Option<Result<String, String>> {
    let lanes = config.lanes.clone();
    Some(match lane {
        LaneId::Grpc => connect_grpc(lanes.grpc?, config).await,
        LaneId::Nats => connect::<Nats>(lanes.nats?).await,
        LaneId::Rabbitmq => connect::<RabbitMq>(lanes.rabbitmq?).await,
        LaneId::Pubsub => connect::<Pubsub>(pubsub::Settings::new(lanes.pubsub?)).await,
    })
}

/// Connects as a node would, creating what is missing, and disconnects.
async fn connect<T: Transport>(settings: T::Settings) -> Result<String, String> {
    let transport = transport::connect::<T>(&settings)
        .await
        .map_err(|failure| failure.to_string())?;
    let broker = transport.info();
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
async fn connect_grpc(lane: config::GrpcConfig, config: &Config) -> Result<String, String> {
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
