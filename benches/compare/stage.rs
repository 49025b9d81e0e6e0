//! One side of a case, with the processes that it takes.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use awc::http::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    api,
    door::Door,
    neighbour::{self, Neighbour, SecondApi},
    support::{
        eventually,
        lanes::grpc_variables,
        process::{free_port, start},
    },
    table,
};

const PATIENCE: Duration = Duration::from_mins(2);
/// After this long without a record, none is expected any more.
const QUIET: Duration = Duration::from_secs(20);
/// Names the configuration file of a node among its variables.
const CONFIG: &str = "CONFIG_FILE";
/// Records that no figure counts.
pub const WARM_UP: usize = 2000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    Floor,
    Waypost,
    /// Another build of Waypost.
    OtherWaypost(PathBuf),
}

/// One side of a comparison.
#[derive(Clone, Debug)]
pub struct Side {
    pub name: String,
    pub program: Program,
    /// Records per request.
    pub batch: usize,
    /// The lane's `bundle`: the most records of one message. `None` leaves its default.
    pub bundle: Option<u8>,
    /// Variables of this side, besides the lane's.
    pub variables: &'static [(&'static str, &'static str)],
    pub door: Option<Door>,
    /// The part of the records that is traced.
    pub traced: Option<&'static str>,
    pub second_api: Option<SecondApi>,
    /// Records come for the second API.
    pub has_neighbour: bool,
}

/// The result of one side in one round.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    pub ingest_per_s: f64,
    pub end_to_end_per_s: f64,
    pub cpu_us_per_record: f64,
    pub memory_mib: f64,
    pub lost: u64,
    pub duplicated: u64,
    /// At the fixed rate: p50, p99, p99.9.
    pub ingest_ms: [f64; 3],
    pub delivery_ms: [f64; 3],
    pub rate_cpu_us_per_record: f64,
    /// Set if records were synced to disk.
    pub records_per_sync: Option<f64>,
    /// At the fixed rate.
    pub sync_ms: Option<f64>,
}

/// The processes of one measurement. They end with it.
pub struct Stage {
    build: Program,
    program: Child,
    /// Time from start to ready.
    pub ready_after: Duration,
    environment: Vec<(String, String)>,
    lane: String,
    api: Child,
    /// The second API, if it is a process.
    second: Option<Child>,
    api_url: String,
    host: String,
    /// Options of the load.
    credentials: Vec<String>,
    folder: tempfile::TempDir,
    admin: Option<String>,
    users: usize,
    batch: usize,
    /// Records posted so far.
    posted: usize,
    /// The API only counts this many of the first records.
    forgotten: usize,
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in [&mut self.program, &mut self.api]
            .into_iter()
            .chain(&mut self.second)
        {
            child
                .kill()
                .and_then(|()| child.wait())
                .expect("a child ends");
        }
    }
}

fn own(arguments: &[&str], set_up: impl FnOnce(&mut std::process::Command)) -> Child {
    let path = std::env::current_exe().expect("a path");
    start(path.to_str().expect("a plain path"), |command| {
        command.args(arguments).stdin(Stdio::null());
        set_up(command);
    })
    .expect("it starts")
}

fn floor(lane: &str, listen: &str, environment: &[(String, String)]) -> Child {
    own(&["floor", lane, listen], |command| {
        command.envs(environment.iter().cloned());
    })
}

fn node(program: &Program, environment: &[(String, String)]) -> Child {
    let path = match program {
        Program::OtherWaypost(path) => path.to_str().expect("a plain path"),
        Program::Floor | Program::Waypost => env!("CARGO_BIN_EXE_waypost"),
    };
    let config = environment.iter().find(|(name, _)| name == CONFIG);
    let node = start(path, |command| {
        command
            .args(["run", "-q"])
            .args(config.iter().flat_map(|(_, file)| ["--config", file]))
            .envs(environment.iter().cloned())
            .stdin(Stdio::null());
    });
    node.expect("it starts")
}

