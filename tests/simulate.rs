//! `waypost check --simulate`: its table, and a real run of the same lanes beside it.

use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Output},
    time::Duration,
};

use awc::http::StatusCode;
use tempfile::NamedTempFile;
use tokio::time::{Instant, sleep_until};

use crate::support::{
    api::Api,
    lanes::{Lane as _, Nats, Rabbitmq, through_proxy},
    node::{Node, PATIENCE},
    proxy::{Flow, Network, Proxy},
    rig::Rig as _,
    traffic,
};

/// The two may differ by this part.
const TOLERANCE: f64 = 0.1;

/// The result of a lane: its part of the records, and the median from accepted to delivered.
#[derive(Clone, Copy, Debug)]
struct LaneResult {
    share: f64,
    p50_ms: f64,
}

type Results = BTreeMap<String, LaneResult>;

fn file(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("it can be written");
    file
}

fn run(plan: &str, variables: &BTreeMap<String, String>) -> Output {
    let plan = file(plan);
    Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["check", "--simulate"])
        .arg(plan.path())
        .env_clear()
        .envs(variables)
        .output()
        .expect("the program runs")
}

fn printed(plan: &str, variables: &BTreeMap<String, String>) -> String {
    let output = run(plan, variables);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The lanes of the table that is printed.
fn simulated(plan: &str, variables: &BTreeMap<String, String>) -> Results {
    let table = printed(plan, variables);
    let rows = table.lines().filter_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let [lane, _, share, p50_ms, _, _, _] = columns[..] else {
            return None;
        };
        let result = LaneResult {
            share: share.trim_end_matches('%').parse::<f64>().ok()? / 100.0,
            p50_ms: p50_ms.parse().ok()?,
        };
        Some((lane.to_owned(), result))
    });
    let results: Results = rows.collect();
    assert_eq!(results.len(), 2, "{table}");
    results
}

/// The same of a node that has done its work.
#[expect(clippy::cast_precision_loss, reason = "some thousand records")]
async fn measured(node: &Node, records: u64) -> Results {
    let status = node.status().await;
    let lanes = status["lanes"].as_array().expect("a list").iter();
    let result = |lane: &serde_json::Value| LaneResult {
        share: lane["delivered"].as_u64().expect("a count") as f64 / records as f64,
        p50_ms: lane["delivery_ms"]["p50"].as_f64().expect("a time"),
    };
    lanes
        .map(|lane| {
            (
                lane["lane"].as_str().expect("a name").to_owned(),
                result(lane),
            )
        })
        .collect()
}

fn assert_agree(simulated: &Results, real: &Results) {
    println!("simulated {simulated:?}\nreal {real:?}");
    for (lane, real) in real {
        let simulated = simulated[lane];
        for (what, simulated, real) in [
            ("share", simulated.share, real.share),
            ("p50", simulated.p50_ms, real.p50_ms),
        ] {
            let differs = (simulated / real - 1.0).abs();
            assert!(
                differs <= TOLERANCE,
                "{what} of {lane}: {simulated} simulated, {real} real"
            );
        }
    }
}

/// A node whose two lanes have their latencies by proxies.
struct TwoLanes {
    node: Node,
    api: Api,
    nats: Proxy,
    latencies_ms: [u64; 2],
    _brokers: (Nats, Rabbitmq),
    _rabbitmq: Proxy,
}

/// A network with this latency on the way back.
fn lags(ms: u64) -> Network {
    Network {
        to_client: Flow::Lags(Duration::from_millis(ms)),
        ..Network::WELL
    }
}

impl TwoLanes {
    /// `None` if a broker is missing.
    async fn start(policy: &str, latencies_ms: [u64; 2]) -> Option<Self> {
        let (Some(mut nats), Some(mut rabbitmq)) = (Nats::start().await, Rabbitmq::start().await)
        else {
            return None;
        };
        let (nats_proxy, nats_variables) = through_proxy(nats.variables());
        let (rabbitmq_proxy, rabbitmq_variables) = through_proxy(rabbitmq.variables());
        let more = [
            ("ROUTER__POLICY", policy),
            ("LANES__NATS__WEIGHT", "3"),
            // A copy on disk would add its own time.
            ("INGEST__ACK", "lane"),
        ];
        let more = more.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let variables = [nats_variables, rabbitmq_variables, more.to_vec()].concat();
        let api = Api::start();
        let node = Node::start(&api.url(), &variables).await;
        for lane in ["nats", "rabbitmq"] {
            node.lane_is(lane, "up", PATIENCE).await;
        }
        nats_proxy.set(lags(latencies_ms[0]));
        rabbitmq_proxy.set(lags(latencies_ms[1]));
        Some(Self {
            node,
            api,
            nats: nats_proxy,
            latencies_ms,
            _brokers: (nats, rabbitmq),
            _rabbitmq: rabbitmq_proxy,
        })
    }

