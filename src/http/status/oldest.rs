//! The age of what waits on disk, without waiting for the disk.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{error::Elapsed, timeout};

use super::AdminState;
use crate::spool::Spool;

/// An answer waits this long at most for a disk that is slow.
const DISK_PATIENCE: Duration = Duration::from_millis(200);

impl AdminState {
    /// When the oldest record on disk that waits for a lane or for its API was accepted, in microseconds since the
    /// Unix epoch; `None` if none waits.
    ///
    /// # Errors
    /// If the disk is slow.
    pub async fn oldest_us(&self) -> Result<Option<u64>, Elapsed> {
        let spools = self.apis.spools().iter();
        let waiting = spools.filter(|spool| spool.stats().waiting() > 0);
        let oldest = join_all(waiting.map(Spool::oldest));
        let oldest = timeout(DISK_PATIENCE, oldest).await?.into_iter().flatten();
        Ok(oldest
            .filter_map(|entry| Some(entry.record().origin?.at_us))
            .min())
    }
}
