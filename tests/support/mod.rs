//! Real brokers as child processes, and waiting for conditions.

pub mod api;
pub mod grpc;
pub mod lanes;
pub mod load;
pub mod memory;
pub mod nats;
pub mod node;
pub mod process;
pub mod proxy;
pub mod pubsub;
pub mod rabbitmq;
pub mod rig;
pub mod tls;

use std::{
    env,
    io::{self, Write as _},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tempfile::TempDir;
use waypost::{
    actors::{admission::Admission, receipts::Reply},
    lane_id::LaneId,
    record::Record,
    spool::Spool,
};

/// Says that the present test proves nothing on this machine, past the capture of its output. With `CI=true` it fails instead.
pub fn missing(what: &str) {
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{what} is missing"
    );
    let test = thread::current();
    // There is no other place to say it.
    writeln!(
        io::stderr(),
        "DID NOT RUN: {}: {what} is missing",
        test.name().unwrap_or("a test")
    )
    .ok();
}

/// A spool in a folder that goes with the value.
pub fn spool() -> (Spool, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spool = Spool::open(folder.path(), 1 << 30).expect("the folder is ours");
    (spool, folder)
}

/// A spool that refuses everything at once: nobody waits for a disk, so that time can be simulated.
pub async fn closed_spool() -> Spool {
    let (spool, _folder) = spool();
    spool.close().await;
    // A thread that is just ending would still be waited for.
    eventually("the spool has ended", Duration::from_secs(20), async || {
        spool.stats().refuses.then_some(())
    })
    .await;
    spool
}

/// The records of `traffic.json`, byte for byte.
pub fn traffic() -> Vec<Bytes> {
    waypost::load::records(include_str!("../../traffic.json")).expect("traffic.json holds records")
}

/// Waits until `condition` gives a value, and returns it. Panics, naming `what`, once `patience` is over.
pub async fn eventually<T>(
    what: &str,
    patience: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a test is told from outside to do more of than `tests/run` has time for, or `usual`.
pub fn wanted(variable: &str, usual: u64) -> u64 {
    env::var(variable).map_or(usual, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number"))
    })
}

/// Submits a request of one record.
pub async fn submit_one(admission: &Admission, record: Record, pinned: Option<LaneId>) -> Reply {
    admission.submit(&[record], pinned).await.remove(0)
}
