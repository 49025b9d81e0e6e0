//! A lane with its forwarder, driven through their messages: over the message system in memory,
//! with a real API.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use actix::Addr;
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use waypost::{
    actors::{
        Source,
        admission::Admission,
        apis::SharedApi,
        copies::Copies,
        fallback::DiskFallback,
        forwarder::{Forwarder, ForwarderParams, LaneWindow, PostSlots, PosterParams},
        held::HeldRecords,
        lane::{Lane, LaneParams, bundle::SettledRecords},
        live_lanes::LiveLanes,
        receipts::{Refused, Reply},
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{
            Action, ChildId, CommandOutcome, DrainAll, Factory, LaneCommand, Snapshot, State,
            Supervisor, Thread, View, factory,
        },
    },
    api::{Limits, answer::FailureClass, gate::Gate},
    config::{self, Ack, Policy},
    delivery::Receipt,
    lane_id::LaneId,
    ledger::{ApiCounts, Ledger},
    record::{Origin, Record, Tag},
    routing::{
        explain::Explanations,
        scores::{Factors, Scores},
        settings::CurrentRouting,
    },
    spool::{NotSafe, Queue, Spool, Undelivered},
    tap::Tap,
    trace::LaneTracer,
    transport::{BrokerInfo, Transport, nats},
};

use crate::support::{
    self,
    api::{Api, Conduct},
    assigned, closed_spool, eventually, live_lanes,
    memory::{Broker, Faults, Memory},
    nats::Nats,
    one_route,
    rig::Rig as _,
    spool,
};

const PATIENCE: Duration = Duration::from_secs(20);
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);
/// The lane that the memory stands for.
const LANE: ChildId = ChildId::Lane(LaneId::Nats);

/// A node's graph with the one lane, all on the test's thread.
struct House {
    broker: Broker,
    ledger: Arc<Ledger>,
    ingest: Admission,
    supervisor: Addr<Supervisor>,
    copies: Copies,
    scores: Arc<Scores>,
    counts: Arc<ApiCounts>,
}

impl House {
    /// `posts` may be in flight; with none, the lane never pulls.
    async fn new(api: &str, posts: usize) -> Self {
        Self::with_spool(api, posts, closed_spool().await)
    }

    /// A POST has an array of up to `batch` records.
    async fn in_batches(api: &str, posts: usize, batch: usize) -> Self {
        Self::with(api, Limits { posts, batch }, closed_spool().await)
    }

    fn with_spool(api: &str, posts: usize, spool: Spool) -> Self {
        Self::with(api, Limits { posts, batch: 1 }, spool)
    }

    fn with(api: &str, limits: Limits, spool: Spool) -> Self {
        Self::that_gives_up(api, limits, spool, None)
    }

    /// Each record needs a copy in `spool` before its reply.
    fn with_copies(api: &str, spool: Spool) -> Self {
        let limits = Limits { posts: 1, batch: 1 };
        Self::build(api, limits, spool, None, Ack::Disk)
    }

    fn that_gives_up(
        api: &str,
        limits: Limits,
        spool: Spool,
        give_up_after: Option<Duration>,
    ) -> Self {
        Self::build(api, limits, spool, give_up_after, Ack::Lane)
    }

    fn build(
        api: &str,
        limits: Limits,
        spool: Spool,
        give_up_after: Option<Duration>,
        ack: Ack,
    ) -> Self {
        let broker = Broker::default();
        let (ledger, ingest, supervisor, copies, scores, counts) =
            graph::<Memory>(&broker, api, limits, spool, give_up_after, 1, ack);
        Self {
            broker,
            ledger,
            ingest,
            supervisor,
            copies,
            scores,
            counts,
        }
    }

    async fn view(&self) -> View {
        let views = self.supervisor.send(Snapshot).await.unwrap();
        views.into_iter().find(|view| view.child == LANE).unwrap()
    }

    async fn up(&self) {
        eventually("the lane is up", PATIENCE, async || {
            (self.view().await.state == State::Up).then_some(())
        })
        .await;
    }

    async fn submit(&self, count: usize) {
        let receipts = join_all((0..count).map(|_| submit_one(&self.ingest, record()))).await;
        assert!(
            receipts
                .iter()
                .all(|receipt| *receipt == Ok(Receipt::Lane(LaneId::Nats))),
            "{receipts:?}"
        );
    }
}

