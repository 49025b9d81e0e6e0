//! Orders of operators to a running node: pause, drain, resume, weights; what the status, the log
//! and the metrics tell of them, and what a restart knows.

use std::{
    fs,
    process::Stdio,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use awc::http::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    process::{self, free_port},
    rig::Rig as _,
    traffic,
};

const LANES: [&str; 2] = ["grpc", "nats"];
const LOOPBACK: &str = "127.0.0.1";

fn keep_orders() -> Vec<(String, String)> {
    vec![("ADMIN__KEEP_ORDERS".to_owned(), "true".to_owned())]
}

async fn all_are(node: &Node, state: &str) {
    for lane in LANES {
        node.lane_is(lane, state, PATIENCE).await;
    }
}

/// An order to one lane, or without a name to all.
async fn order(node: &Node, order: &str) -> Value {
    let (status, body) = node.tell(&format!("/api/lanes/{order}"), json!({})).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    body
}

/// The path of the receipt of a new record.
async fn path(node: &Node, way: &str, key: &str) -> Value {
    let (status, body) = node.post(way, key, traffic()[0].clone()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    body["path"].clone()
}

/// The lines of the log that tell of an order.
fn orders_in_log(node: &Node) -> Vec<String> {
    let log = node.log();
    let lines = log.lines().filter(|line| line.contains("by=\""));
    lines.map(str::to_owned).collect()
}

#[actix_rt::test]
async fn with_every_lane_paused_nothing_is_refused_and_nothing_is_lost() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let node = Node::start(&api.url(), &[grpc_variables(), nats.variables()].concat()).await;
    all_are(&node, "up").await;
    let mut load = Load::start(&node);
    load.take(50).await;

    let answer = order(&node, "pause").await;
    for (at, lane) in LANES.into_iter().enumerate() {
        let paused = &answer["lanes"][at];
        assert_eq!(
            (&paused["lane"], &paused["state"]),
            (&json!(lane), &json!("paused"))
        );
        let ordered = &paused["ordered"];
        assert_eq!(
            (&ordered["action"], &ordered["by"], &ordered["kept"]),
            (&json!("pause"), &json!(LOOPBACK), &json!(false))
        );
        assert!(ordered["since_s"].as_f64() >= Some(0.0), "{ordered}");
        let name = format!("waypost_lane_paused_seconds{{lane=\"{lane}\"}}");
        assert_ne!(node.metric(&name).await, "0.0", "{lane}");
    }
    // Whatever was with a lane when it was paused.
    load.take(200).await;
    for way in ["/", "/nats", "/grpc"] {
        assert_eq!(path(&node, way, &format!("all-paused{way}")).await, "spool");
    }
    let batch = format!("[{0},{0}]", String::from_utf8_lossy(&traffic()[0]));
    let (status, body) = node.post("/", "batch", batch.into()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let (status, body) = node.get("/readyz").await.unwrap();
    assert_eq!(status, StatusCode::OK, "{body}");

    order(&node, "resume").await;
    all_are(&node, "up").await;
    load.take(50).await;
    load.end().await;
    assert_eq!(load.untaken(), 0);
    load.is_met(&api, PATIENCE).await;
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], load.accepted() + 5, "{ledger}");
    for lane in LANES {
        let name = format!("waypost_lane_paused_seconds{{lane=\"{lane}\"}}");
        assert_eq!(node.metric(&name).await, "0.0", "{lane}");
        assert_eq!(node.lane(lane).await["ordered"]["action"], "resume");
    }
    let lines = orders_in_log(&node);
    assert_eq!(lines.len(), 2, "one for each order: {lines:#?}");
    for (line, action) in lines.iter().zip(["pause", "resume"]) {
        for part in [
            format!("action=\"{action}\""),
            "grpc, nats".into(),
            LOOPBACK.into(),
        ] {
            assert!(line.contains(&part), "no {part} in {line}");
        }
    }
}

