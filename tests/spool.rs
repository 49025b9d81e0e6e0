//! The disk of a node, seen from outside: records that wait, records that the gRPC lane carries,
//! and dead letters.

use std::{process::Command, time::Duration};

use awc::http::StatusCode;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::{
    ingest,
    support::{
        api::{Api, Conduct},
        eventually,
        lanes::{Lane as _, Nats, grpc_variables},
        node::{Node, PATIENCE},
        rig::Rig as _,
        traffic,
    },
};

const RECORDS: usize = 50;

fn with(variables: &[(String, String)], more: &[(&str, &str)]) -> Vec<(String, String)> {
    let more = more
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    variables.iter().cloned().chain(more).collect()
}

/// Posts so many records, all at once; their paths.
async fn post_all(node: &Node, prefix: &str, records: usize) -> Vec<Value> {
    let all = traffic();
    let posts = (0..records).map(|number| {
        let client = node.client();
        let record = all[number].clone();
        async move {
            client
                .post("/", &format!("{prefix}-{number}"), record)
                .await
                .expect("an answer")
        }
    });
    let answers = join_all(posts).await;
    assert!(
        answers
            .iter()
            .all(|(status, _)| *status == StatusCode::ACCEPTED),
        "{answers:?}"
    );
    answers
        .into_iter()
        .map(|(_, body)| body["path"].clone())
        .collect()
}

async fn kill(node: &mut Node) {
    node.signal("KILL");
    node.ended(PATIENCE).await;
}

#[actix_rt::test]
async fn with_ack_on_disk_a_record_is_there_before_its_receipt_leaves() {
    let mut api = Api::start();
    api.stop().await;
    let mut node = Node::start(
        &api.url(),
        &with(&grpc_variables(), &[("INGEST__ACK", "disk")]),
    )
    .await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert!(
        post_all(&node, "a", RECORDS)
            .await
            .iter()
            .all(|path| path == "GRPC")
    );
    kill(&mut node).await;
    api.start_again();
    node.start_again().await;
    api.wait_for(RECORDS, PATIENCE).await;
    let ledger = node.all_ended(RECORDS, PATIENCE).await;
    assert_eq!(
        (&ledger["accepted"], &ledger["delivered"]),
        (&json!(0), &ledger["recovered"]),
        "{ledger}"
    );
    assert_eq!(post_all(&node, "b", RECORDS).await.len(), RECORDS);
    api.wait_for(2 * RECORDS, PATIENCE).await;
    node.all_ended(2 * RECORDS, PATIENCE).await;
    assert_eq!(api.taken().len(), 2 * RECORDS);
}

#[actix_rt::test]
async fn what_the_grpc_lane_carries_survives_a_kill() {
    let mut api = Api::start();
    api.stop().await;
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert!(
        post_all(&node, "a", RECORDS)
            .await
            .iter()
            .all(|path| path == "GRPC")
    );
    // A 2xx may come a moment before its count.
    eventually("all are counted", PATIENCE, async || {
        let ledger = node.status().await["ledger"].clone();
        (ledger["accepted"] == RECORDS && ledger["in_flight"] == RECORDS).then_some(())
    })
    .await;
    for _ in 0..3 {
        kill(&mut node).await;
        node.start_again().await;
        let ledger = node.status().await["ledger"].clone();
        assert_eq!(
            (&ledger["recovered"], &ledger["in_flight"]),
            (&json!(RECORDS), &json!(RECORDS)),
            "{ledger}"
        );
    }
    api.start_again();
    api.wait_for(RECORDS, PATIENCE).await;
    let ledger = node.all_ended(RECORDS, PATIENCE).await;
    assert_eq!(
        (&ledger["recovered"], &ledger["delivered"]),
        (&json!(RECORDS), &json!(RECORDS)),
        "{ledger}"
    );
    assert_eq!(api.taken().len(), RECORDS);
}

#[actix_rt::test]
async fn what_the_grpc_lane_carries_goes_on_when_the_lane_is_restarted() {
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert!(
        post_all(&node, "a", RECORDS)
            .await
            .iter()
            .all(|path| path == "GRPC")
    );
    assert_eq!(node.order("grpc", "restart").await, StatusCode::ACCEPTED);
    node.lane_is("grpc", "up", PATIENCE).await;
    api.start_again();
    api.wait_for(RECORDS, PATIENCE).await;
    node.at_rest(PATIENCE).await;
    assert_eq!(api.taken().len(), RECORDS);
}

