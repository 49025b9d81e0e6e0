//! The peers that this node sends records to.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use futures_util::future::select_all;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::transport::Endpoint;

use super::{
    Phase,
    peer::{Peer, PeerOutcome, PendingReceipt, WINDOW},
};
use crate::transport::{Message, TransportError};

/// The most places in a window that a batch waits for at a time.
const ROOM_MAX: usize = WINDOW / 8;
/// How long a record waits for room in a window before it goes back to the router.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);

/// All peers. Dropping it ends every stream.
pub(super) struct Peers {
    all: Vec<Rc<Peer>>,
    /// The peer that the next batch tries first.
    turn: Cell<usize>,
    tasks: RefCell<JoinSet<()>>,
}

impl Peers {
    /// Connects to each of `endpoints`, again and again until [`Phase::Closing`].
    pub(super) fn start(endpoints: Vec<Endpoint>, phase: &watch::Receiver<Phase>) -> Self {
        let mut tasks = JoinSet::new();
        let all = endpoints.into_iter().map(|endpoint| {
            let peer = Rc::new(Peer::new(endpoint));
            tasks.spawn_local(Rc::clone(&peer).stay_connected(phase.clone()));
            peer
        });
        Self {
            all: all.collect(),
            turn: Cell::new(0),
            tasks: RefCell::new(tasks),
        }
    }

    /// Waits up to `patience` until one stream is open. The error says why none is.
    pub(super) async fn first(&self, patience: Duration) -> Result<(), TransportError> {
        let opened = self.all.iter().map(|peer| Box::pin(peer.up()));
        let opened = timeout(patience, select_all(opened)).await;
        opened
            .map(drop)
            .map_err(|_| TransportError::Connect(self.why_none()))
    }

    /// Sends `messages` to peers with room in their windows. `settled` gets the index of a message
    /// when its receipt is here or cannot come.
    pub(super) async fn publish(
        &self,
        messages: &[Message],
        mut settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        // One outcome per message at most.
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut outcomes = BatchOutcomes {
            peers: self,
            receiver,
        };
        // It moves `sender`, so that the outcomes end with the last `PendingReceipt`.
        let sending = async move {
            let mut left = messages.iter().enumerate();
            while left.len() > 0 {
                match self.room(left.len()).await {
                    Ok((peer, mut permits)) => {
                        while let Some(permit) = permits.split(1)
                            && let Some((at, message)) = left.next()
                        {
                            let pending = PendingReceipt {
                                at,
                                outcomes: sender.clone(),
                                _permit: permit,
                            };
                            peer.send(message, pending);
                        }
                    }
                    Err(why) => {
                        for (at, _) in left.by_ref() {
                            // This cannot fail: the receiver outlives this future.
                            sender.send((at, Err(why.clone()))).ok();
                        }
                    }
                }
            }
        };
        let settling = async {
            while let Some((at, outcome)) = outcomes.receiver.recv().await {
                settled(at, outcome);
            }
        };
        tokio::join!(sending, settling);
    }

    /// Waits up to `patience` for the receipts that are due, then ends every stream.
    pub(super) async fn close(&self, patience: Duration) {
        let mut tasks = self.tasks.take();
        let ended = async { while tasks.join_next().await.is_some() {} };
        // After the time-out, dropping the set aborts the tasks.
        timeout(patience, ended).await.ok();
    }

    /// A peer with room, and permits for at most `wanted` messages.
    async fn room(&self, wanted: usize) -> Result<(&Peer, OwnedSemaphorePermit), TransportError> {
        let turn = self.turn.get();
        self.turn.set((turn + 1) % self.all.len());
        let in_turn = self.all.iter().cycle().skip(turn).take(self.all.len());
        let mut full = Vec::new();
        for peer in in_turn.filter(|peer| peer.is_up()) {
            match peer.try_room(wanted) {
                Some(permits) => return Ok((peer, permits)),
                None => full.push(peer),
            }
        }
        if full.is_empty() {
            return Err(TransportError::Publish(self.why_none()));
        }
        // Several at a time, because each wait wakes this task.
        let some = u32::try_from(wanted.min(ROOM_MAX)).unwrap_or(1);
        let rooms = full.iter().map(|peer| Box::pin(peer.room(some)));
        match timeout(ROOM_PATIENCE, select_all(rooms)).await {
            Ok((Some(permits), at, _)) => Ok((full[at], permits)),
            _ => Err(TransportError::Publish(
                "every peer has its window full".into(),
            )),
        }
    }

    fn why_none(&self) -> String {
        let reasons: Vec<_> = self.all.iter().filter_map(|peer| peer.why_down()).collect();
        format!("no peer is connected: {}", reasons.join("; "))
    }
}

/// The outcomes of one batch. Dropped before its end, it makes the peers forget the batch.
struct BatchOutcomes<'p> {
    peers: &'p Peers,
    receiver: mpsc::UnboundedReceiver<PeerOutcome>,
}

impl Drop for BatchOutcomes<'_> {
    fn drop(&mut self) {
        // Each message without an outcome has a sender.
        if self.receiver.sender_strong_count() > 0 {
            self.receiver.close();
            self.peers
                .all
                .iter()
                .for_each(|peer| peer.forget_abandoned());
        }
    }
}
