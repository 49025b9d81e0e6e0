//! The service's four calls, on the node that receives them.

use std::{sync::Arc, time::Duration};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use tokio::{
    sync::{broadcast, mpsc, watch},
    time::timeout,
};
use tonic::{Request, Response, Status, Streaming};

use super::{Phase, buffer::BufferIn, inbound::InboundStream, reached};
use crate::{
    lane_id::LaneId,
    proto::{self, Outcome, Receipt, Summary, waypost_server::Waypost},
    record::{self, Origin, Record, Schema, is_visible_ascii},
    tap::{Passage, Tap},
};

/// A record that the API has not taken after this goes to disk, which makes it safe.
pub(super) const DISK_AFTER: Duration = Duration::from_millis(500);
/// After this without progress, a client is told to send its unsettled records again.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const NOT_SAFE: &str = "not safe within 30 s";
pub(super) const CLOSING: &str = "closing";
/// How many receipts a [`Summary`] lists.
const SUMMARY_MAX: usize = 1000;
/// The longest id: an `Idempotency-Key` of 255 characters, its place in a batch, and a lane.
const ID_MAX: usize = 300;
/// The longest trace context that is accepted. Version 00 has 55 characters; later ones may have
/// more.
const TRACEPARENT_MAX: usize = 256;

pub(super) struct Service {
    pub(super) buffer: BufferIn,
    /// Checks a record that no node has checked.
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

    fn inbound(&self, records: Streaming<proto::Record>, sender: Sender) -> InboundStream {
        let shared = (self.buffer.clone(), self.schema, Arc::clone(&self.run));
        InboundStream::new(records, sender, shared, self.closing())
    }
}

#[tonic::async_trait]
impl Waypost for Service {
    async fn send(&self, request: Request<proto::Record>) -> Result<Response<Receipt>, Status> {
        let record = match accept(request.into_inner(), Sender::Client, self.schema, &self.run) {
            Ok(record) => record,
            Err(refused) => return Ok(Response::new(refused)),
        };
        let (outcome_sender, mut outcomes) = mpsc::unbounded_channel();
        let outcome = async {
            let buffered = self.buffer.admit(&record, 0, &outcome_sender).await;
            if let Ok(outcome) = timeout(DISK_AFTER, outcomes.recv()).await {
                return outcome;
            }
            if let Some(buffered) = buffered {
                // A task, because the write must end even if this call does not: it yields the key
                // that settles the entry.
                tokio::spawn(async move { buffered.write_to_disk().await });
            }
            outcomes.recv().await
        };
        let failure = tokio::select! {
            biased;
            outcome = timeout(PATIENCE, outcome) => match outcome {
                Ok(Some(event)) if event.is_safe => None,
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
        let mut inbound = self.inbound(request.into_inner(), Sender::Client);
        let mut summary = Summary::default();
        while let Some(receipts) = inbound.next_receipts().await {
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
        match inbound.take_failure() {
            None => Ok(Response::new(summary)),
            Some(failure) => Err(failure),
        }
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
        let inbound = Box::new(self.inbound(request.into_inner(), Sender::Node));
        let receipts = stream::unfold(inbound, |mut inbound| async move {
            let items: Vec<_> = match inbound.next_receipts().await {
                Some(receipts) => receipts.into_iter().map(Ok).collect(),
                None => vec![Err(inbound.take_failure()?)],
            };
            Some((stream::iter(items), inbound))
        });
        Ok(Response::new(receipts.flatten().boxed()))
    }
}

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

/// A SAFE receipt, or RETRY if there is a failure.
pub(super) fn receipt(id: &str, failure: Option<&str>) -> Receipt {
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

/// The record, or the receipt that refuses it. Its id and trace context become headers of the POST.
pub(super) fn accept(
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
        // This node has checked the record. Only nodes that it sent records to know the name of its
        // run.
        (Sender::Node, Some(origin)) if *origin.run == *run => (Ok(body), Some(origin)),
        // Another node has checked the record against its own schema.
        (Sender::Node, Some(origin)) => (record::parse(&body, Schema::Any), Some(origin)),
        (Sender::Node, None) => (record::parse(&body, schema), None),
        // A client cannot set an origin. The time in it limits retries; run and time recognise a
        // duplicate.
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
