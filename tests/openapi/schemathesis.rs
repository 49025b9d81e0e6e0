//! `schemathesis` with all of its checks, on both sides of a node that lets nobody in without a token.

use std::fs;

use awc::http::StatusCode;
use tempfile::{NamedTempFile, TempDir};

use super::side::Side;
use crate::{
    support::{
        api::{Api, Conduct},
        lanes::grpc_variables,
        node::Node,
        python::python,
        wanted,
    },
    tokens::{file, with_token},
};

/// The way in that a client has, and how long a stream of events is read, which has no end.
const CONFIG: &str = r#"
auth.openapi.token.bearer = "token"

[[operations]]
include-path-regex = "^/api/(events|tap)$"
request-timeout = 0.2
"#;
/// The parts that no schema says.
const HOOKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openapi/fresh_keys.py");

/// `schemathesis` finds no false statement in the document at this port.
async fn finds_nothing(port: u16) {
    let Some(mut python) = python("openapi") else {
        return;
    };
    let side = Side::new(port, &[("Authorization", "Bearer token")]).await;
    let folder = TempDir::new().expect("a temporary folder");
    let document = folder.path().join("openapi.json");
    fs::write(&document, side.document.to_string()).expect("room");
    let config = folder.path().join("schemathesis.toml");
    fs::write(&config, format!("hooks = {HOOKS:?}\n{CONFIG}")).expect("room");
    let examples = wanted("SCHEMATHESIS_EXAMPLES", 3).to_string();
    python
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(config)
        .args(["run", "--checks", "all", "--continue-on-failure"])
        .args(["--max-examples", &examples, "--request-timeout", "30"])
        .args(["--request-retries", "3"])
        .args(["--generation-database", "none", "--no-color"])
        .args(["--url", &format!("http://127.0.0.1:{port}")])
        .arg(document)
        .current_dir(folder.path());
    let run = tokio::task::spawn_blocking(move || python.output());
    let output = run.await.expect("it ends").expect("python3 is there");
    let text = String::from_utf8_lossy(&output.stdout);
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{why}");
}

/// A node that knows one token. Its API refuses each record.
async fn node(api: &Api, tokens: &NamedTempFile, more: &[(&str, &str)]) -> Node {
    api.behave(|_, _| Conduct::Answer(422));
    let path = tokens.path().display().to_string();
    let keys = ["INGEST__TOKENS_FILE", "ADMIN__TOKEN_FILE"].map(|key| (key, &*path));
    let keys = keys.iter().chain(more);
    let keys: Vec<_> = keys
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    Node::start(&api.url(), &[grpc_variables(), keys].concat()).await
}

#[actix_rt::test]
async fn schemathesis_finds_nothing_at_ingest() {
    let (api, tokens) = (Api::start(), file("token"));
    let node = node(&api, &tokens, &[]).await;
    finds_nothing(node.ingest).await;
}

#[actix_rt::test]
async fn schemathesis_finds_nothing_at_ingest_that_wants_a_key() {
    let (api, tokens) = (Api::start(), file("token"));
    let node = node(&api, &tokens, &[("INGEST__REQUIRE_KEY", "true")]).await;
    finds_nothing(node.ingest).await;
}

#[actix_rt::test]
async fn schemathesis_finds_nothing_at_admin() {
    let (api, tokens) = (Api::start(), file("token"));
    let node = node(&api, &tokens, &[]).await;
    // Some of the lists are not empty.
    for _ in 0..20 {
        let (status, _, receipt) = with_token("token").send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    }
    finds_nothing(node.admin).await;
}
