//! The metrics of a real node: their names, their two formats, and how far behind a lane is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use awc::http::{Method, StatusCode, header};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use serde_json::json;

use crate::support::{
    self,
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    traffic,
};

/// The promises of the contract: name, type, labels.
const CONTRACT: [(&str, &str, &[&str]); 17] = [
    ("waypost_records_accepted_total", "counter", &["path"]),
    ("waypost_records_delivered_total", "counter", &["path"]),
    ("waypost_records_dead_total", "counter", &["path"]),
    ("waypost_redeliveries_total", "counter", &["path"]),
    ("waypost_lane_up", "gauge", &["lane"]),
    ("waypost_lane_restarts_total", "counter", &["lane"]),
    ("waypost_spool_records", "gauge", &[]),
    ("waypost_spool_bytes", "gauge", &[]),
    ("waypost_in_flight", "gauge", &["lane"]),
    ("waypost_handed_over_total", "counter", &["path"]),
    ("waypost_parked_records", "gauge", &[]),
    ("waypost_missing_records", "gauge", &[]),
    ("waypost_api_up", "gauge", &[]),
    ("waypost_ingest_seconds", "histogram", &["code"]),
    ("waypost_publish_seconds", "histogram", &["lane"]),
    ("waypost_post_seconds", "histogram", &["lane"]),
    ("waypost_delivery_seconds", "histogram", &["path"]),
];
/// In the docs, and served only once another run's records have come out here.
const OF_OTHER_RUNS: &str = "waypost_ledger_taken_over";
/// Has samples only while the disk fills.
const OF_A_DISK_THAT_FILLS: &str = "waypost_spool_full_in_seconds";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// As Prometheus 2.42 and 3 send it.
const PROMETHEUS_2: &str = "application/openmetrics-text;version=1.0.0,\
     application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
     application/openmetrics-text;version=0.0.1;q=0.5,\
     text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
pub const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const UNSAMPLED: &str = "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const INPUTS: usize = 10_000;

/// A metric as the parser of Python's `prometheus_client` reads it.
#[derive(Debug, Deserialize)]
struct Family {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    samples: Vec<Sample>,
}

#[derive(Debug, Deserialize)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    /// As text: JSON has no infinity.
    value: String,
    exemplar: Option<BTreeMap<String, String>>,
}

impl Family {
    /// The name in a query; of a histogram, without the suffixes of its samples.
    fn queried(&self) -> &str {
        match &*self.kind {
            "counter" | "info" => &self.samples[0].name,
            _ => &self.name,
        }
    }
}

const PARSER: &str = r#"
import json, sys
if sys.argv[1] == "open":
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
else:
    from prometheus_client.parser import text_string_to_metric_families as parse
def sample(of):
    exemplar = of.exemplar and of.exemplar.labels
    return {"name": of.name, "labels": of.labels, "value": repr(of.value), "exemplar": exemplar}
print(json.dumps([
    {"name": found.name, "type": found.type, "samples": [sample(of) for of in found.samples]}
    for found in parse(sys.stdin.read())
]))
"#;

/// `None` if the library is not installed, which is a failure in CI.
fn parse(content_type: &str, text: &str) -> Option<Vec<Family>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/prometheus-client");
    if !folder.is_dir() {
        support::missing("the Python package prometheus-client");
        return None;
    }
    let format = if content_type == OPEN_METRICS {
        "open"
    } else {
        "text"
    };
    let mut python = Command::new("python3")
        .args(["-c", PARSER, format])
        .env("PYTHONPATH", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is there");
    let mut input = python.stdin.take().expect("piped");
    input.write_all(text.as_bytes()).expect("it reads");
    drop(input);
    let output = python.wait_with_output().expect("it ends");
    assert!(
        output.status.success(),
        "the parser refuses this:\n{text}\n{output:?}"
    );
    Some(serde_json::from_slice(&output.stdout).expect("JSON"))
}

