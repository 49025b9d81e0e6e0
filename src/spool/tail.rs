//! Reading a queue from its oldest entry on, for as long as the spool lives.

use std::{sync::Arc, time::Duration, vec};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use super::{Entry, EntryKey, Queue, Spool, store::Readable};

/// The entries that are read from the disk at once, unless the reader asks for one at a time.
pub(super) const BATCH: u32 = 64;
/// A queue that is not empty is read again after this, though nothing has changed.
const REREAD: Duration = Duration::from_secs(1);

/// The unsettled entries of one queue, oldest first, each once, and each with a permit of the
/// window. A queue has one tail at a time: a new one begins with the oldest entry.
pub struct Tail {
    spool: Spool,
    queue: Queue,
    window: Arc<Semaphore>,
    /// Changes when there is more to read.
    readable: watch::Receiver<Readable>,
    /// Entries that were read and not yielded yet, and a permit for each.
    read: vec::IntoIter<(EntryKey, Entry)>,
    permits: Option<OwnedSemaphorePermit>,
    /// The entries that are read from the disk at once.
    batch: u32,
}

impl Tail {
    pub(super) fn new(spool: Spool, queue: Queue, window: Arc<Semaphore>, batch: u32) -> Self {
        // Entries that an earlier tail has yielded and nobody has settled come again.
        spool.rewind(queue);
        Self {
            readable: spool.readable[queue.at()].clone(),
            spool,
            queue,
            window,
            read: Vec::new().into_iter(),
            permits: None,
            batch,
        }
    }

    /// The next entry, once there is one and the window has room for a batch. `None` once the spool
    /// has ended, or the window is closed. If the future is dropped early, entries that were
    /// yielded may come again.
    pub async fn next(&mut self) -> Option<(EntryKey, Entry, OwnedSemaphorePermit)> {
        loop {
            if let Some((key, entry)) = self.read.next() {
                let permit = self.permits.as_mut()?.split(1)?;
                return Some((key, entry, permit));
            }
            self.permits = None;
            let window = Arc::clone(&self.window);
            let mut permits = window.acquire_many_owned(self.batch).await.ok()?;
            self.readable.borrow_and_update();
            let read = self.spool.take(self.queue, permits.num_permits()).await;
            self.permits = permits.split(read.len());
            drop(permits);
            if read.is_empty() && !self.wait().await {
                return None;
            }
            self.read = read.into_iter();
        }
    }

    /// Waits until the queue may have entries that were not read. False once the spool has ended.
    async fn wait(&mut self) -> bool {
        let is_empty = self.readable.borrow().records == 0;
        if is_empty {
            let more = self.readable.wait_for(|readable| readable.records > 0);
            return more.await.is_ok();
        }
        !matches!(timeout(REREAD, self.readable.changed()).await, Ok(Err(_)))
    }
}
