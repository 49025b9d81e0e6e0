//! Traces of records that go by the disk: parked, held, and moved there while they are POSTed.

use std::{fs, path::PathBuf, time::Duration};

use awc::http::StatusCode;
use bytes::Bytes;
use serde_json::json;
use tempfile::TempDir;

use super::{SPAN, TRACE, are_conventional};
use crate::support::{
    api::{Api, Conduct},
    collector::{Collector, SeenSpan},
    eventually,
    lanes::{Lane as _, Nats, grpc_variables},
    node::{Node, PATIENCE},
    rig::Rig as _,
};

/// A node with `[api]` and `[apis.slow]`, which has the records of the state `slow`.
struct SlowApi {
    slow: Api,
    well: Api,
    collector: Collector,
    file: PathBuf,
    _folder: TempDir,
}

impl SlowApi {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (slow, well) = (Api::start(), Api::start());
        let file = folder.path().join("waypost.toml");
        let url = slow.url();
        let text = format!(
            "[ingest]\nschema = \"any\"\n[apis.slow]\nurl = \"{url}\"\ntimeout = \"3s\"\n\
             concurrency = 1\n[[routes]]\n\
             when = {{ pointer = \"/state\", equals = \"slow\" }}\napi = \"slow\"\n"
        );
        fs::write(&file, text).expect("the file is ours");
        Self {
            slow,
            well,
            collector: Collector::start(),
            file,
            _folder: folder,
        }
    }

    async fn node(&self, variables: &[(String, String)]) -> Node {
        let variables = [variables, &self.collector.variables()].concat();
        Node::start_with_config(&self.well.url(), &variables, &self.file).await
    }
}

async fn post(node: &Node, key: &str, state: &str) {
    let url = format!("http://127.0.0.1:{}/", node.ingest);
    let request = awc::Client::default()
        .post(url)
        .insert_header(("Idempotency-Key", key))
        .insert_header(("traceparent", format!("00-{TRACE}-{SPAN}-01")))
        .content_type("application/json");
    let body = Bytes::from(json!({"state": state, "name": key}).to_string());
    let answer = request.send_body(body).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::ACCEPTED, "{key}");
}

/// The spans of one record, in the order of their begin.
struct RecordSpans(Vec<SeenSpan>);

impl RecordSpans {
    fn all(spans: &[SeenSpan], id: &str) -> Self {
        let own = |span: &&SeenSpan| span.attribute("messaging.message.id") == id;
        let mut own: Vec<_> = spans.iter().filter(own).cloned().collect();
        let of_own = |span: &&SeenSpan| own.iter().any(|parent| parent.id == span.parent);
        let posts = spans.iter().filter(of_own);
        let posts = posts.filter(|span| !span.attribute("url.full").is_empty());
        own.extend(posts.cloned().collect::<Vec<_>>());
        own.sort_by_key(|span| span.began);
        Self(own)
    }

    fn of(&self, is_it: impl Fn(&SeenSpan) -> bool) -> Vec<&SeenSpan> {
        self.0.iter().filter(|span| is_it(span)).collect()
    }

    fn operations(&self, kind: &str) -> Vec<&SeenSpan> {
        self.of(|span| span.attribute("messaging.operation.type") == kind)
    }

    fn posts(&self) -> Vec<&SeenSpan> {
        self.of(|span| !span.attribute("url.full").is_empty())
    }

    /// The message was settled once, as delivered; each POST belongs to a process, of which the first
    /// is that of the message, and the last one ended well.
    fn are_of_one_message(&self) {
        let (processes, settled) = (self.operations("process"), self.operations("settle"));
        assert_eq!(settled.len(), 1, "{:#?}", self.0);
        assert_eq!(settled[0].attribute("messaging.operation.name"), "ack");
        assert_eq!(settled[0].parent, processes[0].id, "{:#?}", self.0);
        assert!(!processes[processes.len() - 1].is_error, "{:#?}", self.0);
        for to_api in self.posts() {
            assert!(processes.iter().any(|process| process.id == to_api.parent));
        }
    }
}

/// The spans, once `count` POSTs were answered with 200.
async fn spans_of(collector: &Collector, count: usize) -> Vec<SeenSpan> {
    let is_end = |span: &SeenSpan| {
        let is_post = !span.attribute("url.full").is_empty();
        is_post && span.attribute("http.response.status_code") == "200"
    };
    collector.spans_when(count, is_end, PATIENCE).await;
    // The process ends behind its POST.
    let processes = |spans: &[SeenSpan]| {
        let posts = spans.iter().filter(|span| is_end(span));
        let parents: Vec<_> = posts.map(|span| span.parent.clone()).collect();
        parents
            .iter()
            .all(|parent| spans.iter().any(|span| span.id == *parent))
    };
    let spans = eventually("the processes have ended", PATIENCE, async || {
        let spans = collector.spans();
        processes(&spans).then_some(spans)
    })
    .await;
    are_conventional(spans.iter().flat_map(|span| span.attributes.keys()));
    spans
}

