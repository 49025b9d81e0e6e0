//! The configuration.

use std::collections::BTreeMap;

use proptest::{
    collection::{btree_map, vec},
    prelude::*,
    sample::{select, subsequence},
};
use waypost::config::Config;

use super::{cases, checks::configuration::check_configuration, damaged};

const BOOLS: &[&str] = &["true", "false"];
const NUMBERS: &[&str] = &[
    "0", "1", "3", "64", "128", "1000", "-1", "1.5", "1_000", "0x10",
];
const DURATIONS: &[&str] = &[
    "\"1s\"",
    "\"250ms\"",
    "\"1h 30m\"",
    "\"never\"",
    "\"0s\"",
    "\"584942417355y\"",
    "\"1 day\"",
];
const SIZES: &[&str] = &[
    "\"1MiB\"",
    "\"1B\"",
    "5",
    "\"16EiB\"",
    "\"1.5KiB\"",
    "\"1GiB\"",
    "0",
];
const RATES: &[&str] = &[
    "\"5/s\"",
    "\"30/m\"",
    "\"1/h\"",
    "\"0/s\"",
    "\"4294967295/s\"",
    "\"1/d\"",
];
const ADDRESSES: &[&str] = &[
    "\"127.0.0.1:0\"",
    "\"[::1]:8000\"",
    "\"0.0.0.0:1\"",
    "\"a:1\"",
    "\"127.0.0.1\"",
];
const URLS: &[&str] = &[
    "\"http://localhost:1/\"",
    "\"https://a.example/b?c=%20\"",
    "\"nats://localhost\"",
    "\"nats://me:hunter2@a:1,tls://b\"",
    "\"amqp://me:hunter2@a/%2f\"",
    "\"amqps://me:hunter2%40@[::1]:5671\"",
    "\"https://me:hunter2@a/\"",
    "\"http://a b/\"",
    "\"http://é.example/\"",
];
const FILES: &[&str] = &[
    "\"/dev/null\"",
    "\"Cargo.toml\"",
    "\"none\"",
    "\"src\"",
    "\"a\\u0000b\"",
];
const TEXTS: &[&str] = &[
    "\"any\"",
    "\"case\"",
    "\"exact\"",
    "\"a-b_1\"",
    "\"a.b\"",
    "\"é 😀\"",
    "\"\"",
    "\"id\"",
    "\"/a~1b\"",
    "\"header:X\"",
    "\"hash\"",
    "\"failover\"",
    "\"weighted\"",
    "\"broadcast\"",
    "\"adaptive\"",
    "\"disk\"",
    "\"lane\"",
    "\"binary\"",
    "\"structured\"",
    "\"always\"",
    "\"replicated\"",
    "'a\"b\\c'",
];
const LISTS: &[&str] = &[
    "[]",
    "[408, \"5xx\"]",
    "[\"nats\"]",
    "[\"grpc\", \"nats\"]",
    "[\"https://a.example\"]",
    "[\"http://a:1\"]",
    "[\".a.b\", \"c\"]",
];
const CONDITIONS: &[&str] = &[
    "{ pointer = \"/a\", in = [1, \"b\"] }",
    "{ pointer = \"/a/0\", range = { min = 1, max = 2.5 } }",
    "{ pointer = \"\", exists = true }",
    "{ header = \"X\", matches = \"^a|b$\" }",
    "{ header = \"X\", prefix = \"é\" }",
    "{ header = \"X\", equals = \"a\", in = [] }",
];

/// The values that a key may have, and some that it may not.
fn values(key: &str) -> &'static [&'static str] {
    match key {
        "read_only" | "keep_orders" | "require_key" => BOOLS,
        "when" => CONDITIONS,
        "listen" => ADDRESSES,
        "rate" => RATES,
        "cors_origins" | "retry_statuses" | "hosts" | "peers" | "lanes" => LISTS,
        "url" | "monitor" | "otlp" | "endpoint" => URLS,
        "max_body" | "max_record" | "min_body_rate" | "spool_max" | "max" => SIZES,
        _ if key.ends_with("_file") => FILES,
        _ if ["timeout", "window", "keep_alive", "after"]
            .iter()
            .any(|end| key.ends_with(end)) =>
        {
            DURATIONS
        }
        "max_depth" | "max_members" | "max_connections" | "max_headers" | "concurrency"
        | "batch" | "weight" | "bundle" | "replicas" => NUMBERS,
        _ => TEXTS,
    }
}

/// A line that sets this key.
fn setting(key: String) -> impl Strategy<Value = String> {
    const ALL: &[&[&str]] = &[
        BOOLS, NUMBERS, DURATIONS, SIZES, RATES, ADDRESSES, URLS, FILES, TEXTS, LISTS, CONDITIONS,
    ];
    let any_value = select(ALL).prop_flat_map(select);
    let value = prop_oneof![12 => select(values(&key)), 1 => any_value];
    value.prop_map(move |value| format!("{key} = {value}"))
}

/// A section with some of its keys.
fn section() -> impl Strategy<Value = String> {
    let mut sections: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for key in Config::keys() {
        let (section, key) = key.rsplit_once('.').expect("section and key");
        let keys = sections.entry(format!("[{section}]")).or_default();
        keys.push(key.to_owned());
    }
    let api = sections["[api]"].clone();
    sections.insert("[apis.billing]".into(), api);
    let route = ["when", "lanes", "api", "policy", "hash_on"];
    sections.insert("[[routes]]".into(), route.map(ToOwned::to_owned).into());
    let sections: Vec<_> = sections.into_iter().collect();
    select(sections).prop_flat_map(|(section, keys)| {
        let most = keys.len().min(4);
        let some = subsequence(keys, 0..=most);
        let lines = some.prop_flat_map(|keys| keys.into_iter().map(setting).collect::<Vec<_>>());
        lines.prop_map(move |lines| format!("{section}\n{}\n", lines.join("\n")))
    })
}

/// Variables of this program.
fn variables() -> impl Strategy<Value = BTreeMap<String, String>> {
    let keys: Vec<_> = Config::keys().collect();
    let variable = select(keys).prop_flat_map(|key| {
        let (_, name) = key.rsplit_once('.').expect("section and key");
        let value =
            select(values(name)).prop_map(|value| value.trim_matches(['"', '[', ']']).to_owned());
        (
            Just(format!("WAYPOST_{}", key.replace('.', "__").to_uppercase())),
            value,
        )
    });
    let some = vec(variable, 1..3).prop_map(|all| all.into_iter().collect());
    let foreign = btree_map("WAYPOST_[A-Z_]{1,12}", "[ -~]{0,9}", 0..2);
    prop_oneof![4 => Just(BTreeMap::new()), 2 => some, 1 => foreign]
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_configuration_is_read_or_refused_with_places(
        text in damaged(vec(section(), 0..5).prop_map(|sections| sections.concat()), TORN_SETTINGS),
        variables in variables(),
    ) {
        check_configuration(&text, &variables);
    }
}

const TORN_SETTINGS: &[&str] = &[
    "=", "[", "]", "\"", "\n", "{", "}", "'", "#", ".", "\u{0}", "é", "\"\"\"", "\\",
];
