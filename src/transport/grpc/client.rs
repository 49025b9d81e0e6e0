//! The peers that this node carries records to: one long-lived stream each, opened anew whenever it breaks.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use futures_util::future::select_all;
use local_channel::mpsc as local;
use prost::Message as _;
use smallvec::SmallVec;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{MAX_MESSAGE, Phase, reached};
use crate::{
    backoff::Backoff,
    proto::{self, Outcome, Receipt, waypost_client::WaypostClient},
    record::Record,
    transport::TransportError,
};

/// Records under way to one peer.
const WINDOW: usize = 512;
/// For how many of these places a batch waits at a time.
const FEW: usize = WINDOW / 8;
/// How long a record waits for room in a window before it goes back to the router.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);
/// How long a peer may take from the first packet to an open stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_CAP: Duration = Duration::from_secs(1);

/// All peers. Dropping it ends every stream.
pub(super) struct Peers {
    all: Vec<Rc<Peer>>,
    /// Whose turn it is.
    turn: Cell<usize>,
    next_batch: Cell<u64>,
    tasks: RefCell<JoinSet<()>>,
}

struct Peer {
    endpoint: Endpoint,
    state: watch::Sender<State>,
}

enum State {
    Up(Rc<Link>),
    /// Why there is no open stream.
    Down(String),
}

impl Peers {
    /// Starts to connect to each of `endpoints` and goes on for ever, until [`Phase::Closing`].
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

    /// Waits until one stream is open, at most `patience`; the error says why none is.
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

    /// Sends `records`, as many at a time as there is room for, to the next peer that has any, and tells of each, by its place among them, when its receipt is here
    /// or cannot come.
    pub(super) async fn publish_all(
        &self,
        records: &[impl AsRef<Record>],
        mut settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        let batch = self
            .next_batch
            .replace(self.next_batch.get().wrapping_add(1));
        let (told, mut outcomes) = local::channel();
        let guard = Batch {
            peers: self,
            number: batch,
            is_open: Cell::new(true),
        };
        let sending = async move {
            let ears = (0..records.len()).map(|at| Ear {
                at,
                told: told.clone(),
            });
            let mut left = records.iter().map(AsRef::as_ref).zip(ears);
            while left.len() > 0 {
                match self.room(left.len()).await {
                    Ok((link, mut slots)) => {
                        while let Some(slot) = slots.split(1)
                            && let Some((record, ear)) = left.next()
                        {
                            link.send(record, batch, slot, ear);
                        }
                    }
                    Err(why) => left
                        .by_ref()
                        .for_each(|(_, ear)| ear.tell(Err(why.clone()))),
                }
            }
        };
        let telling = async {
            while let Some((at, outcome)) = outcomes.recv().await {
                settled(at, outcome);
            }
        };
        tokio::join!(sending, telling);
        guard.is_open.set(false);
    }

    /// Lets the receipts that are still due come in, at most `patience`; then ends every stream.
    pub(super) async fn close(&self, patience: Duration) {
        let mut tasks = self.tasks.take();
        // Past the deadline the tasks are aborted, by the drop of the set.
        timeout(patience, async {
            while tasks.join_next().await.is_some() {}
        })
        .await
        .ok();
    }

