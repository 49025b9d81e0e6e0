//! `ack = "durable"`: where a lane's confirm would not survive a power cut, a copy on the node's
//! disk does.

use std::{fs, time::Duration};

use awc::http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, Pubsub, grpc_variables, through_proxy, value},
    node::{Node, PATIENCE},
    process::free_port,
    proxy::{Flow, Network},
    rig::Rig as _,
    traffic,
};

const RECORDS: usize = 40;

/// Posts [`RECORDS`] records, whose keys begin with `prefix`, and expects them on `path`.
async fn post_all(node: &Node, prefix: &str, path: &str) {
    for (number, record) in traffic().iter().take(RECORDS).enumerate() {
        let key = format!("{prefix}-{number}");
        let answer = node.post("/", &key, record.clone()).await;
        let (status, body) = answer.expect("an answer");
        assert_eq!(
            (status, &body["path"]),
            (StatusCode::ACCEPTED, &json!(path)),
            "{body}"
        );
    }
}

/// Waits until the lane has so many copies.
async fn kept(node: &Node, copies: usize) {
    let what = format!("{copies} copies are kept");
    eventually(&what, PATIENCE, async || {
        (node.lane("nats").await["kept"] == json!(copies)).then_some(())
    })
    .await;
}

/// Waits until `records` have ended, and expects that the API has had each, none more often than
/// twice, and that no copy is left.
async fn all_arrive(node: &Node, api: &Api, records: usize) -> Value {
    api.wait_for(records, PATIENCE).await;
    let ledger = node.all_ended(records, PATIENCE).await;
    assert_eq!(api.taken().len(), records);
    kept(node, 0).await;
    ledger
}

#[actix_rt::test]
async fn a_copy_stays_until_its_record_is_delivered() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    kept(&node, RECORDS).await;
    let (_, metrics) = node.text("/metrics").await;
    let line = format!("waypost_kept_copies{{lane=\"nats\"}} {RECORDS}");
    assert!(metrics.contains(&line), "{metrics}");
    let ledger = node.status().await["ledger"].clone();
    assert_eq!(
        (&ledger["in_flight"], &ledger["spooled"]),
        (&json!(RECORDS), &json!(0)),
        "{ledger}"
    );
    api.start_again();
    all_arrive(&node, &api, RECORDS).await;
    assert_eq!(api.count(), RECORDS, "each once");
}

#[actix_rt::test]
async fn a_copy_goes_when_its_record_becomes_a_dead_letter() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    eventually("all are dead letters", PATIENCE, async || {
        (node.dead().await.len() == RECORDS).then_some(())
    })
    .await;
    kept(&node, 0).await;
}

/// The node has noticed that its broker has lost records.
async fn are_published_again(node: &Node) {
    eventually("they are published again", PATIENCE, async || {
        let log = node.log();
        log.contains("they are published again").then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn records_that_a_broker_has_forgotten_are_published_again() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    nats.kill().await;
    nats.forget_all();
    nats.revive().await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "b", "NATS").await;
    api.start_again();
    let ledger = all_arrive(&node, &api, 2 * RECORDS).await;
    assert_eq!(ledger["recovered"], json!(0), "{ledger}");
    assert!(node.log().contains("they are published again"));
}

/// Nothing is published or pulled when the stream goes, so only a comparison finds it.
#[actix_rt::test]
async fn records_of_a_stream_that_is_deleted_while_the_api_is_away_are_published_again() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let variables = nats.variables();
    let stream = value(&variables, "LANES__NATS__STREAM");
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    // More than the node has in hand: it pulls no more.
    let many = 25 * RECORDS;
    let record = String::from_utf8(traffic()[0].to_vec()).expect("text");
    let batch = format!("[{}]", vec![record; many].join(","));
    let (status, body) = node.post("/", "a", batch.into()).await.expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    kept(&node, many).await;
    eventually("the API is down", PATIENCE, async || {
        (node.status().await["api"]["state"] == "down").then_some(())
    })
    .await;
    let client = async_nats::connect(nats.address())
        .await
        .expect("it answers");
    let operator = async_nats::jetstream::new(client);
    operator.delete_stream(stream).await.expect("it is there");
    are_published_again(&node).await;
    assert_eq!(node.status().await["api"]["state"], "down");
    api.start_again();
    let ledger = node.all_ended(many, PATIENCE).await;
    assert_eq!(
        (&ledger["missing"], &ledger["dead"]),
        (&json!(0), &json!(0)),
        "{ledger}"
    );
    assert_eq!(api.taken().len(), many);
}