/// The API refuses every record, at length.
async fn refusing() -> (Api, Node) {
    let api = Api::start();
    refuse(&api);
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", 3).await;
    eventually("three dead letters", PATIENCE, async || {
        (node.dead().await.len() == 3).then_some(())
    })
    .await;
    (api, node)
}

fn refuse(api: &Api) {
    api.behave(|_, _| Conduct::AnswerWith {
        status: 422,
        headers: Vec::new(),
        body: vec![b'n'; 2048],
    });
}

#[actix_rt::test]
async fn a_dead_letter_says_why_survives_a_kill_and_can_be_replayed_or_dropped() {
    let (api, mut node) = refusing().await;
    let (_, list) = node.get("/api/dead").await.expect("an answer");
    assert_eq!(list["total"], 3);
    let mut letters = list["dead"].as_array().unwrap().iter();
    let letter = letters.find(|letter| letter["id"] == "a-1").unwrap();
    for (member, value) in [
        ("lane", json!("grpc")),
        ("status", json!(422)),
        ("answer", json!("n".repeat(1024))),
        ("attempts", json!(1)),
        ("given_up", json!(false)),
        ("record", json!(String::from_utf8_lossy(&traffic()[1]))),
    ] {
        assert_eq!(letter[member], value, "{member}");
    }
    assert!(
        letter["accepted_ms"].as_u64() > Some(0)
            && letter["dead_ms"].as_u64() >= letter["accepted_ms"].as_u64()
    );
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["accepted"], &ledger["dead"]),
        (&json!(3), &json!(3)),
        "{ledger}"
    );

    kill(&mut node).await;
    node.start_again().await;
    let ledger = node.all_ended(3, PATIENCE).await;
    assert_eq!(
        (&ledger["recovered"], &ledger["dead"]),
        (&json!(3), &json!(3)),
        "{ledger}"
    );
    api.behave(|_, _| Conduct::Answer(200));
    let (status, answer) = node
        .tell("/api/dead/replay", json!({"ids": ["a-1", "nobody"]}))
        .await;
    assert_eq!((status, &answer["replayed"]), (StatusCode::OK, &json!(1)));
    eventually("the replayed record arrives", PATIENCE, async || {
        api.taken().get("a-1").copied()
    })
    .await;
    let (status, answer) = node.tell("/api/dead/drop", json!({"ids": ["a-0"]})).await;
    assert_eq!((status, &answer["dropped"]), (StatusCode::OK, &json!(1)));
    assert_eq!(node.dead().await, ["a-2".to_owned()].into());
    eventually("the ledger", PATIENCE, async || {
        let status = node.status().await;
        let expected = json!({
            "accepted": 0, "recovered": 3, "delivered": 1, "handed_over": 0, "dead": 1, "dropped": 1,
        "spooled": 0, "parked": 0, "in_flight": 0, "missing": 0,
            "redelivered": 0
        });
        (status["ledger"] == expected && status["balanced"] == true).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn a_drop_names_ids_or_all_dead_letters() {
    let (_api, node) = refusing().await;
    for body in [
        json!({}),
        json!({"all": false}),
        json!({"ids": [], "all": true}),
        json!({"every": true}),
    ] {
        assert_eq!(
            node.tell("/api/dead/drop", body.clone()).await.0,
            StatusCode::BAD_REQUEST,
            "{body}"
        );
    }
    assert_eq!(node.dead().await.len(), 3, "nothing was dropped");
}

/// The node is killed in the middle of a replay: after the records wait for a lane, before their
/// dead letters are deleted.
#[actix_rt::test]
async fn a_replay_that_is_cut_short_loses_nothing() {
    let (api, mut node) = refusing().await;
    node.plant("spool-replay=sleep(60000)");
    kill(&mut node).await;
    node.start_again().await;
    let before = node.spool_bytes();
    let replay = node.tell("/api/dead/replay", json!({"all": true}));
    tokio::select! {
        answer = replay => panic!("it was not cut short: {answer:?}"),
        () = eventually("the letters wait for a lane", PATIENCE, async || (node.spool_bytes() > before).then_some(())) => {}
    }
    api.behave(|_, _| Conduct::Answer(200));
    node.plant("");
    kill(&mut node).await;
    node.start_again().await;
    eventually("all arrive", PATIENCE, async || {
        (api.taken().len() == 3).then_some(())
    })
    .await;
    assert_eq!(node.dead().await.len(), 3, "they were not struck out");
    assert_eq!(
        node.tell("/api/dead/drop", json!({"all": true})).await.1["dropped"],
        3
    );
    assert_eq!(node.status().await["ledger"]["dead"], 0);
}

#[actix_rt::test]
async fn a_record_that_the_api_does_not_take_in_time_is_given_up() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(500));
    let node = Node::start(
        &api.url(),
        &with(&grpc_variables(), &[("API__GIVE_UP_AFTER", "2s")]),
    )
    .await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", 3).await;
    eventually("three dead letters", PATIENCE, async || {
        (node.dead().await.len() == 3).then_some(())
    })
    .await;
    let (_, list) = node.get("/api/dead").await.expect("an answer");
    let letter = &list["dead"][0];
    assert_eq!(letter["given_up"], true, "{letter}");
    assert!(
        letter["dead_ms"].as_u64().unwrap() >= letter["accepted_ms"].as_u64().unwrap() + 2000,
        "{letter}"
    );
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["dead"], &ledger["in_flight"]),
        (&json!(3), &json!(0)),
        "{ledger}"
    );
}

