//! Who may send records: bearer tokens of a file that changes while the node runs.

use std::{fs, io::Write as _};

use awc::http::{Method, StatusCode, header};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{
    ingest::{RECORD, Request, post},
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

fn file(content: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(content.as_bytes()).expect("room");
    file
}

async fn guarded(api: &str, file: &NamedTempFile) -> Node {
    let path = file.path().display().to_string();
    let tokens = [("INGEST__TOKENS_FILE".to_owned(), path)];
    let node = Node::start(api, &[&grpc_variables()[..], &tokens].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

fn with_token(token: &str) -> Request {
    post(RECORD).with("Authorization", format!("Bearer {token}"))
}

async fn tokens(node: &Node) -> Value {
    let (_, status) = node.get("/api/status").await.expect("the node answers");
    status["tokens"].clone()
}

const UNREADABLE: &str = "waypost_ingest_tokens_unreadable";

#[actix_rt::test]
async fn without_a_token_each_request_but_health_is_401_and_takes_nothing() {
    let api = Api::start();
    let file = file("first-token\nsecond-token\n");
    let node = guarded(&api.url(), &file).await;
    let requests = || {
        [
            post(RECORD),
            post(RECORD).to("/grpc"),
            post(RECORD).to("/pigeon"),
            post(RECORD).to("/a/b"),
            post("{]"),
            post(vec![b' '; 2 << 20]),
            post(RECORD).with("Content-Encoding", "br"),
            post("").by(Method::PUT),
            post("").by(Method::GET).to("/openapi.json"),
            post("").by(Method::OPTIONS),
        ]
    };
    for request in requests() {
        let (status, headers, problem) = request.send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
        assert_eq!(problem["type"], "urn:waypost:problem:token");
        let challenge = headers.get(header::WWW_AUTHENTICATE).expect("a challenge");
        assert_eq!(challenge, "Bearer realm=\"waypost\"");
    }
    for wrong in ["third-token", "first-toke", "first-token-", ""] {
        let (status, headers, problem) = with_token(wrong).send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
        let challenge = headers.get(header::WWW_AUTHENTICATE).expect("a challenge");
        assert_eq!(
            challenge,
            "Bearer realm=\"waypost\", error=\"invalid_token\""
        );
    }
    for method in [Method::GET, Method::HEAD] {
        let (status, _, _) = post("").by(method).send(&node).await;
        assert_eq!(status, StatusCode::OK);
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 0);
    assert_eq!(api.count(), 0);

    for token in ["first-token", "second-token"] {
        let (status, _, receipt) = with_token(token).send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    }
    let (status, _, _) = with_token("first-token").to("/pigeon").send(&node).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 2);
    // The token is for this node alone, and is told to nobody.
    for posted in api.posts() {
        assert!(!format!("{posted:?}").contains("-token"), "{posted:?}");
    }
    let status = node.get("/api/status").await.expect("the node answers").1;
    assert!(!status.to_string().contains("-token"));
    assert!(!node.log().contains("-token"));
}

#[actix_rt::test]
async fn a_change_of_the_file_counts_and_a_file_that_is_gone_changes_nothing() {
    let api = Api::start();
    let file = file("old");
    let node = guarded(&api.url(), &file).await;
    assert_eq!(tokens(&node).await, json!({"count": 1, "last_error": null}));
    fs::write(file.path(), "new\nother").expect("room");
    let becomes = async |token: &str, wanted: StatusCode| {
        eventually(&format!("{token}: {wanted}"), PATIENCE, async || {
            let (status, _, _) = with_token(token).send(&node).await;
            (status == wanted).then_some(())
        })
        .await;
    };
    becomes("new", StatusCode::ACCEPTED).await;
    becomes("old", StatusCode::UNAUTHORIZED).await;
    assert_eq!(tokens(&node).await["count"], 2);

    assert_eq!(node.metric(UNREADABLE).await, "0");
    let away = file.path().with_extension("away");
    fs::rename(file.path(), &away).expect("our folder");
    eventually("the status tells", PATIENCE, async || {
        tokens(&node).await["last_error"].is_string().then_some(())
    })
    .await;
    assert_eq!(node.metric(UNREADABLE).await, "1");
    becomes("new", StatusCode::ACCEPTED).await;
    let told = "the tokens of ingest cannot be read; the last ones stay";
    assert_eq!(node.log().matches(told).count(), 1, "{}", node.log());

    fs::rename(&away, file.path()).expect("our folder");
    eventually("the status tells no error", PATIENCE, async || {
        tokens(&node).await["last_error"].is_null().then_some(())
    })
    .await;
    // The last token is gone: nobody comes in.
    fs::write(file.path(), "").expect("room");
    becomes("new", StatusCode::UNAUTHORIZED).await;
}

#[actix_rt::test]
async fn a_node_does_not_start_without_a_token_in_its_file() {
    for content in ["", "two words"] {
        let file = file(content);
        let path = file.path().display().to_string();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_waypost"))
            .args(["run", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .env("WAYPOST_INGEST__TOKENS_FILE", &path)
            .env("WAYPOST_SPOOL__DIR", file.path().with_extension("data"))
            .output()
            .expect("it runs");
        assert!(!output.status.success(), "{content:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("ingest.tokens_file"), "{told}");
        assert!(told.contains(&path), "{told}");
        assert!(!told.contains("two words"), "{told}");
        fs::remove_dir_all(file.path().with_extension("data")).ok();
    }
}
