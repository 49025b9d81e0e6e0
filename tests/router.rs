//! The router, driven through its messages: fair turns, records that come back, records whose actor
//! died, admission.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use actix::{Actor, Context, Handler};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use waypost::{
    actors::{
        Job, Publish, RECORDS_MAX, Route,
        admission::Admission,
        fallback::DiskFallback,
        live_lanes::LiveLanes,
        receipts::{Refused, Replies, Reply},
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{ChildId, Supervisor, Thread, factory},
    },
    config::Policy,
    delivery::Receipt,
    lane_id::LaneId,
    ledger::Ledger,
    record::Record,
    routing::{choose::Reason, explain::Explanations, settings::CurrentRouting},
    spool::NotSafe,
};

use crate::support::{
    assigned, closed_spool, eventually, live_lanes, one_route, spool, submit_one,
};

const LANES: [LaneId; 3] = [LaneId::Grpc, LaneId::Nats, LaneId::Rabbitmq];
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest wait for the router. A planted panic prints its stack before the next start, which
/// takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// No lane, and no spool.
const NOT_SAFE: Result<Receipt, Refused> = Err(Refused::NotSafe(NotSafe::Closed));

/// The reaction of a lane to a record.
#[derive(Clone, Copy)]
enum Conduct {
    Confirms,
    GivesBack,
    /// Confirms the first of each batch, and gives back the rest.
    ConfirmsOne,
    /// Keeps it and says nothing.
    Hangs,
    /// Drops it, as a lane that dies does, so many times, then confirms.
    Drops(usize),
}

/// Which lane was given which record.
type Seen = Arc<Mutex<Vec<(LaneId, Arc<str>)>>>;

struct FakeLane {
    lane: LaneId,
    conduct: Conduct,
    router: Slot<Router>,
    seen: Seen,
    kept: Vec<Job>,
}

impl Actor for FakeLane {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(RECORDS_MAX + 1);
    }
}

impl Handler<Publish> for FakeLane {
    type Result = ();

    fn handle(&mut self, Publish(mut job): Publish, _: &mut Self::Context) {
        let ids = job
            .records
            .iter()
            .map(|pending| (self.lane, Arc::clone(&pending.record.id)));
        self.seen.lock().unwrap().extend(ids);
        match &mut self.conduct {
            Conduct::Drops(left) if *left > 0 => *left -= 1,
            Conduct::Confirms | Conduct::Drops(_) => {
                for pending in job.records {
                    pending.reply(Ok(Receipt::Lane(self.lane)));
                }
            }
            Conduct::ConfirmsOne => {
                job.records[0].reply(Ok(Receipt::Lane(self.lane)));
                job.retain_unanswered();
                self.router
                    .get()
                    .unwrap()
                    .try_send(Route(job))
                    .map_err(|_| "refused")
                    .unwrap();
            }
            Conduct::GivesBack => {
                self.router
                    .get()
                    .unwrap()
                    .try_send(Route(job))
                    .map_err(|_| "refused")
                    .unwrap();
            }
            Conduct::Hangs => self.kept.push(job),
        }
    }
}

struct House {
    ingest: Admission,
    router: Slot<Router>,
    live_lanes: LiveLanes,
    routing: CurrentRouting,
    explanations: Explanations,
    seen: Seen,
}

impl House {
    /// A router with the three lanes up.
    async fn new(conduct: [Conduct; 3]) -> Self {
        Self::with_failed_starts(0, conduct).await
    }

    /// The same, with this policy.
    async fn with_policy(policy: Policy, conduct: [Conduct; 3]) -> Self {
        Self::without_lanes(0, policy)
            .await
            .with_lanes(conduct)
            .await
    }

    /// The same; the router's first starts fail.
    async fn with_failed_starts(failures: usize, conduct: [Conduct; 3]) -> Self {
        let house = Self::without_lanes(failures, Policy::RoundRobin).await;
        house.with_lanes(conduct).await
    }

