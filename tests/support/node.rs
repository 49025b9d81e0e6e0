//! A node as a process of its own, the way users run it.

use std::{
    collections::{BTreeMap, HashSet},
    env,
    fs::{self, File},
    path::Path,
    process::{Child, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{
    eventually,
    process::{self, MemoryLimit},
};

/// How long a node may take for anything but the exit.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Node {
    child: Child,
    pub ingest: u16,
    pub admin: u16,
    environment: Vec<(String, String)>,
    http: awc::Client,
    data: tempfile::TempDir,
    log: NamedTempFile,
    arguments: Vec<String>,
    memory_limit: Option<MemoryLimit>,
}

impl Node {
    /// Starts a node with `variables` (without their `WAYPOST_`, or of OpenTelemetry or the log) and waits until it answers. Its
    /// lanes may still connect.
    pub async fn start(api: &str, variables: &[(String, String)]) -> Self {
        Self::begin(api, variables, "", &[], None).await
    }

    /// The same, with its log in JSON at `stderr`.
    pub async fn start_with_stderr(
        api: &str,
        variables: &[(String, String)],
        fault: &str,
        stderr: impl Into<Stdio>,
    ) -> Self {
        let stderr = Some(stderr.into());
        Self::begin(api, variables, fault, &["--log-format", "json"], stderr).await
    }

    /// The same, with a configuration file. The variables override it.
    pub async fn start_with_config(api: &str, variables: &[(String, String)], file: &Path) -> Self {
        let file = file.to_str().expect("a plain path");
        Self::begin(api, variables, "", &["--config", file], None).await
    }

    /// The same, with its log in JSON.
    pub async fn start_with_json_log(api: &str, variables: &[(String, String)]) -> Self {
        Self::begin(api, variables, "", &["--log-format", "json"], None).await
    }

    /// The same, with a fault planted at a named point of the program: see the `fail` crate for the
    /// language.
    pub async fn start_with_fault(api: &str, variables: &[(String, String)], fault: &str) -> Self {
        Self::begin(api, variables, fault, &[], None).await
    }

    async fn begin(
        api: &str,
        variables: &[(String, String)],
        fault: &str,
        flags: &[&str],
        stderr: Option<Stdio>,
    ) -> Self {
        let ingest = process::free_port();
        let admin = process::free_port();
        let data = tempfile::tempdir().expect("a temporary folder");
        let log = NamedTempFile::new().expect("a temporary file");
        let mut environment = vec![
            (
                "WAYPOST_INGEST__LISTEN".into(),
                format!("127.0.0.1:{ingest}"),
            ),
            ("WAYPOST_ADMIN__LISTEN".into(), format!("127.0.0.1:{admin}")),
            ("WAYPOST_API__URL".into(), api.into()),
            (
                "WAYPOST_SPOOL__DIR".into(),
                data.path().display().to_string(),
            ),
            ("FAILPOINTS".into(), fault.into()),
            // A busy machine may keep a healthy broker waiting for longer than the default allows.
            ("WAYPOST_ROUTER__PUBLISH_TIMEOUT".into(), "10s".into()),
        ];
        environment.extend(
            variables
                .iter()
                .map(|(key, value)| (variable(key), value.clone())),
        );
        // A node ends a connection that is idle for 5 seconds. A request that meets that end has no answer.
        let connector = awc::Connector::new().conn_keep_alive(Duration::from_secs(4));
        let http = awc::Client::builder()
            .connector(connector)
            .timeout(Duration::from_secs(20))
            .finish();
        let arguments = ["run"].iter().chain(flags).map(ToString::to_string);
        let arguments: Vec<_> = arguments.collect();
        let stderr = stderr.unwrap_or_else(|| log_file(log.path()));
        let mut node = Self {
            child: launch(&environment, stderr, &arguments),
            ingest,
            admin,
            environment,
            http,
            data,
            log,
            arguments,
            memory_limit: None,
        };
        node.answers().await;
        node
    }

    /// The next start has this fault in it, or none: see [`Node::start_with_fault`].
    pub fn plant(&mut self, fault: &str) {
        self.environment.retain(|(key, _)| key != "FAILPOINTS");
        self.environment.push(("FAILPOINTS".into(), fault.into()));
    }

    /// All its variables.
    pub fn environment(&self) -> BTreeMap<String, String> {
        self.environment.iter().cloned().collect()
    }

    /// From the next start on, it logs at debug level too.
    pub fn log_more(&mut self) {
        self.arguments.push("-v".into());
    }

    /// Starts it again on the same ports, with the same data and lanes.
    pub async fn start_again(&mut self) {
        self.child = launch(
            &self.environment,
            log_file(self.log.path()),
            &self.arguments,
        );
        if let Some(limit) = &self.memory_limit {
            limit.add(&self.child);
        }
        self.answers().await;
    }

    async fn answers(&mut self) {
        eventually("the node answers", PATIENCE, async || {
            assert!(
                self.child.try_wait().expect("a child's status").is_none(),
                "the node ended"
            );
            self.get("/healthz")
                .await
                .filter(|(status, _)| *status == StatusCode::OK)
        })
        .await;
    }

    /// SIGKILL, and a new start. How long it took from the start to ready.
    pub async fn killed_and_started(&mut self) -> Duration {
        self.signal("KILL");
        self.ended(PATIENCE).await;
        let began = Instant::now();
        self.start_again().await;
        eventually("the node is ready", PATIENCE, async || {
            self.get("/readyz")
                .await
                .filter(|(status, _)| *status == StatusCode::OK)
        })
        .await;
        began.elapsed()
    }

    /// From now on, the kernel kills the node if it takes more memory, also after a restart. Prints
    /// a note if the machine allows no limit.
    pub fn limit_memory(&mut self, bytes: u64) {
        self.memory_limit = MemoryLimit::new(bytes);
        match &self.memory_limit {
            Some(limit) => limit.add(&self.child),
            None => println!("this machine allows no limit on memory"),
        }
    }

    /// Bytes of memory that it has for itself.
    pub fn memory(&self) -> u64 {
        self.memory_line("RssAnon:")
    }

    /// The most bytes of memory that it has had.
    pub fn peak_memory(&self) -> u64 {
        self.memory_line("VmHWM:")
    }

    /// The time that its threads have run, in the program and in the kernel.
    pub fn cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let ran = tasks.filter_map(|task| {
            let stat = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            stat.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(ran.sum())
    }

    fn memory_line(&self, name: &str) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("Linux says");
        line.trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .expect("a number")
            << 10
    }

    /// Bytes on disk of its spool, the table of keys apart.
    pub fn spool_bytes(&self) -> u64 {
        let files = fs::read_dir(self.data.path())
            .expect("its folder")
            .filter_map(Result::ok);
        let queues = files.filter(|file| !file.file_name().to_string_lossy().starts_with("keys"));
        queues
            .map(|file| file.metadata().map_or(0, |found| found.len()))
            .sum()
    }

    /// Sends it "TERM", "KILL" or another signal.
    pub fn signal(&self, signal: &str) {
        process::signal(&self.child, signal);
    }

    /// The exit status, once it has ended by itself.
    pub async fn ended(&mut self, patience: Duration) -> ExitStatus {
        let child = &mut self.child;
        let mut status = || child.try_wait().expect("a child's status");
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = status() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the node still runs after {patience:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `GET` from its admin side; `None` while it does not answer.
    pub async fn get(&self, path: &str) -> Option<(StatusCode, Value)> {
        let ask = || {
            self.http
                .get(format!("http://127.0.0.1:{}{path}", self.admin))
                .send()
        };
        // A connection that was kept may be closed by the other side just then.
        let mut answer = match ask().await {
            Ok(answer) => answer,
            Err(_) => ask().await.ok()?,
        };
        let body = answer.body().limit(64 << 20).await.ok()?;
        Some((
            answer.status(),
            serde_json::from_slice(&body).unwrap_or(Value::Null),
        ))
    }

    pub async fn status(&self) -> Value {
        self.get("/api/status").await.expect("the node answers").1
    }

    /// One lane of `/api/status`.
    pub async fn lane(&self, lane: &str) -> Value {
        let status = self.status().await;
        let lanes = status["lanes"].as_array().expect("a list of lanes");
        lanes
            .iter()
            .find(|found| found["lane"] == lane)
            .unwrap_or_else(|| panic!("no lane {lane}: {status}"))
            .clone()
    }

    pub async fn lane_is(&self, lane: &str, state: &str, patience: Duration) {
        eventually(&format!("lane {lane} is {state}"), patience, async || {
            (self.lane(lane).await["state"] == state).then_some(())
        })
        .await;
    }

    /// Waits until the lane is in any state but "up". Its back-off is short at first, so it may be
    /// "connecting" again.
    pub async fn lane_is_away(&self, lane: &str, patience: Duration) {
        eventually(&format!("lane {lane} is away"), patience, async || {
            (self.lane(lane).await["state"] != "up").then_some(())
        })
        .await;
    }

    /// Waits until nothing is in flight and nothing waits on disk, and returns the ledger, which
    /// balances. The ledger counts a record that this run did not accept only when the record ends:
    /// a test with such records calls [`Node::all_ended`].
    pub async fn at_rest(&self, patience: Duration) -> Value {
        self.all_ended(0, patience).await
    }

    /// Waits until at least `records` records are delivered or dead and the node is at rest, and
    /// returns the ledger.
    pub async fn all_ended(&self, records: usize, patience: Duration) -> Value {
        let records = records as u64;
        let deadline = Instant::now() + patience;
        loop {
            let ledger = self.status().await["ledger"].clone();
            let of = |key: &str| ledger[key].as_u64().expect("a count");
            let ended = of("delivered") + of("dead");
            if ended >= records
                && of("in_flight") + of("spooled") + of("parked") == 0
                && of("accepted") + of("recovered") == ended
            {
                return ledger;
            }
            assert!(
                Instant::now() < deadline,
                "not {records} ended and at rest within {patience:?}: {ledger}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Type and text of what its admin side answers.
    pub async fn text(&self, path: &str) -> (String, String) {
        let url = format!("http://127.0.0.1:{}{path}", self.admin);
        let mut answer = self.http.get(url).send().await.expect("the node answers");
        let content_type = answer
            .headers()
            .get("content-type")
            .expect("a type")
            .to_str()
            .expect("text")
            .to_owned();
        let body = answer.body().await.expect("a body");
        (
            content_type,
            String::from_utf8(body.to_vec()).expect("text"),
        )
    }

    /// The value of a metric, named with its labels.
    pub async fn metric(&self, name: &str) -> String {
        let (_, text) = self.text("/metrics").await;
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_else(|| panic!("{name} is not in\n{text}"));
        value.to_owned()
    }

    /// `POST` to its admin side.
    pub async fn tell(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let url = format!("http://127.0.0.1:{}{path}", self.admin);
        let mut answer = self
            .http
            .post(url)
            .send_json(&body)
            .await
            .expect("the node answers");
        let body = answer.body().await.expect("a body");
        (
            answer.status(),
            serde_json::from_slice(&body).unwrap_or(Value::Null),
        )
    }

    /// The log so far, of all runs, with all that was logged before this call.
    pub fn log(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        while process::thread_is_busy(&self.child, "log") && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        fs::read_to_string(self.log.path()).expect("the log is UTF-8")
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// The ids of all dead letters.
    pub async fn dead(&self) -> HashSet<String> {
        let (status, list) = self
            .get("/api/dead?limit=10000")
            .await
            .expect("the node answers");
        assert_eq!(status, StatusCode::OK, "{list}");
        let letters = list["dead"].as_array().expect("a list");
        letters
            .iter()
            .map(|letter| letter["id"].as_str().expect("an id").to_owned())
            .collect()
    }

    /// An order to a lane: "pause", "resume" or "restart".
    pub async fn order(&self, lane: &str, action: &str) -> StatusCode {
        let path = format!("/api/lanes/{lane}/{action}");
        self.tell(&path, json!({})).await.0
    }

    /// A client of this node, which may outlive it.
    pub fn client(&self) -> Client {
        Client {
            http: self.http.clone(),
            port: self.ingest,
        }
    }

    /// Posts one record under `key`. `None` if there was no answer.
    pub async fn post(&self, path: &str, key: &str, record: Bytes) -> Option<(StatusCode, Value)> {
        self.client().post(path, key, record).await
    }
}

/// A client of a node.
pub struct Client {
    http: awc::Client,
    port: u16,
}

impl Client {
    /// Posts one record under `key`. `None` if there was no answer.
    pub async fn post(&self, path: &str, key: &str, record: Bytes) -> Option<(StatusCode, Value)> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let request = self
            .http
            .post(url)
            .content_type("application/json")
            .insert_header(("Idempotency-Key", key));
        let mut answer = request.send_body(record).await.ok()?;
        let body = answer.body().await.ok()?;
        Some((
            answer.status(),
            serde_json::from_slice(&body).unwrap_or(Value::Null),
        ))
    }
}

/// The whole name of a variable.
fn variable(key: &str) -> String {
    if key.starts_with("OTEL_") || key == "RUST_LOG" {
        key.to_owned()
    } else {
        format!("WAYPOST_{key}")
    }
}

fn log_file(path: &Path) -> Stdio {
    let log = File::options().append(true).open(path);
    log.expect("the log").into()
}

/// `NODE_UNDER_TEST` names another build of the program, such as an optimized one.
fn launch(environment: &[(String, String)], stderr: Stdio, arguments: &[String]) -> Child {
    let program =
        env::var("NODE_UNDER_TEST").unwrap_or_else(|_| env!("CARGO_BIN_EXE_waypost").into());
    process::start(&program, |command| {
        command
            .args(arguments)
            .env_remove("PUBSUB_EMULATOR_HOST")
            .stdin(Stdio::null())
            .stderr(stderr);
        command.envs(environment.iter().map(|(key, value)| (key, value)));
    })
    .expect("the program starts")
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
        let log = fs::read(self.log.path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        // A debug build panics where two threads could wait for each other for ever.
        let deadlock = log.contains("cycle in mutex dependency graph");
        // The harness shows what a test prints only if the test fails.
        if deadlock || thread::panicking() {
            println!("log of the node:\n{log}");
        }
        assert!(
            !deadlock || thread::panicking(),
            "threads of the node can wait for each other for ever"
        );
    }
}