    /// A peer with room for a record, or for as many of `wanted` as there is room for.
    async fn room(
        &self,
        wanted: usize,
    ) -> Result<(Rc<Link>, OwnedSemaphorePermit), TransportError> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let mut live = Vec::new();
        for at in 0..self.all.len() {
            let peer = &self.all[turn.wrapping_add(at) % self.all.len()];
            if let State::Up(link) = &*peer.state.borrow() {
                let free =
                    u32::try_from(link.window.available_permits().clamp(1, wanted)).unwrap_or(1);
                match Arc::clone(&link.window).try_acquire_many_owned(free) {
                    Ok(slots) => return Ok((Rc::clone(link), slots)),
                    Err(_) => live.push(Rc::clone(link)),
                }
            }
        }
        if live.is_empty() {
            return Err(TransportError::Publish(self.why_none()));
        }
        // Not one by one: each turn wakes this task.
        let few = u32::try_from(wanted.min(FEW)).unwrap_or(1);
        let windows = live
            .iter()
            .map(|link| Box::pin(Arc::clone(&link.window).acquire_many_owned(few)));
        match timeout(ROOM_PATIENCE, select_all(windows)).await {
            Ok((Ok(slots), at, _)) => Ok((live.swap_remove(at), slots)),
            Ok((Err(_), at, _)) => Err(live[at].error()),
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

/// One open stream.
struct Link {
    window: Arc<Semaphore>,
    /// What may still be sent; `None` once the node is closing or the stream is broken.
    outbox: RefCell<Option<mpsc::Sender<proto::Record>>>,
    /// Who waits for a receipt, in the order in which their records were sent.
    waiters: RefCell<HashMap<Arc<str>, SmallVec<[Waiter; 1]>, RandomState>>,
    broken: OnceCell<String>,
}

struct Waiter {
    /// Those that are given up together.
    batch: u64,
    ear: Ear,
    _slot: OwnedSemaphorePermit,
}

/// Who is told what becomes of a record.
struct Ear {
    at: usize,
    told: local::Sender<(usize, Result<(), TransportError>)>,
}

impl Ear {
    fn tell(&self, outcome: Result<(), TransportError>) {
        // Fails when nobody waits any more.
        self.told.send((self.at, outcome)).ok();
    }
}

/// The records of one call. Dropped while it is open, nobody waits for them any more.
struct Batch<'p> {
    peers: &'p Peers,
    number: u64,
    is_open: Cell<bool>,
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if !self.is_open.get() {
            return;
        }
        for peer in &self.peers.all {
            if let State::Up(link) = &*peer.state.borrow() {
                link.give_up(self.number);
            }
        }
    }
}

impl Link {
    fn new(outbox: mpsc::Sender<proto::Record>) -> Self {
        Self {
            window: Arc::new(Semaphore::new(WINDOW)),
            outbox: RefCell::new(Some(outbox)),
            waiters: RefCell::default(),
            broken: OnceCell::new(),
        }
    }

    fn send(&self, record: &Record, batch: u64, slot: OwnedSemaphorePermit, ear: Ear) {
        let message = proto::Record::from(record);
        if message.encoded_len() > MAX_MESSAGE {
            let why = format!("the record is larger than {MAX_MESSAGE} bytes");
            return ear.tell(Err(TransportError::Publish(why)));
        }
        match self
            .outbox
            .borrow()
            .as_ref()
            .map(|outbox| outbox.try_send(message))
        {
            Some(Ok(())) => {}
            // Records that were given up may still lie there: then the peer does not read, and waiting would not be seen.
            Some(Err(mpsc::error::TrySendError::Full(_))) => {
                return ear.tell(Err(TransportError::Publish(
                    "the peer does not read its stream".into(),
                )));
            }
            Some(Err(mpsc::error::TrySendError::Closed(_))) | None => {
                return ear.tell(Err(self.error()));
            }
        }
        let waiter = Waiter {
            batch,
            ear,
            _slot: slot,
        };
        self.waiters
            .borrow_mut()
            .entry(Arc::clone(&record.id))
            .or_default()
            .push(waiter);
    }

    /// Hands a receipt to the one that has waited longest for its id.
    fn receive(&self, receipt: Receipt) {
        let waiter = {
            let mut waiters = self.waiters.borrow_mut();
            let Some(mut others) = waiters.remove(receipt.id.as_str()) else {
                return;
            };
            let waiter = others.remove(0);
            if !others.is_empty() {
                waiters.insert(receipt.id.as_str().into(), others);
            }
            waiter
        };
        waiter.ear.tell(match receipt.outcome() {
            Outcome::Safe => Ok(()),
            Outcome::Refused => Err(TransportError::Publish(format!(
                "refused: {}",
                receipt.detail
            ))),
            Outcome::Retry | Outcome::Unspecified => Err(TransportError::Publish(receipt.detail)),
        });
    }

