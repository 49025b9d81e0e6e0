//! `waypost check --simulate`: the routing of the configuration in simulated time.

use std::{fs, path::Path, process::ExitCode};

use bytes::Bytes;

use super::super::{
    TRAFFIC,
    output::{misused, print},
};
use crate::{
    config::Config,
    load::records,
    record::parse_body,
    routing::simulation::{RoutedNode, SimulationPlan, simulate as play},
};

/// Plays the plan in `file`, and prints what each lane delivers and how long that takes.
pub fn simulate(config: &Config, file: &Path) -> Result<(), ExitCode> {
    let lanes = config.lanes.in_order().into_iter();
    let lanes: Vec<_> = lanes
        .map(|(lane, _)| (lane, config.lanes.weight(lane).unwrap_or(1)))
        .collect();
    let ids: Vec<_> = lanes.iter().map(|(lane, _)| *lane).collect();
    let wrong = |why: String| misused(format_args!("--simulate {why}"));
    let plan = read(file).map_err(wrong)?;
    if let Some(mistake) = plan.mistake(&ids) {
        return Err(wrong(format!("{}: {mistake}", file.display())));
    }
    // The configuration is valid.
    let routes = config.routes().map_err(|_| ExitCode::FAILURE)?;
    let bodies = bodies(&plan, file).map_err(wrong)?;
    let rules = config.ingest.record_rules();
    let values = bodies.iter().enumerate().map(|(at, body)| {
        let parsed = parse_body(body, &rules, routes.pointers());
        let (_, values) = parsed.map_err(|why| format!("record {}: {why}", at + 1))?;
        Ok(values)
    });
    let values: Result<Vec<_>, String> = values.collect();
    let node = RoutedNode {
        routes: &routes,
        lanes: &lanes,
        publish_timeout: config.router.publish_timeout,
    };
    print(play(&node, &plan, &values.map_err(wrong)?))
}

fn read(file: &Path) -> Result<SimulationPlan, String> {
    let shown = file.display();
    let text = fs::read_to_string(file).map_err(|why| format!("{shown}: cannot be read: {why}"))?;
    toml::from_str(&text).map_err(|why| {
        let at = why.span().map_or(0, |span| span.start).min(text.len());
        let line = 1 + text[..at].matches('\n').count();
        format!("{shown}:{line}: {}", why.message())
    })
}

/// The records of the plan; a path is relative to the plan's folder.
fn bodies(plan: &SimulationPlan, file: &Path) -> Result<Vec<Bytes>, String> {
    let Some(named) = &plan.records else {
        return records(TRAFFIC);
    };
    let path = file.parent().unwrap_or(Path::new("")).join(named);
    let wrong = |why: String| format!("{}: {why}", path.display());
    let text = fs::read_to_string(&path).map_err(|why| wrong(format!("cannot be read: {why}")))?;
    records(&text).map_err(wrong)
}
