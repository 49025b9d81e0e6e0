//! One peer: a long-lived stream that is opened again when it breaks. Records go out, and receipts
//! come back.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{MAX_MESSAGE, Phase, reached};
use crate::{
    backoff::Backoff,
    proto::{self, waypost_client::WaypostClient},
    transport::{Message, TransportError},
};

/// Messages in flight to one peer.
pub(super) const WINDOW: usize = 512;
/// How long a peer may take from the first packet to an open stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_CAP: Duration = Duration::from_secs(1);

/// The outcome of one message: its place in its batch, and its result.
pub(super) type PeerOutcome = (usize, Result<(), TransportError>);

/// A message that waits for its receipt.
pub(super) struct PendingReceipt {
    pub at: usize,
    /// Closed once the batch is abandoned. Each message sends one outcome, so the batch bounds it.
    pub outcomes: mpsc::UnboundedSender<PeerOutcome>,
    pub _permit: OwnedSemaphorePermit,
}

impl PendingReceipt {
    fn settle(self, outcome: Result<(), TransportError>) {
        // This fails if the batch is abandoned.
        self.outcomes.send((self.at, outcome)).ok();
    }
}

pub(super) struct Peer {
    endpoint: Endpoint,
    /// The records for the open stream, or the reason why none can be sent.
    outbox: watch::Sender<Result<mpsc::Sender<proto::Record>, String>>,
    /// One permit for each message without a receipt.
    window: Arc<Semaphore>,
    /// Messages without a receipt by id, the oldest first.
    pending: RefCell<HashMap<Arc<str>, VecDeque<PendingReceipt>>>,
}

impl Peer {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            outbox: watch::Sender::new(Err("connecting".into())),
            window: Arc::new(Semaphore::new(WINDOW)),
            pending: RefCell::default(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.outbox.borrow().is_ok()
    }

    /// Waits until a stream is open.
    pub(super) async fn up(&self) {
        drop(self.outbox.subscribe().wait_for(Result::is_ok).await);
    }

    /// The reason why no stream is open, with the peer's name.
    pub(super) fn why_down(&self) -> Option<String> {
        let outbox = self.outbox.borrow();
        let why = outbox.as_ref().err()?;
        Some(format!("{}: {why}", self.endpoint.uri()))
    }

    /// Permits for at most `wanted` messages, if the window has room.
    pub(super) fn try_room(&self, wanted: usize) -> Option<OwnedSemaphorePermit> {
        let free = self.window.available_permits().clamp(1, wanted);
        let free = u32::try_from(free).unwrap_or(1);
        Arc::clone(&self.window).try_acquire_many_owned(free).ok()
    }

    /// Waits for `wanted` permits.
    pub(super) async fn room(&self, wanted: u32) -> Option<OwnedSemaphorePermit> {
        let window = Arc::clone(&self.window);
        window.acquire_many_owned(wanted).await.ok()
    }

    /// Sends a message as a record. `pending` gets its outcome.
    pub(super) fn send(&self, message: &Message, pending: PendingReceipt) {
        let record = proto::Record::from(message);
        if record.encoded_len() > MAX_MESSAGE {
            return pending.settle(Err(TransportError::TooLarge(Some(MAX_MESSAGE))));
        }
        let sent = match &*self.outbox.borrow() {
            // It is full if abandoned records fill it, because the peer does not read.
            Ok(outbox) => outbox
                .try_send(record)
                .map_err(|_| "the peer does not read its stream".to_owned()),
            Err(why) => Err(why.clone()),
        };
        match sent {
            Ok(()) => self
                .pending
                .borrow_mut()
                .entry(Arc::clone(&message.headers.id))
                .or_default()
                .push_back(pending),
            Err(why) => pending.settle(Err(TransportError::Publish(why))),
        }
    }

