//! How long the spool's thread has been at what it does: a disk that stalls holds it up.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};
use tracing_mutex::parkinglot::Mutex;

/// Work takes less, unless the disk stalls.
const STALLED: Duration = Duration::from_secs(5);
/// The disk may have other records than the counts say once the thread has been busy for so long.
const BEHIND: Duration = Duration::from_millis(200);
/// The time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Since when the thread has been busy, `None` while it waits for requests. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct BusySince(Arc<Mutex<Option<Instant>>>);

impl BusySince {
    pub(super) fn set(&self, since: Option<Instant>) {
        *self.0.lock() = since;
    }

    fn elapsed(&self) -> Duration {
        self.0
            .lock()
            .map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The counts of the disk may be out of date.
    pub fn is_behind(&self) -> bool {
        self.elapsed() >= BEHIND
    }

    /// The disk does not answer: nothing can be put.
    pub fn is_stalled(&self) -> bool {
        self.elapsed() >= STALLED
    }
}

/// Logs each stall of the disk of `folder`, until `running` ends.
pub(super) async fn tell_of_stalls(
    folder: Arc<Path>,
    busy: BusySince,
    running: watch::Receiver<()>,
) {
    let folder = folder.display();
    let mut is_told = false;
    while running.has_changed().is_ok() {
        sleep(LOOK).await;
        let is_stalled = busy.is_stalled();
        if std::mem::replace(&mut is_told, is_stalled) == is_stalled {
            continue;
        }
        if is_stalled {
            warn!(%folder, "the spool's disk stalls: what needs it waits, or is refused");
        } else {
            info!(%folder, "the spool's disk answers again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_waits_for_requests_is_never_stalled() {
        let busy = BusySince::default();
        assert!(!busy.is_behind() && !busy.is_stalled());
        let ago = |time: Duration| Instant::now().checked_sub(time);
        busy.set(ago(BEHIND));
        assert!(busy.is_behind() && !busy.is_stalled());
        busy.set(ago(STALLED));
        assert!(busy.is_behind() && busy.is_stalled());
        busy.set(None);
        assert!(!busy.is_behind() && !busy.is_stalled());
    }
}
