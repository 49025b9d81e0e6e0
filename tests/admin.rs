//! The operator's side of a real node.

use awc::http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    api::Api,
    eventually,
    lanes::{Lane as _, Nats, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
    traffic,
};

#[actix_rt::test]
async fn the_status_has_every_member_that_the_contract_names() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(
        node.post("/", "one", traffic()[0].clone()).await.unwrap().0,
        StatusCode::ACCEPTED
    );
    node.at_rest(PATIENCE).await;
    let status = node.status().await;
    let is_text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    assert!(
        is_text(&status["version"]) && is_text(&status["node"]),
        "{status}"
    );
    assert!(status["uptime_s"].as_f64() > Some(0.0), "{status}");
    assert_eq!(status["draining"], false);
    let ledger = json!({
        "accepted": 1, "recovered": 0, "delivered": 1, "handed_over": 0, "dead": 0, "dropped": 0,
        "spooled": 0, "parked": 0, "in_flight": 0, "missing": 0,
        "redelivered": 0
    });
    assert_eq!(
        (&status["ledger"], &status["balanced"]),
        (&ledger, &json!(true))
    );
    let lane = &status["lanes"][0];
    for (member, value) in [
        ("lane", json!("grpc")),
        ("tag", json!("GRPC")),
        ("state", json!("up")),
        ("restarts", json!(0)),
        ("attempts", json!(1)),
        ("last_error", Value::Null),
        ("retry_in_s", Value::Null),
        ("accepted", json!(1)),
        ("delivered", json!(1)),
        ("dead", json!(0)),
        ("in_flight", json!(0)),
        ("refusing", Value::Null),
        ("weight", json!(1)),
        ("score", Value::Null),
        ("ejected", Value::Null),
    ] {
        assert_eq!(lane[member], value, "{member}: {lane}");
    }
    assert!(lane["since_s"].as_f64() > Some(0.0), "{lane}");
    assert!(lane["share"].is_f64(), "{lane}");
    for latency in ["publish_ms", "delivery_ms"] {
        assert!(
            lane[latency]["p50"].as_f64() > Some(0.0) && lane[latency]["p99"].is_f64(),
            "{latency}: {lane}"
        );
    }
    assert!(
        is_text(&lane["broker"]["version"]) && lane["broker"]["warnings"].is_array(),
        "{lane}"
    );
    assert_eq!(lane["broker"]["outlives_power_cut"], "yes");
    assert_eq!(status["api"]["url"], api.url());
    assert_eq!(
        (&status["api"]["state"], &status["api"]["in_flight"]),
        (&json!("up"), &json!(0))
    );
    assert!(status["api"]["limit"].is_u64(), "{status}");
    assert!(status["api"]["since_s"].as_f64() > Some(0.0), "{status}");
    for member in ["last_error", "retry_in_s"] {
        assert_eq!(status["api"].get(member), Some(&Value::Null), "{status}");
    }
}

