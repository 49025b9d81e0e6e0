//! Power cuts of node and broker together, under load: each record that got a 2xx arrives.
//!
//! `POWER_CUTS` is the number of cuts of each test.

use std::{fs, time::Duration};

use crate::support::{
    api::{Api, Conduct},
    lanes::{Lane, Nats, Rabbitmq, grpc_variables},
    load::Load,
    node::{Node, PATIENCE},
    power::Disk,
    process::free_port,
    rig::Rig as _,
    wanted,
};

/// How long a broker may take to send again the messages that the node had at the cut.
const REDELIVERY: Duration = Duration::from_mins(3);
/// Records that are taken before a cut, at least.
const TAKEN_MIN: usize = 50;
/// The disk may not know of what was delivered in this time before a cut.
const SETTLED_AFTER: Duration = Duration::from_millis(100);
/// The same where only a NATS server knows what was delivered: it writes that down 100 ms after it
/// has last done so, and syncs it, which takes a busy disk a while.
const SETTLED_BY_NATS_AFTER: Duration = Duration::from_millis(500);
/// The time under load before a cut, beyond that.
const LOAD_MAX_MS: u64 = 300;

/// The API while the load runs. It is well after the last cut.
#[derive(Clone, Copy, Debug)]
enum ApiState {
    Well,
    Slow,
    Hanging,
}

impl ApiState {
    const ALL: [Self; 3] = [Self::Well, Self::Slow, Self::Hanging];

    fn apply(self, api: &Api) {
        let delay = if matches!(self, Self::Slow) { 50 } else { 0 };
        api.delay(Duration::from_millis(delay));
        let hangs = matches!(self, Self::Hanging);
        api.behave(move |_, _| {
            if hangs {
                Conduct::Hang
            } else {
                Conduct::Answer(200)
            }
        });
    }
}

/// Cuts the power of the disk with the node's data, and of `broker` if it is on that disk too, under
/// load, again and again. Each record with a 2xx arrives. Records come again only if they were in
/// flight at a cut, or were delivered in the time of `settled_after` before it.
async fn no_2xx_is_lost<L: Lane>(
    disk: &Disk,
    mut broker: Option<L>,
    variables: &[(String, String)],
    settled_after: Duration,
) {
    let api = Api::start();
    api.keep_keys_only();
    let data = [("SPOOL__DIR".to_owned(), disk.folder("node"))];
    let variables = [variables, &data].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    let mut figures = Figures::default();
    let mut last = None;
    for (_, state) in (0..wanted("POWER_CUTS", 3)).zip(ApiState::ALL.iter().cycle()) {
        state.apply(&api);
        if broker.is_some() {
            node.lane_is(L::NAME, "up", PATIENCE).await;
        }
        let mut load = match &last {
            Some(last) => Load::start_after(&node, last),
            None => Load::start(&node),
        };
        load.take(TAKEN_MIN).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..=LOAD_MAX_MS))).await;
        let settled = api.count();
        tokio::time::sleep(settled_after).await;
        load.power_fails();
        disk.cut();
        node.signal("KILL");
        if let Some(broker) = &mut broker {
            broker.kill().await;
        }
        node.ended(PATIENCE).await;
        load.end().await;
        figures.taken += load.accepted();
        figures.in_flight += load.in_flight(&api);
        figures.just_delivered += api.count() - settled;
        disk.restore().await;
        if let Some(broker) = &mut broker {
            broker.revive().await;
        }
        ApiState::Well.apply(&api);
        node.start_again().await;
        if let Err(lost) = load.met(&api, REDELIVERY).await {
            let holds = match &mut broker {
                Some(broker) => broker.holds().await,
                None => "no broker".into(),
            };
            panic!("{lost}; {}; {holds}", node.status().await);
        }
        node.at_rest(REDELIVERY).await;
        last = Some(load);
    }
    let taken = api.taken();
    figures.redelivered = taken.values().map(|times| *times as usize - 1).sum();
    println!("{}: 0 lost, {figures:?}", L::NAME);
    assert!(
        figures.redelivered <= figures.in_flight + figures.just_delivered,
        "{figures:?}"
    );
}

