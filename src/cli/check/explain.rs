//! `waypost check --explain`: the way of one record, as a node that has just started decides it.

use std::{fs, path::Path, process::ExitCode, time::Duration};

use actix_web::http::header::HeaderMap;
use bytes::Bytes;

use super::super::{
    header::{Header, header_map},
    output::{misused, print},
};
use crate::{
    clock::unix_us,
    cloud_events::{self, EventAttributes},
    config::Config,
    http::ingest::{Content, EVENT_PREFIX, idempotency_key, value_text},
    record::{Record, as_text, parse_body},
    routing::{
        choose::{Candidates, Choice, Chooser},
        explain::{Explanation, trace_lines},
        policy::Policy,
        rules::Assignment,
        scores::Scores,
    },
};

/// Prints rule, policy, lane, API and runner-up of the record in `file`, posted with these
/// `NAME: VALUE` headers, and each rule that was tried.
pub fn explain(config: &Config, file: &Path, headers: &[Header]) -> Result<(), ExitCode> {
    let wrong = |why: String| misused(format!("--explain {}: {why}", file.display()));
    let headers = header_map(headers);
    let key = idempotency_key(&headers);
    let key = key.map_err(|why| misused(format_args!("--header: {why}")))?;
    let body = fs::read(file).map_err(|why| wrong(format!("cannot be read: {why}")))?;
    let (attributes, body) = read_event(&headers, &body.into()).map_err(wrong)?;
    // The configuration is valid.
    let routes = config.routes().map_err(|_| ExitCode::FAILURE)?;
    let rules = config.ingest.record_rules();
    let parsed = parse_body(&body, &rules, routes.pointers());
    let (_, values) = parsed.map_err(|why| wrong(why.to_string()))?;
    let id = match &attributes {
        Some(event) => event.key(),
        None => key.unwrap_or_else(Record::new_id),
    };
    let header = |name: &str| match (&attributes, name.strip_prefix(EVENT_PREFIX)) {
        (Some(event), Some(attribute)) => event.get(attribute),
        _ => headers.get(name).map(value_text),
    };
    let assignment = routes.assign(&id, &values, header);
    let mut told = format!("id         {id}\n{}\n", decide(config, assignment));
    if !config.routes.is_empty() {
        for tried in trace_lines(&routes.trace(&values, header)) {
            told = format!("{told}\n{tried}");
        }
        told.push('\n');
    }
    print(format_args!(
        "{told}\nAll lanes are up and unused, as if the node had just started."
    ))
}

fn decide(config: &Config, Assignment { route, key, .. }: Assignment) -> Explanation {
    let scores = Scores::new(route.policy.measures(), config.router.publish_timeout);
    let now = Duration::ZERO;
    for &lane in &route.lanes {
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
        choice: match (route.policy, route.lanes.first()) {
            (Policy::Broadcast, Some(lane)) => Some(Choice::pinned(*lane)),
            _ => Chooser::new(0).choose(&route, key, 1, &candidates),
        },
        route,
        is_first: true,
    }
}

/// The record of a request, and the attributes if it is an event.
fn read_event(
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<(Option<EventAttributes>, Bytes), String> {
    match Content::of(headers).map_err(|problem| problem.detail().to_owned())? {
        Content::Json => Ok((None, body.clone())),
        Content::BinaryEvent(event) => Ok((Some(*event), body.clone())),
        Content::StructuredEvent => {
            let text = as_text(body).map_err(|why| why.to_string())?;
            let event = cloud_events::parse_event(body, text);
            let event = event.map_err(|why| why.to_string())?;
            Ok((Some(event.attributes), event.data))
        }
        Content::Lines | Content::EventBatch => {
            Err("is of a type for many records; one is explained at a time".into())
        }
    }
}
