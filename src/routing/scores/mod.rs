//! The scores of all lanes. The actors write what happens, any number of routers read at once, and
//! reading changes nothing. All APIs share them: where there are several, the API's time is no part
//! of a latency.
//!
//! | event | call |
//! | --- | --- |
//! | the lane is up | [`Scores::lane_up`] |
//! | the lane has failed | [`Scores::lane_down`] |
//! | an operator has stopped the lane | [`Scores::lane_paused`] |
//! | the router hands records to the lane | [`Scores::sent`], until its guard is dropped |
//! | the lane has confirmed records | [`Scores::confirmed`] |
//! | the lane has not confirmed records | [`Scores::failed`] |
//! | the API has taken records at the first POST | [`Scores::delivered`] |
//! | another node takes records from the lane's broker, or none does | [`Scores::set_shared`] |
//!
//! A refusal by this node's own limits, breaker or disk is no evidence about a lane, and is not
//! told here (envoyproxy/envoy#25487).

mod health;
mod lane;
mod latency;
mod window;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::Instant;
use tracing_mutex::parkinglot::Mutex;

use self::lane::LaneScore;
pub use self::{health::Ejection, lane::Factors};
use crate::lane_id::{LaneId, PerLane};

/// A lane that was not used for so long may get a probe, and all lanes together get one in this
/// time.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// The scores of all lanes of a node.
#[derive(Debug)]
pub struct Scores {
    started: Instant,
    /// Otherwise no policy reads outcomes and times, and none are kept.
    measures: AtomicBool,
    lanes: PerLane<LaneScore>,
    publish_timeout: Duration,
    /// Microseconds.
    last_probe: AtomicU64,
    /// Held while a lane is ejected, so that two at once are not the last two.
    ejecting: Mutex<()>,
}

/// Records that a lane was handed. They are in flight until this is dropped.
#[derive(Debug)]
pub struct SentRecords {
    scores: Arc<Scores>,
    lane: LaneId,
    records: u32,
}

impl Drop for SentRecords {
    fn drop(&mut self) {
        self.scores.of(self.lane).published(self.records);
    }
}

/// A lane's routing in `GET /api/status`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct LaneRouting {
    weight: u32,
    /// [`Factors::score`]; `None` before the first delivery, for weight 0, and with a policy that
    /// reads no score.
    #[schemars(
        description = "Null before the first delivery, for weight 0, and with a policy that reads no score."
    )]
    score: Option<f64>,
    /// Of the records that were sent in the last ten seconds, this lane's part.
    share: f64,
    ejected: Option<EjectionStatus>,
    #[serde(skip)]
    pub ejections: u64,
}

impl LaneRouting {
    /// The outcomes that led to its ejection, while it is ejected.
    pub fn ejection_reason(&self) -> Option<&str> {
        self.ejected.as_ref().map(|ejected| &*ejected.reason)
    }
}

/// An ejection in `GET /api/status`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct EjectionStatus {
    /// Its end.
    retry_in_s: f64,
    /// The outcomes that led to it.
    reason: String,
}

impl Scores {
    /// Scores of lanes that are not up. They are kept only if a policy `measures`, which
    /// [`Policy::measures`](super::policy::Policy::measures) tells. A failure counts as a latency of
    /// `publish_timeout`.
    pub fn new(measures: bool, publish_timeout: Duration) -> Self {
        Self {
            started: Instant::now(),
            measures: AtomicBool::new(measures),
            lanes: PerLane::default(),
            publish_timeout,
            last_probe: AtomicU64::new(0),
            ejecting: Mutex::new(()),
        }
    }

    /// A time as the other calls take it.
    pub fn at(&self, time: Instant) -> Duration {
        time.saturating_duration_since(self.started)
    }

    /// Whether a policy reads outcomes and times.
    pub fn measures(&self) -> bool {
        self.measures.load(Relaxed)
    }

    /// Whether a policy reads outcomes and times from now on.
    pub fn set_measures(&self, measures: bool) {
        self.measures.store(measures, Relaxed);
    }

    /// The lane has connected, or was resumed.
    pub fn lane_up(&self, lane: LaneId, now: Duration) {
        self.of(lane).up(now);
    }

    /// The lane has failed.
    pub fn lane_down(&self, lane: LaneId, now: Duration) {
        self.of(lane).down(false, now);
    }

    /// An operator has paused, drained or restarted the lane.
    pub fn lane_paused(&self, lane: LaneId, now: Duration) {
        self.of(lane).down(true, now);
    }

    /// Sets the weight that the lane has from now on.
    pub fn set_weight(&self, lane: LaneId, weight: u32) {
        self.of(lane).set_weight(weight);
    }

    /// Whether another node takes records from the lane's broker. Then this node does not learn of
    /// each delivery: times and load end at the confirm.
    pub fn set_shared(&self, lane: LaneId, is_shared: bool) {
        self.of(lane).set_shared(is_shared);
    }