/// The actors of a node whose only lane is `T`'s.
fn graph<T: Transport>(
    settings: &T::Settings,
    api: &str,
    limits: Limits,
    spool: Spool,
    give_up_after: Option<Duration>,
    bundle: usize,
    ack: Ack,
) -> (
    Arc<Ledger>,
    Admission,
    Addr<Supervisor>,
    Copies,
    Arc<Scores>,
    Arc<ApiCounts>,
) {
    let ledger = Arc::new(Ledger::new(Arc::from("run")));
    let router = Slot::default();
    let forwarder = Slot::default();
    let live_lanes = live_lanes(Policy::Adaptive);
    let copies = Copies::new(LaneId::Nats, spool.clone());
    let window = LaneWindow::new(&[limits]);
    let lane = LaneParams {
        lane: LaneId::Nats,
        router: router.clone(),
        forwarder: forwarder.clone(),
        window: window.clone(),
        ledger: Arc::clone(&ledger),
        live_lanes: live_lanes.clone(),
        publish_timeout: PUBLISH_TIMEOUT,
        bundle,
        settled: SettledRecords::default(),
        copies: copies.clone(),
        ack,
        tracer: LaneTracer::default(),
    };
    let fallback = DiskFallback {
        spool: spool.clone(),
        ledger: Arc::clone(&ledger),
    };
    let api = config::ApiConfig {
        url: api.into(),
        concurrency: limits.posts.max(1),
        give_up_after,
        ..config::ApiConfig::default()
    };
    let unclaimed = HeldRecords::new(spool.clone(), "unclaimed".into(), Arc::from("run"));
    let api = SharedApi::new(None, &api, spool, None, &Arc::from("run")).unwrap();
    let api = SharedApi { limits, ..api };
    let poster = |slots: &PostSlots| PosterParams {
        lane: LaneId::Nats,
        tag: Tag::new("NATS"),
        gate: Arc::new(Gate::new(Arc::clone(&api.limit), Arc::clone(&api.rate))),
        api: api.clone(),
        ledger: Arc::clone(&ledger),
        scores: Arc::clone(&live_lanes.scores),
        copies: copies.clone(),
        tap: Tap::default(),
        slots: slots.clone(),
        tracer: LaneTracer::default(),
    };
    let forwarding = ForwarderParams {
        posters: window.slots().map(poster).collect(),
        unclaimed,
        held_lanes: vec![LaneId::Nats],
        stopping: CancellationToken::new(),
    };
    let start_router = start_router(router.clone(), &live_lanes, fallback);
    let forwarder_id = ChildId::Forwarder(LaneId::Nats);
    let start_forwarder = factory(forwarder, move |supervisor| {
        Forwarder::new(forwarding.clone(), supervisor)
    });
    let children = vec![
        (ChildId::Router, Thread::Current, start_router),
        (forwarder_id, Thread::Current, start_forwarder),
        (LANE, Thread::Current, start_lane::<T>(settings, lane)),
    ];
    let ingest = Admission::new(router, PUBLISH_TIMEOUT, Arc::clone(&ledger));
    let supervisor = Supervisor::start(&live_lanes, children);
    let scores = live_lanes.scores;
    (ledger, ingest, supervisor, copies, scores, api.counts)
}

fn start_router(slot: Slot<Router>, live_lanes: &LiveLanes, fallback: DiskFallback) -> Factory {
    let params = RouterParams {
        routing: routing(),
        live_lanes: live_lanes.clone(),
        fallback,
        explanations: Explanations::default(),
        publish_timeout: PUBLISH_TIMEOUT,
    };
    factory(slot, move |supervisor| {
        Router::new(params.clone(), supervisor)
    })
}

fn start_lane<T: Transport>(settings: &T::Settings, params: LaneParams) -> Factory {
    let settings = settings.clone();
    factory(Slot::default(), move |supervisor| {
        Lane::<T>::new(settings.clone(), params.clone(), supervisor)
    })
}

fn routing() -> CurrentRouting {
    one_route(Policy::RoundRobin, &[LaneId::Nats])
}

async fn submit_one(ingest: &Admission, record: Record) -> Reply {
    support::submit_one(ingest, assigned(record, &routing(), None)).await
}

fn record() -> Record {
    let origin = Some(Origin::now(Arc::from("run")));
    Record {
        id: Record::new_id(),
        body: Bytes::from_static(b"{\"a\":1}"),
        trace: None,
        origin,
        api: None,
        event: None,
    }
}

/// No server is there.
const NO_API: &str = "http://127.0.0.1:9/";

#[actix_rt::test]
async fn a_lane_that_is_lost_in_the_middle_of_a_publish_gives_the_record_back_and_comes_again() {
    let house = House::new(NO_API, 0).await;
    house.up().await;
    house.broker.set_faults(Faults {
        swallow_confirms: true,
        ..Faults::default()
    });
    let lose = async {
        eventually("the record is under way", PATIENCE, async || {
            (house.broker.stored() == 1).then_some(())
        })
        .await;
        house.broker.set_faults(Faults::default());
        house.broker.drop_connection();
    };
    let (answer, ()) = tokio::join!(submit_one(&house.ingest, record()), lose);
    assert_eq!(
        answer,
        Err(Refused::NotSafe(NotSafe::Closed)),
        "what is unknown is not safe"
    );
    assert_eq!(house.ledger.totals().accepted, 0);
    house.up().await;
    house.submit(1).await;
    let view = house.view().await;
    assert_eq!(
        (view.restarts, view.last_error.as_deref()),
        (1, Some("memory: connection lost: dropped"))
    );
}

