//! Every setting with its default. A key is a field: its name, its default in `Default`, its range
//! in the attribute.
//!
//! `load` reads the sources key by key, `value` the values, `url` the URLs; `rules` checks keys
//! against each other.

mod load;
mod rules;
mod url;
mod value;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap as _};

use self::value::{GIB, MIB};
pub use self::{
    load::{ConfigError, Flag},
    url::SecretUrl,
    value::ReadableFile,
};
use crate::{lane_id::LaneId, record::Schema};

/// The most POSTs that a lane may be configured to have in flight.
pub const CONCURRENCY_MAX: usize = 4096;
/// The most records that a lane may be configured to put into one message.
pub const BUNDLE_MAX: usize = 128;

/// The whole configuration of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub ingest: IngestConfig,
    pub api: ApiConfig,
    pub router: RouterConfig,
    pub spool: SpoolConfig,
    pub admin: AdminConfig,
    pub lanes: Lanes,
}

/// `[ingest]`: the HTTP side that clients post to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IngestConfig {
    #[serde(deserialize_with = "value::address")]
    pub listen: SocketAddr,
    /// Bytes of a whole request.
    #[serde(
        serialize_with = "value::show_size",
        deserialize_with = "value::size::<1, GIB, _, _>"
    )]
    pub max_body: usize,
    /// Bytes of one record.
    #[serde(
        serialize_with = "value::show_size",
        deserialize_with = "value::size::<1, GIB, _, _>"
    )]
    pub max_record: usize,
    #[serde(deserialize_with = "value::name")]
    pub schema: Schema,
    #[serde(deserialize_with = "value::name")]
    pub ack: Ack,
}

/// `[api]`: where records go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ApiConfig {
    pub url: SecretUrl,
    #[serde(with = "value::wait")]
    pub timeout: Duration,
    /// POSTs in flight per lane.
    #[serde(deserialize_with = "value::whole::<1, CONCURRENCY_MAX, _>")]
    pub concurrency: usize,
    /// Records of a POST at most; with more than one, its body is a JSON array.
    #[serde(deserialize_with = "value::whole::<1, 1000, _>")]
    pub batch: usize,
    /// A record that the API has not taken by then is given up; `None` for never.
    #[serde(with = "value::patience")]
    pub give_up_after: Option<Duration>,
    /// A file with a bearer token.
    pub token_file: Option<ReadableFile>,
    /// PEM certificates that the API's certificate may be signed by, beside the public ones.
    pub ca_file: Option<ReadableFile>,
}

/// `[router]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouterConfig {
    #[serde(deserialize_with = "value::name")]
    pub policy: Policy,
    /// How long the lanes may take to confirm a record; then it goes to the spool.
    #[serde(with = "value::wait")]
    pub publish_timeout: Duration,
}

/// What a 2xx stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// A lane has confirmed the record; the spool, if none can.
    Lane,
    /// The record is on this node's disk.
    Disk,
}

/// How the router chooses among the lanes that are up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    RoundRobin,
}

impl Policy {
    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
        }
    }
}

