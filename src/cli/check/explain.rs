//! `waypost check --explain`: the way of one record, as a node that has just started decides it.

use std::{fs, path::Path, process::ExitCode, time::Duration};

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};

use super::super::output::{misused, print};
use crate::{
    clock::unix_us,
    config::Config,
    http::ingest::idempotency_key,
    lane_id::LaneId,
    record::{Record, parse},
    routing::{
        choose::{Candidates, Chooser},
        explain::Explanation,
        scores::Scores,
    },
};

/// Prints rule, policy, lane, API and runner-up of the record in `file`, posted with these
/// `NAME: VALUE` headers.
pub fn explain(config: &Config, file: &Path, headers: &[String]) -> Result<(), ExitCode> {
    let wrong = |why: String| misused(format!("{}: {why}", file.display()));
    let headers = read_headers(headers).map_err(misused)?;
    let key = idempotency_key(&headers).map_err(misused)?;
    let body = fs::read(file).map_err(|why| wrong(format!("cannot be read: {why}")))?;
    parse(&body.into(), config.ingest.schema).map_err(|why| wrong(why.to_string()))?;
    let id = key.unwrap_or_else(Record::new_id);
    print(format_args!(
        "id         {id}\n{}\n\nAll lanes are up and unused, as if the node had just started.",
        decide(config, &id)
    ))
}

fn decide(config: &Config, id: &str) -> Explanation {
    let policy = config.router.policy;
    let scores = Scores::new(policy, config.router.publish_timeout);
    let now = Duration::ZERO;
    let lanes: Vec<_> = config.lanes.in_order();
    let lanes: Vec<LaneId> = lanes.into_iter().map(|(lane, _)| lane).collect();
    for &lane in &lanes {
        scores.set_weight(lane, config.lanes.weight(lane).unwrap_or(1));
        scores.lane_up(lane, now);
    }
    let candidates = Candidates {
        may_take: &|_| true,
        scores: &scores,
        undelivered: &|_| 0,
        now,
    };
    Explanation {
        at_us: unix_us(),
        policy,
        choice: Chooser::new(policy, lanes.into(), 0).choose(id, 1, &candidates),
        is_first: true,
    }
}

fn read_headers(lines: &[String]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for line in lines {
        let header = line.split_once(':').and_then(|(name, value)| {
            let name = name.trim().parse::<HeaderName>().ok()?;
            Some((name, HeaderValue::from_str(value.trim()).ok()?))
        });
        let (name, value) = header
            .ok_or_else(|| format!("--header {line:?} is no header; allowed is 'NAME: VALUE'"))?;
        headers.append(name, value);
    }
    Ok(headers)
}