/// A lane that was away may redeliver a record that it never confirmed, after any number of others.
#[actix_rt::test]
async fn a_record_that_a_lane_may_have_is_known_however_many_came_after_it() {
    let house = House::new(NO_API, 0).await;
    house.up().await;
    house.broker.set_faults(Faults {
        swallow_confirms: true,
        ..Faults::default()
    });
    let lose = async {
        eventually("the record is under way", PATIENCE, async || {
            (house.broker.stored() == 1).then_some(())
        })
        .await;
        house.broker.drop_connection();
    };
    let maybe_published = record();
    let (answer, ()) = tokio::join!(submit_one(&house.ingest, maybe_published.clone()), lose);
    assert!(answer.is_err(), "{answer:?}");
    house.ledger.delivered(LaneId::Grpc, [&maybe_published]);
    let first = record();
    house.ledger.delivered(LaneId::Grpc, [&first]);
    for _ in 0..300_000 {
        house.ledger.delivered(LaneId::Grpc, [&record()]);
    }
    assert!(
        !house.ledger.is_delivered(&first),
        "so many that others are forgotten"
    );
    assert!(house.ledger.is_delivered(&maybe_published));
}

/// A record with an unknown outcome may be delivered all the same. The ledger counts it as
/// recovered.
#[actix_rt::test]
async fn a_record_that_is_delivered_though_its_client_was_refused_balances() {
    let api = Api::start();
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.broker.set_faults(Faults {
        swallow_confirms: true,
        ..Faults::default()
    });
    let lose = async {
        api.wait_for(1, PATIENCE).await;
        house.broker.set_faults(Faults::default());
        house.broker.drop_connection();
    };
    let (answer, ()) = tokio::join!(submit_one(&house.ingest, record()), lose);
    assert_eq!(answer, Err(Refused::NotSafe(NotSafe::Closed)));
    house.up().await;
    house.submit(1).await;
    eventually("both are delivered", PATIENCE, async || {
        (house.ledger.totals().delivered == 2).then_some(())
    })
    .await;
    let counts = house.ledger.totals();
    assert_eq!(
        (counts.accepted, counts.recovered, counts.in_flight()),
        (1, 1, 0)
    );
}

#[actix_rt::test]
async fn a_lane_whose_confirms_do_not_come_is_restarted_after_the_publish_timeout() {
    let house = House::new(NO_API, 0).await;
    tokio::time::pause();
    tokio::time::sleep(Duration::from_millis(10)).await;
    house.broker.set_faults(Faults {
        swallow_confirms: true,
        ..Faults::default()
    });
    let asked = Instant::now();
    assert_eq!(
        submit_one(&house.ingest, record()).await,
        Err(Refused::NotSafe(NotSafe::Closed))
    );
    assert!(
        (PUBLISH_TIMEOUT..PUBLISH_TIMEOUT * 2).contains(&asked.elapsed()),
        "{:?}",
        asked.elapsed()
    );
    house.broker.set_faults(Faults::default());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        house.view().await.last_error.as_deref(),
        Some("memory: connection lost: no confirm within 2s")
    );
    house.submit(1).await;
}

/// The factors of the lane's score.
fn factors(house: &House) -> Factors {
    let Factors { in_flight, .. } = house.scores.factors(LaneId::Nats, 0, Duration::ZERO);
    assert_eq!(in_flight, 0, "nothing is being published");
    let now = house.scores.at(Instant::now());
    house.scores.factors(LaneId::Nats, 0, now)
}

fn successes(of: u32, all: u32) -> f64 {
    f64::from(of + 1) / f64::from(all + 1)
}

#[actix_rt::test]
async fn what_the_lane_does_is_in_its_score_and_a_retry_of_a_post_is_not() {
    let api = Api::start();
    let house = House::new(&api.url(), 1).await;
    house.up().await;
    assert_eq!(factors(&house).latency, None);
    api.behave(|number, _| Conduct::Answer(if number < 2 { 500 } else { 200 }));
    house.submit(1).await;
    eventually("a delivery", PATIENCE, async || {
        let delivered = house.ledger.lane(LaneId::Nats).counts.delivered;
        (delivered == 1).then_some(())
    })
    .await;
    let ratio = factors(&house).success_ratio;
    assert_eq!(
        (factors(&house).latency, ratio),
        (None, 1.0),
        "it was retried"
    );

    api.behave(|_, _| Conduct::Answer(200));
    house.submit(2).await;
    eventually("a time", PATIENCE, async || factors(&house).latency).await;

    house.broker.set_faults(Faults {
        fail_publishes: true,
        ..Faults::default()
    });
    assert!(submit_one(&house.ingest, record()).await.is_err());
    let factors = factors(&house);
    assert!(
        (factors.success_ratio - successes(3, 4)).abs() < 1e-9,
        "{factors:?}"
    );
    let penalty = Some(PUBLISH_TIMEOUT.as_secs_f64());
    assert_eq!(
        factors.latency, penalty,
        "a failure is as slow as the time-out"
    );
}

