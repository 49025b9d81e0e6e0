//! Rules between keys, and rules for texts that names and URLs of a broker follow.

use std::net::SocketAddr;

use awc::http::Uri;

use super::{
    ApiConfig, Config, GrpcConfig, IngestConfig, NatsConfig, PubsubConfig, RabbitmqConfig, url,
};

const HTTP: &[&str] = &["http", "https"];
const PLAIN: &str = "has a character that is not allowed; allowed are letters, digits, - and _";
const ID: &str = "is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, beginning with a letter but not with goog";

/// A key that breaks a rule.
pub struct Violation {
    /// `section.key`
    pub key: String,
    /// The mistake as seen from this key, and the allowed values.
    pub what: String,
}

/// Every rule that `config` violates. A rule about several keys has a violation for each; the first
/// key that a source sets is reported, never a default.
pub fn violations(config: &Config) -> Vec<Vec<Violation>> {
    let mut rules = Rules::default();
    let lanes = &config.lanes;
    rules.ingest(&config.ingest);
    rules.api(&config.api);
    lanes.grpc.iter().for_each(|lane| rules.grpc(lane));
    lanes.nats.iter().for_each(|lane| rules.nats(lane));
    lanes.rabbitmq.iter().for_each(|lane| rules.rabbitmq(lane));
    lanes.pubsub.iter().for_each(|lane| rules.pubsub(lane));
    rules.tags(config);
    rules.listeners(config);
    rules.violations
}

#[derive(Default)]
struct Rules {
    violations: Vec<Vec<Violation>>,
}

impl Rules {
    fn check(&mut self, holds: bool, key: &str, what: impl Into<String>) {
        if !holds {
            self.violations.push(vec![violation(key, what)]);
        }
    }

    fn ingest(&mut self, ingest: &IngestConfig) {
        if ingest.max_record > ingest.max_body {
            self.violations.push(vec![
                violation(
                    "ingest.max_record",
                    "is over ingest.max_body; a record must fit into a request",
                ),
                violation(
                    "ingest.max_body",
                    "is under ingest.max_record; a record must fit into a request",
                ),
            ]);
        }
    }

    fn api(&mut self, api: &ApiConfig) {
        const KEY: &str = "api.url";
        let url = url::of_server(&api.url, HTTP);
        // The HTTP client's own parser takes less than the `url` crate.
        self.check(
            url.is_some() && api.url.parse::<Uri>().is_ok(),
            KEY,
            "is not a URL that can be posted to; allowed is http:// or https:// with a host",
        );
        self.check(
            !url.is_some_and(|url| url::has_login(&url)),
            KEY,
            "has a login, which is never sent; allowed is a token, in token_file",
        );
    }

    fn grpc(&mut self, lane: &GrpcConfig) {
        for peer in &lane.peers {
            let usable = url::of_server(peer, HTTP).is_some_and(|url| !url::has_login(&url));
            let peer = url::masked(peer);
            let what = format!(
                "{peer:?} is no node; allowed is http:// or https:// with a host and without a login"
            );
            self.check(usable, "lanes.grpc.peers", what);
        }
        self.pair(
            "lanes.grpc",
            lane.cert_file.is_some(),
            lane.key_file.is_some(),
        );
    }

    fn nats(&mut self, lane: &NatsConfig) {
        let servers = lane.url.split(',').map(str::trim);
        let servers: Option<Vec<_>> = servers
            .map(|server| url::of_server(server, &["nats", "tls"]))
            .collect();
        self.check(
            servers.is_some(),
            "lanes.nats.url",
            "is not a list of servers; allowed is nats:// or tls:// with a host, separated by commas",
        );
        self.check(is_plain(&lane.stream, ""), "lanes.nats.stream", PLAIN);
        self.check(is_plain(&lane.durable, ""), "lanes.nats.durable", PLAIN);
        let has_empty_token = lane.subject.split('.').any(str::is_empty);
        self.check(
            is_plain(&lane.subject, ".") && !has_empty_token,
            "lanes.nats.subject",
            "is no subject; allowed are letters, digits, - and _, joined by dots",
        );
        self.pair(
            "lanes.nats",
            lane.cert_file.is_some(),
            lane.key_file.is_some(),
        );
        let names_a_user =
            servers.is_none_or(|urls| urls.iter().any(|url| !url.username().is_empty()));
        self.check(
            lane.password_file.is_none() || names_a_user,
            "lanes.nats.password_file",
            "is for no user; allowed beside a url with one, as in nats://user@host",
        );
        let logins = [
            ("creds_file", &lane.creds_file),
            ("token_file", &lane.token_file),
            ("password_file", &lane.password_file),
        ];
        let mut given = logins.iter().filter(|(_, file)| file.is_some());
        if let (Some((first, _)), Some((second, _))) = (given.next(), given.next()) {
            self.check(
                false,
                &format!("lanes.nats.{second}"),
                format!("is a second way to log in, beside {first}; allowed is one"),
            );
        }
    }

