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
        router::{Router, RouterParams, choose},
        slot::Slot,
        supervisor::{ChildId, Supervisor, Thread, factory},
    },
    config::Policy,
    lane_id::LaneId,
    ledger::Ledger,
    load::records,
    record::{Origin, Record, Schema, Tag, parse},
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
    bencher.bench(|| parse(black_box(&body), Schema::Case));
}

#[divan::bench]
fn splice_the_tag(bencher: Bencher) {
    let body = body();
    let tag = Tag::new("NATS");
    bencher.bench(|| tag.splice(black_box(&body)));
}

#[divan::bench]
fn choose_a_lane(bencher: Bencher) {
    let is_up = [true, false, true, true];
    bencher.bench(|| {
        choose(Policy::RoundRobin, is_up.len(), black_box(1), |at| {
            is_up[at]
        })
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
        traceparent: None,
        origin,
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
        let live_lanes = LiveLanes::default();
        let params = RouterParams {
            policy: Policy::RoundRobin,
            lanes: [LaneId::Grpc].into(),
            live_lanes: live_lanes.clone(),
            fallback,
            publish_timeout: Duration::from_secs(1),
        };
        let start = factory(router.clone(), move |supervisor| {
            Router::new(params.clone(), supervisor)
        });
        Supervisor::start(&live_lanes, vec![(ChildId::Router, thread, start)]);
        router
            .wait(Duration::from_secs(5))
            .await
            .expect("the router starts")
    });
    bencher.bench_local(|| {
        system
            .block_on(address.send(Ping))
            .expect("the router lives")
    });
}
