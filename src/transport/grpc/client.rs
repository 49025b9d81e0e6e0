//! The peers that this node sends records to: one long-lived stream each, reopened when it breaks.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use futures_util::future::select_all;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::transport::Endpoint;

use super::{
    Phase,
    peer_stream::{PeerStream, ReceiptSender, WINDOW},
    reached,
};
use crate::{
    backoff::Backoff,
    transport::{Message, TransportError},
};

/// For how many places of a window a batch waits at a time.
const ROOM_MAX: usize = WINDOW / 8;
/// How long a record waits for room in a window before it goes back to the router.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);
/// How long a peer may take from the first packet to an open stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_CAP: Duration = Duration::from_secs(1);

/// All peers. Dropping it ends every stream.
pub(super) struct Peers {
    all: Vec<Rc<Peer>>,
    /// The peer that the next batch tries first.
    turn: Cell<usize>,
    next_batch: Cell<u64>,
    tasks: RefCell<JoinSet<()>>,
}

struct Peer {
    endpoint: Endpoint,
    state: watch::Sender<State>,
}

enum State {
    Up(Rc<PeerStream>),
    /// The reason why no stream is open.
    Down(String),
}

impl Peers {
    /// Connects to each of `endpoints`, again and again until [`Phase::Closing`].
    pub(super) fn start(endpoints: Vec<Endpoint>, phase: &watch::Receiver<Phase>) -> Self {
        let mut tasks = JoinSet::new();
        let all = endpoints.into_iter().map(|endpoint| {
            let peer = Rc::new(Peer {
                endpoint,
                state: watch::Sender::new(State::Down("connecting".into())),
            });
            tasks.spawn_local(stay_connected(Rc::clone(&peer), phase.clone()));
            peer
        });
        Self {
            all: all.collect(),
            turn: Cell::new(0),
            next_batch: Cell::new(0),
            tasks: RefCell::new(tasks),
        }
    }

    /// Waits up to `patience` until one stream is open. The error says why none is.
    pub(super) async fn first(&self, patience: Duration) -> Result<(), String> {
        let opened = self.all.iter().map(|peer| {
            let mut state = peer.state.subscribe();
            Box::pin(
                async move { drop(state.wait_for(|state| matches!(state, State::Up(_))).await) },
            )
        });
        timeout(patience, select_all(opened))
            .await
            .map(drop)
            .map_err(|_| self.why_none())
    }

    /// Sends `messages` to peers with room in their windows. `settled` gets the index of a message
    /// when its receipt is here or cannot come.
    pub(super) async fn publish(
        &self,
        messages: &[Message],
        mut settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        let batch = self
            .next_batch
            .replace(self.next_batch.get().wrapping_add(1));
        let (sender, mut outcomes) = mpsc::unbounded_channel();
        let guard = BatchGuard {
            peers: self,
            batch,
            is_pending: Cell::new(true),
        };
        // It moves `sender`, so that the outcomes end with the last `ReceiptSender`.
        let sending = async move {
            let receipts = (0..messages.len()).map(|at| ReceiptSender {
                at,
                settled: sender.clone(),
            });
            let mut left = messages.iter().zip(receipts);
            while left.len() > 0 {
                match self.room(left.len()).await {
                    Ok((stream, mut permits)) => {
                        while let Some(permit) = permits.split(1)
                            && let Some((message, receipt)) = left.next()
                        {
                            stream.send(message, batch, permit, receipt);
                        }
                    }
                    Err(why) => left
                        .by_ref()
                        .for_each(|(_, receipt)| receipt.send(Err(why.clone()))),
                }
            }
        };
        let settling = async {
            while let Some((at, outcome)) = outcomes.recv().await {
                settled(at, outcome);
            }
        };
        tokio::join!(sending, settling);
        guard.is_pending.set(false);
    }

    /// Waits up to `patience` for the receipts that are due, then ends every stream.
    pub(super) async fn close(&self, patience: Duration) {
        let mut tasks = self.tasks.take();
        // After the time-out, dropping the set aborts the tasks.
        timeout(patience, async {
            while tasks.join_next().await.is_some() {}
        })
        .await
        .ok();
    }

