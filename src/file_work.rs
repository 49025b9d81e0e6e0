//! Work with files that hangs when their disk does.

use std::{io, thread, time::Duration};

use tokio::{sync::oneshot, time::timeout};

/// A file that is not read or written by then counts as one that hangs.
pub const FILE_PATIENCE: Duration = Duration::from_secs(5);

/// Runs `work` on a thread of its own. `None` if it has not ended within [`FILE_PATIENCE`]: it goes on
/// then, and not even the end of the process waits for it.
pub async fn with_a_file<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let result = begin(work).ok()?;
    timeout(FILE_PATIENCE, result).await.ok()?.ok()
}

/// Begins `work` on a thread of its own, which not even the end of the process waits for.
///
/// # Errors
/// If the system has no thread left.
pub fn begin<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (done, result) = oneshot::channel();
    thread::Builder::new().spawn(move || done.send(work()).ok())?;
    Ok(result)
}
