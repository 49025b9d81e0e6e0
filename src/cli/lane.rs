//! `waypost lane`: the lanes of a running node, and the orders to them.

use std::process::ExitCode;

use clap::{Subcommand, builder::PossibleValuesParser};
use serde_json::{Value, json};

use super::{
    admin::{AdminArgs, AdminClient},
    output::{failed, misused, print},
};
use crate::{
    config::WEIGHT_MAX,
    lane_id::LaneId,
    summary::{
        LaneSummary, NodeSummary, OrderSummary,
        format::{age, one_line, percent},
    },
};

const EXAMPLES: &str = "\
Examples:
  waypost lane list
  waypost lane pause nats
  waypost lane resume --all
  waypost lane restart rabbitmq pubsub
  waypost lane weight nats=3 grpc=1";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: LaneAction,
    #[command(flatten)]
    node: AdminArgs,
    /// Print the lanes as the node answers them
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum LaneAction {
    /// List the lanes: state, restarts, weight, share and the last order
    #[command(after_help = "Example:\n  waypost lane list")]
    List {
        /// Only these lanes
        #[arg(value_name = "LANE", value_parser = names())]
        lanes: Vec<String>,
    },
    /// Disconnect lanes: they take no records and deliver none until they are resumed
    #[command(after_help = "Example:\n  waypost lane pause nats")]
    Pause(LaneSelection),
    /// Let lanes deliver what they have, and take nothing new until they are resumed
    #[command(after_help = "Example:\n  waypost lane drain nats")]
    Drain(LaneSelection),
    /// End a pause or a drain
    #[command(after_help = "Example:\n  waypost lane resume --all")]
    Resume(LaneSelection),
    /// Connect lanes anew; ends a pause, and no drain
    #[command(after_help = "Example:\n  waypost lane restart rabbitmq pubsub")]
    Restart(LaneSelection),
    /// Set how large a part of the records lanes take, with a policy that reads weights
    #[command(after_help = "Examples:\n  waypost lane weight nats=3 grpc=1\n  \
                            waypost lane weight --all 1")]
    Weight(NewWeights),
}

#[derive(Debug, clap::Args)]
#[group(required = true)]
struct LaneSelection {
    /// The lanes
    #[arg(value_name = "LANE", value_parser = names())]
    lanes: Vec<String>,
    /// All lanes of the node
    #[arg(long, conflicts_with = "lanes")]
    all: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true)]
struct NewWeights {
    /// Lanes with their weights, from 0 to 1000
    #[arg(value_name = "LANE=WEIGHT", value_parser = lane_weight)]
    weights: Vec<(LaneId, usize)>,
    /// The weight of all lanes of the node
    #[arg(long, value_name = "WEIGHT", value_parser = weight, conflicts_with = "weights")]
    all: Option<usize>,
}

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(LaneId::ALL.map(LaneId::name))
}

fn weight(text: &str) -> Result<usize, String> {
    let weight = text.parse().ok().filter(|weight| *weight <= WEIGHT_MAX);
    weight.ok_or_else(|| format!("a weight is a whole number from 0 to {WEIGHT_MAX}"))
}

fn lane_weight(text: &str) -> Result<(LaneId, usize), String> {
    let (lane, number) = text.split_once('=').unwrap_or((text, ""));
    let known = LaneId::ALL.map(LaneId::name).join(", ");
    let id = LaneId::from_name(lane);
    let id = id.ok_or_else(|| format!("there is no lane {lane:?}; there are {known}"))?;
    Ok((id, weight(number)?))
}

/// Lists the lanes, or gives each of them the order. Fails if one was refused.
pub async fn lane(args: Args) -> Result<(), ExitCode> {
    let node = args.node.client()?;
    let (action, selection) = match args.action {
        LaneAction::List { lanes } => return list(&node, &lanes, args.json).await,
        LaneAction::Weight(weights) => return set_weights(&node, weights, args.json).await,
        LaneAction::Pause(selection) => ("pause", selection),
        LaneAction::Drain(selection) => ("drain", selection),
        LaneAction::Resume(selection) => ("resume", selection),
        LaneAction::Restart(selection) => ("restart", selection),
    };
    if selection.all {
        let answer = node
            .order(&format!("/api/lanes/{action}"), &json!({}))
            .await?;
        let lanes = answer["lanes"].as_array().cloned().unwrap_or_default();
        return show(&node, &lanes, args.json);
    }
    let lanes = selection.lanes.into_iter();
    let orders = lanes.map(|lane| (format!("/api/lanes/{lane}/{action}"), json!({})));
    give(&node, orders.collect(), args.json).await
}

