//! The table of `docs/delivery.md`: for each lane and fault a test, with a node for each value of
//! `[ingest].ack`. Each record that got a 2xx before the fault arrives after it, where the table says
//! so.

use std::{fs, time::Duration};

use awc::http::StatusCode;
use futures_util::future::join_all;

use crate::support::{
    Wait,
    api::{Api, Conduct},
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    power::Disk,
    rig::Rig,
    traffic,
};

const MODES: [&str; 3] = ["durable", "lane", "disk"];
const RECORDS: usize = 20;
/// How long a broker may take to redeliver what a killed node had.
const REDELIVERY: Duration = Duration::from_mins(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// `kill -9`
    Kill,
    /// Also of the disk that the data is on.
    PowerCut,
}

/// Which processes it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hits {
    Node,
    Broker,
    Both,
}

/// The modes that lose no record.
type KeptIn = [bool; MODES.len()];

const ALL: KeptIn = [true; MODES.len()];
/// All but `lane`.
const COPIES: KeptIn = [true, false, true];

/// A node of one mode, with an API of its own that hangs until the fault is over.
struct Subject {
    mode: &'static str,
    api: Api,
    node: Node,
    /// The keys of records with a 2xx.
    taken: Vec<String>,
}

impl Subject {
    async fn start(mode: &'static str, mut variables: Vec<(String, String)>) -> Self {
        variables.push(("INGEST__ACK".into(), mode.into()));
        let api = Api::start();
        api.behave(|_, _| Conduct::Hang);
        let node = Node::start(&api.url(), &variables).await;
        Self {
            mode,
            api,
            node,
            taken: Vec::new(),
        }
    }

    /// Posts [`RECORDS`] records, all at once.
    async fn post(&mut self) {
        let records = traffic();
        let posts = records.iter().take(RECORDS).enumerate();
        let posts = posts.map(async |(number, record)| {
            let key = format!("{}-{number}", self.mode);
            let answer = self.node.post("/", &key, record.clone()).await;
            let is_taken = answer.is_some_and(|(status, _)| status == StatusCode::ACCEPTED);
            is_taken.then_some(key)
        });
        self.taken = join_all(posts).await.into_iter().flatten().collect();
    }

