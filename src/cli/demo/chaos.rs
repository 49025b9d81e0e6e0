//! `waypost demo --chaos`: lanes, API and disk break in turn under load, and no record is lost.

use std::{
    cell::RefCell,
    collections::HashSet,
    fmt,
    process::ExitCode,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::Serialize;
use tokio::time::{sleep_until, timeout_at};

use super::{BALANCE_PATIENCE, LANES_PATIENCE, Report, USERS, lanes_are_up, within};
use crate::{
    actors::supervisor::Action,
    api::client::Endpoint,
    cli::{
        output::{failed, print, tell},
        progress::Progress,
    },
    config::Config,
    lane_id::LaneId,
    load::{Load, Plan},
    node::Node,
    sink::Sink,
};

/// Records that are due each second.
const RATE: u32 = 200;
/// Bytes of a record on disk beside its body, about.
const ENTRY_HEAD: u64 = 100;
/// The lanes, the API and the disk break at these parts of the time, and are whole again at the
/// others. In the last part, what waits is delivered.
const LANES: (f64, f64) = (0.1, 0.25);
const API: (f64, f64) = (0.3, 0.45);
const DISK: (f64, f64) = (0.5, 0.85);
/// The disk has room for the records of this part of the time: more than those that wait while the
/// lanes or the API are away, fewer than those while the disk is to be full.
const ROOM: f64 = 0.23;
/// How long a full disk is kept so, as a part of the time.
const FULL_FOR: f64 = 0.08;

/// A shorter one has no time to break and mend each.
const LENGTH_MIN: Duration = Duration::from_secs(10);

/// Reads a time for a chaos.
pub fn length(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).ok();
    let time = time.filter(|time| (LENGTH_MIN..=Duration::from_hours(1)).contains(time));
    time.ok_or_else(|| "a time from 10s to 1h, such as 60s".into())
}

/// The counts of the load, and what became of its records.
#[derive(Debug, Serialize)]
pub struct ChaosReport {
    /// Records that got a 2xx.
    taken: usize,
    /// Records that got another answer. A client keeps them.
    refused: usize,
    /// Records that got a 2xx, and that the API does not have.
    lost: usize,
    /// The disk was full for a time.
    disk_was_full: bool,
}

impl fmt::Display for ChaosReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            taken,
            refused,
            lost,
            disk_was_full,
        } = self;
        let full = if *disk_was_full { "was" } else { "was never" };
        write!(
            f,
            "chaos: {taken} records taken, {lost} of them lost; {refused} refused; the disk {full} full"
        )
    }
}

/// The size of a disk that fills up when it is to.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "about the size is enough"
)]
pub fn disk_size(records: &[Bytes], length: Duration) -> u64 {
    let bytes: usize = records.iter().map(Bytes::len).sum();
    let mean = bytes as u64 / (records.len() as u64).max(1) + ENTRY_HEAD;
    (length.as_secs_f64() * ROOM * (u64::from(RATE) * mean) as f64) as u64
}