    fn rabbitmq(&mut self, lane: &RabbitmqConfig) {
        self.check(
            url::of_server(&lane.url, &["amqp", "amqps"]).is_some(),
            "lanes.rabbitmq.url",
            "is not a broker; allowed is amqp:// or amqps:// with a host",
        );
        self.check(
            lane.queue.len() <= 255 && !lane.queue.starts_with("amq."),
            "lanes.rabbitmq.queue",
            "is no queue's name; allowed are up to 255 bytes, not beginning with amq.",
        );
    }

    fn pubsub(&mut self, lane: &PubsubConfig) {
        self.check(is_pubsub_id(&lane.topic), "lanes.pubsub.topic", ID);
        self.check(
            is_pubsub_id(&lane.subscription),
            "lanes.pubsub.subscription",
            ID,
        );
        self.check(
            is_plain(&lane.project, ".:"),
            "lanes.pubsub.project",
            "is no project; allowed are letters, digits and -",
        );
        let is_endpoint = |text: &str| {
            let url = url::of_server(text, HTTP);
            url::is_host_and_port(text) || url.is_some_and(|url| !url::has_login(&url))
        };
        self.check(
            lane.endpoint.as_deref().is_none_or(is_endpoint),
            "lanes.pubsub.endpoint",
            "is not where Pub/Sub can be; allowed is host:port, or http:// or https:// with a host",
        );
    }

    fn pair(&mut self, section: &str, certificate: bool, key: bool) {
        let (given, missing) = if certificate {
            ("cert_file", "key_file")
        } else {
            ("key_file", "cert_file")
        };
        self.check(
            certificate == key,
            &format!("{section}.{given}"),
            format!("needs {missing} beside it; allowed are both or none"),
        );
    }

    fn tags(&mut self, config: &Config) {
        let lanes = config.lanes.in_order();
        for (i, (lane, tag)) in lanes.iter().enumerate() {
            if let Some((other, _)) = lanes[..i].iter().find(|(_, other)| other == tag) {
                let taken = |lane, other| {
                    violation(
                        &format!("lanes.{lane}.tag"),
                        format!("is the tag of lanes.{other} too; allowed is one of its own"),
                    )
                };
                self.violations
                    .push(vec![taken(lane, other), taken(other, lane)]);
            }
        }
    }

    fn listeners(&mut self, config: &Config) {
        let grpc = config.lanes.grpc.as_ref();
        let listeners = [
            Some(("ingest.listen", config.ingest.listen)),
            Some(("admin.listen", config.admin.listen)),
            grpc.map(|lane| ("lanes.grpc.listen", lane.listen)),
        ];
        let listeners: Vec<_> = listeners.into_iter().flatten().collect();
        for (i, (key, address)) in listeners.iter().enumerate() {
            let before = &listeners[..i];
            if let Some((other, taken_at)) =
                before.iter().find(|(_, other)| overlap(*address, *other))
            {
                let taken = |key, other, address| {
                    violation(
                        key,
                        format!(
                            "is taken by {other}, {address}; allowed is an address and port of its own"
                        ),
                    )
                };
                self.violations.push(vec![
                    taken(key, other, taken_at),
                    taken(other, key, address),
                ]);
            }
        }
    }
}

fn violation(key: &str, what: impl Into<String>) -> Violation {
    Violation {
        key: key.to_owned(),
        what: what.into(),
    }
}

/// Whether two sockets cannot listen at these addresses at once. Port 0 is a free port each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // By default, a socket on every IPv6 address listens on every IPv4 address too.
    let covers =
        |a: SocketAddr, b: SocketAddr| a.ip().is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

fn is_plain(name: &str, beside: &str) -> bool {
    !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c) || beside.contains(c))
}

fn is_pubsub_id(name: &str) -> bool {
    (3..=255).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && !name.starts_with("goog")
        && is_plain(name, ".~+%")
}
