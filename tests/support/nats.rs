//! A real NATS server with JetStream.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::TcpStream,
};
use waypost::{config, record::Record, transport::nats};

use super::{eventually, process, rig::Rig};

const PATIENCE: Duration = Duration::from_secs(20);
const CURRENT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/nats-server/bin/nats-server"
);

/// A stream as it was.
pub struct Backup {
    /// Its configuration and its state.
    description: Value,
    chunks: Vec<Bytes>,
}

/// A server with its own folder.
pub struct Nats {
    program: PathBuf,
    arguments: Vec<String>,
    port: u16,
    data: TempDir,
    server: Child,
}

impl Nats {
    /// Starts a server with more `arguments`. `None`, with a message, if none is installed.
    pub async fn with(arguments: &[&str]) -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin")]);
        let program = folders
            .map(|folder| folder.join("nats-server"))
            .find(|file| file.exists());
        Self::of(program, arguments).await
    }

    /// The same with a current server, which `tests/run` installs beside the system's.
    pub async fn current(arguments: &[&str]) -> Option<Self> {
        let program = PathBuf::from(CURRENT);
        Self::of(program.exists().then_some(program), arguments).await
    }

    async fn of(program: Option<PathBuf>, arguments: &[&str]) -> Option<Self> {
        let Some(program) = program else {
            super::missing("nats-server");
            return None;
        };
        let arguments = arguments
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>();
        let port = process::free_port();
        let data = tempfile::tempdir().expect("a temporary folder");
        let server = Self::spawn(&program, &arguments, port, &data);
        let mut nats = Self {
            program,
            arguments,
            port,
            data,
            server,
        };
        eprintln!("NATS server {}", nats.answers().await);
        Some(nats)
    }

    fn spawn(program: &Path, arguments: &[String], port: u16, data: &TempDir) -> Child {
        process::start(program.to_str().expect("a plain path"), |command| {
            command
                .args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"])
                .arg(data.path())
                .args(arguments);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        })
        .expect("the server starts")
    }

    /// The server greets first. Returns the version in its greeting.
    async fn answers(&mut self) -> String {
        let server = &mut self.server;
        let port = self.port;
        eventually("NATS answers", PATIENCE, async || {
            assert!(
                server.try_wait().expect("a child's status").is_none(),
                "the server ended"
            );
            let connection = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let mut greeting = String::new();
            BufReader::new(connection)
                .read_line(&mut greeting)
                .await
                .ok()?;
            let info: Value = serde_json::from_str(greeting.strip_prefix("INFO ")?).ok()?;
            Some(info["version"].as_str()?.to_owned())
        })
        .await
    }

    /// The address, without a scheme.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A new stream for each caller.
    pub fn config(&self) -> config::NatsConfig {
        let name = Record::new_id();
        config::NatsConfig {
            url: format!("nats://{}", self.address()).into(),
            stream: format!("RECORDS-{name}"),
            subject: format!("records.{name}"),
            ..config::NatsConfig::default()
        }
    }

    /// Asks the server to end, and waits for that.
    pub async fn terminate(&mut self) {
        self.signal("TERM");
        let server = &mut self.server;
        eventually("the server ends", PATIENCE, async || {
            server.try_wait().expect("a child's status")
        })
        .await;
    }

    /// Deletes everything from a stopped server.
    pub fn forget_all(&self) {
        fs::remove_dir_all(self.data.path().join("jetstream")).expect("the folder is ours");
    }

    /// Deletes the messages of `stream` from a stopped server, and keeps its consumers.
    pub fn forget_messages(&self, stream: &str) {
        let messages = self.folder(stream).join("msgs");
        for file in fs::read_dir(messages).expect("the stream's folder") {
            fs::remove_file(file.expect("an entry").path()).expect("the folder is ours");
        }
    }

    /// Leaves of the files of a `consumer` what a power cut does soon after they were written:
    /// lengths, and no contents. The server is stopped.
    pub fn damage_consumer(&self, stream: &str, consumer: &str) {
        let folder = self.consumer_folder(stream, consumer);
        for (name, length) in [("meta.inf", 0), ("meta.sum", 0), ("o.dat", 64)] {
            fs::write(folder.join(name), vec![0; length]).expect("the folder is ours");
        }
    }

    /// Removes the files of a `consumer` of `stream` from a stopped server.
    pub fn forget_consumer(&self, stream: &str, consumer: &str) {
        fs::remove_dir_all(self.consumer_folder(stream, consumer)).expect("the folder is ours");
    }

    fn consumer_folder(&self, stream: &str, consumer: &str) -> PathBuf {
        self.folder(stream).join("obs").join(consumer)
    }

    fn folder(&self, stream: &str) -> PathBuf {
        let streams = self.data.path().join("jetstream/$G/streams");
        streams.join(stream)
    }

    /// Backs `stream` up as `nats stream backup` does.
    pub async fn back_up(&self, stream: &str) -> Backup {
        let client = self.client().await;
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.expect("an inbox");
        let wanted = json!({"deliver_subject": inbox, "chunk_size": 64 << 10});
        let order = format!("SNAPSHOT.{stream}");
        let description = Self::order(&client, &order, &wanted).await;
        let mut chunks = Vec::new();
        while let Some(chunk) = answers.next().await
            && !chunk.payload.is_empty()
        {
            if let Some(reply) = chunk.reply {
                client.publish(reply, Bytes::new()).await.expect("an ack");
            }
            chunks.push(chunk.payload);
        }
        Backup {
            description,
            chunks,
        }
    }

    /// Puts `stream` back in the place of the present one, as `nats stream restore` does.
    pub async fn restore(&self, stream: &str, backup: Backup) {
        let client = self.client().await;
        Self::order(&client, &format!("DELETE.{stream}"), &json!({})).await;
        let order = format!("RESTORE.{stream}");
        let answer = Self::order(&client, &order, &backup.description).await;
        let to = answer["deliver_subject"].as_str().expect("a subject");
        for chunk in backup.chunks.into_iter().chain([Bytes::new()]) {
            client.request(to.to_owned(), chunk).await.expect("an ack");
        }
    }

    async fn client(&self) -> async_nats::Client {
        async_nats::connect(self.address())
            .await
            .expect("a connection")
    }

    /// The states of all streams and of their consumers, as JSON.
    pub async fn states(&self) -> String {
        let client = self.client().await;
        let mut states = Self::order(&client, "LIST", &json!({})).await["streams"].take();
        for stream in states.as_array_mut().into_iter().flatten() {
            let name = stream["config"]["name"].as_str().unwrap_or_default();
            let subject = format!("$JS.API.CONSUMER.LIST.{name}");
            let consumers = client.request(subject, Bytes::new()).await;
            let consumers = consumers.expect("an answer").payload;
            stream["consumers"] = serde_json::from_slice(&consumers).expect("JSON");
        }
        states.to_string()
    }

    /// Sends an order for a stream, and returns the answer.
    async fn order(client: &async_nats::Client, order: &str, payload: &Value) -> Value {
        let subject = format!("$JS.API.STREAM.{order}");
        let answer = client.request(subject, payload.to_string().into()).await;
        let answer = answer.expect("an answer").payload;
        let answer: Value = serde_json::from_slice(&answer).expect("JSON");
        assert!(answer["error"].is_null(), "{order}: {answer}");
        answer
    }

    /// "STOP" silences the server with its sockets open, "CONT" ends that, "USR2" is lame duck
    /// mode.
    pub fn signal(&self, signal: &str) {
        process::signal(&self.server, signal);
    }
}

impl Rig for Nats {
    type T = nats::Nats;
    const SURVIVES_KILL: bool = true;

    async fn start() -> Option<Self> {
        Self::with(&[]).await
    }

    fn settings(&mut self) -> nats::Settings {
        nats::Settings::new(self.config())
    }

    async fn kill(&mut self) {
        self.server.kill().expect("the server was running");
        self.server.wait().expect("a killed child ends");
    }

    async fn revive(&mut self) {
        self.server = Self::spawn(&self.program, &self.arguments, self.port, &self.data);
        self.answers().await;
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        // A test may have killed it already.
        self.server.kill().ok();
        self.server.wait().ok();
    }
}