/// A lane that was paused and resumed, or restarted, treats what the API fails at as one that was not.
#[actix_rt::test]
async fn after_a_pause_a_failed_post_is_retried_as_before() {
    let api = Api::start();
    let asked = Duration::from_secs(2);
    let (times, seen) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(0)));
    let (kept, count) = (Arc::clone(&times), Arc::clone(&seen));
    api.behave(move |_, post| {
        let key = post.key.as_deref().unwrap_or_default();
        if key.starts_with("denied") {
            return Conduct::Answer(404);
        }
        if !key.starts_with("late") {
            return Conduct::Answer(200);
        }
        kept.lock().unwrap().push(Instant::now());
        *count.lock().unwrap() += 1;
        if *count.lock().unwrap() % 2 == 0 {
            return Conduct::Answer(200);
        }
        Conduct::AnswerWith {
            status: 503,
            headers: vec![("Retry-After", asked.as_secs().to_string())],
            body: Vec::new(),
        }
    });
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (round, orders) in [&[][..], &["pause", "resume"], &["restart"]]
        .into_iter()
        .enumerate()
    {
        for order in orders {
            assert_eq!(node.order("grpc", order).await, StatusCode::ACCEPTED);
            let state = if *order == "pause" { "paused" } else { "up" };
            node.lane_is("grpc", state, PATIENCE).await;
        }
        assert_eq!(path(&node, "/grpc", &format!("well-{round}")).await, "GRPC");
        assert_eq!(path(&node, "/grpc", &format!("late-{round}")).await, "GRPC");
        assert_eq!(
            path(&node, "/grpc", &format!("denied-{round}")).await,
            "GRPC"
        );
        eventually("each has ended", PATIENCE, async || {
            let ledger = &node.status().await["ledger"];
            let ended = [&ledger["delivered"], &ledger["dead"]];
            (ended == [&json!(2 * (round + 1)), &json!(round + 1)]).then_some(())
        })
        .await;
        let times = times.lock().unwrap();
        assert_eq!(times.len(), 2 * (round + 1), "{orders:?}");
        let pause = times[2 * round + 1] - times[2 * round];
        assert!(pause >= asked, "{orders:?}: {pause:?}");
        let denied = api.posts();
        let denied = denied
            .iter()
            .filter(|post| post.key == Some(format!("denied-{round}")));
        assert_eq!(denied.count(), 1, "{orders:?}");
    }
}

