//! How two configurations differ, and what of a new one a running node can take.

use std::{collections::BTreeSet, mem};

use super::{Config, GrpcConfig, Lanes, NatsConfig, PubsubConfig, RabbitmqConfig};
use crate::lane_id::LaneId;

impl Config {
    /// This configuration with those settings of `new` that a running node can take.
    #[must_use]
    pub fn with_run_time_settings(&self, new: &Self) -> Self {
        let mut taken = self.clone();
        taken.router.policy = new.router.policy;
        taken.router.hash_on = new.router.hash_on.clone();
        taken.lanes.take_weights(&new.lanes);
        let before = mem::replace(&mut taken.routes, new.routes.clone());
        if taken.routes().is_err() {
            // A rule for a lane that comes with the next start waits for it, and all others too.
            taken.routes = before;
        }
        taken
    }

    /// The keys whose values differ, as `section.key`. A lane, or an API, that only one of both has is
    /// there as its section, and `lanes` is the order of the lanes.
    pub fn changes(&self, other: &Self) -> Vec<String> {
        let sections = [
            ("admin", self.admin.changes(&other.admin)),
            ("api", self.api.changes(&other.api)),
            ("ingest", self.ingest.changes(&other.ingest)),
            ("router", self.router.changes(&other.router)),
            ("spool", self.spool.changes(&other.spool)),
            ("telemetry", self.telemetry.changes(&other.telemetry)),
        ];
        let mut changes = self.lanes.changes(&other.lanes);
        for (section, keys) in sections {
            changes.extend(keys.into_iter().map(|key| format!("{section}.{key}")));
        }
        let apis: BTreeSet<_> = self.apis.keys().chain(other.apis.keys()).collect();
        for name in apis {
            let section = format!("apis.{name}");
            match (self.apis.get(name), other.apis.get(name)) {
                (Some(one), Some(other)) => {
                    let keys = one.changes(other).into_iter();
                    changes.extend(keys.map(|key| format!("{section}.{key}")));
                }
                _ => changes.push(section),
            }
        }
        if self.routes != other.routes {
            changes.push("routes".into());
        }
        changes
    }
}

impl Lanes {
    fn take_weights(&mut self, new: &Self) {
        if let (Some(lane), Some(new)) = (&mut self.grpc, &new.grpc) {
            lane.weight = new.weight;
        }
        if let (Some(lane), Some(new)) = (&mut self.nats, &new.nats) {
            lane.weight = new.weight;
        }
        if let (Some(lane), Some(new)) = (&mut self.rabbitmq, &new.rabbitmq) {
            lane.weight = new.weight;
        }
        if let (Some(lane), Some(new)) = (&mut self.pubsub, &new.pubsub) {
            lane.weight = new.weight;
        }
    }

    fn changes(&self, other: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for lane in LaneId::ALL {
            let section = format!("lanes.{lane}");
            let keys = match lane {
                LaneId::Grpc => pair(&self.grpc, &other.grpc, GrpcConfig::changes),
                LaneId::Nats => pair(&self.nats, &other.nats, NatsConfig::changes),
                LaneId::Rabbitmq => pair(&self.rabbitmq, &other.rabbitmq, RabbitmqConfig::changes),
                LaneId::Pubsub => pair(&self.pubsub, &other.pubsub, PubsubConfig::changes),
            };
            match keys {
                Some(keys) => changes.extend(keys.iter().map(|key| format!("{section}.{key}"))),
                None => changes.push(section),
            }
        }
        let order = |lanes: &Self| -> Vec<_> {
            let both = lanes.in_order().into_iter().map(|(lane, _)| lane);
            both.filter(|lane| self.tag(*lane).and(other.tag(*lane)).is_some())
                .collect()
        };
        if order(self) != order(other) {
            changes.push("lanes".into());
        }
        changes
    }
}