#[actix_rt::test]
async fn a_time_that_contains_an_outage_of_the_api_is_not_in_the_score() {
    let mut api = Api::start();
    let house = House::new(&api.url(), 1).await;
    house.up().await;
    api.stop().await;
    // The first one is POSTed again and again, and the second waits in the broker.
    house.submit(2).await;
    let failures = || {
        let classes = FailureClass::ALL.into_iter();
        classes
            .map(|class| house.counts.failures(class))
            .sum::<u64>()
    };
    eventually("the API counts as down", PATIENCE, async || {
        (failures() > 5).then_some(())
    })
    .await;
    api.start_again();
    eventually("both are delivered", PATIENCE, async || {
        let delivered = house.ledger.lane(LaneId::Nats).counts.delivered;
        (delivered == 2).then_some(())
    })
    .await;
    assert_eq!(factors(&house).latency, None);
    house.submit(1).await;
    eventually("a time", PATIENCE, async || factors(&house).latency).await;
}

#[actix_rt::test]
async fn what_this_nodes_disk_refuses_is_no_failure_of_the_lane() {
    let api = Api::start();
    let house = House::with_copies(&api.url(), closed_spool().await);
    house.up().await;
    for _ in 0..9 {
        // The lane has confirmed it, and there is no disk for its copy.
        assert!(submit_one(&house.ingest, record()).await.is_err());
    }
    let factors = factors(&house);
    assert!((factors.success_ratio - 1.0).abs() < 1e-9, "{factors:?}");
}

#[actix_rt::test]
async fn a_lane_keeps_trying_to_connect_and_says_why_it_cannot() {
    let house = House::new(NO_API, 0).await;
    tokio::time::pause();
    house.broker.set_faults(Faults {
        refuse_connects: true,
        ..Faults::default()
    });
    house.broker.drop_connection();
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert!(
        house.broker.connects() > 100,
        "{} connects in two minutes",
        house.broker.connects()
    );
    assert_eq!(
        house.view().await.last_error.as_deref(),
        Some("cannot connect: memory: refused")
    );
    house.broker.set_faults(Faults::default());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(house.view().await.state, State::Up);
}

#[actix_rt::test]
async fn a_drain_ends_the_posts_under_way_settles_them_and_leaves_the_rest_in_the_broker() {
    const RECORDS: usize = 20;
    let api = Api::start();
    api.delay(Duration::from_millis(300));
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.submit(RECORDS).await;
    api.wait_for(4, PATIENCE).await;
    house.supervisor.send(DrainAll).await.unwrap();
    let posted = api.count();
    let counts = house.ledger.totals();
    assert_eq!(
        counts.delivered, posted as u64,
        "each POST under way has ended"
    );
    assert!(posted < RECORDS, "the drain did not wait for the backlog");
    assert_eq!(
        house.broker.stored(),
        RECORDS - posted,
        "what was delivered is settled, the rest is in the broker"
    );
    assert_eq!(house.view().await.state, State::Paused);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(api.count(), posted, "nothing is posted after the drain");
}

#[actix_rt::test]
async fn a_drain_gives_back_what_waits_for_another_try() {
    let api = Api::start();
    api.behave(|_, _| Conduct::AnswerWith {
        status: 503,
        headers: vec![("Retry-After", "60".into())],
        body: vec![],
    });
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.submit(10).await;
    api.wait_for(4, PATIENCE).await;
    house.supervisor.send(DrainAll).await.unwrap();
    assert_eq!(house.broker.stored(), 10);
    assert_eq!(
        house.view().await.last_error,
        None,
        "the lane ended by itself, not by force"
    );
    assert_eq!(
        (house.ledger.totals().delivered, api.count()),
        (0, 4),
        "Retry-After was kept"
    );
}

#[actix_rt::test]
async fn an_api_that_fails_is_tried_again_until_it_takes_the_record() {
    let api = Api::start();
    api.behave(|number, _| Conduct::Answer(if number < 5 { 500 } else { 200 }));
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.submit(1).await;
    eventually("it is delivered", PATIENCE, async || {
        (house.ledger.totals().delivered == 1).then_some(())
    })
    .await;
    let posts = api.posts();
    assert_eq!(posts.len(), 6);
    assert!(
        posts
            .iter()
            .all(|post| post.key == posts[0].key && post.body == "{\"a\":1,\"path\":\"NATS\"}")
    );
    assert_eq!(house.broker.stored(), 0);
}

