//! `GET /api/events`: one status a second, and every change at once, as server-sent events.
//!
//! | event | `id` | is |
//! | --- | --- | --- |
//! | `status` | of the last change that is in it | `GET /api/status` |
//! | `change` | its own | a [`Change`](crate::changes::Change) |
//! | `missed` | none | says that changes before this point are lost to the reader |
//!
//! A stream ends when the token that opened it is taken away, and behind its last change when the node
//! stops.
//!
//! A status is rendered once for all readers, and none without a reader. A reader costs its place in
//! the log of changes, and a task that writes what all readers share: see `super::handover`. One that is slow skips statuses, and one that takes nothing at all loses its
//! connection: see `WRITE_PATIENCE`.

#[cfg(test)]
mod tests;

use std::{cmp::Ordering, future::Future, sync::Arc, time::Duration};

use actix_web::{
    HttpRequest, HttpResponse,
    http::{Method, StatusCode, header::HeaderName},
    web,
};
use bytes::Bytes;
use futures_util::{
    Stream, StreamExt as _,
    future::{Either, pending},
    stream,
};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    select,
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tracing_mutex::parkinglot::Mutex;

use super::{
    handover::long_answer,
    problem::{Problem, ProblemKind},
    status::AdminState,
};
use crate::changes::{ChangeLog, EventId, NextChange, event};

/// Readers at once.
const READERS_MAX: usize = 256;
/// The time between two statuses.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// While no status can be made, the readers hear this often that the connection lives.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A comment, which is no event.
pub(super) const PING: &[u8] = b": ping\n\n";
/// Asks a browser to come back a second after it has lost the connection.
const RETRY: &str = "retry: 1000\n\n";
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// A proxy that understands it does not wait for more.
pub(super) const NO_BUFFERING: (&str, &str) = ("x-accel-buffering", "no");
pub(super) const MEDIA_TYPE: &str = "text/event-stream";

/// All readers of events, and the task that renders the statuses for them.
pub struct EventHub {
    changes: ChangeLog,
    statuses: watch::Sender<RenderedStatus>,
    /// Whether no change comes any more. Each reader has a receiver.
    has_ended: watch::Sender<bool>,
    readers: Mutex<Readers>,
}

#[derive(Default)]
struct Readers {
    count: usize,
    /// There while there is a reader.
    renderer: Option<JoinHandle<()>>,
}

/// The last status, or a ping in its place. Empty before the first.
#[derive(Clone, Default)]
struct RenderedStatus {
    /// The changes up to this one are in it.
    number: u64,
    text: Bytes,
}

impl EventHub {
    pub fn new(changes: ChangeLog) -> Self {
        Self {
            changes,
            statuses: watch::Sender::default(),
            has_ended: watch::Sender::default(),
            readers: Mutex::default(),
        }
    }

    /// The changes that its readers are told.
    pub const fn changes(&self) -> &ChangeLog {
        &self.changes
    }

    /// One more reader, which has read up to the event `last_id`. The first one has `status` called
    /// each second, until the last one is gone.
    fn join<F: Future<Output = Option<String>> + 'static>(
        self: &Arc<Self>,
        last_id: Option<&str>,
        status: impl Fn() -> F + 'static,
    ) -> Result<EventReader, Problem> {
        let mut readers = self.readers.lock();
        if readers.count == READERS_MAX {
            let detail = format!(
                "{READERS_MAX} clients read events, which is the most. Close one, or read /api/status"
            );
            return Err(Problem::unavailable(ProblemKind::Streams, detail).retry_after(5));
        }
        readers.count += 1;
        let is_rendered = |task: &JoinHandle<()>| !task.is_finished();
        if !readers.renderer.as_ref().is_some_and(is_rendered) {
            let task = actix_rt::spawn(render(Arc::clone(self), status));
            readers.renderer = Some(task);
        }
        drop(readers);
        Ok(EventReader::new(Arc::clone(self), last_id))
    }

    /// Ends each stream behind the last change, and waits for that. A client that takes nothing is not
    /// waited for longer than `patience`.
    pub async fn end(&self, patience: Duration) {
        self.has_ended.send_replace(true);
        // A stream that is still open then is cut.
        let _ = timeout(patience, self.has_ended.closed()).await;
    }

    fn leave(&self) {
        let mut readers = self.readers.lock();
        readers.count -= 1;
        if readers.count == 0 {
            if let Some(renderer) = readers.renderer.take() {
                renderer.abort();
            }
            // The next reader is not to see an old one.
            self.statuses.send_replace(RenderedStatus::default());
        }
    }
}

