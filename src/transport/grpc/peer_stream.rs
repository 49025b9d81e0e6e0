//! The open stream to one peer: records go out, and receipts come back.

use std::{
    cell::{OnceCell, RefCell},
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{MAX_MESSAGE, Phase, reached};
use crate::{
    proto::{self, Outcome, Receipt, waypost_client::WaypostClient},
    transport::{Message, TransportError},
};

/// Records under way to one peer.
pub(super) const WINDOW: usize = 512;

/// The outcome of one record: its place in its batch, and its result.
pub(super) type SettledRecord = (usize, Result<(), TransportError>);

/// Reports the outcome of one record of a batch.
pub(super) struct ReceiptSender {
    pub at: usize,
    /// Bounded by the batch: each record sends one outcome.
    pub settled: mpsc::UnboundedSender<SettledRecord>,
}

impl ReceiptSender {
    pub(super) fn send(&self, outcome: Result<(), TransportError>) {
        // This fails if the caller has given up waiting.
        self.settled.send((self.at, outcome)).ok();
    }
}

pub(super) struct PeerStream {
    /// One permit for each record without a receipt.
    pub window: Arc<Semaphore>,
    /// `None` once the node is closing or the stream is broken.
    outbox: RefCell<Option<mpsc::Sender<proto::Record>>>,
    /// Records without a receipt by id, the oldest first.
    pending: RefCell<HashMap<Arc<str>, VecDeque<PendingReceipt>>>,
    broken: OnceCell<String>,
}

struct PendingReceipt {
    /// The records of one batch are given up together.
    batch: u64,
    receipt: ReceiptSender,
    _permit: OwnedSemaphorePermit,
}

impl PeerStream {
    /// Opens a stream to a peer. An error is the reason for the failure.
    pub(super) async fn open(endpoint: &Endpoint) -> Result<(Self, Streaming<Receipt>), String> {
        let channel = endpoint.connect().await.map_err(|e| with_sources(&e))?;
        let (outbox, records) = mpsc::channel(WINDOW);
        let mut client = WaypostClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let receipts = client
            .carry(ReceiverStream::new(records))
            .await
            .map_err(|status| describe(&status))?
            .into_inner();
        Ok((Self::new(outbox), receipts))
    }

    fn new(outbox: mpsc::Sender<proto::Record>) -> Self {
        Self {
            window: Arc::new(Semaphore::new(WINDOW)),
            outbox: RefCell::new(Some(outbox)),
            pending: RefCell::default(),
            broken: OnceCell::new(),
        }
    }

    /// Sends the record of a message that holds a `permit` of the window.
    pub(super) fn send(
        &self,
        message: &Message,
        batch: u64,
        permit: OwnedSemaphorePermit,
        receipt: ReceiptSender,
    ) {
        let record = proto::Record::from(message);
        if record.encoded_len() > MAX_MESSAGE {
            let why = format!("the record is larger than {MAX_MESSAGE} bytes");
            return receipt.send(Err(TransportError::Publish(why)));
        }
        let outbox = self.outbox.borrow();
        match outbox.as_ref().map(|outbox| outbox.try_send(record)) {
            Some(Ok(())) => {}
            // Records that were given up fill the outbox: the peer does not read.
            Some(Err(mpsc::error::TrySendError::Full(_))) => {
                let why = "the peer does not read its stream".into();
                return receipt.send(Err(TransportError::Publish(why)));
            }
            Some(Err(mpsc::error::TrySendError::Closed(_))) | None => {
                return receipt.send(Err(self.error()));
            }
        }
        let pending = PendingReceipt {
            batch,
            receipt,
            _permit: permit,
        };
        self.pending
            .borrow_mut()
            .entry(Arc::clone(&message.headers.id))
            .or_default()
            .push_back(pending);
    }

    /// Hands out receipts until the stream ends, and returns the reason. Once the node is closing
    /// it sends no more records.
    pub(super) async fn relay(
        &self,
        mut receipts: Streaming<Receipt>,
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
                    self.outbox.take();
                }
            }
        }
    }

    /// Settles the oldest record with the receipt's id.
    fn receive(&self, receipt: Receipt) {
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
        oldest.receipt.send(match receipt.outcome() {
            Outcome::Safe => Ok(()),
            Outcome::Refused => Err(TransportError::Publish(format!(
                "refused: {}",
                receipt.detail
            ))),
            Outcome::Retry | Outcome::Unspecified => Err(TransportError::Publish(receipt.detail)),
        });
    }

    /// Forgets the records of `batch`.
    pub(super) fn give_up(&self, batch: u64) {
        self.pending.borrow_mut().retain(|_, same_id| {
            same_id.retain(|pending| pending.batch != batch);
            !same_id.is_empty()
        });
    }

    /// Fails all records without a receipt, and later ones.
    pub(super) fn fail(&self, why: String) {
        // The first reason stays.
        self.broken.set(why).ok();
        self.outbox.take();
        self.window.close();
        for pending in self.pending.take().into_values().flatten() {
            pending.receipt.send(Err(self.error()));
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.get().is_some()
    }

    pub(super) fn error(&self) -> TransportError {
        let why = self.broken.get().map_or("closing", String::as_str);
        TransportError::Publish(why.to_owned())
    }
}

