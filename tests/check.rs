//! `waypost check`, as users run it.

use std::process::{Command, Output};

/// Runs `waypost check` in the folder of the tests, with no variables of ours but `environment`.
fn check(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_waypost"))
        .arg("check")
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config"))
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("the program runs")
}

fn mistakes(arguments: &[&str], environment: &[(&str, &str)]) -> Vec<String> {
    let output = check(arguments, environment);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty(), "no configuration is printed");
    String::from_utf8(output.stderr).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn each_mistake_is_named_by_file_line_and_key_with_what_is_allowed() {
    let expected = [
        r#"mistakes.toml:4: ingest.listen: "localhost" does not fit; allowed is an IP address and a port, as in "127.0.0.1:8000""#,
        r#"mistakes.toml:6: ingest.schema: "cases" does not fit; allowed is "case" or "any""#,
        r#"mistakes.toml:10: api.timeout: "fast" does not fit; allowed is a duration over zero, as in "250ms", "10s" or "24h""#,
        r#"mistakes.toml:11: api.concurrency: "0" does not fit; allowed is a whole number from 1 to 4096"#,
        "mistakes.toml:12: api.time_out: there is no such key; did you mean api.timeout?",
        r#"mistakes.toml:15: router.policy: "adaptive" does not fit; allowed is "round-robin""#,
        "mistakes.toml:23: lanes.rabbitmq.queue: is a list; allowed is a text that is not empty",
        "mistakes.toml:25: lanes.kafka: there is no such section; allowed are ingest, api, router, lanes.grpc, lanes.nats, lanes.rabbitmq, lanes.pubsub, spool, admin, telemetry",
        "mistakes.toml:5: ingest.max_record: is over ingest.max_body; a record must fit into a request",
        "mistakes.toml:9: api.url: is not a URL that can be posted to; allowed is http:// or https:// with a host",
        "mistakes.toml:18: lanes.nats.url: is not a list of servers; allowed is nats:// or tls://, separated by commas",
        "mistakes.toml:22: lanes.rabbitmq.tag: is another lane's tag too; allowed is one of its own",
        "mistakes.toml:29: admin.listen: is the address of another listener; allowed is a free one",
    ];
    assert_eq!(mistakes(&["--config", "mistakes.toml"], &[]), expected);
}

#[test]
fn a_mistake_in_a_variable_or_a_flag_is_named_by_it() {
    assert_eq!(
        mistakes(&["--listen", "here"], &[("WAYPOST_API__TIMEOUT", "0s"), ("WAYPOST_LANES__NAT__URL", "x")]),
        [
            r#"WAYPOST_API__TIMEOUT: api.timeout: "0s" does not fit; allowed is a duration over zero, as in "250ms", "10s" or "24h""#,
            "WAYPOST_LANES__NAT__URL: there is no such variable; did you mean WAYPOST_LANES__NATS__URL?",
            r#"--listen: ingest.listen: "here" does not fit; allowed is an IP address and a port, as in "127.0.0.1:8000""#,
        ]
    );
    let missing = mistakes(&["--config", "absent.toml"], &[]);
    assert!(missing[0].starts_with("absent.toml: cannot be read: "), "{missing:?}");
}

#[test]
fn toml_that_does_not_parse_is_named_by_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broken.toml");
    std::fs::write(&file, "[api]\nurl = \n").unwrap();
    let path = file.to_str().unwrap();
    let found = mistakes(&["--config", path], &[]);
    assert!(found[0].starts_with(&format!("{path}:2: not TOML: ")), "{found:?}");
}

#[test]
fn the_effective_configuration_is_printed_masked_and_loads_to_itself() {
    let environment = [
        ("WAYPOST_LANES__RABBITMQ__URL", "amqps://user:secret@rabbit:5671/%2f"),
        ("WAYPOST_LANES__NATS__URL", "nats://token@nats:4222"),
        ("WAYPOST_LANES__GRPC__PEERS", "http://a:3000, http://b:3000"),
        ("WAYPOST_LANES__PUBSUB__PROJECT", "my-project"),
        ("PUBSUB_EMULATOR_HOST", "127.0.0.1:8085"),
    ];
    let output = check(&["--api", "https://api.test/in"], &environment);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(!printed.contains("secret") && !printed.contains("token@"), "{printed}");
    for line in [
        r#"url = "amqps://user:***@rabbit:5671/%2f""#,
        r#"url = "nats://***@nats:4222""#,
        r#"url = "https://api.test/in""#,
        r#"peers = ["http://a:3000", "http://b:3000"]"#,
        r#"endpoint = "127.0.0.1:8085""#,
        r#"max_record = "256KiB""#,
        "concurrency = 64",
    ] {
        assert!(printed.lines().any(|found| found == line), "no {line} in\n{printed}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("effective.toml");
    std::fs::write(&file, &printed).unwrap();
    let again = check(&["--config", file.to_str().unwrap()], &[]);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), printed);
}

#[test]
fn flags_override_the_environment_which_overrides_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("node.toml");
    std::fs::write(&file, "[api]\nurl = \"http://file/\"\ntimeout = \"1s\"\nconcurrency = 3\n").unwrap();
    let environment = [("WAYPOST_API__URL", "http://variable/"), ("WAYPOST_API__TIMEOUT", "2s")];
    let output = check(&["--config", file.to_str().unwrap(), "--api", "http://flag/"], &environment);
    let printed = String::from_utf8(output.stdout).unwrap();
    for line in [r#"url = "http://flag/""#, r#"timeout = "2s""#, "concurrency = 3"] {
        assert!(printed.lines().any(|found| found == line), "no {line} in\n{printed}");
    }
    // No lane is named, so the one that needs nothing is on, alone.
    assert!(printed.contains("[lanes.grpc]") && !printed.contains("[lanes.nats]"), "{printed}");
}

/// The contract's own example holds the defaults of every key.
#[test]
fn every_default_of_the_contract_is_allowed() {
    let defaults = r#"
[ingest]
listen = "0.0.0.0:8000"
max_body = "1MiB"
max_record = "256KiB"
schema = "case"
ack = "lane"
[api]
url = "http://127.0.0.1:5000/"
timeout = "10s"
concurrency = 64
batch = 1
give_up_after = "24h"
[router]
policy = "round-robin"
publish_timeout = "2s"
[lanes.nats]
url = "nats://127.0.0.1:4222"
stream = "WAYPOST"
subject = "waypost.records"
durable = "waypost"
tag = "NATS"
weight = 1
[lanes.rabbitmq]
url = "amqp://guest:guest@127.0.0.1:5672/%2f"
queue = "waypost"
[lanes.pubsub]
project = "waypost"
topic = "waypost-records"
subscription = "waypost-records"
[lanes.grpc]
listen = "127.0.0.1:3000"
[spool]
dir = "data"
max = "4GiB"
[admin]
listen = "127.0.0.1:8001"
[telemetry]
"#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("defaults.toml");
    std::fs::write(&file, defaults).unwrap();
    let output = check(&["--config", file.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn connect_tries_each_lane_and_the_api() {
    let grpc = format!("127.0.0.1:{}", crate::support::process::free_port());
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let api = crate::support::api::Api::start();
    let output = check(&["--connect", "--api", &api.url()], &[("WAYPOST_LANES__GRPC__LISTEN", &grpc)]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(told.contains("lanes.grpc: ok") && told.contains("api: ok"), "{told}");
    let output = check(&["--connect", "--api", &api.url()], &[("WAYPOST_LANES__NATS__URL", &nobody)]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("lanes.nats: cannot connect"), "{told}");
}
