//! What must hold between keys, and what a text must look like beyond its type.

use std::collections::HashSet;

use super::Config;
use crate::delivery::LaneId;

const PLAIN: &str = "has a character that is not allowed; allowed are letters, digits, - and _";
const ID: &str = "is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, beginning with a letter";

/// A rule that is broken: section, key, and what is wrong.
type Broken = (&'static str, &'static str, String);

/// Every rule that `config` breaks.
pub fn broken(config: &Config) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut check = |holds: bool, section, name, what: &str| {
        if !holds {
            broken.push((section, name, what.to_owned()));
        }
    };
    let scheme = |url: &str, allowed: &[&str]| {
        url.split_once("://").is_some_and(|(scheme, rest)| allowed.contains(&scheme) && !rest.is_empty())
    };

    let record_fits = config.ingest.max_record <= config.ingest.max_body;
    check(record_fits, "ingest", "max_record", "is over ingest.max_body; a record must fit into a request");
    let api = scheme(&config.api.url, &["http", "https"]) && config.api.url.parse::<awc::http::Uri>().is_ok();
    check(api, "api", "url", "is not a URL that can be posted to; allowed is http:// or https:// with a host");

    if let Some(grpc) = &config.lanes.grpc {
        let peers = grpc.peers.iter().all(|peer| scheme(peer, &["http", "https"]));
        check(peers, "lanes.grpc", "peers", "holds no URL; allowed is http:// or https:// with a host");
        let pair = grpc.cert_file.is_some() == grpc.key_file.is_some();
        check(pair, "lanes.grpc", "cert_file", "needs key_file, and key_file needs it; give both or none");
    }
    if let Some(nats) = &config.lanes.nats {
        let urls = nats.url.split(',').all(|url| scheme(url.trim(), &["nats", "tls"]));
        check(urls, "lanes.nats", "url", "is not a list of servers; allowed is nats:// or tls://, separated by commas");
        check(is_plain(&nats.stream, ""), "lanes.nats", "stream", PLAIN);
        check(is_plain(&nats.durable, ""), "lanes.nats", "durable", PLAIN);
        let subject = is_plain(&nats.subject, ".") && nats.subject.split('.').all(|token| !token.is_empty());
        check(subject, "lanes.nats", "subject", "is no subject; allowed are letters, digits, - and _, joined by dots");
        let pair = nats.cert_file.is_some() == nats.key_file.is_some();
        check(pair, "lanes.nats", "cert_file", "needs key_file, and key_file needs it; give both or none");
    }
    if let Some(rabbitmq) = &config.lanes.rabbitmq {
        let url = scheme(&rabbitmq.url, &["amqp", "amqps"]);
        check(url, "lanes.rabbitmq", "url", "is not a broker; allowed is amqp:// or amqps:// with a host");
        let queue = rabbitmq.queue.len() <= 255 && !rabbitmq.queue.starts_with("amq.");
        check(
            queue,
            "lanes.rabbitmq",
            "queue",
            "is no queue's name; allowed are up to 255 bytes, not beginning with amq.",
        );
    }
    if let Some(pubsub) = &config.lanes.pubsub {
        check(is_pubsub_id(&pubsub.topic), "lanes.pubsub", "topic", ID);
        check(is_pubsub_id(&pubsub.subscription), "lanes.pubsub", "subscription", ID);
        check(
            is_plain(&pubsub.project, ".:"),
            "lanes.pubsub",
            "project",
            "is no project; allowed are letters, digits and -",
        );
    }

    let mut tags = HashSet::new();
    for (lane, tag) in config.lanes_in_order() {
        check(tags.insert(tag), section(lane), "tag", "is another lane's tag too; allowed is one of its own");
    }
    let mut addresses = HashSet::new();
    let grpc = config.lanes.grpc.as_ref().map(|lane| ("lanes.grpc", lane.listen));
    let listeners = [Some(("ingest", config.ingest.listen)), Some(("admin", config.admin.listen)), grpc];
    for (section, address) in listeners.into_iter().flatten().filter(|(_, address)| address.port() != 0) {
        check(
            addresses.insert(address),
            section,
            "listen",
            "is the address of another listener; allowed is a free one",
        );
    }
    broken
}

const fn section(lane: LaneId) -> &'static str {
    match lane {
        LaneId::Grpc => "lanes.grpc",
        LaneId::Nats => "lanes.nats",
        LaneId::Rabbitmq => "lanes.rabbitmq",
        LaneId::Pubsub => "lanes.pubsub",
        LaneId::Memory => "lanes.memory",
    }
}

fn is_plain(name: &str, beside: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c) || beside.contains(c))
}

fn is_pubsub_id(name: &str) -> bool {
    (3..=255).contains(&name.len()) && name.starts_with(|c: char| c.is_ascii_alphabetic()) && is_plain(name, ".~+%")
}
