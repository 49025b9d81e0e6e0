//! The header `Idempotency-Key`, and the table of keys with its files.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::LazyLock,
    time::Duration,
};

use actix_rt::{System, SystemRunner};
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use regex::Regex;
use tempfile::TempDir;
use waypost::{
    delivery::Receipt,
    http::ingest::idempotency_key,
    idempotency::{Claim, IdempotencyStore},
    lane_id::LaneId,
    record::Record,
};

/// The most characters of a key.
pub const KEY_MAX: usize = 255;

/// The receipts of the events.
pub const RECEIPTS: &[Receipt] = &[
    Receipt::Spool,
    Receipt::Lane(LaneId::Nats),
    Receipt::Lane(LaneId::Grpc),
];

/// The lines of the header.
pub fn key(bytes: &[u8]) {
    let lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
    check_key(&lines);
}

/// An event for each four bytes.
pub fn key_table(bytes: &[u8]) {
    thread_local! {
        static SYSTEM: SystemRunner = System::new();
    }
    let (events, _) = bytes.as_chunks();
    let events: Vec<_> = events.iter().copied().map(event).collect();
    SYSTEM.with(|system| system.block_on(check_table(&events)));
}

fn event([kind, a, b, c]: [u8; 4]) -> Event {
    let at = u16::from_le_bytes([b, c]);
    let damage = match kind {
        ..200 => {
            return Event::Request {
                key: usize::from(a % 6),
                record: usize::from(b % 3),
                receipt: RECEIPTS.get(usize::from(c) % (RECEIPTS.len() + 1)).copied(),
            };
        }
        200..215 => None,
        215..230 => Some(Damage::Bytes(at, vec![a])),
        230..245 => Some(Damage::Cut(at)),
        245.. => Some(Damage::Tail(vec![b, c])),
    };
    Event::Start(damage.map(|damage| (a % 2 == 0, damage)))
}

/// A key is what its header says.
pub fn check_key(lines: &[&[u8]]) {
    let mut headers = HeaderMap::new();
    let name = HeaderName::from_static("idempotency-key");
    for line in lines {
        // A line with other characters is no header.
        let Ok(value) = HeaderValue::from_bytes(line) else {
            return;
        };
        headers.append(name.clone(), value);
    }
    let key = idempotency_key(&headers);
    match lines {
        [] => assert!(matches!(key, Ok(None))),
        [line] => assert_eq!(key.ok().flatten().as_deref(), expected(line).as_deref()),
        _ => assert!(key.is_err()),
    }
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

/// An event in the life of the table.
#[derive(Clone, Debug)]
pub enum Event {
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
pub enum Damage {
    /// Other bytes at a place, which is counted on from the beginning again at the end.
    Bytes(u16, Vec<u8>),
    /// The end is missing.
    Cut(u16),
    /// More bytes at the end.
    Tail(Vec<u8>),
}

fn do_damage(file: &Path, damage: &Damage) {
    // There may be none yet.
    let Ok(found) = fs::metadata(file) else {
        return;
    };
    let place = |at| u64::from(at) % (found.len() + 1);
    let mut file = OpenOptions::new()
        .write(true)
        .open(file)
        .expect("the file of a test");
    match damage {
        Damage::Bytes(at, bytes) => {
            let at = place(*at);
            file.seek(SeekFrom::Start(at)).expect("a place");
            file.write_all(bytes).expect("room");
        }
        Damage::Cut(at) => file.set_len(place(*at)).expect("shorter"),
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
pub async fn check_table(events: &[Event]) {
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
