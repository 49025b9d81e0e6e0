//! The log: one start-up line of a healthy node, only lines that an operator can use, and the fields
//! that the docs name.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    io::{self, PipeReader, Read as _},
    net::TcpListener,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::Duration,
};

use awc::http::StatusCode;
use serde_json::{Map, Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane as _, Nats, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    process,
    rig::Rig as _,
    traffic,
};

const LANES: [&str; 3] = ["grpc", "nats", "rabbitmq"];
/// The server may sync later than it confirms, which is its default.
const SYNC_WARNING: &str = "the broker's settings weaken the guarantee";
/// Parts of a line that Rust's `Debug` or a client library wrote.
const FOREIGN: [&str; 5] = ["Some(", "Ok(", " { ", "lapin", "async_nats"];

/// Starts `node`'s three lanes, carries a record and stops the node.
async fn work_and_stop(node: &mut Node) {
    for lane in LANES {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let (status, receipt) = node.post("/", "a", traffic()[0].clone()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    node.at_rest(PATIENCE).await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
}

#[actix_rt::test]
async fn a_healthy_start_is_one_line_and_no_client_library_speaks() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    let api = Api::start();
    let variables = [grpc_variables(), nats.variables(), rabbitmq.variables()].concat();
    let mut node = Node::start(&api.url(), &variables).await;
    work_and_stop(&mut node).await;
    let log = node.log();
    let starts: Vec<_> = log
        .lines()
        .filter(|line| line.contains("node is up"))
        .collect();
    assert_eq!(starts.len(), 1, "{log}");
    let spool = node.data().display();
    for part in [
        format!("ingest=127.0.0.1:{}", node.ingest),
        format!("admin=127.0.0.1:{}", node.admin),
        "lanes=\"grpc, nats, rabbitmq\"".to_owned(),
        format!("api={}", api.url()),
        format!("spool={spool}"),
        "policy=\"round-robin\"".to_owned(),
    ] {
        assert!(starts[0].contains(&part), "no {part} in {}", starts[0]);
    }
    let mut seen = HashSet::new();
    for line in log.lines() {
        let (_time, rest) = line.split_once(' ').expect("a time");
        assert!(seen.insert(rest), "twice: {line}");
        let rest = rest.trim_start();
        let (level, rest) = rest.split_once(' ').expect("a level");
        assert!(level == "INFO" || rest.contains(SYNC_WARNING), "{line}");
        assert!(rest.starts_with("waypost::"), "{line}");
        for part in FOREIGN {
            assert!(!rest.contains(part), "{part} in {line}");
        }
    }

    let mut node = Node::start_with_json_log(&api.url(), &variables).await;
    work_and_stop(&mut node).await;
    json_log_is_clean(&node, &api);
}

fn json_log_is_clean(node: &Node, api: &Api) {
    let log = node.log();
    let lines = log.lines().map(serde_json::from_str::<Map<String, Value>>);
    let lines: Vec<_> = lines.map(|line| line.expect("an object a line")).collect();
    let starts: Vec<_> = lines
        .iter()
        .filter(|line| line["message"] == "node is up")
        .collect();
    assert_eq!(starts.len(), 1, "{log}");
    for (key, value) in [
        ("ingest", json!(format!("127.0.0.1:{}", node.ingest))),
        ("admin", json!(format!("127.0.0.1:{}", node.admin))),
        ("lanes", json!("grpc, nats, rabbitmq")),
        ("api", json!(api.url())),
        ("spool", json!(node.data().display().to_string())),
        ("policy", json!("round-robin")),
    ] {
        assert_eq!(starts[0][key], value, "{key}");
    }
    let mut seen = HashSet::new();
    for mut line in lines {
        line.remove("timestamp");
        let text = Value::Object(line.clone()).to_string();
        let is_expected = line["level"] == "INFO" || line["message"] == SYNC_WARNING;
        assert!(is_expected, "{text}");
        let target = line["target"].as_str().expect("a target");
        assert!(target.starts_with("waypost::"), "{text}");
        for value in line.values() {
            let value = value.as_str().unwrap_or_default();
            for part in FOREIGN {
                assert!(!value.contains(part), "{part} in {text}");
            }
        }
        assert!(seen.insert(text.clone()), "twice: {text}");
    }
}

/// Members of each line that are no fields.
const COMMON: [&str; 4] = ["timestamp", "level", "target", "message"];

/// Names and types of the table of fields in `docs/operate.md`.
fn documented_fields() -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operate.md");
    let page = fs::read_to_string(path).expect("the page is there");
    let rows = page.split("| field | type | is |").nth(1);
    let rows = rows.expect("a table of fields").lines().skip(2);
    let mut fields = BTreeMap::new();
    for row in rows.map_while(|line| line.strip_prefix("| ")) {
        let mut cells = row.split(" | ");
        let names = cells.next().expect("names").split('`').skip(1).step_by(2);
        // One type for all, or one for each.
        let kinds = cells.next().expect("a type").split(", ").cycle();
        for (name, kind) in names.zip(kinds) {
            let before = fields.insert(name.to_owned(), kind.to_owned());
            assert_eq!(before, None, "{name} twice");
        }
    }
    fields
}

