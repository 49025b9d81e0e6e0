//! The four calls of the service, as seen from the node that receives them.

use std::{
    collections::VecDeque,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream, FuturesUnordered},
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, sleep_until, timeout},
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Phase,
    hold::{Held, Intake, Safe},
    reached,
};
use crate::{
    delivery::{LaneId, Passage, Tap},
    proto::{self, Outcome, Receipt, Summary, waypost_server::Waypost},
    record::{self, Origin, Record, Schema, is_visible_ascii},
};

/// A record that the API has not taken after this goes to disk, which makes it safe.
const CARRY_AFTER: Duration = Duration::from_millis(500);
/// How long a client's record may stay unsettled before the client is told to send it again.
const PATIENCE: Duration = Duration::from_secs(30);
const NOT_SAFE: &str = "not safe within 30 s";
const CLOSING: &str = "closing";
/// How many receipts a [`Summary`] lists.
const SUMMARY_MAX: usize = 1000;
/// The longest id: an `Idempotency-Key` of 255 characters, its place in a batch, and a lane.
const ID_MAX: usize = 300;
/// The longest trace context that is carried along; version 00 has 55 characters, later ones may have more.
const TRACEPARENT_MAX: usize = 256;

/// What the calls share.
pub(super) struct Service {
    pub(super) intake: Intake,
    /// What a record that no node took in must look like.
    pub(super) schema: Schema,
    pub(super) tap: Tap,
    pub(super) phase: watch::Receiver<Phase>,
}

impl Service {
    fn closing(&self) -> BoxFuture<'static, ()> {
        reached(self.phase.clone(), Phase::Closing).boxed()
    }

    fn inflow(&self, records: Streaming<proto::Record>, sender: Sender) -> Inflow {
        Inflow {
            intake: self.intake.clone(),
            schema: self.schema,
            sender,
            records: Some(records),
            broken: None,
            waiting: None,
            unsafe_yet: FuturesUnordered::new(),
            carry_at: None,
            answers: VecDeque::new(),
            progress: Instant::now(),
            closing: self.closing(),
        }
    }
}

#[tonic::async_trait]
impl Waypost for Service {
    async fn send(&self, request: Request<proto::Record>) -> Result<Response<Receipt>, Status> {
        let record = match accept(request.into_inner(), Sender::Client, self.schema) {
            Ok(record) => record,
            Err(refused) => return Ok(Response::new(refused)),
        };
        let safe = async {
            let (mut safe, held) = self.intake.admit(&record).await;
            if let Ok(safe) = timeout(CARRY_AFTER, &mut safe).await {
                return safe;
            }
            if let Some(held) = held {
                // Not cut short: the key that it brings is what strikes the entry out later.
                tokio::spawn(async move { held.carry().await });
            }
            safe.await
        };
        let failure = tokio::select! {
            biased;
            safe = timeout(PATIENCE, safe) => match safe {
                Ok(Ok(())) => None,
                Ok(Err(_)) => Some(CLOSING),
                Err(_) => Some(NOT_SAFE),
            },
            () = self.closing() => Some(CLOSING),
        };
        Ok(Response::new(receipt(&record.id, failure)))
    }

