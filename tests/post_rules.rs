//! The rate of POSTs, and the statuses that are retried, with a real API.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use awc::http::StatusCode;
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic,
};

/// The API fails at records with this in their body.
const POISON: &str = "poison";
/// Turns that may be taken in advance: one, and those of 50 ms.
const AHEAD: f64 = 1.0;
const BURST_S: f64 = 0.05;

fn with(
    variables: impl IntoIterator<Item = (String, String)>,
    more: &[(&str, &str)],
) -> Vec<(String, String)> {
    let more = more
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    variables.into_iter().chain(more).collect()
}

fn record(state: &str) -> String {
    let record = json!({
        "name": "Ana", "location": "Flores", "age": 33, "infectedtype": "imported", "state": state
    });
    record.to_string()
}

/// Submits an array of records, and returns the paths of their receipts.
async fn submit(node: &Node, key: &str, records: &[String]) -> Vec<String> {
    let batch = format!("[{}]", records.join(","));
    let (status, body) = node.post("/", key, batch.into()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let records = body["records"].as_array().expect("receipts");
    let path = |record: &Value| record["path"].as_str().expect("a path").to_owned();
    records.iter().map(path).collect()
}

#[expect(clippy::cast_precision_loss, reason = "some thousand POSTs")]
fn assert_within(api: &Api, began: Instant, per_second: f64) {
    let posts = api.count() as f64;
    let allowed = (began.elapsed().as_secs_f64() + BURST_S) * per_second + AHEAD;
    assert!(posts <= allowed, "{posts} POSTs, {allowed} allowed");
}

fn assert_taken_once(api: &Api, records: usize) {
    let taken = api.taken();
    assert_eq!(taken.len(), records);
    let twice: Vec<_> = taken.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

#[actix_rt::test]
async fn lanes_retries_and_parked_records_share_the_rate() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let is_poison = |body: &Bytes| memchr::memmem::find(body, POISON.as_bytes()).is_some();
    // Parked at once, and due again while the others still come.
    api.behave(move |_, post| {
        if !is_poison(&post.body) {
            return Conduct::Answer(200);
        }
        Conduct::AnswerWith {
            status: 500,
            headers: vec![("Retry-After", "4".into())],
            body: Vec::new(),
        }
    });
    let lanes = [nats.variables(), grpc_variables()].concat();
    let node = Node::start(&api.url(), &with(lanes, &[("API__RATE", "100/s")])).await;
    for lane in ["nats", "grpc"] {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let began = Instant::now();
    let mixed: Vec<_> = (0..200)
        .map(|number| record(if number % 2 == 0 { "well" } else { POISON }))
        .collect();
    submit(&node, "mixed", &mixed).await;
    for batch in 0..5 {
        submit(&node, &format!("good-{batch}"), &vec![record("well"); 200]).await;
    }
    eventually("POSTs wait", PATIENCE, async || {
        let status = node.status().await;
        let rate = &status["api"]["rate"];
        assert_eq!(rate["limit"], "100/s", "{status}");
        let metric = node.metric("waypost_api_rate_waiting").await;
        (rate["waiting"].as_u64()? > 1 && metric != "0").then_some(())
    })
    .await;
    eventually("the good ones are delivered", PATIENCE, async || {
        assert_within(&api, began, 100.0);
        (api.taken().len() == 1100).then_some(())
    })
    .await;
    assert!(api.count() > 1250, "parked records were POSTed meanwhile");
    assert_within(&api, began, 100.0);
    api.behave(|_, _| Conduct::Answer(200));
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["delivered"], &ledger["dead"]),
        (&json!(1200), &json!(0)),
        "{ledger}"
    );
    assert_taken_once(&api, 1200);
    let told = node.log().matches("[api].rate binds").count();
    assert_eq!(told, 1, "one line in ten minutes");
}

#[actix_rt::test]
async fn probes_of_an_api_that_is_down_keep_to_the_rate() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(500));
    let node = Node::start(&api.url(), &with(grpc_variables(), &[("API__RATE", "1/s")])).await;
    let began = Instant::now();
    submit(&node, "few", &vec![record("well"); 20]).await;
    eventually("the API counts as down", PATIENCE, async || {
        (node.status().await["api"]["state"] == "down").then_some(())
    })
    .await;
    let before = api.count();
    api.wait_for(before + 10, PATIENCE).await;
    assert_within(&api, began, 1.0);
}

