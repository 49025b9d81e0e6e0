//! A picture of the page in each of ten states. People who know nothing but the picture are asked what
//! is wrong, why, what is lost, what waits, and what is to be done: what they cannot tell, the page
//! does not say. `PICTURES=FOLDER tests/run pictures::states --ignored` makes them.

use std::time::Duration;

use tokio::time::sleep;

use super::LIVE;
use crate::{
    fleet::purge_stream,
    refusals::declare,
    support::{
        api::{Api, Conduct},
        browser::{Browser, PATIENCE, Window},
        eventually,
        lanes::{Lane as _, Nats, Pubsub, Rabbitmq, grpc_variables, through_proxy},
        node::Node,
        paced::PacedRecords,
        proxy::{Flow, Network},
        rig::Rig as _,
    },
};

/// A trend is known, and an outage has lasted for a while.
const SETTLED: Duration = Duration::from_secs(24);
const PACE: f64 = 80.0;

type Variables = Vec<(String, String)>;

/// The brokers of the three lanes that need one, and a browser.
pub struct Brokers {
    pub nats: Nats,
    rabbitmq: Rabbitmq,
    pubsub: Pubsub,
    pub browser: Browser,
}

impl Brokers {
    /// `None`, after a line that names what is missing.
    pub async fn start() -> Option<Self> {
        Some(Self {
            nats: Nats::start().await?,
            rabbitmq: Rabbitmq::start().await?,
            pubsub: Pubsub::start().await?,
            browser: Browser::start()?,
        })
    }

    /// All four lanes, with these of NATS.
    fn lanes(&mut self, nats: Variables) -> Variables {
        let others = [
            grpc_variables(),
            self.rabbitmq.variables(),
            self.pubsub.variables(),
        ];
        [nats, others.concat()].concat()
    }

    /// A node with all four lanes up.
    pub async fn node(&mut self, api: &Api) -> Node {
        let nats = self.nats.variables();
        let lanes = self.lanes(nats);
        started(api, &lanes).await
    }

    /// Takes the picture of the node once its page has followed it for a while.
    async fn picture(&mut self, node: &Node, name: &str) {
        let context = self.browser.context(Window::USUAL).await;
        let page = self.browser.open(context, node).await;
        self.browser.wait(page, LIVE).await;
        sleep(SETTLED).await;
        self.browser.picture(page, name).await;
        self.browser.close(page).await;
    }
}

/// A node whose lanes are up, after some records.
async fn started(api: &Api, variables: &[(String, String)]) -> Node {
    api.keep_keys_only();
    let node = Node::start(&api.url(), variables).await;
    eventually("all lanes are up", PATIENCE, async || {
        let status = node.status().await;
        let lanes = status["lanes"].as_array()?;
        lanes.iter().all(|lane| lane["state"] == "up").then_some(())
    })
    .await;
    node
}

fn load(node: &Node) -> PacedRecords {
    PacedRecords::start(node, "a", |_| PACE)
}