/// Sums over all cuts.
#[derive(Debug, Default)]
struct Figures {
    /// Records with a 2xx.
    taken: usize,
    /// Records that the node had at a cut, and the API had not.
    in_flight: usize,
    /// POSTs of the last moment before a cut.
    just_delivered: usize,
    redelivered: usize,
}

/// No lane is up: each record waits on the node's disk.
#[actix_rt::test]
async fn of_a_node_whose_lane_is_down() {
    let Some(disk) = Disk::new() else { return };
    let nowhere = format!("nats://127.0.0.1:{}", free_port());
    let down = [("LANES__NATS__URL".to_owned(), nowhere)];
    let variables = [&grpc_variables()[..], &down].concat();
    no_2xx_is_lost::<Nats>(&disk, None, &variables, SETTLED_AFTER).await;
}

#[actix_rt::test]
async fn of_a_node_on_grpc() {
    let Some(disk) = Disk::new() else { return };
    no_2xx_is_lost::<Nats>(&disk, None, &grpc_variables(), SETTLED_AFTER).await;
}

/// The system's server, which syncs every two minutes and cannot sync before it confirms.
#[actix_rt::test]
async fn of_node_and_old_nats() {
    let Some(disk) = Disk::new() else { return };
    let folder = disk.folder("nats");
    let Some(mut nats) = Nats::with(&["-sd", &folder]).await else {
        return;
    };
    let variables = nats.variables();
    no_2xx_is_lost(&disk, Some(nats), &variables, SETTLED_AFTER).await;
}

#[actix_rt::test]
async fn of_node_and_nats() {
    let Some(disk) = Disk::new() else { return };
    let folder = disk.folder("nats");
    let Some(mut nats) = Nats::current(&["-sd", &folder]).await else {
        return;
    };
    let variables = nats.variables();
    no_2xx_is_lost(&disk, Some(nats), &variables, SETTLED_AFTER).await;
}

/// The node keeps no copies: the server syncs before it confirms.
#[actix_rt::test]
async fn of_node_and_nats_that_always_syncs() {
    let Some(disk) = Disk::new() else { return };
    let folder = disk.folder("nats");
    let settings = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(&settings, "jetstream { sync_interval: always }").expect("the file is ours");
    let settings = settings.path().to_str().expect("a plain path");
    let monitor = free_port().to_string();
    let arguments = ["-sd", &folder, "-c", settings, "-m", &monitor];
    let Some(mut nats) = Nats::current(&arguments).await else {
        return;
    };
    let mut variables = nats.variables();
    variables.push((
        "LANES__NATS__MONITOR".to_owned(),
        format!("http://127.0.0.1:{monitor}"),
    ));
    no_2xx_is_lost(&disk, Some(nats), &variables, SETTLED_BY_NATS_AFTER).await;
}

/// The node and its disk live on: it has copies of what the server forgets.
#[actix_rt::test]
async fn of_nats_alone() {
    let Some(disk) = Disk::new() else { return };
    let folder = disk.folder("nats");
    let Some(mut nats) = Nats::current(&["-sd", &folder]).await else {
        return;
    };
    let api = Api::start();
    api.keep_keys_only();
    let node = Node::start(&api.url(), &nats.variables()).await;
    let mut last = None;
    for (_, state) in (0..wanted("POWER_CUTS", 3)).zip(ApiState::ALL.iter().cycle()) {
        state.apply(&api);
        node.lane_is("nats", "up", PATIENCE).await;
        let mut load = match &last {
            Some(last) => Load::start_after(&node, last),
            None => Load::start(&node),
        };
        load.take(TAKEN_MIN).await;
        disk.cut();
        nats.kill().await;
        disk.restore().await;
        load.take(TAKEN_MIN).await;
        nats.revive().await;
        ApiState::Well.apply(&api);
        load.end().await;
        load.is_met(&api, REDELIVERY).await;
        node.at_rest(REDELIVERY).await;
        last = Some(load);
    }
}

#[actix_rt::test]
async fn of_node_and_rabbitmq() {
    let Some(disk) = Disk::new() else { return };
    let Some(mut rabbitmq) = Rabbitmq::on(&disk.folder("rabbitmq")).await else {
        return;
    };
    let variables = rabbitmq.variables();
    no_2xx_is_lost(&disk, Some(rabbitmq), &variables, SETTLED_AFTER).await;
}
