//! `waypost dead`: the dead letters of a running node, and the records that it has parked.

use std::{collections::HashSet, process::ExitCode};

use clap::Subcommand;
use serde_json::{Value, json};
use url::form_urlencoded;

use super::{
    admin::AdminArgs,
    output::{failed, print},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub action: DeadAction,
    #[command(flatten)]
    pub node: AdminArgs,
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
    let node = args.node.client()?;
    let answer = match &args.action {
        DeadAction::List { limit } => {
            let mut query = form_urlencoded::Serializer::new(String::new());
            query.append_pair("limit", &limit.to_string());
            query.append_pair("parked", &parked.to_string());
            query.extend_pairs(api.map(|api| ("api", api)));
            node.get(&format!("/api/dead?{}", query.finish())).await?
        }
        DeadAction::Replay(selection) => {
            let order = selection.body(parked, api);
            node.order("/api/dead/replay", &order).await?
        }
        DeadAction::Drop(selection) => {
            let order = selection.body(parked, api);
            node.order("/api/dead/drop", &order).await?
        }
    };
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