/// `[lanes.*]`: a lane is on when its section, or one of its variables, is there; the gRPC lane
/// also when no lane is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Lanes {
    pub grpc: Option<GrpcConfig>,
    pub nats: Option<NatsConfig>,
    pub rabbitmq: Option<RabbitmqConfig>,
    pub pubsub: Option<PubsubConfig>,
    /// The lanes in the order in which the sources name them.
    #[serde(skip)]
    pub order: Vec<LaneId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GrpcConfig {
    #[serde(deserialize_with = "value::text")]
    pub tag: String,
    #[serde(deserialize_with = "value::address")]
    pub listen: SocketAddr,
    /// Nodes to carry records to; empty means this node itself.
    #[serde(deserialize_with = "value::list")]
    pub peers: Vec<String>,
    /// PEM certificate chain and key of this node's server; the server speaks TLS when both are
    /// given.
    pub cert_file: Option<ReadableFile>,
    pub key_file: Option<ReadableFile>,
    /// PEM certificates that peers' certificates may be signed by, beside the public ones.
    pub ca_file: Option<ReadableFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NatsConfig {
    #[serde(deserialize_with = "value::text")]
    pub tag: String,
    /// One or more servers, separated by commas; `tls://` asks for TLS; credentials may be in it.
    pub url: SecretUrl,
    #[serde(deserialize_with = "value::text")]
    pub stream: String,
    #[serde(deserialize_with = "value::text")]
    pub subject: String,
    #[serde(deserialize_with = "value::text")]
    pub durable: String,
    /// The most records of one message.
    #[serde(deserialize_with = "value::whole::<1, BUNDLE_MAX, _>")]
    pub bundle: usize,
    /// Copies of the stream when Waypost creates it.
    #[serde(deserialize_with = "value::replicas")]
    pub replicas: usize,
    pub ca_file: Option<ReadableFile>,
    /// Client certificate and key, PEM.
    pub cert_file: Option<ReadableFile>,
    pub key_file: Option<ReadableFile>,
    /// A NATS `.creds` file (JWT and nkey seed).
    pub creds_file: Option<ReadableFile>,
    /// A file with a token.
    pub token_file: Option<ReadableFile>,
    /// A file with the password of the URL's user.
    pub password_file: Option<ReadableFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RabbitmqConfig {
    #[serde(deserialize_with = "value::text")]
    pub tag: String,
    /// `amqp://` or `amqps://`.
    pub url: SecretUrl,
    #[serde(deserialize_with = "value::text")]
    pub queue: String,
    /// The most records of one message.
    #[serde(deserialize_with = "value::whole::<1, BUNDLE_MAX, _>")]
    pub bundle: usize,
    pub ca_file: Option<ReadableFile>,
    /// A file with the password of the URL's user.
    pub password_file: Option<ReadableFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PubsubConfig {
    #[serde(deserialize_with = "value::text")]
    pub tag: String,
    #[serde(deserialize_with = "value::text")]
    pub project: String,
    #[serde(deserialize_with = "value::text")]
    pub topic: String,
    #[serde(deserialize_with = "value::text")]
    pub subscription: String,
    /// The most records of one message.
    #[serde(deserialize_with = "value::whole::<1, BUNDLE_MAX, _>")]
    pub bundle: usize,
    /// The emulator's address; absent means the real service.
    #[serde(deserialize_with = "value::text")]
    pub endpoint: Option<String>,
    /// A service account's key (JSON); absent means the default credentials.
    pub credentials_file: Option<ReadableFile>,
}

/// `[spool]`: the durable folder of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpoolConfig {
    #[serde(deserialize_with = "value::text")]
    pub dir: PathBuf,
    /// Bytes.
    #[serde(
        serialize_with = "value::show_size",
        deserialize_with = "value::size::<MIB, { u64::MAX }, _, _>"
    )]
    pub max: u64,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdminConfig {
    #[serde(deserialize_with = "value::address")]
    pub listen: SocketAddr,
}

impl Lanes {
    /// The most records of one message on `lane`. The gRPC lane carries records one by one.
    pub fn bundle(&self, lane: LaneId) -> usize {
        let bundle = match lane {
            LaneId::Grpc => None,
            LaneId::Nats => self.nats.as_ref().map(|lane| lane.bundle),
            LaneId::Rabbitmq => self.rabbitmq.as_ref().map(|lane| lane.bundle),
            LaneId::Pubsub => self.pubsub.as_ref().map(|lane| lane.bundle),
        };
        bundle.unwrap_or(1)
    }

    /// The lanes that are on, in the order of the configuration, with their tags.
    pub fn in_order(&self) -> Vec<(LaneId, String)> {
        let unordered = LaneId::ALL
            .into_iter()
            .filter(|lane| !self.order.contains(lane));
        let all = self.order.iter().copied().chain(unordered);
        all.filter_map(|lane| Some((lane, self.tag(lane)?.clone())))
            .collect()
    }

    fn tag(&self, lane: LaneId) -> Option<&String> {
        let tag = match lane {
            LaneId::Grpc => &self.grpc.as_ref()?.tag,
            LaneId::Nats => &self.nats.as_ref()?.tag,
            LaneId::Rabbitmq => &self.rabbitmq.as_ref()?.tag,
            LaneId::Pubsub => &self.pubsub.as_ref()?.tag,
        };
        Some(tag)
    }
}

impl Serialize for Lanes {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        let mut sections = output.serialize_map(None)?;
        for (lane, _) in self.in_order() {
            let name = lane.name();
            match lane {
                LaneId::Grpc => sections.serialize_entry(name, &self.grpc)?,
                LaneId::Nats => sections.serialize_entry(name, &self.nats)?,
                LaneId::Rabbitmq => sections.serialize_entry(name, &self.rabbitmq)?,
                LaneId::Pubsub => sections.serialize_entry(name, &self.pubsub)?,
            }
        }
        sections.end()
    }
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8000)),
            max_body: 1 << 20,
            max_record: 256 << 10,
            schema: Schema::Case,
            ack: Ack::Lane,
        }
    }
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            url: "http://127.0.0.1:5000/".into(),
            timeout: Duration::from_secs(10),
            concurrency: 64,
            batch: 1,
            give_up_after: Some(Duration::from_hours(24)),
            token_file: None,
            ca_file: None,
        }
    }
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            policy: Policy::RoundRobin,
            publish_timeout: Duration::from_secs(2),
        }
    }
}

impl Default for GrpcConfig {
    fn default() -> Self {
        Self {
            tag: "GRPC".into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 3000)),
            peers: Vec::new(),
            cert_file: None,
            key_file: None,
            ca_file: None,
        }
    }
}

impl Default for NatsConfig {
    fn default() -> Self {
        Self {
            tag: "NATS".into(),
            url: "nats://127.0.0.1:4222".into(),
            stream: "WAYPOST".into(),
            subject: "waypost.records".into(),
            durable: "waypost".into(),
            bundle: 1,
            replicas: 1,
            ca_file: None,
            cert_file: None,
            key_file: None,
            creds_file: None,
            token_file: None,
            password_file: None,
        }
    }
}

impl Default for RabbitmqConfig {
    fn default() -> Self {
        Self {
            tag: "RabbitMQ".into(),
            url: "amqp://guest:guest@127.0.0.1:5672/%2f".into(),
            queue: "waypost".into(),
            bundle: 1,
            ca_file: None,
            password_file: None,
        }
    }
}

impl Default for PubsubConfig {
    fn default() -> Self {
        Self {
            tag: "PubSub".into(),
            project: "waypost".into(),
            topic: "waypost-records".into(),
            subscription: "waypost-records".into(),
            bundle: 1,
            endpoint: None,
            credentials_file: None,
        }
    }
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            dir: "data".into(),
            max: 4 << 30,
        }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8001)),
        }
    }
}