#[actix_rt::test]
async fn a_parked_record_is_processed_again_each_time_that_it_is_posted() {
    let (api, collector) = (Api::start(), Collector::start());
    api.behave(|_, post| {
        let is_bad = post.key.as_deref() == Some("bad");
        Conduct::Answer(if is_bad { 503 } else { 200 })
    });
    let schema = vec![("INGEST__SCHEMA".to_owned(), "any".to_owned())];
    let variables = [grpc_variables(), schema, collector.variables()].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    post(&node, "bad", "any").await;
    let mut number = 0;
    eventually("it is parked", PATIENCE, async || {
        // Others show that the API is well.
        post(&node, &format!("good-{number}"), "any").await;
        number += 1;
        (node.status().await["ledger"]["parked"] == 1).then_some(())
    })
    .await;
    api.behave(|_, _| Conduct::Answer(200));
    node.all_ended(number + 1, PATIENCE).await;
    let spans = spans_of(&collector, number + 1).await;
    let bad = RecordSpans::all(&spans, "bad");
    bad.are_of_one_message();
    let processes = bad.operations("process");
    assert!(processes.len() > 1, "{:#?}", bad.0);
    assert!(!processes[0].is_error, "it is on disk: {:#?}", bad.0);
    for again in &processes[1..processes.len() - 1] {
        assert_eq!(again.attribute("error.type"), "retry_later");
    }
    let posts = bad.posts();
    assert_eq!(posts[0].parent, processes[0].id);
    let (last, process) = (posts[posts.len() - 1], processes[processes.len() - 1]);
    assert_eq!(last.parent, process.id);
    assert!(process.began <= last.began && last.ended <= process.ended);
    assert_eq!(bad.operations("receive").len(), 0, "its lane is a call");
}

#[actix_rt::test]
async fn a_message_that_moves_to_disk_ends_its_process_and_not_its_post() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    let apis = SlowApi::start();
    apis.slow.delay(Duration::from_millis(1500));
    let node = apis.node(&nats.variables()).await;
    node.lane_is("nats", "up", PATIENCE).await;
    post(&node, "late", "slow").await;
    node.all_ended(1, PATIENCE).await;
    let spans = spans_of(&apis.collector, 1).await;
    let late = RecordSpans::all(&spans, "late");
    late.are_of_one_message();
    let [process] = late.operations("process")[..] else {
        panic!("{:#?}", late.0);
    };
    let [to_api] = late.posts()[..] else {
        panic!("{:#?}", late.0);
    };
    assert_eq!(to_api.parent, process.id);
    assert!(process.ended < to_api.ended, "{:#?}", late.0);
    let ack = late.operations("settle")[0];
    assert_eq!((ack.began, ack.ended), (process.ended, process.ended));
}

#[actix_rt::test]
async fn a_held_record_has_a_process_on_disk_that_settles_no_message() {
    const RECORDS: usize = 40;
    let apis = SlowApi::start();
    apis.slow.behave(|_, _| Conduct::Hang);
    let node = apis.node(&grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let keys: Vec<_> = (0..RECORDS)
        .map(|number| format!("held-{number}"))
        .collect();
    for key in &keys {
        post(&node, key, "slow").await;
    }
    eventually("all are on disk", PATIENCE, async || {
        let held = node.status().await["apis"]["slow"]["held"].as_u64();
        (held == Some(RECORDS as u64)).then_some(())
    })
    .await;
    apis.slow.behave(|_, _| Conduct::Answer(200));
    node.all_ended(RECORDS, PATIENCE).await;
    let spans = spans_of(&apis.collector, RECORDS).await;
    let mut held = 0;
    for key in &keys {
        let spans = RecordSpans::all(&spans, key);
        spans.are_of_one_message();
        match spans.operations("process")[..] {
            // It had a place, and its message moved while it was POSTed.
            [only] => {
                let last = spans.posts().pop().expect("a POST");
                assert!(only.ended < last.began, "{:#?}", spans.0);
            }
            // On disk without a POST, and again from there.
            _ => held += 1,
        }
    }
    assert!(held > RECORDS / 2, "{held}");
}
