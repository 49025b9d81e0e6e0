//! `waypost check`, as users run it.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output},
};

use waypost::{
    config::{Config, ConfigError, Flag},
    lane_id::LaneId,
};

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
    String::from_utf8(output.stderr)
        .expect("text")
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_mistake_is_named_by_file_line_and_key_with_what_is_allowed() {
    let expected = [
        r#"mistakes.toml:4: ingest.listen: "localhost" does not fit; allowed is an IP address and a port, as in "127.0.0.1:8000""#,
        r#"mistakes.toml:6: ingest.schema: "cases" cannot be read: No such file or directory (os error 2); allowed is "case", "any" or the path of a JSON Schema file"#,
        r#"mistakes.toml:10: api.timeout: "fast" does not fit; allowed is a duration over zero, as in "250ms", "10s" or "24h""#,
        r#"mistakes.toml:11: api.concurrency: "0" does not fit; allowed is a whole number from 1 to 4096"#,
        "mistakes.toml:12: api.time_out: there is no such key; did you mean api.timeout?",
        r#"mistakes.toml:15: router.policy: "fastest" does not fit; allowed is "round-robin" or "weighted" or "failover" or "hash" or "adaptive" or "broadcast""#,
        "mistakes.toml:23: lanes.rabbitmq.queue: is a list; allowed is a text that is not empty",
        "mistakes.toml:25: lanes.kafka: there is no such section; allowed are admin, api, apis.NAME, ingest, lanes.grpc, lanes.nats, lanes.pubsub, lanes.rabbitmq, router, routes, spool, telemetry",
        "mistakes.toml:5: ingest.max_record: is over ingest.max_body; a record must fit into a request",
        "mistakes.toml:9: api.url: is not a URL that can be posted to; allowed is http:// or https:// with a host",
        "mistakes.toml:18: lanes.nats.url: is not a list of servers; allowed is nats:// or tls:// with a host, separated by commas",
        "mistakes.toml:22: lanes.rabbitmq.tag: is the tag of lanes.nats too; allowed is one of its own",
        "mistakes.toml:29: lanes.grpc.listen: is taken by admin.listen, 127.0.0.1:8001; allowed is an address and port of its own",
    ];
    assert_eq!(mistakes(&["--config", "mistakes.toml"], &[]), expected);
}

