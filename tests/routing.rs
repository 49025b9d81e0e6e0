//! Policies that read scores, with real lanes: what `/api/status` tells of them.

use std::{collections::HashMap, fs, time::Duration};

use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, Rabbitmq, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    process::free_port,
    proxy::{Flow, Network},
    rig::Rig as _,
    traffic,
};

/// The variables of a lane and of the gRPC lane, with the policy.
pub fn adaptive(lane: &[(String, String)]) -> Vec<(String, String)> {
    let policy = ("ROUTER__POLICY".to_owned(), "adaptive".to_owned());
    // A copy on disk would take longer than the lanes.
    let ack = ("INGEST__ACK".to_owned(), "lane".to_owned());
    [lane, &grpc_variables(), &[policy, ack]].concat()
}

async fn share(node: &Node, lane: &str) -> f64 {
    node.lane(lane).await["share"].as_f64().expect("a share")
}

#[actix_rt::test]
async fn a_slow_lane_takes_few_records_and_gets_its_share_back() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    let api = Api::start();
    let node = Node::start(&api.url(), &adaptive(&variables)).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start_with(&node, 16, Duration::from_millis(5));
    let has = async |what: &str, fits: fn(f64) -> bool| {
        eventually(what, 2 * PATIENCE, async || {
            fits(share(&node, "nats").await).then_some(())
        })
        .await;
    };
    has("its share", |share| share > 0.1).await;
    eventually("a delivery has made its score", PATIENCE, async || {
        let score = node.lane("nats").await["score"].as_f64();
        score.filter(|score| *score > 0.0)
    })
    .await;

    proxy.set(Network {
        to_client: Flow::Delays(Duration::from_millis(200)),
        ..Network::WELL
    });
    has("a small one while it is slow", |share| share < 0.03).await;
    proxy.set(Network::WELL);
    has("its share again", |share| share > 0.1).await;
    load.end().await;
    assert_eq!(load.untaken(), 0);
    load.is_met(&api, PATIENCE).await;
    node.at_rest(PATIENCE).await;
}

async fn explained(node: &Node, id: &str) -> (StatusCode, Value) {
    let answer = node.get(&format!("/api/explain?id={id}")).await;
    answer.expect("the node answers")
}