    async fn with_lanes(self, conduct: [Conduct; 3]) -> Self {
        for (lane, conduct) in LANES.into_iter().zip(conduct) {
            self.lane(lane, conduct);
        }
        assert!(self.router.is_alive_within(PATIENCE).await);
        self
    }

    async fn without_lanes(failures: usize, policy: Policy) -> Self {
        let router = Slot::default();
        let ledger = Arc::new(Ledger::new(Arc::from("run")));
        let fallback = DiskFallback {
            spool: closed_spool().await,
            ledger: Arc::clone(&ledger),
        };
        let live_lanes = live_lanes(policy);
        let explanations = Explanations::default();
        let routing = one_route(policy, &LANES);
        let params = RouterParams {
            routing: routing.clone(),
            live_lanes: live_lanes.clone(),
            fallback,
            explanations: explanations.clone(),
            publish_timeout: PUBLISH_TIMEOUT,
        };
        let starts = AtomicUsize::new(0);
        let start = factory(router.clone(), move |supervisor| {
            assert!(starts.fetch_add(1, Relaxed) >= failures, "planted");
            Router::new(params.clone(), supervisor)
        });
        let children = vec![(ChildId::Router, Thread::Current, start)];
        Supervisor::start(&live_lanes, children);
        let ingest = Admission::new(router.clone(), PUBLISH_TIMEOUT, ledger);
        Self {
            ingest,
            router,
            live_lanes,
            routing,
            explanations,
            seen: Arc::default(),
        }
    }

    fn lane(&self, lane: LaneId, conduct: Conduct) {
        let fake = FakeLane {
            lane,
            conduct,
            router: self.router.clone(),
            seen: Arc::clone(&self.seen),
            kept: Vec::new(),
        };
        let publisher = fake.start().recipient();
        self.live_lanes.insert(lane, publisher, None);
    }

    async fn submit_record(&self, record: Record, pinned: Option<LaneId>) -> Reply {
        submit_one(&self.ingest, assigned(record, &self.routing, pinned)).await
    }

    /// Submits a request of these records.
    async fn submit_all(&self, records: impl IntoIterator<Item = Record>) -> Vec<Reply> {
        let records = records.into_iter();
        let records = records.map(|record| assigned(record, &self.routing, None));
        self.ingest.submit(&records.collect::<Vec<_>>()).await
    }

    async fn submit(&self, pinned: Option<LaneId>) -> Result<Receipt, Refused> {
        self.submit_record(record(), pinned).await
    }

    fn seen_by(&self, lane: LaneId) -> usize {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|(seen, _)| *seen == lane)
            .count()
    }
}

fn lane_of(receipt: Receipt) -> LaneId {
    match receipt {
        Receipt::Lane(lane) => lane,
        Receipt::Spool => panic!("there is no spool"),
    }
}

