//! What an operator learns of an API or a broker in trouble: the log, the status, the metrics.

use awc::http::StatusCode;
use futures_util::future::join_all;
use serde_json::Value;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic,
};

/// Posts `count` records at the same time, each of which is taken.
async fn post(node: &Node, name: &str, count: usize) {
    let posts = (0..count).map(async |at| {
        let record = traffic()[at % 1000].clone();
        let (status, receipt) = node
            .post("/", &format!("{name}-{at}"), record)
            .await
            .unwrap();
        assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    });
    join_all(posts).await;
}

async fn api_is(node: &Node, state: &str) -> Value {
    eventually(&format!("the API is {state}"), PATIENCE, async || {
        let api = node.status().await["api"].clone();
        (api["state"] == state).then_some(api)
    })
    .await
}

/// The value of a metric without labels, or with these.
async fn metric(node: &Node, name: &str) -> u64 {
    let (_, text) = node.text("/metrics").await;
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in\n{text}"))
        .parse()
        .unwrap()
}

/// The lines of the log that have this text.
fn lines(node: &Node, text: &str) -> Vec<String> {
    let log = node.log();
    let lines = log.lines().filter(|line| line.contains(text));
    lines.map(str::to_owned).collect()
}

#[actix_rt::test]
async fn an_outage_of_the_api_is_one_warning_and_one_line_when_it_is_back() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(metric(&node, "waypost_api_up").await, 1);
    api.behave(|_, _| Conduct::Answer(500));
    post(&node, "a", 20).await;
    let down = api_is(&node, "down").await;
    assert!(
        down["last_error"].as_str().unwrap().contains("500"),
        "{down}"
    );
    assert!(
        down["since_s"].as_f64() < Some(PATIENCE.as_secs_f64()),
        "{down}"
    );
    eventually("the next try is told", PATIENCE, async || {
        node.status().await["api"]["retry_in_s"].as_f64()
    })
    .await;
    assert_eq!(metric(&node, "waypost_api_up").await, 0);
    let failures = "waypost_api_failures_total{class=\"5xx\"}";
    assert!(metric(&node, failures).await >= 5);
    // The outage goes on for some probes.
    let probes = api.count() + 3;
    api.wait_for(probes, PATIENCE).await;
    api.behave(|_, _| Conduct::Answer(200));
    let up = api_is(&node, "up").await;
    assert!(up["retry_in_s"].is_null(), "{up}");
    node.at_rest(PATIENCE).await;

    let warned = lines(&node, "API is down");
    let [warning] = &*warned else {
        panic!("one warning: {warned:?}");
    };
    for part in ["WARN", "500", "retry_in_s=", &api.url()] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
    let told = lines(&node, "API is up again");
    let [line] = &*told else {
        panic!("one line: {told:?}");
    };
    for part in ["INFO", "down_s=", "waiting=20"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

/// A few records are parked before anything else shows that the API takes none.
#[actix_rt::test]
async fn a_few_records_show_that_the_api_takes_none() {
    const FEW: usize = 3;
    for fault in [Some(Conduct::Answer(500)), Some(Conduct::Hang), None] {
        let mut api = Api::start();
        let mut variables = grpc_variables();
        variables.push(("API__TIMEOUT".into(), "1s".into()));
        let node = Node::start(&api.url(), &variables).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        post(&node, "before", FEW).await;
        node.all_ended(FEW, PATIENCE).await;
        match fault.clone() {
            Some(conduct) => api.behave(move |_, _| conduct.clone()),
            None => api.stop().await,
        }
        post(&node, "few", FEW).await;
        api_is(&node, "down").await;
        match fault {
            Some(_) => api.behave(|_, _| Conduct::Answer(200)),
            None => api.start_again(),
        }
        let ledger = node.all_ended(2 * FEW, PATIENCE).await;
        assert_eq!(ledger["delivered"], 2 * FEW, "{fault:?}: {ledger}");
        api_is(&node, "up").await;
        let warned = lines(&node, "API is down");
        assert_eq!(warned.len(), 1, "{fault:?}: {warned:?}");
    }
}

async fn denies_everything(lane: &str, variables: &[(String, String)]) {
    const RECORDS: usize = 300;
    for status in [401, 403, 404] {
        let api = Api::start();
        api.behave(move |_, _| Conduct::Answer(status));
        let node = Node::start(&api.url(), variables).await;
        node.lane_is(lane, "up", PATIENCE).await;
        post(&node, &status.to_string(), RECORDS).await;
        let down = api_is(&node, "down").await;
        let reason = down["last_error"].as_str().unwrap();
        assert!(reason.contains(&format!("status {status}")), "{reason}");
        let warned = lines(&node, "API is down");
        assert!(
            warned.len() == 1 && warned[0].contains("token_file"),
            "{warned:?}"
        );
        // Each probe is another record's POST, and none condemns its record.
        let probes = api.count() + 5;
        api.wait_for(probes, PATIENCE).await;
        api.behave(|_, _| Conduct::Answer(200));
        let ledger = node.all_ended(RECORDS, PATIENCE).await;
        assert_eq!(ledger["delivered"], RECORDS, "{status}: {ledger}");
        assert_eq!(node.dead().await.len(), 0, "{status}");
        assert!(metric(&node, "waypost_api_failures_total{class=\"denied\"}").await >= 50);
    }
}

#[actix_rt::test]
async fn a_wrong_token_or_path_makes_no_dead_letters_on_grpc() {
    denies_everything("grpc", &grpc_variables()).await;
}

#[actix_rt::test]
async fn a_wrong_token_or_path_makes_no_dead_letters_on_nats() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    denies_everything("nats", &nats.variables()).await;
}

#[actix_rt::test]
async fn a_wrong_token_or_path_makes_no_dead_letters_of_batches() {
    let batch = ("API__BATCH".to_owned(), "10".to_owned());
    denies_everything("grpc", &[&grpc_variables()[..], &[batch]].concat()).await;
}

#[actix_rt::test]
async fn a_record_that_is_denied_while_others_are_taken_is_a_dead_letter() {
    let api = Api::start();
    api.behave(|_, post| {
        let is_bad = post
            .key
            .as_deref()
            .is_some_and(|key| key.starts_with("bad"));
        Conduct::Answer(if is_bad { 404 } else { 200 })
    });
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post(&node, "bad", 1).await;
    eventually(
        "it is dead though nothing else is POSTed",
        PATIENCE,
        async || (node.dead().await.len() == 1).then_some(()),
    )
    .await;
    for round in 0..20 {
        let [bad, good] = ["bad", "good"].map(|name| format!("{name}-{round}"));
        tokio::join!(post(&node, &bad, 5), post(&node, &good, 5));
    }
    let ledger = node.all_ended(201, PATIENCE).await;
    assert_eq!(
        (&ledger["delivered"], &ledger["dead"]),
        (&100.into(), &101.into())
    );
    assert_eq!(node.status().await["api"]["state"], "up");
    assert_eq!(lines(&node, "API is down"), [""; 0]);
}
