//! `waypost dead`: the dead letters of a running node, and the records that it has parked.

mod selection;
mod table;

use std::{collections::HashSet, pin::pin, process::ExitCode};

use clap::Subcommand;
use futures_util::FutureExt as _;
use serde_json::{Map, Value, json};

use self::selection::{LetterArgs, end_at, list_path, order};
pub(super) use self::table::listed;
use super::{
    admin::{AdminArgs, AdminClient},
    output::{failed, misused, print, tell, width},
    progress::Progress,
    run::stop_signal,
};
use crate::summary::format::count;

/// Records of one order. More are several, so that each has its answer in time and a run can end
/// between two.
const STEP: u64 = 500;
/// The most that the node lists.
const LISTED_MAX: usize = 10_000;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost dead list --lane nats --since 2h
  waypost dead list --parked --limit 20
  waypost dead replay 0198c5a1-7d3e-7a10-b7c2-5a3f0c9d1e2f
  waypost dead replay --reason 503            # shows the plan
  waypost dead replay --reason 503 --yes
  waypost dead drop --all --yes")]
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
    #[command(after_help = "\
Examples:
  waypost dead list --limit 20
  waypost dead list --reason given-up --since 2h")]
    List {
        #[command(flatten)]
        selection: LetterArgs,
        /// The most that are listed [default: 100; with --all, 10000]
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// Send dead letters to the API again
    #[command(after_help = "\
Examples:
  waypost dead replay order-4711
  waypost dead replay --lane nats --reason 422
  waypost dead replay --all --yes")]
    Replay(DeadRun),
    /// Remove dead letters for good
    #[command(after_help = "\
Examples:
  waypost dead drop order-4711
  waypost dead drop --until 30d --yes")]
    Drop(DeadRun),
}

#[derive(Debug, clap::Args)]
pub struct DeadRun {
    #[command(flatten)]
    selection: LetterArgs,
    /// Carry out the plan; without it, --all and filters only show how many records match
    #[arg(long)]
    yes: bool,
}

/// An action on records, and what has been done after it.
#[derive(Clone, Copy)]
struct Verb {
    action: &'static str,
    done: &'static str,
}

const REPLAY: Verb = Verb {
    action: "replay",
    done: "replayed",
};
const DROP: Verb = Verb {
    action: "drop",
    done: "dropped",
};

/// The node, and the API there, that have the records.
struct LetterPlace<'p> {
    node: &'p AdminClient,
    parked: bool,
    api: Option<&'p str>,
    json: bool,
}

/// Lists, replays or drops.
pub async fn dead(args: Args) -> Result<(), ExitCode> {
    let node = args.node.client()?;
    let place = LetterPlace {
        node: &node,
        parked: args.parked,
        api: args.api.as_deref(),
        json: args.json,
    };
    let (verb, run) = match args.action {
        DeadAction::List { selection, limit } => return place.list(&selection, limit).await,
        DeadAction::Replay(run) => (REPLAY, run),
        DeadAction::Drop(run) => (DROP, run),
    };
    if !run.selection.names_any() {
        let why = "name records by their IDs, by a filter such as --lane, or by --all";
        return Err(misused(format_args!("{}: {why}", verb.action)));
    }
    if run.selection.ids.is_empty() {
        place.plan(verb, &run).await
    } else {
        place.order_ids(verb, run.selection.ids).await
    }
}

