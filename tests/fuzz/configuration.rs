//! The configuration.

use std::{collections::BTreeMap, fs};

use proptest::{collection::vec, prelude::*, sample::select};
use waypost::config::Config;

use super::{cases, damaged};

const SETTINGS: &[&str] = &[
    "[ingest]",
    "schema = \"any\"",
    "listen = \"127.0.0.1:0\"",
    "max_body = \"1MiB\"",
    "max_record = 5",
    "key_window = \"1h 30m\"",
    "numbers = \"exact\"",
    "[api]",
    "url = \"http://localhost:1/\"",
    "give_up_after = \"never\"",
    "retry_statuses = [408, \"5xx\"]",
    "rate = \"5/s\"",
    "[apis.billing]",
    "[router]",
    "policy = \"hash\"",
    "hash_on = \"/a\"",
    "[lanes.nats]",
    "url = \"nats://localhost\"",
    "weight = 0",
    "tag = \"é\"",
    "[lanes.grpc]",
    "peers = [\"http://a:1\"]",
    "[[routes]]",
    "when = { pointer = \"/a\", in = [1, \"b\"] }",
    "when = { header = \"X\", matches = \"^a\" }",
    "lanes = [\"nats\"]",
    "api = \"billing\"",
    "[spool]",
    "max = \"2MiB\"",
    "[admin]",
    "hosts = [\".a.b\"]",
    "read_only = true",
];
const TORN_SETTINGS: &[&str] = &[
    "=", "[", "]", "\"", "\n", "{", "}", "'", "#", ".", "\u{0}", "é",
];

/// A configuration is read, or each mistake has its place; and what is read is read again the same.
fn check_configuration(text: &[u8]) {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("room");
    let nothing = BTreeMap::new();
    let shown = String::from_utf8_lossy(text);
    match Config::load(Some(file.path()), &nothing, &[]) {
        Ok(config) => {
            fs::write(file.path(), config.to_toml()).expect("room");
            let again = Config::load(Some(file.path()), &nothing, &[]);
            assert_eq!(again.as_ref(), Ok(&config), "{shown}");
        }
        Err(mistakes) => {
            assert!(!mistakes.is_empty(), "{shown}");
            for mistake in mistakes {
                assert!(
                    !mistake.place.is_empty() && !mistake.what.is_empty(),
                    "{shown}"
                );
                assert!(!mistake.to_string().contains('\n'), "{shown}: {mistake}");
            }
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_configuration_is_read_or_refused_with_places(
        text in damaged(vec(select(SETTINGS), 0..12).prop_map(|lines| lines.join("\n")), TORN_SETTINGS)
    ) {
        check_configuration(&text);
    }
}