#[actix_rt::test]
async fn the_status_says_why_the_api_is_down_since_when_and_when_it_is_tried_again() {
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for number in 0..10 {
        let key = format!("away-{number}");
        node.post("/", &key, traffic()[0].clone()).await.unwrap();
    }
    let down = eventually("the API is down", PATIENCE, async || {
        let api = node.status().await["api"].clone();
        // While a probe is under way, the next one has no time.
        (api["state"] == "down" && api["retry_in_s"].is_f64()).then_some(api)
    })
    .await;
    assert!(down["since_s"].as_f64() >= Some(0.0), "{down}");
    let why = down["last_error"].as_str().expect("a reason");
    assert!(why.contains("refused"), "{down}");
    api.start_again();
    let up = eventually("the API is up", PATIENCE, async || {
        let api = node.status().await["api"].clone();
        (api["state"] == "up").then_some(api)
    })
    .await;
    assert_eq!(up["retry_in_s"], Value::Null, "{up}");
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_lane_can_be_paused_resumed_and_restarted_while_the_other_takes_the_traffic() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let node = Node::start(&api.url(), &[grpc_variables(), nats.variables()].concat()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let path = async |key: &str| {
        node.post("/", key, traffic()[0].clone()).await.unwrap().1["path"].clone()
    };

    assert_eq!(node.order("nats", "pause").await, StatusCode::ACCEPTED);
    node.lane_is("nats", "paused", PATIENCE).await;
    for at in 0..6 {
        assert_eq!(path(&format!("paused-{at}")).await, "GRPC");
    }
    let pinned = node
        .post("/nats", "pinned", traffic()[0].clone())
        .await
        .unwrap();
    assert_eq!(
        (pinned.0, &pinned.1["path"]),
        (StatusCode::ACCEPTED, &json!("spool"))
    );

    assert_eq!(node.order("nats", "resume").await, StatusCode::ACCEPTED);
    node.lane_is("nats", "up", PATIENCE).await;
    assert_ne!(
        path("resumed-0").await,
        path("resumed-1").await,
        "both lanes take their turns again"
    );

    assert_eq!(node.order("nats", "restart").await, StatusCode::ACCEPTED);
    node.lane_is("nats", "up", PATIENCE).await;
    assert_eq!(node.lane("nats").await["restarts"], 1);
    assert_eq!(node.lane("grpc").await["restarts"], 0);

    assert_eq!(node.order("pigeon", "pause").await, StatusCode::NOT_FOUND);
    assert_eq!(node.order("pubsub", "pause").await, StatusCode::NOT_FOUND);
    assert_eq!(node.order("nats", "paint").await, StatusCode::NOT_FOUND);
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(
        (&ledger["accepted"], &ledger["delivered"]),
        (&json!(9), &json!(9))
    );
}

#[actix_rt::test]
async fn a_weight_is_set_at_run_time_and_the_status_says_who_did_it_and_when() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let policy = ("ROUTER__POLICY".to_owned(), "weighted".to_owned());
    let weight = ("LANES__NATS__WEIGHT".to_owned(), "3".to_owned());
    let variables = [grpc_variables(), nats.variables(), vec![policy, weight]].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("nats", "up", PATIENCE).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let by_nats = async |round: &str| {
        let mut count = 0;
        for at in 0..8 {
            let key = format!("{round}-{at}");
            let (status, body) = node.post("/", &key, traffic()[0].clone()).await.unwrap();
            assert_eq!(status, StatusCode::ACCEPTED, "{body}");
            count += usize::from(body["path"] == "NATS");
        }
        count
    };
    assert_eq!(by_nats("configured").await, 6);
    assert_eq!(node.lane("nats").await["weight_set"], Value::Null);

    let path = "/api/lanes/nats/weight";
    let (status, lane) = node.tell(path, json!({"weight": 0})).await;
    assert_eq!(
        (status, &lane["weight"]),
        (StatusCode::OK, &json!(0)),
        "{lane}"
    );
    assert_eq!(by_nats("none").await, 0);
    node.tell(path, json!({"weight": 1})).await;
    assert_eq!(by_nats("half").await, 4);
    let lane = node.lane("nats").await;
    assert_eq!(
        (&lane["weight"], &lane["weight_set"]["by"]),
        (&json!(1), &json!("127.0.0.1"))
    );
    assert!(
        lane["weight_set"]["since_s"].as_f64() >= Some(0.0),
        "{lane}"
    );
    assert_eq!(node.lane("grpc").await["weight_set"], Value::Null);
    let lines = node.log();
    let lines = lines
        .lines()
        .filter(|line| line.contains("the weight of the lane is set"));
    assert_eq!(lines.count(), 2);

    for wrong in [
        json!({}),
        json!({"weight": 1001}),
        json!({"weight": -1}),
        json!({"weight": "1"}),
        json!({"weight": 1, "lane": "grpc"}),
    ] {
        let (status, problem) = node.tell(path, wrong).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{problem}");
    }
    for unknown in ["pigeon", "pubsub"] {
        let path = format!("/api/lanes/{unknown}/weight");
        let (status, _) = node.tell(&path, json!({"weight": 1})).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
    assert_eq!(node.lane("nats").await["weight"], 1, "as before");
    node.at_rest(PATIENCE).await;
}

/// Lines of `/metrics` after three records and one that the schema refused.
const METRICS: [&str; 24] = [
    "# TYPE waypost_records_accepted_total counter",
    "waypost_records_accepted_total{path=\"GRPC\"} 3",
    "waypost_records_accepted_total{path=\"spool\"} 0",
    "waypost_records_delivered_total{path=\"GRPC\"} 3",
    "waypost_records_dead_total{path=\"GRPC\"} 0",
    "waypost_handed_over_total{path=\"GRPC\"} 0",
    "waypost_missing_records 0",
    "waypost_redeliveries_total{path=\"GRPC\"} 0",
    "waypost_lane_up{lane=\"grpc\"} 1",
    "waypost_lane_outlives_power_cut{lane=\"grpc\"} 1",
    "waypost_lane_restarts_total{lane=\"grpc\"} 0",
    "waypost_lane_attempts_total{lane=\"grpc\"} 1",
    "waypost_api_up 1",
    "waypost_spool_records 0",
    "waypost_in_flight{lane=\"grpc\"} 0",
    "waypost_oldest_waiting_seconds 0.0",
    "waypost_ledger_imbalanced 0",
    "# TYPE waypost_ingest_seconds histogram",
    "waypost_ingest_seconds_count{code=\"202\"} 3",
    "waypost_ingest_seconds_count{code=\"422\"} 1",
    "waypost_ingest_seconds_bucket{code=\"202\",le=\"+Inf\"} 3",
    "waypost_publish_seconds_count{lane=\"grpc\"} 3",
    "waypost_post_seconds_count{lane=\"grpc\"} 3",
    "waypost_delivery_seconds_count{path=\"GRPC\"} 3",
];

#[actix_rt::test]
async fn the_metrics_are_those_of_the_contract_and_say_what_the_status_says() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["a", "b", "c"] {
        assert_eq!(
            node.post("/", key, traffic()[0].clone()).await.unwrap().0,
            StatusCode::ACCEPTED
        );
    }
    assert_eq!(
        node.post("/", "d", "{}".into()).await.unwrap().0,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    node.at_rest(PATIENCE).await;
    let (content_type, text) = node.text("/metrics").await;
    assert!(
        content_type.starts_with("text/plain; version=0.0.4"),
        "{content_type}"
    );
    for line in METRICS {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
    for name in [
        "waypost_spool_bytes ",
        "waypost_last_delivery_seconds{lane=\"grpc\"} ",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(name)),
            "{name} is not in\n{text}"
        );
    }
    // Buckets add up: each counts those before it.
    let buckets = text
        .lines()
        .filter(|line| line.starts_with("waypost_delivery_seconds_bucket"));
    let counts: Vec<u64> = buckets
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(
        counts.is_sorted() && counts.last() == Some(&3),
        "{counts:?}"
    );
}

#[actix_rt::test]
async fn the_oldest_record_on_disk_is_told() {
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let node = Node::start(
        "http://127.0.0.1:9/",
        &[("LANES__NATS__URL".into(), nobody)],
    )
    .await;
    assert_eq!(
        node.post("/", "a", traffic()[0].clone()).await.unwrap().0,
        StatusCode::ACCEPTED
    );
    let text = eventually("it has waited for a second", PATIENCE, async || {
        let (_, text) = node.text("/metrics").await;
        let age = text
            .lines()
            .find_map(|line| line.strip_prefix("waypost_oldest_waiting_seconds "))?;
        (age.parse::<f64>().expect("a number") >= 1.0).then(|| text.clone())
    })
    .await;
    for line in [
        "waypost_records_accepted_total{path=\"spool\"} 1",
        "waypost_spool_records 1",
        "waypost_spool_commits_total 1",
        "waypost_spool_committed_records_total 1",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
}
