//! The reference API: each record is kept once, and an answer means that it is kept.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};

use awc::{Client, http::StatusCode};
use bytes::Bytes;
use serde_json::{Value, json};
use waypost::sink::{Sink, Stats};

use crate::support::{
    eventually,
    process::{free_port, signal, start},
};

const PATIENCE: Duration = Duration::from_secs(20);

fn sink(db: Option<PathBuf>) -> Sink {
    Sink::start(TcpListener::bind("127.0.0.1:0").unwrap(), db).unwrap()
}

/// The status, and the body as JSON where it is JSON.
async fn post(
    at: SocketAddr,
    path: &str,
    key: Option<&str>,
    body: impl Into<Bytes>,
) -> (u16, Value) {
    let mut request = Client::default().post(format!("http://{at}{path}"));
    if let Some(key) = key {
        request = request.insert_header(("Idempotency-Key", key));
    }
    let mut response = request.send_body(body.into()).await.unwrap();
    let status = response.status();
    if !status.is_success() {
        assert_eq!(
            response.headers().get("Content-Type").unwrap(),
            "application/problem+json"
        );
    }
    (
        status.as_u16(),
        serde_json::from_slice(&response.body().await.unwrap()).unwrap_or_default(),
    )
}

async fn get(at: SocketAddr, path: &str) -> (u16, Value) {
    let mut response = Client::default()
        .get(format!("http://{at}{path}"))
        .send()
        .await
        .unwrap();
    let body = response.body().limit(16 << 20).await.unwrap();
    (
        response.status().as_u16(),
        serde_json::from_slice(&body).unwrap_or_default(),
    )
}

fn stats(records: u64, redeliveries: u64, paths: &[(&str, u64)]) -> Stats {
    let paths = paths
        .iter()
        .map(|&(path, count)| (path.to_owned(), count))
        .collect();
    Stats {
        records,
        redeliveries,
        paths,
    }
}

