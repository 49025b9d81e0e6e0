//! `waypost status`: the status of a running node, for people.

use std::process::ExitCode;

use bytesize::ByteSize;

use super::{
    admin::AdminArgs,
    output::{print, width},
};
use crate::{
    ledger::Balance,
    summary::{
        NodeSummary,
        format::{age, count, ms, one_line, percent, short_count, wrapped},
    },
};

const EXAMPLES: &str = "\
Examples:
  waypost status
  waypost status --admin http://10.0.0.7:8001
  waypost status --json | jq .ledger";

/// The width where there is no terminal.
const WIDTH: usize = 80;
/// A longer line is hard to read.
const WIDTH_MAX: usize = 100;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    node: AdminArgs,
    /// Print the status as the node answers it
    #[arg(long)]
    json: bool,
}

/// Prints what is wrong first, then lanes, ledger, what waits, and the APIs.
pub async fn status(args: Args) -> Result<(), ExitCode> {
    let node = args.node.client()?;
    let status = node.get("/api/status").await?;
    if args.json {
        return print(status);
    }
    let summary: NodeSummary = node.read(status)?;
    let width = width().unwrap_or(WIDTH).min(WIDTH_MAX);
    print(page(&summary, width).join("\n"))
}

/// All of it, in lines of at most `width` where it can be cut.
fn page(node: &NodeSummary, width: usize) -> Vec<String> {
    let mut lines = vec![head(node)];
    let mut part = |title: &str, more: Vec<String>| {
        lines.push(String::new());
        lines.extend((!title.is_empty()).then(|| title.to_owned()));
        lines.extend(more);
    };
    if node.warnings.is_some() {
        part("", warnings(node, width));
    }
    part("", lanes(node));
    part(
        "Ledger: what came in, and where it is",
        balance(&node.ledger, node.balanced),
    );
    part("Waiting", waiting(node, width));
    part("API", apis(node, width));
    lines
}

fn head(node: &NodeSummary) -> String {
    format!(
        "{}, version {}, up {}, policy {}{}",
        one_line(&node.node),
        one_line(&node.version),
        age(node.uptime_s),
        one_line(&node.policy),
        if node.draining { ", STOPPING" } else { "" }
    )
}

fn warnings(node: &NodeSummary, width: usize) -> Vec<String> {
    if node.all_warnings().is_empty() {
        return vec!["No warnings".into()];
    }
    let indent = " ".repeat(8);
    let lines = node.all_warnings().iter().flat_map(|warning| {
        let level = warning.level.to_uppercase();
        let first = format!("{level:<8}{}: ", one_line(&warning.about));
        let what = wrapped(&first, &indent, &one_line(&warning.what), width);
        let remedy = one_line(&warning.remedy);
        let remedy = wrapped("     -> ", &indent, &remedy, width);
        what.into_iter().chain(remedy)
    });
    lines.collect()
}

/// The table of lanes, with a mark before those that a warning is about.
fn lanes(node: &NodeSummary) -> Vec<String> {
    let row = |cells: [&str; 9]| {
        let [
            mark,
            lane,
            state,
            share,
            accepted,
            delivered,
            in_flight,
            p50,
            p99,
        ] = cells;
        format!(
            "{mark:1} {lane:<8}  {state:<10}  {share:>5}  {accepted:>9}  {delivered:>9}  \
             {in_flight:>9}  {p50:>7} {p99:>7}"
        )
    };
    let head = row([
        "",
        "lane",
        "state",
        "share",
        "accepted",
        "delivered",
        "in flight",
        "p50 ms",
        "p99 ms",
    ]);
    let rows = node.lanes.iter().map(|lane| {
        let mark = match node.level_of(&lane.lane) {
            Some("error" | "warning") => "!",
            _ => "",
        };
        row([
            mark,
            &one_line(&lane.lane),
            &one_line(lane.shown_state()),
            &format!("{} %", percent(lane.share)),
            &short_count(lane.accepted),
            &short_count(lane.delivered),
            &short_count(lane.in_flight),
            &ms(lane.delivery_ms.p50),
            &ms(lane.delivery_ms.p99),
        ])
    });
    [head].into_iter().chain(rows).collect()
}

/// The two sides of the ledger, each with its sum.
fn balance(ledger: &Balance, balanced: bool) -> Vec<String> {
    let entered = [
        ("accepted", ledger.accepted),
        ("recovered", ledger.recovered),
    ];
    let ended = [
        ("delivered", ledger.delivered),
        ("handed over to other nodes", ledger.handed_over),
        ("dead letters", ledger.dead),
        ("dropped by an operator", ledger.dropped),
        ("waiting on disk", ledger.spooled),
        ("parked until their next try", ledger.parked),
        ("in flight", ledger.in_flight),
        ("missing", ledger.missing),
    ];
    let sum = |side: &[(&str, u64)]| side.iter().map(|(_, number)| number).sum::<u64>();
    let row = |left: Option<&(&str, u64)>, right: Option<&(&str, u64)>| {
        let cell = |of: Option<&(&str, u64)>| {
            of.map_or_else(
                || " ".repeat(26),
                |(name, number)| format!("{:>14} {name:<11}", count(*number)),
            )
        };
        format!("{}{}", cell(left), cell(right))
            .trim_end()
            .to_owned()
    };
    let mut lines: Vec<_> = (0..ended.len())
        .map(|at| row(entered.get(at), ended.get(at)))
        .collect();
    let (left, right) = (sum(&entered), sum(&ended));
    lines.push(row(Some(&("in all", left)), Some(&("in all", right))));
    lines.push(if !balanced {
        "  It did NOT balance when nothing moved, or records are missing".into()
    } else if left == right {
        "  It balances".into()
    } else {
        "  Records move; it balanced when nothing did".into()
    });
    lines
}

fn waiting(node: &NodeSummary, width: usize) -> Vec<String> {
    let ledger = &node.ledger;
    let is_nothing = ledger.spooled + ledger.parked + ledger.in_flight == 0;
    let counts = || {
        format!(
            "{} on disk, {} parked, {} in flight",
            count(ledger.spooled),
            count(ledger.parked),
            count(ledger.in_flight)
        )
    };
    let spool = node.spool.as_ref();
    let oldest = node.oldest_s.or_else(|| spool?.oldest_s);
    let oldest = oldest.map(|seconds| format!("the oldest was accepted {} ago", age(seconds)));
    let disk = spool.map(|spool| {
        let (used, max) = (ByteSize(spool.bytes), ByteSize(spool.max));
        format!("{used} of {max} of disk in use")
    });
    let first = if is_nothing {
        "nothing".to_owned()
    } else {
        counts()
    };
    let told: Vec<_> = [Some(first), oldest, disk].into_iter().flatten().collect();
    wrapped("  ", "  ", &told.join("; "), width)
}

fn apis(node: &NodeSummary, width: usize) -> Vec<String> {
    let lines = node.all_apis().into_iter().flat_map(|(name, api)| {
        let now = format!(
            "{} for {}, {} of {} POSTs in flight, {}",
            one_line(&api.state),
            age(api.since_s),
            count(api.in_flight),
            count(api.limit),
            one_line(&api.url)
        );
        let is_down = api.state != "up";
        let next = api.retry_in_s.filter(|_| is_down);
        let next = next.map(|seconds| format!("next try in {}", age(seconds)));
        let why = api.last_error.as_deref().filter(|_| is_down).map(one_line);
        let told: Vec<_> = [Some(now), next, why].into_iter().flatten().collect();
        wrapped(
            &format!("  {}: ", one_line(name)),
            "    ",
            &told.join("; "),
            width,
        )
    });
    lines.collect()
}
