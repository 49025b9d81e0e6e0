//! The age of what waits on disk, without waiting for the disk.

use std::time::Duration;

use tokio::time::{error::Elapsed, timeout};

use super::AdminState;

/// An answer waits this long at most for a disk that is slow.
const DISK_PATIENCE: Duration = Duration::from_millis(200);

impl AdminState {
    /// When the oldest record on disk that waits for a lane was accepted, in microseconds since the
    /// Unix epoch; `None` if none waits.
    ///
    /// # Errors
    /// If the disk is slow.
    pub async fn oldest_us(&self) -> Result<Option<u64>, Elapsed> {
        if self.spool.stats().waiting() == 0 {
            return Ok(None);
        }
        let oldest = timeout(DISK_PATIENCE, self.spool.oldest()).await?;
        Ok(oldest.and_then(|entry| Some(entry.record().origin?.at_us)))
    }
}