/// Server and stream are the same then, but for the messages that came after the backup. A second
/// node could have taken those, so they are not missing; it was killed with some of them.
#[actix_rt::test]
async fn records_that_a_restored_stream_has_not_are_published_again() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let (proxy, variables) = through_proxy(nats.variables());
    let stream = value(&variables, "LANES__NATS__STREAM");
    let node = Node::start(&api.url(), &variables).await;
    let mut other = Node::start(&api.url(), &variables).await;
    for node in [&node, &other] {
        node.lane_is("nats", "up", PATIENCE).await;
    }
    post_all(&node, "a", "NATS").await;
    let backup = nats.back_up(stream).await;
    post_all(&node, "b", "NATS").await;
    proxy.set(Network {
        refuses: true,
        ..Network::WELL
    });
    proxy.cut();
    node.lane_is("nats", "backoff", PATIENCE).await;
    other.signal("KILL");
    other.ended(PATIENCE).await;
    nats.restore(stream, backup).await;
    proxy.set(Network::WELL);
    other.start_again().await;
    for node in [&node, &other] {
        node.lane_is("nats", "up", PATIENCE).await;
    }
    api.start_again();
    // Some come twice. What the killed node held comes after the ack wait of half a minute.
    eventually("each record arrives", 2 * PATIENCE, async || {
        (api.taken().len() == 2 * RECORDS).then_some(())
    })
    .await;
    let log = node.log();
    assert!(
        log.contains("the broker may have lost records: they are published again"),
        "{log}"
    );
}

/// The emulator keeps messages in memory.
#[actix_rt::test]
async fn records_that_an_emulator_has_forgotten_are_published_again() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &pubsub.variables()).await;
    node.lane_is("pubsub", "up", PATIENCE).await;
    let broker = node.lane("pubsub").await["broker"].clone();
    assert_eq!(broker["outlives_power_cut"], json!("no"));
    post_all(&node, "a", "PubSub").await;
    pubsub.kill().await;
    pubsub.revive().await;
    are_published_again(&node).await;
    api.start_again();
    api.wait_for(RECORDS, PATIENCE).await;
    node.all_ended(RECORDS, PATIENCE).await;
    assert_eq!(api.taken().len(), RECORDS);
}

#[actix_rt::test]
async fn records_that_a_broker_has_forgotten_while_the_node_was_dead_are_published_again() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let mut node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    node.signal("KILL");
    node.ended(PATIENCE).await;
    nats.kill().await;
    nats.forget_all();
    nats.revive().await;
    node.start_again().await;
    api.start_again();
    let ledger = all_arrive(&node, &api, RECORDS).await;
    assert_eq!(ledger["recovered"], json!(RECORDS), "{ledger}");
}

/// A node that ends by `signal`, and a stream that is put back meanwhile, without its last messages.
async fn a_start_publishes_again_what_the_restored_stream_lacks(signal: &str) {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let variables = nats.variables();
    let stream = value(&variables, "LANES__NATS__STREAM");
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    let backup = nats.back_up(stream).await;
    post_all(&node, "b", "NATS").await;
    if signal == "KILL" {
        // A lane writes it every 19 s.
        eventually(
            "the last message's number is on disk",
            PATIENCE,
            async || {
                let confirmer = fs::read_to_string(node.data().join("kept_nats.broker")).ok()?;
                confirmer
                    .ends_with(&format!("\n{}", 2 * RECORDS))
                    .then_some(())
            },
        )
        .await;
    }
    node.signal(signal);
    node.ended(PATIENCE).await;
    nats.restore(stream, backup).await;
    node.start_again().await;
    node.lane_is("nats", "up", PATIENCE).await;
    api.start_again();
    all_arrive(&node, &api, 2 * RECORDS).await;
    let log = node.log();
    assert!(
        log.contains("the broker may have lost records: they are published again"),
        "{log}"
    );
}

#[actix_rt::test]
async fn a_start_notices_a_restored_stream_after_a_stop() {
    a_start_publishes_again_what_the_restored_stream_lacks("TERM").await;
}

#[actix_rt::test]
async fn a_start_notices_a_restored_stream_after_a_kill() {
    a_start_publishes_again_what_the_restored_stream_lacks("KILL").await;
}

