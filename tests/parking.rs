//! Records that the API fails at while it takes others: they are parked on disk, hold up no other,
//! and end as dead letters. `POISON_RECORDS` is their number in each test of a lane; there are ten
//! good ones for each. Each test prints the 99th percentile of the times of the good ones, from their
//! request to the POST that was taken: without any poison, and with it in each position. The
//! positions take turns for `POISON_ROUNDS` rounds; the result is the median of the ratios within a
//! round. `POISON_RATE` is the records per second: each request is sent when it is due, and its time
//! begins then. Without it, each request follows the answer to the last, and the times tell by how much
//! the POSTs fall behind a node at its limit. An optimized node is measured by
//!
//! ```sh
//! NODE_UNDER_TEST=target/release/waypost POISON_RECORDS=1000 POISON_ROUNDS=3 cargo test \
//!     --features failpoints --test waypost -- --nocapture --test-threads 1 parking::poison
//! ```

use std::{
    collections::{HashMap, HashSet},
    iter,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use awc::http::StatusCode;
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::sleep_until};
use waypost::{
    clock::unix_us,
    record::{Origin, Record},
    spool::{DeathReason, Entry, Parked, Queue, Spool},
};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
    wanted,
};

/// The API fails at records with this in their body.
const POISON: &str = "poison";
/// Records of one request.
const REQUEST: usize = 100;

fn is_poison(body: &[u8]) -> bool {
    memchr::memmem::find(body, POISON.as_bytes()).is_some()
}

fn body(state: &str) -> String {
    let record = json!({
        "name": "Ana", "location": "Flores", "age": 33, "infectedtype": "imported", "state": state
    });
    record.to_string()
}

fn with(variables: &[(String, String)], more: &[(&str, &str)]) -> Vec<(String, String)> {
    let more = more
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    variables.iter().cloned().chain(more).collect()
}

/// The place of the poisoned records among the others.
#[derive(Clone, Copy, Debug)]
enum Position {
    Nowhere,
    First,
    Last,
    Spread,
}

impl Position {
    const ALL: [Self; 4] = [Self::Nowhere, Self::First, Self::Last, Self::Spread];

    /// Whether each record is poisoned.
    fn all(self, poisoned: usize) -> Vec<bool> {
        let total = 11 * poisoned;
        let place = |number: usize| match self {
            Self::Nowhere => false,
            Self::First => number < poisoned,
            Self::Last => number >= total - poisoned,
            Self::Spread => number % 11 == 5,
        };
        (0..total).map(place).collect()
    }
}

/// The times at which the API got each record.
type Times = Arc<Mutex<HashMap<String, Vec<Instant>>>>;

/// The API answers `conduct` to all that is poisoned.
fn poison(api: &Api, conduct: Conduct) -> Times {
    let times = Times::default();
    let seen = Arc::clone(&times);
    api.behave(move |_, post| {
        let now = Instant::now();
        let mut seen = seen.lock().unwrap();
        for id in post.key.as_deref().unwrap_or_default().split(',') {
            seen.entry(id.to_owned()).or_default().push(now);
        }
        if is_poison(&post.body) {
            conduct.clone()
        } else {
            Conduct::Answer(200)
        }
    });
    times
}