fn describe(status: &tonic::Status) -> String {
    format!("{}: {}", status.code(), status.message())
}

/// The error with its causes, which the transport's own text leaves out.
fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::Record;

    struct Sent {
        stream: PeerStream,
        settled: mpsc::UnboundedSender<SettledRecord>,
        outcomes: mpsc::UnboundedReceiver<SettledRecord>,
        _outbox: mpsc::Receiver<proto::Record>,
    }

    impl Sent {
        /// Records with these ids, each a batch of its own.
        fn new(ids: &[&str]) -> Self {
            let (outbox, inbox) = mpsc::channel(WINDOW);
            let (settled, outcomes) = mpsc::unbounded_channel();
            let this = Self {
                stream: PeerStream::new(outbox),
                settled,
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
            let permit = Arc::clone(&self.stream.window).try_acquire_owned();
            let permit = permit
                .or_else(|_| Arc::new(Semaphore::new(1)).try_acquire_owned())
                .unwrap();
            let settled = self.settled.clone();
            let receipt = ReceiptSender { at, settled };
            self.stream
                .send(&Message::from(&record), at as u64, permit, receipt);
        }

        fn receive(&self, id: &str, outcome: Outcome) {
            self.stream.receive(Receipt {
                id: id.into(),
                outcome: outcome.into(),
                detail: "why".into(),
            });
        }

        fn outcomes(&mut self) -> Vec<SettledRecord> {
            std::iter::from_fn(|| self.outcomes.try_recv().ok()).collect()
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
        assert_eq!(sent.stream.window.available_permits(), WINDOW);
    }

    #[test]
    fn what_was_given_up_leaves_nothing_behind_and_its_receipt_harms_nobody() {
        let mut sent = Sent::new(&["a", "a"]);
        sent.stream.give_up(0);
        assert_eq!(sent.stream.window.available_permits(), WINDOW - 1);
        sent.receive("a", Outcome::Safe);
        assert_eq!(sent.outcomes(), [(1, Ok(()))]);
        sent.receive("a", Outcome::Safe);
        assert!(sent.stream.pending.borrow().is_empty());
    }

    #[test]
    fn a_stream_that_breaks_fails_all_that_wait_and_all_that_come_later() {
        let mut sent = Sent::new(&["a"]);
        sent.stream.fail("gone".into());
        sent.send(1, "b");
        assert_eq!(sent.outcomes(), [(0, failed("gone")), (1, failed("gone"))]);
        assert!(sent.stream.window.is_closed());
    }
}
