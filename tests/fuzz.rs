//! Any bytes, and bytes that are nearly right, for everything that reads what others have written.
//! Readers are compared with other readers, and with what writes for them.
//!
//! `PROPTEST_CASES` is the number of cases of each test, 256 by default.

mod checks;
mod configuration;
mod event_posts;
mod events;
mod grpc;
mod keys;
mod messages;
mod orders;
mod records;

use std::fs;

use proptest::{collection::vec, prelude::*, sample::Index, sample::select};

use self::checks::READERS;

/// Texts that are nearly JSON.
pub const TORN: &[&str] = &[
    "\"\\ud800\"",
    "\"\\udc00\\ud800\"",
    "01",
    "+1",
    "1.",
    ".5",
    "1e",
    "nul",
    "\u{feff}",
    "\0",
    "\"",
    "'a'",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "//",
    "NaN",
    "\"\\x\"",
    "\"\n\"",
    "\u{a0}",
    "{\"a\":1,\"a\":2}",
    "{}{}",
    "[,]",
];

/// The texts, half of them with a piece cut out, put in or replaced.
pub fn damaged(
    texts: impl Strategy<Value = String>,
    pieces: &'static [&'static str],
) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        select(pieces).prop_map(|piece| piece.as_bytes().to_vec()),
        vec(any::<u8>(), 0..3),
    ];
    let change = (any::<Index>(), 0..4_usize, piece);
    let changes = prop_oneof![Just(Vec::new()), vec(change, 1..3)];
    (texts, changes).prop_map(|(text, changes)| changed(text.into_bytes(), changes))
}

/// The bytes with some of them replaced: from where, how many, and by what.
pub fn changed(mut bytes: Vec<u8>, changes: Vec<(Index, usize, Vec<u8>)>) -> Vec<u8> {
    for (at, length, piece) in changes {
        let at = at.index(bytes.len() + 1);
        let end = (at + length).min(bytes.len());
        bytes.splice(at..end, piece);
    }
    bytes
}

pub fn cases() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[test]
fn each_reader_keeps_its_promise_on_what_a_fuzzer_has_kept() {
    for (reader, check) in READERS {
        let folder = format!("{}/fuzz/corpus/{reader}", env!("CARGO_MANIFEST_DIR"));
        let mut files = fs::read_dir(&folder).expect("each has some").peekable();
        assert!(files.peek().is_some(), "{folder} is empty");
        for file in files {
            let file = file.expect("a readable folder").path();
            println!("{}", file.display());
            check(&fs::read(file).expect("a readable file"));
        }
    }
    let folders = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus"));
    assert_eq!(folders.expect("the corpus").count(), READERS.len());
}
