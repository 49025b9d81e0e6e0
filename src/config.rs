//! Every setting with its default. A key is a field of its section: its name, type and default, and
//! the reader in `value` that knows its range.
//!
//! `load` reads the sources key by key, `value` the values, `url` the URLs; `rules` checks keys
//! against each other.

mod changes;
mod files;
mod load;
mod post_rules;
mod rules;
mod url;
mod value;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap as _};

use self::value::{GIB, MIB};
pub use self::{
    load::{ConfigError, Flag},
    post_rules::{Rate, RetryStatuses},
    url::{SecretUrl, has_login, masked as masked_url},
    value::ReadableFile,
};
pub use crate::routing::policy::Policy;
use crate::{
    cloud_events::EventMode,
    lane_id::LaneId,
    record::{DEPTH_MAX, JsonLimits, NumberRange, RecordRules, Schema},
    routing::{
        policy::HashOn,
        rules::{RouteDefaults, RouteError, RouteRule, Routes},
    },
    trace::OtelVariables,
};

/// The longest request that can be allowed: a node has no more bytes of requests in hand.
pub const BODY_MAX: usize = 64 << 20;
/// The largest record that can be allowed: with all that goes with it, it fits into the spool.
pub const RECORD_MAX: u64 = 15 << 20;
/// The most POSTs that a lane may be configured to have in flight.
pub const CONCURRENCY_MAX: usize = 4096;
/// The most records that a lane may be configured to put into one message.
pub const BUNDLE_MAX: usize = 128;
/// The most APIs: each has a share of every lane.
pub const APIS_MAX: usize = 16;
/// The name of `[api]` where one is needed; none of `[apis.NAME]` has it.
pub const DEFAULT_API: &str = "default";
/// The most headers of a request that the HTTP library reads.
pub const HEADERS_MAX: usize = 96;
/// The highest weight of a lane.
pub const WEIGHT_MAX: usize = 1000;