#[actix_rt::test]
async fn a_choice_is_explained_with_the_factors_of_its_score() {
    let api = Api::start();
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let nats = [("LANES__NATS__URL".to_owned(), nobody)];
    let node = Node::start(&api.url(), &adaptive(&nats)).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["first", "second"] {
        let (status, _) = node.post("/", key, traffic()[0].clone()).await.unwrap();
        assert_eq!(status, StatusCode::ACCEPTED);
        node.at_rest(PATIENCE).await;
    }
    let (status, told) = explained(&node, "second").await;
    assert_eq!((status, &told["id"]), (StatusCode::OK, &json!("second")));
    let choices = told["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 1, "{told}");
    for (member, value) in [
        ("rule", json!("default")),
        ("policy", json!("adaptive")),
        ("lane", json!("grpc")),
        ("reason", json!("the lowest score")),
        ("runner_up", Value::Null),
        ("api", json!("api")),
    ] {
        assert_eq!(choices[0][member], value, "{member}: {told}");
    }
    let weighed = &choices[0]["lanes"][0];
    let number = |member: &str| weighed[member].as_f64().expect("a number");
    assert_eq!(weighed["lane"], "grpc");
    assert!(number("latency_ms") > 0.0, "{told}");
    let score = number("latency_ms") / 1000.0 * (number("in_flight") + 1.0)
        / (number("weight") * number("success_ratio") * number("slow_start"));
    assert!((number("score") / score - 1.0).abs() < 1e-9, "{told}");

    for (query, status) in [
        ("id=unknown", StatusCode::NOT_FOUND),
        ("id=", StatusCode::BAD_REQUEST),
        ("", StatusCode::BAD_REQUEST),
        ("id=a&id=b", StatusCode::BAD_REQUEST),
    ] {
        let answer = node.get(&format!("/api/explain?{query}")).await;
        let (answered, problem) = answer.expect("the node answers");
        assert_eq!(answered, status, "{query}: {problem}");
        assert_eq!(problem["status"], status.as_u16(), "{query}: {problem}");
    }
}

/// The steps of a record, each with the status of the answer.
fn steps(told: &Value) -> Vec<(String, Option<u64>)> {
    let steps = told["steps"].as_array().expect("a list");
    let mut last_ms = 0.0;
    let steps = steps.iter().map(|step| {
        let at_ms = step["at_ms"].as_f64().expect("a time");
        assert!(at_ms >= last_ms, "{told}");
        last_ms = at_ms;
        let what = step["what"].as_str().expect("a text");
        (what.to_owned(), step["status"].as_u64())
    });
    steps.collect()
}

#[actix_rt::test]
async fn a_record_has_its_steps_with_their_times() {
    let api = Api::start();
    api.behave(|number, post| match post.key.as_deref() {
        Some("bad") => Conduct::Answer(422),
        Some("again") if number == 0 => Conduct::Answer(500),
        _ => Conduct::Answer(200),
    });
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["again", "bad"] {
        let (status, _) = node.post("/", key, traffic()[0].clone()).await.unwrap();
        assert_eq!(status, StatusCode::ACCEPTED);
        node.at_rest(PATIENCE).await;
    }
    let step = |what: &str, status: u64| (what.to_owned(), Some(status).filter(|it| *it > 0));
    let (_, told) = explained(&node, "again").await;
    let mut found = steps(&told);
    // The answer of the API may be faster than the receipt of the lane.
    let confirmed = found.iter().position(|step| step.0 == "confirmed");
    found.remove(confirmed.expect("a receipt"));
    let way = [
        step("accepted", 0),
        step("posted", 500),
        step("posted", 200),
        step("delivered", 0),
    ];
    assert_eq!(found, way, "{told}");
    let posts = told["steps"].as_array().expect("a list").iter();
    let mut posts = posts.filter(|step| step["what"] == "posted");
    assert!(
        posts.all(|post| post["took_ms"].as_f64() > Some(0.0) && post["lane"] == "grpc"),
        "{told}"
    );
    let (_, told) = explained(&node, "bad").await;
    let found = steps(&told);
    assert!(found.contains(&step("posted", 422)), "{told}");
    assert!(found.contains(&step("dead", 0)), "{told}");
    assert!(!found.contains(&step("delivered", 0)), "{told}");
}

#[actix_rt::test]
async fn a_record_that_waits_on_disk_is_explained_before_and_after() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    proxy.set(Network {
        refuses: true,
        ..Network::WELL
    });
    proxy.cut();
    node.lane_is_away("nats", PATIENCE).await;
    let (_, receipt) = node.post("/", "waits", traffic()[0].clone()).await.unwrap();
    assert_eq!(receipt["path"], "spool");
    let (_, told) = explained(&node, "waits").await;
    assert_eq!(told["choices"][0]["lane"], Value::Null, "{told}");

    proxy.set(Network::WELL);
    node.at_rest(PATIENCE).await;
    let (_, told) = explained(&node, "waits").await;
    assert_eq!(told["choices"][1]["lane"], "nats", "{told}");
}

/// A file with these rules.
pub fn rules(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("it can be written");
    file
}