#[actix_rt::test]
async fn a_lane_that_drains_delivers_what_it_has_and_takes_nothing_new() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let (proxy, variables) = through_proxy(nats.variables());
    let mut api = Api::start();
    api.stop().await;
    let node = Node::start(&api.url(), &[grpc_variables(), variables].concat()).await;
    all_are(&node, "up").await;
    for at in 0..5 {
        assert_eq!(path(&node, "/nats", &format!("before-{at}")).await, "NATS");
    }
    // A busy machine may park some meanwhile.
    assert_ne!(node.lane("nats").await["in_flight"], 0);

    let drained = order(&node, "nats/drain").await;
    assert_eq!(
        (&drained["state"], &drained["ordered"]["action"]),
        (&json!("up"), &json!("drain"))
    );
    let takes_nothing = async |when: &str| {
        for at in 0..6 {
            assert_eq!(path(&node, "/", &format!("{when}-{at}")).await, "GRPC");
        }
        let pinned = path(&node, "/nats", &format!("{when}-pinned")).await;
        assert_eq!(pinned, "spool", "{when}");
        assert_eq!(node.metric("waypost_lane_up{lane=\"nats\"}").await, "0");
    };
    takes_nothing("draining").await;
    let attempts = node.lane("nats").await["attempts"].clone();
    proxy.cut();
    eventually("it has connected again", PATIENCE, async || {
        let lane = node.lane("nats").await;
        (lane["state"] == "up" && lane["attempts"] != attempts).then_some(())
    })
    .await;
    takes_nothing("again").await;

    api.start_again();
    eventually("it has delivered what it had", PATIENCE, async || {
        let lane = node.lane("nats").await;
        (lane["delivered"] == 5 && lane["in_flight"] == 0).then_some(())
    })
    .await;
    takes_nothing("empty").await;

    // The only lane that takes records may not be ready for a new one.
    order(&node, "grpc/drain").await;
    assert_eq!(path(&node, "/", "both").await, "spool");
    order(&node, "resume").await;
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["delivered"], 5 + 3 * 7 + 1, "{ledger}");
    assert_eq!(path(&node, "/nats", "after").await, "NATS");
    assert_eq!(node.metric("waypost_lane_up{lane=\"nats\"}").await, "1");
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn the_same_order_again_changes_nothing() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let resumed = order(&node, "grpc/resume").await;
    assert_eq!(resumed["ordered"], Value::Null, "{resumed}");
    for action in ["pause", "drain", "resume"] {
        let first = order(&node, &format!("grpc/{action}")).await;
        let (attempts, since) = (&first["attempts"], first["ordered"]["since_s"].as_f64());
        for _ in 0..3 {
            order(&node, action).await;
        }
        let again = order(&node, &format!("grpc/{action}")).await;
        assert_eq!(
            (&again["ordered"]["action"], &again["attempts"]),
            (&json!(action), attempts)
        );
        assert!(
            again["ordered"]["since_s"].as_f64() > since,
            "the first one counts"
        );
    }
    for _ in 0..2 {
        let (status, _) = node
            .tell("/api/lanes/grpc/weight", json!({"weight": 1}))
            .await;
        assert_eq!(status, StatusCode::OK);
    }
    let lines = orders_in_log(&node);
    assert_eq!(lines.len(), 4, "{lines:#?}");
    for unknown in ["paint", "grpc/paint", "pigeon/pause", "nats/drain"] {
        let (status, _) = node.tell(&format!("/api/lanes/{unknown}"), json!({})).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{unknown}");
    }
}

#[actix_rt::test]
async fn orders_that_are_kept_hold_over_a_kill_and_no_paused_lane_connects() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let variables = [grpc_variables(), nats.variables(), keep_orders()].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    all_are(&node, "up").await;
    order(&node, "nats/pause").await;
    order(&node, "grpc/drain").await;
    let (_, lane) = node
        .tell("/api/lanes/nats/weight", json!({"weight": 7}))
        .await;
    assert_eq!(lane["weight_set"]["kept"], true, "{lane}");
    let before = node.lane("nats").await["ordered"]["since_s"].as_f64();
    node.killed_and_started().await;

    let lane = node.lane("nats").await;
    let ordered = |lane: &Value| lane["ordered"].clone();
    assert_eq!(
        (&lane["state"], &lane["attempts"], &lane["weight"]),
        (&json!("paused"), &json!(0), &json!(7))
    );
    assert_eq!(
        (
            &ordered(&lane)["action"],
            &ordered(&lane)["by"],
            &ordered(&lane)["kept"]
        ),
        (&json!("pause"), &json!(LOOPBACK), &json!(true))
    );
    assert!(ordered(&lane)["since_s"].as_f64() > before, "{lane}");
    assert_eq!(lane["weight_set"]["by"], LOOPBACK);
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(ordered(&node.lane("grpc").await)["action"], "drain");
    for way in ["/", "/nats", "/grpc"] {
        assert_eq!(path(&node, way, &format!("stopped{way}")).await, "spool");
    }
    assert_eq!(node.lane("nats").await["attempts"], 0);

    order(&node, "resume").await;
    assert_eq!(node.at_rest(PATIENCE).await["delivered"], 3);
    node.killed_and_started().await;
    all_are(&node, "up").await;
    assert_eq!(node.lane("nats").await["weight"], 7);
}

#[actix_rt::test]
async fn a_restart_forgets_orders_that_are_not_kept() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    order(&node, "pause").await;
    node.tell("/api/lanes/grpc/weight", json!({"weight": 7}))
        .await;
    node.killed_and_started().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let lane = node.lane("grpc").await;
    assert_eq!(
        (&lane["ordered"], &lane["weight_set"], &lane["weight"]),
        (&Value::Null, &Value::Null, &json!(1))
    );
}

