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
    let config = &stream.config;
    let by_word = by_word(settings.sync, config.storage, config.num_replicas);
    let why = match by_word {
        Word::Settles(durability) => return (durability, None),
        Word::Ignored(why) => why,
    };
    let (durability, report) = read(report(client, settings, stream).await);
    let warning = report.map(|report| {
        format!(
            "{report}: a power cut may take what it has confirmed last{why}; set \
             `sync_interval: always` on the server, and name its monitoring address in \
             [lanes.nats].monitor"
        )
    });
    (durability, warning)
}

/// What the operator's word for a stream is worth.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    /// The server is not asked.
    Settles(Durability),
    /// Why it settles nothing, for a warning; empty if there is none.
    Ignored(String),
}

fn by_word(word: Option<NatsSync>, storage: StorageType, replicas: usize) -> Word {
    if storage == StorageType::Memory {
        let after = Duration::MAX;
        // The stream's own warning says why.
        return Word::Settles(Durability::No { after });
    }
    match word {
        Some(NatsSync::Always) => Word::Settles(Durability::Yes),
        Some(NatsSync::Replicated) if replicas >= REPLICAS_MIN => Word::Settles(Durability::Yes),
        Some(NatsSync::Replicated) => Word::Ignored(format!(
            "; sync = \"replicated\" takes {REPLICAS_MIN} replicas, and the stream has {replicas}"
        )),
        None => Word::Ignored(String::new()),
    }
}

/// The durability by the server's report, and what the report says unless it is durable at once.
fn read(report: Result<JszConfig, String>) -> (Durability, Option<String>) {
    match report {
        Ok(JszConfig {
            sync_always: true, ..
        }) => (Durability::Yes, None),
        Ok(JszConfig { sync_interval, .. }) => {
            let interval = sync_interval.map_or(SYNC_INTERVAL, Duration::from_nanos);
            let after = interval.saturating_add(SYNC_MARGIN);
            let why = format!("the server syncs its files every {interval:?}");
            (Durability::No { after }, Some(why))
        }
        Err(why) => {
            let after = SYNC_INTERVAL + SYNC_MARGIN;
            let why = format!("the server's sync_interval is unknown ({why})");
            (Durability::Unknown { after }, Some(why))
        }
    }
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
    let (status, _, body) = asked.map_err(|why| why.to_string())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_of_the_operator_counts_where_it_can_be_true() {
        use NatsSync::{Always, Replicated};
        use StorageType::{File, Memory};
        const YES: Option<Durability> = Some(Durability::Yes);
        const NEVER: Option<Durability> = Some(Durability::No {
            after: Duration::MAX,
        });
        for (word, storage, replicas, settled) in [
            (None, File, 1, None),
            (None, File, 3, None),
            (Some(Always), File, 1, YES),
            (Some(Replicated), File, 1, None),
            (Some(Replicated), File, 2, None),
            (Some(Replicated), File, 3, YES),
            (Some(Replicated), File, 5, YES),
            (None, Memory, 3, NEVER),
            (Some(Always), Memory, 1, NEVER),
            (Some(Replicated), Memory, 3, NEVER),
        ] {
            let told = by_word(word, storage, replicas);
            let case = format!("{word:?} {storage:?} {replicas}: {told:?}");
            match told {
                Word::Settles(durability) => assert_eq!(Some(durability), settled, "{case}"),
                Word::Ignored(why) => {
                    assert_eq!(settled, None, "{case}");
                    let is_told = why.contains(&format!("the stream has {replicas}"));
                    assert_eq!(is_told, word == Some(Replicated), "{case}");
                }
            }
        }
    }

    #[test]
    fn the_report_of_the_server_says_when_a_confirm_is_durable() {
        let after = |after_s| Durability::No {
            after: Duration::from_secs(after_s),
        };
        for (report, durability) in [
            (r#"{"sync_always":true}"#, Durability::Yes),
            (
                r#"{"sync_always":true,"sync_interval":120000000000}"#,
                Durability::Yes,
            ),
            (r#"{"sync_interval":10000000000}"#, after(40)),
            (
                r#"{"sync_interval":120000000000,"sync_always":false}"#,
                after(150),
            ),
            ("{}", after(150)),
        ] {
            let config = serde_json::from_str(report).unwrap();
            let (told, why) = read(Ok(config));
            assert_eq!(told, durability, "{report}");
            assert_eq!(why.is_none(), told == Durability::Yes, "{report}");
        }
        let (told, why) = read(Err("silent".into()));
        let unknown = Durability::Unknown {
            after: Duration::from_secs(150),
        };
        assert_eq!(told, unknown);
        assert!(why.is_some_and(|why| why.contains("silent")));
    }
}
