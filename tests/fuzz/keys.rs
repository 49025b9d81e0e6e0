//! The header `Idempotency-Key`, and the table of keys with its files.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::LazyLock,
    time::Duration,
};

use actix_rt::System;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
    test_runner::TestRunner,
};
use regex::Regex;
use tempfile::TempDir;
use waypost::{
    delivery::Receipt,
    http::ingest::idempotency_key,
    idempotency::{Claim, IdempotencyStore},
    lane_id::LaneId,
    record::Record,
};

use super::cases;

/// The most characters of a key.
const KEY_MAX: usize = 255;

/// A line of the header: nearly a key, bare or quoted.
fn line() -> impl Strategy<Value = Vec<u8>> {
    const PIECES: &[&str] = &[
        "a", "B", "7", "/", "-", "=", ";", ",", "%20", "\\", "\"", "\\\"", "\\\\", "\\a", " ",
        "\t", "é", "\u{7f}",
    ];
    let pieces = vec(select(PIECES), 0..8).prop_map(|pieces| pieces.concat().into_bytes());
    let plain = "[!-~]{1,12}".prop_map(String::into_bytes);
    let long = (KEY_MAX - 3..KEY_MAX + 4).prop_map(|length| vec![b'k'; length]);
    // Escapes count once.
    let escaped = (KEY_MAX - 3..KEY_MAX + 4).prop_map(|length| br#"\""#.repeat(length));
    let text =
        prop_oneof![4 => pieces, 2 => plain, 1 => long, 1 => escaped, 1 => vec(any::<u8>(), 0..4)];
    let ends = select(
        &[
            ("", ""),
            ("", ""),
            ("\"", "\""),
            ("\"", "\""),
            ("\"", ""),
            ("", "\""),
        ][..],
    );
    (text, ends).prop_map(|(text, (begin, end))| [begin.as_bytes(), &text, end.as_bytes()].concat())
}

/// The key of the only line, as RFC 9651 (3.3.3) and the contract have it.
fn expected(line: &[u8]) -> Option<String> {
    static QUOTED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r#"^"((?:[^"\\]|\\["\\])*)"$"#).expect("an expression"));
    static ESCAPED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\\(.)").expect("an expression"));
    let line = std::str::from_utf8(line).ok()?;
    let key = if line.starts_with('"') {
        let quoted = QUOTED.captures(line)?.get(1)?.as_str();
        ESCAPED.replace_all(quoted, "$1").into_owned()
    } else {
        line.to_owned()
    };
    let is_visible = key.bytes().all(|byte| byte.is_ascii_graphic());
    (is_visible && (1..=KEY_MAX).contains(&key.len())).then_some(key)
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_key_is_what_its_header_says(lines in vec(line(), 0..3)) {
        let mut headers = HeaderMap::new();
        let name = HeaderName::from_static("idempotency-key");
        for line in &lines {
            // A line with other characters is no header.
            let Ok(value) = HeaderValue::from_bytes(line) else { return Ok(()) };
            headers.append(name.clone(), value);
        }
        let key = idempotency_key(&headers);
        match &lines[..] {
            [] => prop_assert!(matches!(key, Ok(None))),
            [line] => {
                let key = key.ok().flatten();
                let expected = expected(line);
                prop_assert_eq!(key.as_deref(), expected.as_deref());
            }
            _ => prop_assert!(key.is_err()),
        }
    }
}

/// An event in the life of the table.
#[derive(Clone, Debug)]
enum Event {
    /// A request with this key and this record. It gets a receipt, or none.
    Request {
        key: usize,
        record: usize,
        receipt: Option<Receipt>,
    },
    /// A new process, after a damage to one of the files.
    Start(Option<(bool, Damage)>),
}

#[derive(Clone, Debug)]
enum Damage {
    /// Other bytes at a place.
    Bytes(Index, Vec<u8>),
    /// The end is missing.
    Cut(Index),
    /// More bytes at the end.
    Tail(Vec<u8>),
}

fn event() -> impl Strategy<Value = Event> {
    const RECEIPTS: &[Receipt] = &[
        Receipt::Spool,
        Receipt::Lane(LaneId::Nats),
        Receipt::Lane(LaneId::Grpc),
    ];
    let receipt = option::weighted(0.8, select(RECEIPTS));
    let request = (0..6_usize, 0..3_usize, receipt);
    let request = request.prop_map(|(key, record, receipt)| Event::Request {
        key,
        record,
        receipt,
    });
    let bytes = vec(any::<u8>(), 1..4);
    let damage = prop_oneof![
        (any::<Index>(), bytes).prop_map(|(at, bytes)| Damage::Bytes(at, bytes)),
        any::<Index>().prop_map(Damage::Cut),
        vec(any::<u8>(), 1..40).prop_map(Damage::Tail),
    ];
    let start = option::of((any::<bool>(), damage)).prop_map(Event::Start);
    prop_oneof![5 => request, 1 => start]
}

fn do_damage(file: &Path, damage: &Damage) {
    // There may be none yet.
    let Ok(found) = fs::metadata(file) else {
        return;
    };
    let length = usize::try_from(found.len()).expect("a small file");
    let mut file = OpenOptions::new()
        .write(true)
        .open(file)
        .expect("the file of a test");
    match damage {
        Damage::Bytes(at, bytes) => {
            let at = at.index(length + 1) as u64;
            file.seek(SeekFrom::Start(at)).expect("a place");
            file.write_all(bytes).expect("room");
        }
        Damage::Cut(at) => file.set_len(at.index(length + 1) as u64).expect("shorter"),
        Damage::Tail(bytes) => {
            file.seek(SeekFrom::End(0)).expect("the end");
            file.write_all(bytes).expect("room");
        }
    }
}

fn record(key: usize, body: usize) -> Record {
    Record {
        id: format!("key-{key}").into(),
        body: format!("{{\"a\":{body}}}").into(),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

/// A key answers with the receipt that it got, or is new after a damage; it never has another's.
async fn check_table(events: &[Event]) {
    let folder = TempDir::new().expect("a temporary folder");
    let open = || IdempotencyStore::open(folder.path(), Duration::from_hours(1)).expect("a thread");
    let mut store = open();
    // More than one of a key only after a damage, which may bring back the first.
    let mut known: HashMap<usize, Vec<(usize, Receipt)>> = HashMap::new();
    let mut is_damaged = false;
    for event in events {
        match event {
            Event::Start(damage) => {
                drop(store);
                if let Some((is_young, damage)) = damage {
                    let name = if *is_young { "keys.young" } else { "keys.old" };
                    do_damage(&folder.path().join(name), damage);
                    is_damaged = true;
                }
                store = open();
            }
            Event::Request {
                key,
                record: body,
                receipt,
            } => {
                let before = known.entry(*key).or_default();
                match store.claim(&record(*key, *body)).await {
                    Claim::Duplicate(first) => assert!(before.contains(&(*body, first))),
                    Claim::Reused => assert!(before.iter().any(|(of, _)| of != body)),
                    Claim::New(reservation) => {
                        assert!(before.is_empty() || is_damaged, "key {key} is forgotten");
                        if let Some(receipt) = *receipt {
                            reservation.complete(receipt).await;
                            before.push((*body, receipt));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_key_has_its_first_receipt_or_is_new_after_a_damage() {
    let system = System::new();
    let mut runner = TestRunner::new(cases());
    let checked = runner.run(&vec(event(), 1..24), |events| {
        system.block_on(check_table(&events));
        Ok(())
    });
    checked.unwrap_or_else(|why| panic!("{why}"));
}