/// Posts records to the node for `length`, and breaks what it needs. Fails if a record is lost.
pub async fn play(
    node: &Node,
    config: &Config,
    sink: &mut Sink,
    records: Vec<Bytes>,
    length: Duration,
    as_json: bool,
) -> Result<(), ExitCode> {
    if !within(LANES_PATIENCE, async || lanes_are_up(node).await).await {
        return Err(failed("not every lane is up, so none can be broken"));
    }
    let ingest = format!("http://{}/", node.ingest);
    let ingest = Endpoint::with_public_roots(&ingest).map_err(failed)?;
    let seen = Rc::new(RefCell::new(SeenCounts::default()));
    let watched = Rc::clone(&seen);
    let plan = Plan {
        duration: Some(length),
        rate: Some(RATE.into()),
        watch: Some(Box::new(move |number, _, answer| {
            let mut seen = watched.borrow_mut();
            match answer {
                Ok(_) => seen.taken.push(number),
                Err(refusal) => {
                    seen.refused += 1;
                    seen.why.get_or_insert_with(|| refusal.why.clone());
                }
            }
        })),
        ..Plan::new(records, USERS)
    };
    let load = Load::new(ingest, plan);
    let progress = Progress::new(length.as_secs().max(1), "seconds");
    let began = Instant::now();
    let (disk_was_full, ()) = tokio::join!(
        break_all(node, config, &mut *sink, began, length),
        load.run(|tally| progress.reached(tally.elapsed.min(length).as_secs()))
    );
    let disk_was_full = disk_was_full?;
    let SeenCounts {
        taken,
        refused,
        why,
    } = seen.take();
    let is_settled = within(BALANCE_PATIENCE, async || {
        is_settled(node, sink, taken.len() as u64)
    });
    let is_settled = is_settled.await;
    progress.end();
    let all = usize::try_from(sink.stats().records).unwrap_or(usize::MAX);
    let stored = sink.records(all).await.map_err(failed)?;
    let stored: HashSet<_> = stored.into_iter().map(|record| record.id).collect();
    let is_lost = |number: &&usize| !stored.contains(&load.key(**number));
    let chaos = ChaosReport {
        lost: taken.iter().filter(is_lost).count(),
        taken: taken.len(),
        refused,
        disk_was_full,
    };
    let lost = chaos.lost;
    let mut report = Report::new(node, config, sink, began.elapsed()).await?;
    report.chaos = Some(chaos);
    if as_json {
        print(serde_json::to_string(&report).map_err(failed)?)?;
    } else {
        print(report)?;
    }
    if let Some(why) = why.filter(|_| !disk_was_full) {
        return Err(failed(format_args!(
            "{refused} records were refused: {why}"
        )));
    }
    if lost > 0 {
        return Err(failed(format_args!("{lost} records are lost")));
    }
    if !is_settled {
        return Err(failed(
            "not all is delivered, or the ledger does not balance",
        ));
    }
    Ok(())
}

#[derive(Default)]
struct SeenCounts {
    /// The numbers of the records that were taken.
    taken: Vec<usize>,
    refused: usize,
    /// Of the first one that was refused.
    why: Option<String>,
}

fn is_settled(node: &Node, sink: &Sink, taken: u64) -> bool {
    let balance = node.ledger.balance(&node.apis.spools().stats());
    let is_at_rest = balance.in_flight + balance.spooled + balance.parked == 0;
    is_at_rest && balance.holds() && sink.stats().records >= taken
}

/// Breaks everything in turn, and mends it. Returns whether the disk was full.
async fn break_all(
    node: &Node,
    config: &Config,
    sink: &mut Sink,
    began: Instant,
    length: Duration,
) -> Result<bool, ExitCode> {
    let at = |part: f64| began + length.mul_f64(part);
    let say = |what: &str| {
        let seconds = began.elapsed().as_secs_f64();
        tell(format_args!("{seconds:5.1} s: {what}"));
    };
    let lanes = config.lanes.in_order();
    let mut from = LANES.0;
    let part = (LANES.1 - LANES.0) / f64::from(u32::try_from(lanes.len()).unwrap_or(1).max(1));
    for (lane, _) in &lanes {
        sleep_until(at(from).into()).await;
        order(node, *lane, Action::Pause).await;
        say(&format!("lane {lane} is disconnected"));
        from += part;
        sleep_until(at(from).into()).await;
        order(node, *lane, Action::Resume).await;
        say(&format!("lane {lane} may connect again"));
    }
    sleep_until(at(API.0).into()).await;
    sink.go_away().await;
    say("the API is away");
    sleep_until(at(API.1).into()).await;
    sink.come_back().map_err(failed)?;
    say("the API is back");
    sleep_until(at(DISK.0).into()).await;
    sink.go_away().await;
    say("the API is away until the disk is full");
    let mut refuses = node.spool.watch_refuses();
    let full = refuses.wait_for(|refuses| *refuses);
    let full = timeout_at(at(DISK.1).into(), full).await;
    let was_full = full.is_ok_and(|full| full.is_ok());
    if was_full {
        say("the disk is full: new records are refused");
        let long = Instant::now() + length.mul_f64(FULL_FOR);
        sleep_until(long.min(at(DISK.1)).into()).await;
    }
    sink.come_back().map_err(failed)?;
    say("the API is back, so the disk gets room");
    Ok(was_full)
}

/// The supervisor lives as long as the node, so the order is carried out.
async fn order(node: &Node, lane: LaneId, action: Action) {
    node.control.command(&[lane], action, "demo").await.ok();
}