#[test]
fn a_mistake_is_one_line_and_shows_no_secret_whatever_is_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("odd.toml");
    let text = [
        "[ingest]",
        r#"listen = "nats://me:hunter2@localhost""#,
        r#"schema = "a\nb""#,
        r#"tokens_file = "hunter2hunter2hunter2hunter2""#,
        r#""a\nb" = 1"#,
        "[[routes]]",
        r#"policy = "fast\u001b[2Jest\n""#,
        "lanes = [\"a\\r\"]",
    ];
    fs::write(&file, text.join("\n")).expect("room");
    let file = file.to_str().expect("a plain path");
    let variables = [
        ("WAYPOST_API__RATE", "https://me:hunter2@a/\n"),
        ("WAYPOST_LANES__NATS__MONITOR", "https://me:hunter2@a/"),
        ("WAYPOST_ADMIN__HOSTS", "me:hunter2@a"),
    ];
    let told = mistakes(&["--config", file], &variables);
    assert_eq!(told.len(), 9, "{told:?}");
    for line in &told {
        let is_ours = line.starts_with(file) || line.starts_with("WAYPOST_");
        assert!(is_ours && !line.contains("hunter2"), "{line:?}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

/// More could never be taken: a node has no more in hand, and no room for it on disk.
#[test]
fn bodies_and_records_have_a_largest_size() {
    for (key, most, over) in [
        ("MAX_BODY", "64MiB", "65MiB"),
        ("MAX_RECORD", "15MiB", "16MiB"),
    ] {
        let name = format!("WAYPOST_INGEST__{key}");
        let lines = mistakes(
            &[],
            &[(name.as_str(), over), ("WAYPOST_LANES__PUBSUB__TAG", "T")],
        );
        let allowed = format!("a size from \"1B\" to \"{most}\"");
        assert!(
            lines.iter().any(|line| line.contains(&allowed)),
            "{lines:?}"
        );
    }
    let largest = [
        ("WAYPOST_INGEST__MAX_BODY", "64MiB"),
        ("WAYPOST_INGEST__MAX_RECORD", "15MiB"),
        ("WAYPOST_LANES__RABBITMQ__TAG", "T"),
    ];
    assert_eq!(check(&[], &largest).status.code(), Some(0));
}

#[test]
fn each_fault_of_a_schema_is_named_by_its_file_line_and_pointer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("record.schema.json");
    let schema = "{\n\"type\": \"object\",\n\"properties\": {\n\"age\": {\"maximum\": \"150\"},\n\
                  \"name\": {\"minLength\": -1}\n}\n}";
    fs::write(&path, schema).expect("the folder is ours");
    let path = path.to_str().expect("a plain path");
    let lines = mistakes(&[], &[("WAYPOST_INGEST__SCHEMA", path)]);
    let [line] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert!(
        line.starts_with("WAYPOST_INGEST__SCHEMA: ingest.schema: "),
        "{line}"
    );
    for fault in [
        "4: /properties/age/maximum: \"150\"",
        "5: /properties/name/minLength: -1",
    ] {
        assert!(line.contains(&format!("{path}:{fault}")), "{line}");
    }
    assert!(line.ends_with("the path of a JSON Schema file"), "{line}");
}

#[test]
fn a_host_of_the_admin_side_is_a_name_without_a_port() {
    for wrong in ["a:80", "http://a", "*", ".", "a..b", "a, b c"] {
        let lines = mistakes(&[], &[("WAYPOST_ADMIN__HOSTS", wrong)]);
        let [line] = &lines[..] else {
            panic!("{wrong}: {lines:?}");
        };
        assert!(line.contains("admin.hosts: "), "{line}");
        assert!(
            line.contains("allowed are host names without a port"),
            "{line}"
        );
    }
    let output = check(
        &[],
        &[("WAYPOST_ADMIN__HOSTS", "waypost.example.com, .internal")],
    );
    let printed = String::from_utf8(output.stdout).expect("text");
    assert!(
        printed.contains(r#"hosts = ["waypost.example.com", ".internal"]"#),
        "{printed}"
    );
}

#[test]
fn the_limits_of_clients_are_checked() {
    for (variable, wrong, why) in [
        (
            "WAYPOST_INGEST__RATE",
            "500",
            r#"ingest.rate: "500" does not fit; allowed is a number from 1 to 1000000 for each second, minute or hour, as in "500/s", "30/m" or "100/h""#,
        ),
        (
            "WAYPOST_INGEST__MAX_HEADERS",
            "97",
            r#"ingest.max_headers: "97" does not fit; allowed is a whole number from 1 to 96"#,
        ),
    ] {
        assert_eq!(
            mistakes(&[], &[(variable, wrong)]),
            [format!("{variable}: {why}")]
        );
    }
    let origins = "WAYPOST_INGEST__CORS_ORIGINS";
    for wrong in [
        "*",
        "null",
        "a.com",
        "https://a.com/",
        "HTTPS://a.com",
        "https://a.com:443",
        "ftp://a",
    ] {
        let lines = mistakes(&[], &[(origins, wrong)]);
        let [line] = &lines[..] else {
            panic!("{wrong}: {lines:?}");
        };
        assert!(
            line.contains("allowed are origins in small letters"),
            "{line}"
        );
    }
    let output = check(&[], &[(origins, "https://a.com, http://localhost:3000")]);
    let printed = String::from_utf8(output.stdout).expect("text");
    let shown = r#"cors_origins = ["https://a.com", "http://localhost:3000"]"#;
    assert!(printed.contains(shown), "{printed}");
}

#[test]
fn a_rate_and_the_statuses_that_are_retried_are_checked_and_shown() {
    for (variable, wrong, why) in [
        (
            "WAYPOST_API__RATE",
            "500",
            r#"api.rate: "500" does not fit; allowed is a number from 1 to 1000000 for each second, minute or hour, as in "500/s", "30/m" or "100/h""#,
        ),
        (
            "WAYPOST_API__RETRY_STATUSES",
            "204",
            r#"api.retry_statuses: "204" does not fit; allowed are statuses from 300 to 599 and "5xx", as in [408, 425, 429, "5xx"]"#,
        ),
        (
            "WAYPOST_API__RETRY_STATUSES",
            "5xx,401",
            "api.retry_statuses: 401 may mean a wrong token or path, which has rules of its own; leave it out",
        ),
    ] {
        let expected = format!("{variable}: {why}");
        assert_eq!(mistakes(&[], &[(variable, wrong)]), [expected]);
    }
    let output = check(
        &[],
        &[
            ("WAYPOST_API__RATE", "30/m"),
            ("WAYPOST_API__RETRY_STATUSES", "409, 429, 503"),
        ],
    );
    let told = String::from_utf8(output.stderr).expect("text");
    assert_eq!(told, "");
    let printed = String::from_utf8(output.stdout).expect("text");
    for line in ["rate = \"30/m\"", "retry_statuses = [409, 429, 503]"] {
        assert!(printed.lines().any(|found| found == line), "{printed}");
    }
    let output = check(&[], &[("WAYPOST_API__RETRY_STATUSES", "409, 503")]);
    let told = String::from_utf8(output.stderr).expect("text");
    assert!(
        told.contains("WAYPOST_API__RETRY_STATUSES: api.retry_statuses: has no 429"),
        "{told}"
    );
    assert!(!told.contains("503"), "{told}");
}

#[test]
fn lanes_unknown_keys_and_keys_at_odds_are_named_too_and_no_secret_is() {
    let why = std::fs::File::open("tests/config/absent").expect_err("it is not there");
    let absent = format!(
        r#"lanes.toml:12: api.token_file: "absent" cannot be read: {why}; allowed is the path of a file that can be read"#
    );
    let expected = [
        r#"lanes.toml:6: ingest.ack: "broker" does not fit; allowed is "durable" or "lane" or "disk""#,
        "lanes.toml:7: ingest.token_file: there is no such key; did you mean ingest.tokens_file?",
        "lanes.toml:8: ingest.bind: there is no such key; allowed are ack, body_timeout, client_ca_file, cors_origins, header_timeout, keep_alive, key_window, listen, max_body, max_connections, max_depth, max_headers, max_members, max_record, min_body_rate, numbers, rate, require_key, schema, signing_keys_file, tls_cert_file, tls_key_file, tokens_file",
        absent.as_str(),
        r#"lanes.toml:13: api.ca_file: "." cannot be read: it is a folder; allowed is the path of a file that can be read"#,
        r#"lanes.toml:14: api.timeout: "10" does not fit; allowed is a duration over zero, as in "250ms", "10s" or "24h""#,
        r#"lanes.toml:15: api.batch: "0" does not fit; allowed is a whole number from 1 to 1000"#,
        r#"lanes.toml:28: lanes.grpc.weight: "1001" does not fit; allowed is a whole number from 0 to 1000"#,
        "lanes.toml:32: lanes.rabbitmq.queue: is of type integer; allowed is a text that is not empty",
        r#"lanes.toml:33: lanes.rabbitmq.bundle: "129" does not fit; allowed is a whole number from 1 to 128"#,
        "lanes.toml:39: lanes.pubsub.project: is empty; allowed is a text that is not empty",
        "lanes.toml:41: tracing: there is no such section; allowed are admin, api, apis.NAME, ingest, lanes.grpc, lanes.nats, lanes.pubsub, lanes.rabbitmq, router, routes, spool, telemetry",
        "lanes.toml:5: ingest.max_body: is under ingest.max_record; a record must fit into a request",
        "lanes.toml:45: telemetry.otlp: is no collector; allowed is http:// or https:// with a host",
        "lanes.toml:11: api.url: has a login, which is never sent; allowed is a token, in token_file",
        r#"lanes.toml:27: lanes.grpc.peers: "b:3000" is no node; allowed is http:// or https:// with a host and without a login"#,
        r#"lanes.toml:27: lanes.grpc.peers: "https://user:***@c/" is no node; allowed is http:// or https:// with a host and without a login"#,
        "lanes.toml:18: lanes.nats.url: is not a list of servers; allowed is nats:// or tls:// with a host, separated by commas",
        "lanes.toml:19: lanes.nats.subject: is no subject; allowed are letters, digits, - and _, joined by dots",
        "lanes.toml:20: lanes.nats.cert_file: needs key_file beside it; allowed are both or none",
        "lanes.toml:23: lanes.nats.token_file: is a second way to log in, beside creds_file; allowed is one",
        "lanes.toml:31: lanes.rabbitmq.url: is not a broker; allowed is amqp:// or amqps:// with a host",
        "lanes.toml:36: lanes.pubsub.topic: is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, beginning with a letter but not with goog",
        "lanes.toml:37: lanes.pubsub.subscription: is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, beginning with a letter but not with goog",
        "lanes.toml:38: lanes.pubsub.endpoint: is not where Pub/Sub can be; allowed is host:port, or http:// or https:// with a host",
        "lanes.toml:21: lanes.nats.tag: is the tag of lanes.grpc too; allowed is one of its own",
        "lanes.toml:26: lanes.grpc.listen: is taken by ingest.listen, 127.0.0.1:3000; allowed is an address and port of its own",
    ];
    assert_eq!(mistakes(&["--config", "lanes.toml"], &[]), expected);
}

#[test]
fn a_mistake_in_a_variable_or_a_flag_is_named_by_it() {
    assert_eq!(
        mistakes(
            &["--listen", "here"],
            &[
                ("WAYPOST_API__TIMEOUT", "0s"),
                ("WAYPOST_LANES__NAT__URL", "x")
            ]
        ),
        [
            r#"WAYPOST_API__TIMEOUT: api.timeout: "0s" does not fit; allowed is a duration over zero, as in "250ms", "10s" or "24h""#,
            "WAYPOST_LANES__NAT__URL: there is no such variable; did you mean WAYPOST_LANES__NATS__URL?",
            r#"--listen: ingest.listen: "here" does not fit; allowed is an IP address and a port, as in "127.0.0.1:8000""#,
        ]
    );
    assert_eq!(
        mistakes(
            &["--admin", "127.0.0.1:3000"],
            &[
                ("PUBSUB_EMULATOR_HOST", "ftp://a"),
                ("WAYPOST_LANES__PUBSUB__TAG", "GRPC"),
                ("WAYPOST_LANES__GRPC__PEERS", "http://b:3000")
            ]
        ),
        [
            "PUBSUB_EMULATOR_HOST: lanes.pubsub.endpoint: is not where Pub/Sub can be; allowed is host:port, or http:// or https:// with a host",
            "WAYPOST_LANES__PUBSUB__TAG: lanes.pubsub.tag: is the tag of lanes.grpc too; allowed is one of its own",
            "--admin: admin.listen: is taken by lanes.grpc.listen, 127.0.0.1:3000; allowed is an address and port of its own",
        ]
    );
    let missing = mistakes(&["--config", "absent.toml"], &[]);
    assert!(
        missing[0].starts_with("absent.toml: cannot be read: "),
        "{missing:?}"
    );
}

#[test]
fn a_variable_of_another_program_is_ignored_and_a_near_miss_of_ours_is_told() {
    let address = "10.0.0.1";
    let url = "tcp://10.0.0.1:80";
    for (name, value) in [
        ("WAYPOST", "x"),
        ("WAYPOST_VERSION", "x"),
        ("WAYPOST_PORT", url),
        ("WAYPOST_SERVICE_HOST", address),
        ("WAYPOST_SERVICE_HOST", "fd00::1"),
        ("WAYPOST_SERVICE_PORT", "80"),
        ("WAYPOST_SERVICE_PORT_HTTP", "80"),
        ("WAYPOST_PORT_8000_TCP", url),
        ("WAYPOST_PORT_8000_TCP_PROTO", "tcp"),
        ("WAYPOST_PORT_8000_TCP_PORT", "8000"),
        ("WAYPOST_PORT_8000_TCP_ADDR", address),
        ("WAYPOST_NATS_PORT_4222_TCP", url),
        ("WAYPOST_API_SERVICE_HOST", address),
        ("WAYPOST_API_PORT_80_UDP_ADDR", "fd00::1"),
        // A Service's name may have two dashes in a row.
        ("WAYPOST__NATS_SERVICE_HOST", address),
        ("WAYPOST_API__V1_SERVICE_PORT", "80"),
        ("WAYPOST_API__V1_SERVICE_PORT_HTTP_2", "80"),
        ("WAYPOST_API__V1_PORT", "tcp://[fd00::1]:80"),
        ("WAYPOST_API__V1_PORT_80_SCTP", "sctp://10.0.0.1:80"),
        ("API__URL", "x"),
    ] {
        let output = check(&[], &[(name, value)]);
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
        assert!(output.stderr.is_empty(), "{name}: {output:?}");
    }
    for (name, meant) in [
        ("WAYPOST_API_URL", "WAYPOST_API__URL"),
        ("WAYPOST_SPOOL_DIR", "WAYPOST_SPOOL__DIR"),
        ("WAYPOST_LANES_NATS_URL", "WAYPOST_LANES__NATS__URL"),
        ("WAYPOST_SPOL_DIR", "WAYPOST_SPOOL__DIR"),
        ("WAYPOST_PUBLISH_TIMEOUT", ""),
        ("waypost_api__url", "WAYPOST_API__URL"),
        ("Waypost_Api_Batch", "WAYPOST_API__BATCH"),
    ] {
        let output = check(&[], &[(name, "7")]);
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        let is_told = told.contains(name) && told.contains(&format!("did you mean {meant}?"));
        assert_eq!(is_told, !meant.is_empty(), "{name}: {told}");
    }
    // One that can only be ours is a mistake, as a key of the file is.
    for (name, meant) in [
        ("WAYPOST_LANE__NATS__URL", "WAYPOST_LANES__NATS__URL"),
        ("WAYPOST_SPOL__DIR", "WAYPOST_SPOOL__DIR"),
        ("WAYPOST_LANES__NATS_URL", "WAYPOST_LANES__NATS__URL"),
    ] {
        let expected = format!("{name}: there is no such variable; did you mean {meant}?");
        assert_eq!(mistakes(&[], &[(name, "x")]), [expected]);
    }
    // Nor is it Kubernetes' with a value that Kubernetes does not write.
    for (name, value) in [
        ("WAYPOST_INGEST__PORT", "8000"),
        ("WAYPOST_LANES__GRPC__LISTEN_PORT", "3000"),
        ("WAYPOST_LANES__NATS__SERVICE_HOST", "nats.example"),
        ("WAYPOST_API__SERVICE_PORT", "http"),
        ("WAYPOST_API__PORT_80_TCP", "10.0.0.1:80"),
        ("WAYPOST_API__PORT_80_TCP_ADDR", "api.example"),
    ] {
        let mistakes = mistakes(&[], &[(name, value)]);
        let expected = format!("{name}: there is no such variable; ");
        let [mistake] = &mistakes[..] else {
            panic!("{name}: {mistakes:?}");
        };
        assert!(mistake.starts_with(&expected), "{mistake}");
    }
}

#[test]
fn a_start_and_a_check_refuse_https_to_an_ipv6_address_in_the_same_words() {
    let url = "https://[::1]/";
    let expected = [
        "--api: api.url: is HTTPS to an IPv6 address, which is not supported; allowed is a host name",
    ];
    assert_eq!(mistakes(&["--api", url], &[]), expected);
    let started = Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["run", "--api", url])
        .env_clear()
        .output()
        .expect("the program runs");
    assert_eq!(started.status.code(), Some(2), "{started:?}");
    let told = String::from_utf8(started.stderr).expect("text");
    assert_eq!(told.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn toml_that_does_not_parse_is_named_by_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broken.toml");
    std::fs::write(&file, "[api]\nurl = \n").unwrap();
    let path = file.to_str().unwrap();
    let found = mistakes(&["--config", path], &[]);
    assert!(
        found[0].starts_with(&format!("{path}:2: not TOML: ")),
        "{found:?}"
    );
    assert_eq!(
        found.len(),
        1,
        "nothing is guessed about a line that does not parse: {found:?}"
    );
}

fn load(
    toml: &str,
    environment: &[(&str, &str)],
    flags: &[Flag],
) -> Result<Config, Vec<ConfigError>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("waypost.toml");
    std::fs::write(&file, toml).unwrap();
    let environment = environment
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()))
        .collect();
    Config::load(Some(&file), &environment, flags)
}