/// A record with this state.
fn in_state(state: &str) -> Bytes {
    format!(r#"{{"name":"a","location":"b","age":1,"infectedtype":"c","state":"{state}"}}"#).into()
}

/// The path of the receipt.
async fn path_of(node: &Node, path: &str, key: &str, state: &str) -> String {
    let answer = node.post(path, key, in_state(state)).await;
    let (status, receipt) = answer.expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    receipt["path"].as_str().expect("a path").to_owned()
}

#[actix_rt::test]
async fn the_first_rule_that_matches_chooses_the_lanes_of_each_record() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let file = rules(
        r#"
        [[routes]]
        when = { pointer = "/state", equals = "urgent" }
        lanes = ["nats"]
        [[routes]]
        when = { header = "ce-type", prefix = "org.example." }
        policy = "failover"
        lanes = ["grpc", "nats"]
        [[routes]]
        when = { pointer = "/state", matches = "^b+$" }
        lanes = ["grpc"]
        "#,
    );
    let api = Api::start();
    let variables = [nats.variables(), grpc_variables()].concat();
    let node = Node::start_with_config(&api.url(), &variables, file.path()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for number in 0..4 {
        let key = |name: &str| format!("{name}-{number}");
        assert_eq!(path_of(&node, "/", &key("urgent"), "urgent").await, "NATS");
        assert_eq!(path_of(&node, "/", &key("bbb"), "bbb").await, "GRPC");
        let named = path_of(&node, "/grpc", &key("named"), "urgent").await;
        assert_eq!(named, "GRPC", "the request's word is over the rule's");
    }
    let (_, told) = explained(&node, "bbb-0").await;
    let choice = &told["choices"][0];
    assert_eq!(
        (&choice["rule"], &choice["when"], &choice["runner_up"]),
        (
            &json!("routes[3]"),
            &json!("/state matches \"^b+$\""),
            &Value::Null
        ),
        "{told}"
    );

    // Each record of a batch takes its own rule, and the header holds for all.
    let states = ["urgent", "other", "urgent", "bbb"].map(in_state);
    let batch = format!(
        "[{}]",
        states
            .map(|body| String::from_utf8(body.to_vec()).expect("text"))
            .join(",")
    );
    let request = awc::Client::default().post(format!("http://127.0.0.1:{}/", node.ingest));
    let request = request.content_type("application/json");
    let request = request.insert_header(("CE-Type", "org.example.case"));
    let mut answer = request.send_body(batch).await.expect("an answer");
    let receipts: Value = answer.json().await.expect("JSON");
    let paths = receipts["records"].as_array().expect("a list").iter();
    let paths: Vec<_> = paths.map(|receipt| receipt["path"].as_str()).collect();
    assert_eq!(
        paths,
        ["NATS", "GRPC", "NATS", "GRPC"].map(Some),
        "{receipts}"
    );
    let id = receipts["records"][1]["id"].as_str().expect("an id");
    let (_, told) = explained(&node, id).await;
    assert_eq!(told["choices"][0]["rule"], "routes[2]", "{told}");
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn records_wait_for_the_lanes_of_their_rule_hold_up_no_others_and_survive_a_restart() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    proxy.set(Network {
        refuses: true,
        ..Network::WELL
    });
    let nobody = format!("amqp://127.0.0.1:{}", free_port());
    let rabbitmq = ("LANES__RABBITMQ__URL".to_owned(), nobody);
    let variables = [variables, grpc_variables(), vec![rabbitmq]].concat();
    let file = rules(
        r#"
        [[routes]]
        when = { pointer = "/state", equals = "one" }
        lanes = ["nats"]
        [[routes]]
        when = { pointer = "/state", equals = "two" }
        lanes = ["rabbitmq", "nats"]
        "#,
    );
    let api = Api::start();
    let mut node = Node::start_with_config(&api.url(), &variables, file.path()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // More than are on their way from the disk at a time.
    let states = (0..300).map(|number| if number < 10 { "one" } else { "two" });
    for (number, state) in states.enumerate() {
        assert_eq!(
            path_of(&node, "/", &format!("{number}"), state).await,
            "spool"
        );
    }
    assert_eq!(node.order("grpc", "pause").await, StatusCode::ACCEPTED);
    assert_eq!(path_of(&node, "/", "before", "other").await, "spool");
    assert_eq!(node.order("grpc", "resume").await, StatusCode::ACCEPTED);
    eventually("the other record is taken", PATIENCE, async || {
        api.taken().contains_key("before").then_some(())
    })
    .await;
    eventually("it is no longer on disk", PATIENCE, async || {
        (node_spooled(&node).await == 300).then_some(())
    })
    .await;

    // Now no rule asks for these lanes.
    fs::write(file.path(), "").expect("it can be written");
    node.killed_and_started().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(path_of(&node, "/", "after", "one").await, "GRPC");
    eventually("the other record is taken", PATIENCE, async || {
        api.taken().contains_key("after").then_some(())
    })
    .await;
    // Long enough for the feeder to have tried each more than once.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(node_spooled(&node).await, 300, "they wait for their lanes");
    proxy.set(Network::WELL);
    node.at_rest(2 * PATIENCE).await;
    let (_, told) = explained(&node, "0").await;
    let choice = &told["choices"][0];
    assert_eq!(
        (&choice["rule"], &choice["lane"]),
        (&json!("routes[1]"), &json!("nats")),
        "{told}"
    );
    let status = node.status().await;
    let sent = |lane: &Value| (lane["lane"].clone(), lane["delivered"].clone());
    let delivered: Vec<_> = status["lanes"]
        .as_array()
        .expect("a list")
        .iter()
        .map(sent)
        .collect();
    assert!(
        delivered.contains(&(json!("nats"), json!(300))),
        "{delivered:?}"
    );
}

async fn node_spooled(node: &Node) -> u64 {
    let ledger = &node.status().await["ledger"];
    ledger["spooled"].as_u64().expect("a count")
}

#[actix_rt::test]
async fn broadcast_delivers_each_copy_once_under_its_id() {
    let (Some(mut nats), Some(mut rabbitmq)) = (Nats::start().await, Rabbitmq::start().await)
    else {
        return;
    };
    let (proxy, nats) = through_proxy(nats.variables());
    let policy = ("ROUTER__POLICY".to_owned(), "broadcast".to_owned());
    let variables = [nats, rabbitmq.variables(), grpc_variables(), vec![policy]].concat();
    let api = Api::start();
    let node = Node::start(&api.url(), &variables).await;
    for lane in ["nats", "rabbitmq", "grpc"] {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let mut expected = HashMap::new();
    let mut expect = |key: &str| {
        for lane in ["nats", "rabbitmq", "grpc"] {
            expected.insert(format!("{key}/{lane}"), 1);
        }
    };
    for number in 0..20 {
        let key = format!("{number}");
        let (status, receipt) = node
            .post("/", &key, in_state("a"))
            .await
            .expect("an answer");
        assert_eq!(
            (status, &receipt["id"]),
            (StatusCode::ACCEPTED, &json!(key))
        );
        expect(&key);
    }
    // The same key again makes no copy.
    let first = node.post("/", "0", in_state("a")).await.expect("an answer");
    assert_eq!(first.0, StatusCode::ACCEPTED);
    let (status, _) = node.post("/", "0", in_state("b")).await.expect("an answer");
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);

    // A copy whose lane is away waits for it.
    proxy.set(Network {
        refuses: true,
        ..Network::WELL
    });
    proxy.cut();
    node.lane_is_away("nats", PATIENCE).await;
    let (status, _) = node
        .post("/", "away", in_state("a"))
        .await
        .expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED);
    expect("away");
    eventually("the others are delivered", PATIENCE, async || {
        let taken = api.taken();
        (taken.contains_key("away/grpc") && taken.contains_key("away/rabbitmq")).then_some(())
    })
    .await;
    assert!(!api.taken().contains_key("away/nats"));
    assert_eq!(node_spooled(&node).await, 1);
    let (_, told) = explained(&node, "away").await;
    assert_eq!(
        told["choices"].as_array().expect("a list").len(),
        3,
        "{told}"
    );
    proxy.set(Network::WELL);

    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], 63, "each copy is a record: {ledger}");
    assert_eq!(api.taken(), expected);
    assert_eq!(path_of(&node, "/grpc", "named", "a").await, "GRPC");
    node.at_rest(PATIENCE).await;
    assert!(api.taken().contains_key("named"), "no copy");
}