    /// Posts records at even intervals, and measures. The NATS server is away from one second to
    /// the other.
    async fn real(&self, per_second: u64, seconds: u64, away: Option<[u64; 2]>) -> Results {
        let records = per_second * seconds;
        let bodies = traffic();
        let began = Instant::now();
        let mut posts = Vec::new();
        for number in 0..records {
            sleep_until(began + Duration::from_micros(number * 1_000_000 / per_second)).await;
            if let Some([from, to]) = away {
                if number == from * per_second {
                    self.nats.set(Network {
                        refuses: true,
                        ..Network::WELL
                    });
                    self.nats.cut();
                } else if number == to * per_second {
                    self.nats.set(lags(self.latencies_ms[0]));
                }
            }
            let client = self.node.client();
            let body = bodies[0].clone();
            posts.push(actix_rt::spawn(async move {
                client.post("/", &number.to_string(), body).await
            }));
        }
        for post in posts {
            let (status, answer) = post.await.expect("it ends").expect("an answer");
            assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        }
        self.node.at_rest(PATIENCE).await;
        assert_eq!(self.api.taken().len() as u64, records);
        measured(&self.node, records).await
    }

    /// The same in simulated time.
    fn simulated(&self, per_second: u64, seconds: u64, away: Option<[u64; 2]>) -> Results {
        let [nats, rabbitmq] = self.latencies_ms;
        let away = away.map_or_else(String::new, |[from, to]| {
            format!("outages = [{{ from = \"{from}s\", to = \"{to}s\" }}]\n")
        });
        let plan = format!(
            "records_per_second = {per_second}\nduration = \"{seconds}s\"\n\
             [lanes.rabbitmq]\nlatency = \"{rabbitmq}ms\"\n\
             [lanes.nats]\nlatency = \"{nats}ms\"\n{away}"
        );
        simulated(&plan, &self.node.environment())
    }
}

#[actix_rt::test]
async fn weighted_is_as_it_is_simulated() {
    let Some(lanes) = TwoLanes::start("weighted", [200, 300]).await else {
        return;
    };
    let real = lanes.real(100, 10, None).await;
    assert_agree(&lanes.simulated(100, 10, None), &real);
}

#[actix_rt::test]
async fn failover_is_as_it_is_simulated() {
    let Some(lanes) = TwoLanes::start("failover", [100, 150]).await else {
        return;
    };
    let away = Some([11, 29]);
    let real = lanes.real(50, 40, away).await;
    assert_agree(&lanes.simulated(50, 40, away), &real);
}

/// It reacts to the slowest records of a lane, so the plan has them as the node measured them. A
/// machine with other work delays single records of both lanes alike, which no plan has.
#[actix_rt::test]
#[ignore = "it needs a machine without other work"]
async fn adaptive_is_as_it_is_simulated() {
    let Some(lanes) = TwoLanes::start("adaptive", [240, 100]).await else {
        return;
    };
    let real = lanes.real(100, 30, None).await;
    let status = lanes.node.status().await;
    let sections = status["lanes"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|lane| {
            let times = &lane["delivery_ms"];
            let [p50, p99] =
                ["p50", "p99"].map(|name| times[name].as_f64().expect("a time") * 1000.0);
            let name = lane["lane"].as_str().expect("a name");
            format!("[lanes.{name}]\nlatency = {{ p50 = \"{p50:.0}us\", p99 = \"{p99:.0}us\" }}\n")
        });
    let plan = sections.fold(
        "records_per_second = 100\nduration = \"30s\"\n".to_owned(),
        |plan, section| plan + &section,
    );
    println!("{plan}");
    assert_agree(&simulated(&plan, &lanes.node.environment()), &real);
}

const PLAN: &str = "records_per_second = 100
duration = \"10s\"
[lanes.grpc]
latency = { p50 = \"2ms\", p99 = \"20ms\" }
";

#[test]
fn the_table_fits_a_terminal_and_is_the_same_each_time() {
    let none = BTreeMap::new();
    let table = printed(PLAN, &none);
    assert!(table.lines().all(|line| line.len() <= 80), "{table}");
    for part in [
        "policy     round-robin",
        "grpc            1000  100.0%",
        "spool",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert_eq!(printed(PLAN, &none), table);
    assert_ne!(printed(&format!("seed = 2\n{PLAN}"), &none), table);
}

#[test]
fn records_of_a_file_take_the_rules_of_the_configuration() {
    let record = |state: &str| {
        format!(r#"{{"name":"a","location":"b","age":1,"infectedtype":"c","state":"{state}"}}"#)
    };
    let records = file(&format!("{}\n{0}\n{}\n", record("urgent"), record("well")));
    let config =
        file("[lanes.grpc]\n[[routes]]\nwhen = { pointer = \"/state\", equals = \"urgent\" }\n");
    let plan = file(&format!("records = {:?}\n{PLAN}", records.path()));
    let output = Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["check", "--config"])
        .arg(config.path())
        .arg("--simulate")
        .arg(plan.path())
        .env_clear()
        .output()
        .expect("the program runs");
    let table = String::from_utf8(output.stdout).expect("text");
    assert!(table.contains("routes[1]        667"), "{table}");
    assert!(table.contains("default          333"), "{table}");
}

#[test]
fn a_plan_that_cannot_be_played_is_named_with_its_line() {
    let none = BTreeMap::new();
    for (plan, part) in [
        (
            PLAN.replace("grpc", "nats"),
            "lanes.nats: the configuration has no such lane",
        ),
        (PLAN.replace("latency", "speed"), ":4: "),
        (PLAN.replace("10s", "10"), ":2: \"10\" is no time"),
        (
            format!("records = \"absent\"\n{PLAN}"),
            "absent: cannot be read",
        ),
    ] {
        let output = run(&plan, &none);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let told = String::from_utf8(output.stderr).expect("text");
        assert!(told.contains(part), "{part}: {told}");
        assert!(output.stdout.is_empty(), "{told}");
    }
}
