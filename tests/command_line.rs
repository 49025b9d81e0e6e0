//! The commands that ask a running node, and what all commands share: their errors, and what is
//! made from the definition of the command line.

use std::process::Command;

use serde_json::Value;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    process::waypost,
    traffic,
};

#[actix_rt::test]
async fn the_status_of_a_node_is_one_screen_with_its_ledger_lanes_and_apis() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (key, record) in traffic().into_iter().take(3).enumerate() {
        node.post("/", &key.to_string(), record).await.unwrap();
    }
    node.all_ended(3, PATIENCE).await;
    let admin = &*format!("http://127.0.0.1:{}/", node.admin);
    let (status, page, told) = waypost(&["status", "--admin", admin]).await;
    assert_eq!((status, &*told), (Some(0), ""));
    for wanted in [
        "3 accepted                3 delivered",
        "3 in all                  3 in all",
        "It balances",
        "grpc      up          100 %          3          3          0",
        "default: up for",
    ] {
        assert!(page.contains(wanted), "{wanted}:\n{page}");
    }
    for line in page.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let (_, json, _) = waypost(&["status", "--json", "--admin", admin]).await;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["ledger"]["delivered"], 3, "{json}");
}

#[actix_rt::test]
async fn lanes_are_listed_and_take_orders_from_the_command_line() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    let lane = async |arguments: &[&str]| {
        waypost(&[&["lane", "--admin", admin], arguments].concat()).await
    };
    let (status, table, told) = lane(&["pause", "grpc"]).await;
    assert_eq!((status, &*told), (Some(0), ""));
    assert!(table.contains("pause by 127.0.0.1"), "{table}");
    node.lane_is("grpc", "paused", PATIENCE).await;
    assert_eq!(lane(&["resume", "--all"]).await.0, Some(0));
    node.lane_is("grpc", "up", PATIENCE).await;
    assert_eq!(lane(&["drain", "grpc"]).await.0, Some(0));
    let (_, table, _) = lane(&["list"]).await;
    assert!(table.contains("grpc      drained "), "{table}");
    assert_eq!(lane(&["resume", "grpc"]).await.0, Some(0));
    assert_eq!(lane(&["weight", "grpc=7"]).await.0, Some(0));
    assert_eq!(node.lane("grpc").await["weight"], 7);
    assert_eq!(lane(&["weight", "--all", "2"]).await.0, Some(0));
    assert_eq!(node.lane("grpc").await["weight"], 2);
    let (status, json, _) = lane(&["restart", "grpc", "--json"]).await;
    assert_eq!(status, Some(0));
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json[0]["ordered"]["action"], "restart", "{json}");

    // A lane that the node does not have: the others get their order.
    let (status, table, told) = lane(&["pause", "nats", "grpc"]).await;
    assert_eq!(status, Some(1), "{table}{told}");
    let expected = format!("waypost: --admin {admin}: This node has no lane nats; it has grpc\n");
    assert_eq!(told, expected);
    node.lane_is("grpc", "paused", PATIENCE).await;
    let (status, _, told) = lane(&["list", "nats"]).await;
    assert_eq!(
        (status, &*told),
        (Some(1), "waypost: this node has no lane nats\n")
    );
    for wrong in [
        &["pause"][..],
        &["pause", "carrier-pigeon"],
        &["pause", "grpc", "--all"],
        &["weight"],
        &["weight", "grpc"],
        &["weight", "grpc=1001"],
        &["weight", "pigeon=1"],
        &["weight", "grpc=1", "grpc=2"],
    ] {
        assert_eq!(lane(wrong).await.0, Some(2), "{wrong:?}");
    }
}

#[actix_rt::test]
async fn dead_letters_are_listed_with_time_lane_and_reason() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["a", "a-much-longer-key"] {
        node.post("/", key, traffic()[0].clone()).await.unwrap();
    }
    eventually("two dead letters", PATIENCE, async || {
        (node.dead().await.len() == 2).then_some(())
    })
    .await;
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    let (_, table, _) = waypost(&["dead", "list", "--admin", admin]).await;
    let rows: Vec<Vec<_>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["id", "dead", "since", "lane", "tries", "reason"]);
    let mut ids: Vec<_> = rows[1..3].iter().map(|row| row[0]).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["a", "a-much-longer-key"], "{table}");
    for row in &rows[1..3] {
        assert!(humantime::parse_rfc3339(row[1]).is_ok(), "{table}");
        assert_eq!((row[2], row[3], row[4]), ("grpc", "1", "422"), "{table}");
    }
    let (_, table, _) = waypost(&["dead", "list", "--limit", "1", "--admin", admin]).await;
    assert!(table.contains("1 of 2 dead letters shown"), "{table}");
}

