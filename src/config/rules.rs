//! Rules between keys, and rules for texts that names and URLs of a broker follow.

use std::{net::SocketAddr, path::Path};

use ::url::{Host, Url};
use awc::http::Uri;

use super::{
    APIS_MAX, AdminConfig, ApiConfig, Config, GrpcConfig, IngestConfig, NatsConfig, PubsubConfig,
    RabbitmqConfig, ReadableFile, url,
};
use crate::{
    cloud_events::EventMode,
    routing::rules::RouteError,
    secrets::{ServerTls, SigningKeys, TlsFile, TlsFileError, TlsFiles, TokenSet},
};

const HTTP: &[&str] = &["http", "https"];
const PLAIN: &str = "has a character that is not allowed; allowed are letters, digits, - and _";
/// The keys of ingest and of the admin side that go together.
const OWN_PAIR: [&str; 2] = ["tls_cert_file", "tls_key_file"];
const PUBSUB_ID: &str = "is no Pub/Sub name; allowed are 3 to 255 letters, digits and -_.~+%, \
                         beginning with a letter but not with goog";

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
    rules.admin(&config.admin);
    let otlp = config.telemetry.otlp.as_deref();
    rules.check(
        otlp.is_none_or(|text| url::of_server(text, HTTP).is_some()),
        "telemetry.otlp",
        "is no collector; allowed is http:// or https:// with a host",
    );
    rules.api("api", &config.api);
    for (name, api) in &config.apis {
        rules.api(&format!("apis.{name}"), api);
    }
    let names = config.apis.keys();
    for name in names.skip(APIS_MAX - 1) {
        let what = format!("is one too many; allowed are {} beside [api]", APIS_MAX - 1);
        rules.check(false, &format!("apis.{name}.url"), what);
    }
    lanes.grpc.iter().for_each(|lane| rules.grpc(lane));
    lanes.nats.iter().for_each(|lane| rules.nats(lane));
    lanes.rabbitmq.iter().for_each(|lane| rules.rabbitmq(lane));
    lanes.pubsub.iter().for_each(|lane| rules.pubsub(lane));
    rules.tags(config);
    rules.listeners(config);
    for RouteError { key, what } in config.routes().err().unwrap_or_default() {
        rules.check(false, &key, what);
    }
    rules.violations
}

#[derive(Default)]
struct Rules {
    violations: Vec<Vec<Violation>>,
}

impl Rules {
    fn check(&mut self, holds: bool, key: &str, what: impl Into<String>) {
        if !holds {
            self.violated([(key.to_owned(), what.into())]);
        }
    }

    /// A rule about these keys is violated.
    fn violated<const KEYS: usize>(&mut self, keys: [(String, String); KEYS]) {
        let violations = keys.map(|(key, what)| Violation { key, what });
        self.violations.push(violations.into());
    }

    fn ingest(&mut self, ingest: &IngestConfig) {
        self.tokens("ingest.tokens_file", ingest.tokens_file.as_deref());
        self.signing_keys(
            "ingest.signing_keys_file",
            ingest.signing_keys_file.as_deref(),
        );
        self.server_tls("ingest", OWN_PAIR, ingest.tls(), &ingest.client_ca_file);
        self.pair(
            "ingest",
            ("tls_cert_file", &ingest.tls_cert_file),
            ("tls_key_file", &ingest.tls_key_file),
        );
        if ingest.max_record > ingest.max_body {
            let seen = |from: &str, how: &str, other: &str| {
                let what = format!("is {how} ingest.{other}; a record must fit into a request");
                (format!("ingest.{from}"), what)
            };
            self.violated([
                seen("max_record", "over", "max_body"),
                seen("max_body", "under", "max_record"),
            ]);
        }
    }

    fn admin(&mut self, admin: &AdminConfig) {
        let is_open = !admin.listen.ip().to_canonical().is_loopback();
        self.check(
            !is_open || admin.token_file.is_some() || admin.client_ca_file.is_some(),
            "admin.listen",
            "is open to other machines, and each of them could give orders; add token_file = \
             \"FILE\" to [admin], or WAYPOST_ADMIN__TOKEN_FILE=FILE, the path of a file with a token \
             a line, or client_ca_file; without them, allowed is an address of this machine alone, as \
             in \"127.0.0.1:8001\"",
        );
        self.server_tls("admin", OWN_PAIR, admin.tls(), &admin.client_ca_file);
        self.pair(
            "admin",
            ("tls_cert_file", &admin.tls_cert_file),
            ("tls_key_file", &admin.tls_key_file),
        );
        self.tokens("admin.token_file", admin.token_file.as_deref());
    }

    #[expect(clippy::ref_option, reason = "a field of a section")]
    fn server_tls(
        &mut self,
        section: &str,
        [cert, key]: [&str; 2],
        files: Option<TlsFiles>,
        client_ca: &Option<ReadableFile>,
    ) {
        let Some(files) = files else {
            self.check(
                client_ca.is_none(),
                &format!("{section}.client_ca_file"),
                "is for TLS; allowed beside tls_cert_file and tls_key_file",
            );
            return;
        };
        // A pipe gives its content once.
        if !files.paths().all(Path::is_file) {
            return;
        }
        if let Err(TlsFileError { file, why }) = ServerTls::read(&files, None) {
            let (name, allowed) = match file {
                TlsFile::Cert => (cert, "a certificate chain in PEM, the server's first"),
                TlsFile::Key => (key, "the key of the certificate in PEM"),
                TlsFile::ClientCa => ("client_ca_file", "certificates in PEM"),
            };
            let what = format!("{why}; allowed is {allowed}");
            self.check(false, &format!("{section}.{name}"), what);
        }
    }