    /// Lets nobody of `batch` wait any more.
    fn give_up(&self, batch: u64) {
        self.waiters.borrow_mut().retain(|_, waiters| {
            waiters.retain(|waiter| waiter.batch != batch);
            !waiters.is_empty()
        });
    }

    /// Fails all that wait, at once.
    fn fail(&self, why: String) {
        // The first reason stays.
        self.broken.set(why).ok();
        self.outbox.take();
        self.window.close();
        for waiter in self.waiters.take().into_values().flatten() {
            waiter.ear.tell(Err(self.error()));
        }
    }

    fn error(&self) -> TransportError {
        TransportError::Publish(
            self.broken
                .get()
                .map_or("closing", String::as_str)
                .to_owned(),
        )
    }
}

/// A link while its peer offers it; however the stream ends, and its task with it, nobody is left waiting.
struct Offered<'p> {
    peer: &'p Peer,
    link: Rc<Link>,
}

impl<'p> Offered<'p> {
    fn new(peer: &'p Peer, link: Rc<Link>) -> Self {
        peer.state.send_replace(State::Up(Rc::clone(&link)));
        Self { peer, link }
    }

    fn withdraw(&self, why: String) {
        self.peer.state.send_replace(State::Down(why.clone()));
        self.link.fail(why);
    }
}

impl Drop for Offered<'_> {
    fn drop(&mut self) {
        if self.link.broken.get().is_none() {
            self.withdraw("closed".into());
        }
    }
}

async fn stay_connected(peer: Rc<Peer>, phase: watch::Receiver<Phase>) {
    let mut backoff = Backoff::new(RECONNECT_FIRST, RECONNECT_CAP);
    loop {
        let started = Instant::now();
        let opened = tokio::select! {
            opened = timeout(OPEN_TIMEOUT, open(&peer.endpoint)) => opened,
            () = reached(phase.clone(), Phase::Closing) => return,
        };
        let why = match opened {
            Ok(Ok((link, receipts))) => {
                tracing::info!(peer = %peer.endpoint.uri(), "carrying records to the peer");
                let offered = Offered::new(&peer, link);
                let why = relay(&offered.link, receipts, &phase).await;
                offered.withdraw(why.clone());
                why
            }
            Ok(Err(why)) => why,
            Err(_) => format!("no stream within {OPEN_TIMEOUT:?}"),
        };
        if *phase.borrow() != Phase::Serving {
            return;
        }
        // A peer that opens streams and breaks them at once is not well.
        if started.elapsed() > RECONNECT_CAP {
            backoff.reset();
        }
        tracing::warn!(peer = %peer.endpoint.uri(), %why, "not connected to the peer");
        peer.state.send_replace(State::Down(why));
        tokio::select! {
            () = sleep(backoff.next_delay()) => {}
            () = reached(phase.clone(), Phase::Closing) => return,
        }
    }
}

async fn open(endpoint: &Endpoint) -> Result<(Rc<Link>, Streaming<Receipt>), String> {
    let channel = endpoint.connect().await.map_err(|e| with_sources(&e))?;
    let (outbox, records) = mpsc::channel(WINDOW);
    let mut client = WaypostClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let receipts = client
        .carry(ReceiverStream::new(records))
        .await
        .map_err(|status| describe(&status))?
        .into_inner();
    let link = Link::new(outbox);
    Ok((Rc::new(link), receipts))
}

