//! A real `RabbitMQ`. It starts slowly, so the test binary has one, and tests take turns: the
//! holder of the [`Rabbit`] may kill it.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, LazyLock},
    thread,
    time::Duration,
};

use lapin::{Connection, ConnectionProperties};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::timeout,
};
use waypost::{config, record::Record, transport::rabbitmq};

use super::{eventually, process, rig::Rig, tls::certificate};

/// The server itself. The script of that name in `sbin` changes the user.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
const CTL: &str = "/usr/lib/rabbitmq/bin/rabbitmqctl";
/// A start takes 10 to 20 seconds on two busy cores.
const START_TIMEOUT: Duration = Duration::from_secs(90);

static SHARED: LazyLock<Arc<Mutex<Option<Server>>>> = LazyLock::new(Arc::default);

/// The right to use the shared server, alone, until it is dropped.
pub struct Rabbit {
    server: OwnedMutexGuard<Option<Server>>,
}

impl Rig for Rabbit {
    type T = rabbitmq::RabbitMq;
    const SURVIVES_KILL: bool = true;

    /// Waits for its turn and for the server to answer.
    async fn start() -> Option<Self> {
        if !Path::new(SERVER).exists() {
            super::missing(SERVER);
            return None;
        }
        let mut server = Arc::clone(&SHARED).lock_owned().await;
        match &mut *server {
            // The test before may have panicked and left it stopped or dead.
            Some(server) => server.mend().await,
            None => *server = Some(Server::start(None).await),
        }
        Some(Self { server })
    }

    fn settings(&mut self) -> config::RabbitmqConfig {
        self.config()
    }

    async fn kill(&mut self) {
        let child = &mut self.server().child;
        child.kill().expect("the server was running");
        child.wait().expect("a killed child ends");
    }

    async fn revive(&mut self) {
        let server = self.server();
        server.child = server.files.spawn();
        server.answers().await;
    }
}

impl Drop for Rabbit {
    /// A failed test leaves the shared server in an unknown state, so the next test gets a new one.
    fn drop(&mut self) {
        if thread::panicking() {
            // This fails if the test has killed the server.
            self.server().child.kill().ok();
            self.server().child.wait().ok();
        }
    }
}

impl Rabbit {
    /// A server of its own, with its data in `folder`.
    pub async fn on(folder: &str) -> Option<Self> {
        if !Path::new(SERVER).exists() {
            super::missing(SERVER);
            return None;
        }
        let server = Server::start(Some(folder)).await;
        // At its first start it makes two files of Raft (`meta.dets`) that it does not sync. If a power
        // cut empties one, it does not start again: docs/operate.md has the remedy.
        let sync = Command::new("sync").args(["-f", folder]).status();
        assert!(sync.is_ok_and(|status| status.success()), "sync {folder}");
        let server = Arc::new(Mutex::new(Some(server))).lock_owned().await;
        Some(Self { server })
    }

    /// A new queue for each caller.
    pub fn config(&mut self) -> config::RabbitmqConfig {
        let url = self.server().files.url();
        config::RabbitmqConfig {
            url: url.into(),
            queue: format!("records-{}", Record::new_id()),
            ..config::RabbitmqConfig::default()
        }
    }

    fn server(&mut self) -> &mut Server {
        self.server.as_mut().expect("a started rig has a server")
    }

    /// "STOP" silences the server with its sockets open, and "CONT" ends that.
    pub fn signal(&mut self, signal: &str) {
        process::signal(&self.server().child, signal);
    }

