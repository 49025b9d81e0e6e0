//! The tap: shows records to watchers as the API takes them.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tokio::sync::broadcast;

use crate::{clock::unix_us, lane_id::LaneId, record::Record};

/// A record as the API took it, for `waypost tap` and the gRPC call `Watch`.
#[derive(Clone, Debug)]
pub struct Passage {
    pub lane: LaneId,
    pub id: Arc<str>,
    /// The body that was POSTed, tag included.
    pub body: Bytes,
    pub status: u16,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// How many passages a slow watcher may lag behind before it misses some.
const TAP_LAG: usize = 1024;

/// Shows passages to watchers. A slow watcher misses some, and no record waits for it. Clones are
/// one tap.
#[derive(Clone, Default)]
pub struct Tap {
    /// Absent until somebody watches: it allocates room for [`TAP_LAG`] passages.
    passages: Arc<OnceLock<broadcast::Sender<Passage>>>,
}

impl Tap {
    /// The passages from now on.
    pub fn watch(&self) -> broadcast::Receiver<Passage> {
        self.passages
            .get_or_init(|| broadcast::Sender::new(TAP_LAG))
            .subscribe()
    }

    /// Shows that the API has taken `record` as `body`.
    pub fn show_delivered(
        &self,
        lane: LaneId,
        record: &Record,
        body: impl FnOnce() -> Bytes,
        status: u16,
    ) {
        self.show(|| Passage {
            lane,
            id: Arc::clone(&record.id),
            body: body(),
            status,
            at_ms: unix_us() / 1000,
        });
    }

    /// Shows a passage to the watchers. Without any, `passage` is not called.
    pub fn show(&self, passage: impl FnOnce() -> Passage) {
        if let Some(passages) = self.passages.get()
            && passages.receiver_count() > 0
        {
            // An error means that the last watcher has just left.
            passages.send(passage()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passage_is_made_for_those_who_watch_and_for_nobody_else() {
        let tap = Tap::default();
        let passage = || Passage {
            lane: LaneId::Nats,
            id: Arc::from("1"),
            body: Bytes::from_static(b"{}"),
            status: 201,
            at_ms: 5,
        };
        let nobody = || unreachable!("nobody watches");
        tap.show(nobody);
        let mut watching = tap.clone().watch();
        tap.show(passage);
        assert_eq!(&*watching.try_recv().unwrap().id, "1");
        drop(watching);
        tap.show(nobody);
    }
}
