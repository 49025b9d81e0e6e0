//! `waypost tap`: records as they pass.

use std::{ops::ControlFlow, pin::pin, process::ExitCode, time::Duration};

use clap::{builder::PossibleValuesParser, value_parser};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};
use url::form_urlencoded;

use super::{
    admin::{AdminArgs, AdminClient},
    event_stream::EventStream,
    output::{print_line, tell},
    run::stop_signal,
};
use crate::lane_id::LaneId;

/// A node that says nothing for longer is away: it tells more often that it lives.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The time between two attempts to reach a node that was lost.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  waypost tap
  waypost tap --lane nats --limit 10
  waypost tap --sample 100 | jq .record

A line is a record that the API has taken, or {\"missed\":N}: so many passed
unseen, because the reader was too slow; they are of all lanes, and --sample
leaves none of them out. The node waits for no reader. If the node is started
again, the command goes on with {\"missed\":null,\"away_s\":S}: nobody knows how
many have passed in those seconds.")]
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

/// Prints records until the limit, a signal, or the end of the reader. Fails if the node is away at the
/// begin.
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

/// Why a stream has ended.
enum WatchEnd {
    /// The limit, or the end of the reader.
    Done,
    Lost(String),
}

async fn watch(node: &AdminClient, path: &str, mut left: Option<u64>) -> Result<(), ExitCode> {
    let opened = node.events(path, None).await;
    let mut events = opened.map_err(|why| node.failed(why))?;
    while let WatchEnd::Lost(why) = show(&mut events, &mut left).await? {
        let lost = Instant::now();
        tell(format_args!(
            "waypost: --admin {}: {why}; waits for it",
            node.url()
        ));
        events = watch_again(node, path).await;
        let away = lost.elapsed();
        tell(format_args!(
            "waypost: --admin {}: it shows records again",
            node.url()
        ));
        // Nobody knows how many have passed meanwhile.
        let missed = json!({"missed": null, "away_s": away.as_secs_f64()});
        if print_line(&missed.to_string())? == ControlFlow::Break(()) {
            break;
        }
    }
    Ok(())
}

/// Opens the stream once the node answers.
async fn watch_again(node: &AdminClient, path: &str) -> EventStream {
    loop {
        sleep(AGAIN_AFTER).await;
        if let Ok(events) = node.events(path, None).await {
            return events;
        }
    }
}

/// Prints the records of a stream, so many as are `left`.
async fn show(events: &mut EventStream, left: &mut Option<u64>) -> Result<WatchEnd, ExitCode> {
    while *left != Some(0) {
        let event = match timeout(SILENCE_MAX, events.next()).await {
            Ok(Ok(event)) => event,
            Ok(Err(why)) => return Ok(WatchEnd::Lost(why)),
            Err(_) => return Ok(WatchEnd::Lost(format!("silent for {SILENCE_MAX:?}"))),
        };
        let is_record = event.name == "record";
        if !is_record && event.name != "missed" {
            continue;
        }
        if print_line(&event.data)? == ControlFlow::Break(()) {
            return Ok(WatchEnd::Done);
        }
        if is_record {
            *left = left.map(|left| left - 1);
        }
    }
    Ok(WatchEnd::Done)
}