/// Type and text of the metrics, for a client that accepts this.
async fn metrics(node: &Node, accept: &str) -> (String, String) {
    let url = format!("http://127.0.0.1:{}/metrics", node.admin);
    let request = awc::Client::default().get(url);
    let request = request.insert_header((header::ACCEPT, accept));
    let mut answer = request.send().await.expect("the node answers");
    assert_eq!(answer.status(), StatusCode::OK);
    let content_type = answer.headers().get(header::CONTENT_TYPE);
    let content_type = content_type.expect("a type").to_str().expect("text");
    let content_type = content_type.to_owned();
    let body = answer.body().await.expect("a body");
    (
        content_type,
        String::from_utf8(body.to_vec()).expect("text"),
    )
}

pub async fn post_with_trace(node: &Node, key: &str, traceparent: &str) {
    let url = format!("http://127.0.0.1:{}/", node.ingest);
    let request = awc::Client::default()
        .post(url)
        .insert_header(("Idempotency-Key", key))
        .insert_header(("traceparent", traceparent))
        .content_type("application/json");
    let answer = request.send_body(traffic()[0].clone()).await;
    assert_eq!(
        answer.expect("the node answers").status(),
        StatusCode::ACCEPTED
    );
}

/// A node with everything that has metrics of its own: two APIs, and a file that is read again.
pub async fn node_with_all_metrics(api: &Api) -> Node {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let text = format!(
        "[ingest]\nack = \"disk\"\n[api]\nsigning_key_file = \"{}/tests/config/signing-keys\"\n[apis.other]\nurl = \"{}\"\n",
        env!("CARGO_MANIFEST_DIR"),
        api.url()
    );
    fs::write(file.path(), text).expect("room");
    let node = Node::start_with_config(&api.url(), &grpc_variables(), file.path()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node.post("/", "one", traffic()[0].clone()).await.unwrap();
    node.at_rest(PATIENCE).await;
    node
}

/// The names in the table of metrics of `docs/operate.md`.
pub fn documented() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operate.md");
    let text = fs::read_to_string(path).expect("the page is there");
    let rows = text.split("| metric | labels | is |").nth(1);
    let rows = rows.expect("a table of metrics").lines().skip(2);
    let cells = rows.map_while(|line| line.strip_prefix("| ")?.split(" | ").next());
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    names.map(str::to_owned).collect()
}

#[actix_rt::test]
async fn each_name_of_the_contract_and_of_the_docs_is_served_in_both_formats() {
    let api = Api::start();
    let node = node_with_all_metrics(&api).await;
    for accept in ["*/*", PROMETHEUS_2] {
        let (content_type, text) = metrics(&node, accept).await;
        let Some(families) = parse(&content_type, &text) else {
            return;
        };
        for (name, kind, labels) in CONTRACT {
            let family = families.iter().find(|family| family.queried() == name);
            let family = family.unwrap_or_else(|| panic!("no {name} in\n{text}"));
            assert_eq!(family.kind, kind, "{name}: {content_type}");
            for sample in &family.samples {
                let mut found: Vec<_> = sample.labels.keys().collect();
                found.retain(|label| *label != "le");
                assert_eq!(found, labels, "{name}: {content_type}");
            }
        }
        let served = families.iter().map(|family| family.queried().to_owned());
        let mut served: BTreeSet<_> = served.collect();
        served.extend([OF_OTHER_RUNS, OF_A_DISK_THAT_FILLS].map(str::to_owned));
        let documented = documented();
        assert_eq!(
            served.difference(&documented).collect::<Vec<_>>(),
            [""; 0],
            "served, and not in the docs"
        );
        assert_eq!(
            documented.difference(&served).collect::<Vec<_>>(),
            [""; 0],
            "in the docs, and not served"
        );
    }
}