#[actix_rt::test]
async fn a_dead_letter_that_cannot_be_written_is_not_acked() {
    let api = Api::start();
    refuse(&api);
    let node = Node::start_with_fault(&api.url(), &grpc_variables(), "spool-write=return").await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // No disk and no 2xx from the API: nobody has it.
    let (status, _) = node
        .post("/", "a", traffic()[0].clone())
        .await
        .expect("an answer");
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(node.dead().await.is_empty());
}

#[actix_rt::test]
async fn a_feeder_that_panics_is_started_again_and_leaves_nothing_behind() {
    let api = Api::start();
    let variables = with(&grpc_variables(), &[("INGEST__ACK", "disk")]);
    let node = Node::start_with_fault(&api.url(), &variables, "feed=1*panic").await;
    post_all(&node, "a", RECORDS).await;
    api.wait_for(RECORDS, PATIENCE).await;
    node.at_rest(PATIENCE).await;
    assert_eq!(api.taken().len(), RECORDS);
}

#[actix_rt::test]
async fn the_command_line_lists_replays_and_drops_dead_letters() {
    let (api, node) = refusing().await;
    let dead = async |admin: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        command.arg("dead").args(arguments).args(["--admin", admin]);
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .unwrap()
            .expect("it runs");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    let (code, table, _) = dead(admin, &["list"]).await;
    assert_eq!(code, Some(0));
    assert!(
        table.contains("a-0") && table.contains("422") && table.contains("3 dead letters"),
        "{table}"
    );
    let (_, list, _) = dead(admin, &["list", "--json", "--limit", "2"]).await;
    assert_eq!(
        serde_json::from_str::<Value>(&list).unwrap()["dead"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        dead(admin, &["replay"]).await.0,
        Some(2),
        "neither ids nor --all"
    );
    assert_eq!(dead(admin, &["drop", "a-0"]).await.1, "1 dropped\n");
    api.behave(|_, _| Conduct::Answer(200));
    let (code, printed, told) = dead(admin, &["replay", "--all"]).await;
    assert_eq!((code, &*printed), (Some(1), ""), "no --yes: {told}");
    let (_, printed, _) = dead(admin, &["replay", "--all", "--yes"]).await;
    assert_eq!(printed, "2 replayed\n");
    eventually("both arrive", PATIENCE, async || {
        (api.taken().len() == 2).then_some(())
    })
    .await;
    // Not a node, and nobody.
    api.behave(|_, _| Conduct::Answer(502));
    for (admin, why) in [
        (&*api.url(), "status 502 Bad Gateway\n"),
        ("http://127.0.0.1:9", "cannot connect"),
    ] {
        let (code, _, told) = dead(admin, &["drop", "--all", "--yes"]).await;
        assert_eq!(code, Some(1), "{told}");
        assert!(told.contains(admin) && told.contains(why), "{told}");
    }
}

#[actix_rt::test]
async fn a_second_node_on_the_same_folder_is_told_so() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
    command
        .args([
            "run",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(node.data());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .expect("it runs");
    let why = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1), "{why}");
    assert!(
        why.contains("another process uses") && why.contains(&node.data().display().to_string()),
        "{why}"
    );
}

