//! The table of lanes: which take records now, and how large a record each takes. The supervisor and
//! the lanes write it, each router reads it.

use std::{sync::Arc, time::Duration};

use actix::Recipient;
use bytesize::ByteSize;
use tokio::time::Instant;
use tracing_mutex::parkinglot::{RwLock, RwLockReadGuard};

use super::{Publish, receipts::Refused};
use crate::{
    changes::ChangeLog,
    lane_id::{LaneId, PerLane},
    routing::scores::Scores,
    transport,
};

/// A limit that a refusal has taught counts for this long: its broker may raise it, and tells its
/// limit in no other way. Then the lane tries the next large message.
const LEARNT_FOR: Duration = Duration::from_mins(10);

/// One lane, as the router knows it.
#[derive(Default)]
pub struct LaneEntry {
    /// There while the lane is up.
    publisher: Option<Recipient<Publish>>,
    /// An operator lets it deliver what it has, and take nothing new.
    is_draining: bool,
    /// The most bytes of a message, as the lane was last told. `None` before the first connection.
    largest_told: Option<usize>,
    /// The most bytes of a message by the last refusal, and when that came.
    learnt: Option<(usize, Instant)>,
    /// Why the lane failed last.
    last_failure: Option<Arc<str>>,
}

impl LaneEntry {
    /// Takes messages of up to `size` bytes, if the lane is up and does not drain.
    pub fn publisher(&self, size: usize) -> Option<&Recipient<Publish>> {
        let fits = self.largest_message().is_none_or(|most| size <= most);
        let publisher = self.publisher.as_ref();
        publisher.filter(|_| fits && !self.is_draining)
    }

    /// The most bytes of a message, as far as it is known.
    fn largest_message(&self) -> Option<usize> {
        let learnt = self.learnt.filter(|(_, at)| at.elapsed() < LEARNT_FOR);
        learnt.map(|(most, _)| most).or(self.largest_told)
    }
}

/// Clones share one table. It outlives every router, so a restarted router knows which lanes are
/// up.
#[derive(Clone)]
pub struct LiveLanes {
    table: Arc<RwLock<PerLane<LaneEntry>>>,
    pub scores: Arc<Scores>,
    pub change_log: ChangeLog,
}

impl LiveLanes {
    pub fn new(scores: Arc<Scores>) -> Self {
        Self {
            table: Arc::default(),
            scores,
            change_log: ChangeLog::default(),
        }
    }

    /// The same table, with the log that gets the changes of the lanes.
    #[must_use]
    pub fn with_change_log(self, change_log: ChangeLog) -> Self {
        Self { change_log, ..self }
    }

    /// The lane is up, and `publisher` takes its records: messages of up to `largest` bytes, or of
    /// any size but for what was learnt if the system does not tell.
    pub fn insert(&self, lane: LaneId, publisher: Recipient<Publish>, largest: Option<usize>) {
        let entry = &mut self.table.write()[lane as usize];
        if !entry.is_draining {
            self.scores.lane_up(lane, self.scores.at(Instant::now()));
        }
        entry.publisher = Some(publisher);
        entry.largest_told = Some(largest.unwrap_or(usize::MAX));
        if largest.is_some() {
            entry.learnt = None;
        }
    }

    /// The lane is no longer up: it has failed, or somebody has ordered that.
    pub fn remove(&self, lane: LaneId, is_ordered: bool) {
        self.table.write()[lane as usize].publisher = None;
        let now = self.scores.at(Instant::now());
        if is_ordered {
            self.scores.lane_paused(lane, now);
        } else {
            self.scores.lane_down(lane, now);
        }
    }

    /// An operator lets the lane take nothing new, or take records again. It is so after each
    /// later connection too.
    pub fn set_draining(&self, lane: LaneId, is_draining: bool) {
        let entry = &mut self.table.write()[lane as usize];
        if entry.is_draining == is_draining {
            return;
        }
        entry.is_draining = is_draining;
        if entry.publisher.is_some() {
            let now = self.scores.at(Instant::now());
            if is_draining {
                self.scores.lane_paused(lane, now);
            } else {
                self.scores.lane_up(lane, now);
            }
        }
    }

    /// The lane has refused a message: it takes up to `most` bytes.
    pub fn set_largest_message(&self, lane: LaneId, most: usize) {
        self.table.write()[lane as usize].learnt = Some((most, Instant::now()));
    }

    /// The lane has failed to connect, or to take a record.
    pub fn failed(&self, lane: LaneId, why: &str) {
        let is_known = self.read()[lane as usize].last_failure.as_deref() == Some(why);
        if !is_known {
            self.table.write()[lane as usize].last_failure = Some(why.into());
        }
    }