#[actix_rt::test]
async fn records_that_come_while_the_rate_binds_share_their_posts() {
    let api = Api::start();
    let variables = with(
        grpc_variables(),
        &[("API__RATE", "5/s"), ("API__BATCH", "50")],
    );
    let node = Node::start(&api.url(), &variables).await;
    let bodies = traffic();
    let posts = (0..200).map(async |number: u64| {
        // One by one, and none waits for another's receipt.
        tokio::time::sleep(Duration::from_millis(5 * number)).await;
        let body = bodies[0].clone();
        node.post("/", &format!("one-{number}"), body).await
    });
    for answer in join_all(posts).await {
        assert_eq!(answer.expect("an answer").0, StatusCode::ACCEPTED);
    }
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["delivered"], 200, "{ledger}");
    assert!(api.count() < 40, "{} POSTs of 200 records", api.count());
}

/// The receipt of a record on the gRPC lane waits for its POST, unless the receiver's disk has it.
#[actix_rt::test]
async fn a_rate_or_a_limit_that_binds_is_no_failure_of_a_lane() {
    for limit in [("API__RATE", "150/s"), ("API__CONCURRENCY", "1")] {
        let api = Api::start();
        api.delay(Duration::from_millis(5));
        let variables = with(
            grpc_variables(),
            &[
                limit,
                ("ROUTER__POLICY", "adaptive"),
                ("ROUTER__PUBLISH_TIMEOUT", "3s"),
            ],
        );
        let node = Node::start(&api.url(), &variables).await;
        let records = vec![record("well"); 100];
        let batches = (0..15).map(async |batch| submit(&node, &batch.to_string(), &records).await);
        let paths = join_all(batches).await.concat();
        let others = paths.iter().filter(|path| *path != "GRPC").count();
        assert_eq!(others, 0, "{limit:?}: receipts that are not the lane's");
        let lane = node.lane("grpc").await;
        assert_eq!(
            (&lane["state"], &lane["restarts"]),
            (&json!("up"), &json!(0)),
            "{lane}"
        );
        let ejections = "waypost_lane_ejections_total{lane=\"grpc\"}";
        assert_eq!(node.metric(ejections).await, "0");
        let ledger = node.at_rest(PATIENCE).await;
        assert_eq!(
            (&ledger["delivered"], &ledger["redelivered"]),
            (&json!(1500), &json!(0)),
            "{ledger}"
        );
        assert_taken_once(&api, 1500);
        assert!(!node.log().contains("WARN"), "{}", node.log());
    }
}

#[actix_rt::test]
async fn the_configuration_says_which_statuses_are_retried() {
    let api = Api::start();
    // Each record is answered by its own status at first.
    let seen = std::sync::Mutex::new(HashSet::new());
    api.behave(move |_, post| {
        let is_first = seen.lock().unwrap().insert(post.key.clone());
        let key = post.key.as_deref().unwrap_or_default();
        match key.parse() {
            Ok(status) if is_first => Conduct::Answer(status),
            _ => Conduct::Answer(200),
        }
    });
    let variables = with(
        grpc_variables(),
        &[("API__RETRY_STATUSES", "302, 409, 503")],
    );
    let node = Node::start(&api.url(), &variables).await;
    for status in [302, 409, 503, 400, 500, 429] {
        let body = record("well").into();
        let answer = node.post("/", &status.to_string(), body).await;
        assert_eq!(answer.expect("an answer").0, StatusCode::ACCEPTED);
    }
    node.at_rest(PATIENCE).await;
    let dead = ["400", "500", "429"].map(str::to_owned);
    assert_eq!(node.dead().await, HashSet::from(dead));
    assert_taken_once(&api, 3);
    let retryable = "waypost_api_failures_total{class=\"retryable\"}";
    assert_eq!(node.metric(retryable).await, "2");
    let warned = "api.retry_statuses: has no 429";
    assert!(node.log().contains(warned), "{}", node.log());
}