/// A program that was started by `start`, once `url` answers with success, and how long that took.
async fn ready(url: &str, start: impl FnOnce() -> Child) -> (Child, Duration) {
    let client = awc::Client::default();
    let began = Instant::now();
    let program = start();
    while !client
        .get(url)
        .send()
        .await
        .is_ok_and(|answer| answer.status().is_success())
    {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {url}");
        sleep(Duration::from_millis(1)).await;
    }
    (program, began.elapsed())
}

/// Sends a request without a body. Panics unless the answer is a success.
async fn send(method: Method, url: String) {
    let answer = awc::Client::default()
        .request(method, url)
        .send_json(&json!({}))
        .await
        .expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.status());
}

impl Stage {
    pub async fn new(
        side: &Side,
        lane: &str,
        variables: &[(String, String)],
        users: usize,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [api_listen, listen, admin] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
        let api = own(&["api", &api_listen], |_| {});
        let api_url = format!("http://{api_listen}/");
        let scheme = if side.door == Some(Door::Tls) {
            "https"
        } else {
            "http"
        };
        let host = format!("{scheme}://{listen}/");
        let door = side.door.map(|door| door.set_up(folder.path()));
        let (guarded, credentials) = door.unwrap_or_default();
        let data = folder.path().join("data").display().to_string();
        let places = [
            ("INGEST__LISTEN", &listen),
            ("ADMIN__LISTEN", &admin),
            ("API__URL", &api_url),
            ("SPOOL__DIR", &data),
        ];
        let mut environment: Vec<_> = places
            .into_iter()
            .map(|(key, value)| (format!("WAYPOST_{key}"), value.clone()))
            .collect();
        environment.extend(side.environment(lane, variables));
        environment.extend(guarded);
        if let Some(part) = side.traced {
            let traces = [
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &*api_url),
                ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", part),
            ];
            environment.extend(traces.map(|(key, value)| (key.to_owned(), value.to_owned())));
        }
        let mut second = None;
        if let Some(conduct) = side.second_api {
            let url = match conduct {
                SecondApi::Hangs => neighbour::hanging_api(),
                SecondApi::Answers => {
                    let listen = format!("127.0.0.1:{}", free_port());
                    second = Some(own(&["api", &listen], |_| {}));
                    let url = format!("http://{listen}/");
                    get(&url).await;
                    url
                }
            };
            let config = folder.path().join("waypost.toml");
            fs::write(&config, neighbour::CONFIG).expect("the folder is ours");
            environment.push(("WAYPOST_APIS__SECOND__URL".into(), url));
            environment.push((CONFIG.into(), config.display().to_string()));
        }
        let is_node = side.program != Program::Floor;
        get(&api_url).await;
        let admin = is_node.then(|| format!("http://{admin}/"));
        let start_node = || node(&side.program, &environment);
        let (program, ready_after) = match &admin {
            Some(admin) => ready(&format!("{admin}readyz"), start_node).await,
            None => ready(&host, || floor(lane, &listen, &environment)).await,
        };
        Self {
            build: side.program.clone(),
            program,
            ready_after,
            environment,
            lane: lane.into(),
            api,
            second,
            api_url,
            host,
            credentials,
            folder,
            admin,
            users,
            batch: side.batch,
            posted: 0,
            forgotten: 0,
        }
    }

    /// Kills the node, and starts it on the same folder.
    pub async fn restart(&mut self) {
        self.program
            .kill()
            .and_then(|()| self.program.wait())
            .expect("a child ends");
        let url = format!("{}readyz", self.admin());
        (self.program, self.ready_after) =
            ready(&url, || node(&self.build, &self.environment)).await;
    }

    fn admin(&self) -> &str {
        self.admin.as_deref().expect("Waypost is under test")
    }

    /// Reads the node's status, also while the stage posts.
    pub fn status_reader(&self) -> StatusReader {
        StatusReader(format!("{}api/status", self.admin()))
    }

    async fn status(&self) -> Value {
        self.status_reader().read().await
    }

    /// Waits until `count` lanes of the node are in this state.
    pub async fn lanes_are(&self, count: usize, state: &str) {
        eventually(state, PATIENCE, async || {
            let status = self.status().await;
            let lanes = status["lanes"].as_array()?.iter();
            (lanes.filter(|lane| lane["state"] == state).count() == count).then_some(())
        })
        .await;
    }

    /// Pauses the lane, so that records wait in the spool, or resumes it.
    pub async fn set_lane(&self, publishes: bool) {
        let order = if publishes { "resume" } else { "pause" };
        send(
            Method::POST,
            format!("{}api/lanes/{}/{order}", self.admin(), self.lane),
        )
        .await;
        if !publishes {
            self.lanes_are(1, "paused").await;
        }
    }

    /// Makes the API answer 503, so that records wait in the broker, or 200 again.
    pub async fn set_api(&self, takes: bool) {
        let method = if takes { Method::DELETE } else { Method::PUT };
        send(
            method,
            format!("{}{}", self.api_url.trim_end_matches('/'), api::AWAY),
        )
        .await;
    }

    /// How many of the posted records the API has.
    pub async fn arrived(&self) -> u64 {
        self.stats().await.distinct
    }

    /// Waits until the API has all posted records, and the node none.
    pub async fn all_is_settled(&self) {
        let arrived = self.until_arrived(self.posted as u64).await.distinct;
        assert_eq!(
            arrived, self.posted as u64,
            "records that arrived, and records that were posted"
        );
        eventually(
            "nothing in flight, nothing in the spool",
            PATIENCE,
            async || {
                let ledger = &self.status().await["ledger"];
                (ledger["in_flight"] == 0 && ledger["spooled"] == 0).then_some(())
            },
        )
        .await;
    }

    /// Makes the API forget arrival times so far. A later copy of such a record counts as repeated.
    pub async fn forget(&mut self) {
        send(Method::DELETE, format!("{}{}", self.api_url, self.posted)).await;
        self.forgotten = self.posted;
    }

    /// Posts `records` records. Waits until the API has them all, or none arrived for a while.
    pub async fn post(&mut self, count: usize, rate: Option<f64>) -> Run {
        let before = self.stats().await.distinct;
        let cpu = self.cpu_us();
        let first = self.posted;
        let load = self.load(count, rate).await;
        let stats = self.until_arrived(before + count as u64).await;
        let cpu_us = self.cpu_us() - cpu;
        Run {
            load,
            cpu_us,
            sent_us: words(&fs::read(self.times()).expect("the load left it")),
            arrived_us: words(&get(&format!("{}arrivals", self.api_url)).await)
                .split_off(first - self.forgotten),
            distinct: stats.distinct - before,
            last_us: stats.last_us,
        }
    }

    fn times(&self) -> PathBuf {
        self.folder.path().join("times")
    }

    /// Posts `records` records. Returns the load's result; the API may not have them all yet.
    pub async fn load(&mut self, count: usize, rate: Option<f64>) -> Value {
        let times = self.times();
        let numbers = [self.users, self.batch, self.posted, count].map(|number| number.to_string());
        let rate = rate.map(|rate| rate.to_string());
        let mut arguments = vec!["load", &self.host, times.to_str().expect("a plain path")];
        let numbers = numbers.iter().chain(&rate);
        arguments.extend(numbers.chain(&self.credentials).map(String::as_str));
        let load = own(&arguments, |command| {
            command.stdout(Stdio::piped());
        });
        let output = tokio::task::spawn_blocking(|| load.wait_with_output())
            .await
            .expect("it waits")
            .expect("it ends");
        let load: Value = serde_json::from_slice(&output.stdout).expect("the load's result");
        assert_eq!(load["failures"], 0, "{load}");
        self.posted += count;
        load
    }

    /// Waits until `records` records arrived, or none for a while.
    async fn until_arrived(&self, distinct: u64) -> Stats {
        let mut seen = (0, Instant::now());
        loop {
            let stats = self.stats().await;
            if stats.distinct >= distinct || seen.1.elapsed() > QUIET {
                return stats;
            }
            if stats.distinct > seen.0 {
                seen = (stats.distinct, Instant::now());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Of the posted records: how many the API lacks, and how many copies it got besides.
    pub async fn lost_and_duplicated(&self) -> [u64; 2] {
        let Stats {
            distinct, times, ..
        } = self.stats().await;
        [self.posted as u64 - distinct, times - distinct]
    }

    async fn stats(&self) -> Stats {
        serde_json::from_slice(&get(&self.api_url).await).expect("the API's counts")
    }

    /// User and system time of the program under test.
    pub fn cpu_us(&self) -> u64 {
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", self.program.id())).expect("it runs");
        // The name, in parentheses, may hold any byte. User and system time are words 12 and 13
        // after it, in units of 10 ms.
        let words: Vec<_> = stat
            .rsplit_once(") ")
            .expect("a name")
            .1
            .split(' ')
            .collect();
        let ticks = |at: usize| words[at].parse::<u64>().expect("a number");
        (ticks(11) + ticks(12)) * 10_000
    }

    /// Syncs of the spool, the records that they made safe, and the seconds that they took.
    async fn syncs(&self) -> [f64; 3] {
        let Some(admin) = &self.admin else {
            return [0.0; 3];
        };
        let metrics = String::from_utf8(get(&format!("{admin}metrics")).await).expect("text");
        [
            "waypost_spool_commits_total ",
            "waypost_spool_committed_records_total ",
            "waypost_spool_commit_seconds_total ",
        ]
        .map(|name| {
            let count = metrics
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .expect("it is always there");
            count.parse().expect("a number")
        })
    }

    pub fn watch(&self) -> Watch {
        Watch {
            process: self.program.id(),
        }
    }
}

/// The URL of a node's status.
pub struct StatusReader(String);

impl StatusReader {
    /// The node's `/api/status`.
    pub async fn read(&self) -> Value {
        serde_json::from_slice(&get(&self.0).await).expect("the node's status")
    }
}

fn differences<const N: usize>(before: [f64; N], after: [f64; N]) -> [f64; N] {
    std::array::from_fn(|at| after[at] - before[at])
}

/// Observes the program under test from outside.
#[derive(Clone, Copy)]
pub struct Watch {
    process: u32,
}

/// Memory and descriptors of the program under test.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub memory_mib: f64,
    pub descriptors: usize,
}

impl Watch {
    fn memory_mib(self, name: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process)).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("Linux says");
        line.trim()
            .trim_end_matches(" kB")
            .parse::<f64>()
            .expect("a number")
            / 1024.0
    }

    pub fn peak_memory_mib(self) -> f64 {
        self.memory_mib("VmHWM:")
    }

    pub fn footprint(self) -> Footprint {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.process)).expect("it runs");
        Footprint {
            memory_mib: self.memory_mib("VmRSS:"),
            descriptors: descriptors.count(),
        }
    }
}

