//! Standard Webhooks signatures, both ways, with the reference library of another language: Python's
//! `standardwebhooks`.

use std::{
    fs,
    io::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use awc::http::{StatusCode, header};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{
    ingest::{RECORD, Request, begun, ended, post},
    support::{
        api::{Api, Conduct, Post},
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        python::answers,
    },
};

const FIRST: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const SECOND: &str = "whsec_c2Vjb25kIGtleSBvZiB0aGlydHkgYnl0ZXM=";

/// Signs, or verifies, each line of its input. A line is a JSON object; the answer is a signature, or
/// the JSON that was signed, null if it was not.
const PROGRAM: &str = r#"
import json, sys
from datetime import datetime, timezone
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
for line in sys.stdin:
    asked = json.loads(line)
    webhook = Webhook(asked["key"])
    if "signature" in asked:
        headers = {"webhook-id": asked["id"], "webhook-timestamp": asked["at"], "webhook-signature": asked["signature"]}
        try:
            print(json.dumps(webhook.verify(asked["body"], headers)))
        except WebhookVerificationError:
            print("null")
    else:
        at = datetime.fromtimestamp(int(asked["at"]), tz=timezone.utc)
        print(json.dumps(webhook.sign(asked["id"], at, asked["body"])))
"#;

/// What the reference library answers. `None` if it is not installed, which is a failure in CI.
fn library(asked: &[Value]) -> Option<Vec<Value>> {
    answers("standardwebhooks", PROGRAM, asked)
}

fn file(lines: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(lines.as_bytes()).expect("room");
    file
}

async fn node(api: &Api, key: &str, file: &NamedTempFile) -> Node {
    let path = file.path().display().to_string();
    let variables = [&grpc_variables()[..], &[(key.to_owned(), path)]].concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}

/// The parts of a request, signed by the reference library.
#[derive(Clone)]
struct Signed {
    id: String,
    at: String,
    signature: String,
    body: String,
}

impl Signed {
    fn new(key: &str, id: &str, at: u64, body: &str) -> Option<Self> {
        let at = at.to_string();
        let asked = json!({"key": key, "id": id, "at": at, "body": body});
        let signature = library(&[asked])?.remove(0);
        Some(Self {
            id: id.into(),
            at,
            signature: signature.as_str().expect("text").into(),
            body: body.into(),
        })
    }

    fn request(self) -> Request {
        post(self.body)
            .with("webhook-id", self.id)
            .with("webhook-timestamp", self.at)
            .with("webhook-signature", self.signature)
    }
}

#[actix_rt::test]
async fn a_request_that_the_reference_library_signs_is_taken_and_no_other() {
    let Some(signed) = Signed::new(FIRST, "msg_1", now(), RECORD) else {
        return;
    };
    let api = Api::start();
    let file = file(&format!("{SECOND}\n{FIRST}\n"));
    let node = node(&api, "INGEST__SIGNING_KEYS_FILE", &file).await;
    let other_key = "whsec_YSBrZXkgb2YgYSBzdHJhbmdlciB0byB0aGUgbm9kZQ==";
    let with = |change: &dyn Fn(&mut Signed)| {
        let mut changed = signed.clone();
        change(&mut changed);
        changed.request()
    };
    let by = |key: &str, at: u64| {
        let signed = Signed::new(key, "msg_2", at, RECORD);
        signed.expect("it is installed").request()
    };
    let refused = [
        post(RECORD),
        with(&|signed| signed.body = RECORD.replace("42", "43")),
        with(&|signed| signed.body.push(' ')),
        with(&|signed| signed.body = "{]".into()),
        with(&|signed| signed.id = "msg_3".into()),
        with(&|signed| signed.at = (now() + 1).to_string()),
        with(&|signed| signed.at = "now".into()),
        with(&|signed| signed.signature = signed.signature.replace("v1,", "v1a,")),
        with(&|signed| signed.signature = "v1,".into()),
        with(&|_| {}).with("webhook-id", "msg_1"),
        with(&|_| {}).with("webhook-signature", "v1,AAAA"),
        by(other_key, now()),
        by(FIRST, now() - 400),
        by(FIRST, now() + 400),
    ];
    for (at, request) in refused.into_iter().enumerate() {
        let (status, headers, problem) = request.send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{at}: {problem}");
        assert_eq!(problem["type"], "urn:waypost:problem:signature", "{at}");
        let challenge = headers.get(header::WWW_AUTHENTICATE).expect("a challenge");
        assert_eq!(challenge, "StandardWebhooks realm=\"waypost\"");
    }
    let (status, _, _) = post("").by(awc::http::Method::GET).send(&node).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 0);

    let (status, _, receipt) = signed.clone().request().send(&node).await;
    assert_eq!(
        (status, &receipt["id"]),
        (StatusCode::ACCEPTED, &json!("msg_1"))
    );
    // Somebody who has seen the request sends it again.
    let (status, headers, again) = signed.request().send_and_see(&node).await;
    assert_eq!((status, again), (StatusCode::ACCEPTED, receipt));
    assert!(headers.contains_key("idempotent-replayed"));
    // Each of the node's keys counts.
    let second = Signed::new(SECOND, "msg_4", now(), RECORD).expect("it is installed");
    let request = second.clone().request().with("Idempotency-Key", "msg_4");
    let (_, _, receipt) = request.send(&node).await;
    assert_eq!(receipt["id"], "msg_4");
    let batch = Signed::new(FIRST, "msg_5", now(), &format!("[{RECORD},{RECORD}]"));
    let (_, _, receipt) = batch.expect("it is installed").request().send(&node).await;
    assert_eq!(receipt["records"][1]["id"], "msg_5/1", "{receipt}");
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 4);

    // A body of the second key is on its way while that is removed.
    let late = Signed::new(SECOND, "msg_6", now(), RECORD).expect("it is installed");
    let (half, rest) = RECORD.as_bytes().split_at(9);
    let head = format!(
        "POST / HTTP/1.1\r\nwebhook-id: {}\r\nwebhook-timestamp: {}\r\nwebhook-signature: {}",
        late.id, late.at, late.signature
    );
    let slow = begun(node.ingest, &head, half, rest).await;
    fs::write(file.path(), FIRST).expect("room");
    eventually("the second key is gone", PATIENCE, async || {
        let (status, _, _) = second.clone().request().send(&node).await;
        (status == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    let answer = ended(slow, rest).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let status = node.status().await;
    assert_eq!(status["files"][0]["key"], "ingest.signing_keys_file");
    for told in [status.to_string(), node.log()] {
        assert!(!told.contains(&FIRST[6..]) && !told.contains(&SECOND[6..]));
    }
}

#[actix_rt::test]
async fn a_signed_request_that_comes_again_with_other_headers_is_routed_once() {
    let event = json!({"specversion": "1.0", "id": "7", "source": "/a", "type": "t", "data": {}});
    let plain = Signed::new(FIRST, "msg_1", now(), RECORD);
    let event = Signed::new(FIRST, "msg_2", now(), &event.to_string());
    let (Some(plain), Some(event)) = (plain, event) else {
        return;
    };
    let api = Api::start();
    let file = file(FIRST);
    let path = file.path().display().to_string();
    let own = [
        ("INGEST__SIGNING_KEYS_FILE".to_owned(), path),
        ("INGEST__SCHEMA".to_owned(), "any".to_owned()),
    ];
    let node = Node::start(&api.url(), &[&grpc_variables()[..], &own].concat()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let structured = "application/cloudevents+json";
    let as_type = |signed: &Signed, media_type: &str| {
        let request = signed.clone().request();
        request.with("Content-Type", media_type)
    };
    let (status, _, first) = plain.clone().request().send(&node).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{first}");
    let (status, _, of_event) = as_type(&event, structured).send(&node).await;
    assert_eq!(
        (status, &of_event["id"]),
        (StatusCode::ACCEPTED, &json!("/a|7"))
    );

    let as_event = |id: &str| {
        let request = plain.clone().request().with("ce-specversion", "1.0");
        let request = request.with("ce-id", id.to_owned()).with("ce-source", "/a");
        request.with("ce-type", "t")
    };
    let reused = (StatusCode::UNPROCESSABLE_ENTITY, "idempotency-key-reused");
    let other_key = (StatusCode::BAD_REQUEST, "idempotency-key");
    for (name, request, (expected, kind)) in [
        (
            "another key",
            plain.clone().request().with("Idempotency-Key", "other"),
            other_key,
        ),
        (
            "another key of an event",
            as_type(&event, structured).with("Idempotency-Key", "other"),
            other_key,
        ),
        ("as lines", as_type(&plain, "application/x-ndjson"), reused),
        ("as an event", as_event("8"), reused),
        (
            "an event as a record",
            as_type(&event, "application/json"),
            reused,
        ),
        (
            "an event as lines",
            as_type(&event, "application/x-ndjson"),
            reused,
        ),
    ] {
        let (status, _, problem) = request.send(&node).await;
        assert_eq!(status, expected, "{name}: {problem}");
        assert_eq!(
            problem["type"],
            format!("urn:waypost:problem:{kind}"),
            "{name}"
        );
    }
    // In its own form it has its receipt, by whatever lane it is asked for.
    let again = plain.clone().request().to("/grpc").with("traceparent", "x");
    let (status, headers, receipt) = again.send_and_see(&node).await;
    assert_eq!((status, receipt), (StatusCode::ACCEPTED, first));
    assert!(headers.contains_key("idempotent-replayed"));
    let (status, _, receipt) = as_type(&event, structured).send(&node).await;
    assert_eq!((status, receipt), (StatusCode::ACCEPTED, of_event));
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 2);
    assert_eq!(api.count(), 2);
}

/// Whether the reference library verifies each POST with `key`. `None` if it is not installed.
fn are_verified(key: &str, posts: &[Post]) -> Option<bool> {
    let asked = posts.iter().map(|post| {
        let [id, at, signature] = post
            .webhook
            .clone()
            .map(|header| header.expect("it is signed"));
        let body = std::str::from_utf8(&post.body).expect("text");
        json!({"key": key, "id": id, "at": at, "signature": signature, "body": body})
    });
    let answers = library(&asked.collect::<Vec<_>>())?;
    let bodies = posts.iter().map(|post| {
        let body: Value = serde_json::from_slice(&post.body).expect("JSON");
        body
    });
    Some(answers.into_iter().eq(bodies))
}

#[actix_rt::test]
async fn the_reference_library_verifies_each_post_at_its_own_time_with_the_first_key() {
    let api = Api::start();
    let file = file(&format!("{FIRST}\n{SECOND}\n"));
    let node = node(&api, "API__SIGNING_KEY_FILE", &file).await;
    // Each record is tried again after more than a second.
    api.behave(|tries, post| match post.key.as_deref() {
        Some("a.b%c") if tries < 3 => Conduct::AnswerWith {
            status: 503,
            headers: vec![("retry-after", "2".into())],
            body: Vec::new(),
        },
        _ => Conduct::Answer(200),
    });
    for key in ["plain", "a.b%c"] {
        node.post("/", key, RECORD.into()).await.expect("an answer");
    }
    node.all_ended(2, PATIENCE).await;
    let posts = api.posts();
    let Some(is_well) = are_verified(FIRST, &posts) else {
        return;
    };
    assert!(is_well, "{posts:?}");
    assert_eq!(are_verified(SECOND, &posts[..1]), Some(false));
    let part = |post: &Post, at: usize| post.webhook[at].clone().expect("it is signed");
    let ids: Vec<_> = posts.iter().map(|post| part(post, 0)).collect();
    assert!(ids.contains(&"plain".into()), "{ids:?}");
    let tries: Vec<_> = posts
        .iter()
        .filter(|post| part(post, 0) == "a%2Eb%25c")
        .collect();
    assert!(tries.len() > 1, "{ids:?}");
    assert_ne!(part(tries[0], 1), part(tries[tries.len() - 1], 1));

    fs::write(file.path(), format!("{SECOND}\n{FIRST}\n")).expect("room");
    let mut number = 0;
    eventually("the other key signs", PATIENCE, async || {
        number += 1;
        let key = format!("later-{number}");
        node.post("/", &key, RECORD.into())
            .await
            .expect("an answer");
        node.all_ended(2 + number, PATIENCE).await;
        let newest = api.posts().pop().expect("a POST");
        are_verified(SECOND, &[newest])?.then_some(())
    })
    .await;
    for told in [node.status().await.to_string(), node.log()] {
        assert!(!told.contains(&FIRST[6..]) && !told.contains(&SECOND[6..]));
    }
}
