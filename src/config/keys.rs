//! The one table of keys: what each sets, what it allows, how it is shown. File, environment, flags, `waypost check` and the
//! messages about mistakes all read it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use bytesize::ByteSize;

use super::{Ack, Config, Policy, url as hide};
use crate::{
    config::{BUNDLE_MAX, CONCURRENCY_MAX},
    lane_id::LaneId,
    record::Schema,
};

/// A value before it is understood: of a TOML file, or the text of a variable or flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Integer(String),
    List(Vec<String>),
    /// Of a type that no key takes; its name.
    Other(&'static str),
}

/// One key.
pub struct Key {
    pub section: &'static str,
    pub name: &'static str,
    /// Says what is wrong, and what is allowed.
    pub set: fn(&mut Config, &Value) -> Result<(), String>,
    /// As TOML; `None` while it is not set.
    pub show: fn(&Config) -> Option<String>,
}

impl Key {
    /// The variable that sets it.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("WAYPOST_{}__{}", self.section.replace('.', "__"), self.name).to_ascii_uppercase()
    }
}

/// The lane that a section configures.
#[must_use]
pub fn lane_of(section: &str) -> Option<LaneId> {
    section
        .strip_prefix("lanes.")
        .and_then(LaneId::from_name)
        .filter(|lane| *lane != LaneId::Memory)
}

/// A key whose field is always there.
macro_rules! key {
    ($section:literal, $name:literal, $($field:ident).+, $kind:ident) => {
        Key {
            section: $section,
            name: $name,
            set: |config, value| { config.$($field).+ = $kind::read(value)?; Ok(()) },
            show: |config| $kind::show(&config.$($field).+),
        }
    };
}

/// A key of a lane; setting it turns the lane on.
macro_rules! lane_key {
    ($section:literal, $name:literal, $lane:ident, $field:ident, $kind:ident) => {
        Key {
            section: $section,
            name: $name,
            set: |config, value| {
                let lane = config.lanes.$lane.get_or_insert_default();
                lane.$field = $kind::read(value)?;
                Ok(())
            },
            show: |config| $kind::show(&config.lanes.$lane.as_ref()?.$field),
        }
    };
}

/// A key of the contract that this version takes at its default only.
macro_rules! fixed_key {
    ($section:literal, $name:literal, $($only:literal),+) => {
        Key { section: $section, name: $name, set: |_, value| only(&[$($only),+], value), show: |_| None }
    };
}