#[test]
fn what_is_printed_loads_to_the_same_configuration_with_its_lanes_in_order() {
    let toml = r#"
        [ingest]
        listen = "[::1]:8000"
        max_body = "1500B"
        max_record = 0x400
        schema = "any"
        [api]
        url = "https://api.test/in?x=1"
        timeout = "1h 30m 250ms"
        concurrency = 0x10
        [lanes.rabbitmq]
        queue = "a \"quoted\" queue"
        url = "amqp://rabbit"
        [lanes.nats]
        url = "nats://n1, tls://n2:4333"
        replicas = 3
        tag = "NATS\n2"
        [lanes.grpc]
        peers = ["http://b:3000", "https://[::1]:3000"]
        [spool]
        max = "5GiB"
        dir = "C:\\data"
    "#;
    let config = load(toml, &[("WAYPOST_LANES__PUBSUB__TOPIC", "topic-1")], &[]).unwrap();
    assert_eq!(
        config.lanes.order,
        [LaneId::Rabbitmq, LaneId::Nats, LaneId::Grpc, LaneId::Pubsub]
    );
    assert_eq!(
        (config.ingest.max_record, config.api.concurrency),
        (1024, 16),
        "hexadecimal is read as such"
    );
    assert_eq!(load(&config.to_toml(), &[], &[]).unwrap(), config);
    assert_eq!(
        Config::load(None, &BTreeMap::new(), &[]).map(|config| config.lanes.order),
        Ok(vec![LaneId::Grpc])
    );
}

