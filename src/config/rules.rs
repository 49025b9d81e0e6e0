//! What must hold between keys, and what a text must look like beyond its type.

use std::net::SocketAddr;

use super::{Api, Config, Grpc, Ingest, Nats, Pubsub, Rabbitmq, url};
use crate::lane_id::LaneId;

const PLAIN: &str = "has a character that is not allowed; allowed are letters, digits, - and _";
const ID: &str = "is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, beginning with a letter but not with goog";

/// A key that a broken rule speaks of, and what is wrong as seen from it.
pub struct Blame {
    pub section: &'static str,
    pub name: &'static str,
    pub what: String,
}

/// A broken rule. Where several keys are at odds, the first of them that was set is to blame: a default is nobody's mistake.
pub type Broken = Vec<Blame>;

/// Every rule that `config` breaks.
#[must_use]
pub fn broken(config: &Config) -> Vec<Broken> {
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
    rules.broken
}

#[derive(Default)]
struct Rules {
    broken: Vec<Broken>,
}

impl Rules {
    fn check(
        &mut self,
        holds: bool,
        section: &'static str,
        name: &'static str,
        what: impl Into<String>,
    ) {
        if !holds {
            self.broken.push(vec![Blame {
                section,
                name,
                what: what.into(),
            }]);
        }
    }

    fn ingest(&mut self, ingest: &Ingest) {
        if ingest.max_record > ingest.max_body {
            let blame = |name, what: &str| Blame {
                section: "ingest",
                name,
                what: what.into(),
            };
            self.broken.push(vec![
                blame(
                    "max_record",
                    "is over ingest.max_body; a record must fit into a request",
                ),
                blame(
                    "max_body",
                    "is under ingest.max_record; a record must fit into a request",
                ),
            ]);
        }
    }

    fn api(&mut self, api: &Api) {
        let usable = url::names_a_server(&api.url, &["http", "https"])
            && api.url.parse::<hyper::Uri>().is_ok();
        self.check(
            usable,
            "api",
            "url",
            "is not a URL that can be posted to; allowed is http:// or https:// with a host",
        );
        let open = !url::has_login(&api.url);
        self.check(
            open,
            "api",
            "url",
            "has a login, which is never sent; allowed is a token, in token_file",
        );
    }

    fn grpc(&mut self, lane: &Grpc) {
        for peer in &lane.peers {
            let usable = url::names_a_server(peer, &["http", "https"]) && !url::has_login(peer);
            let peer = url::masked(peer);
            let what = format!(
                "{peer:?} is no node; allowed is http:// or https:// with a host and without a login"
            );
            self.check(usable, "lanes.grpc", "peers", what);
        }
        self.pair(
            "lanes.grpc",
            lane.cert_file.is_some(),
            lane.key_file.is_some(),
        );
    }

    fn nats(&mut self, lane: &Nats) {
        const SECTION: &str = "lanes.nats";
        let servers: Vec<_> = lane.url.split(',').map(str::trim).collect();
        let usable = servers
            .iter()
            .all(|server| url::names_a_server(server, &["nats", "tls"]));
        self.check(
            usable,
            SECTION,
            "url",
            "is not a list of servers; allowed is nats:// or tls:// with a host, separated by commas",
        );
        self.check(is_plain(&lane.stream, ""), SECTION, "stream", PLAIN);
        self.check(is_plain(&lane.durable, ""), SECTION, "durable", PLAIN);
        let subject =
            is_plain(&lane.subject, ".") && lane.subject.split('.').all(|token| !token.is_empty());
        let what = "is no subject; allowed are letters, digits, - and _, joined by dots";
        self.check(subject, SECTION, "subject", what);
        self.pair(SECTION, lane.cert_file.is_some(), lane.key_file.is_some());

        let user = lane.password_file.is_none()
            || servers.iter().any(|server| url::user(server).is_some());
        self.check(
            user,
            SECTION,
            "password_file",
            "is for no user; allowed beside a url with one, as in nats://user@host",
        );
        let logins = [
            ("creds_file", &lane.creds_file),
            ("token_file", &lane.token_file),
            ("password_file", &lane.password_file),
        ];
        let mut given = logins
            .into_iter()
            .filter(|(_, file)| file.is_some())
            .map(|(name, _)| name);
        if let (Some(first), Some(second)) = (given.next(), given.next()) {
            self.check(
                false,
                SECTION,
                second,
                format!("is a second way to log in, beside {first}; allowed is one"),
            );
        }
    }