/// Declares a section: each key with its type, its default, and the attribute by which serde reads
/// and shows it.
macro_rules! section {
    (
        $(#[$about:meta])*
        $section:ident {
            $($(#[$effect:meta])* $key:ident: $type:ty = $default:expr $(, $how:ident = $reader:literal)?;)+
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $section {
            $($(#[$effect])* $(#[serde($how = $reader)])? pub $key: $type,)+
        }

        impl $section {
            const KEYS: &[&str] = &[$(stringify!($key)),+];

            /// The keys whose values differ.
            fn changes(&self, other: &Self) -> Vec<&'static str> {
                let changes = [$((self.$key != other.$key).then_some(stringify!($key))),+];
                changes.into_iter().flatten().collect()
            }
        }

        impl Default for $section {
            fn default() -> Self {
                Self { $($key: $default,)+ }
            }
        }
    };
}

/// Each section with its keys.
const SECTIONS: &[(&str, &[&str])] = &[
    ("admin", AdminConfig::KEYS),
    ("api", ApiConfig::KEYS),
    ("ingest", IngestConfig::KEYS),
    ("lanes.grpc", GrpcConfig::KEYS),
    ("lanes.nats", NatsConfig::KEYS),
    ("lanes.pubsub", PubsubConfig::KEYS),
    ("lanes.rabbitmq", RabbitmqConfig::KEYS),
    ("router", RouterConfig::KEYS),
    ("spool", SpoolConfig::KEYS),
    ("telemetry", TelemetryConfig::KEYS),
];

/// The whole configuration of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub ingest: IngestConfig,
    pub api: ApiConfig,
    pub router: RouterConfig,
    pub spool: SpoolConfig,
    pub admin: AdminConfig,
    pub telemetry: TelemetryConfig,
    pub lanes: Lanes,
    /// `[apis.NAME]`, by name: other APIs, which rules choose.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub apis: BTreeMap<String, ApiConfig>,
    /// `[[routes]]`, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<RouteRule>,
    /// The variables that all programs with OpenTelemetry have.
    #[serde(skip)]
    pub otel: OtelVariables,
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

section! {
    /// `[ingest]`: the HTTP side that clients post to.
    IngestConfig {
        listen: SocketAddr = SocketAddr::from(([0, 0, 0, 0], 8000)), deserialize_with = "value::address";
        /// Bytes of a whole request.
        max_body: usize = 1 << 20, with = "value::Size::<1, { BODY_MAX as u64 }>";
        /// Bytes of one record.
        max_record: usize = 256 << 10, with = "value::Size::<1, RECORD_MAX>";
        schema: Schema = Schema::Case, deserialize_with = "value::from_text";
        /// Objects and arrays inside of each other, the record included.
        max_depth: usize = JsonLimits::default().max_depth, deserialize_with = "value::whole::<1, DEPTH_MAX, _, _>";
        /// Members of all objects of a record.
        max_members: usize = JsonLimits::default().max_members, deserialize_with = "value::whole::<1, 1_000_000, _, _>";
        /// The numbers that a record may have.
        numbers: NumberRange = NumberRange::Any, deserialize_with = "value::name";
        ack: Ack = Ack::Durable, deserialize_with = "value::name";
        /// Each request needs an `Idempotency-Key`, or is an event.
        require_key: bool = false, deserialize_with = "value::yes_or_no";
        /// How long a key answers with its first receipt, at least.
        key_window: Duration = Duration::from_mins(10), with = "value::wait";
        /// A file with bearer tokens, one a line; each lets its owner send records.
        tokens_file: Option<ReadableFile> = None;
        /// A file with Standard Webhooks secrets, one a line; each request is signed by one of them.
        signing_keys_file: Option<ReadableFile> = None;
        /// PEM certificate chain and key of this server, which speaks TLS when both are given.
        tls_cert_file: Option<ReadableFile> = None;
        tls_key_file: Option<ReadableFile> = None;
        /// PEM certificates. A client needs a certificate that one of them has signed.
        client_ca_file: Option<ReadableFile> = None;
        /// Connections at a time; others wait to be accepted.
        max_connections: usize = 25_000, deserialize_with = "value::whole::<1, 1_000_000, _, _>";
        /// How long the head of a request may take.
        header_timeout: Duration = Duration::from_secs(5), with = "value::wait";
        /// How long a body may take, and a second more for each `min_body_rate` bytes of it.
        body_timeout: Duration = Duration::from_secs(20), with = "value::wait";
        /// Bytes per second.
        min_body_rate: u64 = 500, with = "value::Size::<1, GIB>";
        /// How long a connection may wait for its next request.
        keep_alive: Duration = Duration::from_secs(5), with = "value::wait";
        /// Headers of a request.
        max_headers: usize = HEADERS_MAX, deserialize_with = "value::whole::<1, HEADERS_MAX, _, _>";
        /// Origins whose web pages may send records.
        cors_origins: Vec<String> = Vec::new(), deserialize_with = "value::origins";
        /// Requests of each client in a time; `None` for as many as it likes.
        rate: Option<Rate> = None;
    }
}

section! {
    /// `[api]`, the API that records are posted to, and each of `[apis.NAME]`.
    ApiConfig {
        url: SecretUrl = "http://127.0.0.1:5000/".into();
        timeout: Duration = Duration::from_secs(10), with = "value::wait";
        /// POSTs in flight per lane.
        concurrency: usize = 64, deserialize_with = "value::whole::<1, CONCURRENCY_MAX, _, _>";
        /// Records of a POST at most; with more than one, its body is a JSON array.
        batch: usize = 1, deserialize_with = "value::whole::<1, 1000, _, _>";
        /// Whether records are POSTed as events of CloudEvents, and in which form.
        cloudevents: EventMode = EventMode::Off, deserialize_with = "value::name";
        /// POSTs in a time, over all lanes; `None` for as many as the API takes.
        rate: Option<Rate> = None;
        /// The statuses that a record is retried after. Another one that is no 2xx makes it a dead
        /// letter.
        retry_statuses: RetryStatuses = RetryStatuses::default();
        /// A record that the API has not taken by then is given up; `None` for never.
        give_up_after: Option<Duration> = Some(Duration::from_hours(24)), with = "value::patience";
        /// A file with a bearer token.
        token_file: Option<ReadableFile> = None;
        /// A file with Standard Webhooks secrets, one a line; the first signs each POST.
        signing_key_file: Option<ReadableFile> = None;
        /// PEM certificates that the API's certificate may be signed by, beside the public ones.
        ca_file: Option<ReadableFile> = None;
        /// Bytes of records on disk for this API alone.
        spool_max: u64 = GIB, with = "value::Size::<MIB, { u64::MAX }>";
    }
}

section! {
    /// `[router]`: the choice of a lane.
    RouterConfig {
        policy: Policy = Policy::RoundRobin, deserialize_with = "value::name";
        /// The part of a record that policy `hash` hashes.
        hash_on: HashOn = HashOn::Id, deserialize_with = "value::from_text";
        /// How long the lanes may take to confirm a record; then it goes to the spool.
        publish_timeout: Duration = Duration::from_secs(2), with = "value::wait";
    }
}

section! {
    /// `[spool]`: the durable folder of this node.
    SpoolConfig {
        dir: PathBuf = "data".into(), deserialize_with = "value::text";
        /// Bytes.
        max: u64 = 4 << 30, with = "value::Size::<MIB, { u64::MAX }>";
    }
}

section! {
    /// `[admin]`: health, status and metrics.
    AdminConfig {
        listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8001)), deserialize_with = "value::address";
        /// A file with bearer tokens, one a line; each makes its owner an operator.
        token_file: Option<ReadableFile> = None;
        /// PEM certificate chain and key of this server, which speaks TLS when both are given.
        tls_cert_file: Option<ReadableFile> = None;
        tls_key_file: Option<ReadableFile> = None;
        /// PEM certificates. A client needs a certificate that one of them has signed.
        client_ca_file: Option<ReadableFile> = None;
        /// Names, beside addresses and `localhost`, that `/api` may be asked by.
        hosts: Vec<String> = Vec::new(), deserialize_with = "value::host_names";
        /// `/api` takes no orders.
        read_only: bool = false, deserialize_with = "value::yes_or_no";
        /// The next start obeys the last orders to each lane.
        keep_orders: bool = false, deserialize_with = "value::yes_or_no";
    }
}

section! {
    /// `[telemetry]`: traces.
    TelemetryConfig {
        /// A collector of OpenTelemetry, which takes OTLP over HTTP; `None` for no traces, unless a
        /// variable names one.
        otlp: Option<SecretUrl> = None;
    }
}

section! {
    /// `[lanes.grpc]`
    GrpcConfig {
        tag: String = "GRPC".into(), deserialize_with = "value::text";
        weight: u32 = 1, deserialize_with = "value::whole::<0, WEIGHT_MAX, _, _>";
        listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 3000)), deserialize_with = "value::address";
        /// Nodes to carry records to; empty means this node itself.
        peers: Vec<String> = Vec::new(), deserialize_with = "value::list";
        /// PEM certificate chain and key of this node's server; the server speaks TLS when both are
        /// given.
        cert_file: Option<ReadableFile> = None;
        key_file: Option<ReadableFile> = None;
        /// PEM certificates that peers' certificates may be signed by, beside the public ones.
        ca_file: Option<ReadableFile> = None;
    }
}

section! {
    /// `[lanes.nats]`
    NatsConfig {
        tag: String = "NATS".into(), deserialize_with = "value::text";
        weight: u32 = 1, deserialize_with = "value::whole::<0, WEIGHT_MAX, _, _>";
        /// One or more servers, separated by commas; `tls://` asks for TLS; credentials may be in
        /// it.
        url: SecretUrl = "nats://127.0.0.1:4222".into();
        stream: String = "WAYPOST".into(), deserialize_with = "value::text";
        subject: String = "waypost.records".into(), deserialize_with = "value::text";
        durable: String = "waypost".into(), deserialize_with = "value::text";
        /// The most records of one message.
        bundle: usize = 1, deserialize_with = "value::whole::<1, BUNDLE_MAX, _, _>";
        /// Copies of the stream when Waypost creates it.
        replicas: usize = 1, deserialize_with = "value::replicas";
        /// The server's monitoring address, which tells whether it syncs before it confirms.
        monitor: Option<String> = None, deserialize_with = "value::text";
        /// The operator's word that a confirm survives a power cut.
        sync: Option<NatsSync> = None, deserialize_with = "value::some_name";
        ca_file: Option<ReadableFile> = None;
        /// Client certificate and key, PEM.
        cert_file: Option<ReadableFile> = None;
        key_file: Option<ReadableFile> = None;
        /// A NATS `.creds` file (JWT and nkey seed).
        creds_file: Option<ReadableFile> = None;
        /// A file with a token.
        token_file: Option<ReadableFile> = None;
        /// A file with the password of the URL's user.
        password_file: Option<ReadableFile> = None;
    }
}

section! {
    /// `[lanes.rabbitmq]`
    RabbitmqConfig {
        tag: String = "RabbitMQ".into(), deserialize_with = "value::text";
        weight: u32 = 1, deserialize_with = "value::whole::<0, WEIGHT_MAX, _, _>";
        /// `amqp://` or `amqps://`.
        url: SecretUrl = "amqp://guest:guest@127.0.0.1:5672/%2f".into();
        queue: String = "waypost".into(), deserialize_with = "value::text";
        /// The most records of one message.
        bundle: usize = 1, deserialize_with = "value::whole::<1, BUNDLE_MAX, _, _>";
        ca_file: Option<ReadableFile> = None;
        /// A file with the password of the URL's user.
        password_file: Option<ReadableFile> = None;
    }
}

section! {
    /// `[lanes.pubsub]`
    PubsubConfig {
        tag: String = "PubSub".into(), deserialize_with = "value::text";
        weight: u32 = 1, deserialize_with = "value::whole::<0, WEIGHT_MAX, _, _>";
        project: String = "waypost".into(), deserialize_with = "value::text";
        topic: String = "waypost-records".into(), deserialize_with = "value::text";
        subscription: String = "waypost-records".into(), deserialize_with = "value::text";
        /// The most records of one message.
        bundle: usize = 1, deserialize_with = "value::whole::<1, BUNDLE_MAX, _, _>";
        /// The emulator's address; absent means the real service.
        endpoint: Option<String> = None, deserialize_with = "value::text";
        /// A service account's key (JSON); absent means the default credentials.
        credentials_file: Option<ReadableFile> = None;
    }
}

/// The proof of safety that a 2xx stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// The record survives a power cut of node and broker together: by the lane's confirm if that
    /// survives it, else by a copy on this node's disk.
    Durable,
    /// A lane has confirmed the record; the spool, if none can.
    Lane,
    /// The record is on this node's disk, and a lane has confirmed it if one can.
    Disk,
}