/// Posts the records in their order, `REQUEST` at a time. Their ids and the times of their requests, the
/// poisoned ones apart.
async fn post_all(node: &Node, name: &str, poisoned: &[bool]) -> [HashMap<String, Instant>; 2] {
    let arrays = poisoned.chunks(REQUEST).map(|request| {
        let states = request
            .iter()
            .map(|poisoned| if *poisoned { POISON } else { "well" });
        let records: Vec<_> = states.map(body).collect();
        Bytes::from(format!("[{}]", records.join(",")))
    });
    let arrays: Vec<_> = arrays.collect();
    let key = |number| format!("{name}-{number}");
    let post = async |number, array: &Bytes| {
        let answer = node.post("/", &key(number), array.clone()).await;
        let answer = answer.expect("an answer");
        assert_eq!(answer.0, StatusCode::ACCEPTED, "{answer:?}");
    };
    let rate = u32::try_from(wanted("POISON_RATE", 0)).unwrap();
    let mut began = Vec::new();
    if rate > 0 {
        let pause = Duration::from_secs(REQUEST as u64) / rate;
        let due = iter::successors(Some(Instant::now()), |last| Some(*last + pause));
        began.extend(due.take(arrays.len()));
        let posts = arrays.iter().zip(&began).enumerate();
        let posts = posts.map(async |(number, (array, due))| {
            sleep_until((*due).into()).await;
            post(number, array).await;
        });
        join_all(posts).await;
    } else {
        for (number, array) in arrays.iter().enumerate() {
            began.push(Instant::now());
            post(number, array).await;
        }
    }
    let mut ids = [HashMap::new(), HashMap::new()];
    for (place, poisoned) in poisoned.iter().enumerate() {
        let number = place / REQUEST;
        let id = format!("{}/{}", key(number), place % REQUEST);
        ids[usize::from(*poisoned)].insert(id, began[number]);
    }
    ids
}

