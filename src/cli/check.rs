//! `waypost check`: validates the configuration, and tries what it names.

use std::{collections::BTreeMap, process::ExitCode, sync::Arc, time::Duration};

use bytesize::ByteSize;
use tokio::{net::TcpStream, time::timeout};
use url::Url;

use super::{
    NodeArgs,
    output::{print, tell},
};
use crate::{
    config::{Config, GrpcConfig},
    lane_id::LaneId,
    record::{HEADERS_MAX, Record},
    spool::Spool,
    tap::Tap,
    transport::{
        self, BrokerInfo, Transport, default_largest_message,
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
        warn_of_size(&config, &BTreeMap::new());
        return Ok(());
    }
    let mut all_well = true;
    let mut report = |name: &str, result: Result<String, String>| {
        all_well &= result.is_ok();
        let (Ok(line) | Err(line)) = result;
        tell(format_args!("{name}: {line}"));
    };
    let mut limits = BTreeMap::new();
    for lane in LaneId::ALL {
        // Boxed: it has the futures of all clients.
        if let Some(connected) = Box::pin(connect_lane(lane, &config)).await {
            if let Ok(broker) = &connected {
                limits.insert(lane, broker.largest_message.unwrap_or(usize::MAX));
            }
            let result = connected.map(|broker| describe(&broker));
            report(&format!("lanes.{lane}"), result);
        }
    }
    warn_of_size(&config, &limits);
    report("api", reach_api(&config).await);
    all_well.then_some(()).ok_or(ExitCode::FAILURE)
}

/// `None` if the lane is not configured.
async fn connect_lane(lane: LaneId, config: &Config) -> Option<Result<BrokerInfo, String>> {
    let lanes = config.lanes.clone();
    Some(match lane {
        LaneId::Grpc => connect_grpc(lanes.grpc?, config).await,
        LaneId::Nats => connect::<Nats>(lanes.nats?).await,
        LaneId::Rabbitmq => connect::<RabbitMq>(lanes.rabbitmq?).await,
        LaneId::Pubsub => connect::<Pubsub>(pubsub::Settings::new(lanes.pubsub?)).await,
    })
}

/// Connects as a node would, creating what is missing, and disconnects.
async fn connect<T: Transport>(settings: T::Settings) -> Result<BrokerInfo, String> {
    let transport = transport::connect::<T>(&settings)
        .await
        .map_err(|failure| failure.to_string())?;
    let broker = transport.info();
    transport.close().await;
    Ok(broker)
}

fn describe(broker: &BrokerInfo) -> String {
    let version = broker.version.iter();
    let version = version.map(|version| format!(", version {version}"));
    let size = broker.largest_message.iter();
    let size = size.map(|most| format!(", messages up to {}", ByteSize(*most as u64)));
    let warnings = broker
        .warnings
        .iter()
        .map(|warning| format!("; warning: {warning}"));
    let details: String = version.chain(size).chain(warnings).collect();
    format!("ok{details}")
}

/// Warns if a record may be larger than any lane takes. `limits` are those that the lanes' systems
/// have told; the defaults stand for the others.
fn warn_of_size(config: &Config, limits: &BTreeMap<LaneId, usize>) {
    let lanes = config.lanes.in_order().into_iter();
    let lanes = lanes.map(|(lane, _)| match limits.get(&lane) {
        Some(&most) => (lane, most, ""),
        None => (lane, default_largest_message(lane), " by default"),
    });
    let lanes: Vec<_> = lanes.collect();
    let max = config.ingest.max_record;
    if lanes.iter().any(|(_, most, _)| max + HEADERS_MAX <= *most) {
        return;
    }
    let limits = lanes.iter().map(|(lane, most, source)| {
        let most = ByteSize(*most as u64);
        format!("{lane} {most}{source}")
    });
    let limits = limits.collect::<Vec<_>>().join(", ");
    let max = ByteSize(max as u64);
    tell(format_args!(
        "ingest.max_record: warning: no lane carries a record of {max} with its headers ({limits}), and the client of one gets 413; lower max_record, or raise a lane's limit on its server"
    ));
}

/// With a spool of its own, since a node that runs has the real one open.
async fn connect_grpc(lane: GrpcConfig, config: &Config) -> Result<BrokerInfo, String> {
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