/// Why a confirm of NATS survives a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NatsSync {
    /// The server has `sync_interval: always`.
    Always,
    /// The stream has three replicas or more, and no power cut takes most of them.
    Replicated,
}

impl IngestConfig {
    /// The rules for each record.
    pub fn record_rules(&self) -> RecordRules {
        let numbers = match (&self.schema, self.numbers) {
            // Other numbers cannot be compared with those of the file.
            (Schema::File(_), NumberRange::Any) => NumberRange::Double,
            (_, numbers) => numbers,
        };
        RecordRules {
            schema: self.schema.clone(),
            limits: JsonLimits {
                max_size: self.max_record,
                max_depth: self.max_depth,
                max_members: self.max_members,
                numbers,
            },
        }
    }
}

impl Config {
    /// The routes that records take.
    ///
    /// # Errors
    /// Every mistake in the rules.
    pub fn routes(&self) -> Result<Routes, Vec<RouteError>> {
        let lanes = self.lanes.in_order().into_iter();
        let lanes: Vec<_> = lanes.map(|(lane, _)| lane).collect();
        let apis: Vec<_> = self.apis.keys().map(String::as_str).collect();
        let defaults = RouteDefaults {
            policy: self.router.policy,
            hash_on: &self.router.hash_on,
            lanes: &lanes,
            apis: &apis,
        };
        Routes::new(&self.routes, &defaults)
    }
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

    /// The weight of `lane`, if it is on.
    pub fn weight(&self, lane: LaneId) -> Option<u32> {
        Some(match lane {
            LaneId::Grpc => self.grpc.as_ref()?.weight,
            LaneId::Nats => self.nats.as_ref()?.weight,
            LaneId::Rabbitmq => self.rabbitmq.as_ref()?.weight,
            LaneId::Pubsub => self.pubsub.as_ref()?.weight,
        })
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