#[actix_rt::test]
async fn a_kill_among_orders_leaves_the_last_that_was_answered_or_a_later_one() {
    let api = Api::start();
    let variables = [grpc_variables(), keep_orders()].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    let mut sent = 0;
    for round in 0..8 {
        let mut answered = sent;
        let kill_at = sent + fastrand::u64(1..20);
        // The last order is under way when the node is killed.
        while sent < kill_at {
            sent += 1;
            let (status, _) = node
                .tell("/api/lanes/grpc/weight", json!({"weight": sent}))
                .await;
            assert_eq!(status, StatusCode::OK);
            answered = sent;
        }
        sent += 1;
        let url = format!("http://127.0.0.1:{}/api/lanes/grpc/weight", node.admin);
        let order = awc::Client::default()
            .post(url)
            .send_json(&json!({"weight": sent}));
        let order = actix_rt::spawn(order);
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..3000))).await;
        node.killed_and_started().await;
        order.await.ok();
        let lane = node.lane("grpc").await;
        let weight = lane["weight"].as_u64().expect("a number");
        assert!(
            (answered..=sent).contains(&weight),
            "{round}: {answered} to {sent}: {lane}"
        );
        assert_eq!(lane["weight_set"]["kept"], true, "{lane}");
    }
}

/// Waits until the log has a line with each of `parts`.
async fn log_tells(node: &Node, parts: &[&str]) {
    eventually(&format!("the log has {parts:?}"), PATIENCE, async || {
        let log = node.log();
        let mut lines = log.lines();
        lines
            .any(|line| parts.iter().all(|part| line.contains(part)))
            .then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn signals_that_ask_for_nothing_end_no_node() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let mut load = Load::start(&node);
    for signal in ["USR1", "USR2", "HUP"] {
        for _ in 0..3 {
            load.take(10).await;
            node.signal(signal);
        }
        log_tells(&node, &[&format!("SIG{signal}")]).await;
    }
    load.take(10).await;
    load.end().await;
    assert_eq!(load.untaken(), 0);
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn sigquit_drains_as_sigterm_does() {
    for signal in ["QUIT", "TERM", "INT"] {
        let api = Api::start();
        api.delay(Duration::from_millis(500));
        let mut node = Node::start(&api.url(), &grpc_variables()).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        for at in 0..5 {
            path(&node, "/", &format!("{signal}-{at}")).await;
        }
        node.signal(signal);
        log_tells(&node, &["draining"]).await;
        // The others end no drain.
        for other in ["HUP", "USR1"] {
            node.signal(other);
        }
        let status = node.ended(PATIENCE).await;
        assert_eq!(status.code(), Some(0), "{signal}");
        let log = node.log();
        assert!(log.contains("drained"), "{signal}: {log}");
        assert_eq!(api.count(), 5, "{signal}: the POSTs under way have ended");
    }
}

#[actix_rt::test]
async fn a_demo_drains_its_node_when_its_terminal_goes() {
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let [listen, admin] = [(); 2].map(|()| format!("{LOOPBACK}:{}", free_port()));
    let mut demo = process::start(env!("CARGO_BIN_EXE_waypost"), |command| {
        command
            .args(["-v", "demo", "--listen", &listen, "--admin", &admin])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.reopen().expect("the log"));
    })
    .expect("the program starts");
    let tells = async |part: &str| {
        eventually(part, PATIENCE, async || {
            let log = fs::read_to_string(log.path()).expect("text");
            log.contains(part).then_some(())
        })
        .await;
    };
    tells("The node stays up").await;
    process::signal(&demo, "USR1");
    tells("SIGUSR1").await;
    process::signal(&demo, "HUP");
    let status = eventually("the demo ends", PATIENCE, async || {
        demo.try_wait().expect("a child's status")
    });
    assert_eq!(status.await.code(), Some(0));
    tells("drained").await;
}