    /// The lane is handed `records`. To be called before it can answer.
    pub fn sent(
        self: &Arc<Self>,
        lane: LaneId,
        records: u32,
        now: Duration,
    ) -> Option<SentRecords> {
        let score = self.of(lane);
        score.sent(records, now);
        self.measures().then(|| {
            score.publishes(records, now);
            SentRecords {
                scores: Arc::clone(self),
                lane,
                records,
            }
        })
    }

    /// The lane has confirmed `records`. The last confirm `took` so long.
    pub fn confirmed(&self, lane: LaneId, records: u32, took: Duration, now: Duration) {
        if self.measures() {
            let score = self.of(lane);
            score.confirmed(records, now);
            if score.is_shared() {
                score.took(took, now);
            }
        }
    }

    /// The API has taken records. The slowest `took` so long after it was accepted.
    pub fn delivered(&self, lane: LaneId, took: Duration, now: Duration) {
        let score = self.of(lane);
        if self.measures() && !score.is_shared() {
            score.took(took, now);
        }
    }

    /// The lane has not confirmed `records`. Returns the ejection that follows, to be logged.
    pub fn failed(&self, lane: LaneId, records: u32, now: Duration) -> Option<Ejection> {
        if !self.measures() {
            return None;
        }
        let score = self.of(lane);
        score.failed(records, self.publish_timeout, now);
        let ejection = score.judge(now)?;
        let _ejecting = self.ejecting.lock();
        let may_take = |other: LaneId| self.is_up(other) && !self.is_ejected(other, now);
        let mut others = LaneId::ALL.into_iter().filter(|other| *other != lane);
        // Another thread may have ejected it meanwhile.
        if !others.any(may_take) || self.is_ejected(lane, now) {
            return None;
        }
        score.eject(ejection, now);
        Some(ejection)
    }

    /// The factors of the lane's score at this moment, with the records that it has confirmed and
    /// that are `undelivered`.
    pub fn factors(&self, lane: LaneId, undelivered: u64, now: Duration) -> Factors {
        self.of(lane).factors(undelivered, now)
    }

    /// The lane is connected, and no operator has paused it.
    fn is_up(&self, lane: LaneId) -> bool {
        self.of(lane).is_up()
    }

    /// The lane takes records only if no other can, and probes.
    pub fn is_ejected(&self, lane: LaneId, now: Duration) -> bool {
        self.of(lane).is_ejected(now)
    }

    /// The lane is up and not ejected, and has been up for its back-off since it fell.
    pub fn is_steady(&self, lane: LaneId, now: Duration) -> bool {
        self.of(lane).is_steady(now)
    }

    /// A key to sort lanes by: those that are up longest come first.
    pub(super) fn up_since(&self, lane: LaneId) -> u64 {
        self.of(lane).up_since()
    }

    /// The weight of each lane.
    pub fn weights(&self) -> PerLane<u32> {
        LaneId::ALL.map(|lane| self.of(lane).weight())
    }

    /// The one of `lanes` that is due for a probe, if any is, and no router has sent a probe within
    /// a second. The caller sends it: no other router does within the next second.
    pub(super) fn claim_probe(
        &self,
        lanes: impl Iterator<Item = LaneId>,
        now: Duration,
    ) -> Option<LaneId> {
        let last = self.last_probe.load(Relaxed);
        if now.saturating_sub(Duration::from_micros(last)) < PROBE_EVERY {
            return None;
        }
        let unused = lanes.map(|lane| (self.of(lane).unused_for(now), lane));
        let (unused_for, lane) = unused.max()?;
        if unused_for < PROBE_EVERY {
            return None;
        }
        let micros = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        let claimed = self
            .last_probe
            .compare_exchange(last, micros, Relaxed, Relaxed);
        claimed.is_ok().then_some(lane)
    }

    /// The lane in `GET /api/status`, with the records that it has confirmed and that are
    /// `undelivered`.
    pub fn status(&self, lane: LaneId, undelivered: u64, now: Duration) -> LaneRouting {
        let score = self.of(lane);
        let factors = score.factors(undelivered, now);
        let sent = LaneId::ALL.map(|lane| self.of(lane).sent_lately(now));
        let all: u64 = sent.iter().sum();
        #[expect(
            clippy::cast_precision_loss,
            reason = "ten seconds have fewer than 2^52"
        )]
        let share = sent[lane as usize] as f64 / all.max(1) as f64;
        LaneRouting {
            weight: factors.weight,
            score: factors
                .latency
                .map(|latency| factors.score(latency))
                .filter(|score| score.is_finite() && self.measures()),
            share,
            ejected: score.ejection(now).map(|ejection| EjectionStatus {
                retry_in_s: ejection.until.saturating_sub(now).as_secs_f64(),
                reason: ejection.to_string(),
            }),
            ejections: score.ejections(),
        }
    }

    const fn of(&self, lane: LaneId) -> &LaneScore {
        &self.lanes[lane as usize]
    }
}
