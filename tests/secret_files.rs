//! Files with secrets that are pipes, or become ones.

use std::{fs, path::Path, process::Command, thread};

use awc::http::StatusCode;

use crate::{
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
    tokens::{UNUSABLE, file, file_status, guarded, with_token},
};

fn mkfifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status();
    assert!(made.expect("mkfifo runs").success());
}

#[actix_rt::test]
async fn the_tokens_may_come_out_of_a_pipe_which_is_read_once() {
    let api = Api::start();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe);
    let path = pipe.display().to_string();
    let writer = thread::spawn(move || fs::write(pipe, "first-token\n"));
    let variables = [("INGEST__TOKENS_FILE".to_owned(), path)];
    let node = Node::start(&api.url(), &[&grpc_variables()[..], &variables].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    writer.join().expect("no panic").expect("it is read");
    let (status, _, receipt) = with_token("first-token").send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    assert!(file_status(&node).await["last_error"].is_null());
    node.at_rest(PATIENCE).await;
}

#[actix_rt::test]
async fn a_file_that_becomes_a_pipe_is_told_and_holds_up_no_stop() {
    let api = Api::start();
    let file = file("first-token");
    let mut node = guarded(&api.url(), &file).await;
    fs::remove_file(file.path()).expect("it is there");
    mkfifo(file.path());
    eventually("the status tells", PATIENCE, async || {
        let file = file_status(&node).await;
        let told = file["last_error"].as_str()?.contains("regular file");
        told.then_some(())
    })
    .await;
    assert_eq!(node.metric(UNUSABLE).await, "1");
    let (status, _, receipt) = with_token("first-token").send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    node.at_rest(PATIENCE).await;
    node.signal("TERM");
    assert_eq!(node.ended(PATIENCE).await.code(), Some(0));
}