    async fn send_all(&self, request: Request<Streaming<proto::Record>>) -> Result<Response<Summary>, Status> {
        let mut inflow = self.inflow(request.into_inner(), Sender::Client);
        let mut summary = Summary::default();
        while let Some(receipt) = inflow.next_receipt().await {
            if receipt.outcome() == Outcome::Safe {
                summary.safe += 1;
                continue;
            }
            summary.unsafe_count += 1;
            if summary.r#unsafe.len() < SUMMARY_MAX {
                summary.r#unsafe.push(receipt);
            }
        }
        inflow.broken.map_or_else(|| Ok(Response::new(summary)), Err)
    }

    type WatchStream = BoxStream<'static, Result<proto::Passage, Status>>;

    async fn watch(&self, request: Request<proto::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let lane = match request.into_inner().lane.as_str() {
            "" => None,
            name => match LaneId::from_name(name) {
                Some(lane) => Some(lane),
                None => return Err(Status::invalid_argument(format!("no lane is named {name:?}"))),
            },
        };
        let passages = stream::unfold(self.tap.subscribe(), move |mut tap| async move {
            loop {
                match tap.recv().await {
                    Ok(passage) if lane.is_none_or(|lane| lane == passage.lane) => {
                        return Some((Ok(to_proto(&passage)), tap));
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        });
        Ok(Response::new(passages.take_until(self.closing()).boxed()))
    }

    type CarryStream = BoxStream<'static, Result<Receipt, Status>>;

    async fn carry(&self, request: Request<Streaming<proto::Record>>) -> Result<Response<Self::CarryStream>, Status> {
        let inflow = self.inflow(request.into_inner(), Sender::Node);
        let receipts = stream::unfold(inflow, |mut inflow| async move {
            let item = match inflow.next_receipt().await {
                Some(receipt) => Ok(receipt),
                None => Err(inflow.broken.take()?),
            };
            Some((item, inflow))
        });
        Ok(Response::new(receipts.boxed()))
    }
}

/// The run in the origin of a client's record: to the ledger it is of none of this node's.
const CLIENT: &str = "client";

/// Who sends a record.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sender {
    /// It may leave the id to us, and waits [`PATIENCE`].
    Client,
    /// It has its own patience and says so by ending the stream.
    Node,
}

/// A stream of records coming in and of receipts going out, driven by whoever wants the next receipt. Nothing is read from the
/// wire while a record waits for room, so a full hold slows the sender down.
struct Inflow {
    intake: Intake,
    schema: Schema,
    sender: Sender,
    /// `None` once the sender has ended it.
    records: Option<Streaming<proto::Record>>,
    /// Why the stream broke off, where the sender did not end it.
    broken: Option<Status>,
    /// Read from the wire, not yet held.
    waiting: Option<Record>,
    unsafe_yet: FuturesUnordered<Unsafe>,
    /// When to look for records that should go to disk.
    carry_at: Option<Instant>,
    /// Receipts for what was given up.
    answers: VecDeque<Receipt>,
    /// When a record last was held or settled.
    progress: Instant,
    closing: BoxFuture<'static, ()>,
}

impl Inflow {
    /// `None` once the sender has ended the stream, or the node is closing, and every record that was read has its receipt.
    async fn next_receipt(&mut self) -> Option<Receipt> {
        loop {
            if let Some(receipt) = self.answers.pop_front() {
                return Some(receipt);
            }
            let idle = self.waiting.is_none() && self.unsafe_yet.is_empty();
            if idle && self.records.is_none() {
                return None;
            }
            tokio::select! {
                biased;
                () = &mut self.closing => {
                    self.records = None;
                    self.give_up(CLOSING);
                }
                Some(receipt) = self.unsafe_yet.next(), if !self.unsafe_yet.is_empty() => {
                    self.progress = Instant::now();
                    return Some(receipt);
                }
                Some(admitted) = admit(&self.intake, self.waiting.as_ref()) => {
                    self.progress = Instant::now();
                    self.waiting = None;
                    self.carry_at.get_or_insert(self.progress + CARRY_AFTER);
                    self.unsafe_yet.push(admitted);
                }
                () = at(self.carry_at) => self.carry(),
                message = read(self.records.as_mut()), if self.waiting.is_none() && self.records.is_some() => match message {
                    Some(Ok(record)) => {
                        if idle {
                            self.progress = Instant::now();
                        }
                        match accept(record, self.sender, self.schema) {
                            Ok(record) => self.waiting = Some(record),
                            Err(refused) => return Some(refused),
                        }
                    }
                    Some(Err(status)) => {
                        self.broken = Some(status);
                        self.records = None;
                    }
                    None => self.records = None,
                },
                () = sleep_until(self.progress + PATIENCE), if self.sender == Sender::Client && !idle => {
                    self.progress = Instant::now();
                    self.give_up(NOT_SAFE);
                }
            }
        }
    }

    /// Sends what the API has not taken for a while to disk.
    fn carry(&mut self) {
        let now = Instant::now();
        let late = |one: &&Unsafe| now - one.since >= CARRY_AFTER;
        for held in self.unsafe_yet.iter().filter(late).filter_map(|one| one.held.clone()) {
            tokio::spawn(async move { held.carry().await });
        }
        self.carry_at = (!self.unsafe_yet.is_empty()).then(|| now + CARRY_AFTER / 2);
    }

    /// Answers every record that has been read: as it is safe, or RETRY if it is not.
    fn give_up(&mut self, why: &str) {
        for mut one in mem::take(&mut self.unsafe_yet) {
            let safe = one.safe.try_recv().is_ok();
            self.answers.push_back(receipt(&one.id, (!safe).then_some(why)));
        }
        self.answers.extend(self.waiting.take().map(|record| receipt(&record.id, Some(why))));
    }
}

async fn admit(intake: &Intake, waiting: Option<&Record>) -> Option<Unsafe> {
    let record = waiting?;
    let (safe, held) = intake.admit(record).await;
    Some(Unsafe { id: Arc::clone(&record.id), safe, held, since: Instant::now() })
}

/// Resolves then; never for `None`.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn read(records: Option<&mut Streaming<proto::Record>>) -> Option<Result<proto::Record, Status>> {
    records?.next().await
}