#[test]
fn a_url_may_have_its_scheme_in_upper_case_and_a_path_that_is_not_ascii() {
    for toml in [
        "[api]\nurl = \"HTTP://api.test/in\"",
        "[api]\nurl = \"HTTPS://api.test/in\"",
        "[api]\nurl = \"http://api.test/Año/ü?q=ñ\"",
        "[api]\nurl = \"http://bücher.test/\"",
        "[lanes.grpc]\npeers = [\"HTTP://b:3000\"]",
        "[lanes.nats]\nurl = \"NATS://n1, TLS://n2\"",
        "[lanes.rabbitmq]\nurl = \"AMQP://rabbit\"",
        "[lanes.pubsub]\nendpoint = \"HTTP://localhost:8085\"",
    ] {
        assert!(load(toml, &[], &[]).is_ok(), "{toml}");
    }
}

#[test]
fn no_password_of_any_server_is_printed_or_logged() {
    let toml = r#"
        [lanes.nats]
        url = "nats://a:secret1@n1:4222,nats://secret2@n2,nats://c:secret\"3@n3"
        [lanes.rabbitmq]
        url = "amqp://d:secret4@rabbit/%2f"
    "#;
    let config = load(toml, &[], &[]).unwrap();
    let printed = config.to_toml();
    assert!(
        printed.contains(r#"url = "nats://a:***@n1:4222,nats://***@n2,nats://c:***@n3""#),
        "{printed}"
    );
    for shown in [printed, format!("{config:?}")] {
        assert!(!shown.contains("secret"), "{shown}");
    }
}

#[test]
fn the_emulators_variable_is_a_default_and_turns_no_lane_on() {
    let emulator = ("PUBSUB_EMULATOR_HOST", "127.0.0.1:8085");
    let lanes = load("", &[emulator], &[]).unwrap().lanes;
    assert!(lanes.pubsub.is_none() && lanes.grpc.is_some());
    let endpoint = |toml| {
        load(toml, &[emulator], &[])
            .unwrap()
            .lanes
            .pubsub
            .unwrap()
            .endpoint
    };
    assert_eq!(
        endpoint("[lanes.pubsub]").as_deref(),
        Some("127.0.0.1:8085")
    );
    assert_eq!(
        endpoint("[lanes.pubsub]\nendpoint = \"http://other:1\"").as_deref(),
        Some("http://other:1")
    );
}

#[test]
fn listeners_may_share_a_port_on_addresses_that_do_not_meet() {
    let listen = |ingest: &str, admin: &str| {
        let flag = |flag, key, value: &str| Flag {
            flag,
            key,
            value: value.into(),
        };
        let token = concat!(env!("CARGO_MANIFEST_DIR"), "/docker/admin-token");
        let token = ("WAYPOST_ADMIN__TOKEN_FILE".to_owned(), token.to_owned());
        Config::load(
            None,
            &[token].into(),
            &[
                flag("--listen", "ingest.listen", ingest),
                flag("--admin", "admin.listen", admin),
            ],
        )
        .is_ok()
    };
    for (ingest, admin) in [
        ("127.0.0.1:1", "127.0.0.2:1"),
        ("0.0.0.0:0", "0.0.0.0:0"),
        ("0.0.0.0:1", "[::1]:1"),
    ] {
        assert!(listen(ingest, admin), "{ingest} and {admin}");
    }
    for (ingest, admin) in [
        ("127.0.0.1:1", "0.0.0.0:1"),
        ("[::]:1", "127.0.0.1:1"),
        ("[::1]:1", "[::1]:1"),
    ] {
        assert!(!listen(ingest, admin), "{ingest} and {admin}");
    }
}

#[test]
fn each_example_of_the_documentation_loads() {
    let mut examples = 0;
    for page in ["README.md", "docs/configuration.md", "docker/README.md"] {
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        for example in text.split("```toml\n").skip(1) {
            let example = example.split("```").next().unwrap();
            load(example, &[], &[]).unwrap_or_else(|mistakes| panic!("{page}: {mistakes:?}"));
            examples += 1;
        }
    }
    assert!(examples > 0, "there is an example");
}

/// `section.key` of each key, with its default as TOML shows it, or `none`.
fn defaults() -> BTreeMap<String, String> {
    let lanes = "[lanes.grpc]\n[lanes.nats]\n[lanes.rabbitmq]\n[lanes.pubsub]\n";
    let shown: toml::Table = load(lanes, &[], &[]).unwrap().to_toml().parse().unwrap();
    let default = |key: &String| {
        let mut names = key.split('.');
        let section = &shown[names.next().unwrap()];
        let value = names.try_fold(section, |table, name| table.get(name));
        value.map_or_else(|| "none".into(), |value| format!("`{value}`"))
    };
    let keys = Config::keys();
    keys.map(|key| (key.clone(), default(&key))).collect()
}

#[test]
fn the_documentation_has_each_key_with_its_default_and_variable_and_no_other() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let mut section = String::new();
    let mut documented = BTreeMap::new();
    for line in std::fs::read_to_string(page).unwrap().lines() {
        if let Some(heading) = line.strip_prefix("## `[") {
            section = heading.split(']').next().unwrap().to_owned();
        } else if let Some(row) = line.strip_prefix("| `") {
            let cells: Vec<_> = row.split(" | ").collect();
            let [name, default, _, _, variable] = cells[..] else {
                panic!("a row has five cells: {line}");
            };
            let key = format!("{section}.{}", name.trim_end_matches('`'));
            let name = key.replace('.', "__").to_uppercase();
            assert_eq!(variable, format!("`WAYPOST_{name}` |"));
            assert!(
                documented.insert(key, default.to_owned()).is_none(),
                "twice: {line}"
            );
        }
    }
    assert_eq!(documented, defaults());
}

