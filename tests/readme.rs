//! The README and the docs are true: each command line works as written, and each link leads
//! somewhere.
//!
//! The commands of a page run in their order, in one temporary folder, with the built program as
//! `waypost`. The ports of a page are replaced by free ones. A program that serves runs in the
//! background until the page ends or another one needs its port. A block tagged `no-test` is
//! checked, but not run; its first line says why.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Parser as _;
use serde_json::Value;
use tempfile::TempDir;
use waypost::cli::{self, Cli};

use crate::support::{
    eventually,
    process::{free_port, signal, start},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The ports of the docs: ingest, admin, the gRPC lane and the sink.
const INGEST: u16 = 8000;
const ADMIN: u16 = 8001;
const GRPC: u16 = 3000;
const SINK: u16 = 5000;
const README_LINES_MAX: usize = 120;

/// A page of the repository.
struct Page {
    name: String,
    text: String,
}

/// A fenced block of a page.
struct Block<'p> {
    /// The first word after the fence, and the rest.
    language: &'p str,
    tag: &'p str,
    lines: Vec<&'p str>,
}

impl Page {
    fn read(name: &str) -> Self {
        let text = fs::read_to_string(root().join(name)).expect("the page is there");
        Self {
            name: name.to_owned(),
            text,
        }
    }

    fn all() -> Vec<Self> {
        let docs = fs::read_dir(root().join("docs")).expect("the docs are there");
        let docs = docs.map(|entry| entry.expect("the folder can be read"));
        let pages = docs.filter(|entry| entry.path().is_file());
        let names = pages.map(|entry| {
            let name = entry.file_name();
            format!("docs/{}", name.to_str().expect("a plain name"))
        });
        let mut names: Vec<_> = names.collect();
        names.extend(["README.md".to_owned(), "docker/README.md".to_owned()]);
        names.iter().map(|name| Self::read(name)).collect()
    }

    fn blocks(&self) -> Vec<Block<'_>> {
        let mut blocks = Vec::new();
        let mut open: Option<Block<'_>> = None;
        for line in self.text.lines() {
            match (line.strip_prefix("```"), &mut open) {
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(info), None) => {
                    let (language, tag) = info.split_once(' ').unwrap_or((info, ""));
                    open = Some(Block {
                        language,
                        tag,
                        lines: Vec::new(),
                    });
                }
                (None, Some(block)) => block.lines.push(line),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: a block is not closed", self.name);
        blocks
    }
}

impl Block<'_> {
    /// The command lines, with continued lines joined. Bash itself skips a comment at the end of
    /// one.
    fn commands(&self) -> Vec<String> {
        let joined = self.lines.join("\n").replace("\\\n", " ");
        let commands = joined.lines().map(str::trim);
        commands
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect()
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The command line with the built program in the place of the one that the docs build.
fn by_name(command: &str) -> String {
    command
        .replace("cargo run --release -- ", "waypost ")
        .replace("target/release/waypost ", "waypost ")
}

/// The words from `waypost` to the end of its command.
fn waypost_words(command: &str) -> Option<Vec<&str>> {
    let mut words = command
        .split_whitespace()
        .skip_while(|word| *word != "waypost")
        .take_while(|word| !["#", "&", "|", ">"].contains(word))
        .peekable();
    words.peek()?;
    Some(words.collect())
}

/// The ports that the command serves on until it is stopped, or nothing.
fn serves_on(command: &str) -> &'static [u16] {
    let Some(words) = waypost_words(command) else {
        return &[];
    };
    let parsed = Cli::try_parse_from(&words).unwrap_or_else(|why| panic!("{command}: {why}"));
    match parsed.command {
        None if parsed.version => &[],
        None | Some(cli::Command::Run(_)) => &[INGEST, ADMIN],
        Some(cli::Command::Demo(_)) if !words.contains(&"--once") => &[INGEST, ADMIN],
        Some(cli::Command::Sink(_)) => &[SINK],
        _ => &[],
    }
}

