//! Records that come in from a client or a node, and the receipts that go back.

use std::{mem, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture};
use slab::Slab;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, Interval, MissedTickBehavior, interval, sleep_until},
};
use tonic::Status;

use super::{
    Phase,
    buffer::{BufferIn, BufferedRecord, OutcomeEvent, OutcomeSender, Reporter},
    reached,
};
use crate::{
    cloud_events::{EventAttributes, may_be_event},
    proto,
    record::{self, Origin, Record, RecordRules, TraceHeaders, is_visible_ascii},
};

/// A record that the API has not taken after this goes to disk, which makes it safe.
const DISK_AFTER_MAX: Duration = Duration::from_millis(500);
/// It goes there within this part of the sender's time-out: an API that is slow, and POSTs that wait
/// for their turn, are no failure of the lane.
const TIMEOUT_PART: u32 = 4;
/// After this without progress, the receipts of a client's unsettled records say RETRY.
const PATIENCE: Duration = Duration::from_secs(30);
const NOT_SAFE: &str = "not safe within 30 s";
pub(super) const CLOSING: &str = "closing";
/// Outcomes handled in one turn, so that other tasks of this thread wait no longer.
const OUTCOMES_MAX: usize = 256;
/// The longest id: an `Idempotency-Key` of 255 characters, its place in a batch, and a lane.
const ID_MAX: usize = 300;
/// The origin's run of a client's record, so that the ledger counts it for none of this node's
/// runs.
const CLIENT: &str = "client";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// It may leave the id to this node. It waits for [`PATIENCE`].
    Client,
    /// It has a time-out of its own, and ends the stream when that has passed.
    Node,
}

/// When a record goes to disk if its sender waits for `publish_timeout`.
pub(super) fn disk_after(publish_timeout: Duration) -> Duration {
    (publish_timeout / TIMEOUT_PART).clamp(Duration::from_millis(1), DISK_AFTER_MAX)
}

/// Takes records in. Clones share the buffer.
#[derive(Clone)]
pub(super) struct Intake {
    pub(super) buffer: BufferIn,
    /// Checks a record that no node has checked.
    pub(super) rules: RecordRules,
    /// This run of the node.
    pub(super) run: Arc<str>,
    pub(super) phase: watch::Receiver<Phase>,
    /// A record that the API has not taken after this goes to disk.
    pub(super) disk_after: Duration,
}

impl Intake {
    pub(super) fn closing(&self) -> BoxFuture<'static, ()> {
        reached(self.phase.clone(), Phase::Closing).boxed()
    }

    /// The record, or the receipt that refuses it. Its id and trace context become headers of the
    /// POST.
    fn accept(&self, sent: proto::Record, sender: Sender) -> Result<Record, proto::Receipt> {
        let proto::Record {
            mut id,
            body,
            traceparent,
            origin,
            api,
            event,
            tracestate,
        } = sent;
        if id.is_empty() && sender == Sender::Client {
            id = Record::new_id().to_string();
        }
        let origin = match sender {
            Sender::Node => Origin::parse(&origin),
            // A client cannot set an origin. The time in it limits retries; run and time recognise
            // a duplicate.
            Sender::Client => Some(Origin::now(CLIENT.into())),
        };
        let event = kept_event(&event, sender);
        let body = match (sender, &origin) {
            _ if id.len() > ID_MAX || !is_visible_ascii(&id) => Err(format!(
                "the id must be 1 to {ID_MAX} visible ASCII characters"
            )),
            _ if api.len() > ID_MAX || !api.is_empty() && !is_visible_ascii(&api) => Err(format!(
                "api must be the name of an API, or empty: at most {ID_MAX} visible ASCII characters"
            )),
            _ if event.is_err() => {
                Err("event must have the attributes of a CloudEvent, or be empty".into())
            }
            // This node has checked the record. Only nodes that it sent records to know the name
            // of its run.
            (Sender::Node, Some(origin)) if origin.run == self.run => Ok(body),
            // Another node has checked the record against its own schema.
            (Sender::Node, Some(_)) => record::parse_any(&body).map_err(|why| why.to_string()),
            _ => record::parse(&body, &self.rules).map_err(|why| why.to_string()),
        };
        match body {
            Ok(body) => Ok(Record {
                id: id.into(),
                body,
                trace: TraceHeaders::read(&traceparent, Some(&tracestate)),
                origin,
                api: is_visible_ascii(&api).then(|| api.into()),
                event: event.ok().flatten(),
            }),
            Err(detail) => Err(receipt(id, proto::Outcome::Refused, &detail)),
        }
    }
}