#[actix_rt::test]
async fn a_record_that_the_api_refuses_is_not_acked_and_holds_up_no_other() {
    let api = Api::start();
    api.behave(|number, _| Conduct::Answer(if number == 0 { 400 } else { 200 }));
    let house = House::new(&api.url(), 1).await;
    house.up().await;
    house.submit(3).await;
    eventually("the others are delivered", PATIENCE, async || {
        (house.ledger.totals().delivered == 2).then_some(())
    })
    .await;
    assert_eq!(house.broker.stored(), 1);
    assert_eq!(house.ledger.totals().in_flight(), 1);
}

/// The API takes POSTs and answers none, so nothing more is pulled.
#[actix_rt::test]
async fn a_connection_that_is_lost_while_no_post_may_begin_is_noticed() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Hang);
    let house = House::new(&api.url(), 2).await;
    house.up().await;
    house.submit(3).await;
    api.wait_for(2, PATIENCE).await;
    house.broker.drop_connection();
    eventually("the lane is restarted", PATIENCE, async || {
        (house.view().await.restarts == 1).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn an_order_to_a_node_that_ends_starts_no_lane() {
    let api = Api::start();
    api.delay(Duration::from_millis(500));
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.submit(4).await;
    api.wait_for(4, PATIENCE).await;
    let drain = house.supervisor.send(DrainAll);
    for action in [Action::Resume, Action::Restart] {
        let lane = LaneId::Nats;
        let sent = house.supervisor.send(LaneCommand { lane, action });
        assert_eq!(sent.await.unwrap(), CommandOutcome::Unchanged);
    }
    tokio::time::timeout(PATIENCE, drain)
        .await
        .expect("the drain ends")
        .unwrap();
    assert_eq!(
        (house.view().await.state, house.broker.connects()),
        (State::Paused, 1)
    );
    assert_eq!(house.ledger.totals().delivered, 4);
}

#[actix_rt::test]
async fn the_copy_of_a_record_that_another_lane_has_delivered_goes_too() {
    let api = Api::start();
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    let house = House::with_spool(&api.url(), 4, spool.clone());
    house.up().await;
    // A confirm of this broker is not durable.
    house.copies.connected(&BrokerInfo::default());
    let record = record();
    let copy = house
        .copies
        .write(&house.copies.writer(), &record, false)
        .await
        .unwrap();
    house.copies.keep(&record, copy);
    house.ledger.delivered(LaneId::Grpc, [&record]);
    submit_one(&house.ingest, record).await.unwrap();
    eventually("the copy is gone", PATIENCE, async || {
        // Answered after the settled entries are removed.
        spool.oldest().await;
        (spool.stats().kept(LaneId::Nats) == 0).then_some(())
    })
    .await;
    assert_eq!(api.count(), 0);
}

#[actix_rt::test]
async fn a_record_that_comes_again_after_its_2xx_is_not_posted_again() {
    let api = Api::start();
    api.delay(Duration::from_secs(1));
    let house = House::new(&api.url(), 4).await;
    house.up().await;
    house.submit(1).await;
    api.wait_for(1, PATIENCE).await;
    // The ack that follows the 2xx meets a connection that is gone.
    house.broker.drop_connection();
    eventually("it came again", PATIENCE, async || {
        (house.ledger.totals().redelivered == 1).then_some(())
    })
    .await;
    eventually("it is settled", PATIENCE, async || {
        (house.broker.stored() == 0).then_some(())
    })
    .await;
    assert_eq!(api.count(), 1);
    let counts = house.ledger.totals();
    assert_eq!(
        (counts.accepted, counts.delivered, counts.in_flight()),
        (1, 1, 0)
    );
}

/// Each record that was taken: its id, and its body.
fn taken_in_arrays(api: &Api) -> Vec<(String, String)> {
    let posts = api.posts().into_iter();
    posts
        .flat_map(|post| {
            let ids: Vec<_> = post
                .key
                .expect("a key")
                .split(',')
                .map(str::to_owned)
                .collect();
            let records: Vec<Box<RawValue>> =
                serde_json::from_slice(&post.body).expect("a JSON array");
            assert_eq!(ids.len(), records.len());
            ids.into_iter()
                .zip(records.into_iter().map(|record| record.get().to_owned()))
        })
        .collect()
}

#[actix_rt::test]
async fn a_batch_is_an_array_with_the_ids_of_its_records_and_is_settled_record_by_record() {
    let api = Api::start();
    let house = House::in_batches(&api.url(), 2, 100).await;
    house.up().await;
    house.submit(250).await;
    eventually("all are settled", PATIENCE, async || {
        (house.broker.stored() == 0).then_some(())
    })
    .await;
    let taken = taken_in_arrays(&api);
    let ids: HashSet<_> = taken.iter().map(|(id, _)| id).collect();
    assert_eq!(
        (taken.len(), ids.len(), house.ledger.totals().delivered),
        (250, 250, 250)
    );
    assert!(
        taken
            .iter()
            .all(|(_, record)| record == r#"{"a":1,"path":"NATS"}"#),
        "{:?}",
        taken[0]
    );
    assert!(api.count() < 25, "{} POSTs for 250 records", api.count());
}

#[actix_rt::test]
async fn a_batch_that_the_api_refuses_costs_only_the_records_that_it_refuses() {
    let api = Api::start();
    api.behave(|_, post| {
        Conduct::Answer(if memchr::memmem::find(&post.body, b"\"bad\"").is_some() {
            422
        } else {
            200
        })
    });
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    let house = House::with(
        &api.url(),
        Limits {
            posts: 1,
            batch: 50,
        },
        spool.clone(),
    );
    house.up().await;
    let bad = |number: usize| number == 7 || number == 31;
    let records = (0..50).map(|number| {
        let body = if bad(number) {
            "{\"bad\":1}"
        } else {
            "{\"a\":1}"
        };
        Record {
            body: Bytes::from_static(body.as_bytes()),
            ..record()
        }
    });
    let receipts = join_all(records.map(|record| submit_one(&house.ingest, record))).await;
    assert!(receipts.iter().all(Result::is_ok), "{receipts:?}");
    eventually("all are settled", PATIENCE, async || {
        (house.broker.stored() == 0).then_some(())
    })
    .await;
    let totals = house.ledger.totals();
    assert_eq!(
        (totals.delivered, spool.stats().records(Queue::Dead)),
        (48, 2)
    );
    let dead = spool.list(Undelivered::Dead, 10).await.unwrap();
    assert!(
        dead.iter().all(|entry| entry
            .reason
            .as_ref()
            .is_some_and(|reason| reason.status == 422)),
        "two letters"
    );
}

#[actix_rt::test]
async fn a_record_that_the_api_fails_at_does_not_keep_its_batch_from_arriving() {
    for position in [0, 3, 7] {
        a_batch_arrives_but_for(position).await;
    }
}

/// The API fails at one record of a batch of eight.
async fn a_batch_arrives_but_for(position: usize) {
    let api = Api::start();
    api.behave(|_, post| {
        Conduct::Answer(if memchr::memmem::find(&post.body, b"\"bad\"").is_some() {
            500
        } else {
            200
        })
    });
    let house = House::in_batches(&api.url(), 2, 8).await;
    house.up().await;
    let records = (0..8).map(|number| {
        let body = if number == position {
            "{\"bad\":1}"
        } else {
            "{\"a\":1}"
        };
        Record {
            body: Bytes::from_static(body.as_bytes()),
            ..record()
        }
    });
    let receipts = join_all(records.map(|record| submit_one(&house.ingest, record))).await;
    assert!(receipts.iter().all(Result::is_ok), "{receipts:?}");
    let patience = PATIENCE * 3;
    eventually("the others arrive", patience, async || {
        (house.ledger.totals().delivered == 7).then_some(())
    })
    .await;
    assert_eq!(
        house.broker.stored(),
        1,
        "the bad one is tried again, and kept"
    );
}

/// The disk is full, or fails.
#[actix_rt::test]
async fn a_record_that_cannot_be_parked_is_retried_where_it_is() {
    let api = Api::start();
    let tries = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&tries);
    api.behave(move |_, post| {
        let is_bad = memchr::memmem::find(&post.body, b"\"bad\"").is_some();
        *seen.lock().unwrap() += u32::from(is_bad);
        Conduct::Answer(if is_bad { 500 } else { 200 })
    });
    let house = House::new(&api.url(), 2).await;
    house.up().await;
    let bad = Record {
        body: Bytes::from_static(b"{\"bad\":1}"),
        ..record()
    };
    submit_one(&house.ingest, bad).await.unwrap();
    eventually(
        "it is tried more often than before it is parked",
        PATIENCE,
        async || {
            house.submit(1).await;
            (*tries.lock().unwrap() > 6).then_some(())
        },
    )
    .await;
    eventually("the others arrive", PATIENCE, async || {
        (house.broker.stored() == 1).then_some(())
    })
    .await;
    assert_eq!(house.ledger.totals().parked, 0);
}

/// More records than there are slots fail, and cannot be parked.
async fn failing_records_hold_up_none_behind_them(limits: Limits) {
    let bad = 4 * limits.deliveries();
    let api = Api::start();
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let failed = Arc::clone(&seen);
    api.behave(move |_, post| {
        if memchr::memmem::find(&post.body, b"\"bad\"").is_none() {
            return Conduct::Answer(200);
        }
        let ids = post.key.as_deref().unwrap_or_default().split(',');
        failed.lock().unwrap().extend(ids.map(str::to_owned));
        Conduct::Answer(500)
    });
    let house = House::with(&api.url(), limits, closed_spool().await);
    house.up().await;
    let records = (0..bad).map(|_| Record {
        body: Bytes::from_static(b"{\"bad\":1}"),
        ..record()
    });
    let receipts = join_all(records.map(|record| submit_one(&house.ingest, record))).await;
    assert!(receipts.iter().all(Result::is_ok), "{receipts:?}");
    house.submit(1).await;
    eventually("the good one arrives", PATIENCE, async || {
        (house.ledger.totals().delivered == 1).then_some(())
    })
    .await;
    eventually("each of the others is POSTed", PATIENCE, async || {
        (seen.lock().unwrap().len() == bad).then_some(())
    })
    .await;
    assert!(api.most_at_a_time() <= limits.posts, "{limits:?}");
    house.supervisor.send(DrainAll).await.unwrap();
    assert_eq!(
        house.broker.stored(),
        bad,
        "{limits:?}: they are given back"
    );
    assert_eq!(house.view().await.last_error, None, "{limits:?}");
}

#[actix_rt::test]
async fn records_that_fail_leave_their_slots_to_those_behind_them() {
    for (posts, batch) in [(2, 1), (8, 1), (1, 4), (4, 4)] {
        failing_records_hold_up_none_behind_them(Limits { posts, batch }).await;
    }
}

/// Only a failure that may be the record's leaves its slot: the others tell the API's state.
#[actix_rt::test]
async fn an_api_that_has_too_much_to_do_gets_no_more_records() {
    for answer in [429, 503] {
        let api = Api::start();
        api.behave(move |_, _| Conduct::Answer(answer));
        let house = House::new(&api.url(), 4).await;
        house.up().await;
        house.submit(20).await;
        api.wait_for(12, PATIENCE).await;
        let keys: HashSet<_> = api.posts().into_iter().map(|post| post.key).collect();
        assert_eq!(keys.len(), 4, "{answer}");
    }
}

#[actix_rt::test]
async fn a_drain_gives_back_batches_under_way_and_those_that_wait_for_their_turn() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(503));
    let house = House::in_batches(&api.url(), 1, 10).await;
    house.up().await;
    house.submit(40).await;
    api.wait_for(1, PATIENCE).await;
    timeout(PATIENCE, house.supervisor.send(DrainAll))
        .await
        .expect("it ends in time")
        .unwrap();
    assert_eq!(
        (house.broker.stored(), house.ledger.totals().delivered),
        (40, 0)
    );
}