#[actix_rt::test]
async fn the_format_is_the_one_that_the_client_ranks_first() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    for (accept, expected) in [
        ("*/*", TEXT),
        ("text/plain", TEXT),
        ("text/html, */*;q=0.8", TEXT),
        (PROMETHEUS_2, OPEN_METRICS),
        (PROMETHEUS_3, OPEN_METRICS),
        ("application/openmetrics-text", OPEN_METRICS),
        ("application/openmetrics-text;q=0.4, text/plain;q=0.5", TEXT),
        ("application/openmetrics-text;q=0, */*", TEXT),
        ("nonsense", TEXT),
    ] {
        let (content_type, text) = metrics(&node, accept).await;
        assert_eq!(content_type, expected, "{accept}");
        let is_open = expected == OPEN_METRICS;
        assert_eq!(text.ends_with("\n# EOF\n"), is_open, "{accept}");
    }
}

#[actix_rt::test]
async fn a_delivery_leads_to_its_trace_if_that_is_recorded() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post_with_trace(&node, "unsampled", UNSAMPLED).await;
    node.post("/", "none", traffic()[0].clone()).await.unwrap();
    node.all_ended(2, PATIENCE).await;
    let exemplars = async || {
        let (content_type, text) = metrics(&node, PROMETHEUS_2).await;
        let families = parse(&content_type, &text)?;
        let samples = families.into_iter().flat_map(|family| family.samples);
        let found = samples.filter_map(|sample| Some((sample.name, sample.exemplar?)));
        Some(found.collect::<Vec<_>>())
    };
    let Some(none) = exemplars().await else {
        return;
    };
    assert_eq!(none, []);
    post_with_trace(&node, "sampled", SAMPLED).await;
    node.all_ended(3, PATIENCE).await;
    let trace = ("trace_id".to_owned(), SAMPLED[3..35].to_owned());
    let expected = ("waypost_delivery_seconds_bucket".to_owned(), [trace].into());
    assert_eq!(exemplars().await, Some(vec![expected]));
    let (_, text) = metrics(&node, "text/plain").await;
    assert!(!text.contains("trace_id"), "{text}");
}

/// The names and labels of all samples.
async fn series(node: &Node) -> BTreeSet<String> {
    let (_, text) = metrics(node, "text/plain").await;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let series = lines.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()));
    series.collect()
}

/// Sends the input of that number: no two are alike.
async fn send(client: &awc::Client, node: &Node, number: usize) {
    let ingest = format!("http://127.0.0.1:{}", node.ingest);
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let record = json!({
        "name": format!("name-{number}"), "location": format!("place-{number}"), "age": number % 150,
        "infectedtype": format!("type-{number}"), "state": format!("state-{number}"),
        format!("member-{number}"): number,
    });
    let (record, bad) = (record.to_string(), format!("{{\"bad-{number}\": {number}"));
    let request = match number % 8 {
        0 => client.post(format!("{ingest}/lane-{number}")),
        1 => client.request(
            Method::from_bytes(format!("BREW{number}").as_bytes()).expect("a token"),
            &ingest,
        ),
        2 => client.get(format!("{admin}/api/page-{number}")),
        3 => client
            .get(format!("{admin}/api/status"))
            .insert_header((header::HOST, format!("host-{number}.example"))),
        _ => client.post(&ingest),
    };
    let content_type = if number % 8 == 4 {
        format!("text/x-{number}")
    } else {
        "application/json".to_owned()
    };
    let request = request
        .insert_header((header::CONTENT_TYPE, content_type))
        .insert_header((header::USER_AGENT, format!("agent/{number}")))
        .insert_header(("Idempotency-Key", format!("key-{number}")))
        .insert_header((
            "traceparent",
            format!("00-{:032x}-{number:016x}-01", number + 1),
        ));
    let body = if number % 8 == 5 { bad } else { record };
    // The node closes the connection of a request that it does not read to its end.
    request.send_body(body).await.ok();
}