#[test]
fn the_effective_configuration_is_printed_masked_and_loads_to_itself() {
    let environment = [
        (
            "WAYPOST_LANES__RABBITMQ__URL",
            "amqps://user:secret@rabbit:5671/%2f",
        ),
        ("WAYPOST_LANES__NATS__URL", "nats://token@nats:4222"),
        ("WAYPOST_LANES__GRPC__PEERS", "http://a:3000, http://b:3000"),
        ("WAYPOST_LANES__PUBSUB__PROJECT", "my-project"),
        ("PUBSUB_EMULATOR_HOST", "127.0.0.1:8085"),
    ];
    let output = check(&["--api", "https://api.test/in"], &environment);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        !printed.contains("secret") && !printed.contains("token@"),
        "{printed}"
    );
    for line in [
        r#"url = "amqps://user:***@rabbit:5671/%2f""#,
        r#"url = "nats://***@nats:4222""#,
        r#"url = "https://api.test/in""#,
        r#"peers = ["http://a:3000", "http://b:3000"]"#,
        r#"endpoint = "127.0.0.1:8085""#,
        r#"max_record = "256KiB""#,
        "concurrency = 64",
    ] {
        assert!(
            printed.lines().any(|found| found == line),
            "no {line} in\n{printed}"
        );
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
    std::fs::write(
        &file,
        "[api]\nurl = \"http://file/\"\ntimeout = \"1s\"\nconcurrency = 3\n",
    )
    .unwrap();
    let environment = [
        ("WAYPOST_API__URL", "http://variable/"),
        ("WAYPOST_API__TIMEOUT", "2s"),
    ];
    let output = check(
        &["--config", file.to_str().unwrap(), "--api", "http://flag/"],
        &environment,
    );
    let printed = String::from_utf8(output.stdout).unwrap();
    for line in [
        r#"url = "http://flag/""#,
        r#"timeout = "2s""#,
        "concurrency = 3",
    ] {
        assert!(
            printed.lines().any(|found| found == line),
            "no {line} in\n{printed}"
        );
    }
    // No lane is named, so the one that needs nothing is on, alone.
    assert!(
        printed.contains("[lanes.grpc]") && !printed.contains("[lanes.nats]"),
        "{printed}"
    );
}

