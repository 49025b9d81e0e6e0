//! `GET /api/tap`: records as the API takes them, as server-sent events.
//!
//! | event | is |
//! | --- | --- |
//! | `record` | a record that the API has taken: lane, id, status, time, and the record as POSTed |
//! | `missed` | the number of records that passed before this point and were not shown |
//!
//! With `sample=N`, one of N records of the lane is shown. Those that are left out do not count as
//! missed, but `missed` counts all that passed meanwhile, also those that the stream would not have
//! shown: of other lanes, or not of the sample. A stream ends when its client leaves, or when the token that
//! opened it is taken away.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{Method, StatusCode},
    web,
};
use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    future::{Either, pending},
    stream,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout_at};

use super::{
    events::{MEDIA_TYPE, NO_BUFFERING, PING},
    handover::long_answer,
    problem::{Problem, ProblemKind},
    status::AdminState,
};
use crate::{
    lane_id::LaneId,
    tap::{Passage, Tap, TapWatcher, Tapped},
};

/// Watchers at once: each costs work for every record.
const WATCHERS_MAX: usize = 16;
/// A watcher of a quiet lane hears this often that the connection lives.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Records that wait go in one piece of about this size.
const PIECE: usize = 64 << 10;

/// The tap as the admin side shares it.
#[derive(Clone, Default)]
pub struct TapStreams {
    tap: Tap,
    count: Arc<AtomicUsize>,
}

impl TapStreams {
    pub fn new(tap: Tap) -> Self {
        Self {
            tap,
            count: Arc::default(),
        }
    }

    fn join(&self) -> Result<TapPlace, Problem> {
        let place = TapPlace(Arc::clone(&self.count));
        if self.count.fetch_add(1, Relaxed) < WATCHERS_MAX {
            return Ok(place);
        }
        let detail = format!("{WATCHERS_MAX} clients watch records, which is the most. Close one");
        Err(Problem::unavailable(ProblemKind::Streams, detail).retry_after(5))
    }
}

/// The place of one stream.
struct TapPlace(Arc<AtomicUsize>);

impl Drop for TapPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapQuery {
    lane: Option<String>,
    /// One of so many records.
    sample: Option<u64>,
}

/// A record as a watcher sees it.
#[derive(Serialize)]
struct ShownRecord<'p> {
    at_ms: u64,
    lane: LaneId,
    id: &'p str,
    /// The API's answer.
    status: u16,
    record: &'p RawValue,
}

/// The passages that one watcher wants, as events.
struct TapReader {
    watcher: TapWatcher,
    lane: Option<LaneId>,
    sample: u64,
    /// Passages of the lane since the last one that was shown.
    skipped: u64,
    _place: TapPlace,
}

impl TapReader {
    /// The next events, in one piece.
    async fn next(&mut self) -> Bytes {
        let mut piece = Vec::new();
        let ping_at = Instant::now() + PING_EVERY;
        while piece.is_empty() {
            match timeout_at(ping_at, self.watcher.next()).await {
                Ok(tapped) => self.add(&mut piece, &tapped),
                Err(_) => return Bytes::from_static(PING),
            }
            // All that pass may be of other lanes.
            if piece.is_empty() && Instant::now() >= ping_at {
                return Bytes::from_static(PING);
            }
            while piece.len() < PIECE
                && let Some(tapped) = self.watcher.try_next()
            {
                self.add(&mut piece, &tapped);
            }
        }
        piece.into()
    }

    fn add(&mut self, piece: &mut Vec<u8>, tapped: &Tapped) {
        match tapped {
            Tapped::Missed(count) => {
                let event = format!("event: missed\ndata: {{\"missed\":{count}}}\n\n");
                piece.extend_from_slice(event.as_bytes());
            }
            Tapped::Passage(passage) if self.wants(passage) => add_record(piece, passage),
            Tapped::Passage(_) => {}
        }
    }

    fn wants(&mut self, passage: &Passage) -> bool {
        if self.lane.is_some_and(|lane| lane != passage.lane) {
            return false;
        }
        self.skipped += 1;
        let is_shown = self.skipped >= self.sample;
        if is_shown {
            self.skipped = 0;
        }
        is_shown
    }
}

fn add_record(piece: &mut Vec<u8>, passage: &Passage) {
    // A line of an event. JSON has line ends between its parts only.
    let body = String::from_utf8_lossy(&passage.body).replace(['\n', '\r'], " ");
    let Ok(record) = RawValue::from_string(body) else {
        return;
    };
    let shown = ShownRecord {
        at_ms: passage.at_ms,
        lane: passage.lane,
        id: &passage.id,
        status: passage.status,
        record: &record,
    };
    piece.extend_from_slice(b"event: record\ndata: ");
    // Memory does not fail a write, and these types always serialise.
    serde_json::to_writer(&mut *piece, &shown).ok();
    piece.extend_from_slice(b"\n\n");
}

/// Streams the records.
pub async fn stream(
    state: web::Data<AdminState>,
    request: HttpRequest,
    query: web::Query<TapQuery>,
) -> Result<HttpResponse, Problem> {
    let TapQuery { lane, sample } = query.into_inner();
    let lane = match lane {
        Some(name) => Some(state.lane_named(&name)?),
        None => None,
    };
    let sample = sample.unwrap_or(1);
    if sample == 0 {
        let detail = "sample is a whole number above 0: one of so many records is shown";
        return Err(Problem::bad_request(ProblemKind::Query, detail));
    }
    let mut answer = HttpResponse::build(StatusCode::OK);
    answer.content_type(MEDIA_TYPE).insert_header(NO_BUFFERING);
    if request.method() == Method::HEAD {
        return Ok(answer.finish());
    }
    let reader = TapReader {
        _place: state.tap.join()?,
        watcher: state.tap.tap.watch(),
        lane,
        sample,
        skipped: sample - 1,
    };
    let events = stream::unfold(reader, |mut reader| async move {
        let piece = reader.next().await;
        Some((piece, reader))
    });
    // A client knows that its watch has begun.
    let begun = stream::once(async { Bytes::from_static(b": watching\n\n") });
    let refused = match &state.tokens {
        Some(tokens) => Either::Left(tokens.clone().until_refused(request.headers().clone())),
        None => Either::Right(pending()),
    };
    let events = begun.chain(events).take_until(refused);
    Ok(long_answer(&request, answer, events))
}
