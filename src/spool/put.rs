//! Putting entries.

use prost::Message as _;
use tokio::sync::oneshot;

use super::{Entry, EntryKey, NotSafe, Queue, Spool, SpoolRequest};
use crate::lane_id::LaneId;

/// How an entry is put: see [`Spool::put`], [`Spool::put_held`] and [`Spool::put_copy`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PutKind {
    New,
    Held,
    Moved,
}

impl Spool {
    /// Resolves when `entry` is durable in `queue`.
    pub async fn put(&self, queue: Queue, entry: &Entry) -> Result<EntryKey, NotSafe> {
        self.append(queue, entry, PutKind::New).await
    }

    /// The same, but a [`Tail`] that is reading the queue skips the entry: the caller has it in
    /// memory.
    pub async fn put_held(&self, queue: Queue, entry: &Entry) -> Result<EntryKey, NotSafe> {
        self.append(queue, entry, PutKind::Held).await
    }

    /// Resolves when a copy of a record that `lane` publishes is durable. If the future is dropped,
    /// the copy is removed. A copy that is `moved` replaces an entry that is about to be settled:
    /// it may go beyond the spool's size.
    pub async fn put_copy(
        &self,
        lane: LaneId,
        entry: &Entry,
        moved: bool,
    ) -> Result<EntryKey, NotSafe> {
        let kind = if moved { PutKind::Moved } else { PutKind::New };
        let mut put = PendingCopy {
            spool: self,
            answered: self.send_put(Queue::Kept(lane), entry, kind)?,
        };
        self.answer(&mut put.answered).await?
    }

    async fn append(
        &self,
        queue: Queue,
        entry: &Entry,
        kind: PutKind,
    ) -> Result<EntryKey, NotSafe> {
        let mut answered = self.send_put(queue, entry, kind)?;
        self.answer(&mut answered).await?
    }

    fn send_put(
        &self,
        queue: Queue,
        entry: &Entry,
        kind: PutKind,
    ) -> Result<oneshot::Receiver<Result<EntryKey, NotSafe>>, NotSafe> {
        let payload = entry.encode_to_vec();
        self.send(|answer| SpoolRequest::Put {
            queue,
            payload,
            kind,
            answer,
        })
    }
}

/// A copy that is being put. Dropping it removes the copy, unless the answer was taken.
struct PendingCopy<'a> {
    spool: &'a Spool,
    answered: oneshot::Receiver<Result<EntryKey, NotSafe>>,
}

impl Drop for PendingCopy<'_> {
    fn drop(&mut self) {
        // From now on the thread finds that the caller is gone.
        self.answered.close();
        if let Ok(Ok(key)) = self.answered.try_recv() {
            self.spool.settle(key);
        }
    }
}
