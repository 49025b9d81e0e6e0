//! The test of the tests: bugs that break the promise are planted, and each must be found.
//!
//! `planted/bugs.toml` lists the bugs. All of them are built into one copy of the program, and an
//! environment variable chooses one of them for a run; the program itself knows nothing of them.
//! `tests/run planted` does that. Here an ordinary test holds the list to the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{Read as _, Seek as _},
    ops::Range,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::Value;

use crate::support::wanted;

const LIST: &str = include_str!("planted/bugs.toml");
/// In `becomes`: whether the bug is chosen.
const CHOSEN: &str = "BUG";
/// Chooses a bug by its name.
const VARIABLE: &str = "PLANTED_BUG";
/// The function that reads the variable, at the end of the copy's `src/lib.rs`.
const IS_PLANTED: &str = r#"
pub fn is_planted(bug: &str) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("PLANTED_BUG").ok());
    CHOSEN.as_deref() == Some(bug)
}
"#;
/// How long a test may run with a bug.
const PATIENCE: Duration = Duration::from_mins(5);
/// The most characters of a failure that are printed.
const WHY_MAX: usize = 100;
/// How long all of them may run without one.
const PATIENCE_WITHOUT: Duration = Duration::from_mins(15);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bug {
    file: String,
    /// Occurs once in the file.
    text: String,
    becomes: String,
    /// The test that fails with it.
    found_by: String,
}

/// The bugs by their names.
fn bugs() -> BTreeMap<String, Bug> {
    toml::from_str(LIST).expect("a list of bugs")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `source`, the content of `file`, with all bugs of the file.
fn with_bugs(file: &str, source: &str, bugs: &BTreeMap<String, Bug>) -> Result<String, String> {
    let of_file = bugs.iter().filter(|(_, bug)| bug.file == file);
    let mut places: Vec<(Range<usize>, String)> = Vec::new();
    for (name, bug) in of_file {
        let found: Vec<_> = source.match_indices(&bug.text).collect();
        let [(at, _)] = found[..] else {
            let times = found.len();
            return Err(format!(
                "{name}: its text is {times} times in {file}: {}",
                bug.text
            ));
        };
        let chosen = format!("crate::is_planted({name:?})");
        let becomes = bug.becomes.replace(CHOSEN, &chosen);
        if becomes == bug.becomes {
            return Err(format!("{name}: {CHOSEN} does not choose it"));
        }
        places.push((at..at + bug.text.len(), becomes));
    }
    places.sort_by_key(|(place, _)| place.start);
    if let Some(pair) = places
        .windows(2)
        .find(|pair| pair[0].0.end > pair[1].0.start)
    {
        return Err(format!("{file}: two bugs share {:?}", pair[1].0));
    }
    let mut planted = source.to_owned();
    for (place, becomes) in places.into_iter().rev() {
        planted.replace_range(place, &becomes);
    }
    Ok(planted)
}

/// A manifest or lock file whose package has a version of its own. Cargo takes packages of one name
/// and version for one package, wherever they are.
fn with_own_version(manifest: String) -> String {
    let version = |more: &str| {
        let version = env!("CARGO_PKG_VERSION");
        format!("name = \"waypost\"\nversion = \"{version}{more}\"\n")
    };
    assert!(manifest.contains(&version("")), "no version:\n{manifest}");
    manifest.replacen(&version(""), &version("-planted"), 1)
}

/// The files of the repository, by their paths in it.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let inside = path.strip_prefix(root()).expect("it is inside");
            if path.is_file() {
                files.push(inside.to_owned());
            } else if inside != "target" && inside != ".git" {
                folders.push(path);
            }
        }
    }
    files
}

/// The list does not rot: each bug can be planted, and the test that finds it is there.
#[test]
fn each_bug_can_be_planted() {
    let bugs = bugs();
    let files = files();
    let sources = files
        .iter()
        .filter(|file| file.extension() == Some("rs".as_ref()));
    let sources: BTreeMap<_, _> = sources
        .map(|file| {
            let source = fs::read_to_string(root().join(file)).expect("a source");
            (file.to_str().expect("a plain path"), source)
        })
        .collect();
    for (name, bug) in &bugs {
        let source = sources.get(&*bug.file);
        let source = source.unwrap_or_else(|| panic!("{name}: there is no {}", bug.file));
        if let Err(why) = with_bugs(&bug.file, source, &bugs) {
            panic!("{why}");
        }
        let test = bug.found_by.rsplit("::").next().unwrap_or_default();
        let test = format!("fn {test}");
        let mut all = sources.values();
        assert!(
            all.any(|source| source.contains(&test)),
            "{name}: no {test}"
        );
    }
}