/// Every key, section by section, in the order in which `waypost check` prints them.
pub const KEYS: &[Key] = &[
    key!("ingest", "listen", ingest.listen, address),
    key!("ingest", "max_body", ingest.max_body, bytes),
    key!("ingest", "max_record", ingest.max_record, bytes),
    key!("ingest", "schema", ingest.schema, schema),
    key!("ingest", "ack", ingest.ack, ack),
    fixed_key!("ingest", "tokens_file", ""),
    fixed_key!("ingest", "tls_cert_file", ""),
    fixed_key!("ingest", "tls_key_file", ""),
    fixed_key!("ingest", "client_ca_file", ""),
    key!("api", "url", api.url, url),
    key!("api", "timeout", api.timeout, duration),
    key!("api", "concurrency", api.concurrency, concurrency),
    key!("api", "batch", api.batch, batch),
    key!("api", "give_up_after", api.give_up_after, patience),
    key!("api", "token_file", api.token_file, file),
    key!("api", "ca_file", api.ca_file, file),
    fixed_key!("api", "signing_key_file", ""),
    key!("router", "policy", router.policy, policy),
    key!(
        "router",
        "publish_timeout",
        router.publish_timeout,
        duration
    ),
    lane_key!("lanes.grpc", "tag", grpc, tag, text),
    fixed_key!("lanes.grpc", "weight", "1"),
    lane_key!("lanes.grpc", "listen", grpc, listen, address),
    lane_key!("lanes.grpc", "peers", grpc, peers, list),
    lane_key!("lanes.grpc", "cert_file", grpc, cert_file, file),
    lane_key!("lanes.grpc", "key_file", grpc, key_file, file),
    lane_key!("lanes.grpc", "ca_file", grpc, ca_file, file),
    lane_key!("lanes.nats", "tag", nats, tag, text),
    fixed_key!("lanes.nats", "weight", "1"),
    lane_key!("lanes.nats", "url", nats, url, urls),
    lane_key!("lanes.nats", "stream", nats, stream, text),
    lane_key!("lanes.nats", "subject", nats, subject, text),
    lane_key!("lanes.nats", "durable", nats, durable, text),
    lane_key!("lanes.nats", "bundle", nats, bundle, bundle),
    lane_key!("lanes.nats", "replicas", nats, replicas, replicas),
    lane_key!("lanes.nats", "ca_file", nats, ca_file, file),
    lane_key!("lanes.nats", "cert_file", nats, cert_file, file),
    lane_key!("lanes.nats", "key_file", nats, key_file, file),
    lane_key!("lanes.nats", "creds_file", nats, creds_file, file),
    lane_key!("lanes.nats", "token_file", nats, token_file, file),
    lane_key!("lanes.nats", "password_file", nats, password_file, file),
    lane_key!("lanes.rabbitmq", "tag", rabbitmq, tag, text),
    fixed_key!("lanes.rabbitmq", "weight", "1"),
    lane_key!("lanes.rabbitmq", "url", rabbitmq, url, url),
    lane_key!("lanes.rabbitmq", "queue", rabbitmq, queue, text),
    lane_key!("lanes.rabbitmq", "bundle", rabbitmq, bundle, bundle),
    lane_key!("lanes.rabbitmq", "ca_file", rabbitmq, ca_file, file),
    lane_key!(
        "lanes.rabbitmq",
        "password_file",
        rabbitmq,
        password_file,
        file
    ),
    lane_key!("lanes.pubsub", "tag", pubsub, tag, text),
    fixed_key!("lanes.pubsub", "weight", "1"),
    lane_key!("lanes.pubsub", "project", pubsub, project, text),
    lane_key!("lanes.pubsub", "topic", pubsub, topic, text),
    lane_key!("lanes.pubsub", "subscription", pubsub, subscription, text),
    lane_key!("lanes.pubsub", "bundle", pubsub, bundle, bundle),
    lane_key!("lanes.pubsub", "endpoint", pubsub, endpoint, optional_url),
    lane_key!(
        "lanes.pubsub",
        "credentials_file",
        pubsub,
        credentials_file,
        file
    ),
    key!("spool", "dir", spool.dir, path),
    key!("spool", "max", spool.max, big_bytes),
    key!("admin", "listen", admin.listen, address),
    fixed_key!("admin", "token_file", ""),
    fixed_key!("telemetry", "otlp", ""),
];

fn only(allowed: &[&str], value: &Value) -> Result<(), String> {
    match value {
        Value::Text(text) | Value::Integer(text) if allowed.contains(&text.as_str()) => Ok(()),
        _ if allowed == [""] => Err("is not in this version; leave it out".into()),
        _ => Err(format!(
            "is not in this version; allowed is \"{}\"",
            allowed.join("\" or \"")
        )),
    }
}

/// Text, or a number as text: variables and flags know no types.
fn plain<'v>(value: &'v Value, allowed: &str) -> Result<&'v str, String> {
    match value {
        Value::Text(text) | Value::Integer(text) => Ok(text),
        Value::List(_) => Err(format!("is a list; allowed is {allowed}")),
        Value::Other(kind) => Err(format!("is of type {kind}; allowed is {allowed}")),
    }
}

