//! Publishing: packs the records of jobs into messages, and replies to each record that is
//! confirmed.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use tokio::time::timeout;
use tracing::debug;

use super::{
    LaneParams,
    bundle::{BundleSize, Packed},
};
use crate::{
    actors::{Job, Route, receipts::PendingRecord, supervisor::Exit},
    delivery::Receipt,
    record::Record,
    transport::{Transport, TransportError},
};

/// The least time that a lane has for a publish.
const PUBLISH_MIN: Duration = Duration::from_millis(100);

/// A record that the transport has to confirm.
#[derive(Clone, Copy)]
struct Unconfirmed<'a> {
    pending: &'a PendingRecord,
    on_disk: bool,
}

impl AsRef<Record> for Unconfirmed<'_> {
    fn as_ref(&self) -> &Record {
        &self.pending.record
    }
}

impl Unconfirmed<'_> {
    fn confirm(&self, params: &LaneParams, took: Duration) {
        let ledger = &params.ledger;
        let is_heard = self.pending.reply(Ok(Receipt::Lane(params.lane)));
        match (is_heard, self.on_disk) {
            (true, false) => ledger.accepted(params.lane, took),
            (true, true) => ledger.resent(params.lane, took),
            // The client has no receipt. If the record comes out of the lane, the ledger counts it
            // there.
            (false, false) => {}
            (false, true) => ledger.maybe_published(&self.pending.record),
        }
    }
}

/// Publishes the records of `jobs`, and returns those that are not confirmed to the router.
/// Returns why the lane cannot go on, if it cannot. `confirmed` is the time of the lane's last
/// confirm.
pub async fn publish<T: Transport>(
    transport: &T,
    jobs: Vec<Job>,
    size: BundleSize,
    params: &LaneParams,
    confirmed: &Cell<Option<Instant>>,
) -> Option<Exit> {
    let began = Instant::now();
    let patience = patience(&jobs, params);
    let records = jobs.iter().flat_map(|job| {
        job.records.iter().map(|pending| Unconfirmed {
            pending,
            on_disk: job.on_disk,
        })
    });
    let records: Vec<_> = records.collect();
    let packed = Packed::new(&records, size);
    let mut failure = None;
    let publishing = transport.publish(&packed.messages, |index, outcome| match outcome {
        Ok(()) => {
            let now = Instant::now();
            confirmed.set(Some(now));
            for record in &records[packed.records(index)] {
                record.confirm(params, now - began);
            }
        }
        // A lost connection matters more than the failure of one message.
        Err(why) if !matches!(failure, Some(TransportError::Lost(_))) => failure = Some(why),
        Err(_) => {}
    });
    let is_late = timeout(patience, publishing).await.is_err();
    if is_late && !matches!(failure, Some(TransportError::Lost(_))) {
        let silent = T::CONFIRMS_ALONE && confirmed.get().is_none_or(|at| at < began);
        let why = format!("no confirm within {:?}", params.publish_timeout);
        failure = Some(if silent && patience >= params.publish_timeout / 2 {
            TransportError::Lost(why)
        } else {
            TransportError::Publish(why)
        });
    }
    let failure = failure?;
    drop(records);
    return_unconfirmed(jobs, &failure, params);
    matches!(failure, TransportError::Lost(_)).then(|| Exit::Failed(failure.to_string()))
}

/// The time for a publish of `jobs`: lanes that tried them before have used up a part of it.
fn patience(jobs: &[Job], params: &LaneParams) -> Duration {
    let spent = jobs.iter().map(|job| job.began.elapsed()).max();
    params
        .publish_timeout
        .saturating_sub(spent.unwrap_or_default())
        .max(PUBLISH_MIN)
}

fn return_unconfirmed(jobs: Vec<Job>, failure: &TransportError, params: &LaneParams) {
    for mut job in jobs {
        job.retain_unanswered();
        if job.records.is_empty() {
            continue;
        }
        debug!(lane = %params.lane, records = job.records.len(), %failure, "records not confirmed");
        for pending in &job.records {
            params.ledger.maybe_published(&pending.record);
        }
        return_job(job, params);
    }
}

/// Hands a job back to the router. A router that has just died drops it, and admission sends it
/// again.
pub fn return_job(job: Job, params: &LaneParams) {
    if let Some(router) = params.router.get()
        && router.try_send(Route(job)).is_err()
    {
        debug!(lane = %params.lane, "router did not take records back");
    }
}