/// The changes of a lane's keys; `None` if only one of both has the lane.
#[expect(clippy::ref_option, reason = "the fields of the lanes")]
fn pair<T>(
    one: &Option<T>,
    other: &Option<T>,
    changes: impl Fn(&T, &T) -> Vec<&'static str>,
) -> Option<Vec<&'static str>> {
    match (one, other) {
        (Some(one), Some(other)) => Some(changes(one, other)),
        (None, None) => Some(Vec::new()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::load::variable, *};

    /// A certificate and its key.
    const PEM: &str = "tests/config/server.pem";
    /// Keys that are not valid alone, each with others that go with it.
    const TOGETHER: [(&str, &[(&str, &str)]); 11] = [
        (
            "admin.client_ca_file",
            &[("admin.tls_cert_file", PEM), ("admin.tls_key_file", PEM)],
        ),
        ("admin.tls_cert_file", &[("admin.tls_key_file", PEM)]),
        ("admin.tls_key_file", &[("admin.tls_cert_file", PEM)]),
        (
            "ingest.client_ca_file",
            &[("ingest.tls_cert_file", PEM), ("ingest.tls_key_file", PEM)],
        ),
        ("ingest.tls_cert_file", &[("ingest.tls_key_file", PEM)]),
        ("ingest.tls_key_file", &[("ingest.tls_cert_file", PEM)]),
        ("lanes.grpc.cert_file", &[("lanes.grpc.key_file", PEM)]),
        ("lanes.grpc.key_file", &[("lanes.grpc.cert_file", PEM)]),
        ("lanes.nats.cert_file", &[("lanes.nats.key_file", PEM)]),
        ("lanes.nats.key_file", &[("lanes.nats.cert_file", PEM)]),
        (
            "lanes.nats.password_file",
            &[("lanes.nats.url", "nats://user@host")],
        ),
    ];
    /// Among these is another value for each key.
    const VALUES: [&str; 24] = [
        "3",
        "true",
        "7MiB",
        "7s",
        "127.0.0.1:9",
        "Cargo.toml",
        "docker/admin-token",
        PEM,
        "tests/config/signing-keys",
        "hash",
        "any",
        "lane",
        "always",
        "http://host:1",
        "nats://host:1",
        "amqp://host:1",
        "other",
        "/other",
        "header:other",
        "never",
        "500/s",
        "409",
        "structured",
        "exact",
    ];

    fn load(settings: &[(&str, &str)]) -> Option<Config> {
        let lanes = LaneId::ALL.map(|lane| (format!("lanes.{lane}.weight"), "1".to_owned()));
        let settings = settings
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()));
        let settings = lanes.into_iter().chain(settings);
        let environment: BTreeMap<_, _> = settings
            .map(|(key, value): (String, String)| (variable(&key), value))
            .collect();
        Config::load(None, &environment, &[]).ok()
    }

    #[test]
    fn a_key_that_has_another_value_is_named_and_no_other_key_is() {
        let before = load(&[]).unwrap();
        assert!(before.changes(&before).is_empty());
        for key in Config::keys() {
            let others = TOGETHER.iter().find(|(one, _)| *one == key);
            let others = others.map_or(&[][..], |(_, others)| others);
            let changed = VALUES.iter().find_map(|value| {
                let changed = load(&[&[(key.as_str(), *value)], others].concat())?;
                (changed != before).then_some(changed)
            });
            let changed = changed.unwrap_or_else(|| panic!("no other value for {key}"));
            let others = others.iter().map(|(other, _)| (*other).to_owned());
            let mut expected: Vec<_> = others.collect();
            expected.push(key);
            let mut named = before.changes(&changed);
            expected.sort();
            named.sort();
            assert_eq!(named, expected);
            assert_eq!(changed.changes(&before).len(), named.len());
        }
    }

    #[test]
    fn a_lane_that_comes_or_goes_is_named_as_its_section_and_the_order_by_itself() {
        let lanes = |names: &[&str]| {
            let mut config = Config::default();
            for name in names {
                let lane = LaneId::from_name(name).unwrap();
                config.lanes.order.push(lane);
                match lane {
                    LaneId::Grpc => config.lanes.grpc = Some(GrpcConfig::default()),
                    LaneId::Nats => config.lanes.nats = Some(NatsConfig::default()),
                    LaneId::Rabbitmq => config.lanes.rabbitmq = Some(RabbitmqConfig::default()),
                    LaneId::Pubsub => config.lanes.pubsub = Some(PubsubConfig::default()),
                }
            }
            config
        };
        let before = lanes(&["nats", "grpc"]);
        for (after, named) in [
            (lanes(&["nats", "grpc"]), &[][..]),
            (lanes(&["grpc", "nats"]), &["lanes"]),
            (lanes(&["nats", "rabbitmq", "grpc"]), &["lanes.rabbitmq"]),
            (lanes(&["grpc"]), &["lanes.nats"]),
            (
                lanes(&["grpc", "rabbitmq", "nats"]),
                &["lanes.rabbitmq", "lanes"],
            ),
        ] {
            assert_eq!(before.changes(&after), named);
        }
    }

    #[test]
    fn a_running_node_takes_the_policy_and_the_weights_of_the_lanes_that_it_has() {
        let before = load(&[("spool.max", "7MiB")]).unwrap();
        let mut new = load(&[
            ("router.policy", "hash"),
            ("lanes.nats.weight", "3"),
            ("lanes.grpc.weight", "4"),
            ("lanes.nats.bundle", "5"),
        ])
        .unwrap();
        new.lanes.rabbitmq = None;
        let taken = before.with_run_time_settings(&new);
        assert_eq!(
            before.changes(&taken),
            ["lanes.grpc.weight", "lanes.nats.weight", "router.policy"]
        );
        assert_eq!(
            taken.changes(&new),
            ["lanes.nats.bundle", "lanes.rabbitmq", "spool.max"]
        );
    }
}