/// Fails if the node ever takes the API for down, until the returned flag is set.
fn watch_state(node: &Node) -> (Arc<AtomicBool>, tokio::task::JoinHandle<()>) {
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    let url = format!("http://127.0.0.1:{}/api/status", node.admin);
    let watching = tokio::task::spawn_local(async move {
        let http = awc::Client::default();
        while !is_over.load(Relaxed) {
            let mut answer = http.get(&url).send().await.expect("the node answers");
            let status: Value = answer.json().limit(1 << 20).await.expect("a status");
            assert_eq!(status["api"]["state"], "up", "{}", status["api"]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    (over, watching)
}

/// Each gap between two tries of a record is at least half of the longest pause. A record whose
/// first try comes late, since its broker is busy, may be given up before its first pause ends.
fn follows_the_schedule(id: &str, sent: Instant, tries: &[Instant], given_up: Duration) {
    // Three tries in the lane, where they may wait for a slot, perhaps a few more; then pauses of
    // 0.5 to 1, 2 to 4 and 8 to 16 seconds, and the last ends when the record is given up.
    let gaps: Vec<_> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let pauses: Vec<_> = gaps
        .iter()
        .skip(2)
        .filter(|gap| **gap >= Duration::from_millis(500))
        .collect();
    let wait = tries[0] - sent;
    let is_late = wait + Duration::from_secs(1) > given_up;
    assert!(
        tries.len() >= 3 && (is_late || !pauses.is_empty()),
        "{id}: {wait:?}, {gaps:?}"
    );
    let mut least = Duration::from_millis(500);
    for pause in pauses.iter().rev().skip(1).rev() {
        assert!(**pause >= least, "{id}: {gaps:?}");
        least *= 4;
    }
    let all = *tries.last().unwrap() - tries[0];
    assert!(
        all <= given_up + PATIENCE && tries.len() < 40,
        "{id}: {gaps:?}"
    );
}

/// `variables` are of a stream, queue or subscription of its own for each node.
async fn poison_holds_up_no_other(
    lane: &str,
    mut variables: impl FnMut() -> Vec<(String, String)>,
) {
    let poisoned = usize::try_from(wanted("POISON_RECORDS", 70)).unwrap();
    let rounds = usize::try_from(wanted("POISON_ROUNDS", 1)).unwrap();
    let given_up = Duration::from_secs(6);
    for batch in ["1", "50"] {
        let api = Api::start();
        api.keep_keys_only();
        let times = poison(&api, Conduct::Answer(500));
        let settings = [("API__BATCH", batch), ("API__GIVE_UP_AFTER", "6s")];
        let node = Node::start(&api.url(), &with(&variables(), &settings)).await;
        node.lane_is(lane, "up", PATIENCE).await;
        let (over, watching) = watch_state(&node);
        let mut ends = 0;
        let mut measured = Vec::new();
        let turns = (0..rounds).flat_map(|round| Position::ALL.map(|position| (round, position)));
        for (round, position) in turns {
            let name = format!("{position:?}-{round}");
            let what = format!("{lane}, batch {batch}, {name}");
            let posts = api.count();
            let [good, bad] = post_all(&node, &name, &position.all(poisoned)).await;
            eventually("the good ones arrive", PATIENCE, async || {
                let taken: HashSet<_> = api.taken().into_keys().flat_map(ids_of).collect();
                good.keys().all(|id| taken.contains(id)).then_some(())
            })
            .await;
            let ms = p99(&good, &times.lock().unwrap());
            println!("{what}: p99 {ms:.1} ms, {} POSTs", api.count() - posts);
            measured.push(ms);
            assert!(!watching.is_finished(), "{what}");
            ends += good.len() + bad.len();
            let ledger = node.all_ended(ends, PATIENCE * 2).await;
            assert_eq!(ledger["parked"], 0, "{ledger}");
            let dead = node.dead().await;
            let dead_good = good.keys().any(|id| dead.contains(id));
            assert!(
                !dead_good && bad.keys().all(|id| dead.contains(id)),
                "{what}"
            );
            let times = times.lock().unwrap();
            for (id, sent) in &bad {
                follows_the_schedule(id, *sent, &times[id], given_up);
            }
        }
        over.store(true, Relaxed);
        watching.await.expect("the API is up all the time");
        print_p99(&format!("{lane}, batch {batch}"), &measured);
        let status = node.status().await;
        let episodes = rounds * (Position::ALL.len() - 1);
        assert_eq!(
            (&status["balanced"], &status["ledger"]["dead"]),
            (&json!(true), &json!(episodes * poisoned)),
            "{status}"
        );
        let told = node
            .log()
            .matches("fails at this record while it answers others")
            .count();
        assert!(
            (1..=episodes).contains(&told),
            "told {told} times in {episodes} episodes"
        );
    }
}

/// The 99th percentile, in ms, of the times from a record's request to the POST that was taken.
fn p99(sent: &HashMap<String, Instant>, times: &HashMap<String, Vec<Instant>>) -> f64 {
    let took = |(id, sent): (&String, &Instant)| *times[id].last().unwrap() - *sent;
    let mut took: Vec<_> = sent.iter().map(took).collect();
    took.sort_unstable();
    took[(took.len() - 1) * 99 / 100].as_secs_f64() * 1000.0
}

/// Prints the medians of all rounds; `measured` has those of all positions for each round.
fn print_p99(what: &str, measured: &[f64]) {
    let rounds = measured.chunks(Position::ALL.len());
    let median = |of: &dyn Fn(&[f64]) -> f64| {
        let mut all: Vec<_> = rounds.clone().map(of).collect();
        all.sort_unstable_by(f64::total_cmp);
        all[all.len() / 2]
    };
    for (at, position) in Position::ALL.into_iter().enumerate() {
        let ms = median(&|round| round[at]);
        let ratio = median(&|round| round[at] / round[0]);
        println!("{what}, poison {position:?}: p99 {ms:.1} ms, {ratio:.2} x");
    }
}

/// The ids in a key, which the API gets as one.
fn ids_of(key: String) -> Vec<String> {
    key.split(',').map(str::to_owned).collect()
}

#[actix_rt::test]
async fn poison_holds_up_no_other_record_on_grpc() {
    poison_holds_up_no_other("grpc", grpc_variables).await;
}

#[actix_rt::test]
async fn poison_holds_up_no_other_record_on_nats() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    poison_holds_up_no_other("nats", || nats.variables()).await;
}

#[actix_rt::test]
async fn poison_holds_up_no_other_record_on_rabbitmq() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    poison_holds_up_no_other("rabbitmq", || rabbitmq.variables()).await;
}

#[actix_rt::test]
async fn poison_holds_up_no_other_record_on_pubsub() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    poison_holds_up_no_other("pubsub", || pubsub.variables()).await;
}

/// The API says nothing to some records, for as long as it may. Good ones come all the time.
#[actix_rt::test]
async fn records_that_the_api_hangs_on_are_parked() {
    let api = Api::start();
    poison(&api, Conduct::Hang);
    let variables = with(&grpc_variables(), &[("API__TIMEOUT", "1s")]);
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (over, watching) = watch_state(&node);
    let client = node.client();
    let is_over = Arc::clone(&over);
    let load = tokio::task::spawn_local(async move {
        let mut number = 0;
        while !is_over.load(Relaxed) {
            number += 1;
            let record = Bytes::from(body("well"));
            client
                .post("/", &format!("well-{number}"), record)
                .await
                .expect("an answer");
        }
    });
    api.wait_for(10, PATIENCE).await;
    post_all(&node, "a", &[true; 20]).await;
    eventually("all are parked", PATIENCE, async || {
        (node.status().await["ledger"]["parked"] == 20).then_some(())
    })
    .await;
    over.store(true, Relaxed);
    watching.await.expect("the API is up all the time");
    load.await.expect("the node takes records");
}

/// A node with `poisoned` records that are parked, and as many that arrived.
async fn parked(poisoned: usize) -> (Api, Node) {
    let api = Api::start();
    poison(&api, Conduct::Answer(500));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let places: Vec<_> = (0..2 * poisoned).map(|number| number % 2 == 0).collect();
    post_all(&node, "a", &places).await;
    // The pauses are long after the first two.
    eventually("they are parked for a while", PATIENCE, async || {
        let list = list(&node).await;
        let attempts = list.iter().map(|record| record["attempts"].as_u64());
        let is_late = attempts.clone().count() == poisoned && attempts.min() >= Some(Some(5));
        is_late.then_some(())
    })
    .await;
    (api, node)
}

async fn list(node: &Node) -> Vec<Value> {
    let (status, list) = node.get("/api/dead?parked=true").await.expect("an answer");
    assert_eq!(status, StatusCode::OK, "{list}");
    let mut list = list["parked"].as_array().expect("a list").clone();
    list.sort_by_key(|record| record["id"].to_string());
    list
}

#[actix_rt::test]
async fn parked_records_survive_a_kill_with_their_next_try_and_their_attempts() {
    let (api, mut node) = parked(4).await;
    let before = list(&node).await;
    node.killed_and_started().await;
    let found = list(&node).await;
    assert_eq!(found, before);
    let ledger = node.status().await["ledger"].clone();
    let of = |term: &str| ledger[term].as_u64().unwrap();
    assert_eq!(
        (of("recovered"), of("parked"), of("in_flight")),
        (4, 4, 0),
        "{ledger}"
    );
    let metrics = node.text("/metrics").await.1;
    assert!(metrics.contains("waypost_parked_records 4"), "{metrics}");
    api.behave(|_, _| Conduct::Answer(200));
    let ledger = node.all_ended(4, PATIENCE).await;
    assert_eq!(
        (&ledger["recovered"], &ledger["delivered"]),
        (&json!(4), &json!(4)),
        "{ledger}"
    );
    assert_eq!(node.status().await["balanced"], true);
}

#[actix_rt::test]
async fn an_operator_lists_replays_and_drops_parked_records() {
    let (api, node) = parked(3).await;
    let dead = async |arguments: &[&str]| {
        let admin = format!("http://127.0.0.1:{}", node.admin);
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        command
            .arg("dead")
            .args(arguments)
            .args(["--parked", "--admin", &admin]);
        let run = tokio::task::spawn_blocking(move || command.output());
        let output = run.await.unwrap().expect("it runs");
        String::from_utf8(output.stdout).expect("text")
    };
    let table = dead(&["list"]).await;
    assert!(
        table.contains("a-0/0") && table.contains("3 parked records"),
        "{table}"
    );
    let listed = list(&node).await;
    let (record, now_ms) = (&listed[0], unix_us() / 1000);
    for (member, value) in [
        ("id", json!("a-0/0")),
        ("lane", json!("grpc")),
        ("status", json!(500)),
        ("given_up", json!(false)),
        ("dead_ms", Value::Null),
    ] {
        assert_eq!(record[member], value, "{record}");
    }
    assert!(
        record["next_try_ms"].as_u64() > Some(now_ms - 60_000),
        "{record}"
    );
    assert!(node.dead().await.is_empty(), "they are no dead letters");

    assert_eq!(dead(&["drop", "a-0/0"]).await, "1 dropped\n");
    api.behave(|_, _| Conduct::Answer(200));
    let replayed = dead(&["replay", "--all", "--yes"]).await;
    assert_eq!(replayed, "2 replayed\n");
    eventually("the two arrive", PATIENCE, async || {
        (api.taken().len() == 5).then_some(())
    })
    .await;
    eventually("the ledger", PATIENCE, async || {
        let status = node.status().await;
        let ledger = &status["ledger"];
        let terms = [
            "accepted",
            "delivered",
            "dropped",
            "parked",
            "spooled",
            "in_flight",
        ];
        let terms = terms.map(|term| ledger[term].as_u64().unwrap());
        (terms == [6, 5, 1, 0, 0, 0]).then_some(())
    })
    .await;
    assert!(!api.taken().contains_key("a-0/0"));
}

/// With one record only, nobody can say that the API is up.
#[actix_rt::test]
async fn a_record_that_is_alone_is_not_parked() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(500));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", &[false]).await;
    eventually("the API counts as down", PATIENCE, async || {
        let status = node.status().await;
        assert_eq!(status["ledger"]["parked"], 0);
        (status["api"]["state"] == "down").then_some(())
    })
    .await;
    api.behave(|_, _| Conduct::Answer(200));
    node.at_rest(PATIENCE).await;
    assert_eq!(node.status().await["api"]["state"], "up");
}