    fn rabbitmq(&mut self, lane: &Rabbitmq) {
        let usable = url::names_a_server(&lane.url, &["amqp", "amqps"]);
        self.check(
            usable,
            "lanes.rabbitmq",
            "url",
            "is not a broker; allowed is amqp:// or amqps:// with a host",
        );
        let queue = lane.queue.len() <= 255 && !lane.queue.starts_with("amq.");
        self.check(
            queue,
            "lanes.rabbitmq",
            "queue",
            "is no queue's name; allowed are up to 255 bytes, not beginning with amq.",
        );
    }

    fn pubsub(&mut self, lane: &Pubsub) {
        const SECTION: &str = "lanes.pubsub";
        self.check(is_pubsub_id(&lane.topic), SECTION, "topic", ID);
        self.check(
            is_pubsub_id(&lane.subscription),
            SECTION,
            "subscription",
            ID,
        );
        let what = "is no project; allowed are letters, digits and -";
        self.check(is_plain(&lane.project, ".:"), SECTION, "project", what);
        let endpoint = lane.endpoint.as_deref().is_none_or(|endpoint| {
            url::is_server(endpoint)
                || url::names_a_server(endpoint, &["http", "https"]) && !url::has_login(endpoint)
        });
        self.check(
            endpoint,
            SECTION,
            "endpoint",
            "is not where Pub/Sub can be; allowed is host:port, or http:// or https:// with a host",
        );
    }

    fn pair(&mut self, section: &'static str, certificate: bool, key: bool) {
        let (given, missing) = if certificate {
            ("cert_file", "key_file")
        } else {
            ("key_file", "cert_file")
        };
        self.check(
            certificate == key,
            section,
            given,
            format!("needs {missing} beside it; allowed are both or none"),
        );
    }

    fn tags(&mut self, config: &Config) {
        let lanes = config.lanes_in_order();
        for (i, (lane, tag)) in lanes.iter().enumerate() {
            if let Some((other, _)) = lanes[..i].iter().find(|(_, other)| other == tag) {
                let what = |other| {
                    format!(
                        "is the tag of {} too; allowed is one of its own",
                        section(other)
                    )
                };
                let blame = |lane, other| Blame {
                    section: section(lane),
                    name: "tag",
                    what: what(other),
                };
                self.broken
                    .push(vec![blame(*lane, *other), blame(*other, *lane)]);
            }
        }
    }

    fn listeners(&mut self, config: &Config) {
        let grpc = config
            .lanes
            .grpc
            .as_ref()
            .map(|lane| ("lanes.grpc", lane.listen));
        let all = [
            Some(("ingest", config.ingest.listen)),
            Some(("admin", config.admin.listen)),
            grpc,
        ];
        let listeners: Vec<_> = all.into_iter().flatten().collect();
        for (i, (section, address)) in listeners.iter().enumerate() {
            if let Some((other, taken)) = listeners[..i]
                .iter()
                .find(|(_, other)| overlap(*address, *other))
            {
                let blame = |section, other, taken| Blame {
                    section,
                    name: "listen",
                    what: format!(
                        "is taken by {other}.listen, {taken}; allowed is an address and port of its own"
                    ),
                };
                self.broken.push(vec![
                    blame(*section, other, taken),
                    blame(*other, section, address),
                ]);
            }
        }
    }
}

/// Whether one socket cannot listen while another listens at the other address. Port 0 is a free one each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // Every address of IPv6 is, as systems are set up, every address of IPv4 too.
    let covers =
        |a: SocketAddr, b: SocketAddr| a.ip().is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
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
