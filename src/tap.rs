//! The tap: shows records to watchers as the API takes them.
//!
//! The last passages are kept for all watchers together, up to a number and a size. A watcher that is
//! slower learns how many it has missed, and no record waits for it. Without a watcher, nothing is kept.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use tokio::sync::watch;
use tracing_mutex::parkinglot::Mutex;

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

/// The most passages that are kept for slow watchers, and the most bytes of their bodies.
const KEPT_MAX: usize = 1024;
const KEPT_BYTES: usize = 4 << 20;

/// The next thing that a watcher sees.
#[derive(Clone, Debug)]
pub enum Tapped {
    Passage(Passage),
    /// So many passages were gone before it could see them.
    Missed(u64),
}

/// Shows passages to watchers. Clones are one tap.
#[derive(Clone, Default)]
pub struct Tap(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Changed while `kept` is locked.
    watchers: AtomicUsize,
    kept: Mutex<KeptPassages>,
    /// The number of the last passage. Changed while `kept` is locked.
    last: watch::Sender<u64>,
}

#[derive(Default)]
struct KeptPassages {
    passages: VecDeque<Passage>,
    bytes: usize,
}

impl KeptPassages {
    fn add(&mut self, passage: Passage) {
        self.bytes += passage.body.len();
        self.passages.push_back(passage);
        // The newest stays, however large it is.
        while self.passages.len() > KEPT_MAX || (self.bytes > KEPT_BYTES && self.passages.len() > 1)
        {
            let oldest = self.passages.pop_front();
            self.bytes -= oldest.map_or(0, |passage| passage.body.len());
        }
    }
}

impl Tap {
    /// The passages from now on.
    pub fn watch(&self) -> TapWatcher {
        let kept = self.0.kept.lock();
        self.0.watchers.fetch_add(1, Relaxed);
        let last = self.0.last.subscribe();
        drop(kept);
        let position = *last.borrow();
        TapWatcher {
            tap: self.clone(),
            last,
            position,
        }
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
        let Shared {
            watchers,
            kept,
            last,
        } = &*self.0;
        if watchers.load(Relaxed) == 0 {
            return;
        }
        let passage = passage();
        let mut kept = kept.lock();
        // The last watcher may have left meanwhile, and nobody would empty it again.
        if watchers.load(Relaxed) > 0 {
            kept.add(passage);
            last.send_modify(|last| *last += 1);
        }
    }
}

/// One watcher.
pub struct TapWatcher {
    tap: Tap,
    last: watch::Receiver<u64>,
    /// The last passage that it has seen or missed.
    position: u64,
}

impl TapWatcher {
    /// The next passage, once there is one.
    pub async fn next(&mut self) -> Tapped {
        loop {
            self.last.mark_unchanged();
            if let Some(tapped) = self.try_next() {
                return tapped;
            }
            // The tap has the sender, so it is not gone.
            self.last.changed().await.ok();
        }
    }

    /// The next passage, if there is one already.
    pub fn try_next(&mut self) -> Option<Tapped> {
        let kept = self.tap.0.kept.lock();
        let last = *self.tap.0.last.borrow();
        let passages = &kept.passages;
        let missed = (last - passages.len() as u64).saturating_sub(self.position);
        if missed > 0 {
            self.position += missed;
            return Some(Tapped::Missed(missed));
        }
        // From the end, since the first one that is kept has any number.
        let behind = usize::try_from(last - self.position).ok()?;
        let next = passages.get(passages.len().checked_sub(behind)?)?;
        self.position += 1;
        Some(Tapped::Passage(next.clone()))
    }
}

impl Drop for TapWatcher {
    fn drop(&mut self) {
        let mut kept = self.tap.0.kept.lock();
        if self.tap.0.watchers.fetch_sub(1, Relaxed) == 1 {
            *kept = KeptPassages::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passage(number: usize, bytes: usize) -> Passage {
        Passage {
            lane: LaneId::Nats,
            id: number.to_string().into(),
            body: vec![b' '; bytes].into(),
            status: 201,
            at_ms: 5,
        }
    }

    fn next(watcher: &mut TapWatcher) -> String {
        match watcher.try_next() {
            Some(Tapped::Passage(passage)) => passage.id.to_string(),
            Some(Tapped::Missed(count)) => format!("missed {count}"),
            None => "nothing".into(),
        }
    }

    #[test]
    fn a_passage_is_made_for_those_who_watch_and_for_nobody_else() {
        let tap = Tap::default();
        let nobody = || unreachable!("nobody watches");
        tap.show(nobody);
        let mut watching = tap.clone().watch();
        let mut second = tap.watch();
        tap.show(|| passage(1, 9));
        assert_eq!(
            (next(&mut watching), next(&mut second)),
            ("1".into(), "1".into())
        );
        assert_eq!(next(&mut watching), "nothing");
        drop(watching);
        tap.show(|| passage(2, 9));
        drop(second);
        tap.show(nobody);
        let kept = tap.0.kept.lock();
        assert_eq!((kept.passages.len(), kept.bytes), (0, 0));
        drop(kept);
        let mut late = tap.watch();
        assert_eq!(
            next(&mut late),
            "nothing",
            "what passed before is not shown"
        );
        tap.show(|| passage(3, 9));
        assert_eq!(next(&mut late), "3");
    }

    #[test]
    fn a_slow_watcher_learns_what_it_has_missed_and_memory_is_bounded() {
        let tap = Tap::default();
        let mut watcher = tap.watch();
        (0..KEPT_MAX + 10).for_each(|number| tap.show(|| passage(number, 1)));
        assert_eq!(next(&mut watcher), "missed 10");
        assert_eq!(next(&mut watcher), "10");
        for number in 0..100 {
            tap.show(|| passage(number, KEPT_BYTES / 4));
            assert!(tap.0.kept.lock().bytes <= KEPT_BYTES);
        }
        assert_eq!(next(&mut watcher), format!("missed {}", KEPT_MAX - 1 + 96));
        assert_eq!(next(&mut watcher), "96");
        // One alone may be larger.
        tap.show(|| passage(7, 2 * KEPT_BYTES));
        assert_eq!(next(&mut watcher), "missed 3");
        assert_eq!(next(&mut watcher), "7");
    }

    #[actix_rt::test]
    async fn a_watcher_is_woken_by_the_next_passage() {
        let tap = Tap::default();
        let mut watcher = tap.watch();
        let other = tap.clone();
        actix_rt::spawn(async move {
            actix_rt::task::yield_now().await;
            other.show(|| passage(1, 1));
        });
        assert!(matches!(watcher.next().await, Tapped::Passage(_)));
    }
}
