//! The attributes of a lane's spans: its system, the names in it, and its server.

use url::Url;

use crate::{
    config::Lanes,
    lane_id::{LaneId, PerLane},
};

/// Of each lane that is on.
pub type Destinations = PerLane<Option<Destination>>;

/// The other end of a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// `messaging.system`. The gRPC lane has no broker: Waypost itself is the system.
    pub system: &'static str,
    /// The subject, queue or topic.
    pub name: String,
    /// The subscription of Pub/Sub.
    pub subscription: Option<String>,
    /// The durable consumer of NATS.
    pub consumer_group: Option<String>,
    /// Host and port, if there is only one server.
    pub server: Option<(String, u16)>,
}

/// The system of records that no broker has.
pub const OWN_SYSTEM: &str = "waypost";

/// The destination of each lane that `lanes` has.
pub fn destinations(lanes: &Lanes) -> Destinations {
    LaneId::ALL.map(|lane| match lane {
        LaneId::Grpc => lanes.grpc.as_ref().map(|grpc| {
            let own = (grpc.listen.ip().to_string(), grpc.listen.port());
            Destination {
                system: OWN_SYSTEM,
                name: lane.name().into(),
                subscription: None,
                consumer_group: None,
                server: match &*grpc.peers {
                    [] => Some(own),
                    [peer] => server(peer, 80),
                    _ => None,
                },
            }
        }),
        LaneId::Nats => lanes.nats.as_ref().map(|nats| Destination {
            system: "nats",
            name: nats.subject.clone(),
            subscription: None,
            consumer_group: Some(nats.durable.clone()),
            server: server(&nats.url, 4222),
        }),
        LaneId::Rabbitmq => lanes.rabbitmq.as_ref().map(|rabbitmq| Destination {
            system: "rabbitmq",
            name: rabbitmq.queue.clone(),
            subscription: None,
            consumer_group: None,
            server: server(&rabbitmq.url, 5672),
        }),
        LaneId::Pubsub => lanes.pubsub.as_ref().map(|pubsub| Destination {
            system: "gcp_pubsub",
            name: pubsub.topic.clone(),
            subscription: Some(pubsub.subscription.clone()),
            consumer_group: None,
            server: match &pubsub.endpoint {
                Some(endpoint) if endpoint.contains("://") => server(endpoint, 443),
                Some(endpoint) => server(&format!("http://{endpoint}"), 80),
                None => Some(("pubsub.googleapis.com".into(), 443)),
            },
        }),
    })
}

/// Host and port of a URL; `None` of a list of several.
pub fn server(text: &str, default_port: u16) -> Option<(String, u16)> {
    let url = Url::parse(text).ok().filter(|_| !text.contains(','))?;
    let default_port = match url.scheme() {
        "amqps" => 5671,
        _ => default_port,
    };
    let port = url.port_or_known_default().unwrap_or(default_port);
    Some((url.host_str()?.into(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_named_if_it_is_the_only_one() {
        for (url, port, expected) in [
            ("nats://a", 4222, Some(("a", 4222))),
            ("nats://user:secret@a:1", 4222, Some(("a", 1))),
            ("nats://a,nats://b", 4222, None),
            ("amqps://guest@a/%2f", 5672, Some(("a", 5671))),
            ("https://a/x", 80, Some(("a", 443))),
            ("nonsense", 80, None),
        ] {
            let found = server(url, port);
            let expected = expected.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(found, expected, "{url}");
        }
    }
}
