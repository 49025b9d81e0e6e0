//! The four lanes, as a node is configured for them.

pub use super::{nats::Nats, pubsub::Pubsub, rabbitmq::Rabbit as Rabbitmq};
use super::{process::free_port, proxy::Proxy, rig::Rig};

/// A message system under test, as the lane of a node.
pub trait Lane: Rig {
    const NAME: &'static str;
    const TAG: &'static str;

    /// Names and values of variables, without their `WAYPOST_`, for a stream, queue or subscription
    /// of its own.
    fn variables(&mut self) -> Vec<(String, String)>;

    /// The messages that it has, for the report of a test that fails.
    async fn holds(&mut self) -> String {
        "it does not tell".into()
    }
}

/// The same variables, with a proxy in front of the server that they name.
pub fn through_proxy(mut variables: Vec<(String, String)>) -> (Proxy, Vec<(String, String)>) {
    const HOST: &str = "127.0.0.1:";
    let named = |(_, value): &&mut (String, String)| value.contains(HOST);
    let (_, value) = variables
        .iter_mut()
        .find(named)
        .expect("a server on loopback");
    let rest = value.split_once(HOST).expect("it was found by that").1;
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let address = format!("{HOST}{port}");
    let proxy = Proxy::before(address.parse().expect("an address"));
    *value = value.replace(&address, &proxy.address().to_string());
    (proxy, variables)
}

fn owned<const N: usize>(variables: [(&str, String); N]) -> Vec<(String, String)> {
    variables
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

impl Lane for Nats {
    const NAME: &'static str = "nats";
    const TAG: &'static str = "NATS";

    fn variables(&mut self) -> Vec<(String, String)> {
        let lane = self.config();
        owned([
            ("LANES__NATS__URL", (*lane.url).to_owned()),
            ("LANES__NATS__STREAM", lane.stream),
            ("LANES__NATS__SUBJECT", lane.subject),
            ("LANES__NATS__DURABLE", lane.durable),
        ])
    }

    async fn holds(&mut self) -> String {
        self.states().await
    }
}

impl Lane for Rabbitmq {
    const NAME: &'static str = "rabbitmq";
    const TAG: &'static str = "RabbitMQ";

    fn variables(&mut self) -> Vec<(String, String)> {
        let lane = self.config();
        owned([
            ("LANES__RABBITMQ__URL", (*lane.url).to_owned()),
            ("LANES__RABBITMQ__QUEUE", lane.queue),
        ])
    }

    async fn holds(&mut self) -> String {
        let columns = ["messages_ready", "messages_unacknowledged", "consumers"];
        self.ctl(&[&["list_queues", "name"], &columns[..]].concat())
    }
}

impl Lane for Pubsub {
    const NAME: &'static str = "pubsub";
    const TAG: &'static str = "PubSub";

    fn variables(&mut self) -> Vec<(String, String)> {
        let lane = self.config();
        owned([
            ("LANES__PUBSUB__ENDPOINT", lane.endpoint.unwrap_or_default()),
            ("LANES__PUBSUB__PROJECT", lane.project),
            ("LANES__PUBSUB__TOPIC", lane.topic),
            ("LANES__PUBSUB__SUBSCRIPTION", lane.subscription),
        ])
    }
}

/// The value of the variable `name`.
pub fn value<'v>(variables: &'v [(String, String)], name: &str) -> &'v str {
    let mut variables = variables.iter();
    let found = variables.find(|(of, _)| of == name);
    &found.expect("it is set").1
}

/// The gRPC lane of a node that calls itself.
pub fn grpc_variables() -> Vec<(String, String)> {
    owned([("LANES__GRPC__LISTEN", format!("127.0.0.1:{}", free_port()))])
}
