//! Real brokers as child processes, and waiting for conditions.

pub mod api;
pub mod browser;
pub mod collector;
pub mod grpc;
pub mod lanes;
pub mod load;
pub mod memory;
pub mod nats;
pub mod node;
pub mod paced;
pub mod power;
pub mod process;
pub mod prometheus;
pub mod proxy;
pub mod pubsub;
pub mod python;
pub mod rabbitmq;
pub mod rig;
pub mod terminal;
pub mod tls;

use std::{
    env, fmt,
    io::{self, Write as _},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tempfile::TempDir;
use waypost::{
    actors::{
        admission::Admission,
        live_lanes::LiveLanes,
        receipts::{AssignedRecord, Reply},
    },
    config::Policy,
    lane_id::LaneId,
    record::{Record, pointer::Values},
    routing::{
        policy::HashOn,
        rules::{Assignment, RouteDefaults, Routes},
        scores::Scores,
        settings::CurrentRouting,
    },
    spool::Spool,
};

/// Prints, past the capture of its output, that this test did not run. With `CI=true` the test
/// fails instead.
pub fn missing(what: &str) {
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{what} is missing"
    );
    did_not_run(&format!("{what} is missing"));
}

/// Prints, past the capture of its output, that this test did not run.
pub fn did_not_run(why: &str) {
    let test = thread::current();
    // Without a standard error, nobody can be told.
    writeln!(
        io::stderr(),
        "DID NOT RUN: {}: {why}",
        test.name().unwrap_or("a test")
    )
    .ok();
}

/// A spool in a temporary folder, which is removed with the returned value.
pub fn spool() -> (Spool, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spool = Spool::open(folder.path(), 1 << 30).expect("the folder is ours");
    (spool, folder)
}

/// A spool that refuses all records at once. No test waits for its disk, so time can be simulated.
pub async fn closed_spool() -> Spool {
    let (spool, _folder) = spool();
    spool.close().await;
    // A caller would still wait for a thread that is about to end.
    eventually("the spool has ended", Duration::from_secs(20), async || {
        spool.stats().refuses.then_some(())
    })
    .await;
    spool
}

/// A table of lanes that are not up, with their scores for `policy`.
pub fn live_lanes(policy: Policy) -> LiveLanes {
    let scores = Scores::new(policy.measures(), Duration::from_secs(2));
    LiveLanes::new(Arc::new(scores))
}

/// One route of `lanes` for all records.
pub fn one_route(policy: Policy, lanes: &[LaneId]) -> CurrentRouting {
    let defaults = RouteDefaults {
        policy,
        hash_on: &HashOn::Id,
        lanes,
        apis: &[],
    };
    CurrentRouting::new(Routes::new(&[], &defaults).expect("no rule is wrong"))
}

/// A record for the one route.
pub fn assigned(
    record: Record,
    routing: &CurrentRouting,
    pinned: Option<LaneId>,
) -> AssignedRecord {
    let assignment = routing
        .get()
        .assign(&record.id, &Values::default(), |_| None);
    AssignedRecord {
        record,
        assignment: Assignment {
            pinned,
            ..assignment
        },
    }
}

/// How often a wait prints what it is for.
const WAIT_TOLD: Duration = Duration::from_secs(10);

/// The records of `traffic.json`, byte for byte.
pub fn traffic() -> Vec<Bytes> {
    waypost::load::records(include_str!("../../traffic.json")).expect("traffic.json holds records")
}

/// Waits until `condition` gives a value, and returns it. After `patience`, panics with `what`.
pub async fn eventually<T>(
    what: &str,
    patience: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let mut wait = Wait::new(patience);
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(!wait.is_over(|| what), "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A wait with a deadline, which prints now and then what it is for.
pub struct Wait {
    began: Instant,
    patience: Duration,
    told: Duration,
}

impl Wait {
    pub fn new(patience: Duration) -> Self {
        Self {
            began: Instant::now(),
            patience,
            told: Duration::ZERO,
        }
    }

    /// Whether the deadline has passed.
    pub fn is_over<D: fmt::Display>(&mut self, what: impl FnOnce() -> D) -> bool {
        let waited = self.began.elapsed();
        if waited.saturating_sub(self.told) >= WAIT_TOLD {
            self.told = waited;
            let patience = self.patience;
            println!("waiting for {waited:.0?} of {patience:?}: {}", what());
        }
        waited > self.patience
    }
}

/// The number in the environment variable, or `usual`. Long runs set it.
pub fn wanted(variable: &str, usual: u64) -> u64 {
    env::var(variable).map_or(usual, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number"))
    })
}

/// Submits a request of one record.
pub async fn submit_one(admission: &Admission, record: AssignedRecord) -> Reply {
    admission.submit(&[record]).await.remove(0)
}
