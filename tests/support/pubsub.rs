//! The real emulator of an installed Google Cloud SDK. The holder of a [`Pubsub`] has it alone and
//! may kill it. A dropped one serves the next test.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use google_cloud_auth::credentials::anonymous;
use google_cloud_pubsub::client::{SubscriptionAdmin, TopicAdmin};
use tokio::time::timeout;
use waypost::{
    config,
    record::Record,
    transport::pubsub::{self, Settings},
};

use super::{eventually, process, rig::Rig};

const PROJECT: &str = "waypost";
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// A Java program answers slowly at first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

static IDLE: Mutex<Vec<Emulator>> = Mutex::new(Vec::new());

/// Exclusive use of an emulator.
pub struct Pubsub {
    emulator: Option<Emulator>,
}

struct Emulator {
    program: PathBuf,
    port: u16,
    child: Child,
}

impl Rig for Pubsub {
    type T = pubsub::Pubsub;
    /// It keeps everything in memory.
    const SURVIVES_KILL: bool = false;

    async fn start() -> Option<Self> {
        // One provider per process; another test may have installed it.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let Some(program) = installed() else {
            super::missing("the Pub/Sub emulator, or java,");
            return None;
        };
        let idle = IDLE
            .lock()
            .expect("the lock is never held over a panic")
            .pop();
        let emulator = match idle {
            Some(mut emulator) => {
                emulator.mend();
                emulator
            }
            None => {
                let port = process::free_port();
                Emulator {
                    child: spawn(&program, port),
                    port,
                    program,
                }
            }
        };
        let mut rig = Self {
            emulator: Some(emulator),
        };
        rig.answers().await;
        Some(rig)
    }

    fn settings(&mut self) -> Settings {
        Settings::new(self.config())
    }

    async fn kill(&mut self) {
        let child = &mut self.emulator().child;
        child.kill().expect("the emulator was running");
        child.wait().expect("a killed child ends");
    }

    async fn revive(&mut self) {
        self.emulator().mend();
        self.answers().await;
    }
}

impl Pubsub {
    /// A new topic and subscription for each caller.
    pub fn config(&mut self) -> config::PubsubConfig {
        let unused = format!("records-{}", Record::new_id());
        config::PubsubConfig {
            project: PROJECT.into(),
            topic: unused.clone(),
            subscription: unused,
            endpoint: Some(format!("127.0.0.1:{}", self.emulator().port)),
            ..config::PubsubConfig::default()
        }
    }

    /// "STOP" silences the emulator with its sockets open, and "CONT" ends that.
    pub fn signal(&mut self, signal: &str) {
        process::signal(&self.emulator().child, signal);
    }

    /// Clients for administration.
    pub async fn admin(&mut self) -> (TopicAdmin, SubscriptionAdmin) {
        let endpoint = format!("http://127.0.0.1:{}", self.emulator().port);
        let anonymous = || anonymous::Builder::new().build();
        let topics = TopicAdmin::builder()
            .with_endpoint(&endpoint)
            .with_credentials(anonymous())
            .build();
        let subscriptions = SubscriptionAdmin::builder()
            .with_endpoint(&endpoint)
            .with_credentials(anonymous())
            .build();
        (
            topics.await.expect("a client"),
            subscriptions.await.expect("a client"),
        )
    }

    fn emulator(&mut self) -> &mut Emulator {
        self.emulator.as_mut().expect("it is taken only on drop")
    }

    async fn answers(&mut self) {
        let (topics, _) = self.admin().await;
        let child = &mut self.emulator().child;
        eventually("the Pub/Sub emulator answers", START_TIMEOUT, || {
            let ended = child.try_wait().expect("the child is ours");
            assert!(ended.is_none(), "the Pub/Sub emulator ended: {ended:?}");
            let list = topics
                .list_topics()
                .set_project(format!("projects/{PROJECT}"))
                .send();
            async { timeout(ANSWER_TIMEOUT, list).await.ok()?.ok() }
        })
        .await;
    }
}

impl Drop for Pubsub {
    fn drop(&mut self) {
        if let (Some(emulator), Ok(mut idle)) = (self.emulator.take(), IDLE.lock()) {
            idle.push(emulator);
        }
    }
}

impl Emulator {
    /// Makes the emulator run again after a test has stopped or killed it.
    fn mend(&mut self) {
        if self.child.try_wait().expect("the child is ours").is_none() {
            process::signal(&self.child, "CONT");
        } else {
            self.child = spawn(&self.program, self.port);
        }
    }
}

/// The script replaces itself with the Java program, so the child is the emulator.
fn spawn(program: &Path, port: u16) -> Child {
    process::start(program.to_str().expect("a path of UTF-8"), |command| {
        command
            .args(["--host=127.0.0.1", &format!("--port={port}")])
            .arg(format!("--data-dir={}", env!("CARGO_TARGET_TMPDIR")))
            // It starts sooner, and leaves the processors to the tests.
            .env(
                "JAVA_OPTS",
                "-Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1",
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
    })
    .expect("the emulator starts")
}

fn installed() -> Option<PathBuf> {
    let java = Command::new("java")
        .arg("-version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !java.is_ok_and(|status| status.success()) {
        return None;
    }
    let of_sdk = |root: PathBuf| root.join("platform/pubsub-emulator/bin/cloud-pubsub-emulator");
    let roots = [
        "/usr/lib/google-cloud-sdk",
        "/usr/share/google-cloud-sdk",
        "/opt/google-cloud-sdk",
    ]
    .map(PathBuf::from);
    let named = std::env::var_os("CLOUDSDK_ROOT").map(PathBuf::from);
    let home = std::env::home_dir().map(|home| home.join("google-cloud-sdk"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("cloud-pubsub-emulator"));
    named
        .into_iter()
        .chain(roots)
        .chain(home)
        .map(of_sdk)
        .chain(on_path)
        .find(|program| program.is_file())
}
