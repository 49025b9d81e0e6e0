//! Putting entries.

use std::{cell::RefCell, collections::VecDeque, rc::Rc, thread};

use prost::Message as _;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};
use tokio_util::task::AbortOnDropHandle;

use super::{Entry, EntryKey, NotSafe, Queue, Spool, SpoolRequest};
use crate::lane_id::LaneId;

pub(super) type PutResult = Result<EntryKey, NotSafe>;

/// The way back to the caller of a put.
pub(super) enum PutAnswer {
    One(oneshot::Sender<PutResult>),
    /// For all of a [`CopyWriter`] that share a sync, in their order.
    Copies(mpsc::UnboundedSender<Vec<PutResult>>),
}

/// How an entry is put: see [`Spool::put`], [`Spool::put_held`] and [`CopyWriter::put`].
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

    /// The same, but a [`Tail`](super::Tail) that reads the queue skips the entry: the caller has
    /// it in memory.
    pub async fn put_held(&self, queue: Queue, entry: &Entry) -> Result<EntryKey, NotSafe> {
        self.append(queue, entry, PutKind::Held).await
    }

    async fn append(
        &self,
        queue: Queue,
        entry: &Entry,
        kind: PutKind,
    ) -> Result<EntryKey, NotSafe> {
        let payload = entry.encode_to_vec();
        self.ask(|answer| SpoolRequest::Put {
            queue,
            payload,
            kind,
            answer: PutAnswer::One(answer),
        })
        .await?
    }
}

/// Writes copies of the records that a lane publishes, from one thread. The spool answers all that
/// share a sync at once: that thread is woken once, and not once for each.
pub struct CopyWriter {
    spool: Spool,
    queue: Queue,
    /// The callers of the puts, in their order.
    callers: Rc<RefCell<VecDeque<oneshot::Sender<PutResult>>>>,
    /// Bounded by the callers.
    answers: mpsc::UnboundedSender<Vec<PutResult>>,
    answering: AbortOnDropHandle<()>,
}

impl CopyWriter {
    pub fn new(lane: LaneId, spool: Spool) -> Self {
        let (answers, receiver) = mpsc::unbounded_channel();
        let callers = Rc::default();
        let answering = CopyAnswers {
            spool: spool.clone(),
            callers: Rc::clone(&callers),
            receiver,
        };
        Self {
            spool,
            queue: Queue::Kept(lane),
            callers,
            answers,
            answering: AbortOnDropHandle::new(actix_rt::spawn(answering.answer())),
        }
    }

    /// Resolves when a copy is durable. If the future is dropped, the copy is removed. A copy that
    /// is `moved` replaces an entry that is about to be settled: it may go beyond the spool's size.
    pub async fn put(&self, entry: &Entry, moved: bool) -> PutResult {
        let request = SpoolRequest::Put {
            queue: self.queue,
            payload: entry.encode_to_vec(),
            kind: if moved { PutKind::Moved } else { PutKind::New },
            answer: PutAnswer::Copies(self.answers.clone()),
        };
        let sent = self.spool.requests.send(request);
        if sent.is_err() || self.answering.is_finished() {
            return Err(NotSafe::Closed);
        }
        let (caller, answered) = oneshot::channel();
        self.callers.borrow_mut().push_back(caller);
        let mut put = PendingCopy {
            spool: &self.spool,
            answered,
        };
        (&mut put.answered).await.map_err(|_| NotSafe::Closed)?
    }
}

/// A copy that is being put. Dropping it removes the copy, unless the answer was taken.
struct PendingCopy<'a> {
    spool: &'a Spool,
    answered: oneshot::Receiver<PutResult>,
}

impl Drop for PendingCopy<'_> {
    fn drop(&mut self) {
        // From now on the sender finds that the caller is gone.
        self.answered.close();
        if let Ok(Ok(key)) = self.answered.try_recv() {
            self.spool.settle(key);
        }
    }
}

struct CopyAnswers {
    spool: Spool,
    callers: Rc<RefCell<VecDeque<oneshot::Sender<PutResult>>>>,
    receiver: mpsc::UnboundedReceiver<Vec<PutResult>>,
}

impl CopyAnswers {
    /// Hands the answers to their callers, until the spool has ended.
    async fn answer(mut self) {
        let mut running = self.spool.running.clone();
        loop {
            let puts = tokio::select! {
                biased;
                puts = self.receiver.recv() => puts,
                _ = running.changed() => None,
            };
            let Some(puts) = puts else { break };
            for put in puts {
                let caller = self.callers.borrow_mut().pop_front();
                let unheard = match caller {
                    Some(caller) => caller.send(put).err(),
                    None => Some(put),
                };
                self.remove(unheard);
            }
        }
        // They get no answer.
        self.callers.borrow_mut().clear();
    }

    /// Nobody else would ever remove a copy whose caller is gone.
    fn remove(&self, puts: impl IntoIterator<Item = PutResult>) {
        for key in puts.into_iter().flatten() {
            self.spool.settle(key);
        }
    }
}

impl Drop for CopyAnswers {
    fn drop(&mut self) {
        // From now on the thread finds that the callers are gone.
        self.receiver.close();
        loop {
            match self.receiver.try_recv() {
                Ok(puts) => self.remove(puts),
                // The thread is in the midst of sending an answer.
                Err(TryRecvError::Empty) => thread::yield_now(),
                Err(TryRecvError::Disconnected) => break,
            }
        }
    }
}
