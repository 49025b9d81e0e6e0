//! The commands whose reader closes, or whose output is full or closed.

use std::{
    fs::File,
    io,
    process::{Command, Output, Stdio},
    time::Duration,
};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    process::{self, free_port},
    traffic,
};

/// The ways in which an output may be of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    NoReader,
    Full,
    Closed,
}

const ALL: [Bad; 3] = [Bad::NoReader, Bad::Full, Bad::Closed];

impl Bad {
    /// The shell closes an output; this is for the others.
    fn stdio(self) -> Stdio {
        match self {
            Self::NoReader => {
                let (_reader, writer) = io::pipe().expect("a pipe");
                writer.into()
            }
            Self::Full => File::create("/dev/full").expect("Linux has it").into(),
            Self::Closed => Stdio::inherit(),
        }
    }
}

/// Runs the program with its standard output `out`, and its standard error `err`, of no use.
fn run(arguments: &[&str], out: Option<Bad>, err: Option<Bad>) -> Output {
    let closes = |bad: Option<Bad>, how: &'static str| match bad {
        Some(Bad::Closed) => how,
        _ => "",
    };
    let script = format!(
        "exec \"$0\" \"$@\" {} {}",
        closes(out, ">&-"),
        closes(err, "2>&-")
    );
    let mut command = Command::new("sh");
    command
        .args(["-c", &script, env!("CARGO_BIN_EXE_waypost")])
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(out.map_or_else(Stdio::piped, Bad::stdio))
        .stderr(err.map_or_else(Stdio::piped, Bad::stdio));
    let running = command.spawn().expect("the program runs");
    // The pipes that the command holds would be readers.
    drop(command);
    running.wait_with_output().expect("it ends")
}

/// Each command ends with its own status, or with 1 if its result cannot be written, and says at
/// most why.
fn ends_well(arguments: &[&str], usual: i32) {
    let output = run(arguments, None, None);
    let prints = !output.stdout.is_empty();
    assert_eq!(
        output.status.code(),
        Some(usual),
        "{arguments:?}: {output:?}"
    );
    for bad in ALL {
        let output = run(arguments, Some(bad), None);
        let status = if prints && bad == Bad::Full { 1 } else { usual };
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?} > {bad:?}: {output:?}"
        );
        let told = String::from_utf8(output.stderr).expect("text");
        assert!(
            !told.contains("panicked"),
            "{arguments:?} > {bad:?}: {told}"
        );
        let why = told
            .matches("cannot be written: No space left on device")
            .count();
        assert_eq!(
            why,
            usize::from(prints && bad == Bad::Full),
            "{arguments:?} > {bad:?}: {told}"
        );

        let output = run(arguments, None, Some(bad));
        assert_eq!(
            output.status.code(),
            Some(usual),
            "{arguments:?} 2> {bad:?}: {output:?}"
        );
    }
}

#[actix_rt::test]
async fn no_command_panics_when_its_output_is_of_no_use() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    api.behave(|_, _| Conduct::Answer(400));
    node.post("/", "a", traffic()[0].clone()).await.unwrap();
    eventually("a dead letter", PATIENCE, async || {
        node.dead().await.contains("a").then_some(())
    })
    .await;
    api.behave(|_, _| Conduct::Answer(200));
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let (url, listen) = (api.url(), format!("127.0.0.1:{}", free_port()));
    let commands: [(&[&str], i32); 24] = [
        (&["--help"], 0),
        (&["--version"], 0),
        (&["--version", "--json"], 0),
        (&["dead", "--help"], 0),
        (&["completions", "zsh"], 0),
        (&["man", "lane", "weight"], 0),
        (&["status", "--admin", &admin], 0),
        (&["status", "--json", "--admin", &admin], 0),
        (&["lane", "list", "--admin", &admin], 0),
        (&["lane", "pause", "nats", "--admin", &admin], 1),
        (&["top", "--admin", &admin], 1),
        (&["tap", "--lane", "nats", "--admin", &admin], 1),
        (&["check"], 0),
        (&["check", "--listen", "here"], 2),
        (&["check", "--paint"], 2),
        (&["check", "--connect", "--api", "http://127.0.0.1:9/"], 1),
        (&["dead", "list", "--admin", &admin], 0),
        (&["dead", "list", "--json", "--admin", &admin], 0),
        (&["dead", "list", "--admin", "http://127.0.0.1:9"], 1),
        (&["load", "--host", &url], 0),
        (&["load", "--host", &url, "--json"], 0),
        (&["load", "--host", "http://127.0.0.1:9"], 1),
        (&["demo", "--once"], 0),
        (&["demo", "--once", "--json", "--listen", &listen], 0),
    ];
    for (arguments, usual) in commands {
        ends_well(arguments, usual);
    }
}