/// Text alone, and not empty.
fn words<'v>(value: &'v Value, allowed: &str) -> Result<&'v str, String> {
    match value {
        Value::Integer(_) => Err(format!("is of type integer; allowed is {allowed}")),
        _ => plain(value, allowed).and_then(|text| {
            if text.is_empty() {
                Err(format!("is empty; allowed is {allowed}"))
            } else {
                Ok(text)
            }
        }),
    }
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// One way to read and show a value: a module each, so that the table above reads as a table.
macro_rules! kind {
    ($name:ident, $type:ty, $allowed:expr, |$text:ident| $read:expr, |$value:ident| $show:expr) => {
        mod $name {
            use super::*;

            pub fn read(value: &Value) -> Result<$type, String> {
                let $text = plain(value, $allowed)?;
                let read: Option<$type> = $read;
                read.ok_or_else(|| format!("{:?} does not fit; allowed is {}", $text, $allowed))
            }

            #[allow(
                clippy::ptr_arg,
                clippy::ref_option,
                clippy::unnecessary_wraps,
                reason = "one shape for all kinds"
            )]
            pub fn show($value: &$type) -> Option<String> {
                $show
            }
        }
    };
}

/// A way to read a text, and what hides its secrets when it is shown.
macro_rules! text_kind {
    ($name:ident, $type:ty, $allowed:expr, |$value:ident| $show:expr) => {
        mod $name {
            use super::*;

            pub fn read(value: &Value) -> Result<$type, String> {
                words(value, $allowed).map(|text| text.to_owned().into())
            }

            #[allow(
                clippy::ptr_arg,
                clippy::ref_option,
                clippy::unnecessary_wraps,
                reason = "one shape for all kinds"
            )]
            pub fn show($value: &$type) -> Option<String> {
                $show
            }
        }
    };
}

text_kind!(text, String, "a text that is not empty", |text| Some(
    quoted(text)
));
text_kind!(url, String, "a URL", |url| Some(quoted(&hide::masked(url))));
text_kind!(
    urls,
    String,
    "a URL, or some, separated by commas",
    |urls| Some(quoted(&hide::masked_list(urls)))
);
text_kind!(optional_url, Option<String>, "a URL", |url| url
    .as_deref()
    .map(|url| quoted(&hide::masked(url))));
text_kind!(path, PathBuf, "a path", |path| Some(quoted(
    &path.display().to_string()
)));
kind!(
    address,
    SocketAddr,
    "an IP address and a port, as in \"127.0.0.1:8000\"",
    |text| text.parse().ok(),
    |address| Some(quoted(&address.to_string()))
);
kind!(
    duration,
    Duration,
    "a duration over zero, as in \"250ms\", \"10s\" or \"24h\"",
    |text| humantime::parse_duration(text)
        .ok()
        .filter(|duration| !duration.is_zero()),
    |duration| Some(quoted(
        &humantime::format_duration(*duration)
            .to_string()
            .replace(' ', "")
    ))
);
kind!(
    patience,
    Option<Duration>,
    "a duration over zero, as in \"24h\", or \"never\"",
    |text| match text {
        "never" => Some(None),
        _ => humantime::parse_duration(text)
            .ok()
            .filter(|duration| !duration.is_zero())
            .map(Some),
    },
    |patience| match patience {
        Some(duration) => duration::show(duration),
        None => Some(quoted("never")),
    }
);
kind!(
    ack,
    Ack,
    "\"lane\" or \"disk\"",
    |text| match text {
        "lane" => Some(Ack::Lane),
        "disk" => Some(Ack::Disk),
        _ => None,
    },
    |ack| Some(quoted(match ack {
        Ack::Lane => "lane",
        Ack::Disk => "disk",
    }))
);
kind!(
    bytes,
    usize,
    "a size from \"1B\" to \"1GiB\", as in \"256KiB\"",
    |text| size(text)
        .filter(|size| (1..=1 << 30).contains(size))
        .and_then(|size| usize::try_from(size).ok()),
    |bytes| Some(show_size(*bytes as u64))
);
kind!(
    big_bytes,
    u64,
    "a size of at least \"1MiB\", as in \"4GiB\"",
    |text| size(text).filter(|size| *size >= 1 << 20),
    |bytes| Some(show_size(*bytes))
);
kind!(
    concurrency,
    usize,
    "a whole number from 1 to 4096",
    |text| text
        .parse()
        .ok()
        .filter(|count| (1..=CONCURRENCY_MAX).contains(count)),
    |count| Some(count.to_string())
);
kind!(
    batch,
    usize,
    "a whole number from 1 to 1000",
    |text| text.parse().ok().filter(|count| (1..=1000).contains(count)),
    |count| Some(count.to_string())
);
kind!(
    bundle,
    usize,
    "a whole number from 1 to 128",
    |text| text
        .parse()
        .ok()
        .filter(|count| (1..=BUNDLE_MAX).contains(count)),
    |count| Some(count.to_string())
);
kind!(
    replicas,
    usize,
    "1, 3 or 5",
    |text| text.parse().ok().filter(|count| [1, 3, 5].contains(count)),
    |count| Some(count.to_string())
);
kind!(
    schema,
    Schema,
    "\"case\" or \"any\"; a JSON Schema file is not in this version",
    |text| match text {
        "case" => Some(Schema::Case),
        "any" => Some(Schema::Any),
        _ => None,
    },
    |schema| Some(quoted(match schema {
        Schema::Case => "case",
        Schema::Any => "any",
    }))
);
kind!(
    policy,
    Policy,
    "\"round-robin\"; the other policies are not in this version",
    |text| (text == "round-robin").then_some(Policy::RoundRobin),
    |policy| {
        match policy {
            Policy::RoundRobin => Some(quoted("round-robin")),
        }
    }
);