    /// Settles the oldest message with the receipt's id.
    fn receive(&self, receipt: proto::Receipt) {
        let oldest = {
            let mut pending = self.pending.borrow_mut();
            let Some(mut same_id) = pending.remove(receipt.id.as_str()) else {
                return;
            };
            let oldest = same_id.pop_front();
            if !same_id.is_empty() {
                pending.insert(receipt.id.as_str().into(), same_id);
            }
            oldest
        };
        let Some(oldest) = oldest else { return };
        oldest.settle(match receipt.outcome() {
            proto::Outcome::Safe => Ok(()),
            proto::Outcome::Refused => Err(TransportError::Refused(receipt.detail)),
            proto::Outcome::Retry | proto::Outcome::Unspecified => {
                Err(TransportError::Publish(receipt.detail))
            }
        });
    }

    /// Forgets the messages of abandoned batches, which makes room in the window.
    pub(super) fn forget_abandoned(&self) {
        self.pending.borrow_mut().retain(|_, same_id| {
            same_id.retain(|pending| !pending.outcomes.is_closed());
            !same_id.is_empty()
        });
    }

    /// Fails all messages without a receipt, and those that come before the next stream is open.
    fn fail(&self, why: &str) {
        self.outbox.send_modify(|now| *now = Err(why.to_owned()));
        for pending in self.pending.take().into_values().flatten() {
            pending.settle(Err(TransportError::Publish(why.to_owned())));
        }
    }

    /// Opens streams one after the other until [`Phase::Closing`], and hands out their receipts.
    pub(super) async fn stay_connected(self: Rc<Self>, phase: watch::Receiver<Phase>) {
        let guard = FailOnDrop(&self);
        let mut backoff = Backoff::new(RECONNECT_FIRST, RECONNECT_CAP);
        loop {
            let started = Instant::now();
            let opened = tokio::select! {
                opened = timeout(OPEN_TIMEOUT, self.open()) => opened,
                () = reached(phase.clone(), Phase::Closing) => return,
            };
            let why = match opened {
                Ok(Ok(receipts)) => {
                    tracing::info!(peer = %self.endpoint.uri(), "the stream to the peer is open");
                    self.relay(receipts, &phase).await
                }
                Ok(Err(why)) => why,
                Err(_) => format!("no stream within {OPEN_TIMEOUT:?}"),
            };
            let is_known = self.outbox.borrow().as_ref().err() == Some(&why);
            guard.0.fail(&why);
            if *phase.borrow() != Phase::Serving {
                return;
            }
            if !is_known {
                tracing::warn!(peer = %self.endpoint.uri(), reason = %why, "not connected to the peer");
            }
            // A peer whose streams break at once keeps its back-off.
            if started.elapsed() > RECONNECT_CAP {
                backoff.reset();
            }
            tokio::select! {
                () = sleep(backoff.next_delay()) => {}
                () = reached(phase.clone(), Phase::Closing) => return,
            }
        }
    }

    /// Opens a stream. An error is the reason for the failure.
    async fn open(&self) -> Result<Streaming<proto::Receipt>, String> {
        let channel = self.endpoint.connect().await;
        let channel = channel.map_err(|error| with_causes(&error))?;
        let (outbox, records) = mpsc::channel(WINDOW);
        let mut client = WaypostClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let receipts = client.carry(ReceiverStream::new(records)).await;
        let receipts = receipts.map_err(|status| describe(&status))?.into_inner();
        self.outbox.send_modify(|now| *now = Ok(outbox));
        Ok(receipts)
    }

    /// Hands out receipts until the stream ends, and returns the reason. Once the node is closing
    /// it sends no more records.
    async fn relay(
        &self,
        mut receipts: Streaming<proto::Receipt>,
        phase: &watch::Receiver<Phase>,
    ) -> String {
        let mut closing = std::pin::pin!(reached(phase.clone(), Phase::Closing));
        let mut is_open = true;
        loop {
            tokio::select! {
                biased;
                message = receipts.message() => match message {
                    Ok(Some(receipt)) => self.receive(receipt),
                    Ok(None) => return "the peer has ended the stream".into(),
                    Err(status) => return describe(&status),
                },
                () = &mut closing, if is_open => {
                    is_open = false;
                    self.outbox.send_modify(|now| *now = Err("closing".into()));
                }
            }
        }
    }
}

/// Fails the messages without a receipt, however the peer's task ends.
struct FailOnDrop<'p>(&'p Peer);