/// A record that was read and may not be safe yet, as the future of its receipt.
struct Unsafe {
    id: Arc<str>,
    safe: Safe,
    /// There if it is held in memory.
    held: Option<Arc<Held>>,
    since: Instant,
}

impl Future for Unsafe {
    type Output = Receipt;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Receipt> {
        let safe = ready!(self.safe.poll_unpin(cx));
        Poll::Ready(receipt(&self.id, safe.is_err().then_some(CLOSING)))
    }
}

/// SAFE, or RETRY where there is a failure.
fn receipt(id: &str, failure: Option<&str>) -> Receipt {
    let outcome = if failure.is_none() { Outcome::Safe } else { Outcome::Retry };
    Receipt { id: id.to_owned(), outcome: outcome.into(), detail: failure.unwrap_or_default().to_owned() }
}

/// The record, or the receipt that refuses it. What becomes a header of the POST must be fit to be one.
fn accept(sent: proto::Record, sender: Sender, schema: Schema) -> Result<Record, Receipt> {
    let proto::Record { mut id, body, traceparent, mut origin } = sent;
    if sender == Sender::Client {
        // Only a node says where a record comes from.
        origin.clear();
    }
    let refuse = |id: String, detail: String| Receipt { id, outcome: Outcome::Refused.into(), detail };
    if id.is_empty() && sender == Sender::Client {
        id = Record::new_id().to_string();
    }
    if id.len() > ID_MAX || !is_visible_ascii(&id) {
        return Err(refuse(id, format!("the id must be 1 to {ID_MAX} visible ASCII characters")));
    }
    // The node that took a record in has checked it against its own schema.
    let (schema, origin) = match Origin::parse(&origin) {
        Some(origin) => (Schema::Any, Some(origin)),
        // By its time it is given up one day, by both it is known again.
        None if sender == Sender::Client => (schema, Some(Origin::now(CLIENT.into()))),
        None => (schema, None),
    };
    match record::parse(&body, schema) {
        Ok(body) => Ok(Record {
            id: id.into(),
            body,
            traceparent: (traceparent.len() <= TRACEPARENT_MAX && is_visible_ascii(&traceparent))
                .then(|| traceparent.into()),
            origin,
        }),
        Err(invalid) => Err(refuse(id, invalid.to_string())),
    }
}

fn to_proto(passage: &Passage) -> proto::Passage {
    proto::Passage {
        id: passage.id.to_string(),
        lane: passage.lane.name().to_owned(),
        body: passage.body.to_vec(),
        status: passage.status.into(),
        at_ms: passage.at_ms,
    }
}