fn record() -> Record {
    Record {
        id: Record::new_id(),
        body: Bytes::from_static(b"{}"),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

#[actix_rt::test]
async fn round_robin_gives_each_lane_that_is_up_the_same_share() {
    let house = House::new([Conduct::Confirms; 3]).await;
    let mut shares = BTreeMap::<_, usize>::new();
    for receipt in join_all((0..300).map(|_| house.submit(None))).await {
        *shares.entry(lane_of(receipt.unwrap())).or_default() += 1;
    }
    assert_eq!(shares, LANES.into_iter().map(|lane| (lane, 100)).collect());

    house.live_lanes.remove(LaneId::Nats, false);
    let mut shares = BTreeMap::<_, usize>::new();
    for receipt in join_all((0..300).map(|_| house.submit(None))).await {
        *shares.entry(lane_of(receipt.unwrap())).or_default() += 1;
    }
    assert_eq!(
        shares,
        [(LaneId::Grpc, 150), (LaneId::Rabbitmq, 150)].into()
    );
}

#[actix_rt::test]
async fn a_router_that_was_restarted_knows_the_lanes_at_once() {
    let house = House::with_failed_starts(1, [Conduct::Confirms; 3]).await;
    for _ in 0..LANES.len() {
        lane_of(house.submit(None).await.unwrap());
    }
    assert_eq!(LANES.map(|lane| house.seen_by(lane)), [1; 3]);
}

#[actix_rt::test]
async fn a_record_that_comes_back_takes_the_next_lane_and_each_lane_once() {
    let house = House::new([Conduct::GivesBack, Conduct::GivesBack, Conduct::Confirms]).await;
    for _ in 0..30 {
        assert_eq!(
            house.submit(None).await,
            Ok(Receipt::Lane(LaneId::Rabbitmq))
        );
    }
    house.lane(LaneId::Rabbitmq, Conduct::GivesBack);
    let before = house.seen.lock().unwrap().len();
    assert_eq!(house.submit(None).await, NOT_SAFE);
    assert_eq!(house.seen.lock().unwrap().len() - before, LANES.len());
}

#[actix_rt::test]
async fn a_batch_stays_together_but_for_what_comes_back() {
    let house = House::new([
        Conduct::ConfirmsOne,
        Conduct::ConfirmsOne,
        Conduct::Confirms,
    ])
    .await;
    let receipts = house.submit_all([(); 4].map(|()| record())).await;
    let lanes: Vec<_> = receipts
        .into_iter()
        .map(|receipt| lane_of(receipt.unwrap()))
        .collect();
    assert_eq!(
        lanes,
        [
            LaneId::Grpc,
            LaneId::Nats,
            LaneId::Rabbitmq,
            LaneId::Rabbitmq
        ]
    );
    assert_eq!(LANES.map(|lane| house.seen_by(lane)), [4, 3, 2]);
}

#[actix_rt::test]
async fn only_those_of_a_batch_whose_lane_died_are_sent_again() {
    let house = House::new([Conduct::ConfirmsOne, Conduct::Drops(1), Conduct::Confirms]).await;
    let receipts = house.submit_all([(); 3].map(|()| record())).await;
    let lanes: Vec<_> = receipts
        .into_iter()
        .map(|receipt| lane_of(receipt.unwrap()))
        .collect();
    assert_eq!(lanes, [LaneId::Grpc, LaneId::Rabbitmq, LaneId::Rabbitmq]);
    assert_eq!(LANES.map(|lane| house.seen_by(lane)), [3, 2, 2]);
}

#[actix_rt::test]
async fn a_record_keeps_its_id_when_the_lane_that_held_it_dies_and_is_sent_again() {
    let house = House::new([Conduct::Drops(1), Conduct::Drops(1), Conduct::Drops(1)]).await;
    let receipt = house.submit(None).await;
    assert!(receipt.is_ok(), "{receipt:?}");
    let seen = house.seen.lock().unwrap();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|(_, id)| *id == seen[0].1));
}

#[actix_rt::test]
async fn a_pinned_record_takes_its_lane_or_none() {
    let house = House::new([Conduct::Confirms; 3]).await;
    for _ in 0..10 {
        assert_eq!(
            house.submit(Some(LaneId::Nats)).await,
            Ok(Receipt::Lane(LaneId::Nats))
        );
    }
    house.live_lanes.remove(LaneId::Nats, false);
    assert_eq!(house.submit(Some(LaneId::Nats)).await, NOT_SAFE);
    house.lane(LaneId::Nats, Conduct::GivesBack);
    assert_eq!(house.submit(Some(LaneId::Nats)).await, NOT_SAFE);
    assert_eq!(
        (house.seen_by(LaneId::Grpc), house.seen_by(LaneId::Rabbitmq)),
        (0, 0)
    );
}

/// The lane and the runner-up of each try.
fn tries_of(house: &House, id: &str) -> Vec<(Option<LaneId>, Option<LaneId>)> {
    let choices = house.explanations.of(id);
    let lanes = choices.iter().map(|explanation| {
        let choice = explanation.choice.as_ref();
        (
            choice.map(|choice| choice.lane),
            choice.and_then(|choice| choice.runner_up),
        )
    });
    lanes.collect()
}