/// A copy of the program with all bugs, and its test binaries.
struct Copy {
    folder: PathBuf,
    /// The program, apart: a later build of the repository replaces the one that cargo has made.
    node: PathBuf,
    binaries: Vec<PathBuf>,
}

impl Copy {
    /// Writes only what has changed, so that cargo builds little.
    fn build(bugs: &BTreeMap<String, Bug>) -> Self {
        let node = Path::new(env!("CARGO_BIN_EXE_waypost"));
        let target = node
            .parent()
            .and_then(Path::parent)
            .expect("cargo's folder");
        let folder = target.join("planted");
        for file in files() {
            let original = root().join(&file);
            let mut bytes = fs::read(&original).expect("a file");
            let name = file.to_str().expect("a plain path");
            let edit = |change: &dyn Fn(String) -> String| {
                let text = String::from_utf8(bytes.clone()).expect("text");
                change(text).into_bytes()
            };
            bytes = match name {
                "src/lib.rs" => edit(&|source| source + IS_PLANTED),
                "Cargo.toml" | "Cargo.lock" => edit(&with_own_version),
                _ if bugs.values().any(|bug| bug.file == name) => edit(&|source| {
                    with_bugs(name, &source, bugs).unwrap_or_else(|why| panic!("{why}"))
                }),
                _ => bytes,
            };
            let copy = folder.join(&file);
            if fs::read(&copy).ok().as_ref() != Some(&bytes) {
                fs::create_dir_all(copy.parent().expect("a folder")).expect("the folder is ours");
                fs::write(&copy, bytes).expect("the folder is ours");
                let permissions = fs::metadata(&original).expect("a file").permissions();
                fs::set_permissions(&copy, permissions).expect("the file is ours");
            }
        }
        let mut copy = Self {
            node: folder.join("waypost"),
            binaries: Vec::new(),
            folder,
        };
        copy.compile(target);
        copy.link_tools(target);
        copy
    }

    fn compile(&mut self, target: &Path) {
        let mut cargo = Command::new(env!("CARGO"));
        // What cargo tells a test would make it build dependencies again.
        let told = ["CARGO_MANIFEST_", "CARGO_PKG_", "OUT_DIR"];
        for (name, _) in env::vars() {
            if told.iter().any(|beginning| name.starts_with(beginning)) {
                cargo.env_remove(name);
            }
        }
        cargo
            .args(["test", "--no-run", "--locked", "--features", "failpoints"])
            .args([
                "--message-format",
                "json-render-diagnostics",
                "--target-dir",
            ])
            .arg(target)
            .current_dir(&self.folder)
            .stderr(Stdio::inherit());
        // Cargo puts the copy's program in the place of the repository's.
        let place = Path::new(env!("CARGO_BIN_EXE_waypost"));
        let kept = self.folder.join("waypost.kept");
        fs::remove_file(&kept).ok();
        fs::hard_link(place, &kept).expect("the folder is ours");
        let built = cargo.output().expect("cargo runs");
        assert!(built.status.success(), "the bugs do not compile");
        let messages = String::from_utf8(built.stdout).expect("text");
        for line in messages.lines() {
            let message: Value = serde_json::from_str(line).expect("JSON");
            let Some(executable) = message["executable"].as_str() else {
                continue;
            };
            let kind = message["target"]["kind"][0].as_str();
            match (kind, message["profile"]["test"].as_bool()) {
                (Some("bin"), Some(false)) => {
                    fs::copy(executable, &self.node).expect("the folder is ours");
                }
                (Some("lib" | "test"), Some(true)) => self.binaries.push(executable.into()),
                _ => {}
            }
        }
        fs::rename(kept, place).expect("the folder is ours");
    }

    /// The tests look for a server and a library in the folder of their repository.
    fn link_tools(&self, target: &Path) {
        let folder = self.folder.join("target");
        fs::create_dir_all(&folder).expect("the folder is ours");
        for tool in ["cloudevents", "nats-server", "openapi", "standardwebhooks"] {
            // It may be there from an earlier run.
            symlink(target.join(tool), folder.join(tool)).ok();
        }
    }

    fn command(&self, binary: &Path) -> Command {
        let mut command = Command::new(binary);
        command
            .current_dir(&self.folder)
            .env("NODE_UNDER_TEST", &self.node)
            .env_remove(VARIABLE);
        command
    }

    /// The binary of each test.
    fn tests(&self) -> BTreeMap<String, &Path> {
        let mut tests = BTreeMap::new();
        for binary in &self.binaries {
            let mut list = self.command(binary);
            let list = list.args(["--list", "--format", "terse"]).output();
            let list = String::from_utf8(list.expect("it runs").stdout).expect("text");
            let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
            tests.extend(names.map(|name| (name.to_owned(), &**binary)));
        }
        tests
    }
}

