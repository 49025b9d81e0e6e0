//! The configuration is read again while the node runs: what is applied, what is rejected, what needs
//! a restart.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
};

use awc::http::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use waypost::config::Config;

use crate::{
    ingest::nobody,
    support::{
        api::Api,
        eventually,
        lanes::{Lane as _, Nats, grpc_variables},
        load::Load,
        node::{Node, PATIENCE},
        process::free_port,
        rig::Rig as _,
        traffic,
    },
};

const POLICIES: [&str; 5] = ["round-robin", "weighted", "failover", "hash", "adaptive"];
const LANES: [&str; 2] = ["grpc", "nats"];

/// A configuration file that is replaced now and then.
struct File {
    _folder: TempDir,
    path: PathBuf,
}

impl File {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("waypost.toml");
        let file = Self {
            _folder: folder,
            path,
        };
        file.write(text);
        file
    }

    fn write(&self, text: impl AsRef<[u8]>) {
        fs::write(&self.path, text).expect("the file is ours");
    }
}

/// A file with these settings, and a rule that sends some records by the gRPC lane.
fn text(policy: &str, weights: [usize; 2]) -> String {
    text_with_rule(policy, weights, "grpc")
}

/// The same, with another lane in the rule.
fn text_with_rule(policy: &str, weights: [usize; 2], lane: &str) -> String {
    let [grpc, nats] = weights;
    format!(
        "[router]\npolicy = \"{policy}\"\n\n[lanes.grpc]\nweight = {grpc}\n\n\
         [lanes.nats]\nweight = {nats}\nbundle = 1\n\n[spool]\nmax = \"1GiB\"\n\n\
         [[routes]]\nwhen = {{ pointer = \"/name\", equals = \"routed\" }}\n\
         lanes = [\"{lane}\"]\n"
    )
}

/// The path of a record that the rule is about.
async fn routed(node: &Node, key: &str) -> Value {
    let record = json!({
        "name": "routed", "location": "x", "age": 1, "infectedtype": "x", "state": "x"
    });
    let record = record.to_string().into();
    let (status, receipt) = node.post("/", key, record).await.expect("an answer");
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    receipt["path"].clone()
}

fn any_text() -> (String, &'static str, [usize; 2], &'static str) {
    let policy = POLICIES[fastrand::usize(..POLICIES.len())];
    let weights = [fastrand::usize(1..=1000), fastrand::usize(1..=1000)];
    let lane = LANES[fastrand::usize(..LANES.len())];
    let text = text_with_rule(policy, weights, lane);
    (text, policy, weights, lane)
}

async fn reload(node: &Node) -> (StatusCode, Value) {
    node.tell("/api/reload", json!({})).await
}

/// The policy and the weight of each lane in effect.
async fn in_effect(node: &Node) -> (Value, [Value; 2]) {
    let status = node.status().await;
    let weight = |lane: &str| {
        let mut lanes = status["lanes"].as_array().expect("lanes").iter();
        let lane = lanes.find(|found| found["lane"] == lane);
        lane.expect("it is configured")["weight"].clone()
    };
    (status["policy"].clone(), LANES.map(weight))
}

fn expected(policy: &str, weights: [usize; 2]) -> (Value, [Value; 2]) {
    (json!(policy), weights.map(|weight| json!(weight)))
}

/// A connection of a client that is kept open.
struct KeptConnection(TcpStream);

