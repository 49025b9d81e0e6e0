//! One stream of records from a client or a node, and the receipts that go back on it.

use std::{mem, pin::Pin, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture};
use slab::Slab;
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tonic::{Status, Streaming};

use super::{
    buffer::{BufferIn, BufferedRecord, OutcomeEvent, OutcomeSender},
    service::{CLOSING, DISK_AFTER, NOT_SAFE, PATIENCE, Sender, accept, receipt},
};
use crate::{
    proto::{self, Receipt},
    record::{Record, Schema},
};

/// Outcomes handled in one turn, so that other tasks of this thread wait no longer.
const OUTCOMES_MAX: usize = 256;

/// Polled by the task that wants the next receipt. It reads nothing from the wire while a record
/// waits for room, so a full buffer slows the sender down.
pub(super) struct InboundStream {
    buffer: BufferIn,
    schema: Schema,
    run: Arc<str>,
    sender: Sender,
    /// `None` once the sender has ended the stream.
    records: Option<Streaming<proto::Record>>,
    /// The failure that ended the stream, if the sender did not.
    broken: Option<Status>,
    /// A record that was read while the buffer had no room.
    waiting: Option<Record>,
    unconfirmed: Slab<UnconfirmedRecord>,
    outcome_sender: OutcomeSender,
    outcomes: mpsc::UnboundedReceiver<OutcomeEvent>,
    /// When to look for records that should go to disk, if `is_timer_set`.
    disk_timer: Pin<Box<Sleep>>,
    is_timer_set: bool,
    receipts: Vec<Receipt>,
    /// When a record was last buffered or settled.
    progress: Instant,
    closing: BoxFuture<'static, ()>,
}

/// A record that was read and is not known to be safe.
struct UnconfirmedRecord {
    id: Arc<str>,
    /// `None` if it went to disk directly.
    buffered: Option<Arc<BufferedRecord>>,
    since: Instant,
}

impl InboundStream {
    pub(super) fn new(
        records: Streaming<proto::Record>,
        sender: Sender,
        (buffer, schema, run): (BufferIn, Schema, Arc<str>),
        closing: BoxFuture<'static, ()>,
    ) -> Self {
        let (outcome_sender, outcomes) = mpsc::unbounded_channel();
        Self {
            buffer,
            schema,
            run,
            sender,
            records: Some(records),
            broken: None,
            waiting: None,
            unconfirmed: Slab::new(),
            outcome_sender,
            outcomes,
            disk_timer: Box::pin(sleep(Duration::ZERO)),
            is_timer_set: false,
            receipts: Vec::new(),
            progress: Instant::now(),
            closing,
        }
    }

    /// The failure that ended the stream, if there was one.
    pub(super) const fn take_failure(&mut self) -> Option<Status> {
        self.broken.take()
    }

    /// The receipts that are due, at least one. `None` once no record will come and each has its
    /// receipt.
    pub(super) async fn next_receipts(&mut self) -> Option<Vec<Receipt>> {
        let mut events = Vec::new();
        while self.receipts.is_empty() {
            let idle = self.waiting.is_none() && self.unconfirmed.is_empty();
            if idle && self.records.is_none() {
                return None;
            }
            let patience = self.progress + PATIENCE;
            let number = self.unconfirmed.vacant_key();
            let waiting = self.waiting.as_ref();
            tokio::select! {
                biased;
                () = &mut self.closing => {
                    self.records = None;
                    self.give_up(CLOSING);
                }
                _ = self.outcomes.recv_many(&mut events, OUTCOMES_MAX),
                    if !self.unconfirmed.is_empty() =>
                {
                    self.progress = Instant::now();
                    for event in events.drain(..) {
                        self.confirm(event, CLOSING);
                    }
                }
                Some(buffered) = admit(&self.buffer, waiting, number, &self.outcome_sender) => {
                    if let Some(record) = self.waiting.take() {
                        self.track(record.id, buffered);
                    }
                }
                () = &mut self.disk_timer, if self.is_timer_set => self.write_late_to_disk(),
                message = read(self.records.as_mut()),
                    if self.waiting.is_none() && self.records.is_some() => match message
                {
                    Some(Ok(record)) => {
                        if idle {
                            self.progress = Instant::now();
                        }
                        self.take(record);
                    }
                    Some(Err(status)) => {
                        self.broken = Some(status);
                        self.records = None;
                    }
                    None => self.records = None,
                },
                () = async { sleep_until(patience).await },
                    if self.sender == Sender::Client && !idle =>
                {
                    self.progress = Instant::now();
                    self.give_up(NOT_SAFE);
                }
            }
        }
        Some(mem::take(&mut self.receipts))
    }

    fn take(&mut self, sent: proto::Record) {
        let record = match accept(sent, self.sender, self.schema, &self.run) {
            Ok(record) => record,
            Err(refused) => return self.receipts.push(refused),
        };
        let number = self.unconfirmed.vacant_key();
        match self.buffer.try_admit(&record, number, &self.outcome_sender) {
            Some(buffered) => self.track(record.id, Some(buffered)),
            None => self.waiting = Some(record),
        }
    }

    fn track(&mut self, id: Arc<str>, buffered: Option<Arc<BufferedRecord>>) {
        let since = Instant::now();
        self.progress = since;
        self.unconfirmed.insert(UnconfirmedRecord {
            id,
            buffered,
            since,
        });
        if !self.is_timer_set {
            self.is_timer_set = true;
            self.disk_timer.as_mut().reset(since + DISK_AFTER);
        }
    }

    /// Starts to write to disk what the API has not taken within [`DISK_AFTER`].
    fn write_late_to_disk(&mut self) {
        let now = Instant::now();
        let records = self.unconfirmed.iter();
        let late = records.filter(|(_, record)| now - record.since >= DISK_AFTER);
        for buffered in late.filter_map(|(_, record)| record.buffered.clone()) {
            tokio::spawn(async move { buffered.write_to_disk().await });
        }
        self.is_timer_set = !self.unconfirmed.is_empty();
        self.disk_timer.as_mut().reset(now + DISK_AFTER / 2);
    }

    fn confirm(&mut self, event: OutcomeEvent, failure: &str) {
        let record = self.unconfirmed.remove(event.number);
        let failure = (!event.is_safe).then_some(failure);
        self.receipts.push(receipt(&record.id, failure));
    }

    /// Answers every record that was read: SAFE if its outcome is here, else RETRY with the reason.
    fn give_up(&mut self, why: &str) {
        while let Ok(event) = self.outcomes.try_recv() {
            self.confirm(event, why);
        }
        // Late outcomes must not reach the records that take these numbers next.
        (self.outcome_sender, self.outcomes) = mpsc::unbounded_channel();
        let unconfirmed = self.unconfirmed.drain().map(|record| record.id);
        let waiting = self.waiting.take().map(|record| record.id);
        let given_up = unconfirmed.chain(waiting);
        self.receipts
            .extend(given_up.map(|id| receipt(&id, Some(why))));
    }
}

/// Buffers the record that waits, in memory or on disk. `None` if no record waits.
async fn admit(
    buffer: &BufferIn,
    waiting: Option<&Record>,
    number: usize,
    outcomes: &OutcomeSender,
) -> Option<Option<Arc<BufferedRecord>>> {
    Some(buffer.admit(waiting?, number, outcomes).await)
}

async fn read(
    records: Option<&mut Streaming<proto::Record>>,
) -> Option<Result<proto::Record, Status>> {
    records?.next().await
}