    /// Lets the API work. Each record that was taken arrives if it is `kept`.
    async fn ends(&self, kept: bool) {
        self.api.behave(|_, _| Conduct::Answer(200));
        if kept {
            let mut wait = Wait::new(REDELIVERY);
            loop {
                let misses = self.api.misses(self.taken.iter());
                if misses.is_empty() {
                    break;
                }
                let status = self.node.status().await;
                assert!(
                    !wait.is_over(|| format!("{misses:?} to arrive")),
                    "{}: {misses:?} do not arrive: {status}",
                    self.mode
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            self.node.at_rest(REDELIVERY).await;
            let status = self.node.status().await;
            assert_eq!(status["balanced"], true, "{}: {status}", self.mode);
        }
        let lost = self.api.misses(self.taken.iter()).len();
        println!("{}: {lost} of {} lost", self.mode, self.taken.len());
    }
}

/// Injects `fault` with records in flight, and ends it. `on` starts a broker with its data in a
/// folder.
async fn test<L: Lane>(
    fault: Fault,
    hits: Hits,
    kept: KeptIn,
    on: impl AsyncFnOnce(&str) -> Option<L>,
) {
    let cuts = fault == Fault::PowerCut;
    let disk = if cuts {
        let Some(disk) = Disk::new() else { return };
        Some(disk)
    } else {
        None
    };
    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let folder = |name: &str, is_hit: bool| match &disk {
        Some(disk) if is_hit => disk.folder(name),
        _ => {
            let folder = elsewhere.path().join(name);
            fs::create_dir(&folder).expect("the folder is ours");
            folder.to_str().expect("a plain path").to_owned()
        }
    };
    let Some(mut broker) = on(&folder("broker", hits != Hits::Node)).await else {
        return;
    };
    let mut subjects = Vec::new();
    for mode in MODES {
        let data = folder(mode, hits != Hits::Broker);
        let variables = [broker.variables(), vec![("SPOOL__DIR".into(), data)]].concat();
        let mut subject = Subject::start(mode, variables).await;
        subject.node.lane_is(L::NAME, "up", PATIENCE).await;
        subject.post().await;
        assert_eq!(subject.taken.len(), RECORDS, "{mode}");
        subjects.push(subject);
    }
    if let Some(disk) = &disk {
        disk.cut();
    }
    if hits != Hits::Broker {
        for subject in &mut subjects {
            subject.node.signal("KILL");
            subject.node.ended(PATIENCE).await;
        }
    }
    if hits != Hits::Node {
        broker.kill().await;
    }
    if let Some(disk) = &disk {
        disk.restore().await;
    }
    if hits != Hits::Node {
        broker.revive().await;
    }
    for (subject, kept) in subjects.iter_mut().zip(kept) {
        if hits != Hits::Broker {
            subject.node.start_again().await;
        }
        subject.ends(kept).await;
    }
}

/// The same on the gRPC lane, which has no broker.
async fn test_grpc(fault: Fault) {
    let on = async |_: &str| Some(NoBroker);
    test(fault, Hits::Node, ALL, on).await;
}

/// The disk of a node fails: what it takes all the same, it delivers.
async fn test_full_disk(variables: &mut dyn FnMut() -> Vec<(String, String)>) {
    for mode in MODES {
        let mut variables = variables();
        variables.push(("INGEST__ACK".into(), mode.into()));
        let api = Api::start();
        api.behave(|_, _| Conduct::Hang);
        let node = Node::start_with_fault(&api.url(), &variables, "spool-write=return").await;
        let taken = Vec::new();
        let mut subject = Subject {
            mode,
            api,
            node,
            taken,
        };
        subject.post().await;
        subject.node.signal("KILL");
        subject.node.ended(PATIENCE).await;
        subject.node.plant("off=off");
        subject.node.start_again().await;
        subject.ends(true).await;
    }
}

/// In place of a broker.
struct NoBroker;

impl Rig for NoBroker {
    type T = waypost::transport::grpc::Grpc;
    const SURVIVES_KILL: bool = true;

    async fn start() -> Option<Self> {
        Some(Self)
    }

    fn settings(&mut self) -> waypost::transport::grpc::Settings {
        unreachable!("the node has them")
    }

    async fn kill(&mut self) {}

    async fn revive(&mut self) {}
}

impl Lane for NoBroker {
    const NAME: &'static str = "grpc";
    const TAG: &'static str = "GRPC";

    fn variables(&mut self) -> Vec<(String, String)> {
        grpc_variables()
    }
}

async fn nats(folder: &str) -> Option<Nats> {
    Nats::current(&["-sd", folder]).await
}

async fn rabbitmq(folder: &str) -> Option<Rabbitmq> {
    Rabbitmq::on(folder).await
}

async fn pubsub(_: &str) -> Option<Pubsub> {
    Pubsub::start().await
}

mod grpc {
    use super::*;

    #[actix_rt::test]
    async fn a_killed_node() {
        test_grpc(Fault::Kill).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_node() {
        test_grpc(Fault::PowerCut).await;
    }

    #[actix_rt::test]
    async fn a_full_disk() {
        test_full_disk(&mut grpc_variables).await;
    }
}

mod on_nats {
    use super::*;

    #[actix_rt::test]
    async fn a_killed_node() {
        test(Fault::Kill, Hits::Node, ALL, nats).await;
    }

    #[actix_rt::test]
    async fn a_killed_broker() {
        test(Fault::Kill, Hits::Broker, ALL, nats).await;
    }

    #[actix_rt::test]
    async fn both_killed() {
        test(Fault::Kill, Hits::Both, ALL, nats).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_node() {
        test(Fault::PowerCut, Hits::Node, ALL, nats).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_broker() {
        test(Fault::PowerCut, Hits::Broker, COPIES, nats).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_both() {
        test(Fault::PowerCut, Hits::Both, COPIES, nats).await;
    }

    #[actix_rt::test]
    async fn a_full_disk() {
        let Some(mut nats) = Nats::with(&[]).await else {
            return;
        };
        test_full_disk(&mut || nats.variables()).await;
    }
}

mod on_rabbitmq {
    use super::*;

    #[actix_rt::test]
    async fn a_killed_node() {
        test(Fault::Kill, Hits::Node, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn a_killed_broker() {
        test(Fault::Kill, Hits::Broker, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn both_killed() {
        test(Fault::Kill, Hits::Both, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_node() {
        test(Fault::PowerCut, Hits::Node, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_broker() {
        test(Fault::PowerCut, Hits::Broker, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_both() {
        test(Fault::PowerCut, Hits::Both, ALL, rabbitmq).await;
    }

    #[actix_rt::test]
    async fn a_full_disk() {
        let Some(mut rabbitmq) = Rabbitmq::start().await else {
            return;
        };
        test_full_disk(&mut || rabbitmq.variables()).await;
    }
}

/// The emulator loses its messages when it ends.
mod on_the_emulator {
    use super::*;

    #[actix_rt::test]
    async fn a_killed_node() {
        test(Fault::Kill, Hits::Node, ALL, pubsub).await;
    }

    #[actix_rt::test]
    async fn a_killed_broker() {
        test(Fault::Kill, Hits::Broker, COPIES, pubsub).await;
    }

    #[actix_rt::test]
    async fn both_killed() {
        test(Fault::Kill, Hits::Both, COPIES, pubsub).await;
    }

    #[actix_rt::test]
    async fn a_power_cut_of_the_node() {
        test(Fault::PowerCut, Hits::Node, ALL, pubsub).await;
    }

    #[actix_rt::test]
    async fn a_full_disk() {
        let Some(mut pubsub) = pubsub("").await else {
            return;
        };
        test_full_disk(&mut || pubsub.variables()).await;
    }
}