/// Hands out receipts until the stream ends; returns why it did. Once the node is closing nothing more is sent.
async fn relay(
    link: &Link,
    mut receipts: Streaming<Receipt>,
    phase: &watch::Receiver<Phase>,
) -> String {
    let mut closing = std::pin::pin!(reached(phase.clone(), Phase::Closing));
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            message = receipts.message() => match message {
                Ok(Some(receipt)) => link.receive(receipt),
                Ok(None) => return "the peer has ended the stream".into(),
                Err(status) => return describe(&status),
            },
            () = &mut closing, if open => {
                open = false;
                link.outbox.take();
            }
        }
    }
}

fn describe(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

/// The transport's own text does not name the cause.
fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt as _;

    use super::*;

    struct Sent {
        link: Link,
        told: local::Sender<(usize, Result<(), TransportError>)>,
        outcomes: local::Receiver<(usize, Result<(), TransportError>)>,
        _outbox: mpsc::Receiver<proto::Record>,
    }

    impl Sent {
        /// Records with these ids, each a batch of its own.
        fn new(ids: &[&str]) -> Self {
            let (outbox, inbox) = mpsc::channel(WINDOW);
            let (told, outcomes) = local::channel();
            let this = Self {
                link: Link::new(outbox),
                told,
                outcomes,
                _outbox: inbox,
            };
            ids.iter()
                .enumerate()
                .for_each(|(at, id)| this.send(at, id));
            this
        }

        fn send(&self, at: usize, id: &str) {
            let record = Record {
                id: id.into(),
                body: Bytes::new(),
                traceparent: None,
                origin: None,
            };
            let slot = Arc::clone(&self.link.window).try_acquire_owned();
            let slot = slot
                .or_else(|_| Arc::new(Semaphore::new(1)).try_acquire_owned())
                .unwrap();
            self.link.send(
                &record,
                at as u64,
                slot,
                Ear {
                    at,
                    told: self.told.clone(),
                },
            );
        }

        fn receive(&self, id: &str, outcome: Outcome) {
            self.link.receive(Receipt {
                id: id.into(),
                outcome: outcome.into(),
                detail: "why".into(),
            });
        }

        fn outcomes(&mut self) -> Vec<(usize, Result<(), TransportError>)> {
            std::iter::from_fn(|| self.outcomes.recv().now_or_never().flatten()).collect()
        }
    }

    fn failed(why: &str) -> Result<(), TransportError> {
        Err(TransportError::Publish(why.into()))
    }

    #[test]
    fn a_receipt_goes_to_the_one_that_has_waited_longest_for_its_id() {
        let mut sent = Sent::new(&["a", "b", "a"]);
        sent.receive("stranger", Outcome::Safe);
        sent.receive("a", Outcome::Safe);
        assert_eq!(sent.outcomes(), [(0, Ok(()))]);
        sent.receive("b", Outcome::Refused);
        sent.receive("a", Outcome::Retry);
        assert_eq!(
            sent.outcomes(),
            [(1, failed("refused: why")), (2, failed("why"))]
        );
        assert_eq!(sent.link.window.available_permits(), WINDOW);
    }

    #[test]
    fn what_was_given_up_leaves_nothing_behind_and_its_receipt_harms_nobody() {
        let mut sent = Sent::new(&["a", "a"]);
        sent.link.give_up(0);
        assert_eq!(sent.link.window.available_permits(), WINDOW - 1);
        sent.receive("a", Outcome::Safe);
        assert_eq!(sent.outcomes(), [(1, Ok(()))]);
        sent.receive("a", Outcome::Safe);
        assert!(sent.link.waiters.borrow().is_empty());
    }

    #[test]
    fn a_link_that_breaks_fails_all_that_wait_and_all_that_come_later() {
        let mut sent = Sent::new(&["a"]);
        sent.link.fail("gone".into());
        sent.send(1, "b");
        assert_eq!(sent.outcomes(), [(0, failed("gone")), (1, failed("gone"))]);
        assert!(sent.link.window.is_closed());
    }
}