/// The defaults of the contract's example, for every key that there is.
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
retry_statuses = [408, 425, 429, "5xx"]
[router]
policy = "round-robin"
publish_timeout = "2s"
[lanes.nats]
url = "nats://127.0.0.1:4222"
stream = "WAYPOST"
subject = "waypost.records"
durable = "waypost"
tag = "NATS"
bundle = 1
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
"#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("defaults.toml");
    std::fs::write(&file, defaults).unwrap();
    let output = check(&["--config", file.to_str().unwrap()], &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_max_record_that_no_lane_carries_is_warned_of() {
    for (max, lane, warned) in [
        ("4MiB", "GRPC", Some("grpc 4.0 MiB by default")),
        ("3MiB", "GRPC", None),
        ("4MiB", "PUBSUB", None),
        ("10MB", "PUBSUB", Some("pubsub 9.5 MiB by default")),
        ("1MiB", "NATS", Some("nats 1.0 MiB by default")),
        ("10MB", "RABBITMQ", None),
    ] {
        let tag = format!("WAYPOST_LANES__{lane}__TAG");
        let environment = [
            ("WAYPOST_INGEST__MAX_RECORD", max),
            ("WAYPOST_INGEST__MAX_BODY", "64MiB"),
            (tag.as_str(), "T"),
        ];
        let output = check(&[], &environment);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        match warned {
            Some(limit) => assert!(
                told.contains("ingest.max_record: warning") && told.contains(limit),
                "{told}"
            ),
            None => assert_eq!(told, "", "{max} {lane}"),
        }
    }
}

#[test]
fn connect_tries_each_lane_and_the_api() {
    let grpc = format!("127.0.0.1:{}", crate::support::process::free_port());
    let nobody = format!("nats://127.0.0.1:{}", crate::support::process::free_port());
    let api = crate::support::api::Api::start();
    let output = check(
        &["--connect", "--api", &api.url()],
        &[("WAYPOST_LANES__GRPC__LISTEN", &grpc)],
    );
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{told}");
    assert!(
        told.contains("lanes.grpc: ok") && told.contains("api: ok"),
        "{told}"
    );
    let output = check(
        &["--connect", "--api", &api.url()],
        &[("WAYPOST_LANES__NATS__URL", &nobody)],
    );
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("lanes.nats: cannot connect"), "{told}");
}