/// How a run of tests has ended.
enum End {
    Passed,
    /// With the first failure.
    Failed(String),
    DidNotRun,
    Hung,
}

/// Runs tests, for as long as `patience` allows. Also returns what they printed.
fn run(mut command: Command, patience: Duration) -> (End, String) {
    let mut output = tempfile::tempfile().expect("a temporary file");
    let for_output = || Stdio::from(output.try_clone().expect("an open file"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(for_output())
        .stderr(for_output())
        .spawn()
        .expect("it runs");
    let began = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child's status") {
            None if began.elapsed() < patience => thread::sleep(Duration::from_millis(50)),
            None => {
                // Its nodes and brokers end with it.
                child.kill().expect("it is ours");
                child.wait().expect("it ends");
                break None;
            }
            status => break status,
        }
    };
    let mut printed = Vec::new();
    output.rewind().expect("a file");
    output.read_to_end(&mut printed).expect("a file");
    let printed = String::from_utf8_lossy(&printed).into_owned();
    let end = match status {
        None => End::Hung,
        Some(_) if printed.contains("DID NOT RUN") => End::DidNotRun,
        Some(status) if status.success() => End::Passed,
        Some(_) => {
            let mut lines = printed.lines();
            lines.find(|line| line.contains("panicked at"));
            let why = lines.next().unwrap_or_default();
            End::Failed(why.chars().take(WHY_MAX).collect())
        }
    };
    (end, printed)
}

/// Each test passes without a bug.
fn all_pass(copy: &Copy, tests: &BTreeMap<String, &Path>, names: &BTreeSet<&str>, at_once: u64) {
    for binary in &copy.binaries {
        let names = names.iter().filter(|name| tests[**name] == *binary);
        let names: Vec<_> = names.collect();
        if names.is_empty() {
            continue;
        }
        let mut command = copy.command(binary);
        command.arg("--exact").args(names);
        command.args(["--test-threads", &at_once.to_string()]);
        let (end, printed) = run(command, PATIENCE_WITHOUT);
        assert!(matches!(end, End::Passed), "without a bug:\n{printed}");
    }
}

/// `PLANTED_ONLY` names the bugs, or all are planted, `PLANTED_AT_ONCE` of them at a time.
#[test]
#[ignore = "builds the program with the bugs: tests/run planted"]
fn each_bug_is_found() {
    let bugs = bugs();
    let copy = Copy::build(&bugs);
    let tests = copy.tests();
    let only = env::var("PLANTED_ONLY").unwrap_or_default();
    let only: Vec<_> = only.split_whitespace().collect();
    for name in &only {
        assert!(bugs.contains_key(*name), "there is no bug {name}");
    }
    let chosen = bugs
        .iter()
        .filter(|(name, _)| only.is_empty() || only.contains(&&***name));
    let chosen: Vec<_> = chosen.collect();
    let names = chosen.iter().map(|(_, bug)| &*bug.found_by).collect();
    let at_once = wanted("PLANTED_AT_ONCE", 4);
    let began = Instant::now();
    all_pass(&copy, &tests, &names, at_once);
    let took = began.elapsed();
    println!("{} tests pass without a bug ({took:.0?})", names.len());

    let left = Mutex::new(chosen.iter());
    let missed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let next = left.lock().expect("no test panics here").next();
                    let Some((name, bug)) = next else { return };
                    let mut command = copy.command(tests[&bug.found_by]);
                    command.args(["--exact", &bug.found_by]).env(VARIABLE, name);
                    let began = Instant::now();
                    let (end, _) = run(command, PATIENCE);
                    let took = began.elapsed();
                    let test = &bug.found_by;
                    match end {
                        End::Failed(why) => {
                            println!("found      {name} ({took:.0?}) by {test}: {why}");
                            continue;
                        }
                        End::Passed => println!("NOT FOUND  {name} ({took:.0?}) by {test}"),
                        End::DidNotRun => println!("NOT RUN    {name}: {test}"),
                        End::Hung => println!("HANGS      {name} ({took:.0?}): {test}"),
                    }
                    missed
                        .lock()
                        .expect("no test panics here")
                        .push(name.as_str());
                }
            });
        }
    });
    let missed = missed.into_inner().expect("no test panics here");
    println!(
        "{} of {} bugs found",
        chosen.len() - missed.len(),
        chosen.len()
    );
    assert!(missed.is_empty(), "not found: {}", missed.join(" "));
}
