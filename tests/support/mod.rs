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

use std::time::{Duration, Instant};

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