/// The lines of `check --explain` for a record of `body`.
fn explain(body: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("record.json");
    std::fs::write(&file, body).unwrap();
    let lanes = [
        ("WAYPOST_LANES__NATS__TAG", "N"),
        ("WAYPOST_LANES__GRPC__TAG", "G"),
        ("WAYPOST_ROUTER__POLICY", "hash"),
    ];
    let explain = ["--explain", file.to_str().unwrap()];
    check(&[&explain, arguments].concat(), &lanes)
}

#[test]
fn explain_prints_the_decision_for_a_record_and_starts_nothing() {
    let record = r#"{"name":"a","location":"b","age":1,"infectedtype":"c","state":"d"}"#;
    let output = explain(record, &["--header", "Idempotency-Key: record-2"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "id         record-2\n\
         rule       default\n\
         policy     hash\n\
         lane       grpc: the first for its key\n\
         runner-up  nats\n\
         API        [api]\n\n\
         All lanes are up and unused, as if the node had just started.\n"
    );
    let event = [
        "ce-specversion: 1.0",
        "ce-id: 77",
        "ce-source: /s",
        "ce-type: t",
    ];
    let event: Vec<_> = event
        .iter()
        .flat_map(|header| ["--header", header])
        .collect();
    let binary = explain(record, &event);
    let structured =
        format!(r#"{{"specversion":"1.0","id":"77","source":"/s","type":"t","data":{record}}}"#);
    let of_type = ["--header", "content-type: application/cloudevents+json"];
    let structured = explain(&structured, &of_type);
    for output in [binary, structured] {
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(told.starts_with("id         /s|77\n"), "{told}");
    }
    for (body, arguments, why) in [
        ("{}", &[][..], "field `/name`: missing"),
        (
            record,
            &["--header", "content-type: text/plain"],
            "application/json",
        ),
        (
            record,
            &["--header", "content-type: application/x-ndjson"],
            "one is explained",
        ),
        ("{", &[], "malformed JSON"),
        (record, &["--header", "no header"], "'NAME: VALUE'"),
        (
            record,
            &["--header", "Idempotency-Key: a b"],
            "visible ASCII",
        ),
        (record, &["--connect"], "cannot be used with"),
    ] {
        let output = explain(body, arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn each_mistake_in_a_rule_is_named_by_its_line() {
    let hash_on = r#""place" does not fit; allowed is "id", a JSON pointer as in "/location", or "header:NAME""#;
    let on = format!("routes.toml:15: routes[3].hash_on: {hash_on}");
    let router = format!("routes.toml:22: router.hash_on: {hash_on}");
    let expected = [
        r#"routes.toml:4: routes[1].when: "state" is no JSON pointer; allowed is / and a member's name, as in "/state" or "/patient/age", with ~1 for / and ~0 for ~"#,
        "routes.toml:5: routes[1].policy: unknown variant `fastest`, expected one of `round-robin`, `weighted`, `failover`, `hash`, `adaptive`, `broadcast`",
        "routes.toml:6: routes[1].lane: unknown field `lane`, expected one of `when`, `policy`, `hash_on`, `lanes`, `api`",
        "routes.toml:9: routes[2].when: needs one test of /state; allowed is equals, in, prefix, range, exists or matches",
        r#"routes.toml:13: routes[3].when: matches "(" is no regular expression: unclosed group"#,
        on.as_str(),
        "routes.toml:18: routes[4].when: range is empty, since min 9 is over max 2; allowed is min up to max",
        router.as_str(),
        r#"routes.toml:10: routes[2].lanes: "kafka" is no lane that is on; allowed are grpc"#,
        "routes.toml:14: routes[3].lanes: is empty; allowed are lanes that are on: grpc",
        r#"routes.toml:19: routes[4].lanes: "grpc" is there twice; allowed is each lane once"#,
    ];
    assert_eq!(mistakes(&["--config", "routes.toml"], &[]), expected);
    assert_eq!(
        load("routes = 1", &[], &[]).unwrap_err()[0].what,
        "is a list of rules, each written below [[routes]]"
    );
}

const RULES: &str = r#"
[lanes.nats]
[lanes.grpc]
[[routes]]
when = { pointer = "/state", equals = "symptomatic" }
policy = "failover"
lanes = ["nats", "grpc"]
[[routes]]
when = { header = "CE-Type", in = ["a", 1, true] }
policy = "hash"
hash_on = "/patient/id"
[[routes]]
when = { pointer = "/state", prefix = "symp" }
[[routes]]
when = { pointer = "/age", range = { min = 0, max = 17.5 } }
[[routes]]
when = { pointer = "/state", equals = "symptomatic" }
"#;

#[test]
fn rules_load_to_themselves_and_one_that_can_never_match_is_named() {
    let config = load(RULES, &[], &[]).unwrap();
    assert_eq!(config.routes.len(), 5);
    let printed = config.to_toml();
    assert_eq!(load(&printed, &[], &[]).unwrap(), config, "{printed}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.toml");
    std::fs::write(&file, RULES).unwrap();
    let file = file.to_str().unwrap();
    let output = check(&["--config", file], &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    let never = format!(
        "{file}:16: routes[5]: can never match: routes[1] takes all of its records before it"
    );
    assert!(told.contains(&never), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
}

#[test]
fn explain_names_the_rule_and_each_that_was_tried() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    let record = folder.path().join("record.json");
    let body = r#"{"name":"a","location":"b","age":7,"infectedtype":"c","state":"d"}"#;
    std::fs::write(&record, body).unwrap();
    let arguments = [
        "--config",
        rules.to_str().unwrap(),
        "--explain",
        record.to_str().unwrap(),
    ];
    let key = [
        "--header",
        "Idempotency-Key: record-2",
        "--header",
        "ce-type: b",
    ];
    let output = check(&[&arguments[..], &key].concat(), &[]);
    let told = String::from_utf8(output.stdout).unwrap();
    let expected = "id         record-2\n\
        rule       routes[4]: /age is from 0 to 17.5\n\
        policy     round-robin\n\
        lane       nats: its turn\n\
        runner-up  grpc\n\
        API        [api]\n\n\
        routes[1]  does not: /state equals \"symptomatic\"; the value is \"d\"\n\
        routes[2]  does not: header ce-type is in [\"a\", 1, true]; the value is \"b\"\n\
        routes[3]  does not: /state begins with \"symp\"; the value is \"d\"\n\
        routes[4]  takes it: /age is from 0 to 17.5; the value is 7\n\n\
        All lanes are up and unused, as if the node had just started.\n";
    assert_eq!(told, expected);
    let output = check(&[&arguments[..], &["--header", "CE-Type: 1"]].concat(), &[]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("rule       routes[2]"), "{told}");
    assert!(told.contains("the first for its key"), "{told}");
}
