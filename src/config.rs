//! Every setting with its default. `keys` is the table of their names, `load` reads them, `rules` holds them together, and `url` reads and
//! hides what is in URLs.

mod keys;
mod load;
mod rules;
mod url;

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

pub use self::{
    keys::KEYS,
    load::{Flag, Mistake},
};
use crate::{lane_id::LaneId, record::Schema};

/// The most POSTs that a lane may be configured to have in flight.
pub const CONCURRENCY_MAX: usize = 4096;
/// The most records that a lane may be configured to put into one message.
pub const BUNDLE_MAX: usize = 128;

/// The whole configuration of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub ingest: Ingest,
    pub api: Api,
    pub router: Router,
    pub lanes: Lanes,
    pub spool: Spool,
    pub admin: Admin,
    /// The lanes that were named, in the order in which they were.
    pub lane_order: Vec<LaneId>,
}

/// `[ingest]`: the HTTP side that clients post to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingest {
    pub listen: SocketAddr,
    /// Bytes of a whole request.
    pub max_body: usize,
    /// Bytes of one record.
    pub max_record: usize,
    pub schema: Schema,
    pub ack: Ack,
}

/// `[api]`: where records go.
#[derive(Clone, PartialEq, Eq)]
pub struct Api {
    pub url: String,
    pub timeout: Duration,
    /// POSTs in flight per lane.
    pub concurrency: usize,
    /// Records of a POST at most; with more than one, its body is a JSON array.
    pub batch: usize,
    /// A record that the API has not taken by then is given up; `None` for never.
    pub give_up_after: Option<Duration>,
    /// A file with a bearer token.
    pub token_file: Option<PathBuf>,
    /// PEM certificates that the API's certificate may be signed by, beside the public ones.
    pub ca_file: Option<PathBuf>,
}

/// `[router]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Router {
    pub policy: Policy,
    /// How long the lanes may take to confirm a record; then it goes to the spool.
    pub publish_timeout: Duration,
}

/// What a 2xx stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// A lane has confirmed the record; the spool, if none can.
    Lane,
    /// The record is on this node's disk.
    Disk,
}

/// How the router chooses among the lanes that are up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    RoundRobin,
}

/// `[lanes.*]`: a lane is on when its section, or one of its variables, is there; the gRPC lane also when no lane is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    pub grpc: Option<Grpc>,
    pub nats: Option<Nats>,
    pub rabbitmq: Option<Rabbitmq>,
    pub pubsub: Option<Pubsub>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    pub tag: String,
    pub listen: SocketAddr,
    /// Nodes to carry records to; empty means this node itself.
    pub peers: Vec<String>,
    /// PEM certificate chain and key of this node's server; the server speaks TLS when both are given.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// PEM certificates that peers' certificates may be signed by, beside the public ones.
    pub ca_file: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Nats {
    pub tag: String,
    /// One or more servers, separated by commas; `tls://` asks for TLS; credentials may be in it.
    pub url: String,
    pub stream: String,
    pub subject: String,
    pub durable: String,
    /// The most records of one message.
    pub bundle: usize,
    /// Copies of the stream when Waypost creates it.
    pub replicas: usize,
    pub ca_file: Option<PathBuf>,
    /// Client certificate and key, PEM.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// A NATS `.creds` file (JWT and nkey seed).
    pub creds_file: Option<PathBuf>,
    /// A file with a token.
    pub token_file: Option<PathBuf>,
    /// A file with the password of the URL's user.
    pub password_file: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Rabbitmq {
    pub tag: String,
    /// `amqp://` or `amqps://`.
    pub url: String,
    pub queue: String,
    /// The most records of one message.
    pub bundle: usize,
    pub ca_file: Option<PathBuf>,
    /// A file with the password of the URL's user.
    pub password_file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pubsub {
    pub tag: String,
    pub project: String,
    pub topic: String,
    pub subscription: String,
    /// The most records of one message.
    pub bundle: usize,
    /// The emulator's address; absent means the real service.
    pub endpoint: Option<String>,
    /// A service account's key (JSON); absent means the default credentials.
    pub credentials_file: Option<PathBuf>,
}

/// `[spool]`: the durable folder of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spool {
    pub dir: PathBuf,
    /// Bytes.
    pub max: u64,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    pub listen: SocketAddr,
}

/// Settings with a URL that may hold a secret: no log shows it.
macro_rules! hide_secrets {
    ($($name:ident, $masked:path;)+) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("url", &$masked(&self.url)).finish_non_exhaustive()
            }
        }
    )+};
}
hide_secrets! {
    Api, url::masked;
    Nats, url::masked_list;
    Rabbitmq, url::masked;
}

impl Default for Ingest {
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

impl Default for Api {
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

impl Default for Router {
    fn default() -> Self {
        Self {
            policy: Policy::RoundRobin,
            publish_timeout: Duration::from_secs(2),
        }
    }
}

impl Default for Grpc {
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

impl Default for Nats {
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

impl Default for Rabbitmq {
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

impl Default for Pubsub {
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

impl Default for Spool {
    fn default() -> Self {
        Self {
            dir: "data".into(),
            max: 4 << 30,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8001)),
        }
    }
}