/// Records that no lane takes wait for the lane that the client has named, and for no other.
#[actix_rt::test]
async fn a_pinned_record_waits_for_its_lane() {
    let api = Api::start();
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let node = Node::start(
        &api.url(),
        &with(&grpc_variables(), &[("LANES__NATS__URL", &nobody)]),
    )
    .await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, body) = node
        .post("/nats", "pinned", traffic()[0].clone())
        .await
        .expect("an answer");
    assert_eq!(
        (status, &body["path"]),
        (StatusCode::ACCEPTED, &json!("spool"))
    );
    post_all(&node, "a", 3).await;
    api.wait_for(3, PATIENCE).await;
    // Long enough for the feeder to have tried more than once.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!api.taken().contains_key("pinned"));
    assert_eq!(node.status().await["ledger"]["spooled"], 1);
}

#[actix_rt::test]
async fn a_record_that_no_lane_takes_waits_however_old_it_is() {
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let variables = with(
        &[],
        &[("LANES__NATS__URL", &nobody), ("API__GIVE_UP_AFTER", "1s")],
    );
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    post_all(&node, "a", 2).await;
    // Long enough for the feeder to have tried more than once after that.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(node.dead().await.is_empty(), "no API has had them");
    let ledger = node.status().await["ledger"].clone();
    assert_eq!(
        (&ledger["accepted"], &ledger["spooled"]),
        (&json!(2), &json!(2)),
        "{ledger}"
    );
}

#[actix_rt::test]
async fn a_record_whose_dead_letter_cannot_be_written_goes_on_waiting() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(500));
    let variables = with(&grpc_variables(), &[("API__GIVE_UP_AFTER", "1s")]);
    // The record itself gets to the disk.
    let fault = "spool-write=1*off->return";
    let mut node = Node::start_with_fault(&api.url(), &variables, fault).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_all(&node, "a", 1).await;
    eventually("the letter was tried", PATIENCE, async || {
        node.log()
            .contains("cannot write a dead letter")
            .then_some(())
    })
    .await;
    assert!(node.dead().await.is_empty());
    node.plant("");
    node.killed_and_started().await;
    eventually("a dead letter", PATIENCE, async || {
        (node.dead().await.len() == 1).then_some(())
    })
    .await;
    node.all_ended(1, PATIENCE).await;
}