#[actix_rt::test]
async fn each_try_of_a_record_is_explained_and_the_spool_too() {
    let house = House::new([Conduct::GivesBack, Conduct::Confirms, Conduct::Confirms]).await;
    let [grpc, nats, rabbitmq] = LANES.map(Some);
    let one = || Record {
        id: "id".into(),
        ..record()
    };
    let receipt = house.submit_record(one(), None).await;
    assert_eq!(receipt, Ok(Receipt::Lane(LaneId::Nats)));
    assert_eq!(
        tries_of(&house, "id"),
        [(grpc, nats), (nats, rabbitmq)],
        "a lane that has had it is no runner-up"
    );

    let house = House::new([Conduct::GivesBack; 3]).await;
    let receipt = house.submit_record(one(), Some(LaneId::Nats)).await;
    assert_eq!(receipt, NOT_SAFE);
    assert_eq!(tries_of(&house, "id"), [(nats, None), (None, None)]);
    let first = &house.explanations.of("id")[0];
    let reason = first.choice.as_ref().map(|choice| choice.reason);
    assert_eq!(reason, Some(Reason::Pinned));
    assert_eq!(tries_of(&house, "other"), []);
}

#[actix_rt::test]
async fn broadcast_is_safe_once_each_lane_has_its_copy() {
    let one = || Record {
        id: "id".into(),
        ..record()
    };
    let house = House::with_policy(Policy::Broadcast, [Conduct::Confirms; 3]).await;
    let receipt = house.submit_record(one(), None).await;
    assert_eq!(
        receipt,
        Ok(Receipt::Lane(LANES[0])),
        "that of the first lane"
    );
    let mut seen = house.seen.lock().unwrap().clone();
    seen.sort();
    let copies = LANES.map(|lane| (lane, format!("id/{lane}").into()));
    assert_eq!(seen, copies);

    for fails in 0..3 {
        let mut conduct = [Conduct::Confirms; 3];
        conduct[fails] = Conduct::GivesBack;
        let house = House::with_policy(Policy::Broadcast, conduct).await;
        assert_eq!(house.submit_record(one(), None).await, NOT_SAFE, "{fails}");
        assert_eq!(
            LANES.map(|lane| house.seen_by(lane)),
            [1; 3],
            "no other lane has it"
        );
        let receipt = house.submit_record(one(), Some(LANES[fails])).await;
        assert_eq!(receipt, NOT_SAFE, "no copies are made");
        assert_eq!(house.seen.lock().unwrap().len(), 4);
    }
}

#[actix_rt::test]
async fn each_record_of_a_batch_is_explained_by_its_own_key() {
    let house = House::with_policy(Policy::Hash, [Conduct::Confirms; 3]).await;
    let ids: Vec<_> = (0..100).map(|number| format!("id-{number}")).collect();
    let lanes = lanes_of(&house, &ids).await;
    let batched: Vec<_> = ids.iter().map(|id| tries_of(&house, id)).collect();
    let alone = House::with_policy(Policy::Hash, [Conduct::Confirms; 3]).await;
    for ((id, lane), tries) in ids.iter().zip(lanes).zip(batched) {
        lanes_of(&alone, std::slice::from_ref(id)).await;
        assert_eq!(tries, tries_of(&alone, id), "{id}");
        assert_eq!(tries[0].0, Some(lane), "{id}");
    }
}

#[actix_rt::test]
async fn what_is_over_the_admitted_is_refused_at_once_and_admitted_again_later() {
    tokio::time::pause();
    let house = House::new([Conduct::Hangs; 3]).await;
    let waiting = join_all((0..RECORDS_MAX).map(|_| house.submit(None)));
    let over = async {
        while house.seen.lock().unwrap().len() < RECORDS_MAX {
            tokio::task::yield_now().await;
        }
        let asked = Instant::now();
        assert_eq!(house.submit(None).await, Err(Refused::Overloaded));
        assert_eq!(asked.elapsed(), Duration::ZERO);
    };
    let (answers, ()) = tokio::join!(waiting, over);
    assert!(
        answers.iter().all(|answer| *answer == Err(Refused::NoLane)),
        "a lane that hangs confirms nothing"
    );
    for lane in LANES {
        house.lane(lane, Conduct::Confirms);
    }
    // The jobs that hang hold their permits until the lanes that have them die.
    sleep(Duration::from_millis(1)).await;
    assert!(house.submit(None).await.is_ok());
}