/// Renders a status each second.
async fn render<F: Future<Output = Option<String>>>(hub: Arc<EventHub>, status: impl Fn() -> F) {
    let mut ticks = interval(STATUS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut sent_at = Instant::now();
    loop {
        ticks.tick().await;
        // Read first: what changes meanwhile is told twice, and not never.
        let number = hub.changes.last();
        let text = match timeout(STATUS_EVERY, status()).await {
            Ok(Some(json)) => event("status", hub.changes.id(number), &json),
            _ if sent_at.elapsed() >= PING_EVERY => Bytes::from_static(PING),
            _ => continue,
        };
        sent_at = Instant::now();
        hub.statuses.send_replace(RenderedStatus { number, text });
    }
}

/// One reader.
struct EventReader {
    hub: Arc<EventHub>,
    statuses: watch::Receiver<RenderedStatus>,
    changes: watch::Receiver<u64>,
    has_ended: watch::Receiver<bool>,
    /// The last change that it has read.
    position: u64,
    /// The events that come before all others.
    greeting: Option<Bytes>,
}

impl EventReader {
    fn new(hub: Arc<EventHub>, last_id: Option<&str>) -> Self {
        let (changes, has_ended) = (hub.changes.watch(), hub.has_ended.subscribe());
        let mut statuses = hub.statuses.subscribe();
        let status = statuses.borrow().clone();
        let last = hub.changes.last();
        let (mut position, mut greeting) = (last, RETRY.to_owned());
        if !status.text.is_empty() {
            statuses.mark_changed();
            position = status.number;
        }
        if let Some(text) = last_id {
            let run = hub.changes.id(0).run;
            let id = EventId::parse(text).filter(|id| id.run != run || id.number <= last);
            let reason = match id {
                Some(id) if id.run == run => {
                    position = id.number;
                    None
                }
                // All changes of this run are news to it.
                Some(_) => {
                    position = 0;
                    Some("restart")
                }
                None => Some("unknown-id"),
            };
            greeting.extend(reason.map(|reason| missed(reason, None)));
        }
        Self {
            hub,
            statuses,
            changes,
            has_ended,
            position,
            greeting: Some(greeting.into()),
        }
    }

    /// The next event, once there is one. `None` behind the last change.
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(greeting) = self.greeting.take() {
            return Some(greeting);
        }
        loop {
            // Read before the changes: none is added once it is true.
            let has_ended = *self.has_ended.borrow();
            self.changes.mark_unchanged();
            if let Some(text) = self.next_change() {
                return Some(text);
            }
            if has_ended {
                return None;
            }
            // The hub has all senders, so they are not gone.
            if self.statuses.has_changed().unwrap_or(false) {
                let status = self.statuses.borrow_and_update().clone();
                match status.number.cmp(&self.position) {
                    Ordering::Equal => return Some(status.text),
                    // Ids only grow: first the change that has come meanwhile.
                    Ordering::Greater => {
                        self.statuses.mark_changed();
                        continue;
                    }
                    Ordering::Less => {}
                }
            }
            select! {
                _ = self.changes.changed() => {}
                _ = self.statuses.changed() => self.statuses.mark_changed(),
                _ = self.has_ended.changed() => {}
            }
        }
    }

    fn next_change(&mut self) -> Option<Bytes> {
        match self.hub.changes.after(self.position) {
            NextChange::Event(text) => {
                self.position += 1;
                Some(text)
            }
            NextChange::Missed(count) => {
                self.position += count;
                Some(missed("too-old", Some(count)).into())
            }
            NextChange::None => None,
        }
    }

    fn into_stream(self) -> impl Stream<Item = Bytes> {
        stream::unfold(self, |mut reader| async move {
            let text = reader.next().await?;
            Some((text, reader))
        })
    }
}

impl Drop for EventReader {
    fn drop(&mut self) {
        self.hub.leave();
    }
}

/// Says why the reader has missed changes, and how many, if that is known.
fn missed(reason: &str, changes: Option<u64>) -> String {
    let data = json!({"reason": reason, "changes": changes});
    format!("event: missed\ndata: {data}\n\n")
}

#[derive(Deserialize)]
pub struct EventsQuery {
    after: Option<String>,
}

/// Streams the events.
pub async fn stream(
    state: web::Data<AdminState>,
    request: HttpRequest,
    query: web::Query<EventsQuery>,
) -> Result<HttpResponse, Problem> {
    let mut answer = HttpResponse::build(StatusCode::OK);
    answer.content_type(MEDIA_TYPE).insert_header(NO_BUFFERING);
    if request.method() == Method::HEAD {
        return Ok(answer.finish());
    }
    // A browser sets the header when it comes back by itself. A page that comes back cannot.
    let header = request.headers().get(LAST_EVENT_ID);
    let header = header.map(|id| String::from_utf8_lossy(id.as_bytes()));
    let last_id = header.as_deref().or(query.after.as_deref());
    let source = state.clone();
    let status = move || {
        let state = source.clone();
        async move {
            let source = state.status_source().await.ok()?;
            serde_json::to_string(&state.status(&source)).ok()
        }
    };
    let reader = state.events.join(last_id, status)?;
    // The one whose token is taken away hears no more.
    let refused = match &state.tokens {
        Some(tokens) => Either::Left(tokens.clone().until_refused(request.headers().clone())),
        None => Either::Right(pending()),
    };
    let events = reader.into_stream().take_until(refused);
    Ok(long_answer(&request, answer, events))
}