#[actix_rt::test]
async fn ten_thousand_different_inputs_make_no_new_label() {
    let api = Api::start();
    // Each status means that the record is dead.
    api.behave(|number, _| match number % 4 {
        0 => Conduct::Answer(430 + u16::try_from(number / 4 % 60).expect("it is small")),
        _ => Conduct::Answer(200),
    });
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let client = awc::Client::builder().timeout(PATIENCE).finish();
    let send_all = async |numbers: std::ops::Range<usize>| {
        let sent = stream::iter(numbers).map(|number| send(&client, &node, number));
        sent.buffer_unordered(32).collect::<()>().await;
        node.at_rest(Duration::from_mins(2)).await;
    };
    send_all(1..101).await;
    let before = series(&node).await;
    for part in [
        "code=\"202\"",
        "code=\"404\"",
        "code=\"415\"",
        "class=\"refused\"",
    ] {
        assert!(before.iter().any(|series| series.contains(part)), "{part}");
    }
    send_all(101..101 + INPUTS).await;
    let accepted = node.status().await["ledger"]["accepted"].as_u64();
    assert!(accepted > Some(INPUTS as u64 / 8), "{accepted:?}");
    let after = series(&node).await;
    assert_eq!(
        after.difference(&before).collect::<Vec<_>>(),
        [""; 0],
        "new since"
    );
}

#[actix_rt::test]
async fn a_lane_is_as_far_behind_as_its_oldest_record_is_old() {
    let mut api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let lag_s = async || {
        let lag = node.metric("waypost_lane_lag_seconds{lane=\"grpc\"}").await;
        lag.parse::<f64>().expect("a number")
    };
    node.post("/", "a", traffic()[0].clone()).await.unwrap();
    node.at_rest(PATIENCE).await;
    assert!(lag_s().await.abs() < f64::EPSILON, "nothing is in it");
    api.stop().await;
    node.post("/", "b", traffic()[0].clone()).await.unwrap();
    eventually("the record is two seconds old", PATIENCE, async || {
        (lag_s().await >= 2.0).then_some(())
    })
    .await;
    // Another one does not make it younger.
    node.post("/", "c", traffic()[0].clone()).await.unwrap();
    assert!(lag_s().await >= 2.0);
    api.start_again();
    node.at_rest(PATIENCE).await;
    assert!(lag_s().await.abs() < f64::EPSILON, "nothing is in it");
}

#[actix_rt::test]
async fn the_build_and_the_process_are_told() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    // The system counts the time in hundredths of a second.
    eventually("it has used the processor", PATIENCE, async || {
        (node.metric("process_cpu_seconds_total").await != "0.0").then_some(())
    })
    .await;
    let (content_type, text) = metrics(&node, PROMETHEUS_2).await;
    let Some(families) = parse(&content_type, &text) else {
        return;
    };
    let samples = families.iter().flat_map(|family| &family.samples);
    let samples: BTreeMap<_, _> = samples.map(|sample| (&*sample.name, sample)).collect();
    let build = samples["waypost_build_info"];
    assert_eq!(build.labels["version"], env!("CARGO_PKG_VERSION"));
    let value = |name: &str| samples[name].value.parse::<f64>().expect("a number");
    let memory = value("process_resident_memory_bytes");
    #[expect(clippy::cast_precision_loss, reason = "less than a petabyte")]
    let own = node.memory() as f64;
    assert!(memory > own / 2.0, "{memory} {own}");
    assert!(value("process_virtual_memory_bytes") > memory);
    assert!(value("process_cpu_seconds_total") > 0.0);
    assert!(value("process_open_fds") > 10.0);
    assert!(value("process_max_fds") > value("process_open_fds"));
    assert!(value("process_threads") > 2.0);
    #[expect(clippy::cast_precision_loss, reason = "exact for millions of years")]
    let now_s = waypost::clock::system_unix_s() as f64;
    let age_s = now_s - value("process_start_time_seconds");
    assert!((-2.0..600.0).contains(&age_s), "{age_s}");
}