#[actix_rt::test]
async fn a_parked_record_waits_for_as_long_as_the_api_asks() {
    let api = Api::start();
    let asked = Duration::from_secs(4);
    let times = poison(
        &api,
        Conduct::AnswerWith {
            status: 503,
            headers: vec![("Retry-After", asked.as_secs().to_string())],
            body: Vec::new(),
        },
    );
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut number = 0;
    eventually("it was tried three times", PATIENCE, async || {
        number += 1;
        post_all(&node, &format!("a{number}"), &[number == 1, false]).await;
        let tries = times.lock().unwrap().get("a1-0/0").map_or(0, Vec::len);
        (tries >= 3).then_some(())
    })
    .await;
    let tries = times.lock().unwrap()["a1-0/0"].clone();
    for pair in tries.windows(2) {
        let pause = pair[1] - pair[0];
        assert!(pause >= asked, "{pause:?}");
    }
    eventually("it is parked", PATIENCE, async || {
        (node.status().await["ledger"]["parked"] == 1).then_some(())
    })
    .await;
}

/// The API is away for longer than a record may take: the record is not given up before the API
/// has had it.
#[actix_rt::test]
async fn no_record_dies_of_its_age_while_the_api_is_away() {
    let mut api = Api::start();
    api.stop().await;
    let variables = with(&grpc_variables(), &[("API__GIVE_UP_AFTER", "1s")]);
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", &[false; 20]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(node.dead().await.is_empty());
    // Nor by an earlier run's age.
    node.killed_and_started().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(node.dead().await.is_empty());
    api.start_again();
    let ledger = node.all_ended(20, PATIENCE).await;
    assert_eq!(
        (&ledger["delivered"], &ledger["dead"]),
        (&json!(20), &json!(0)),
        "{ledger}"
    );
}