#[derive(Deserialize)]
struct Stats {
    distinct: u64,
    times: u64,
    last_us: u64,
}

/// The result of posting records.
pub struct Run {
    load: Value,
    cpu_us: u64,
    sent_us: Vec<u64>,
    arrived_us: Vec<u64>,
    distinct: u64,
    last_us: u64,
}

impl Run {
    #[expect(
        clippy::cast_precision_loss,
        reason = "times and counts of a short run"
    )]
    pub fn end_to_end_per_s(&self) -> f64 {
        let first = self.sent_us.iter().min().copied().unwrap_or_default();
        self.distinct as f64 * 1e6 / (self.last_us - first) as f64
    }

    /// For each record that arrived: the time since it was due.
    pub fn deliveries_us(&self) -> impl Iterator<Item = u64> {
        let times =
            std::iter::zip(&self.sent_us, &self.arrived_us).filter(|(_, arrived)| **arrived > 0);
        times.map(|(sent, arrived)| arrived.saturating_sub(*sent))
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect()
}

async fn get(url: &str) -> Vec<u8> {
    let client = awc::Client::default();
    eventually(url, PATIENCE, async || {
        let mut answer = client
            .get(url)
            .send()
            .await
            .ok()
            .filter(|answer| answer.status().is_success())?;
        Some(answer.body().limit(64 << 20).await.ok()?.to_vec())
    })
    .await
}