mod file {
    use super::{PathBuf, Value, quoted, words};

    /// The path of a secret or certificate, which is tried here so that nothing starts without it.
    pub fn read(value: &Value) -> Result<Option<PathBuf>, String> {
        const ALLOWED: &str = "the path of a file that can be read";
        let path = words(value, ALLOWED)?;
        let refused = |why: &dyn std::fmt::Display| {
            format!("{path:?} cannot be read: {why}; allowed is {ALLOWED}")
        };
        let found = std::fs::metadata(path).map_err(|why| refused(&why))?;
        if found.is_dir() {
            return Err(refused(&"it is a folder"));
        }
        // Opening a pipe would wait for its writer, and closing it would take the secret away.
        if found.is_file() {
            std::fs::File::open(path).map_err(|why| refused(&why))?;
        }
        Ok(Some(path.into()))
    }

    #[allow(clippy::ref_option, reason = "one shape for all kinds")]
    pub fn show(path: &Option<PathBuf>) -> Option<String> {
        path.as_ref()
            .map(|path| quoted(&path.display().to_string()))
    }
}

mod list {
    use super::{Value, quoted};

    /// A list of texts; in a variable, separated by commas.
    pub fn read(value: &Value) -> Result<Vec<String>, String> {
        let texts = match value {
            Value::List(texts) => texts.clone(),
            Value::Text(text) => text.split(',').map(|part| part.trim().to_owned()).collect(),
            Value::Integer(_) | Value::Other(_) => {
                return Err("does not fit; allowed is a list of texts".into());
            }
        };
        if texts.iter().any(String::is_empty) {
            return Err("holds an empty text; leave it out".into());
        }
        Ok(texts)
    }

    pub fn show(texts: &[String]) -> Option<String> {
        let texts: Vec<_> = texts.iter().map(|text| quoted(text)).collect();
        (!texts.is_empty()).then(|| format!("[{}]", texts.join(", ")))
    }
}

fn size(text: &str) -> Option<u64> {
    text.parse::<ByteSize>().ok().map(|size| size.0)
}

/// In the largest unit that divides it.
fn show_size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units
        .into_iter()
        .find(|(bits, _)| bytes >= 1 << bits && bytes.is_multiple_of(1 << bits));
    quoted(&unit.map_or_else(
        || format!("{bytes}B"),
        |(bits, name)| format!("{}{name}", bytes >> bits),
    ))
}
