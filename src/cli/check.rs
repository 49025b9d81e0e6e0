//! `waypost check`: validates the configuration, and tries what it names.

use std::{process::ExitCode, sync::Arc, time::Duration};

use tokio::{net::TcpStream, time::timeout};
use url::Url;

use super::{
    NodeArgs,
    output::{print, tell},
};
use crate::{
    config::{Config, GrpcConfig},
    lane_id::LaneId,
    record::Record,
    spool::Spool,
    tap::Tap,
    transport::{
        self, Transport,
        grpc::{self, Grpc},
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
pub async fn check(args: Args) -> Result<(), ExitCode> {
    let config = args.node.load()?;
    print(config.to_toml().trim_end())?;
    if !args.connect {
        return Ok(());
    }
    let mut all_well = true;
    let mut report = |name: &str, result: Result<String, String>| {
        all_well &= result.is_ok();
        let (Ok(line) | Err(line)) = result;
        tell(format_args!("{name}: {line}"));
    };
    for lane in LaneId::ALL {
        if let Some(result) = connect_lane(lane, &config).await {
            report(&format!("lanes.{lane}"), result);
        }
    }
    report("api", reach_api(&config).await);
    all_well.then_some(()).ok_or(ExitCode::FAILURE)
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
    let version = broker.version.map(|version| format!(", version {version}"));
    let warnings = broker
        .warnings
        .iter()
        .map(|warning| format!("; warning: {warning}"));
    let details: String = version.into_iter().chain(warnings).collect();
    Ok(format!("ok{details}"))
}

/// With a spool of its own, since a node that runs has the real one open.
async fn connect_grpc(lane: GrpcConfig, config: &Config) -> Result<String, String> {
    let folder = tempfile::tempdir().map_err(|why| why.to_string())?;
    let settings = grpc::Settings {
        config: lane,
        tap: Tap::default(),
        schema: config.ingest.schema,
        run: Record::new_id(),
        spool: Spool::open(folder.path(), config.spool.max).map_err(|why| why.to_string())?,
        breaker: Arc::default(),
    };
    connect::<Grpc>(settings).await
}

async fn reach_api(config: &Config) -> Result<String, String> {
    let url = Url::parse(&config.api.url).map_err(|why| why.to_string())?;
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_or_known_default().unwrap_or_default();
    let why = match timeout(API_PATIENCE, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => return Ok("ok".into()),
        Ok(Err(why)) => why.to_string(),
        Err(_) => format!("no answer within {API_PATIENCE:?}"),
    };
    Err(format!("cannot connect to {}: {why}", config.api.url))
}