/// Restarts a node by `signal` whose broker has [`RECORDS`], as so many messages or as bundles, and
/// expects that it publishes none of them again.
async fn a_restart_publishes_nothing_twice(signal: &str, bundle: usize) {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let mut variables = nats.variables();
    variables.push(("LANES__NATS__BUNDLE".to_owned(), bundle.to_string()));
    let mut node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let records: Vec<_> = traffic().iter().take(RECORDS).cloned().collect();
    let batch = [b"[", &*records.join(&b","[..]), b"]"].concat();
    let answer = node.post("/", "a", batch.into()).await.expect("an answer");
    assert_eq!(answer.0, StatusCode::ACCEPTED, "{}", answer.1);
    for _ in 0..2 {
        node.signal(signal);
        node.ended(PATIENCE).await;
        node.start_again().await;
        node.lane_is("nats", "up", PATIENCE).await;
        kept(&node, RECORDS).await;
    }
    api.start_again();
    api.wait_for(RECORDS, PATIENCE).await;
    let ledger = node.all_ended(RECORDS, PATIENCE).await;
    assert_eq!(api.taken().len(), RECORDS);
    assert_eq!(api.count(), RECORDS, "each once");
    assert_eq!(ledger["redelivered"], json!(0), "{ledger}");
    assert!(!node.log().contains("they are published again"));
}

#[actix_rt::test]
async fn a_stop_and_a_start_publish_no_message_twice() {
    a_restart_publishes_nothing_twice("TERM", 1).await;
}

#[actix_rt::test]
async fn a_stop_and_a_start_publish_no_bundle_twice() {
    a_restart_publishes_nothing_twice("TERM", 16).await;
}

#[actix_rt::test]
async fn a_kill_and_a_start_publish_no_message_twice() {
    a_restart_publishes_nothing_twice("KILL", 1).await;
}

#[actix_rt::test]
async fn a_kill_and_a_start_publish_no_bundle_twice() {
    a_restart_publishes_nothing_twice("KILL", 16).await;
}

#[actix_rt::test]
async fn a_copy_of_a_lane_that_is_gone_goes_by_another() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let mut node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    node.signal("KILL");
    node.ended(PATIENCE).await;
    api.start_again();
    let folder = node.data().to_str().expect("a plain path").to_owned();
    let variables = [grpc_variables(), vec![("SPOOL__DIR".to_owned(), folder)]].concat();
    let other = Node::start(&api.url(), &variables).await;
    api.wait_for(RECORDS, PATIENCE).await;
    other.all_ended(RECORDS, PATIENCE).await;
    assert_eq!(api.count(), RECORDS, "each once");
}

#[actix_rt::test]
async fn a_full_disk_refuses_what_a_power_cut_could_take() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let api = Api::start();
    let mut node = Node::start(&api.url(), &nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.plant("spool-write=return");
    node.signal("KILL");
    node.ended(PATIENCE).await;
    node.start_again().await;
    node.lane_is("nats", "up", PATIENCE).await;
    let answer = node.post("/", "a", traffic()[0].clone()).await;
    let (status, body) = answer.expect("an answer");
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    let (status, _) = node.get("/readyz").await.expect("an answer");
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}

/// The lane's verdict on its broker, with its warnings.
async fn verdict(nats: &mut Nats, more: &[(&str, &str)]) -> (String, String) {
    let api = Api::start();
    let mut variables = nats.variables();
    let more = more
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    variables.extend(more);
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    let broker = node.lane("nats").await["broker"].clone();
    let verdict = broker["outlives_power_cut"].as_str().expect("a verdict");
    let (_, metrics) = node.text("/metrics").await;
    let is_yes = u64::from(verdict == "yes");
    let line = format!("waypost_lane_outlives_power_cut{{lane=\"nats\"}} {is_yes}\n");
    assert!(metrics.contains(&line), "{metrics}");
    (verdict.to_owned(), broker["warnings"].to_string())
}

#[actix_rt::test]
async fn a_lane_knows_what_a_confirm_of_its_server_is_worth() {
    const MONITOR: &str = "LANES__NATS__MONITOR";
    const SYNC: &str = "LANES__NATS__SYNC";
    let port = free_port().to_string();
    let monitor = format!("http://127.0.0.1:{port}");
    let Some(mut old) = Nats::with(&["-m", &port]).await else {
        return;
    };
    let (verdict_of, why) = verdict(&mut old, &[]).await;
    assert_eq!(verdict_of, "unknown");
    assert!(why.contains("no monitor is named"), "{why}");
    let (verdict_of, why) = verdict(&mut old, &[(MONITOR, &monitor)]).await;
    assert_eq!(verdict_of, "no", "{why}");
    assert!(why.contains("syncs its files every 120s"), "{why}");
    let (verdict_of, why) = verdict(&mut old, &[(SYNC, "always")]).await;
    assert_eq!((verdict_of.as_str(), why.as_str()), ("yes", "[]"));
    let (verdict_of, why) = verdict(&mut old, &[(SYNC, "replicated")]).await;
    assert_eq!(verdict_of, "unknown");
    assert!(why.contains("3 replicas, and the stream has 1"), "{why}");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("nats.conf");
    fs::write(&file, "jetstream { sync_interval: always }").expect("the folder is ours");
    let port = free_port().to_string();
    let arguments = ["-m", &port, "-c", file.to_str().expect("a plain path")];
    let Some(mut current) = Nats::current(&arguments).await else {
        return;
    };
    let monitor_of_current = format!("http://127.0.0.1:{port}");
    let answer = verdict(&mut current, &[(MONITOR, &monitor_of_current)]).await;
    assert_eq!(answer, ("yes".to_owned(), "[]".to_owned()));
    let (verdict_of, why) = verdict(&mut current, &[(MONITOR, &monitor)]).await;
    assert_eq!(verdict_of, "unknown");
    assert!(why.contains("of another server"), "{why}");
}

