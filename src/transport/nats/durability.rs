//! Whether a confirm of JetStream survives a power cut of its server. A server tells its clients
//! nothing of that; its monitoring address does, and so may its system account.

use std::time::Duration;

use async_nats::{
    Client,
    jetstream::stream::{Info, StorageType},
};
use serde::Deserialize;
use tokio::time::timeout;

use crate::{
    api::client::Endpoint,
    config::{NatsConfig, NatsSync},
    transport::Durability,
};

/// How often a server syncs its files by default; how long a sync may take, and the end of a server
/// may stay unnoticed.
const SYNC_INTERVAL: Duration = Duration::from_mins(2);
const SYNC_MARGIN: Duration = Duration::from_secs(30);
/// How long the server may take to report its settings.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);
/// The most bytes of that report.
const REPORT_MAX: usize = 1 << 20;
/// Replicas of which a power cut of one site is taken to leave enough.
const REPLICAS_MIN: usize = 3;

/// A report on JetStream: of `/jsz`, or of the system account, as far as it matters here.
#[derive(Deserialize)]
struct Jsz {
    server_id: Option<String>,
    config: Option<JszConfig>,
}

#[derive(Deserialize)]
struct JszConfig {
    /// In nanoseconds. Absent before 2.10, which cannot sync before each confirm.
    sync_interval: Option<u64>,
    #[serde(default)]
    sync_always: bool,
}

/// An answer of the system account.
#[derive(Deserialize)]
struct SystemAnswer {
    data: Jsz,
}

/// The durability of a confirm, and a warning unless it is durable at once.
pub async fn judge(
    client: &Client,
    settings: &NatsConfig,
    stream: &Info,
) -> (Durability, Option<String>) {
    if stream.config.storage == StorageType::Memory {
        let after = Duration::MAX;
        // The stream's own warning says why.
        return (Durability::No { after }, None);
    }
    let replicas = stream.config.num_replicas;
    let by_word = match settings.sync {
        Some(NatsSync::Always) => return (Durability::Yes, None),
        Some(NatsSync::Replicated) if replicas >= REPLICAS_MIN => return (Durability::Yes, None),
        Some(NatsSync::Replicated) => {
            format!(
                "; sync = \"replicated\" takes {REPLICAS_MIN} replicas, and the stream has {replicas}"
            )
        }
        None => String::new(),
    };
    let (durability, why) = match report(client, settings, stream).await {
        Ok(JszConfig {
            sync_always: true, ..
        }) => return (Durability::Yes, None),
        Ok(JszConfig { sync_interval, .. }) => {
            let interval = sync_interval.map_or(SYNC_INTERVAL, Duration::from_nanos);
            let after = interval.saturating_add(SYNC_MARGIN);
            let why = format!("the server syncs its files every {interval:?}");
            (Durability::No { after }, why)
        }
        Err(why) => {
            let after = SYNC_INTERVAL + SYNC_MARGIN;
            let why = format!("the server's sync_interval is unknown ({why})");
            (Durability::Unknown { after }, why)
        }
    };
    let warning = format!(
        "{why}: a power cut may take what it has confirmed last{by_word}; set `sync_interval: always` \
         on the server, and name its monitoring address in [lanes.nats].monitor"
    );
    (durability, Some(warning))
}

async fn report(
    client: &Client,
    settings: &NatsConfig,
    stream: &Info,
) -> Result<JszConfig, String> {
    let info = client.server_info();
    let server = info.server_id;
    let leader = stream.cluster.as_ref().and_then(|it| it.leader.as_ref());
    if leader.is_some_and(|leader| *leader != info.server_name) {
        return Err("another server leads the stream".into());
    }
    let asked = async {
        match &settings.monitor {
            Some(url) => ask_monitor(url).await,
            None => ask_system_account(client, &server).await,
        }
    };
    let jsz = timeout(REPORT_TIMEOUT, asked)
        .await
        .map_err(|_| format!("no report within {REPORT_TIMEOUT:?}"))??;
    if jsz.server_id.is_some_and(|id| id != server) {
        return Err("the monitoring address is of another server".into());
    }
    jsz.config
        .ok_or_else(|| "the report has no JetStream settings".into())
}

async fn ask_monitor(url: &str) -> Result<Jsz, String> {
    let url = format!("{}/jsz?config=true", url.trim_end_matches('/'));
    let endpoint = Endpoint::with_public_roots(&url)?;
    let asked = endpoint.ask(None, REPORT_TIMEOUT, REPORT_MAX).await;
    let (status, body) = asked.map_err(|why| why.to_string())?;
    if !status.is_success() {
        return Err(format!("the monitoring address answers {status}"));
    }
    serde_json::from_slice(&body).map_err(|why| why.to_string())
}

/// Only an account that imports this service of the system account gets an answer.
async fn ask_system_account(client: &Client, server: &str) -> Result<Jsz, String> {
    let subject = format!("$SYS.REQ.SERVER.{server}.JSZ");
    let answer = client.request(subject, r#"{"config":true}"#.into()).await;
    let answer = answer.map_err(|_| "no monitor is named")?;
    serde_json::from_slice(&answer.payload)
        .map(|SystemAnswer { data }| data)
        .map_err(|why| why.to_string())
}
