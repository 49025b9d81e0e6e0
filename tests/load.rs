//! `waypost load`, as users run it, against an API that counts.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::TcpListener,
    process::{Child, Output, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use rustls::{
    ClientConfig, RootCertStore, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde_json::Value;
use waypost::{
    api::client::Endpoint,
    load::{Load, Plan},
};

use crate::support::{
    api::{Api, Conduct},
    process::{signal, start},
    tls::{certificate, server},
    traffic,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn load(host: &str, arguments: &[&str]) -> Child {
    start(env!("CARGO_BIN_EXE_waypost"), |command| {
        command
            .args(["load", "--json", "--host", host])
            .args(arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
    })
    .expect("the program starts")
}

/// The result, and the exit status.
async fn outcome(load: Child) -> (Value, Option<i32>) {
    let ended = tokio::task::spawn_blocking(|| load.wait_with_output()).await;
    let Output {
        status,
        stdout,
        stderr,
    } = ended.expect("it waits").expect("it ends");
    let told = String::from_utf8_lossy(&stderr);
    (
        serde_json::from_slice(&stdout).unwrap_or_else(|why| panic!("{why}: {told}")),
        status.code(),
    )
}

#[actix_rt::test]
async fn each_record_is_posted_once_a_pass_byte_for_byte_over_as_many_connections_as_users() {
    let api = Api::start();
    let (result, status) = outcome(load(&api.url(), &["--users", "4", "--repeat", "3"])).await;
    assert_eq!(
        (status, &result["requests"], &result["failures"]),
        (Some(0), &3000.into(), &0.into()),
        "{result}"
    );
    assert_eq!(result["statuses"]["200"], 3000);
    let posts = api.posts();
    let mut bodies: Vec<_> = posts.iter().map(|post| post.body.clone()).collect();
    let mut wanted = [traffic(), traffic(), traffic()].concat();
    bodies.sort();
    wanted.sort();
    assert!(bodies == wanted, "each record three times");
    let keys: HashSet<_> = posts
        .iter()
        .map(|post| post.key.as_deref().expect("a key"))
        .collect();
    let peers: HashSet<_> = posts.iter().map(|post| post.peer).collect();
    assert_eq!((keys.len(), peers.len()), (3000, 4));
    assert!(
        posts
            .iter()
            .all(|post| post.content_type.as_deref() == Some("application/json"))
    );
}

#[actix_rt::test]
async fn what_is_refused_or_cut_is_a_failure_and_named() {
    let api = Api::start();
    api.behave(|number, _| match number {
        10..15 => Conduct::Answer(503),
        // The second try over a new connection is cut as well.
        20..22 => Conduct::CutAnswer,
        _ => Conduct::Answer(202),
    });
    let (result, status) = outcome(load(&api.url(), &["--users", "1"])).await;
    assert_eq!(
        (status, &result["requests"], &result["failures"]),
        (Some(1), &1000.into(), &6.into()),
        "{result}"
    );
    assert_eq!(
        (&result["statuses"]["202"], &result["statuses"]["503"]),
        (&994.into(), &5.into()),
        "{result}"
    );
    assert_eq!(
        result["kinds_of_failure"]["answered 503 Service Unavailable"], 5,
        "{result}"
    );
}

#[actix_rt::test]
async fn at_a_fixed_rate_a_server_that_stalls_is_charged_for_what_it_kept_waiting() {
    let api = Api::start();
    api.delay(Duration::from_millis(100));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("ten.ndjson");
    std::fs::write(&file, "{\"a\":1}\n".repeat(10)).expect("the folder is ours");
    let file = file.to_str().expect("a plain path");
    // Ten are due within 0.1 s, and are answered one after the other within 1 s.
    let (result, _) = outcome(load(&api.url(), &[file, "--users", "1", "--rate", "100/s"])).await;
    let max = result["latency_ms"]["max"].as_f64().expect("a number");
    assert!(max > 900.0, "the last one waits for nine: {result}");
}

#[actix_rt::test]
async fn a_load_with_a_duration_goes_on_until_it_is_over_and_sends_its_headers() {
    let api = Api::start();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("two.ndjson");
    std::fs::write(&file, "{\"a\":1}\n{\"a\":2}\n").expect("the folder is ours");
    let report = folder.path().join("report.html");
    let arguments = [
        file.to_str().expect("a plain path"),
        "--users=2",
        "--rate=50/s",
        "--duration=1500ms",
        "--header=Content-Type: application/cloudevents+json",
        "--report",
        report.to_str().expect("a plain path"),
    ];
    let (result, status) = outcome(load(&api.url(), &arguments)).await;
    assert_eq!(
        (status, &result["failures"]),
        (Some(0), &0.into()),
        "{result}"
    );
    // 75 are due by then. It never stops early, and never posts one that is due later.
    let requests = result["requests"].as_u64().expect("a count");
    assert!(requests <= 75, "{result}");
    assert!(
        result["elapsed_s"].as_f64().expect("a time") >= 1.4,
        "{result}"
    );
    let posts = api.posts();
    assert_eq!(posts.len() as u64, requests);
    assert!(posts.len() > 2, "the records come again: {result}");
    for post in posts {
        let content_type = post.content_type.as_deref();
        assert_eq!(content_type, Some("application/cloudevents+json"));
    }
    let page = std::fs::read_to_string(report).expect("the report");
    for wanted in [
        "<th>duration<td>1s 500ms",
        "<th>rate<td>50/s",
        "<th>headers<td>content-type",
        concat!("<th>waypost<td>", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(page.contains(wanted), "{wanted}: {page}");
    }
    assert!(
        !page.contains("cloudevents"),
        "a header may be a secret: {page}"
    );
}

#[actix_rt::test]
async fn the_limits_of_a_load_decide_on_its_exit_status() {
    let api = Api::start();
    api.delay(Duration::from_millis(5));
    api.behave(|number, _| match number {
        1..=5 => Conduct::Answer(400),
        _ => Conduct::Answer(202),
    });
    let (result, status) = outcome(load(&api.url(), &["--max-failures", "5"])).await;
    assert_eq!(
        (status, &result["failures"]),
        (Some(0), &5.into()),
        "{result}"
    );
    let slow = outcome(load(&api.url(), &["--max-p99", "1ms"])).await;
    assert_eq!(slow.1, Some(1), "{}", slow.0);
    let fast = outcome(load(&api.url(), &["--max-p99", "1h"])).await;
    assert_eq!(fast.1, Some(0), "{}", fast.0);
    api.behave(|_, _| Conduct::Answer(400));
    let (result, status) = outcome(load(&api.url(), &["--max-failures", "99.9%"])).await;
    assert_eq!(status, Some(1), "{result}");
    assert_eq!(result["latency_ms"]["max"], 0.0, "{result}");
    assert!(
        result["failure_latency_ms"]["max"].as_f64() > Some(1.0),
        "{result}"
    );
}

#[actix_rt::test]
async fn users_wait_between_records() {
    let api = Api::start();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("four.json");
    std::fs::write(&file, "[{\"a\":1},{\"a\":2},{\"a\":3},{\"a\":4}]").expect("the folder is ours");
    let arguments = [
        file.to_str().expect("a plain path"),
        "--users",
        "1",
        "--wait",
        "50ms..60ms",
    ];
    let (result, status) = outcome(load(&api.url(), &arguments)).await;
    assert_eq!((status, api.count()), (Some(0), 4));
    assert!(
        result["elapsed_s"].as_f64().expect("a number") > 0.15,
        "{result}"
    );
}

#[actix_rt::test]
async fn a_load_that_is_interrupted_tells_what_was_answered_and_leaves_a_report() {
    let api = Api::start();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let report = folder.path().join("report.html");
    let endless = [
        "--rate",
        "100",
        "--repeat",
        "1000",
        "--report",
        report.to_str().expect("a plain path"),
    ];
    let running = load(&api.url(), &endless);
    api.wait_for(20, PATIENCE).await;
    signal(&running, "INT");
    let (result, status) = outcome(running).await;
    assert_eq!((status, &result["failures"]), (Some(1), &0.into()));
    assert_eq!(result["requests"], api.count());
    let page = std::fs::read_to_string(report).expect("the report");
    assert!(
        page.contains(&format!("<td>{}", api.count())) && page.contains("</svg>"),
        "{page}"
    );
}

#[actix_rt::test]
async fn a_load_whose_users_rest_ends_when_it_is_interrupted() {
    let api = Api::start();
    let running = load(&api.url(), &["--users", "2", "--wait", "1h"]);
    api.wait_for(2, PATIENCE).await;
    signal(&running, "TERM");
    let (result, status) = tokio::time::timeout(PATIENCE, outcome(running))
        .await
        .expect("nobody rests for an hour");
    assert_eq!(
        (status, &result["requests"]),
        (Some(1), &2.into()),
        "{result}"
    );
}

#[actix_rt::test]
async fn https_is_spoken_over_a_connection_that_is_kept() {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let folder = tempfile::tempdir().unwrap();
    let Some((cert, key)) = certificate(folder.path(), "DNS:localhost") else {
        return;
    };
    let tls = server(&cert, &key);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!(
        "https://localhost:{}/",
        listener.local_addr().unwrap().port()
    );
    let serve = thread::spawn(move || {
        let mut stream = StreamOwned::new(
            ServerConnection::new(tls).unwrap(),
            listener.accept().unwrap().0,
        );
        for _ in 0..3 {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n{}") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            stream
                .write_all(b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\nok")
                .unwrap();
        }
    });
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&cert).unwrap())
        .unwrap();
    let trusting = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let plan = Plan {
        records: vec![Bytes::from_static(b"{}"); 3],
        passes: 1,
        duration: None,
        users: 1,
        spawn_rate: f64::INFINITY,
        wait: Duration::ZERO..Duration::ZERO,
        rate: None,
        keyed: true,
        watch: None,
    };
    let endpoint = Endpoint::parse(&url, || Arc::new(trusting)).unwrap();
    let load = Load::new(endpoint, plan);
    load.run(|_| ()).await;
    assert_eq!(
        load.tally().json()["statuses"]["202"],
        3,
        "{}",
        load.tally().json()
    );
    serve.join().unwrap();
}