impl Drop for FailOnDrop<'_> {
    fn drop(&mut self) {
        self.0.fail("closed");
    }
}

pub(super) fn describe(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

/// The error with its causes, which the transport's own text leaves out.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::Record;

    struct Sent {
        peer: Peer,
        sender: mpsc::UnboundedSender<PeerOutcome>,
        outcomes: mpsc::UnboundedReceiver<PeerOutcome>,
        _records: mpsc::Receiver<proto::Record>,
    }

    impl Sent {
        /// One batch of records with these ids.
        fn new(ids: &[&str]) -> Self {
            let (outbox, records) = mpsc::channel(WINDOW);
            let (sender, outcomes) = mpsc::unbounded_channel();
            let peer = Peer::new(Endpoint::from_static("http://peer"));
            peer.outbox.send_modify(|now| *now = Ok(outbox));
            let this = Self {
                peer,
                sender,
                outcomes,
                _records: records,
            };
            ids.iter()
                .enumerate()
                .for_each(|(at, id)| this.send(at, id));
            this
        }

        fn send(&self, at: usize, id: &str) {
            self.send_for(&self.sender, at, id);
        }

        fn send_for(&self, batch: &mpsc::UnboundedSender<PeerOutcome>, at: usize, id: &str) {
            let record = Record {
                id: id.into(),
                body: Bytes::new(),
                trace: None,
                origin: None,
                api: None,
                event: None,
            };
            let pending = PendingReceipt {
                at,
                outcomes: batch.clone(),
                _permit: self.peer.try_room(1).unwrap(),
            };
            self.peer.send(&Message::from(&record), pending);
        }

        fn receive(&self, id: &str, outcome: proto::Outcome) {
            self.peer.receive(proto::Receipt {
                id: id.into(),
                outcome: outcome.into(),
                detail: "why".into(),
            });
        }

        fn outcomes(&mut self) -> Vec<PeerOutcome> {
            std::iter::from_fn(|| self.outcomes.try_recv().ok()).collect()
        }
    }

    fn failed(why: &str) -> Result<(), TransportError> {
        Err(TransportError::Publish(why.into()))
    }

    #[test]
    fn a_receipt_goes_to_the_one_that_has_waited_longest_for_its_id() {
        let mut sent = Sent::new(&["a", "b", "a"]);
        sent.receive("stranger", proto::Outcome::Safe);
        sent.receive("a", proto::Outcome::Safe);
        assert_eq!(sent.outcomes(), [(0, Ok(()))]);
        sent.receive("b", proto::Outcome::Refused);
        sent.receive("a", proto::Outcome::Retry);
        assert_eq!(
            sent.outcomes(),
            [
                (1, Err(TransportError::Refused("why".into()))),
                (2, failed("why"))
            ]
        );
        assert_eq!(sent.peer.window.available_permits(), WINDOW);
    }

    #[test]
    fn what_was_given_up_leaves_nothing_behind_and_its_receipt_harms_nobody() {
        let mut sent = Sent::new(&[]);
        let (abandoned, outcomes) = mpsc::unbounded_channel();
        sent.send_for(&abandoned, 0, "a");
        sent.send(1, "a");
        drop(outcomes);
        sent.peer.forget_abandoned();
        assert_eq!(sent.peer.window.available_permits(), WINDOW - 1);
        sent.receive("a", proto::Outcome::Safe);
        assert_eq!(sent.outcomes(), [(1, Ok(()))]);
        sent.receive("a", proto::Outcome::Safe);
        assert!(sent.peer.pending.borrow().is_empty());
    }

    #[test]
    fn a_stream_that_breaks_fails_all_that_wait_and_all_that_come_later() {
        let mut sent = Sent::new(&["a"]);
        sent.peer.fail("gone");
        sent.send(1, "b");
        assert_eq!(sent.outcomes(), [(0, failed("gone")), (1, failed("gone"))]);
        assert_eq!(sent.peer.window.available_permits(), WINDOW);
        assert_eq!(sent.peer.why_down().unwrap(), "http://peer/: gone");
    }
}
