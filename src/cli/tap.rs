//! `waypost tap`: records as they pass.

use std::{ops::ControlFlow, pin::pin, process::ExitCode, time::Duration};

use clap::{builder::PossibleValuesParser, value_parser};
use tokio::time::timeout;
use url::form_urlencoded;

use super::{
    admin::{AdminArgs, AdminClient},
    output::print_line,
    run::stop_signal,
};
use crate::lane_id::LaneId;

/// A node that says nothing for longer is away: it tells more often that it lives.
const SILENCE_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost tap
  waypost tap --lane nats --limit 10
  waypost tap --sample 100 | jq .record

A line is a record that the API has taken, or {\"missed\":N}: so many passed
unseen, because the reader was too slow; they are of all lanes, and --sample
leaves none of them out. The node waits for no reader.")]
pub struct Args {
    /// Only records of this lane
    #[arg(long, value_name = "LANE", value_parser = PossibleValuesParser::new(LaneId::ALL.map(LaneId::name)))]
    lane: Option<String>,
    /// End after so many records
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Show one of N records
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    sample: Option<u64>,
    #[command(flatten)]
    node: AdminArgs,
}

/// Prints records until the limit, a signal, or the end of the reader. Fails if the node is away.
pub async fn tap(args: Args) -> Result<(), ExitCode> {
    let node = args.node.client()?;
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.extend_pairs(args.lane.iter().map(|lane| ("lane", lane)));
    let sample = args.sample.map(|sample| sample.to_string());
    query.extend_pairs(sample.iter().map(|sample| ("sample", sample)));
    let path = format!("/api/tap?{}", query.finish());
    let mut stop = pin!(stop_signal());
    tokio::select! {
        stopped = &mut stop => stopped,
        ended = watch(&node, &path, args.limit) => ended,
    }
}

async fn watch(node: &AdminClient, path: &str, limit: Option<u64>) -> Result<(), ExitCode> {
    let opened = node.events(path, None).await;
    let mut events = opened.map_err(|why| node.failed(why))?;
    let mut left = limit;
    while left != Some(0) {
        let next = timeout(SILENCE_MAX, events.next()).await;
        let silent = |_| node.failed(format!("silent for {SILENCE_MAX:?}"));
        let event = next.map_err(silent)?.map_err(|why| node.failed(why))?;
        let is_record = event.name == "record";
        if !is_record && event.name != "missed" {
            continue;
        }
        if print_line(&event.data)? == ControlFlow::Break(()) {
            return Ok(());
        }
        if is_record {
            left = left.map(|left| left - 1);
        }
    }
    Ok(())
}