#[actix_rt::test]
async fn a_record_whose_client_has_gone_does_not_stay_on_disk() {
    let (spool, _folder) = spool();
    let disk = DiskFallback {
        spool: spool.clone(),
        ledger: Arc::new(Ledger::new(Arc::from("run"))),
    };
    let records = [assigned(
        record(),
        &one_route(Policy::RoundRobin, &LANES),
        None,
    )];
    let replies = Replies::new(&records, None);
    let (assignment, pending) = replies.unanswered().remove(0);
    drop(replies);
    disk.store(&pending, &assignment.route, None).await;
    let came_and_went = || (spool.stats().committed, spool.stats().waiting()) == (1, 0);
    eventually(
        "it was there and is gone",
        Duration::from_secs(20),
        async || came_and_went().then_some(()),
    )
    .await;
}

/// The records that each lane is given of `count` that come one after the other.
async fn shares(house: &House, count: usize) -> [usize; 3] {
    let before = LANES.map(|lane| house.seen_by(lane));
    for _ in 0..count {
        house.submit(None).await.unwrap();
    }
    let mut before = before.into_iter();
    LANES.map(|lane| house.seen_by(lane) - before.next().unwrap())
}

#[actix_rt::test]
async fn weighted_gives_each_lane_that_is_up_its_share_also_after_its_weight_has_changed() {
    let house = House::with_policy(Policy::Weighted, [Conduct::Confirms; 3]).await;
    let scores = &house.live_lanes.scores;
    scores.set_weight(LaneId::Nats, 2);
    scores.set_weight(LaneId::Rabbitmq, 3);
    assert_eq!(shares(&house, 60).await, [10, 20, 30]);
    house.live_lanes.remove(LaneId::Rabbitmq, false);
    assert_eq!(shares(&house, 60).await, [20, 40, 0]);
    scores.set_weight(LaneId::Nats, 0);
    assert_eq!(shares(&house, 60).await, [60, 0, 0]);
    house.live_lanes.remove(LaneId::Grpc, false);
    assert_eq!(shares(&house, 9).await, [0, 9, 0], "better than none");
}

/// The lanes of the records `id`, which go together.
#[actix_rt::test]
async fn new_routing_settings_make_the_next_choice() {
    let house = House::new([Conduct::Confirms; 3]).await;
    assert_eq!(shares(&house, 30).await, [10; 3]);
    let failover = one_route(Policy::Failover, &[LANES[2], LANES[0]]).get();
    house.live_lanes.scores.set_measures(failover.measure());
    house.routing.replace((*failover).clone());
    assert_eq!(shares(&house, 30).await, [0, 0, 30]);
    house.live_lanes.remove(LANES[2], false);
    assert_eq!(shares(&house, 30).await, [30, 0, 0]);
}

async fn lanes_of(house: &House, ids: &[String]) -> Vec<LaneId> {
    let records = ids.iter().map(|id| Record {
        id: id.as_str().into(),
        ..record()
    });
    let receipts = house.submit_all(records).await.into_iter();
    receipts.map(|receipt| lane_of(receipt.unwrap())).collect()
}