#[actix_rt::test]
async fn a_batch_is_given_up_record_by_record() {
    let api = Api::start();
    let limits = Limits { posts: 1, batch: 2 };
    let hour = Duration::from_hours(1);
    let (spool, _folder) = spool();
    let young = record();
    let mut old = record();
    let old_id = old.id.to_string();
    let failing = old_id.clone();
    api.behave(
        move |_, post| match post.key.as_deref().unwrap_or_default() {
            id if id == failing => Conduct::Answer(500),
            both if both.contains(',') => Conduct::AnswerWith {
                status: 503,
                headers: vec![("Retry-After", "1".into())],
                body: vec![],
            },
            _ => Conduct::Answer(200),
        },
    );
    let house = House::that_gives_up(&api.url(), limits, spool.clone(), Some(hour));
    house.up().await;
    // It is to be given up in a moment, before the second POST.
    let origin = old.origin.as_mut().unwrap();
    origin.at_us -=
        u64::try_from(hour.saturating_sub(Duration::from_millis(150)).as_micros()).unwrap();
    let receipts = join_all([young, old].map(|record| submit_one(&house.ingest, record))).await;
    assert!(receipts.iter().all(Result::is_ok), "{receipts:?}");
    eventually("both are settled", PATIENCE, async || {
        (house.broker.stored() == 0).then_some(())
    })
    .await;
    let dead: Vec<_> = spool
        .list(Undelivered::Dead, 10)
        .await
        .unwrap()
        .into_iter()
        .map(|entry| entry.id)
        .collect();
    assert_eq!((dead, house.ledger.totals().delivered), (vec![old_id], 1));
}