/// The arguments before the message of each line that the program may log.
fn logged_arguments(source: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    for level in ["error", "warn", "info", "debug", "trace"] {
        for (at, call) in source.match_indices(&format!("{level}!(")) {
            let mut depth = 0_usize;
            let mut argument = String::new();
            for letter in source[at + call.len()..].chars() {
                match letter {
                    // The message is the last argument, or only its values follow.
                    '"' if argument.trim().is_empty() => break,
                    ')' if depth == 0 => break,
                    ',' if depth == 0 => arguments.push(std::mem::take(&mut argument)),
                    _ => {
                        depth += usize::from("([{".contains(letter));
                        depth -= usize::from(")]}".contains(letter));
                        argument.push(letter);
                    }
                }
            }
        }
    }
    arguments
}

/// The name of the field that an argument of `tracing` is.
fn field_name(argument: &str) -> &str {
    let name = argument
        .split_once(" = ")
        .map_or(argument, |(name, _)| name);
    name.trim().trim_start_matches(['%', '?'])
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder is there");
    let paths = entries.map(|entry| entry.expect("it can be read").path());
    let files = paths.flat_map(|path| {
        if path.is_dir() {
            sources(&path)
        } else {
            vec![path]
        }
    });
    files.collect()
}

#[test]
fn the_docs_list_each_field_that_the_program_logs() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&source).into_iter();
    let files = files.filter(|path| path.extension() == Some("rs".as_ref()));
    let texts = files.map(|path| fs::read_to_string(path).expect("text"));
    let arguments: Vec<_> = texts.flat_map(|text| logged_arguments(&text)).collect();
    let logged: BTreeSet<_> = arguments
        .iter()
        .map(|argument| field_name(argument))
        .collect();
    let documented = documented_fields();
    let documented: BTreeSet<_> = documented.keys().map(String::as_str).collect();
    assert_eq!(logged, documented);
}

/// Each line has the fields of the docs, with their types.
fn fields_are_documented(line: &Map<String, Value>) {
    let documented = documented_fields();
    for (name, value) in line {
        let kind = match value {
            Value::Number(_) => "number",
            Value::Bool(_) => "boolean",
            _ => "text",
        };
        if !COMMON.contains(&name.as_str()) {
            assert_eq!(
                documented.get(name).map(String::as_str),
                Some(kind),
                "{name}: {line:?}"
            );
        }
    }
}

#[actix_rt::test]
async fn the_lines_of_an_outage_have_the_fields_and_types_of_the_docs() {
    let mut api = Api::start();
    let variables = [
        grpc_variables(),
        vec![("API__GIVE_UP_AFTER".into(), "1s".into())],
    ]
    .concat();
    let mut node = Node::start_with_json_log(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    api.behave(|_, _| Conduct::Answer(422));
    node.post("/", "refused", traffic()[0].clone())
        .await
        .unwrap();
    node.tell("/api/lanes/grpc/weight", json!({"weight": 2}))
        .await;
    node.order("grpc", "restart").await;
    node.tell("/api/reload", json!({})).await;
    eventually("the record is dead", PATIENCE, async || {
        (node.dead().await.len() == 1).then_some(())
    })
    .await;
    api.stop().await;
    for number in 0..10 {
        let key = format!("away-{number}");
        node.post("/", &key, traffic()[0].clone()).await.unwrap();
    }
    eventually("the API is down", PATIENCE, async || {
        (node.status().await["api"]["state"] == "down").then_some(())
    })
    .await;
    api.start_again();
    api.behave(|_, _| Conduct::Answer(200));
    node.all_ended(11, PATIENCE).await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    let log = node.log();
    let lines = log.lines().map(serde_json::from_str::<Map<String, Value>>);
    let lines: Vec<_> = lines.map(|line| line.expect("an object a line")).collect();
    lines.iter().for_each(fields_are_documented);
    for message in [
        "dead letter",
        "the weight of the lane is set",
        "API is down: records wait",
    ] {
        let is_told = lines.iter().any(|line| line["message"] == message);
        assert!(is_told, "no {message:?} in {log}");
    }
}

fn traffic_texts() -> Vec<String> {
    let records = traffic().into_iter();
    let texts = records.map(|record| String::from_utf8(record.into()).expect("text"));
    texts.collect()
}

const LOST: &str = "lines of the log were lost here: the standard error did not take them";

/// A node whose standard error is a full pipe that nobody reads, with the records that it has
/// taken and delivered meanwhile.
async fn node_with_full_pipe(api: &Api) -> (Node, PipeReader) {
    let (pipe, stderr) = io::pipe().expect("a pipe");
    // It logs some thousand lines for a batch.
    let variables = [grpc_variables(), vec![("RUST_LOG".into(), "trace".into())]].concat();
    let node = Node::start_with_stderr(&api.url(), &variables, "", stderr).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let batch = format!("[{}]", traffic_texts().join(","));
    let (status, receipt) = node.post("/", "batch", batch.into()).await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    node.at_rest(PATIENCE).await;
    eventually("lines are lost", PATIENCE, async || {
        (node.status().await["log"]["refuses"] == true).then_some(())
    })
    .await;
    (node, pipe)
}

/// Reads the pipe until the node has ended.
fn read(mut pipe: PipeReader) -> JoinHandle<Vec<Map<String, Value>>> {
    thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).expect("text");
        let lines = text.lines().map(serde_json::from_str::<Map<String, Value>>);
        lines.map(|line| line.expect("a whole line")).collect()
    })
}