/// A shell's folder, variables and background programs.
struct Session {
    folder: TempDir,
    ports: BTreeMap<u16, u16>,
    servers: Vec<(&'static [u16], Child)>,
}

impl Session {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).expect("the folder is ours");
        symlink(env!("CARGO_BIN_EXE_waypost"), bin.join("waypost")).expect("the folder is ours");
        fs::copy(
            root().join("traffic.json"),
            folder.path().join("traffic.json"),
        )
        .expect("the folder is ours");
        // An answer of 4xx or 5xx is a failure.
        fs::write(
            folder.path().join(".curlrc"),
            "fail-with-body\nshow-error\n",
        )
        .expect("the folder is ours");
        Self {
            folder,
            ports: [INGEST, ADMIN, GRPC, SINK]
                .map(|port| (port, free_port()))
                .into(),
            servers: Vec::new(),
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        let address = |port| format!("127.0.0.1:{}", self.ports[&port]);
        let path = env::var("PATH").unwrap_or_default();
        let folder = self.folder.path().display();
        [
            ("PATH", format!("{folder}/bin:{path}")),
            ("CURL_HOME", folder.to_string()),
            ("WAYPOST_INGEST__LISTEN", address(INGEST)),
            ("WAYPOST_ADMIN__LISTEN", address(ADMIN)),
            ("WAYPOST_LANES__GRPC__LISTEN", address(GRPC)),
            ("WAYPOST_API__URL", format!("http://{}/", address(SINK))),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn set_up(&self, command: &mut Command) {
        command
            .current_dir(self.folder.path())
            .envs(self.environment())
            .env_remove("PUBSUB_EMULATOR_HOST")
            .stdin(Stdio::null());
    }

    /// Puts free ports in the place of those of the docs.
    fn rewrite(&self, command: &str) -> String {
        let mut command = by_name(command);
        for (port, free) in &self.ports {
            command = command.replace(&format!("127.0.0.1:{port}"), &format!("127.0.0.1:{free}"));
        }
        // These have no variable of the environment.
        let sink = format!("waypost sink --listen 127.0.0.1:{}", self.ports[&SINK]);
        let admin = format!("--admin http://127.0.0.1:{}", self.ports[&ADMIN]);
        for name in ["waypost dead", "waypost lane", "waypost status"] {
            command = command.replace(name, &format!("{name} {admin}"));
        }
        command.replace("waypost sink", &sink)
    }

    /// Runs the command to its end, or starts it and waits until it serves. Returns what it
    /// printed.
    async fn run(&mut self, page: &str, command: &str) -> String {
        let serves_on = serves_on(&by_name(command));
        let command = self.rewrite(command);
        if !serves_on.is_empty() {
            self.serve(serves_on, command.trim_end_matches([' ', '&']))
                .await;
            return String::new();
        }
        let mut shell = Command::new("timeout");
        shell.args(["60", "bash", "-euo", "pipefail", "-c", &command]);
        self.set_up(&mut shell);
        let output = tokio::task::spawn_blocking(move || shell.output().expect("bash runs"));
        let output = output.await.expect("it does not panic");
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        println!("{page}: {command}\n{printed}{errors}");
        assert!(
            output.status.success(),
            "{page}: {command}: {}",
            output.status
        );
        if command.contains("curl") && command.contains("--json") {
            self.settled().await;
        }
        printed
    }

    /// Waits until the node has delivered what it has accepted.
    async fn settled(&self) {
        let url = format!("http://127.0.0.1:{}/api/status", self.ports[&ADMIN]);
        let client = awc::Client::default();
        eventually("the records are delivered", PATIENCE, async || {
            let body = client.get(&url).send().await.ok()?.body().await.ok()?;
            let status: Value = serde_json::from_slice(&body).expect("JSON");
            (status["ledger"]["in_flight"] == 0).then_some(())
        })
        .await;
    }

    async fn serve(&mut self, ports: &'static [u16], command: &str) {
        self.stop(|taken| taken.iter().any(|port| ports.contains(port)))
            .await;
        let mut server = start("bash", |shell| {
            shell
                .args(["-c", command])
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            self.set_up(shell);
        })
        .expect("bash starts");
        let url = if ports.contains(&ADMIN) {
            format!("http://127.0.0.1:{}/api/status", self.ports[&ADMIN])
        } else {
            format!("http://127.0.0.1:{}/stats", self.ports[&SINK])
        };
        let client = awc::Client::default();
        eventually(command, PATIENCE, async || {
            let ended = server.try_wait().expect("a child's status");
            assert!(ended.is_none(), "{command} ended: {ended:?}");
            let body = client.get(&url).send().await.ok()?.body().await.ok()?;
            let status = String::from_utf8_lossy(&body);
            let is_up = !ports.contains(&ADMIN)
                || status.contains(r#""state":"up""#)
                // It tells nobody without a token.
                || status.contains("urn:waypost:problem:token");
            is_up.then_some(())
        })
        .await;
        self.servers.push((ports, server));
    }

    /// Stops the programs that serve on ports of which `is_meant` is true. Each exits with success.
    async fn stop(&mut self, is_meant: impl Fn(&[u16]) -> bool) {
        let (stopped, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.servers)
            .into_iter()
            .partition(|(ports, _)| is_meant(ports));
        self.servers = left;
        for (ports, mut server) in stopped {
            signal(&server, "TERM");
            let deadline = Instant::now() + PATIENCE;
            let status = loop {
                if let Some(status) = server.try_wait().expect("a child's status") {
                    break status;
                }
                assert!(
                    Instant::now() < deadline,
                    "the server on {ports:?} does not end"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            assert!(
                status.success(),
                "the server on {ports:?} ended with {status}"
            );
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for (_, server) in &mut self.servers {
            // It may have ended already.
            server.kill().ok();
            server.wait().ok();
        }
    }
}

/// Runs the commands of the page. Returns what each has printed.
async fn run(page: &Page) -> Vec<String> {
    let mut session = Session::new();
    let mut printed = Vec::new();
    for block in page.blocks() {
        let lines = block.lines.join("\n");
        match (block.language, block.tag) {
            ("toml", _) if lines.starts_with("# waypost.toml") => {
                fs::write(session.folder.path().join("waypost.toml"), lines)
                    .expect("the folder is ours");
            }
            ("sh", "no-test") => check(&page.name, &block),
            ("sh", tag) => {
                assert_eq!(tag, "", "{}: an unknown tag", page.name);
                for command in block.commands() {
                    printed.push(session.run(&page.name, &command).await);
                }
            }
            _ => {}
        }
    }
    session.stop(|_| true).await;
    printed
}

/// Checks what can be checked of commands that are not run.
fn check(page: &str, block: &Block<'_>) {
    let reason = block.lines.first().unwrap_or(&"");
    assert!(
        reason.starts_with("# "),
        "{page}: its first line says why it is not run: {reason}"
    );
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("it is there");
    for command in block.commands() {
        serves_on(&by_name(&command));
        let words: Vec<_> = command.split_whitespace().collect();
        for script in words.iter().filter(|word| is_a_script(word)) {
            let mode = fs::metadata(root().join(script))
                .unwrap_or_else(|why| panic!("{page}: {script}: {why}"))
                .permissions()
                .mode();
            let is_read = Path::new(script).extension() == Some("yaml".as_ref());
            assert!(is_read || mode & 0o100 != 0, "{page}: {script}");
        }
        if let ["tests/run", filter, ..] = *words
            && filter != "#"
        {
            let found = test_names().lines().any(|name| name.contains(filter));
            assert!(found, "{page}: {filter} is in no test's name");
        }
        let benches = words.windows(2).filter(|two| two[0] == "--bench");
        for bench in benches.map(|two| two[1]) {
            let named = format!("name = \"{bench}\"");
            assert!(
                manifest.contains(&named),
                "{page}: there is no bench {bench}"
            );
        }
    }
}

/// The names of all tests, each with its kind.
fn test_names() -> String {
    let this = env::current_exe().expect("a path");
    let list = Command::new(this).arg("--list").output();
    String::from_utf8(list.expect("this binary runs again").stdout).expect("names")
}

/// A file of the repository that the command runs or reads.
fn is_a_script(word: &str) -> bool {
    let folders = ["tests/", "benches/", "docker/", ".ci/"];
    folders.iter().any(|folder| word.starts_with(folder))
}

#[actix_rt::test]
async fn the_readme_leads_to_a_first_record() {
    let printed = run(&Page::read("README.md")).await.concat();
    let (_, record) = printed
        .rsplit_once(r#""record":"#)
        .expect("the API shows what it received");
    assert!(record.contains(r#""path":"GRPC"}"#), "{record}");
}

#[actix_rt::test]
async fn the_commands_of_the_docs_work() {
    for page in Page::all() {
        if page.name != "README.md" {
            run(&page).await;
        }
    }
}

#[test]
fn every_link_leads_to_a_file() {
    for Page { name, text } in Page::all() {
        let folder = Path::new(&name)
            .parent()
            .map_or_else(PathBuf::new, PathBuf::from);
        let links = text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split([')', '#']).next()) {
            if !link.is_empty() && !link.contains("://") {
                let file = root().join(&folder).join(link);
                assert!(file.exists(), "{name}: there is no {link}");
            }
        }
    }
}

#[test]
fn the_readme_is_short() {
    let lines = Page::read("README.md").text.lines().count();
    assert!(lines <= README_LINES_MAX, "{lines} lines");
}
