//! A real NATS server with JetStream.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

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
            let info: serde_json::Value =
                serde_json::from_str(greeting.strip_prefix("INFO ")?).ok()?;
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
        let messages = self
            .data
            .path()
            .join("jetstream/$G/streams")
            .join(stream)
            .join("msgs");
        for file in fs::read_dir(messages).expect("the stream's folder") {
            fs::remove_file(file.expect("an entry").path()).expect("the folder is ours");
        }
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

    fn settings(&mut self) -> config::NatsConfig {
        self.config()
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