/// An account that imports a service of the system account needs no monitoring address.
#[actix_rt::test]
async fn a_lane_asks_the_system_account_what_a_confirm_is_worth() {
    const ACCOUNTS: &str = r#"
        jetstream { sync_interval: always }
        system_account: SYS
        accounts {
          SYS { exports: [ { service: "$SYS.REQ.SERVER.*.JSZ" } ] }
          APP {
            jetstream: enabled
            users: [ { user: app, password: app } ]
            imports: [ { service: { account: SYS, subject: "$SYS.REQ.SERVER.*.JSZ" } } ]
          }
        }
        no_auth_user: app
    "#;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("nats.conf");
    fs::write(&file, ACCOUNTS).expect("the folder is ours");
    let arguments = ["-c", file.to_str().expect("a plain path")];
    let Some(mut nats) = Nats::current(&arguments).await else {
        return;
    };
    let answer = verdict(&mut nats, &[]).await;
    assert_eq!(answer, ("yes".to_owned(), "[]".to_owned()));
}

/// Three servers with the same stream: no sync is needed if a power cut spares most of them.
#[actix_rt::test]
async fn the_word_that_a_stream_is_replicated_counts_with_three_replicas() {
    let ports = [free_port(), free_port(), free_port()];
    let addresses = ports.map(|port| format!("nats://127.0.0.1:{port}"));
    let routes = addresses.join(",");
    let mut servers = Vec::new();
    for (number, address) in addresses.iter().enumerate() {
        let name = format!("server-{number}");
        let arguments = [
            ["-n", &name],
            ["--cluster_name", "three"],
            ["--cluster", address],
            ["--routes", &routes],
        ];
        let Some(server) = Nats::with(arguments.as_flattened()).await else {
            return;
        };
        servers.push(server);
    }
    let more = [
        ("LANES__NATS__REPLICAS", "3"),
        ("LANES__NATS__SYNC", "replicated"),
    ];
    let answer = verdict(&mut servers[0], &more).await;
    assert_eq!(answer, ("yes".to_owned(), "[]".to_owned()));
}

#[actix_rt::test]
async fn a_copy_goes_once_its_server_has_synced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("nats.conf");
    fs::write(&file, "jetstream { sync_interval: \"1s\" }").expect("the folder is ours");
    let port = free_port().to_string();
    let arguments = ["-m", &port, "-c", file.to_str().expect("a plain path")];
    let Some(mut nats) = Nats::current(&arguments).await else {
        return;
    };
    let mut api = Api::start();
    api.stop().await;
    let mut variables = nats.variables();
    variables.push((
        "LANES__NATS__MONITOR".to_owned(),
        format!("http://127.0.0.1:{port}"),
    ));
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    kept(&node, RECORDS).await;
    eventually("the copies are gone", Duration::from_mins(1), async || {
        (node.lane("nats").await["kept"] == json!(0)).then_some(())
    })
    .await;
    assert_eq!(node.status().await["ledger"]["in_flight"], json!(RECORDS));
    api.start_again();
    all_arrive(&node, &api, RECORDS).await;
}

/// The server confirms, but much later than `publish_timeout`.
#[actix_rt::test]
async fn a_lane_that_is_too_slow_leaves_the_record_to_the_disk() {
    let Some(mut nats) = Nats::with(&[]).await else {
        return;
    };
    let (proxy, mut variables) = through_proxy(nats.variables());
    variables.push(("ROUTER__PUBLISH_TIMEOUT".to_owned(), "1s".to_owned()));
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post_all(&node, "a", "NATS").await;
    proxy.set(Network {
        to_client: Flow::Delays(Duration::from_secs(4)),
        ..Network::WELL
    });
    let answer = node.post("/", "slow", traffic()[0].clone()).await;
    let (status, body) = answer.expect("an answer");
    assert_eq!(
        (status, &body["path"]),
        (StatusCode::ACCEPTED, &json!("spool")),
        "{body}"
    );
    proxy.set(Network::WELL);
    all_arrive(&node, &api, RECORDS + 1).await;
    assert_eq!(node.status().await["balanced"], true);
}