#[actix_rt::test]
async fn no_command_waits_for_ever_for_a_node_that_hangs() {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let admin = &*format!("http://127.0.0.1:{}", node.admin);
    node.signal("STOP");
    for (arguments, is_order) in [
        (&["status"][..], false),
        (&["lane", "list"], false),
        (&["lane", "pause", "grpc"], true),
        (&["lane", "resume", "--all"], true),
        (&["lane", "weight", "grpc=2"], true),
        (&["dead", "list"], false),
        (&["dead", "list", "a"], false),
        (&["dead", "drop", "a"], true),
        (&["dead", "replay", "--all", "--yes"], false),
    ] {
        let arguments = [arguments, &["--timeout", "200ms", "--admin", admin]].concat();
        let (status, printed, told) = waypost(&arguments).await;
        assert_eq!((status, &*printed), (Some(1), ""), "{arguments:?}: {told}");
        let order = if is_order {
            "; the order may be carried out all the same"
        } else {
            ""
        };
        let expected = format!("waypost: --admin {admin}: no answer within 200ms{order}\n");
        assert_eq!(told, expected, "{arguments:?}");
    }
    node.signal("CONT");
    assert_eq!(waypost(&["status", "--admin", admin]).await.0, Some(0));
    let (status, ..) = waypost(&["status", "--timeout", "0s"]).await;
    assert_eq!(status, Some(2));
}

#[actix_rt::test]
async fn each_error_is_a_plain_line_that_names_the_flag_or_the_key() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = &*taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (folder, file) = (folder.path().to_str().unwrap(), file.to_str().unwrap());
    let any = "127.0.0.1:0";
    for (arguments, status, told) in [
        (
            &["run", "--listen", taken, "--admin", any, "--data", folder][..],
            1,
            "ingest.listen: ",
        ),
        (
            &["run", "--listen", any, "--admin", taken, "--data", folder],
            1,
            "admin.listen: ",
        ),
        (
            &["run", "--listen", any, "--admin", any, "--data", file],
            1,
            "spool.dir: ",
        ),
        (&["sink", "--listen", taken], 1, "--listen "),
        (&["status", "--admin", "ftp://node"], 2, "--admin: "),
        (
            &["status", "--admin", "http://127.0.0.1:9"],
            1,
            "--admin http://127.0.0.1:9: ",
        ),
        (&["load", "--host", "node"], 2, "--host: "),
        (&["load", "--paint"], 2, "'--paint'"),
        (&["check", "--explain", "/absent"], 2, "--explain /absent: "),
        (
            &["check", "--simulate", "/absent"],
            2,
            "--simulate /absent: ",
        ),
        (&["man", "nothing"], 2, "COMMAND: "),
    ] {
        let (code, printed, error) = waypost(arguments).await;
        assert_eq!(
            (code, &*printed),
            (Some(status), ""),
            "{arguments:?}: {error}"
        );
        let first = error.lines().next().unwrap_or_default();
        let is_plain = first.starts_with("waypost: ") && first.contains(told);
        assert!(is_plain, "{arguments:?}: {error}");
        // A mistake in the command line has a tip and the usage as well.
        assert!(
            error.lines().count() == 1 || status == 2,
            "{arguments:?}: {error}"
        );
    }
}

#[actix_rt::test]
async fn the_program_tells_its_version_and_makes_completions_and_pages() {
    let (status, text, _) = waypost(&["--version"]).await;
    assert_eq!(status, Some(0));
    assert_eq!(text, concat!("waypost ", env!("CARGO_PKG_VERSION"), "\n"));
    let (_, json, _) = waypost(&["--version", "--json"]).await;
    let build: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(build["version"], env!("CARGO_PKG_VERSION"), "{json}");
    assert!(build["commit"].is_null() || build["commit"].is_string());
    assert_eq!(build["features"], serde_json::json!(["failpoints"]));

    // Bash itself completes with it.
    let (_, script, _) = waypost(&["completions", "bash"]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("waypost.bash");
    std::fs::write(&file, script).unwrap();
    let ask = "source \"$0\"; COMP_WORDS=(waypost lane pa); COMP_CWORD=2; \
               _waypost waypost pa lane; echo \"${COMPREPLY[@]}\"";
    let completed = Command::new("bash")
        .args(["-c", ask])
        .arg(&file)
        .output()
        .expect("bash runs");
    let found = String::from_utf8_lossy(&completed.stdout);
    assert_eq!(found.trim(), "pause", "{completed:?}");

    let (_, page, _) = waypost(&["man", "dead", "list"]).await;
    assert!(page.contains(".TH waypost-dead-list"), "{page}");
}