/// A stop finds a body that does not come, a parked record in its POST, and one of a lane.
#[actix_rt::test]
async fn a_stop_that_waits_for_everything_ends_in_its_time() {
    let (api, mut node) = parked(1).await;
    api.behave(|_, _| Conduct::Hang);
    let before = api.count();
    eventually("the parked record is tried", PATIENCE, async || {
        (api.count() > before).then_some(())
    })
    .await;
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
        Content-Length: 9\r\n\r\n{";
    let mut slow = TcpStream::connect(("127.0.0.1", node.ingest))
        .await
        .expect("it listens");
    slow.write_all(head).await.expect("room");
    let tried = api.count();
    post_all(&node, "b", &[false]).await;
    api.wait_for(tried + 1, PATIENCE).await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    let log = node.log();
    assert!(
        log.contains(" drained ") && !log.contains("cut off"),
        "{log}"
    );
}

/// The machine's clock is set forward by ten days while the node runs.
#[actix_rt::test]
async fn a_step_of_the_clock_ages_no_record() {
    let api = Api::start();
    poison(&api, Conduct::Answer(500));
    // A node that read the machine's clock for each time would meet the step among its scrapes.
    let fault = "clock-step=300*return(0)->return(864000)";
    let variables = with(&grpc_variables(), &[("API__GIVE_UP_AFTER", "1h")]);
    let node = Node::start_with_fault(&api.url(), &variables, fault).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", &[true, false, true]).await;
    for _ in 0..300 {
        node.text("/metrics").await;
    }
    eventually("both are tried again", PATIENCE, async || {
        let attempts = list(&node)
            .await
            .iter()
            .all(|record| record["attempts"].as_u64() > Some(4));
        let ledger = &node.status().await["ledger"];
        assert_eq!(ledger["dead"], 0, "{ledger}");
        (attempts && ledger["parked"] == 2).then_some(())
    })
    .await;
}

/// The machine starts again with its clock a year behind: what is on disk is not of the future.
#[actix_rt::test]
async fn a_clock_that_was_set_back_across_a_restart_keeps_no_record_waiting() {
    let api = Api::start();
    poison(&api, Conduct::Answer(500));
    let variables = with(&grpc_variables(), &[("API__GIVE_UP_AFTER", "8s")]);
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", &[true, false, true]).await;
    eventually("two are parked", PATIENCE, async || {
        (node.status().await["ledger"]["parked"] == 2).then_some(())
    })
    .await;
    node.plant("clock-step=return(-31536000)");
    node.killed_and_started().await;
    eventually("both are given up", PATIENCE, async || {
        (node.dead().await.len() == 2).then_some(())
    })
    .await;
}

/// A hundred thousand parked records: the node reads few of them at a time.
#[actix_rt::test]
async fn many_parked_records_take_no_memory() {
    const MANY: usize = 100_000;
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), 1 << 30).unwrap();
    let origin = Some(Origin::now("earlier".into()));
    let reason = DeathReason {
        lane: "grpc".into(),
        status: 500,
        attempts: 3,
        ..DeathReason::default()
    };
    let due_us = unix_us() + 300_000_000;
    for thousand in 0..MANY / 1000 {
        let entries = (0..1000).map(|number| {
            let record = Record {
                id: format!("{thousand}-{number}").into(),
                body: body(POISON).into(),
                trace: None,
                origin: origin.clone(),
                api: None,
                event: None,
            };
            let mut entry = Entry::new(&record, Some(reason.clone()));
            entry.parked = Some(Parked {
                due_us,
                pauses: 6,
                tag: "GRPC".into(),
                proven: true,
            });
            let spool = spool.clone();
            async move { spool.put(Queue::Parked(5), &entry).await.unwrap() }
        });
        join_all(entries).await;
    }
    spool.close().await;
    drop(spool);
    let api = Api::start();
    let data = folder.path().to_str().unwrap();
    let usual = Node::start(&api.url(), &grpc_variables()).await;
    let node = Node::start(
        &api.url(),
        &with(&grpc_variables(), &[("SPOOL__DIR", data)]),
    )
    .await;
    for node in [&usual, &node] {
        node.lane_is("grpc", "up", PATIENCE).await;
        post_all(node, "a", &[false; 500]).await;
    }
    api.wait_for(1000, PATIENCE).await;
    assert_eq!(node.status().await["ledger"]["parked"], MANY);
    let grown = node.memory().saturating_sub(usual.memory());
    assert!(grown < 8 << 20, "{grown} bytes more");
}
