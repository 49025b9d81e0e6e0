//! `waypost check`: validates the configuration, and tries what it names.

mod explain;
mod simulate;

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Duration};

use bytesize::ByteSize;
use tokio::time::timeout;

use super::{
    NodeArgs,
    header::{Header, header},
    output::{print, tell},
};
use crate::{
    api,
    breaker::ApiBreakers,
    config::{ApiConfig, Config, GrpcConfig},
    lane_id::LaneId,
    record::{HEADERS_MAX, Record},
    secrets::ServingTls,
    spool::Spool,
    tap::Tap,
    transport::{
        self, Inspection, Transport, default_largest_message,
        grpc::{self, Grpc},
        nats::{self, Nats},
        pubsub::{self, Pubsub},
        rabbitmq::RabbitMq,
    },
};

/// How long the API may take to answer.
const API_PATIENCE: Duration = Duration::from_secs(5);

const EXAMPLES: &str = "\
Examples:
  waypost check --config waypost.toml
  waypost check --connect
  waypost check --explain record.json --header 'Idempotency-Key: 7'

A PLAN.toml for --simulate, with each lane of the configuration:
  records_per_second = 100
  duration = \"60s\"
  [lanes.nats]
  latency = \"5ms\"
  [lanes.grpc]
  latency = { p50 = \"2ms\", p99 = \"20ms\" }
  failures = 0.01
  outages = [{ from = \"20s\", to = \"30s\" }]";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Also connect to each lane and to the API, and say what was tried; nothing is created
    #[arg(long)]
    connect: bool,
    /// Print the rule, policy, lane and API of this record instead, and why; nothing is started
    #[arg(long, value_name = "RECORD.json", conflicts_with = "connect")]
    explain: Option<PathBuf>,
    /// A header of its request, as in 'Idempotency-Key: 7'; may be given again
    #[arg(
        long = "header",
        value_name = "NAME: VALUE",
        value_parser = header,
        requires = "explain"
    )]
    headers: Vec<Header>,
    /// Play the routing in simulated time with lanes that behave as this file says, and print what
    /// each lane takes instead; nothing is started
    #[arg(long, value_name = "PLAN.toml", conflicts_with_all = ["connect", "explain"])]
    simulate: Option<PathBuf>,
}

/// Prints the effective configuration, or each mistake in a line of its own.
pub async fn check(args: Args) -> Result<(), ExitCode> {
    let config = args.node.load()?;
    if let Some(file) = &args.explain {
        return explain::explain(&config, file, &args.headers);
    }
    if let Some(file) = &args.simulate {
        return simulate::simulate(&config, file);
    }
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
        if let Some(result) = Box::pin(inspect_lane(lane, &config)).await {
            if let Ok((_, inspection)) = &result {
                let limit = inspection.info.largest_message;
                limits.extend(limit.map(|most| (lane, most)));
            }
            let result = result.map(|(address, inspection)| describe(&address, inspection));
            report(&format!("lanes.{lane}"), result);
        }
    }
    warn_of_size(&config, &limits);
    report("api", reach_api(&config.api).await);
    for (name, api) in &config.apis {
        report(&format!("apis.{name}"), reach_api(api).await);
    }
    all_well.then_some(()).ok_or(ExitCode::FAILURE)
}

/// The lane's address and what is there; `None` if the lane is not configured.
async fn inspect_lane(
    lane: LaneId,
    config: &Config,
) -> Option<Result<(String, Inspection), String>> {
    let lanes = config.lanes.clone();
    Some(match lane {
        LaneId::Grpc => inspect_grpc(lanes.grpc?, config).await,
        LaneId::Nats => inspect::<Nats>(nats::Settings::new(lanes.nats?)).await,
        LaneId::Rabbitmq => inspect::<RabbitMq>(lanes.rabbitmq?).await,
        LaneId::Pubsub => inspect::<Pubsub>(pubsub::Settings::new(lanes.pubsub?)).await,
    })
}

/// Connects and checks as a node would, and creates nothing.
async fn inspect<T: Transport>(settings: T::Settings) -> Result<(String, Inspection), String> {
    let inspected = transport::inspect::<T>(&settings).await;
    let inspection = inspected.map_err(|failure| failure.to_string())?;
    Ok((T::address(&settings), inspection))
}

fn describe(address: &str, Inspection { info, found }: Inspection) -> String {
    let version = info.version.iter();
    let version = version.map(|version| format!(", version {version}"));
    let size = info.largest_message.iter();
    let size = size.map(|most| format!(", messages up to {}", ByteSize(*most as u64)));
    let warnings = info.warnings.iter();
    let warnings = warnings.map(|warning| format!("; warning: {warning}"));
    format!(
        "ok{}: {address}: {}; a confirm outlives a power cut: {}; not tried: to publish and to \
         consume{}",
        version.chain(size).collect::<String>(),
        found.join(", "),
        info.outlives_power_cut.name(),
        warnings.collect::<String>(),
    )
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
        "ingest.max_record: warning: no lane carries a record of {max} with its headers ({limits}): \
         such a record is answered 413; lower max_record, or raise a lane's limit on its server"
    ));
}

/// With a spool of its own, since a node that runs has the real one open.
async fn inspect_grpc(lane: GrpcConfig, config: &Config) -> Result<(String, Inspection), String> {
    let folder = tempfile::tempdir().map_err(|why| why.to_string())?;
    let server_tls = lane.tls();
    let server_tls = server_tls.map(|files| ServingTls::open("lanes.grpc.cert_file", files));
    let settings = grpc::Settings {
        config: lane,
        server_tls: server_tls.transpose()?,
        tap: Tap::default(),
        rules: config.ingest.record_rules(),
        run: Record::new_id(),
        spool: Spool::open(folder.path(), config.spool.max).map_err(|why| why.to_string())?,
        breakers: ApiBreakers::default(),
        publish_timeout: config.router.publish_timeout,
    };
    inspect::<Grpc>(settings).await
}

/// Asks the API with a GET, which stores nothing. Any answer shows that it can be reached.
async fn reach_api(config: &ApiConfig) -> Result<String, String> {
    let url = &config.url;
    let settings = api::Settings::read("api", config).map_err(|why| why.to_string())?;
    let asked = timeout(API_PATIENCE, settings.ask(API_PATIENCE)).await;
    let status = match asked {
        Ok(Ok(status)) => status,
        Ok(Err(why)) => return Err(format!("{url}: {why}")),
        Err(_) => return Err(format!("{url}: no answer within {API_PATIENCE:?}")),
    };
    let warning = match status.as_u16() {
        401 | 403 => "; warning: check `token_file`, if it refuses a POST too",
        404 => "; warning: check the path of `url`, if it refuses a POST too",
        _ => "",
    };
    Ok(format!(
        "ok: {url}: connected, and a GET is answered with {status}; not tried: a POST{warning}"
    ))
}