#[actix_rt::test]
async fn a_full_spool_without_a_lane_is_not_ready() {
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let variables = with(
        &[],
        &[("LANES__NATS__URL", &nobody), ("SPOOL__MAX", "1MiB")],
    );
    let node = Node::start("http://127.0.0.1:9/", &variables).await;
    assert_eq!(node.get("/readyz").await.unwrap().0, StatusCode::OK);
    let big = String::from_utf8_lossy(&traffic()[0]).replacen(
        '{',
        &format!("{{\"x\":\"{}\",", "x".repeat(100_000)),
        1,
    );
    for (size, record) in [("big", big.into()), ("small", traffic()[0].clone())] {
        let mut taken = 0;
        while node
            .post("/", &format!("{size}-{taken}"), record.clone())
            .await
            .expect("an answer")
            .0
            == StatusCode::ACCEPTED
        {
            taken += 1;
        }
        assert!(taken > 5, "{taken} {size} ones");
    }
    assert_eq!(
        node.get("/readyz").await.unwrap().0,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[actix_rt::test]
async fn what_is_no_record_in_a_broker_becomes_a_dead_letter() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let variables = nats.variables();
    let subject = variables
        .iter()
        .find(|(key, _)| key == "LANES__NATS__SUBJECT")
        .expect("it is set")
        .1
        .clone();
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let client = async_nats::connect(nats.address())
        .await
        .expect("the server answers");
    client.publish(subject, "hello".into()).await.unwrap();
    client.flush().await.unwrap();
    eventually("a dead letter", PATIENCE, async || {
        (node.dead().await.len() == 1).then_some(())
    })
    .await;
    assert_eq!(
        node.get("/api/dead").await.unwrap().1["dead"][0]["record"],
        "hello"
    );
    node.all_ended(1, PATIENCE).await;
    assert_eq!(api.count(), 0);
}

/// The gRPC lane to the node itself confirms what is on its disk, or what the API has.
#[actix_rt::test]
async fn a_node_without_a_place_on_disk_and_without_an_api_is_not_ready() {
    let mut api = Api::start();
    api.stop().await;
    let small = [("SPOOL__MAX".to_owned(), "1MiB".to_owned())];
    let node = Node::start(&api.url(), &[&grpc_variables()[..], &small].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // Then not even a small one fits.
    for length in [100_000, 1000] {
        let record = serde_json::json!({
            "name": "n".repeat(length), "location": "b", "age": 1, "infectedtype": "c", "state": "d"
        });
        let mut number = 0;
        eventually("it is full", PATIENCE, async || {
            number += 1;
            let key = format!("fill-{length}-{number}");
            let (status, _) = node.post("/", &key, record.to_string().into()).await?;
            (status == StatusCode::SERVICE_UNAVAILABLE).then_some(())
        })
        .await;
    }
    eventually("it says so", PATIENCE, async || {
        (node.get("/readyz").await?.0 == StatusCode::SERVICE_UNAVAILABLE).then_some(())
    })
    .await;
    api.start_again();
    eventually("it is ready", PATIENCE, async || {
        (node.get("/readyz").await?.0 == StatusCode::OK).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn a_data_folder_that_is_removed_is_a_503_until_it_is_back_and_loses_nothing() {
    let mut node = Node::start("http://127.0.0.1:9/", &ingest::nobody()).await;
    let record = || traffic()[0].clone();
    let (status, _) = node.post("/", "before", record()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED);
    let folder = node.data().to_owned();
    std::fs::remove_dir_all(&folder).unwrap();
    let (status, body) = node.post("/", "gone", record()).await.unwrap();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    let (status, _) = node.get("/readyz").await.unwrap();
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    let (_, metrics) = node.text("/metrics").await;
    assert!(metrics.contains("\nwaypost_spool_refuses 1\n"), "{metrics}");
    std::fs::create_dir(&folder).unwrap();
    eventually("the node takes records again", PATIENCE, async || {
        let (status, _) = node.post("/", "after", record()).await?;
        (status == StatusCode::ACCEPTED).then_some(())
    })
    .await;
    eventually("the node is ready", PATIENCE, async || {
        (node.get("/readyz").await?.0 == StatusCode::OK).then_some(())
    })
    .await;
    let log = node.log();
    let told = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(told("the spool takes no records"), 1, "{log}");
    assert_eq!(told("the spool takes records again"), 1, "{log}");
    node.killed_and_started().await;
    assert_eq!(node.status().await["ledger"]["recovered"], 2);
    // The keys that came after the loss are known too.
    assert_eq!(
        node.post("/", "after", record()).await.unwrap().1["path"],
        "spool"
    );
    assert_eq!(node.status().await["ledger"]["accepted"], 0);
}

#[actix_rt::test]
async fn a_disk_that_stalls_is_told_and_holds_up_no_probe() {
    // The folder is synced twice, then the first record is, and the second one stalls.
    let fault = "spool-sync=3*off->1*sleep(15000)->off";
    let node = Node::start_with_fault("http://127.0.0.1:9/", &ingest::nobody(), fault).await;
    let post = |key| node.post("/", key, traffic()[0].clone());
    assert_eq!(post("a").await.unwrap().0, StatusCode::ACCEPTED);
    let oldest = "\nwaypost_oldest_waiting_seconds ";
    assert!(node.text("/metrics").await.1.contains(oldest));
    let watch = async {
        let stalled = eventually("the stall is told", PATIENCE, async || {
            let metrics = tokio::time::timeout(Duration::from_secs(5), node.text("/metrics"));
            let (_, text) = metrics.await.expect("a scrape waits for no disk");
            text.contains("\nwaypost_spool_refuses 1\n").then_some(text)
        });
        let metrics = stalled.await;
        assert!(!metrics.contains(oldest), "{metrics}");
        assert_eq!(node.status().await["spool"]["refuses"], true);
        let ready = node.get("/readyz").await.unwrap().0;
        assert_eq!(ready, StatusCode::SERVICE_UNAVAILABLE);
        eventually("the log tells it", PATIENCE, async || {
            node.log().contains("the spool's disk stalls").then_some(())
        })
        .await;
    };
    tokio::join!(post("b"), watch);
    eventually("the disk answers again", PATIENCE, async || {
        let is_ready = node.get("/readyz").await?.0 == StatusCode::OK;
        (is_ready && node.log().contains("the spool's disk answers again")).then_some(())
    })
    .await;
    assert!(node.text("/metrics").await.1.contains(oldest));
    assert!(!node.log().contains("the ledger does not balance"));
}