#[actix_rt::test]
async fn hash_takes_one_lane_for_an_id_alone_or_in_a_batch_and_after_a_restart() {
    let ids: Vec<_> = (0..300).map(|number| format!("id-{number}")).collect();
    let house = House::with_policy(Policy::Hash, [Conduct::Confirms; 3]).await;
    let before = lanes_of(&house, &ids).await;
    assert!(LANES.iter().all(|lane| before.contains(lane)));
    for (id, lane) in ids.iter().zip(&before) {
        assert_eq!(
            lanes_of(&house, std::slice::from_ref(id)).await,
            [*lane],
            "{id}"
        );
    }

    house.live_lanes.remove(LaneId::Nats, false);
    let without = lanes_of(&house, &ids).await;
    house.lane(LaneId::Nats, Conduct::GivesBack);
    assert_eq!(
        lanes_of(&house, &ids).await,
        without,
        "what comes back takes its second lane"
    );
    for (before, after) in before.iter().zip(&without) {
        assert!(before == after || *before == LaneId::Nats);
    }
    house.lane(LaneId::Nats, Conduct::Confirms);
    assert_eq!(lanes_of(&house, &ids).await, before);

    let other = House::with_policy(Policy::Hash, [Conduct::Confirms; 3]).await;
    assert_eq!(lanes_of(&other, &ids).await, before);
}

#[actix_rt::test]
async fn failover_changes_lanes_at_most_once_per_back_off_while_a_lane_flaps_every_200_ms() {
    tokio::time::pause();
    let house = House::with_policy(Policy::Failover, [Conduct::Confirms; 3]).await;
    let first = LANES[0];
    assert_eq!(lane_of(house.submit(None).await.unwrap()), first);
    let mut taken = vec![first];
    for step in 0..600 {
        match step % 4 {
            0 => house.live_lanes.remove(first, false),
            2 => house.lane(first, Conduct::Confirms),
            _ => {}
        }
        sleep(Duration::from_millis(100)).await;
        taken.push(lane_of(house.submit(None).await.unwrap()));
    }
    taken.dedup();
    assert_eq!(taken, [first, LANES[1]], "for a minute");
    house.lane(first, Conduct::Confirms);
    sleep(Duration::from_secs(61)).await;
    assert_eq!(
        lane_of(house.submit(None).await.unwrap()),
        first,
        "it is steady"
    );
}

#[actix_rt::test]
async fn failover_counts_a_pause_as_no_setback() {
    tokio::time::pause();
    let house = House::with_policy(Policy::Failover, [Conduct::Confirms; 3]).await;
    for _ in 0..5 {
        house.live_lanes.remove(LANES[0], true);
        assert_eq!(lane_of(house.submit(None).await.unwrap()), LANES[1]);
        house.lane(LANES[0], Conduct::Confirms);
        assert_eq!(lane_of(house.submit(None).await.unwrap()), LANES[0]);
    }
}

#[actix_rt::test]
async fn adaptive_gives_no_more_to_a_lane_that_keeps_what_it_has() {
    let house = House::with_policy(
        Policy::Adaptive,
        [Conduct::Hangs, Conduct::Confirms, Conduct::Confirms],
    )
    .await;
    let submit = || timeout(Duration::from_millis(200), house.submit(None));
    let mut unanswered = 0;
    for _ in 0..100 {
        unanswered += usize::from(submit().await.is_err());
    }
    assert!(unanswered <= 1, "{unanswered}");
    assert_eq!(house.seen_by(LANES[0]), unanswered);
    assert!(
        house.seen_by(LANES[1]) > 20 && house.seen_by(LANES[2]) > 20,
        "ties"
    );
}

#[actix_rt::test]
async fn adaptive_takes_the_fastest_lane_and_one_that_is_ejected_only_if_no_other_is_up() {
    let house = House::with_policy(Policy::Adaptive, [Conduct::Confirms; 3]).await;
    let scores = &house.live_lanes.scores;
    for (lane, ms) in LANES.into_iter().zip([2, 20, 200]) {
        scores.delivered(lane, Duration::from_millis(ms), scores.at(Instant::now()));
    }
    assert_eq!(shares(&house, 50).await, [50, 0, 0]);
    let ejection = scores.failed(LANES[0], 5, scores.at(Instant::now()));
    assert!(ejection.is_some());
    assert_eq!(shares(&house, 50).await, [0, 50, 0]);
    for lane in &LANES[1..] {
        house.live_lanes.remove(*lane, false);
    }
    assert_eq!(shares(&house, 50).await, [50, 0, 0], "nothing is refused");
}