async fn list(node: &AdminClient, only: &[String], as_json: bool) -> Result<(), ExitCode> {
    let status = node.get("/api/status").await?;
    let lanes = status["lanes"].as_array().cloned().unwrap_or_default();
    let is_asked =
        |lane: &&Value| only.is_empty() || only.iter().any(|name| lane["lane"] == **name);
    let shown: Vec<_> = lanes.iter().filter(is_asked).cloned().collect();
    show(node, &shown, as_json)?;
    let missing = only
        .iter()
        .find(|name| !lanes.iter().any(|lane| lane["lane"] == ***name));
    missing.map_or(Ok(()), |name| {
        Err(failed(format_args!("this node has no lane {name}")))
    })
}

async fn set_weights(
    node: &AdminClient,
    weights: NewWeights,
    as_json: bool,
) -> Result<(), ExitCode> {
    let mut wanted = weights.weights;
    if let Some(weight) = weights.all {
        let status: NodeSummary = node.read(node.get("/api/status").await?)?;
        let lanes = status.lanes.iter();
        let lanes = lanes.filter_map(|lane| LaneId::from_name(&lane.lane));
        wanted = lanes.map(|lane| (lane, weight)).collect();
    }
    for (at, (lane, _)) in wanted.iter().enumerate() {
        if wanted[..at].iter().any(|(earlier, _)| earlier == lane) {
            return Err(misused(format_args!("LANE=WEIGHT: {lane} has two weights")));
        }
    }
    let wanted = wanted.into_iter();
    let orders = wanted.map(|(lane, weight)| {
        let path = format!("/api/lanes/{lane}/weight");
        (path, json!({"weight": weight}))
    });
    give(node, orders.collect(), as_json).await
}

/// Gives one order after the other, also after one was refused.
async fn give(
    node: &AdminClient,
    orders: Vec<(String, Value)>,
    as_json: bool,
) -> Result<(), ExitCode> {
    let mut lanes = Vec::new();
    let mut outcome = Ok(());
    for (path, order) in orders {
        match node.order(&path, &order).await {
            Ok(lane) => lanes.push(lane),
            Err(status) => outcome = Err(status),
        }
    }
    show(node, &lanes, as_json)?;
    outcome
}

fn show(node: &AdminClient, lanes: &[Value], as_json: bool) -> Result<(), ExitCode> {
    if as_json {
        return print(Value::from(lanes));
    }
    if lanes.is_empty() {
        return Ok(());
    }
    let lanes: Vec<LaneSummary> = node.read(Value::from(lanes))?;
    print(table(&lanes))
}

fn table(lanes: &[LaneSummary]) -> String {
    let row = |cells: [&str; 7]| {
        let [lane, state, since, restarts, weight, share, order] = cells;
        let text = format!(
            "{lane:<8}  {state:<10}  {since:>7}  {restarts:>8}  {weight:>6}  {share:>5}  {order}"
        );
        text.trim_end().to_owned()
    };
    let head = row([
        "lane",
        "state",
        "for",
        "restarts",
        "weight",
        "share",
        "last order",
    ]);
    let rows = lanes.iter().map(|lane| {
        row([
            &one_line(&lane.lane),
            &one_line(lane.shown_state()),
            &age(lane.since_s),
            &lane.restarts.to_string(),
            &lane.weight.to_string(),
            &format!("{} %", percent(lane.share)),
            &lane.ordered.as_ref().map_or_else(String::new, order),
        ])
    });
    [head]
        .into_iter()
        .chain(rows)
        .collect::<Vec<_>>()
        .join("\n")
}

fn order(order: &OrderSummary) -> String {
    let action = order.action.as_deref().unwrap_or("order");
    format!("{} by {}", one_line(action), one_line(&order.by))
}
