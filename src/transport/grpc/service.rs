//! The service's four calls, on the node that receives them.

use futures_util::{
    Stream, StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use tonic::{Request, Response, Status, Streaming};

use super::inbound::{CLOSING, InboundStream, Intake, Sender};
use crate::{
    lane_id::LaneId,
    proto::{self, waypost_server::Waypost},
    tap::{Passage, Tap, Tapped},
};

/// How many receipts a [`proto::Summary`] lists.
const SUMMARY_MAX: usize = 1000;

pub(super) struct Service {
    pub(super) intake: Intake,
    pub(super) tap: Tap,
}

impl Service {
    fn inbound<S>(&self, records: S, sender: Sender) -> InboundStream<S>
    where
        S: Stream<Item = Result<proto::Record, Status>> + Unpin,
    {
        InboundStream::new(self.intake.clone(), records, sender)
    }
}

#[tonic::async_trait]
impl Waypost for Service {
    async fn send(
        &self,
        request: Request<proto::Record>,
    ) -> Result<Response<proto::Receipt>, Status> {
        let records = stream::iter([Ok(request.into_inner())]);
        let mut inbound = self.inbound(records, Sender::Client);
        let receipts = inbound.next_receipts().await?;
        // A node that is closing does not read the record.
        let receipt = receipts.and_then(|mut receipts| receipts.pop());
        let receipt = receipt.ok_or_else(|| Status::unavailable(CLOSING))?;
        Ok(Response::new(receipt))
    }

    async fn send_all(
        &self,
        request: Request<Streaming<proto::Record>>,
    ) -> Result<Response<proto::Summary>, Status> {
        let mut inbound = self.inbound(request.into_inner(), Sender::Client);
        let mut summary = proto::Summary::default();
        while let Some(receipts) = inbound.next_receipts().await? {
            for receipt in receipts {
                if receipt.outcome() == proto::Outcome::Safe {
                    summary.safe += 1;
                    continue;
                }
                summary.unsafe_count += 1;
                if summary.r#unsafe.len() < SUMMARY_MAX {
                    summary.r#unsafe.push(receipt);
                }
            }
        }
        Ok(Response::new(summary))
    }

    type WatchStream = BoxStream<'static, Result<proto::Passage, Status>>;

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().lane;
        let lane = LaneId::from_name(&name);
        if lane.is_none() && !name.is_empty() {
            let why = format!("no lane is named {name:?}");
            return Err(Status::invalid_argument(why));
        }
        let passages = stream::unfold(self.tap.watch(), move |mut tap| async move {
            loop {
                if let Tapped::Passage(passage) = tap.next().await
                    && lane.is_none_or(|lane| lane == passage.lane)
                {
                    return Some((Ok(to_proto(&passage)), tap));
                }
            }
        });
        let passages = passages.take_until(self.intake.closing());
        Ok(Response::new(passages.boxed()))
    }

    type CarryStream = BoxStream<'static, Result<proto::Receipt, Status>>;

    async fn carry(
        &self,
        request: Request<Streaming<proto::Record>>,
    ) -> Result<Response<Self::CarryStream>, Status> {
        let inbound = Box::new(self.inbound(request.into_inner(), Sender::Node));
        let receipts = stream::try_unfold(inbound, |mut inbound| async move {
            let receipts = inbound.next_receipts().await?;
            let next = receipts.map(|all| (stream::iter(all.into_iter().map(Ok)), inbound));
            Ok::<_, Status>(next)
        });
        Ok(Response::new(receipts.try_flatten().boxed()))
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
