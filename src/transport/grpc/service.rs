//! The four calls of the service, as seen from the node that receives them.

use std::{mem, pin::Pin, sync::Arc, time::Duration};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use slab::Slab;
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Phase,
    hold::{Desk, Held, Intake, News},
    reached,
};
use crate::{
    lane_id::LaneId,
    proto::{self, Outcome, Receipt, Summary, waypost_server::Waypost},
    record::{self, Origin, Record, Schema, is_visible_ascii},
    tap::{Passage, Tap},
};

/// A record that the API has not taken after this goes to disk, which makes it safe.
const CARRY_AFTER: Duration = Duration::from_millis(500);
/// How long a client's record may stay unsettled before the client is told to send it again.
const PATIENCE: Duration = Duration::from_secs(30);
const NOT_SAFE: &str = "not safe within 30 s";
const CLOSING: &str = "closing";
/// How much news makes one turn: others on this thread wait no longer.
const NEWS_MAX: usize = 256;
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
    /// This run of the node.
    pub(super) run: Arc<str>,
    pub(super) tap: Tap,
    pub(super) phase: watch::Receiver<Phase>,
}

impl Service {
    fn closing(&self) -> BoxFuture<'static, ()> {
        reached(self.phase.clone(), Phase::Closing).boxed()
    }

    fn inflow(&self, records: Streaming<proto::Record>, sender: Sender) -> Inflow {
        let (desk, news) = mpsc::unbounded_channel();
        Inflow {
            intake: self.intake.clone(),
            schema: self.schema,
            run: Arc::clone(&self.run),
            sender,
            records: Some(records),
            broken: None,
            waiting: None,
            unsafe_yet: Slab::new(),
            desk,
            news,
            look: Box::pin(sleep(Duration::ZERO)),
            looks: false,
            receipts: Vec::new(),
            progress: Instant::now(),
            closing: self.closing(),
        }
    }
}

#[tonic::async_trait]
impl Waypost for Service {
    async fn send(&self, request: Request<proto::Record>) -> Result<Response<Receipt>, Status> {
        let record = match accept(request.into_inner(), Sender::Client, self.schema, &self.run) {
            Ok(record) => record,
            Err(refused) => return Ok(Response::new(refused)),
        };
        let (desk, mut news) = mpsc::unbounded_channel();
        let safe = async {
            let held = self.intake.admit(&record, 0, &desk).await;
            if let Ok(told) = timeout(CARRY_AFTER, news.recv()).await {
                return told;
            }
            if let Some(held) = held {
                // Not cut short: the key that it brings is what strikes the entry out later.
                tokio::spawn(async move { held.carry().await });
            }
            news.recv().await
        };
        let failure = tokio::select! {
            biased;
            told = timeout(PATIENCE, safe) => match told {
                Ok(Some((_, true))) => None,
                Ok(_) => Some(CLOSING),
                Err(_) => Some(NOT_SAFE),
            },
            () = self.closing() => Some(CLOSING),
        };
        Ok(Response::new(receipt(&record.id, failure)))
    }