    /// Runs an administrator's command, and returns what it prints.
    pub fn ctl(&mut self, args: &[&str]) -> String {
        let files = &self.server().files;
        let mut command = Command::new(CTL);
        files.set_environment(&mut command);
        let output = command
            .args(["--node", &files.node()])
            .args(args)
            .output()
            .expect("rabbitmqctl runs");
        assert!(
            output.status.success(),
            "rabbitmqctl {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The TLS port, and the server's certificate.
    pub fn tls(&mut self) -> Option<(u16, PathBuf)> {
        self.server().files.tls.clone()
    }

    /// Connects another client.
    pub async fn client(&mut self) -> Connection {
        self.server()
            .files
            .connect()
            .await
            .expect("the server answers")
    }
}

struct Server {
    files: ServerFiles,
    child: Child,
    /// The port mapper, started here so that it ends with the tests. One started by the server
    /// would outlive them.
    _epmd: Child,
    /// Removes the folder once the tests have ended, and with them its input.
    _sweeper: Child,
}

impl Server {
    async fn start(data: Option<&str>) -> Self {
        let mut server = Self::begin(data);
        // A port that was free may have been taken since.
        for _ in 0..2 {
            if server.comes_up().await {
                return server;
            }
            server = Self::begin(data);
        }
        server.answers().await;
        server
    }

    fn begin(data: Option<&str>) -> Self {
        let files = ServerFiles::new(data);
        let sweeper = Command::new("sh")
            .args(["-c", r#"cat; sleep 1; rm -rf -- "$0""#])
            .arg(&files.dir)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh starts");
        let epmd = process::start("epmd", |command| {
            command.args([
                "-address",
                "127.0.0.1",
                "-port",
                &files.epmd_port.to_string(),
            ]);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        })
        .expect("epmd starts");
        Self {
            child: files.spawn(),
            files,
            _epmd: epmd,
            _sweeper: sweeper,
        }
    }

    /// Revives a server that a panicked test has left stopped or dead.
    async fn mend(&mut self) {
        if self.is_running() {
            process::signal(&self.child, "CONT");
        } else {
            self.child = self.files.spawn();
        }
        self.answers().await;
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the child is ours").is_none()
    }

    async fn answers(&mut self) {
        assert!(
            self.comes_up().await,
            "RabbitMQ ended; see {}",
            self.files.dir.join("log").display()
        );
    }

    /// Waits until it answers. False if it has ended instead.
    async fn comes_up(&mut self) -> bool {
        let child = &mut self.child;
        let files = &self.files;
        eventually("RabbitMQ answers", START_TIMEOUT, || {
            let has_ended = child.try_wait().expect("the child is ours").is_some();
            async move {
                if has_ended {
                    Some(false)
                } else {
                    files.connect().await.map(|_| true)
                }
            }
        })
        .await
    }
}

/// The part of a server that survives restarts.
struct ServerFiles {
    dir: PathBuf,
    data: PathBuf,
    port: u16,
    /// The TLS port and certificate. `None` if no certificate can be made.
    tls: Option<(u16, PathBuf)>,
    dist_port: u16,
    epmd_port: u16,
}

impl ServerFiles {
    fn new(data: Option<&str>) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("waypost-rabbitmq-")
            .tempdir()
            .expect("a temporary folder")
            .keep();
        for folder in ["home", "data", "log"] {
            std::fs::create_dir(dir.join(folder)).expect("the folder is ours");
        }
        std::fs::write(dir.join("plugins"), "[].").expect("the folder is ours");
        let tls = certificate(&dir, "IP:127.0.0.1").map(|(cert, key)| {
            let port = process::free_port();
            let cert_file = cert.display();
            let key_file = key.display();
            let settings = format!(
                "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.certfile = {cert_file}\nssl_options.keyfile = {key_file}\n"
            );
            std::fs::write(dir.join("rabbitmq.conf"), settings).expect("the folder is ours");
            (port, cert)
        });
        Self {
            data: data.map_or_else(|| dir.join("data"), PathBuf::from),
            dir,
            port: process::free_port(),
            tls,
            dist_port: process::free_port(),
            epmd_port: process::free_port(),
        }
    }

    fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    fn node(&self) -> String {
        format!("waypost{}@localhost", self.port)
    }

    fn set_environment(&self, command: &mut Command) {
        command
            // Erlang leaves the dumps of a crash where it runs.
            .current_dir(&self.dir)
            .env("HOME", self.dir.join("home"))
            .env("RABBITMQ_NODENAME", self.node())
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", &self.data)
            .env("RABBITMQ_LOG_BASE", self.dir.join("log"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", self.dir.join("plugins"))
            .env("RABBITMQ_CONFIG_FILE", self.dir.join("rabbitmq"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_PID_FILE", self.dir.join("pid"))
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1");
    }

    fn spawn(&self) -> Child {
        process::start(SERVER, |command| {
            self.set_environment(command);
            command
                // Makes the script replace itself, so that the child is the server.
                .env("RUNNING_UNDER_SYSTEMD", "true")
                .env("ERL_CRASH_DUMP", self.dir.join("erl_crash.dump"))
                .env(
                    "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                    "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
                )
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        })
        .expect("the server starts")
    }

    async fn connect(&self) -> Option<Connection> {
        let url = self.url();
        let connecting = Connection::connect(&url, ConnectionProperties::default());
        timeout(Duration::from_secs(5), connecting).await.ok()?.ok()
    }
}
