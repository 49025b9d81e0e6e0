//! Real brokers as child processes, and waiting for conditions.

pub mod grpc;
pub mod process;
pub mod rabbitmq;
pub mod rig;

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Waits until `condition` gives a value, and returns it. Panics, naming `what`, once `patience` is over.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    patience: Duration,
    mut condition: impl FnMut() -> F,
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