impl KeptConnection {
    fn new(node: &Node) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", node.ingest)).expect("the node listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(stream)
    }

    fn post(&mut self, key: usize) {
        let body = &traffic()[0];
        let head = format!(
            "POST / HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\n\
             Idempotency-Key: kept-{key}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.0
            .write_all(&[head.as_bytes(), body].concat())
            .expect("it is open");
        let mut answer = Vec::new();
        let mut part = [0; 4096];
        while !answer.ends_with(b"}") {
            let read = self.0.read(&mut part).expect("an answer");
            assert!(read > 0, "the node has closed the connection");
            answer.extend(&part[..read]);
        }
        assert!(
            answer.starts_with(b"HTTP/1.1 202"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
}

#[actix_rt::test]
async fn a_hundred_reloads_under_load_lose_nothing_refuse_nothing_and_close_nothing() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let api = Api::start();
    let file = File::new(&text("round-robin", [1, 1]));
    let variables = [grpc_variables(), nats.variables()].concat();
    let node = Node::start_with_config(&api.url(), &variables, &file.path).await;
    for lane in LANES {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let mut load = Load::start(&node);
    let mut connection = KeptConnection::new(&node);
    let mut rule_takes = "grpc";
    for round in 0..100 {
        load.take(5).await;
        connection.post(round);
        let (text, policy, weights, lane) = any_text();
        let before = in_effect(&node).await;
        let is_good = round % 5 != 4;
        if is_good {
            rule_takes = lane;
        }
        file.write(if is_good {
            text
        } else {
            text.replace("1GiB", "1 Gib of room")
        });
        let expected = if is_good {
            expected(policy, weights)
        } else {
            before
        };
        if round % 2 == 0 {
            let (status, body) = reload(&node).await;
            let answer = if is_good {
                StatusCode::OK
            } else {
                StatusCode::UNPROCESSABLE_ENTITY
            };
            assert_eq!(status, answer, "{body}");
        } else {
            let outcome = if is_good { "applied" } else { "rejected" };
            node.signal("HUP");
            eventually("the signal is obeyed", PATIENCE, async || {
                let last = node.status().await["reload"].clone();
                (last["by"] == "SIGHUP" && last["outcome"] == outcome).then_some(())
            })
            .await;
            // The next round is by the other way, so this one is the last.
        }
        assert_eq!(in_effect(&node).await, expected, "round {round}");
        let tag = if rule_takes == "grpc" { "GRPC" } else { "NATS" };
        let path = routed(&node, &format!("routed-{round}")).await;
        assert_eq!(path, tag, "round {round}");
    }
    file.write(text("adaptive", [1, 1]));
    reload(&node).await;
    eventually("each lane has a score", PATIENCE, async || {
        let lanes = [node.lane("grpc").await, node.lane("nats").await];
        lanes
            .iter()
            .all(|lane| lane["score"].is_f64())
            .then_some(())
    })
    .await;
    file.write(text("weighted", [1, 1]));
    reload(&node).await;
    assert_eq!(node.lane("grpc").await["score"], Value::Null);
    file.write(text("failover", [1, 1]));
    reload(&node).await;
    let mut paths = Vec::new();
    for at in 0..6 {
        let key = format!("failover-{at}");
        let (_, receipt) = node.post("/", &key, traffic()[0].clone()).await.unwrap();
        paths.push(receipt["path"].clone());
    }
    assert_eq!(paths, ["GRPC"; 6]);
    connection.post(100);
    load.end().await;
    assert_eq!(load.untaken(), 0);
    let verdict = load.is_met(&api, PATIENCE);
    verdict.await;
    node.at_rest(PATIENCE).await;
    for lane in LANES {
        let lane = node.lane(lane).await;
        assert_eq!(
            (&lane["attempts"], &lane["restarts"]),
            (&json!(1), &json!(0)),
            "{lane}"
        );
    }
    let posts = api.taken();
    assert!(
        posts.values().all(|times| *times == 1),
        "no record was sent twice"
    );
}

/// Breaks a good configuration, most of the time.
fn mutated(good: &str) -> Vec<u8> {
    const PARTS: [&str; 16] = [
        "[",
        "]",
        "=",
        "\"",
        "\n",
        "\0",
        "{",
        "'",
        "weight = -1\n",
        "policy = 7\n",
        "[lanes.pigeon]\n",
        "[router]\n",
        "nonsense = 1\n",
        "[lanes.grpc]\n",
        "\\",
        "1001",
    ];
    let mut text = good.as_bytes().to_vec();
    for _ in 0..fastrand::usize(1..=3) {
        let at = fastrand::usize(..=text.len());
        let end = (at + fastrand::usize(1..=12)).min(text.len());
        match fastrand::u8(..6) {
            0 => text.truncate(at),
            1 => drop(text.drain(at..end)),
            2 if at < text.len() => text[at] = fastrand::u8(..),
            3 => {
                let part = text[at..end].to_vec();
                let to = fastrand::usize(..=text.len());
                text.splice(to..to, part);
            }
            4 => {
                let mut lines: Vec<_> = text
                    .split(|byte| *byte == b'\n')
                    .map(<[u8]>::to_vec)
                    .collect();
                fastrand::shuffle(&mut lines);
                text = lines.join(&b'\n');
            }
            _ => {
                let part = PARTS[fastrand::usize(..PARTS.len())];
                text.splice(at..at, part.bytes());
            }
        }
    }
    text
}

#[actix_rt::test]
async fn none_of_a_thousand_malformed_configurations_is_applied_by_half() {
    const MALFORMED: usize = 1000;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    fastrand::seed(seed);
    let api = Api::start();
    let file = File::new(&text("round-robin", [1, 1]));
    let variables = [grpc_variables(), nobody().to_vec()].concat();
    let node = Node::start_with_config(&api.url(), &variables, &file.path).await;
    let environment = node.environment();
    let mut in_force = in_effect(&node).await;
    let mut rules = Config::load(Some(&file.path), &environment, &[])
        .expect("good")
        .routes;
    let mut path = Some("GRPC");
    let (mut malformed, mut posted) = (0, 0);
    while malformed < MALFORMED {
        let mutant = mutated(&any_text().0);
        file.write(&mutant);
        let (status, answer) = reload(&node).await;
        let shown = String::from_utf8_lossy(&mutant);
        match Config::load(Some(&file.path), &environment, &[]) {
            Err(mistakes) => {
                malformed += 1;
                assert_eq!(
                    status,
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "{answer}\n{shown}"
                );
                let reasons = answer["reasons"].as_array().expect("a list");
                assert_eq!(reasons.len(), mistakes.len(), "all: {answer}\n{shown}");
                for (reason, mistake) in reasons.iter().zip(mistakes) {
                    assert_eq!(reason["place"], mistake.place, "{shown}");
                    assert_eq!(reason["key"], mistake.key, "{shown}");
                    assert_eq!(reason["what"], mistake.what, "{shown}");
                }
            }
            Ok(config) => {
                assert_eq!(status, StatusCode::OK, "{answer}\n{shown}");
                if rules != config.routes {
                    let names = |lane: &str| {
                        let mut file = text_with_rule("hash", [1, 1], lane);
                        file = file.split_off(file.find("[[routes]]").expect("a rule"));
                        shown.contains(&file)
                    };
                    path = if names("grpc") {
                        Some("GRPC")
                    } else {
                        names("nats").then_some("spool")
                    };
                    rules = config.routes.clone();
                }
                in_force.0 = json!(config.router.policy.name());
                for (weight, name) in in_force.1.iter_mut().zip(LANES) {
                    let lane = waypost::lane_id::LaneId::from_name(name).expect("a lane");
                    if let Some(new) = config.lanes.weight(lane) {
                        *weight = json!(new);
                    }
                }
            }
        }
        assert_eq!(in_effect(&node).await, in_force, "{shown}");
        if path.is_some() {
            posted += 1;
            let key = format!("routed-{posted}");
            assert_eq!(routed(&node, &key).await.as_str(), path, "{shown}");
        }
    }
    let (status, receipt) = node.post("/", "after", traffic()[0].clone()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
}

#[actix_rt::test]
async fn a_configuration_with_mistakes_is_rejected_with_each_of_them() {
    let api = Api::start();
    let file = File::new(&text("weighted", [3, 4]));
    let variables = [grpc_variables(), nobody().to_vec()].concat();
    let node = Node::start_with_config(&api.url(), &variables, &file.path).await;
    assert_eq!(node.status().await["reload"], Value::Null);
    assert_eq!(node.metric("waypost_reload_rejected").await, "0");
    let wrong = text("fastest", [5, 2000]).replace("bundle = 1", "bundel = 1");
    file.write(wrong);
    let (status, problem) = reload(&node).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(problem["type"], "urn:waypost:problem:configuration");
    let path = file.path.display().to_string();
    let mistakes = [
        (2, "router.policy", "\"fastest\" does not fit"),
        (8, "lanes.nats.weight", "\"2000\" does not fit"),
        (9, "lanes.nats.bundel", "did you mean lanes.nats.bundle?"),
    ];
    let told_all = |reasons: &Value| {
        let reasons = reasons.as_array().expect("a list");
        assert_eq!(reasons.len(), mistakes.len(), "{reasons:?}");
        for (reason, (line, key, what)) in reasons.iter().zip(mistakes) {
            assert_eq!(
                (&reason["place"], &reason["key"]),
                (&json!(format!("{path}:{line}")), &json!(key))
            );
            assert!(
                reason["what"]
                    .as_str()
                    .is_some_and(|text| text.contains(what)),
                "{reason}"
            );
        }
    };
    told_all(&problem["reasons"]);
    let last = node.status().await["reload"].clone();
    assert_eq!(
        (&last["by"], &last["outcome"]),
        (&json!("127.0.0.1"), &json!("rejected"))
    );
    assert!(last["since_s"].as_f64() >= Some(0.0), "{last}");
    told_all(&last["reasons"]);
    assert_eq!(in_effect(&node).await, expected("weighted", [3, 4]));
    assert_eq!(node.metric("waypost_reload_rejected").await, "1");
    let log = node.log();
    let line = log
        .lines()
        .find(|line| line.contains("is rejected"))
        .expect("a line");
    assert!(
        line.contains("WARN") && line.contains("127.0.0.1"),
        "{line}"
    );
    for (number, key, _) in mistakes {
        assert!(
            line.contains(&format!("waypost.toml:{number}: {key}: ")),
            "{line}"
        );
    }

    // The file has gone.
    fs::remove_file(&file.path).unwrap();
    let (status, problem) = reload(&node).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
    assert_eq!(in_effect(&node).await, expected("weighted", [3, 4]));
    file.write(text("hash", [5, 6]));
    let (status, answer) = reload(&node).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let applied = json!(["lanes.grpc.weight", "lanes.nats.weight", "router.policy"]);
    assert_eq!(
        (&answer["applied"], &answer["needs_restart"]),
        (&applied, &json!([]))
    );
    assert_eq!(in_effect(&node).await, expected("hash", [5, 6]));
    assert_eq!(node.metric("waypost_reload_rejected").await, "0");
}

#[actix_rt::test]
async fn settings_that_need_a_restart_are_named_and_the_others_are_applied() {
    let api = Api::start();
    let rabbitmq = format!("amqp://user:one@127.0.0.1:{}/%2f", free_port());
    let good = |policy: &str| {
        let lane = format!("\n[lanes.rabbitmq]\nurl = \"{rabbitmq}\"\n");
        text(policy, [1, 1]) + &lane
    };
    let file = File::new(&good("round-robin"));
    let variables = [grpc_variables(), nobody().to_vec()].concat();
    let node = Node::start_with_config(&api.url(), &variables, &file.path).await;
    let changed = good("failover")
        .replace("1GiB", "2GiB")
        .replace("bundle = 1", "bundle = 2")
        .replace("user:one", "user:two")
        + "\n[api]\nconcurrency = 3\n\n[lanes.pubsub]\nendpoint = \"127.0.0.1:1\"\n";
    file.write(changed);
    let (status, answer) = reload(&node).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let waiting = [
        "lanes.nats.bundle",
        "lanes.rabbitmq.url",
        "lanes.pubsub",
        "api.concurrency",
        "spool.max",
    ];
    assert_eq!(
        (&answer["applied"], &answer["needs_restart"]),
        (&json!(["router.policy"]), &json!(waiting))
    );
    assert_eq!(node.status().await["policy"], "failover");
    assert_eq!(
        node.status().await["reload"]["needs_restart"],
        json!(waiting)
    );
    assert_eq!(node.metric("waypost_reload_needs_restart").await, "5");
    let log = node.log();
    let line = log
        .lines()
        .find(|line| line.contains("is reloaded"))
        .expect("a line");
    for part in ["WARN", "127.0.0.1", "router.policy", &waiting.join(", ")] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    assert!(!log.contains("user:two"), "no password is told");

    // Settings that wait for a restart still do, though the next file is rejected.
    file.write("nonsense");
    reload(&node).await;
    assert_eq!(node.metric("waypost_reload_needs_restart").await, "5");
    file.write(good("failover"));
    let (_, answer) = reload(&node).await;
    assert_eq!(
        (&answer["applied"], &answer["needs_restart"]),
        (&json!([]), &json!([]))
    );
    assert_eq!(node.metric("waypost_reload_needs_restart").await, "0");
}

#[actix_rt::test]
async fn a_weight_that_the_file_changes_replaces_the_one_of_an_order() {
    let api = Api::start();
    let file = File::new(&text("weighted", [1, 1]));
    let keep = ("ADMIN__KEEP_ORDERS".to_owned(), "true".to_owned());
    let variables = [grpc_variables(), nobody().to_vec(), vec![keep]].concat();
    let mut node = Node::start_with_config(&api.url(), &variables, &file.path).await;
    for lane in LANES {
        node.tell(&format!("/api/lanes/{lane}/weight"), json!({"weight": 7}))
            .await;
    }
    // It has changed for one lane only.
    file.write(text("weighted", [3, 1]));
    let (_, answer) = reload(&node).await;
    assert_eq!(answer["applied"], json!(["lanes.grpc.weight"]), "{answer}");
    let by_the_file = async |node: &Node| {
        assert_eq!(in_effect(node).await, expected("weighted", [3, 7]));
        assert_eq!(node.lane("grpc").await["weight_set"], Value::Null);
        assert_eq!(node.lane("nats").await["weight_set"]["kept"], true);
    };
    by_the_file(&node).await;
    node.killed_and_started().await;
    by_the_file(&node).await;
}

#[actix_rt::test]
async fn rules_are_reloaded_unless_one_names_a_lane_that_is_not_there_yet() {
    let api = Api::start();
    let rule = |policy: &str, lane: &str| {
        let when = "{ pointer = \"/state\", exists = true }";
        format!("[[routes]]\nwhen = {when}\npolicy = \"{policy}\"\nlanes = [\"{lane}\"]\n")
    };
    let file = File::new(&rule("failover", "grpc"));
    let node = Node::start_with_config(&api.url(), &grpc_variables(), &file.path).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let rule_of = async |key: &str| {
        let posted = node.post("/", key, traffic()[0].clone()).await.unwrap();
        assert_eq!(posted.0, StatusCode::ACCEPTED);
        let told = node.get(&format!("/api/explain?id={key}")).await.unwrap().1;
        let choice = &told["choices"][0];
        (choice["rule"].clone(), choice["policy"].clone())
    };
    assert_eq!(rule_of("1").await, (json!("routes[1]"), json!("failover")));
    file.write(rule("adaptive", "grpc"));
    let (status, answer) = reload(&node).await;
    assert_eq!(
        (status, &answer["applied"]),
        (StatusCode::OK, &json!(["routes"])),
        "{answer}"
    );
    assert_eq!(rule_of("2").await, (json!("routes[1]"), json!("adaptive")));

    file.write("[lanes.pubsub]\nendpoint = \"127.0.0.1:1\"\n".to_owned() + &rule("hash", "pubsub"));
    let (status, answer) = reload(&node).await;
    let waiting = json!(["lanes.pubsub", "routes"]);
    assert_eq!(
        (status, &answer["needs_restart"]),
        (StatusCode::OK, &waiting),
        "{answer}"
    );
    assert_eq!(rule_of("3").await, (json!("routes[1]"), json!("adaptive")));

    file.write(rule("hash", "kafka"));
    let (status, problem) = reload(&node).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
    assert_eq!(problem["reasons"][0]["key"], "routes[1].lanes", "{problem}");
    file.write("");
    assert_eq!(reload(&node).await.0, StatusCode::OK);
    assert_eq!(rule_of("4").await, (json!("default"), json!("round-robin")));
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_file_that_hangs_holds_up_no_order_and_no_stop() {
    let api = Api::start();
    let file = File::new("");
    let mut node = Node::start_with_config(&api.url(), &grpc_variables(), &file.path).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    // A pipe without a writer hangs as a network disk does.
    fs::remove_file(&file.path).expect("it is there");
    let made = Command::new("mkfifo").arg(&file.path).status();
    assert!(made.expect("mkfifo runs").success());
    node.signal("HUP");
    assert_eq!(node.order("grpc", "pause").await, StatusCode::ACCEPTED);
    let (status, problem) = reload(&node).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{problem}");
    let reason = problem["reasons"][0]["what"].as_str().expect("a reason");
    assert!(reason.contains("is not read"), "{problem}");
    assert_eq!(node.order("grpc", "resume").await, StatusCode::ACCEPTED);
    node.signal("TERM");
    assert_eq!(node.ended(PATIENCE).await.code(), Some(0));
}