fn variables<const N: usize>(pairs: [(&str, &str); N]) -> Variables {
    let pairs = pairs.into_iter();
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[actix_rt::test]
#[ignore = "minutes, for people who look at the pictures"]
async fn of_ten_states() {
    let Some(mut brokers) = Brokers::start().await else {
        return;
    };
    broker_down(&mut brokers).await;
    slow_lane(&mut brokers).await;
    paused_lane(&mut brokers).await;
    refusing_lane(&mut brokers).await;
    filling_disk(&mut brokers).await;
    api_down(&mut brokers).await;
    slow_api(&mut brokers).await;
    parked_record(&mut brokers).await;
    dead_letters(&mut brokers).await;
    missing_records(&mut brokers).await;
}

async fn broker_down(brokers: &mut Brokers) {
    let api = Api::start();
    let node = brokers.node(&api).await;
    let _load = load(&node);
    sleep(SETTLED).await;
    brokers.nats.kill().await;
    brokers.picture(&node, "01").await;
    brokers.nats.revive().await;
}

async fn slow_lane(brokers: &mut Brokers) {
    let api = Api::start();
    let (proxy, nats) = through_proxy(brokers.nats.variables());
    let lanes = brokers.lanes(nats);
    let node = started(&api, &lanes).await;
    let _load = load(&node);
    proxy.set(Network {
        to_client: Flow::Lags(Duration::from_millis(700)),
        ..Network::WELL
    });
    brokers.picture(&node, "02").await;
}

async fn paused_lane(brokers: &mut Brokers) {
    let api = Api::start();
    let node = brokers.node(&api).await;
    let _load = load(&node);
    sleep(SETTLED).await;
    node.order("rabbitmq", "pause").await;
    brokers.picture(&node, "03").await;
}

async fn refusing_lane(brokers: &mut Brokers) {
    let api = Api::start();
    api.delay(Duration::from_millis(200));
    let nats = brokers.nats.variables();
    declare(&nats, |config| config.max_messages = 2).await;
    let lanes = brokers.lanes(nats);
    let node = started(&api, &lanes).await;
    let _load = load(&node);
    brokers.picture(&node, "04").await;
}

async fn filling_disk(brokers: &mut Brokers) {
    let api = Api::start();
    let more = variables([("SPOOL__MAX", "24MiB")]);
    let lanes = [brokers.nats.variables(), more].concat();
    let node = started(&api, &lanes).await;
    let _load = load(&node);
    sleep(SETTLED).await;
    brokers.nats.kill().await;
    sleep(SETTLED).await;
    brokers.picture(&node, "05").await;
    brokers.nats.revive().await;
}

async fn api_down(brokers: &mut Brokers) {
    let mut api = Api::start();
    let node = brokers.node(&api).await;
    let _load = load(&node);
    sleep(SETTLED).await;
    api.stop().await;
    brokers.picture(&node, "06").await;
}

async fn slow_api(brokers: &mut Brokers) {
    let api = Api::start();
    api.delay(Duration::from_millis(2500));
    let node = brokers.node(&api).await;
    let _load = load(&node);
    brokers.picture(&node, "07").await;
}

async fn parked_record(brokers: &mut Brokers) {
    let api = Api::start();
    api.behave(|_, post| {
        let is_poison = post.key.as_deref() == Some("a-100");
        Conduct::AnswerWith {
            status: if is_poison { 500 } else { 200 },
            headers: Vec::new(),
            body: if is_poison {
                b"NullPointerException in CaseMapper.java:88".to_vec()
            } else {
                Vec::new()
            },
        }
    });
    let node = brokers.node(&api).await;
    let _load = load(&node);
    brokers.picture(&node, "08").await;
}

async fn dead_letters(brokers: &mut Brokers) {
    let api = Api::start();
    api.behave(|number, _| {
        let is_refused = number % 20 == 0;
        Conduct::AnswerWith {
            status: if is_refused { 422 } else { 200 },
            headers: Vec::new(),
            body: if is_refused {
                br#"{"error":"unknown infectedtype"}"#.to_vec()
            } else {
                Vec::new()
            },
        }
    });
    let node = brokers.node(&api).await;
    let _load = load(&node);
    brokers.picture(&node, "09").await;
}

async fn missing_records(brokers: &mut Brokers) {
    let api = Api::start();
    api.behave(|_, _| Conduct::Hang);
    let nats = brokers.nats.variables();
    // No copy is kept.
    let more = variables([("INGEST__ACK", "lane")]);
    let lanes = [brokers.lanes(nats.clone()), more].concat();
    let node = started(&api, &lanes).await;
    let burst = PacedRecords::start(&node, "burst", |_| 800.0);
    eventually("the broker has more than the node", PATIENCE, async || {
        let in_flight = node.lane("nats").await["in_flight"].as_u64();
        (in_flight > Some(1500)).then_some(())
    })
    .await;
    drop(burst);
    sleep(Duration::from_secs(3)).await;
    purge_stream(&brokers.nats.address(), &nats).await;
    eventually("the loss is noticed", PATIENCE, async || {
        let missing = node.status().await["ledger"]["missing"].as_u64();
        (missing > Some(0)).then_some(())
    })
    .await;
    api.behave(|_, _| Conduct::Answer(200));
    let _load = load(&node);
    brokers.picture(&node, "10").await;
}
