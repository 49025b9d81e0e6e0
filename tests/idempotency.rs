//! Idempotency keys of a real node: what the same record gets, and another one.

use awc::http::StatusCode;
use futures_util::future::join_all;
use serde_json::json;

use crate::{
    ingest::{RECORD, Request, lines, post},
    support::{
        api::Api,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

/// What a request with a known key gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    New,
    Replay,
    /// The record at this index of a batch, or the only one.
    Reused(Option<u64>),
}

async fn expect(node: &Node, what: &str, request: Request, expected: Expected) {
    let (status, headers, body) = request.send_and_see(node).await;
    let replayed = headers.get("Idempotent-Replayed");
    let replayed = replayed.map(|value| value.to_str().expect("text"));
    match expected {
        Expected::New => assert_eq!((status.as_u16(), replayed), (202, None), "{what}: {body}"),
        Expected::Replay => {
            let answer = (status.as_u16(), replayed);
            assert_eq!(answer, (202, Some("true")), "{what}: {body}");
        }
        Expected::Reused(index) => {
            assert_eq!((status.as_u16(), replayed), (422, None), "{what}: {body}");
            let kind = "urn:waypost:problem:idempotency-key-reused";
            assert_eq!(body["type"], kind, "{what}");
            assert_eq!(body["index"].as_u64(), index, "{what}");
        }
    }
}

fn other(age: u8) -> String {
    RECORD.replace("42", &age.to_string())
}

/// Requests with known keys: the first two of each key, and what the second gets. No second one is
/// taken, so a restart changes nothing.
fn seconds() -> Vec<(&'static str, Request, Request, Expected)> {
    let key = |request: Request, key: &str| request.with("Idempotency-Key", key);
    let one = |name| key(post(RECORD), name);
    let another = |name| key(post(other(43)), name);
    let two = || format!("[{RECORD},{}]", other(43));
    let (replay, reused) = (Expected::Replay, Expected::Reused(None));
    let spaced = post(format!(" {RECORD}\n"));
    let with_path = post(RECORD.replacen('{', "{\"path\":\"mine\",", 1));
    let traced = one("e").with(
        "traceparent",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    );
    let as_lines = lines(&format!("{RECORD}\n{}\n", other(43)));
    let swapped = post(format!("[{},{RECORD}]", other(43)));
    let changed = post(format!("[{RECORD},{}]", other(44)));
    let longer = post(format!("[{RECORD},{},{RECORD}]", other(44)));
    vec![
        ("the same record", one("a"), one("a"), replay),
        ("another record", one("b"), another("b"), reused),
        ("white space around it", one("c"), key(spaced, "c"), replay),
        ("a path member", one("d"), key(with_path, "d"), replay),
        ("a trace context", one("e"), traced, replay),
        (
            "a lane that is named",
            one("f"),
            one("f").to("/grpc"),
            replay,
        ),
        ("the key quoted", one("g"), one("\"g\""), replay),
        ("the key bare", one("\"h\""), one("h"), replay),
        ("another, quoted", one("i"), another("\"i\""), reused),
        (
            "a batch",
            key(post(two()), "j"),
            key(post(two()), "\"j\""),
            replay,
        ),
        (
            "a batch as lines",
            key(post(two()), "k"),
            key(as_lines, "k"),
            replay,
        ),
        (
            "a record of a batch",
            key(post(two()), "l"),
            one("l/0"),
            replay,
        ),
        (
            "another, of a batch",
            key(post(two()), "m"),
            another("m/0"),
            reused,
        ),
        (
            "a batch in another order",
            key(post(two()), "n"),
            key(swapped, "n"),
            Expected::Reused(Some(0)),
        ),
        (
            "a batch with another record",
            key(post(two()), "o"),
            key(changed, "o"),
            Expected::Reused(Some(1)),
        ),
        (
            "a batch over a record",
            one("p/1"),
            key(longer, "p"),
            Expected::Reused(Some(1)),
        ),
        (
            "white space in it",
            one("q"),
            key(post(RECORD.replacen(':', ": ", 1)), "q"),
            reused,
        ),
    ]
}

#[actix_rt::test]
async fn a_key_gets_its_first_receipt_for_its_record_only_also_after_a_kill() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (what, first, second, expected) in seconds() {
        expect(&node, what, first, Expected::New).await;
        expect(&node, what, second, expected).await;
    }
    let before = node.at_rest(PATIENCE).await["accepted"].clone();
    // Refused with its batch, so not taken: the keys are free.
    for (key, record) in [("p/0", RECORD.to_owned()), ("p/2", other(44))] {
        let free = post(record).with("Idempotency-Key", key);
        expect(&node, "free", free, Expected::New).await;
    }
    assert_eq!(before, json!(23), "nothing else was routed");

    node.killed_and_started().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for (what, _, second, expected) in seconds() {
        expect(&node, what, second, expected).await;
    }
    let ledger = node.at_rest(PATIENCE).await;
    assert_eq!(ledger["accepted"], 0, "nothing was routed again");
    assert_eq!(api.count(), 25);
}

#[actix_rt::test]
async fn of_two_records_that_race_for_a_key_one_is_taken_and_the_other_never_gets_a_202() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for round in 0..20 {
        let racers = (0..16).map(async |number: u8| {
            let age = number % 2;
            let request = post(other(age)).with("Idempotency-Key", format!("race-{round}"));
            (age, request.send(&node).await)
        });
        let ended = join_all(racers).await;
        let taken: Vec<_> = ended
            .iter()
            .filter(|(_, (status, ..))| *status == StatusCode::ACCEPTED)
            .collect();
        let winner = taken.first().expect("one is taken").0;
        for (age, (status, _, body)) in &ended {
            let expected = if *age == winner { 202 } else { 422 };
            assert_eq!(status.as_u16(), expected, "{body}");
        }
        api.wait_for(round + 1, PATIENCE).await;
        let body = api.posts()[round].body.clone();
        let body = String::from_utf8_lossy(&body).into_owned();
        assert!(body.contains(&format!("\"age\":{winner},")), "{body}");
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 20);
}
