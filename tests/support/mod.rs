//! Real brokers as child processes, and waiting for conditions.

pub mod api;
pub mod grpc;
pub mod lanes;
pub mod memory;
pub mod nats;
pub mod node;
pub mod process;
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

/// Says that the present test proves nothing on this machine, past the capture of its output. With `CI=true` it fails instead.
pub fn missing(what: &str) {
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "{what} is missing");
    let test = thread::current();
    // There is no other place to say it.
    writeln!(io::stderr(), "DID NOT RUN: {}: {what} is missing", test.name().unwrap_or("a test")).ok();
}

/// Waits until `condition` gives a value, and returns it. Panics, naming `what`, once `patience` is over.
pub async fn eventually<T>(what: &str, patience: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
