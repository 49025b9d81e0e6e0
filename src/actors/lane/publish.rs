//! Publishing: packs the records of jobs into messages, and replies to each record that is
//! confirmed.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};
use tokio::time::{self, timeout};
use tracing::{debug, warn};

use super::{
    LaneParams,
    bundle::{BundleSize, Packed},
};
use crate::{
    actors::{Job, Route, Source, copies::Copy, receipts::PendingRecord, supervisor::Exit},
    changes::{Change, ShortReason},
    delivery::Receipt,
    record::Record,
    spool::{CopyWriter, NotSafe},
    trace::LaneTracer,
    transport::{Transport, TransportError},
};

/// The least time that a lane has for a publish.
const PUBLISH_MIN: Duration = Duration::from_millis(100);

/// A record that the transport has to confirm, and that may need a copy on disk before its reply.
struct Unconfirmed<'a> {
    pending: &'a PendingRecord,
    source: Source,
    copy: Cell<CopyState>,
    /// The time that the confirm took, once it has come.
    confirmed: Cell<Option<Duration>>,
    /// Why there is none, for its trace.
    error: Cell<Option<&'static str>>,
}

enum CopyState {
    NotNeeded,
    Missing,
    Written(Copy),
}

impl AsRef<Record> for Unconfirmed<'_> {
    fn as_ref(&self) -> &Record {
        &self.pending.record
    }
}

impl<'a> Unconfirmed<'a> {
    const fn new(pending: &'a PendingRecord, source: Source, needs_copy: bool) -> Self {
        let copy = if needs_copy {
            CopyState::Missing
        } else {
            CopyState::NotNeeded
        };
        Self {
            pending,
            source,
            copy: Cell::new(copy),
            confirmed: Cell::new(None),
            error: Cell::new(None),
        }
    }

    /// Replies once the lane has confirmed the record and the copy that it needs is on disk.
    fn reply_if_safe(&self, params: &LaneParams) {
        let Some(took) = self.confirmed.get() else {
            return;
        };
        let copy = match self.copy.replace(CopyState::Missing) {
            CopyState::Missing => return,
            CopyState::NotNeeded => None,
            CopyState::Written(copy) => Some(copy),
        };
        let lane = params.lane;
        let ledger = &params.ledger;
        let record = &self.pending.record;
        let is_heard = self.pending.reply(Ok(Receipt::Lane(lane)));
        match (is_heard, self.source) {
            (true, Source::Client) => ledger.accepted(lane, record, took),
            (true, Source::Spool) => ledger.resent(lane, record, took),
            (true, Source::Copies) => {}
            // The client has no receipt. If the record comes out of the lane, the ledger counts it
            // there.
            (false, Source::Client) => return,
            (false, Source::Spool | Source::Copies) => return ledger.maybe_published(record),
        }
        if let Some(copy) = copy {
            params.copies.keep(record, copy);
            // It may have ended before its copy was kept.
            if ledger.has_ended(record) {
                params.copies.release(record);
            }
        }
    }
}

/// Publishes the records of `jobs`, and returns those that are not confirmed to the router.
/// Returns why the lane cannot go on, if it cannot. `answered` is the time of the broker's last
/// answer.
pub async fn publish<T: Transport>(
    transport: &T,
    jobs: Vec<Job>,
    size: BundleSize,
    params: &LaneParams,
    copy_writer: Option<&CopyWriter>,
    answered: &Cell<Option<Instant>>,
) -> Option<Exit> {
    let began = Instant::now();
    let patience = patience(&jobs, params);
    let records = jobs.iter().flat_map(|job| {
        let records = job.records.iter();
        records.map(|pending| Unconfirmed::new(pending, job.source, copy_writer.is_some()))
    });
    let records: Vec<_> = records.collect();
    let packed = Packed::new(&records, size);
    let copying = async {
        match copy_writer {
            Some(writer) => write_copies(&records, writer, params).await,
            None => Ok(()),
        }
    };
    let mut failure = None;
    let publishing = transport.publish(&packed.messages, |index, outcome| {
        let now = Instant::now();
        let records = &records[packed.records(index)];
        let Err(why) = outcome else {
            answered.set(Some(now));
            for record in records {
                record.confirmed.set(Some(now - began));
                record.reply_if_safe(params);
            }
            return;
        };
        if let TransportError::Refused(_) | TransportError::TooLarge(_) = why {
            answered.set(Some(now));
        }
        refused(records, &why, params);
        for record in records {
            record.error.set(Some(why.name()));
        }
        // A lost connection matters more than the failure of one message.
        if !matches!(failure, Some(TransportError::Lost(_))) {
            failure = Some(why);
        }
    });
    let ended = timeout(patience, join(publishing, copying)).await;
    let had_time = patience >= params.publish_timeout / 2;
    let is_evidence = match (&failure, &ended) {
        (Some(TransportError::TooLarge(_)), _) => false,
        (Some(TransportError::Lost(_)), _) | (_, Ok(_)) => true,
        (_, Err(_)) => had_time,
    };
    score(&records, is_evidence, params);
    trace(&records, &packed, began, &params.tracer);
    let failure = match ended {
        _ if matches!(failure, Some(TransportError::Lost(_))) => failure,
        Ok(((), copied)) => failure.or_else(|| copied.err().map(no_copy)),
        Err(_) => {
            let is_silent = T::CONFIRMS_ALONE && answered.get().is_none_or(|at| at < began);
            Some(no_confirm(is_silent && had_time, params))
        }
    }?;
    params.live_lanes.failed(params.lane, &failure.to_string());
    drop(records);
    return_unconfirmed(jobs, &failure, params);
    matches!(failure, TransportError::Lost(_)).then(|| Exit::Failed(failure.to_string()))
}

