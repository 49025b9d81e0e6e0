//! An API that is away, slow or faulty, on each lane: no record is lost, clients get their 2xx, and
//! the node's memory stays bounded. `FAULTS_SECONDS` is how long each fault lasts.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    load::Load,
    node::{Node, PATIENCE},
    rig::Rig as _,
    wanted,
};

/// A fault of the API.
#[derive(Clone, Copy, Debug)]
enum Away {
    Refuses,
    Hangs,
    Answers500,
    AsksForPatience,
    CutsAnswers,
    IsSlow,
}

const ALL: [Away; 6] = [
    Away::Refuses,
    Away::Hangs,
    Away::Answers500,
    Away::AsksForPatience,
    Away::CutsAnswers,
    Away::IsSlow,
];
/// Between two records of a client: the slowest API here keeps up with this rate.
const WAIT: Duration = Duration::from_millis(10);
const GROWTH_MAX: u64 = 32 << 20;

impl Away {
    async fn begin(self, api: &mut Api) {
        let busy = || Conduct::AnswerWith {
            status: 503,
            headers: vec![("Retry-After", "1".into())],
            body: Vec::new(),
        };
        match self {
            Self::Refuses => api.stop().await,
            Self::Hangs => api.behave(|_, _| Conduct::Hang),
            Self::Answers500 => api.behave(|_, _| Conduct::Answer(500)),
            Self::AsksForPatience => api.behave(move |_, _| busy()),
            Self::CutsAnswers => api.behave(|_, _| Conduct::CutAnswer),
            Self::IsSlow => api.delay(Duration::from_millis(500)),
        }
    }

    fn end(self, api: &mut Api) {
        match self {
            Self::Refuses => api.start_again(),
            Self::IsSlow => api.delay(Duration::ZERO),
            _ => api.behave(|_, _| Conduct::Answer(200)),
        }
    }
}

/// The number of records that arrive within `time`.
async fn arrivals(api: &Api, time: Duration) -> usize {
    let before = api.taken().len();
    sleep(time).await;
    api.taken().len() - before
}

async fn api_is_away(lane: &str, variables: &[(String, String)]) {
    let seconds = wanted("FAULTS_SECONDS", 3);
    let mut api = Api::start();
    api.keep_keys_only();
    let soon = [("API__TIMEOUT".to_owned(), "2s".to_owned())];
    let node = Node::start(&api.url(), &[variables, &soon].concat()).await;
    node.lane_is(lane, "up", PATIENCE).await;
    for away in ALL {
        let mut load = Load::start_with(&node, 8, WAIT);
        load.take(200).await;
        let usual = arrivals(&api, Duration::from_secs(1)).await;
        let before = node.memory();
        away.begin(&mut api).await;
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut most = before;
        while Instant::now() < until {
            most = most.max(node.memory());
            sleep(Duration::from_millis(100)).await;
        }
        away.end(&mut api);
        let began = Instant::now();
        eventually("the usual rate is back", PATIENCE, async || {
            (arrivals(&api, Duration::from_millis(500)).await >= usual * 4 / 10).then_some(())
        })
        .await;
        let back = began.elapsed();
        most = most.max(node.memory());
        load.end().await;
        load.is_met(&api, PATIENCE * 4).await;
        let grown = most.saturating_sub(before);
        println!(
            "{lane}: the API {away:?} for {seconds} s: {} attempted, {} not taken, at the usual rate within {back:?}, {} KiB more",
            load.attempted(),
            load.untaken(),
            grown >> 10
        );
        assert!(
            load.untaken() * 1000 < load.attempted(),
            "{} of {} not taken",
            load.untaken(),
            load.attempted()
        );
        assert!(grown < GROWTH_MAX, "{grown} bytes more");
        node.at_rest(PATIENCE * 4).await;
        assert!(node.dead().await.is_empty(), "{away:?} made dead letters");
    }
    assert_eq!(
        node.lane(lane).await["restarts"],
        0,
        "no broker was taken for lost"
    );
}

#[actix_rt::test]
async fn the_api_of_a_node_on_grpc_is_away() {
    api_is_away("grpc", &grpc_variables()).await;
}

#[actix_rt::test]
async fn the_api_of_a_node_on_nats_is_away() {
    let Some(mut nats) = Nats::start().await else {
        return;
    };
    api_is_away("nats", &nats.variables()).await;
}

#[actix_rt::test]
async fn the_api_of_a_node_on_rabbitmq_is_away() {
    let Some(mut rabbitmq) = Rabbitmq::start().await else {
        return;
    };
    api_is_away("rabbitmq", &rabbitmq.variables()).await;
}

#[actix_rt::test]
async fn the_api_of_a_node_on_pubsub_is_away() {
    let Some(mut pubsub) = Pubsub::start().await else {
        return;
    };
    api_is_away("pubsub", &pubsub.variables()).await;
}