/// The attributes of a sender's record as this node keeps them. A client's that cannot be read are an
/// error, not dropped in silence; it may have coded more than it must, and the canonical text is in
/// bounds.
fn kept_event(event: &str, sender: Sender) -> Result<Option<Arc<str>>, ()> {
    match sender {
        Sender::Client if !event.is_empty() => {
            let attributes = EventAttributes::from_text(event).ok_or(())?;
            Ok(Some(attributes.to_text().into()))
        }
        _ => Ok(may_be_event(event).then(|| event.into())),
    }
}

fn receipt(id: impl Into<String>, outcome: proto::Outcome, detail: &str) -> proto::Receipt {
    proto::Receipt {
        id: id.into(),
        outcome: outcome.into(),
        detail: detail.to_owned(),
    }
}

/// One call. Polled by the task that wants the next receipt. It reads nothing from the wire while
/// a record waits for room, so a full buffer slows the sender down.
pub(super) struct InboundStream<S> {
    intake: Intake,
    sender: Sender,
    /// `None` once the sender has ended the stream.
    records: Option<S>,
    /// The failure that ended the stream, if the sender did not.
    broken: Option<Status>,
    /// A record that was read while memory had no room.
    waiting: Option<Record>,
    unconfirmed: Slab<UnconfirmedRecord>,
    outcome_sender: OutcomeSender,
    /// Bounded by the unconfirmed records: each has one outcome.
    outcomes: mpsc::UnboundedReceiver<OutcomeEvent>,
    /// When to look for records that should go to disk.
    disk_timer: Interval,
    receipts: Vec<proto::Receipt>,
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

impl<S: Stream<Item = Result<proto::Record, Status>> + Unpin> InboundStream<S> {
    pub(super) fn new(intake: Intake, records: S, sender: Sender) -> Self {
        let (outcome_sender, outcomes) = mpsc::unbounded_channel();
        let mut disk_timer = interval(intake.disk_after / 4);
        disk_timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            closing: intake.closing(),
            intake,
            sender,
            records: Some(records),
            broken: None,
            waiting: None,
            unconfirmed: Slab::new(),
            outcome_sender,
            outcomes,
            disk_timer,
            receipts: Vec::new(),
            progress: Instant::now(),
        }
    }