#[actix_rt::test]
async fn two_records_of_one_id_are_both_posted_and_never_in_one_array() {
    let api = Api::start();
    let house = House::in_batches(&api.url(), 1, 10).await;
    house.up().await;
    let first = record();
    let second = Record {
        origin: Some(Origin {
            at_us: 1,
            ..first.origin.clone().unwrap()
        }),
        ..first.clone()
    };
    let receipts = join_all([first, second].map(|record| submit_one(&house.ingest, record))).await;
    assert!(receipts.iter().all(Result::is_ok), "{receipts:?}");
    eventually("both are settled", PATIENCE, async || {
        (house.broker.stored() == 0).then_some(())
    })
    .await;
    assert_eq!(
        (
            api.count(),
            taken_in_arrays(&api).len(),
            house.ledger.totals().delivered
        ),
        (2, 2, 2)
    );
}

/// Brokers end a consumer that holds a message for too long.
#[actix_rt::test]
async fn a_record_that_the_api_does_not_take_is_given_back_before_its_broker_minds() {
    let house = House::new(NO_API, 1).await;
    house.up().await;
    house.submit(1).await;
    tokio::time::pause();
    let again = house.broker.redelivered();
    tokio::time::sleep(Duration::from_mins(25)).await;
    tokio::time::resume();
    assert_eq!(
        (house.broker.stored(), house.ledger.totals().delivered),
        (1, 0)
    );
    let times = house.broker.redelivered() - again;
    assert!(
        (2..=3).contains(&times),
        "it came again {times} times in 25 minutes"
    );
}

