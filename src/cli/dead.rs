//! `waypost dead`: the dead letters of a running node, and the records that it has parked.

use std::{collections::HashSet, process::ExitCode, time::Duration};

use clap::Subcommand;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::output::{failed, print};
use crate::api::client::Endpoint;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest list that is read.
const ANSWER_MAX: usize = 1 << 30;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub action: DeadAction,
    /// The admin address of the node
    #[arg(
        long,
        global = true,
        default_value = "http://127.0.0.1:8001",
        value_name = "URL"
    )]
    pub admin: String,
    /// The records that are parked between two tries, instead of the dead letters
    #[arg(long, global = true)]
    pub parked: bool,
    /// Only those of this API: a NAME of `[apis.NAME]`, or `default` for `[api]`
    #[arg(long, global = true, value_name = "NAME")]
    pub api: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum DeadAction {
    /// List the oldest dead letters
    List {
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Send dead letters to the API again
    Replay(DeadSelection),
    /// Remove dead letters for good
    Drop(DeadSelection),
}

#[derive(Debug, clap::Args)]
#[group(required = true)]
pub struct DeadSelection {
    /// Records by their id
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
}

impl DeadSelection {
    fn body(&self, parked: bool, api: Option<&str>) -> Value {
        let (name, which) = if self.all {
            ("all", json!(true))
        } else {
            ("ids", json!(self.ids))
        };
        let mut body = json!({"parked": parked});
        body[name] = which;
        if let Some(api) = api {
            body["api"] = api.into();
        }
        body
    }
}

/// Lists, replays or drops.
pub async fn dead(args: Args) -> Result<(), ExitCode> {
    let parked = args.parked;
    let api = args.api.as_deref();
    let (path, body) = match &args.action {
        DeadAction::List { limit } => {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("limit", &limit.to_string());
            query.append_pair("parked", &parked.to_string());
            query.extend_pairs(api.map(|api| ("api", api)));
            (format!("?{}", query.finish()), None)
        }
        DeadAction::Replay(selection) => ("/replay".into(), Some(selection.body(parked, api))),
        DeadAction::Drop(selection) => ("/drop".into(), Some(selection.body(parked, api))),
    };
    let asked = ask(&args.admin, path, body);
    let answer = asked
        .await
        .map_err(|why| failed(format!("{}: {why}", args.admin)))?;
    let (done, selection) = match &args.action {
        DeadAction::List { .. } if !args.json => return print(listed(&answer, parked)),
        DeadAction::List { .. } => return print(answer),
        DeadAction::Replay(selection) => ("replayed", selection),
        DeadAction::Drop(selection) => ("dropped", selection),
    };
    if args.json {
        print(&answer)?;
    } else {
        print(format_args!("{} {done}", answer[done]))?;
    }
    let asked = selection.ids.iter().collect::<HashSet<_>>().len() as u64;
    let found = answer[done].as_u64().unwrap_or_default();
    if found < asked {
        let missing = asked - found;
        return Err(failed(format!(
            "{missing} of {asked} ids name no {}",
            what(parked)
        )));
    }
    Ok(())
}

/// The node's answer to a POST of `body`, or to a GET.
async fn ask(admin: &str, path: String, body: Option<Value>) -> Result<Value, String> {
    let url = format!("{}/api/dead{path}", admin.trim_end_matches('/'));
    let body = body.map(|body| body.to_string().into());
    // A long replay takes its time.
    let asked = Endpoint::with_public_roots(&url)?
        .ask(body, CONNECT_TIMEOUT, ANSWER_MAX)
        .await;
    let (status, answer) = asked.map_err(|failure| failure.to_string())?;
    let answer = serde_json::from_slice::<Value>(&answer);
    if status.is_success() {
        return answer.map_err(|why| format!("status {status}, not an answer of a node: {why}"));
    }
    // A proxy before the node may refuse in another form.
    let detail = answer
        .ok()
        .and_then(|answer| answer["detail"].as_str().map(str::to_owned));
    Err(detail.unwrap_or_else(|| format!("status {status}")))
}

fn listed(answer: &Value, parked: bool) -> String {
    let records = if parked {
        &answer["parked"]
    } else {
        &answer["dead"]
    };
    let mut lines = vec![format!(
        "{:<36}  {:<8}  {:>6}  {:>5}  answer",
        "id", "lane", "status", "tries"
    )];
    for record in records.as_array().into_iter().flatten() {
        let text = |name: &str| record[name].as_str().unwrap_or_default();
        let status = match &record["status"] {
            Value::Null => "none".to_owned(),
            status => status.to_string(),
        };
        // Control characters in the API's answer must not reach the terminal.
        let first_line = text("answer").lines().next().unwrap_or_default();
        let first_line: String = first_line.chars().filter(|c| !c.is_control()).collect();
        lines.push(format!(
            "{:<36}  {:<8}  {status:>6}  {:>5}  {first_line}",
            text("id"),
            text("lane"),
            record["attempts"].to_string()
        ));
    }
    lines.push(format!("{} {}s", answer["total"], what(parked)));
    lines.join("\n")
}

const fn what(parked: bool) -> &'static str {
    if parked {
        "parked record"
    } else {
        "dead letter"
    }
}