/// A log that cannot be written costs the node its log, and nothing else.
#[actix_rt::test]
async fn a_node_serves_without_a_log() {
    for bad in ALL {
        let [listen, admin, lane] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
        let data = tempfile::tempdir().unwrap();
        let closed = if bad == Bad::Closed { "2>&-" } else { "" };
        let mut node = process::start("sh", |command| {
            command
                .args(["-c", &format!("exec \"$0\" \"$@\" {closed}")])
                .arg(env!("CARGO_BIN_EXE_waypost"))
                .args(["run", "-vv", "--listen", &listen, "--admin", &admin])
                .args(["--api", "http://127.0.0.1:9/", "--data"])
                .arg(data.path())
                .env("WAYPOST_LANES__GRPC__LISTEN", &lane)
                .stderr(bad.stdio());
        })
        .unwrap();
        let client = awc::Client::default();
        eventually("the node answers", PATIENCE, async || {
            let url = format!("http://{admin}/readyz");
            client
                .get(url)
                .send()
                .await
                .ok()
                .filter(|answer| answer.status().is_success())
        })
        .await;
        // The API is away, which would be logged.
        let record = traffic()[0].clone();
        let taken = client
            .post(format!("http://{listen}/"))
            .content_type("application/json")
            .send_body(record)
            .await
            .unwrap();
        assert!(taken.status().is_success(), "{bad:?}: {taken:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
        process::signal(&node, "TERM");
        assert!(node.wait().unwrap().success(), "{bad:?}");
    }
}

#[actix_rt::test]
async fn an_unknown_dead_letter_is_a_failure_that_is_told() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(400));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["a", "b"] {
        node.post("/", key, traffic()[0].clone()).await.unwrap();
    }
    eventually("two dead letters", PATIENCE, async || {
        (node.dead().await.len() == 2).then_some(())
    })
    .await;
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let dead = |arguments: &[&str]| {
        let all = [&["dead", "--admin", &admin], arguments].concat();
        let output = run(&all, None, None);
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    for action in ["replay", "drop"] {
        let (status, printed, told) = dead(&[action, "nobody"]);
        assert_eq!(status, Some(1), "{printed}{told}");
        assert_eq!(told, "waypost: 1 of 1 ids name no dead letter\n");
    }
    let (status, printed, told) = dead(&["drop", "a", "nobody", "a"]);
    assert_eq!((status, &*printed), (Some(1), "1 dropped\n"), "{told}");
    assert_eq!(told, "waypost: 1 of 2 ids name no dead letter\n");
    let (status, printed, _) = dead(&["replay", "b", "--json"]);
    assert_eq!((status, &*printed), (Some(0), "{\"replayed\":1}\n"));
    let (status, printed, _) = dead(&["replay", "--all", "--yes"]);
    assert_eq!(status, Some(0), "{printed}");
}

#[actix_rt::test]
async fn a_report_that_cannot_be_written_is_told_before_the_load() {
    let api = Api::start();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for report in [path(""), path("absent/report.html")] {
        let output = run(
            &["load", "--host", &api.url(), "--report", &report],
            None,
            None,
        );
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        let expected = format!("waypost: --report {report}: ");
        assert!(told.starts_with(&expected), "{told}");
    }
    assert_eq!(api.count(), 0, "nothing was POSTed");
    // An earlier report stays until there is a new one.
    let report = path("report.html");
    std::fs::write(&report, "x".repeat(1 << 20)).unwrap();
    let output = run(
        &["load", "--host", "ftp://nobody", "--report", &report],
        None,
        None,
    );
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(std::fs::metadata(&report).unwrap().len(), 1 << 20);
    let output = run(
        &["load", "--host", &api.url(), "--report", &report],
        None,
        None,
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.starts_with("<!") && !page.contains("xxx"), "{page}");
}