#[actix_rt::test]
async fn a_record_is_kept_once_and_its_redeliveries_are_counted() {
    let sink = sink(None);
    let at = sink.address();
    assert_eq!(
        post(at, "/", Some("a"), r#"{"n":1,"path":"NATS"}"#).await.0,
        201
    );
    assert_eq!(
        post(at, "/", Some("a"), r#"{"n":1,"path":"GRPC"}"#).await.0,
        200,
        "the same record by another lane"
    );
    assert_eq!(
        post(at, "/", Some("a"), r#"{"n":1,"path":"NATS"}"#).await.0,
        200
    );
    assert_eq!(
        post(at, "/", Some("b"), r#"{"n":2,"path":"GRPC"}"#).await.0,
        201
    );
    assert_eq!(sink.stats(), stats(2, 2, &[("GRPC", 1), ("NATS", 1)]));
    let expected = json!({"records": 2, "redeliveries": 2, "paths": {"GRPC": 1, "NATS": 1}});
    assert_eq!(get(at, "/stats").await, (200, expected));
    let (_, listed) = get(at, "/records").await;
    assert_eq!(listed[1]["id"], "a");
    assert_eq!(
        listed[1]["record"],
        json!({"n": 1, "path": "NATS"}),
        "what came first is what is kept"
    );
    assert_eq!(listed[1]["redeliveries"], 2);
    sink.stop().await;
}

#[actix_rt::test]
async fn a_batch_is_kept_record_by_record() {
    let sink = sink(None);
    let at = sink.address();
    let batch = r#" [ {"n":0,"path":"NATS"}, {"n":1,"path":"NATS"} , {"n":2,"path":"GRPC"}]"#;
    assert_eq!(
        post(at, "/", Some("k"), batch).await,
        (201, json!({"stored": 3, "redelivered": 0}))
    );
    assert_eq!(
        post(at, "/", Some("k"), batch).await,
        (200, json!({"stored": 0, "redelivered": 3}))
    );
    assert_eq!(
        post(at, "/", Some("k/1"), r#"{"n":1,"path":"NATS"}"#)
            .await
            .0,
        200,
        "the same record on its own"
    );
    assert_eq!(sink.stats(), stats(3, 4, &[("GRPC", 1), ("NATS", 2)]));
    sink.stop().await;
}

#[actix_rt::test]
async fn what_is_not_a_record_is_a_problem_and_leaves_nothing_behind() {
    let sink = sink(None);
    let at = sink.address();
    for key in [None, Some("")] {
        let (status, problem) = post(at, "/", key, "{}").await;
        assert_eq!(
            (status, &problem["type"]),
            (400, &json!("urn:waypost:problem:idempotency-key")),
            "{key:?}"
        );
    }
    for body in [
        "",
        "{",
        "{} {}",
        "null",
        "7",
        "\"text\"",
        "[7]",
        "[[]]",
        "[{}, null]",
        "[{}, [\"NATS\"]]",
    ] {
        let (status, problem) = post(at, "/", Some("k"), body).await;
        assert_eq!(
            (status, &problem["type"]),
            (400, &json!("urn:waypost:problem:json")),
            "{body:?}"
        );
    }
    let (status, problem) = post(at, "/", Some("k"), Bytes::from_static(b"{\"a\":\"\xff\"}")).await;
    assert_eq!(
        (status, &problem["status"]),
        (400, &json!(400)),
        "not UTF-8"
    );
    assert_eq!(
        post(at, "/", Some("k"), vec![b' '; (16 << 20) + 1]).await.0,
        413
    );
    assert_eq!(sink.stats(), Stats::default());
    sink.stop().await;
}

#[actix_rt::test]
async fn every_path_takes_records_by_post_alone() {
    let sink = sink(None);
    let at = sink.address();
    let paths = ["/", "/records", "/stats", "/healthz", "/api/v1/cases?x=y"];
    for path in paths {
        assert_eq!(post(at, path, Some(path), "{}").await.0, 201, "{path}");
    }
    for (path, allowed) in [
        ("/", "POST"),
        ("/elsewhere", "POST"),
        ("/stats", "GET, POST"),
        ("/records", "GET, POST"),
    ] {
        let request = Client::default()
            .put(format!("http://{at}{path}"))
            .insert_header(("Idempotency-Key", "put"));
        let response = request.send_body("{}").await.unwrap();
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
        assert_eq!(response.headers().get("Allow").unwrap(), allowed, "{path}");
    }
    assert_eq!(get(at, "/").await.0, 405);
    assert_eq!(get(at, "/healthz").await.0, 200);
    assert_eq!(sink.stats().records, paths.len() as u64);
    sink.stop().await;
}

#[actix_rt::test]
async fn records_are_listed_newest_first_up_to_the_limit() {
    let sink = sink(None);
    let at = sink.address();
    let batch: Vec<_> = (0..10_100)
        .map(|n| json!({"n": n, "path": "NATS"}))
        .collect();
    assert_eq!(
        post(at, "/", Some("k"), serde_json::to_vec(&batch).unwrap())
            .await
            .0,
        201
    );
    for (query, count) in [
        ("", 100),
        ("?limit=3", 3),
        ("?limit=0", 0),
        ("?limit=10000", 10_000),
        ("?limit=20000", 10_000),
    ] {
        let (status, listed) = get(at, &format!("/records{query}")).await;
        let listed = listed.as_array().unwrap();
        assert_eq!((status, listed.len()), (200, count), "{query}");
        for (from_newest, row) in listed.iter().enumerate() {
            let n = batch.len() - 1 - from_newest;
            assert_eq!(
                (&row["id"], &row["record"]),
                (&json!(format!("k/{n}")), &batch[n])
            );
        }
    }
    for query in ["?limit=-1", "?limit=many"] {
        assert_eq!(get(at, &format!("/records{query}")).await.0, 400, "{query}");
    }
    sink.stop().await;
}

#[actix_rt::test]
async fn many_clients_at_once_share_commits_and_each_gets_its_own_answer() {
    let sink = sink(None);
    let url = format!("http://{}/", sink.address());
    let client = Client::default();
    // Each key comes twice at the same time, and one of the two is the first.
    let posts = (0..400).map(|n| {
        let body = format!(r#"{{"n":{n},"path":"NATS"}}"#);
        let request = client
            .post(&url)
            .insert_header(("Idempotency-Key", format!("key-{}", n / 2)));
        async move { request.send_body(body).await.unwrap().status().as_u16() }
    });
    let statuses = futures_util::future::join_all(posts).await;
    for pair in statuses.chunks(2) {
        assert_eq!(pair.iter().sum::<u16>(), 200 + 201, "{pair:?}");
    }
    assert_eq!(sink.stats(), stats(200, 200, &[("NATS", 200)]));
    sink.stop().await;
}

#[actix_rt::test]
async fn records_in_a_file_outlive_the_sink() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sink.db");
    let first = sink(Some(file.clone()));
    assert_eq!(
        post(first.address(), "/", Some("a"), r#"{"path":"NATS"}"#)
            .await
            .0,
        201
    );
    first.stop().await;
    let second = sink(Some(file));
    assert_eq!(second.stats(), stats(1, 0, &[("NATS", 1)]));
    assert_eq!(
        post(second.address(), "/", Some("a"), r#"{"path":"NATS"}"#)
            .await
            .0,
        200
    );
    second.stop().await;
}

#[actix_rt::test]
async fn a_file_that_is_no_database_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sink.db");
    std::fs::write(&file, "no database ".repeat(1000)).unwrap();
    let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(Sink::start(listener(), Some(file)).is_err());
    assert!(
        Sink::start(
            listener(),
            Some(folder.path().join("no/such/folder/sink.db"))
        )
        .is_err()
    );
}

/// `waypost sink` as a process of its own.
async fn program(port: u16, db: Option<PathBuf>) -> Child {
    let program = start(env!("CARGO_BIN_EXE_waypost"), |command| {
        command
            .args([
                "--log-format",
                "json",
                "sink",
                "--listen",
                &format!("127.0.0.1:{port}"),
            ])
            .stderr(Stdio::piped());
        if let Some(db) = db {
            command.arg("--db").arg(db);
        }
    });
    let client = Client::default();
    eventually("waypost sink serves", PATIENCE, async || {
        let response = client
            .get(format!("http://127.0.0.1:{port}/healthz"))
            .send()
            .await
            .ok()?;
        response.status().is_success().then_some(())
    })
    .await;
    program.unwrap()
}

#[actix_rt::test]
async fn what_was_answered_outlives_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let db = folder.path().join("sink.db");
    let port = free_port();
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut first = program(port, Some(db.clone())).await;
    for n in 0..20 {
        assert_eq!(
            post(at, "/", Some(&format!("k-{n}")), r#"{"path":"NATS"}"#)
                .await
                .0,
            201
        );
    }
    assert_eq!(
        post(at, "/", Some("k-0"), r#"{"path":"NATS"}"#).await.0,
        200
    );
    signal(&first, "KILL");
    first.wait().unwrap();

    let mut second = program(port, Some(db)).await;
    let expected = json!({"records": 20, "redeliveries": 1, "paths": {"NATS": 20}});
    assert_eq!(get(at, "/stats").await, (200, expected));
    assert_eq!(
        post(at, "/", Some("k-19"), r#"{"path":"NATS"}"#).await.0,
        200,
        "known from before the kill"
    );
    signal(&second, "KILL");
    second.wait().unwrap();
}

#[actix_rt::test]
async fn the_program_says_where_it_keeps_records_and_ends_on_a_signal() {
    let port = free_port();
    let mut sink = program(port, None).await;
    signal(&sink, "TERM");
    assert_eq!(sink.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    sink.stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(log.contains("memory"), "{log}");
    assert!(log.contains(&format!("127.0.0.1:{port}")), "{log}");
}

#[actix_rt::test]
async fn an_address_that_is_taken_is_a_failure() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sink = start(env!("CARGO_BIN_EXE_waypost"), |command| {
        command
            .args(["sink", "--listen", &taken.local_addr().unwrap().to_string()])
            .stderr(Stdio::null());
    })
    .unwrap();
    let status = eventually("the program ends", PATIENCE, async || {
        sink.try_wait().unwrap()
    })
    .await;
    assert_eq!(status.code(), Some(1));
}