    /// The receipts that are due, at least one. `None` once no record will come and each has its
    /// receipt.
    ///
    /// # Errors
    /// The failure that ended the stream, after the last receipt.
    pub(super) async fn next_receipts(&mut self) -> Result<Option<Vec<proto::Receipt>>, Status> {
        let mut events = Vec::new();
        while self.receipts.is_empty() {
            // Memory may have room by now.
            if let Some(record) = self.waiting.take() {
                self.admit(record);
            }
            let idle = self.waiting.is_none() && self.unconfirmed.is_empty();
            if idle && self.records.is_none() {
                return self.broken.take().map_or(Ok(None), Err);
            }
            let patience = self.progress + PATIENCE;
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
                Some(permit) = async {
                    self.intake.buffer.overflow_room(self.waiting.as_ref()?).await
                } => {
                    if let Some(record) = self.waiting.take() {
                        let id = Arc::clone(&record.id);
                        let reporter = self.reporter();
                        self.intake.buffer.overflow(record, reporter, permit);
                        self.track(id, None);
                    }
                }
                _ = self.disk_timer.tick(), if !self.unconfirmed.is_empty() => {
                    self.write_late_to_disk();
                }
                message = async { self.records.as_mut()?.next().await },
                    if self.waiting.is_none() && self.records.is_some() =>
                {
                    if idle {
                        self.progress = Instant::now();
                    }
                    self.take(message);
                }
                () = async { sleep_until(patience).await },
                    if self.sender == Sender::Client && !idle =>
                {
                    self.progress = Instant::now();
                    self.give_up(NOT_SAFE);
                }
            }
        }
        Ok(Some(mem::take(&mut self.receipts)))
    }

    /// Takes in what was read from the stream. `None` is its end.
    fn take(&mut self, message: Option<Result<proto::Record, Status>>) {
        match message.transpose() {
            Ok(Some(record)) => match self.intake.accept(record, self.sender) {
                Ok(record) => self.admit(record),
                Err(refused) => self.receipts.push(refused),
            },
            ended => {
                self.broken = ended.err();
                self.records = None;
            }
        }
    }

    /// Reports the outcome of the record that is tracked next.
    fn reporter(&self) -> Reporter {
        Reporter::new(self.unconfirmed.vacant_key(), &self.outcome_sender)
    }

    /// Buffers the record in memory, or lets it wait.
    fn admit(&mut self, record: Record) {
        let id = Arc::clone(&record.id);
        match self.intake.buffer.try_admit(record, || self.reporter()) {
            Ok(buffered) => self.track(id, Some(buffered)),
            Err(record) => self.waiting = Some(record),
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
    }

    /// Starts to write to disk what the API has not taken in time.
    fn write_late_to_disk(&self) {
        let now = Instant::now();
        let records = self.unconfirmed.iter();
        let late = records.filter(|(_, record)| now - record.since >= self.intake.disk_after);
        for buffered in late.filter_map(|(_, record)| record.buffered.clone()) {
            // A task, because the write must end even if this call does not: it yields the key
            // that settles the entry.
            tokio::spawn(async move { buffered.write_to_disk().await });
        }
    }

    fn confirm(&mut self, event: OutcomeEvent, failure: &str) {
        let id = &*self.unconfirmed.remove(event.number).id;
        self.receipts.push(if event.is_safe {
            receipt(id, proto::Outcome::Safe, "")
        } else {
            receipt(id, proto::Outcome::Retry, failure)
        });
    }

    /// Answers every record that was read: SAFE if its outcome is here, else RETRY with the reason.
    fn give_up(&mut self, why: &str) {
        while let Ok(event) = self.outcomes.try_recv() {
            self.confirm(event, why);
        }
        // Late outcomes must not reach the records that take these numbers next.
        (self.outcome_sender, self.outcomes) = mpsc::unbounded_channel();
        let unconfirmed = self.unconfirmed.drain().map(|record| record.id);
        let given_up = unconfirmed.chain(self.waiting.take().map(|record| record.id));
        self.receipts
            .extend(given_up.map(|id| receipt(&*id, proto::Outcome::Retry, why)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attributes_of_a_clients_record_are_kept_or_refused() {
        let kept = |text: &str| kept_event(text, Sender::Client);
        let plain = "id=7&note=NOTE&source=/a&specversion=1.0&type=t";
        let short = plain.replace("NOTE", &"x".repeat(4000));
        let coded = plain.replace("NOTE", &"%78".repeat(4000));
        assert_eq!(kept(&coded), Ok(Some(short.into())));
        assert_eq!(kept(""), Ok(None));
        for bad in ["id=7", &plain.replace("NOTE", &"x".repeat(8000))] {
            assert_eq!(kept(bad), Err(()), "{}", bad.len());
        }
    }

    #[test]
    fn a_record_is_on_disk_well_before_its_sender_gives_up() {
        let ms = Duration::from_millis;
        for (publish_timeout, expected) in [
            (ms(2000), ms(500)),
            (ms(60_000), ms(500)),
            (ms(1000), ms(250)),
            (ms(100), ms(25)),
            (ms(1), ms(1)),
        ] {
            assert_eq!(disk_after(publish_timeout), expected);
        }
    }
}