impl Side {
    /// This build of Waypost, with one record per request and per message.
    pub fn waypost() -> Self {
        Self {
            name: "waypost".into(),
            program: Program::Waypost,
            batch: 1,
            bundle: None,
            variables: &[],
            door: None,
            traced: None,
            second_api: None,
            has_neighbour: false,
        }
    }

    /// The variables of this side on a lane that `variables` configure.
    fn environment(&self, lane: &str, variables: &[(String, String)]) -> Vec<(String, String)> {
        let mut environment = variables.to_vec();
        let own = self.variables.iter();
        environment.extend(own.map(|&(key, value)| (key.to_owned(), value.to_owned())));
        if self.program != Program::Floor && variables.is_empty() {
            environment.extend(grpc_variables());
        }
        if let Some(bundle) = self.bundle
            && matches!(lane, "nats" | "rabbitmq" | "pubsub")
        {
            let key = format!("LANES__{}__BUNDLE", lane.to_uppercase());
            environment.push((key, bundle.to_string()));
        }
        for (key, _) in &mut environment {
            key.insert_str(0, "WAYPOST_");
        }
        environment
    }

    /// Measures at the peak, then at `rate`, or at half that peak.
    #[expect(
        clippy::cast_precision_loss,
        reason = "times and counts of a short run"
    )]
    pub async fn measure(
        &self,
        lane: &str,
        variables: &[(String, String)],
        records: usize,
        users: usize,
        rate: Option<f64>,
    ) -> Measured {
        let mut stage = Stage::new(self, lane, variables, users).await;
        let warm_up = stage.post(WARM_UP, None).await;
        assert_eq!(
            warm_up.distinct, WARM_UP as u64,
            "{} does not deliver",
            self.name
        );
        let neighbour = self.has_neighbour.then(|| Neighbour::start(&stage.host));
        let before = stage.syncs().await;
        let peak = stage.post(records, None).await;
        let after_peak = stage.syncs().await;
        let [commits, committed, _] = differences(before, after_peak);
        let records_per_sync = (commits > 0.0).then(|| committed / commits);
        let end_to_end_per_s = peak.end_to_end_per_s();
        // As long as the other side took at its peak.
        let steady = stage
            .post(records / 2, Some(rate.unwrap_or(end_to_end_per_s / 2.0)))
            .await;
        let [commits, _, seconds] = differences(after_peak, stage.syncs().await);
        let sync_ms = (commits > 0.0).then(|| 1000.0 * seconds / commits);
        let mut delivery: Vec<_> = steady
            .deliveries_us()
            .map(|us| us as f64 / 1000.0)
            .collect();
        delivery.sort_by(f64::total_cmp);
        let quantile = |part: f64| table::quantile(&delivery, part);
        if let Some(neighbour) = neighbour {
            assert!(neighbour.posted() > 0, "the neighbour gets records");
        }
        let [lost, duplicated] = stage.lost_and_duplicated().await;
        let latency = |name: &str| steady.load["latency_ms"][name].as_f64().expect("a latency");
        Measured {
            ingest_per_s: peak.load["requests_per_s"].as_f64().expect("a rate") * self.batch as f64,
            end_to_end_per_s,
            cpu_us_per_record: peak.cpu_us as f64 / records as f64,
            memory_mib: stage.watch().peak_memory_mib(),
            lost,
            duplicated,
            ingest_ms: ["p50", "p99", "p99.9"].map(latency),
            delivery_ms: [0.5, 0.99, 0.999].map(quantile),
            rate_cpu_us_per_record: steady.cpu_us as f64 / (records / 2) as f64,
            records_per_sync,
            sync_ms,
        }
    }
}