    async fn send_all(
        &self,
        request: Request<Streaming<proto::Record>>,
    ) -> Result<Response<Summary>, Status> {
        let mut inflow = self.inflow(request.into_inner(), Sender::Client);
        let mut summary = Summary::default();
        while let Some(receipts) = inflow.next_receipts().await {
            for receipt in receipts {
                if receipt.outcome() == Outcome::Safe {
                    summary.safe += 1;
                    continue;
                }
                summary.unsafe_count += 1;
                if summary.r#unsafe.len() < SUMMARY_MAX {
                    summary.r#unsafe.push(receipt);
                }
            }
        }
        inflow
            .broken
            .map_or_else(|| Ok(Response::new(summary)), Err)
    }

    type WatchStream = BoxStream<'static, Result<proto::Passage, Status>>;

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let lane = match request.into_inner().lane.as_str() {
            "" => None,
            name => match LaneId::from_name(name) {
                Some(lane) => Some(lane),
                None => {
                    return Err(Status::invalid_argument(format!(
                        "no lane is named {name:?}"
                    )));
                }
            },
        };
        let passages = stream::unfold(self.tap.watch(), move |mut tap| async move {
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

    async fn carry(
        &self,
        request: Request<Streaming<proto::Record>>,
    ) -> Result<Response<Self::CarryStream>, Status> {
        let inflow = Box::new(self.inflow(request.into_inner(), Sender::Node));
        let receipts = stream::unfold(inflow, |mut inflow| async move {
            let items: Vec<_> = match inflow.next_receipts().await {
                Some(receipts) => receipts.into_iter().map(Ok).collect(),
                None => vec![Err(inflow.broken.take()?)],
            };
            Some((stream::iter(items), inflow))
        });
        Ok(Response::new(receipts.flatten().boxed()))
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
    run: Arc<str>,
    sender: Sender,
    /// `None` once the sender has ended it.
    records: Option<Streaming<proto::Record>>,
    /// Why the stream broke off, where the sender did not end it.
    broken: Option<Status>,
    /// Read from the wire, not yet held: there is no room.
    waiting: Option<Record>,
    unsafe_yet: Slab<Unsafe>,
    /// Where it is told what becomes of them.
    desk: Desk,
    news: mpsc::UnboundedReceiver<News>,
    /// When to look for records that should go to disk, if `looks`.
    look: Pin<Box<Sleep>>,
    looks: bool,
    receipts: Vec<Receipt>,
    /// When a record last was held or settled.
    progress: Instant,
    closing: BoxFuture<'static, ()>,
}

/// A record that was read and may not be safe yet.
struct Unsafe {
    id: Arc<str>,
    /// There if it is held in memory.
    held: Option<Arc<Held>>,
    since: Instant,
}

impl Inflow {
    /// Those that are due, one at least; `None` once the sender has ended the stream, or the node is closing, and every record that
    /// was read has its receipt.
    async fn next_receipts(&mut self) -> Option<Vec<Receipt>> {
        let mut told = Vec::new();
        while self.receipts.is_empty() {
            let idle = self.waiting.is_none() && self.unsafe_yet.is_empty();
            if idle && self.records.is_none() {
                return None;
            }
            let patience = self.progress + PATIENCE;
            tokio::select! {
                biased;
                () = &mut self.closing => {
                    self.records = None;
                    self.give_up(CLOSING);
                }
                _ = self.news.recv_many(&mut told, NEWS_MAX), if !self.unsafe_yet.is_empty() => {
                    self.progress = Instant::now();
                    for (number, is_safe) in told.drain(..) {
                        let one = self.unsafe_yet.remove(number);
                        self.receipts.push(receipt(&one.id, (!is_safe).then_some(CLOSING)));
                    }
                }
                Some(held) = admit(&self.intake, self.waiting.as_ref(), self.unsafe_yet.vacant_key(), &self.desk) => {
                    if let Some(record) = self.waiting.take() {
                        self.hold(record.id, held);
                    }
                }
                () = &mut self.look, if self.looks => self.carry(),
                message = read(self.records.as_mut()), if self.waiting.is_none() && self.records.is_some() => match message {
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
                () = async { sleep_until(patience).await }, if self.sender == Sender::Client && !idle => {
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
        match self
            .intake
            .try_admit(&record, self.unsafe_yet.vacant_key(), &self.desk)
        {
            Some(held) => self.hold(record.id, Some(held)),
            None => self.waiting = Some(record),
        }
    }

    fn hold(&mut self, id: Arc<str>, held: Option<Arc<Held>>) {
        let since = Instant::now();
        self.progress = since;
        self.unsafe_yet.insert(Unsafe { id, held, since });
        if !self.looks {
            self.looks = true;
            self.look.as_mut().reset(since + CARRY_AFTER);
        }
    }

    /// Sends what the API has not taken for a while to disk.
    fn carry(&mut self) {
        let now = Instant::now();
        let late = self
            .unsafe_yet
            .iter()
            .filter(|(_, one)| now - one.since >= CARRY_AFTER);
        for held in late.filter_map(|(_, one)| one.held.clone()) {
            tokio::spawn(async move { held.carry().await });
        }
        self.looks = !self.unsafe_yet.is_empty();
        self.look.as_mut().reset(now + CARRY_AFTER / 2);
    }

    /// Answers every record that has been read: as it is safe, or RETRY if it is not.
    fn give_up(&mut self, why: &str) {
        while let Ok((number, is_safe)) = self.news.try_recv() {
            let one = self.unsafe_yet.remove(number);
            self.receipts
                .push(receipt(&one.id, (!is_safe).then_some(why)));
        }
        // What was given up may still be told of: nothing of that is for those that come later.
        (self.desk, self.news) = mpsc::unbounded_channel();
        let unsafe_yet = self
            .unsafe_yet
            .drain()
            .map(|one| receipt(&one.id, Some(why)));
        self.receipts.extend(unsafe_yet);
        self.receipts.extend(
            self.waiting
                .take()
                .map(|record| receipt(&record.id, Some(why))),
        );
    }
}

/// The record that waits is held, in memory or on its way to the disk.
async fn admit(
    intake: &Intake,
    waiting: Option<&Record>,
    number: usize,
    desk: &Desk,
) -> Option<Option<Arc<Held>>> {
    Some(intake.admit(waiting?, number, desk).await)
}

async fn read(
    records: Option<&mut Streaming<proto::Record>>,
) -> Option<Result<proto::Record, Status>> {
    records?.next().await
}

/// SAFE, or RETRY where there is a failure.
fn receipt(id: &str, failure: Option<&str>) -> Receipt {
    let outcome = if failure.is_none() {
        Outcome::Safe
    } else {
        Outcome::Retry
    };
    Receipt {
        id: id.to_owned(),
        outcome: outcome.into(),
        detail: failure.unwrap_or_default().to_owned(),
    }
}

/// The record, or the receipt that refuses it. What becomes a header of the POST must be fit to be one.
fn accept(
    sent: proto::Record,
    sender: Sender,
    schema: Schema,
    run: &str,
) -> Result<Record, Receipt> {
    let proto::Record {
        mut id,
        body,
        traceparent,
        origin,
    } = sent;
    let refuse = |id: String, detail: String| Receipt {
        id,
        outcome: Outcome::Refused.into(),
        detail,
    };
    if id.is_empty() && sender == Sender::Client {
        id = Record::new_id().to_string();
    }
    if id.len() > ID_MAX || !is_visible_ascii(&id) {
        return Err(refuse(
            id,
            format!("the id must be 1 to {ID_MAX} visible ASCII characters"),
        ));
    }
    let (body, origin) = match (sender, Origin::parse(&origin)) {
        // This node took it in, and has read it. Nobody else can name its run who was not told of it.
        (Sender::Node, Some(origin)) if *origin.run == *run => (Ok(body), Some(origin)),
        // Another node did, and has checked it against its own schema.
        (Sender::Node, Some(origin)) => (record::parse(&body, Schema::Any), Some(origin)),
        (Sender::Node, None) => (record::parse(&body, schema), None),
        // Only a node says where a record comes from. By its time it is given up one day, by both it is known again.
        (Sender::Client, _) => (
            record::parse(&body, schema),
            Some(Origin::now(CLIENT.into())),
        ),
    };
    match body {
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