/// Tells the lane's score which of the records the lane has confirmed. Those that it has not count
/// against it if that `is_evidence`. A record that only lacks its copy is confirmed: the disk is
/// this node's, not the lane's.
fn score(records: &[Unconfirmed<'_>], is_evidence: bool, params: &LaneParams) {
    let scores = &params.live_lanes.scores;
    if !scores.measures() {
        return;
    }
    let lane = params.lane;
    let now = scores.at(time::Instant::now());
    let confirmed = records.iter().filter_map(|record| record.confirmed.get());
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    if let Some(longest) = confirmed.clone().max() {
        scores.confirmed(lane, count(confirmed.clone().count()), longest, now);
    }
    let failed = records.len() - confirmed.count();
    if failed > 0
        && is_evidence
        && let Some(ejection) = scores.failed(lane, count(failed), now)
    {
        warn!(%lane, reason = %ejection, "the lane is ejected: other lanes take its records");
        params.live_lanes.change_log.add(Change::Ejection {
            lane,
            reason: ShortReason(&ejection.to_string()),
            retry_in_s: ejection.length.as_secs_f64(),
        });
    }
}

/// Tells how the publish of each message has ended.
fn trace(records: &[Unconfirmed<'_>], packed: &Packed, began: Instant, tracer: &LaneTracer) {
    if !tracer.is_on() {
        return;
    }
    for index in 0..packed.messages.len() {
        let records = &records[packed.records(index)];
        let confirmed = records.first().and_then(|record| record.confirmed.get());
        let error = records.first().and_then(|record| record.error.get());
        let result = confirmed.ok_or(error.unwrap_or("timeout"));
        tracer.sent(records, began, result);
    }
}

fn no_copy(why: NotSafe) -> TransportError {
    TransportError::Publish(format!("no copy on disk: {why}"))
}

fn no_confirm(is_lost: bool, params: &LaneParams) -> TransportError {
    let why = format!("no confirm within {:?}", params.publish_timeout);
    if is_lost {
        TransportError::Lost(why)
    } else {
        TransportError::Publish(why)
    }
}

/// Writes a copy of each record, and returns the first failure.
async fn write_copies(
    records: &[Unconfirmed<'_>],
    writer: &CopyWriter,
    params: &LaneParams,
) -> Result<(), NotSafe> {
    let write = async |record: &Unconfirmed<'_>| {
        let is_on_disk = record.source != Source::Client;
        let copies = &params.copies;
        let copy = copies.write(writer, &record.pending.record, is_on_disk);
        let copy = copy.await?;
        record.copy.set(CopyState::Written(copy));
        record.reply_if_safe(params);
        Ok(())
    };
    let written = join_all(records.iter().map(write)).await;
    written.into_iter().collect()
}

/// Counts a refusal of the message of `records`, or keeps the limit that they are over.
fn refused(records: &[Unconfirmed<'_>], why: &TransportError, params: &LaneParams) {
    match why {
        TransportError::Refused(reason) => {
            let records = records.len() as u64;
            params.ledger.refused_by(params.lane, reason, records);
        }
        TransportError::TooLarge(most) => {
            let sizes = records
                .iter()
                .map(|record| record.pending.record.message_size());
            let most = most.unwrap_or_else(|| sizes.sum::<usize>().saturating_sub(1));
            params.live_lanes.set_largest_message(params.lane, most);
        }
        TransportError::Connect(_) | TransportError::Publish(_) | TransportError::Lost(_) => {}
    }
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
        debug!(lane = %params.lane, records = job.records.len(), reason = %failure, "records not confirmed");
        for pending in &job.records {
            params.ledger.maybe_published(&pending.record);
        }
        return_job(job, params);
    }
}

/// Hands a job back to the router. A router that has just died drops it, and admission sends it
/// again.
pub fn return_job(job: Job, params: &LaneParams) {
    if params.router.try_send(Route(job)).is_err() {
        debug!(lane = %params.lane, "router did not take records back");
    }
}