    /// The last failure of each of `lanes`.
    pub fn last_failures(&self, lanes: &[LaneId]) -> String {
        let table = self.read();
        let failures = lanes.iter().map(|&lane| {
            let why = table[lane as usize].last_failure.as_deref();
            format!("{lane}: {}", why.unwrap_or("none"))
        });
        failures.collect::<Vec<_>>().join("; ")
    }

    /// The reason why none of `lanes` will carry a message of `size` bytes, if none will. The limit
    /// of a lane that is away is the last one known, and before its first connection the default of
    /// its system.
    pub fn refusal(&self, size: usize, lanes: impl Iterator<Item = LaneId>) -> Option<Refused> {
        let table = self.read();
        let mut limits = Vec::new();
        let mut all_known = true;
        for lane in lanes {
            let known = table[lane as usize].largest_message();
            let most = known.unwrap_or(transport::default_largest_message(lane));
            if size <= most {
                return None;
            }
            all_known &= known.is_some();
            limits.push(format!("{lane} {}", ByteSize(most as u64)));
        }
        Some(if all_known {
            Refused::TooLarge(limits.join(", "))
        } else {
            Refused::NoLane
        })
    }

    /// The table as it is now. Hold it for one choice only: the supervisor waits for it.
    pub fn read(&self) -> RwLockReadGuard<'_, PerLane<LaneEntry>> {
        self.table.read()
    }
}

#[cfg(test)]
mod tests {
    use actix::{Actor, Context, Handler};
    use tokio::time::advance;

    use super::*;

    struct Nobody;

    impl Actor for Nobody {
        type Context = Context<Self>;
    }

    impl Handler<Publish> for Nobody {
        type Result = ();

        fn handle(&mut self, _: Publish, _: &mut Self::Context) {}
    }

    const NATS: LaneId = LaneId::Nats;
    const RABBITMQ: LaneId = LaneId::Rabbitmq;
    const MIB: usize = 1 << 20;

    fn live_lanes() -> LiveLanes {
        let scores = Scores::new(false, Duration::from_secs(2));
        LiveLanes::new(Arc::new(scores))
    }

    fn refusal(live: &LiveLanes, size: usize) -> Option<Refused> {
        live.refusal(size, [NATS, RABBITMQ].into_iter())
    }

    #[actix_rt::test]
    async fn a_record_is_too_large_once_each_lane_has_said_so() {
        let live = live_lanes();
        let publisher = || Nobody.start().recipient();
        assert_eq!(refusal(&live, MIB), None, "the systems' defaults");
        assert_eq!(
            refusal(&live, 17 * MIB),
            Some(Refused::NoLane),
            "they may be raised"
        );

        live.insert(NATS, publisher(), Some(8 * MIB));
        assert!(live.read()[NATS as usize].publisher(8 * MIB).is_some());
        assert!(live.read()[NATS as usize].publisher(8 * MIB + 1).is_none());
        live.insert(RABBITMQ, publisher(), None);
        assert_eq!(refusal(&live, usize::MAX), None, "it has not told");

        live.set_largest_message(RABBITMQ, 4 * MIB);
        live.remove(RABBITMQ, false);
        live.remove(NATS, true);
        assert_eq!(
            refusal(&live, 8 * MIB),
            None,
            "what a lane has said counts while it is away"
        );
        let too_large = Refused::TooLarge("nats 8.0 MiB, rabbitmq 4.0 MiB".into());
        assert_eq!(refusal(&live, 8 * MIB + 1), Some(too_large));
        live.insert(RABBITMQ, publisher(), None);
        assert!(
            live.read()[RABBITMQ as usize]
                .publisher(4 * MIB + 1)
                .is_none(),
            "it was learnt"
        );
        live.insert(NATS, publisher(), Some(9 * MIB));
        assert_eq!(
            refusal(&live, 9 * MIB),
            None,
            "the server's limit was raised"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_was_learnt_is_tried_again_after_a_while() {
        let live = live_lanes();
        live.set_largest_message(NATS, MIB);
        live.set_largest_message(RABBITMQ, MIB);
        let too_large = || refusal(&live, 2 * MIB);
        assert!(matches!(too_large(), Some(Refused::TooLarge(_))));
        advance(LEARNT_FOR / 2).await;
        assert!(matches!(too_large(), Some(Refused::TooLarge(_))));
        advance(LEARNT_FOR / 2).await;
        assert_eq!(too_large(), None);
    }

    #[test]
    fn the_last_failure_of_each_lane_is_told() {
        let live = live_lanes();
        assert_eq!(live.last_failures(&[NATS]), "nats: none");
        live.failed(NATS, "away");
        live.failed(NATS, "full");
        live.failed(LaneId::Grpc, "not asked for");
        live.failed(RABBITMQ, "refused");
        let told = live.last_failures(&[NATS, RABBITMQ]);
        assert_eq!(told, "nats: full; rabbitmq: refused");
    }
}
