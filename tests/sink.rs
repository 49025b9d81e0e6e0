//! The reference API keeps each record once.

use std::net::TcpListener;

use awc::http::StatusCode;
use futures_util::future::join_all;
use serde_json::{Value, json};
use waypost::sink::Sink;

fn start(db: Option<&std::path::Path>) -> Sink {
    Sink::start(TcpListener::bind("127.0.0.1:0").unwrap(), db.map(Into::into)).unwrap()
}

async fn post(sink: &Sink, key: Option<&str>, body: &'static str) -> StatusCode {
    let mut request = awc::Client::default().post(format!("http://{}/cases", sink.address()));
    if let Some(key) = key {
        request = request.insert_header(("Idempotency-Key", key));
    }
    request.send_body(body).await.unwrap().status()
}

async fn get(sink: &Sink, path: &str) -> Value {
    let request = awc::Client::default().get(format!("http://{}{path}", sink.address()));
    let body = request.send().await.unwrap().body().await.unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[actix_rt::test]
async fn a_record_is_kept_once_by_its_key_and_redeliveries_are_counted() {
    let sink = start(None);
    assert_eq!(post(&sink, Some("a"), r#"{"n":1,"path":"NATS"}"#).await, StatusCode::CREATED);
    assert_eq!(post(&sink, Some("a"), r#"{"n":1,"path":"NATS"}"#).await, StatusCode::OK);
    assert_eq!(post(&sink, Some("b"), r#"{"n":2,"path":"GRPC"}"#).await, StatusCode::CREATED);
    assert_eq!(post(&sink, Some("c"), r#"[{"n":3,"path":"GRPC"},{"n":4,"path":"GRPC"}]"#).await, StatusCode::CREATED);
    assert_eq!(get(&sink, "/stats").await, json!({"records": 4, "redeliveries": 1, "paths": {"GRPC": 3, "NATS": 1}}));
    let newest = get(&sink, "/records?limit=2").await;
    assert_eq!((&newest[0]["id"], &newest[0]["record"]["n"]), (&json!("c/1"), &json!(4)));
    assert_eq!(newest.as_array().unwrap().len(), 2);
    assert_eq!(get(&sink, "/records").await[3]["redeliveries"], 1);
}

#[actix_rt::test]
async fn what_is_no_record_is_refused() {
    let sink = start(None);
    assert_eq!(post(&sink, None, "{}").await, StatusCode::BAD_REQUEST);
    assert_eq!(post(&sink, Some("a"), "{").await, StatusCode::BAD_REQUEST);
    assert_eq!(post(&sink, Some("a"), "7").await, StatusCode::BAD_REQUEST);
    assert_eq!(sink.stats().records, 0);
}

#[actix_rt::test]
async fn one_key_that_comes_many_times_at_once_is_kept_once() {
    let sink = start(None);
    let statuses = join_all((0..50).map(|_| post(&sink, Some("same"), "{}"))).await;
    assert_eq!(statuses.iter().filter(|status| **status == StatusCode::CREATED).count(), 1);
    assert_eq!((sink.stats().records, sink.stats().redeliveries), (1, 49));
}

#[actix_rt::test]
async fn records_in_a_file_outlive_the_sink() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sink.db");
    let sink = start(Some(&file));
    assert_eq!(post(&sink, Some("a"), r#"{"path":"NATS"}"#).await, StatusCode::CREATED);
    sink.stop().await;
    let sink = start(Some(&file));
    assert_eq!(post(&sink, Some("a"), r#"{"path":"NATS"}"#).await, StatusCode::OK);
    assert_eq!(get(&sink, "/stats").await, json!({"records": 1, "redeliveries": 1, "paths": {"NATS": 1}}));
}
