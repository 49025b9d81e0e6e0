//! The cost of each part of a record's way, measured alone: `cargo bench --bench parts`.

use std::{hint::black_box, sync::Arc, time::Duration};

use bytes::Bytes;
use divan::{Bencher, counter::ItemsCount};
use futures_util::future::join_all;
use tempfile::TempDir;
use waypost::{
    actors::{
        Ping,
        fallback::DiskFallback,
        live_lanes::LiveLanes,
        router::{Router, RouterParams},
        slot::Slot,
        supervisor::{ChildId, Supervisor, Thread, factory},
    },
    config::Policy,
    lane_id::LaneId,
    ledger::Ledger,
    load::records,
    record::{Origin, Record, Schema, Tag, parse, parse_body, pointer::Values},
    routing::{
        choose::{Candidates, Chooser},
        explain::Explanations,
        policy::HashOn,
        rules::{Assignment, RouteDefaults, RouteRule, Routes},
        scores::Scores,
        settings::CurrentRouting,
    },
    spool::{Entry, Queue, Spool},
};

const ROOM: u64 = 1 << 30;

fn main() {
    divan::main();
}

fn body() -> Bytes {
    records(include_str!("../traffic.json"))
        .expect("traffic.json holds records")
        .swap_remove(0)
}

fn spool() -> (TempDir, Spool) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let spool = Spool::open(folder.path(), ROOM).expect("the folder is ours");
    (folder, spool)
}

#[divan::bench]
fn parse_and_validate(bencher: Bencher) {
    let body = body();
    let rules = Schema::Case.into();
    bencher.bench(|| parse(black_box(&body), &rules));
}

#[divan::bench]
fn splice_the_tag(bencher: Bencher) {
    let body = body();
    let tag = Tag::new("NATS");
    bencher.bench(|| tag.splice(black_box(&body)));
}

fn scores(policy: Policy) -> Scores {
    Scores::new(policy.measures(), Duration::from_secs(1))
}

/// One route of `lanes` for all records.
fn routes(policy: Policy, lanes: &[LaneId]) -> Routes {
    let defaults = RouteDefaults {
        policy,
        hash_on: &HashOn::Id,
        lanes,
        apis: &[],
    };
    Routes::new(&[], &defaults).expect("no rule is wrong")
}

/// The rules for a record that takes the last of so many, its values read in the parse.
#[divan::bench(args = [0, 1, 10, 100])]
fn parse_and_assign(bencher: Bencher, rules: usize) {
    let rule = |number| {
        let when = match number % 4 {
            0 => format!("pointer = \"/state\", equals = \"state {number}\""),
            1 => format!("pointer = \"/age\", range = {{ min = {} }}", 200 + number),
            2 => format!("pointer = \"/location\", prefix = \"Place {number}\""),
            _ => format!("header = \"ce-type\", in = [\"a.{number}\", \"b.{number}\"]"),
        };
        toml::from_str::<RouteRule>(&format!("when = {{ {when} }}")).expect("a rule")
    };
    let rules: Vec<_> = (0..rules).map(rule).collect();
    let defaults = RouteDefaults {
        policy: Policy::RoundRobin,
        hash_on: &HashOn::Id,
        lanes: &LaneId::ALL,
        apis: &[],
    };
    let routes = Routes::new(&rules, &defaults).expect("no rule is wrong");
    let body = body();
    let rules = Schema::Case.into();
    bencher.bench_local(|| {
        let parsed = parse_body(black_box(&body), &rules, routes.pointers());
        let (_, values) = parsed.expect("a record");
        routes.assign("id", &values, |_| Some("org.example.case"))
    });
}

/// The choice among three lanes that are up and one that is not, and what is counted of it.
#[divan::bench(args = ["round-robin", "weighted", "failover", "hash", "adaptive"])]
fn choose_a_lane(bencher: Bencher, policy: &str) {
    let policies = [
        Policy::RoundRobin,
        Policy::Weighted,
        Policy::Failover,
        Policy::Hash,
        Policy::Adaptive,
    ];
    let policy = policies.into_iter().find(|known| known.name() == policy);
    let policy = policy.expect("a policy");
    let scores = Arc::new(scores(policy));
    for lane in LaneId::ALL {
        scores.lane_up(lane, Duration::ZERO);
        scores.delivered(lane, Duration::from_millis(3), Duration::ZERO);
    }
    let ledger = Ledger::new(Arc::from("run"));
    let mut chooser = Chooser::new(1);
    let routes = routes(policy, &LaneId::ALL);
    let Assignment { route, key, .. } = routes.assign("record-1", &Values::default(), |_| None);
    let now = Duration::from_mins(1);
    bencher.bench_local(|| {
        let candidates = Candidates {
            may_take: &|lane| lane != LaneId::Rabbitmq,
            scores: &scores,
            undelivered: &|lane| ledger.lane(lane).counts.in_flight(),
            now,
        };
        let choice = chooser.choose(&route, black_box(key), 1, &candidates)?;
        scores.sent(choice.lane, 1, now)
    });
}

/// So many records that wait for the disk at the same time: appended, synced, answered, struck out.
#[divan::bench(args = [1, 64, 512])]
fn spool_append_commit_and_settle(bencher: Bencher, count: usize) {
    let (folder, spool) = spool();
    let system = actix_rt::System::new();
    let origin = Some(Origin::now(Arc::from("run")));
    let record = Record {
        id: Record::new_id(),
        body: body(),
        trace: None,
        origin,
        api: None,
        event: None,
    };
    bencher.counter(ItemsCount::new(count)).bench_local(|| {
        system.block_on(async {
            let entry = Entry::new(&record, None);
            for key in join_all((0..count).map(|_| spool.put_held(Queue::Waiting, &entry))).await {
                spool.settle(key.expect("the disk works"));
            }
        });
    });
    drop((spool, folder));
}

/// A message to an actor on this thread, or on one of its own, and its answer.
#[divan::bench(args = [false, true])]
fn actor_hop(bencher: Bencher, crosses_threads: bool) {
    let (_folder, spool) = spool();
    let system = actix_rt::System::new();
    let router = Slot::default();
    let address = system.block_on(async {
        let thread = if crosses_threads {
            Thread::spawn()
        } else {
            Thread::Current
        };
        let fallback = DiskFallback {
            spool,
            ledger: Arc::new(Ledger::new(Arc::from("run"))),
        };
        let live_lanes = LiveLanes::new(Arc::new(scores(Policy::RoundRobin)));
        let params = RouterParams {
            routing: CurrentRouting::new(routes(Policy::RoundRobin, &[LaneId::Grpc])),
            live_lanes: live_lanes.clone(),
            fallback,
            explanations: Explanations::default(),
            publish_timeout: Duration::from_secs(1),
        };
        let start = factory(router.clone(), move |supervisor| {
            Router::new(params.clone(), supervisor)
        });
        Supervisor::start(&live_lanes, vec![(ChildId::Router, thread, start)]);
        assert!(router.is_alive_within(Duration::from_secs(5)).await);
        router.get().expect("it is alive")
    });
    bencher.bench_local(|| {
        system
            .block_on(address.send(Ping))
            .expect("the router lives")
    });
}