#[actix_rt::test]
async fn a_standard_error_that_nobody_reads_holds_up_nothing_and_its_lost_lines_are_told() {
    let api = Api::start();
    let (mut node, pipe) = node_with_full_pipe(&api).await;
    assert_eq!(api.taken().len(), traffic().len());
    let status = node.status().await;
    let warnings = status["warnings"].as_array().expect("a list");
    let told = warnings.iter().find(|warning| warning["about"] == "log");
    assert_eq!(told.expect("a warning")["level"], "warning", "{status}");
    let lost = node.metric("waypost_log_lines_lost_total").await;
    assert!(lost.parse::<u64>().expect("a number") > 0, "{lost}");
    assert_eq!(node.get("/healthz").await.unwrap().0, StatusCode::OK);
    assert_eq!(node.get("/readyz").await.unwrap().0, StatusCode::OK);

    let reader = read(pipe);
    eventually("the log takes lines again", PATIENCE, async || {
        (node.status().await["log"]["refuses"] == false).then_some(())
    })
    .await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    let lines = reader.join().expect("whole lines");
    let told = lines
        .iter()
        .filter(|line| line.get("message") == Some(&json!(LOST)));
    let told: u64 = told
        .map(|line| line["lines"].as_u64().expect("a number"))
        .sum();
    assert!(told >= lost.parse().unwrap(), "{told} of {lost}");
}

/// Ends a node that drains, as its API hangs, by a second signal.
async fn ends_at_the_second_signal(node: &mut Node, api: &Api) {
    api.behave(|_, _| Conduct::Hang);
    node.post("/", "slow", traffic()[0].clone()).await.unwrap();
    node.signal("TERM");
    eventually("it drains", PATIENCE, async || {
        (node.status().await["draining"] == true).then_some(())
    })
    .await;
    node.signal("TERM");
    assert_eq!(node.ended(PATIENCE).await.code(), Some(1));
}

#[actix_rt::test]
async fn a_standard_error_that_nobody_reads_keeps_no_node_from_its_end() {
    let api = Api::start();
    let (mut node, pipe) = node_with_full_pipe(&api).await;
    node.signal("TERM");
    assert!(node.ended(Duration::from_secs(10)).await.success());
    drop(pipe);

    // The second signal ends it, whatever the drain waits for.
    let (mut node, pipe) = node_with_full_pipe(&api).await;
    ends_at_the_second_signal(&mut node, &api).await;
    drop(pipe);
}

#[actix_rt::test]
async fn the_last_lines_are_there_however_a_node_ends() {
    // Its reason is told, each time.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("it has one").to_string();
    for _ in 0..50 {
        let data = tempfile::tempdir().expect("a folder");
        let data = data.path().to_str().expect("a plain path");
        let free = format!("127.0.0.1:{}", process::free_port());
        let arguments = [
            "run", "--data", data, "--admin", &free, "--listen", &address,
        ];
        let (status, _, told) = process::waypost(&arguments).await;
        assert_eq!(status, Some(1), "{told}");
        let why = format!("cannot listen on {address}: Address already in use (os error 98)\n");
        assert!(told.ends_with(&why), "{told}");
    }
    // A second signal.
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    ends_at_the_second_signal(&mut node, &api).await;
    let log = node.log();
    assert!(log.ends_with("second signal: ending at once\n"), "{log}");
}

#[actix_rt::test]
async fn a_panic_is_a_line_of_the_log() {
    let api = Api::start();
    let (pipe, stderr) = io::pipe().expect("a pipe");
    let fault = "lane=1*panic(planted)->off";
    let mut node = Node::start_with_stderr(&api.url(), &grpc_variables(), fault, stderr).await;
    let reader = read(pipe);
    node.lane_is("grpc", "up", PATIENCE).await;
    node.post("/", "a", traffic()[0].clone()).await.unwrap();
    eventually("the lane was started again", PATIENCE, async || {
        (node.lane("grpc").await["restarts"] == 1).then_some(())
    })
    .await;
    node.signal("TERM");
    assert!(node.ended(PATIENCE).await.success());
    let lines = reader.join().expect("whole lines");
    let panics: Vec<_> = lines
        .iter()
        .filter(|line| line.get("message") == Some(&json!("panicked")))
        .collect();
    assert_eq!(panics.len(), 1, "{lines:?}");
    assert_eq!(panics[0]["reason"], "planted");
    let location = panics[0]["location"].as_str().expect("text");
    assert!(location.contains(".rs:"), "{location}");
    fields_are_documented(panics[0]);
}
