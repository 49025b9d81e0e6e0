//! `waypost dead`: the dead letters of a running node.

use std::{process::ExitCode, time::Duration};

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Value, json};

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
    fn body(&self) -> Value {
        if self.all {
            json!({"all": true})
        } else {
            json!({"ids": self.ids})
        }
    }
}

/// Lists, replays or drops.
pub async fn dead(args: Args) -> ExitCode {
    let answer = match &args.action {
        DeadAction::List { limit } => ask(&args.admin, &format!("?limit={limit}"), None).await,
        DeadAction::Replay(selection) => ask(&args.admin, "/replay", Some(selection.body())).await,
        DeadAction::Drop(selection) => ask(&args.admin, "/drop", Some(selection.body())).await,
    };
    match answer {
        Ok(answer) if args.json => println!("{answer}"),
        Ok(answer) => match args.action {
            DeadAction::List { .. } => show(&answer),
            DeadAction::Replay(_) => println!("{} replayed", answer["replayed"]),
            DeadAction::Drop(_) => println!("{} dropped", answer["dropped"]),
        },
        Err(why) => {
            eprintln!("{}: {why}", args.admin);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// The node's answer to a POST of `body`, or to a GET.
async fn ask(admin: &str, path: &str, body: Option<Value>) -> Result<Value, String> {
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
        .as_ref()
        .ok()
        .and_then(|answer| answer["detail"].as_str());
    Err(detail.map_or_else(|| format!("status {status}"), ToOwned::to_owned))
}

fn show(answer: &Value) {
    #[derive(Deserialize)]
    struct Letter {
        id: String,
        lane: String,
        status: Option<u32>,
        answer: String,
        attempts: u32,
    }
    println!(
        "{:<36}  {:<8}  {:>6}  {:>5}  answer",
        "id", "lane", "status", "tries"
    );
    for letter in answer["dead"].as_array().into_iter().flatten() {
        let Ok(Letter {
            id,
            lane,
            status,
            answer,
            attempts,
        }) = Letter::deserialize(letter)
        else {
            continue;
        };
        let status = status.map_or_else(|| "none".to_owned(), |status| status.to_string());
        // Control characters in the API's answer must not reach the terminal.
        let line: String = answer
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        println!("{id:<36}  {lane:<8}  {status:>6}  {attempts:>5}  {line}");
    }
    println!("{} dead letters", answer["total"]);
}