#[actix_rt::test]
async fn a_retry_waits_for_as_long_as_the_api_asks() {
    let api = Api::start();
    let times = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&times);
    api.behave(move |number, _| {
        seen.lock().unwrap().push(Instant::now());
        match number {
            0 => Conduct::AnswerWith {
                status: 503,
                headers: vec![("Retry-After", "2".into())],
                body: vec![],
            },
            _ => Conduct::Answer(200),
        }
    });
    let house = House::new(&api.url(), 1).await;
    house.up().await;
    house.submit(1).await;
    eventually("it is delivered", PATIENCE, async || {
        (house.ledger.totals().delivered == 1).then_some(())
    })
    .await;
    let times = times.lock().unwrap();
    assert!(
        times[1] - times[0] >= Duration::from_secs(2),
        "{:?}",
        times[1] - times[0]
    );
}

/// A lane of a real NATS server whose messages hold up to sixteen records.
struct BundlingLane {
    _server: Nats,
    /// Stops the lane when it is dropped.
    _supervisor: Addr<Supervisor>,
    ledger: Arc<Ledger>,
    ingest: Admission,
    jetstream: async_nats::jetstream::Context,
    stream: String,
}

impl BundlingLane {
    async fn start(api: &Api) -> Option<Self> {
        let server = Nats::start().await?;
        let settings = server.config();
        let limits = Limits {
            posts: 64,
            batch: 1,
        };
        let spool = closed_spool().await;
        let lane = nats::Settings::new(settings.clone());
        let (ledger, ingest, supervisor, ..) =
            graph::<nats::Nats>(&lane, &api.url(), limits, spool, None, 16, Ack::Lane);
        // The first waits in the router until the lane is up.
        eventually("the lane is up", PATIENCE, async || {
            submit_one(&ingest, record()).await.ok()
        })
        .await;
        let client = async_nats::connect(&*settings.url).await.unwrap();
        Some(Self {
            _server: server,
            _supervisor: supervisor,
            ledger,
            ingest,
            jetstream: async_nats::jetstream::new(client),
            stream: settings.stream,
        })
    }

    /// How many messages the stream has had.
    async fn messages(&self) -> u64 {
        let mut stream = self.jetstream.get_stream(&self.stream).await.unwrap();
        stream.info().await.unwrap().state.last_sequence
    }

    /// Submits each record as a request of its own, all at once, and returns how many messages they
    /// made.
    async fn submit(&self, admission: &Admission, records: Vec<Record>) -> u64 {
        let before = self.messages().await;
        let requests = records.into_iter();
        let receipts = join_all(requests.map(|record| submit_one(admission, record))).await;
        assert!(
            receipts
                .iter()
                .all(|receipt| *receipt == Ok(Receipt::Lane(LaneId::Nats))),
            "{receipts:?}"
        );
        self.messages().await - before
    }
}

#[actix_rt::test]
async fn records_of_requests_that_are_here_together_travel_together_but_for_what_a_lane_may_have() {
    const RECORDS: usize = 100;
    let api = Api::start();
    let Some(lane) = BundlingLane::start(&api).await else {
        return;
    };
    let own = || (0..RECORDS).map(|_| record()).collect::<Vec<_>>();
    let ingest = &lane.ingest;
    let from_disk = ingest.from_disk(Source::Spool, RECORDS);
    assert_eq!(lane.submit(ingest, own()).await, 7, "sixteen a message");
    assert_eq!(lane.submit(&from_disk, own()).await, 7);
    // An earlier run may have sent what it has left on disk.
    let found = own().into_iter().map(|record| {
        let origin = Some(Origin::now(Arc::from("an earlier run")));
        lane.ledger
            .adopt(Record { origin, ..record })
            .expect("nobody has delivered it")
    });
    let found = found.collect();
    assert_eq!(lane.submit(&from_disk, found).await, RECORDS as u64);
    // So may the broker have what it has confirmed before.
    let copies = ingest.from_disk(Source::Copies, RECORDS);
    assert_eq!(lane.submit(&copies, own()).await, RECORDS as u64);
    let maybe_published = own();
    for record in &maybe_published {
        lane.ledger.maybe_published(record);
    }
    assert_eq!(lane.submit(ingest, maybe_published).await, RECORDS as u64);

    let all = 1 + 5 * RECORDS;
    let delivered = async || (lane.ledger.totals().delivered == all as u64).then_some(());
    eventually("all are delivered", PATIENCE, delivered).await;
    let keys: HashSet<_> = api.posts().into_iter().map(|post| post.key).collect();
    assert_eq!((keys.len(), api.count()), (all, all), "each once");
}