    fn signing_keys(&mut self, key: &str, file: Option<&Path>) {
        let file = file.filter(|file| file.is_file());
        if let Some(Err(why)) = file.map(SigningKeys::read) {
            self.check(false, key, format!("{why}; allowed is a key a line"));
        }
    }

    fn tokens(&mut self, key: &str, file: Option<&Path>) {
        // A pipe gives its content once.
        let file = file.filter(|file| file.is_file());
        if let Some(Err(why)) = file.map(TokenSet::read) {
            self.check(false, key, format!("{why}; allowed is a token a line"));
        }
    }

    fn api(&mut self, section: &str, api: &ApiConfig) {
        let signing_key = format!("{section}.signing_key_file");
        self.signing_keys(&signing_key, api.signing_key_file.as_deref());
        if api.cloudevents == EventMode::Binary && api.batch > 1 {
            let allowed = "a POST has one binary event; allowed for many is \"structured\"";
            let is = |key: &str, is: &str| (format!("{section}.{key}"), format!("{is}; {allowed}"));
            self.violated([
                is("cloudevents", "is \"binary\", with a batch over 1"),
                is("batch", "is over 1, with cloudevents = \"binary\""),
            ]);
        }
        let key = format!("{section}.url");
        let url = url::of_server(&api.url, HTTP);
        // The HTTP client gets the URL as the `url` crate writes it, and takes less.
        let is_usable = |url: &Url| url.as_str().parse::<Uri>().is_ok();
        self.check(
            url.as_ref().is_some_and(is_usable),
            &key,
            "is not a URL that can be posted to; allowed is http:// or https:// with a host",
        );
        let Some(url) = url else { return };
        self.check(
            !url::has_login(&url),
            &key,
            "has a login, which is never sent; allowed is a token, in token_file",
        );
        self.check(
            url.scheme() == "http" || !matches!(url.host(), Some(Host::Ipv6(_))),
            &key,
            "is HTTPS to an IPv6 address, which is not supported; allowed is a host name",
        );
    }

    fn grpc(&mut self, lane: &GrpcConfig) {
        for peer in &lane.peers {
            let usable = is_without_login(peer);
            let peer = url::masked(peer);
            let what = format!(
                "{peer:?} is no node; allowed is http:// or https:// with a host and without a \
                 login"
            );
            self.check(usable, "lanes.grpc.peers", what);
        }
        let names = ["cert_file", "key_file"];
        self.server_tls("lanes.grpc", names, lane.tls(), &None);
        self.pair(
            "lanes.grpc",
            ("cert_file", &lane.cert_file),
            ("key_file", &lane.key_file),
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
            "is not a list of servers; allowed is nats:// or tls:// with a host, separated by \
             commas",
        );
        let monitor = lane.monitor.as_deref();
        self.check(
            monitor.is_none_or(is_without_login),
            "lanes.nats.monitor",
            "is no monitoring address; allowed is http:// or https:// with a host and without a \
             login, which is never sent",
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
            ("cert_file", &lane.cert_file),
            ("key_file", &lane.key_file),
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
        let ids = [
            ("lanes.pubsub.topic", &lane.topic),
            ("lanes.pubsub.subscription", &lane.subscription),
        ];
        for (key, id) in ids {
            self.check(is_pubsub_id(id), key, PUBSUB_ID);
        }
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

    fn pair(
        &mut self,
        section: &str,
        (cert_name, cert): (&str, &Option<ReadableFile>),
        (key_name, key): (&str, &Option<ReadableFile>),
    ) {
        let (given, missing) = match (cert, key) {
            (Some(_), None) => (cert_name, key_name),
            (None, Some(_)) => (key_name, cert_name),
            _ => return,
        };
        // The second is the place of no message, and silences this one if it has its own.
        self.violated([(given, missing), (missing, given)].map(|(name, other)| {
            let what = format!("needs {other} beside it; allowed are both or none");
            (format!("{section}.{name}"), what)
        }));
    }

    fn tags(&mut self, config: &Config) {
        let lanes = config.lanes.in_order();
        for ((lane, _), (other, _)) in clashes(&lanes, |(_, tag), (_, other)| tag == other) {
            let taken = |lane, other| {
                let what = format!("is the tag of lanes.{other} too; allowed is one of its own");
                (format!("lanes.{lane}.tag"), what)
            };
            self.violated([taken(lane, other), taken(other, lane)]);
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
        for (one, other) in clashes(&listeners, |(_, one), (_, other)| overlap(*one, *other)) {
            let taken = |(key, _): &(&str, _), (other, at): &(&str, SocketAddr)| {
                let what =
                    format!("is taken by {other}, {at}; allowed is an address and port of its own");
                ((*key).to_owned(), what)
            };
            self.violated([taken(one, other), taken(other, one)]);
        }
    }
}

/// Each item that clashes with an earlier one, with the first such.
fn clashes<T>(items: &[T], clash: impl Fn(&T, &T) -> bool) -> impl Iterator<Item = (&T, &T)> {
    items.iter().enumerate().filter_map(move |(at, item)| {
        let earlier = items[..at].iter().find(|earlier| clash(item, earlier))?;
        Some((item, earlier))
    })
}

/// Whether two sockets cannot listen at these addresses at once. Port 0 is a free port each time.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // By default, a socket on every IPv6 address listens on every IPv4 address too.
    let covers =
        |a: SocketAddr, b: SocketAddr| a.ip().is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

/// Whether `text` is a URL of HTTP that has a host and no login.
fn is_without_login(text: &str) -> bool {
    url::of_server(text, HTTP).is_some_and(|url| !url::has_login(&url))
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