impl LetterPlace<'_> {
    async fn list(&self, selection: &LetterArgs, limit: Option<usize>) -> Result<(), ExitCode> {
        let usual = if selection.all { LISTED_MAX } else { 100 };
        let limit = limit.unwrap_or(usual);
        let answer = if selection.ids.is_empty() {
            let filter = selection.filter.members();
            self.find(&filter, limit, self.json).await?
        } else {
            self.find_ids(&selection.ids, limit).await?
        };
        if self.json {
            print(&answer)?;
        } else {
            print(listed(&answer, self.parked, width()))?;
        }
        let asked = selection.ids.iter().collect::<HashSet<_>>();
        let found: HashSet<_> = self
            .records(&answer)
            .iter()
            .map(|found| &found["id"])
            .collect();
        let found = asked.iter().filter(|id| found.contains(&json!(id))).count();
        let is_cut = self.records(&answer).len() >= limit;
        if is_cut {
            Ok(())
        } else {
            self.all_found(found, asked.len())
        }
    }

    /// The node's answer about the records that match.
    async fn find(
        &self,
        filter: &Map<String, Value>,
        limit: usize,
        with_records: bool,
    ) -> Result<Value, ExitCode> {
        let path = |limit: usize, after: Option<&str>| {
            list_path(filter, self.parked, self.api, (limit, after), with_records)
        };
        let mut all: Value = self.node.get(&path(limit, None)).await?;
        // Large records make a list end early.
        while let Some(next) = all["next"].as_str()
            && let left = limit - self.records(&all).len()
            && left > 0
        {
            let mut page: Value = self.node.get(&path(left, Some(next))).await?;
            all["next"] = page["next"].take();
            let name = self.list_name();
            if let (Some(all), Some(more)) = (all[name].as_array_mut(), page[name].as_array_mut()) {
                all.append(more);
            }
        }
        Ok(all)
    }

    /// The same for ids: the node is asked for one after the other.
    async fn find_ids(&self, ids: &[String], limit: usize) -> Result<Value, ExitCode> {
        let mut all = json!({});
        let (mut records, mut matching) = (Vec::new(), 0);
        let mut asked = HashSet::new();
        for id in ids.iter().filter(|id| asked.insert(*id)) {
            let filter = [("id".into(), id.as_str().into())].into_iter().collect();
            let room = limit - records.len();
            all = self.find(&filter, room, self.json).await?;
            records.extend_from_slice(self.records(&all));
            matching += all["matching"].as_u64().unwrap_or_default();
        }
        all["matching"] = matching.into();
        all[self.list_name()] = records.into();
        Ok(all)
    }

    const fn list_name(&self) -> &'static str {
        if self.parked { "parked" } else { "dead" }
    }

    fn records<'a>(&self, answer: &'a Value) -> &'a [Value] {
        let records = answer[self.list_name()].as_array();
        records.map_or(&[], Vec::as_slice)
    }

    /// Gives the order for these ids.
    async fn order_ids(&self, verb: Verb, ids: Vec<String>) -> Result<(), ExitCode> {
        let asked = ids.iter().collect::<HashSet<_>>().len();
        let order = order(("ids", json!(ids)), self.parked, self.api);
        let path = format!("/api/dead/{}", verb.action);
        let answer = self.node.order(&path, &order).await?;
        let done = answer[verb.done].as_u64().unwrap_or_default();
        self.show_done(verb, done)?;
        self.all_found(usize::try_from(done).unwrap_or(asked), asked)
    }

    fn all_found(&self, found: usize, asked: usize) -> Result<(), ExitCode> {
        if found >= asked {
            return Ok(());
        }
        let (missing, what) = (asked - found, what(self.parked));
        Err(failed(format!("{missing} of {asked} ids name no {what}")))
    }

    /// Counts the records that match, and if the operator has said so, gives the orders for them.
    async fn plan(&self, verb: Verb, run: &DeadRun) -> Result<(), ExitCode> {
        let mut filter = run.selection.filter.members();
        // A filter with a member has an end, so what comes after the plan is no part of it.
        filter.entry("since_ms").or_insert_with(|| 0.into());
        let found = self.find(&filter, 0, false).await?;
        let number = |name: &str| found[name].as_u64().unwrap_or_default();
        let (matching, total) = (number("matching"), number("total"));
        end_at(&mut filter, number("at_ms"));
        let words = run.selection.filter.words(self.parked, self.api);
        tell(format_args!(
            "Plan: {} {} of {} on disk: {words}",
            verb.action,
            count(matching),
            count(total)
        ));
        if run.yes || matching == 0 {
            return self.run(verb, &filter, matching).await;
        }
        if self.json {
            print(json!({"matching": matching, "total": total}))?;
        }
        let done = verb.done;
        Err(failed(format_args!("nothing is {done}: --yes goes on")))
    }

    /// Gives orders for `planned` records, step by step. Ctrl-C ends it after the step under way.
    async fn run(
        &self,
        verb: Verb,
        filter: &Map<String, Value>,
        planned: u64,
    ) -> Result<(), ExitCode> {
        let path = format!("/api/dead/{}", verb.action);
        let progress = (planned > STEP).then(|| Progress::new(planned, verb.done));
        let mut end = pin!(stop_signal());
        let mut done = 0;
        let mut outcome = Ok(());
        while done < planned {
            if let Some(stopped) = end.as_mut().now_or_never() {
                stopped?;
                outcome = Err(failed("stopped by a signal"));
                break;
            }
            let mut order = order(("filter", filter.clone().into()), self.parked, self.api);
            order["limit"] = STEP.min(planned - done).into();
            let step = match self.node.order(&path, &order).await {
                Ok(answer) => answer[verb.done].as_u64().unwrap_or_default(),
                Err(status) => {
                    outcome = Err(status);
                    break;
                }
            };
            // Somebody else has replayed or dropped the others.
            if step == 0 {
                break;
            }
            done += step;
            if let Some(progress) = &progress {
                progress.reached(done);
            }
        }
        if let Some(progress) = &progress {
            progress.end();
        }
        self.show_done(verb, done)?;
        outcome
    }

    fn show_done(&self, verb: Verb, done: u64) -> Result<(), ExitCode> {
        let name = verb.done;
        if self.json {
            print(json!({name: done}))
        } else {
            print(format_args!("{done} {name}"))
        }
    }
}

const fn what(parked: bool) -> &'static str {
    if parked {
        "parked record"
    } else {
        "dead letter"
    }
}