    /// A peer with room, and permits for at most `wanted` records.
    async fn room(
        &self,
        wanted: usize,
    ) -> Result<(Rc<PeerStream>, OwnedSemaphorePermit), TransportError> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let mut full = Vec::new();
        for at in 0..self.all.len() {
            let peer = &self.all[turn.wrapping_add(at) % self.all.len()];
            if let State::Up(stream) = &*peer.state.borrow() {
                let free = stream.window.available_permits().clamp(1, wanted);
                let free = u32::try_from(free).unwrap_or(1);
                match Arc::clone(&stream.window).try_acquire_many_owned(free) {
                    Ok(permits) => return Ok((Rc::clone(stream), permits)),
                    Err(_) => full.push(Rc::clone(stream)),
                }
            }
        }
        if full.is_empty() {
            return Err(TransportError::Publish(self.why_none()));
        }
        // Several at a time, because each wait wakes this task.
        let some = u32::try_from(wanted.min(ROOM_MAX)).unwrap_or(1);
        let windows = full
            .iter()
            .map(|stream| Box::pin(Arc::clone(&stream.window).acquire_many_owned(some)));
        match timeout(ROOM_PATIENCE, select_all(windows)).await {
            Ok((Ok(permits), at, _)) => Ok((full.swap_remove(at), permits)),
            Ok((Err(_), at, _)) => Err(full[at].error()),
            Err(_) => Err(TransportError::Publish(
                "every peer has its window full".into(),
            )),
        }
    }

    fn why_none(&self) -> String {
        let reasons = self.all.iter().filter_map(|peer| {
            let State::Down(why) = &*peer.state.borrow() else {
                return None;
            };
            Some(format!("{}: {why}", peer.endpoint.uri()))
        });
        format!(
            "no peer is connected: {}",
            reasons.collect::<Vec<_>>().join("; ")
        )
    }
}

/// Forgets the records of a batch whose future is dropped before its end.
struct BatchGuard<'p> {
    peers: &'p Peers,
    batch: u64,
    is_pending: Cell<bool>,
}

impl Drop for BatchGuard<'_> {
    fn drop(&mut self) {
        if !self.is_pending.get() {
            return;
        }
        for peer in &self.peers.all {
            if let State::Up(stream) = &*peer.state.borrow() {
                stream.give_up(self.batch);
            }
        }
    }
}

/// Announces that a peer is up. However its task ends, the drop fails the records without a
/// receipt.
struct UpGuard<'p> {
    peer: &'p Peer,
    stream: Rc<PeerStream>,
}

impl<'p> UpGuard<'p> {
    fn new(peer: &'p Peer, stream: Rc<PeerStream>) -> Self {
        peer.state.send_replace(State::Up(Rc::clone(&stream)));
        Self { peer, stream }
    }

    fn withdraw(&self, why: String) {
        self.peer.state.send_replace(State::Down(why.clone()));
        self.stream.fail(why);
    }
}

impl Drop for UpGuard<'_> {
    fn drop(&mut self) {
        if !self.stream.is_broken() {
            self.withdraw("closed".into());
        }
    }
}

async fn stay_connected(peer: Rc<Peer>, phase: watch::Receiver<Phase>) {
    let mut backoff = Backoff::new(RECONNECT_FIRST, RECONNECT_CAP);
    loop {
        let started = Instant::now();
        let opened = tokio::select! {
            opened = timeout(OPEN_TIMEOUT, PeerStream::open(&peer.endpoint)) => opened,
            () = reached(phase.clone(), Phase::Closing) => return,
        };
        let why = match opened {
            Ok(Ok((stream, receipts))) => {
                tracing::info!(peer = %peer.endpoint.uri(), "the stream to the peer is open");
                let up = UpGuard::new(&peer, Rc::new(stream));
                let why = up.stream.relay(receipts, &phase).await;
                up.withdraw(why.clone());
                why
            }
            Ok(Err(why)) => why,
            Err(_) => format!("no stream within {OPEN_TIMEOUT:?}"),
        };
        if *phase.borrow() != Phase::Serving {
            return;
        }
        // A peer whose streams break at once keeps its back-off.
        if started.elapsed() > RECONNECT_CAP {
            backoff.reset();
        }
        let is_known = matches!(&*peer.state.borrow(), State::Down(known) if *known == why);
        if !is_known {
            tracing::warn!(peer = %peer.endpoint.uri(), %why, "not connected to the peer");
        }
        peer.state.send_replace(State::Down(why));
        tokio::select! {
            () = sleep(backoff.next_delay()) => {}
            () = reached(phase.clone(), Phase::Closing) => return,
        }
    }
}
