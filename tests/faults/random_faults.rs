//! Faults drawn from a seed, under a load that turns each 2xx into an obligation, and at the end a
//! verdict on each record. `tests/run faults --seed S --minutes M` runs a long one. The same seed
//! repeats the schedule of faults.

use std::{fmt, time::Duration};

use fastrand::Rng;
use tokio::time::sleep;

use crate::support::{
    api::{Api, Conduct},
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables, through_proxy},
    load::Load,
    node::{Node, PATIENCE},
    proxy::{Flow, Network, Proxy},
    rig::Rig as _,
    wanted,
};

/// How long the schedule of a plain test run lasts.
const SHORT: Duration = Duration::from_secs(20);
/// The longest gap between two faults.
const GAP_MS: u64 = 1500;
/// The longest fault.
const LAST_MS: u64 = 6000;
/// How long a broker may take to redeliver the messages of a killed node.
const REDELIVERY: Duration = Duration::from_mins(15);
/// The API refuses one record of this many with [`Fault::ApiRefusesSome`].
const REFUSED_OF: usize = 50;

/// The process or connection that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Node,
    Nats,
    Rabbitmq,
    NetworkToNats,
    NetworkToRabbitmq,
    NetworkToPubsub,
    NetworkToApi,
    Api,
}

const VICTIMS: [Victim; 8] = [
    Victim::Node,
    Victim::Nats,
    Victim::Rabbitmq,
    Victim::NetworkToNats,
    Victim::NetworkToRabbitmq,
    Victim::NetworkToPubsub,
    Victim::NetworkToApi,
    Victim::Api,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL. A node starts again at once, a broker at the end of the fault.
    Killed,
    /// SIGTERM and a new start.
    Terminated,
    /// SIGSTOP.
    Stopped,
    /// SIGKILL, then a start with a disk that fails one write in five and one sync in five.
    DiskFails,
    Cut,
    Reset,
    Network(Network),
    ApiHangs,
    ApiAnswers(u16),
    ApiCutsAnswers,
    ApiIsSlow,
    /// 422 to one record of [`REFUSED_OF`].
    ApiRefusesSome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Strike {
    at: Duration,
    lasts: Duration,
    victim: Victim,
    fault: Fault,
}

impl fmt::Display for Strike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at,
            lasts,
            victim,
            fault,
        } = self;
        write!(
            f,
            "{:8.2} s: {victim:?}: {fault:?}, {:.2} s",
            at.as_secs_f64(),
            lasts.as_secs_f64()
        )
    }
}

/// The faults of `time`, a function of `seed`. No two hit the same victim at once.
fn schedule(seed: u64, time: Duration) -> Vec<Strike> {
    let mut rng = Rng::with_seed(seed);
    let mut free = VICTIMS.map(|_| Duration::ZERO);
    let mut strikes = Vec::new();
    let mut at = Duration::ZERO;
    loop {
        at += Duration::from_millis(rng.u64(50..GAP_MS));
        if at >= time {
            return strikes;
        }
        let number = rng.usize(..VICTIMS.len());
        let victim = VICTIMS[number];
        let lasts = Duration::from_millis(rng.u64(100..LAST_MS));
        let fault = fault(victim, &mut rng);
        if free[number] > at {
            continue;
        }
        // The end of a fault takes time too.
        free[number] = at + lasts + Duration::from_secs(1);
        strikes.push(Strike {
            at,
            lasts,
            victim,
            fault,
        });
    }
}

fn fault(victim: Victim, rng: &mut Rng) -> Fault {
    let of = |all: &[Fault], rng: &mut Rng| all[rng.usize(..all.len())];
    let broken = |to_server, to_client| {
        Fault::Network(Network {
            to_server,
            to_client,
            refuses: false,
        })
    };
    match victim {
        Victim::Node => of(
            &[
                Fault::Killed,
                Fault::Killed,
                Fault::Terminated,
                Fault::Stopped,
                Fault::DiskFails,
            ],
            rng,
        ),
        Victim::Nats | Victim::Rabbitmq => of(&[Fault::Killed, Fault::Stopped], rng),
        Victim::Api => of(
            &[
                Fault::ApiHangs,
                Fault::ApiAnswers(500),
                Fault::ApiAnswers(429),
                Fault::ApiCutsAnswers,
                Fault::ApiIsSlow,
                Fault::ApiRefusesSome,
            ],
            rng,
        ),
        _ => of(
            &[
                Fault::Cut,
                Fault::Reset,
                broken(Flow::Swallows, Flow::Swallows),
                broken(Flow::Swallows, Flow::Passes),
                broken(Flow::Passes, Flow::Swallows),
                broken(
                    Flow::Delays(Duration::from_millis(300)),
                    Flow::Delays(Duration::from_millis(300)),
                ),
                broken(Flow::Trickles(4096), Flow::Passes),
                Fault::Network(Network {
                    refuses: true,
                    ..Network::WELL
                }),
            ],
            rng,
        ),
    }
}

/// The node, and everything that it depends on.
struct Arena {
    node: Node,
    api: Api,
    nats: Nats,
    rabbitmq: Rabbitmq,
    to_nats: Proxy,
    to_rabbitmq: Proxy,
    to_pubsub: Option<Proxy>,
    to_api: Proxy,
    _pubsub: Option<Pubsub>,
}

impl Arena {
    /// `None` if a broker is missing. The Pub/Sub emulator leases messages to the stream of a
    /// killed node and so keeps records for minutes; only the long run uses it.
    async fn new(with_pubsub: bool) -> Option<Self> {
        let mut nats = Nats::start().await?;
        let mut rabbitmq = Rabbitmq::start().await?;
        let mut pubsub = if with_pubsub {
            Some(Pubsub::start().await?)
        } else {
            None
        };
        let api = Api::start();
        api.keep_keys_only();
        let (to_api, url) = through_proxy(vec![("API__URL".into(), api.url())]);
        let (to_nats, for_nats) = through_proxy(nats.variables());
        let (to_rabbitmq, for_rabbitmq) = through_proxy(rabbitmq.variables());
        let (to_pubsub, for_pubsub) = pubsub
            .as_mut()
            .map(|pubsub| through_proxy(pubsub.variables()))
            .unzip();
        let timeouts = vec![
            ("API__TIMEOUT".into(), "2s".into()),
            ("ROUTER__PUBLISH_TIMEOUT".into(), "2s".into()),
        ];
        let variables = [
            url,
            grpc_variables(),
            for_nats,
            for_rabbitmq,
            for_pubsub.unwrap_or_default(),
            timeouts,
        ]
        .concat();
        let node = Node::start(&api.url(), &variables).await;
        let arena = Self {
            node,
            api,
            nats,
            rabbitmq,
            to_nats,
            to_rabbitmq,
            to_pubsub,
            to_api,
            _pubsub: pubsub,
        };
        arena.lanes_are_up().await;
        Some(arena)
    }

    async fn lanes_are_up(&self) {
        for lane in ["grpc", "nats", "rabbitmq"] {
            self.node.lane_is(lane, "up", PATIENCE).await;
        }
        if self.to_pubsub.is_some() {
            self.node.lane_is("pubsub", "up", PATIENCE).await;
        }
    }

    fn network(&self, victim: Victim) -> Option<&Proxy> {
        match victim {
            Victim::NetworkToNats => Some(&self.to_nats),
            Victim::NetworkToRabbitmq => Some(&self.to_rabbitmq),
            Victim::NetworkToPubsub => self.to_pubsub.as_ref(),
            _ => Some(&self.to_api),
        }
    }

    async fn begin(&mut self, Strike { victim, fault, .. }: Strike) {
        match (victim, fault) {
            (Victim::Node, Fault::Stopped) => self.node.signal("STOP"),
            (Victim::Node, Fault::Terminated) => {
                self.node.signal("TERM");
                let status = self.node.ended(Duration::from_secs(10)).await;
                assert_eq!(status.code(), Some(0), "a drain");
                self.node.start_again().await;
            }
            (Victim::Node, Fault::DiskFails) => {
                self.restart("spool-write=20%return;spool-sync=20%return")
                    .await;
            }
            (Victim::Node, _) => self.restart("").await,
            (Victim::Nats, Fault::Killed) => self.nats.kill().await,
            (Victim::Nats, _) => self.nats.signal("STOP"),
            (Victim::Rabbitmq, Fault::Killed) => self.rabbitmq.kill().await,
            (Victim::Rabbitmq, _) => self.rabbitmq.signal("STOP"),
            (Victim::Api, fault) => match fault {
                Fault::ApiHangs => self.api.behave(|_, _| Conduct::Hang),
                Fault::ApiAnswers(status) => self.api.behave(move |_, _| Conduct::Answer(status)),
                Fault::ApiCutsAnswers => self.api.behave(|_, _| Conduct::CutAnswer),
                Fault::ApiIsSlow => self.api.delay(Duration::from_millis(500)),
                _ => self.api.behave(|number, _| {
                    Conduct::Answer(if number % REFUSED_OF == 0 { 422 } else { 200 })
                }),
            },
            (_, fault) => {
                let Some(network) = self.network(victim) else {
                    return;
                };
                match fault {
                    Fault::Cut => network.cut(),
                    Fault::Reset => network.reset(),
                    Fault::Network(state) => network.set(state),
                    _ => {}
                }
            }
        }
    }

    async fn end(&mut self, Strike { victim, fault, .. }: Strike) {
        match (victim, fault) {
            (Victim::Node, Fault::Stopped) => self.node.signal("CONT"),
            (Victim::Node, Fault::DiskFails) => self.restart("").await,
            (Victim::Node, _) => {}
            (Victim::Nats, Fault::Killed) => self.nats.revive().await,
            (Victim::Nats, _) => self.nats.signal("CONT"),
            (Victim::Rabbitmq, Fault::Killed) => self.rabbitmq.revive().await,
            (Victim::Rabbitmq, _) => self.rabbitmq.signal("CONT"),
            (Victim::Api, Fault::ApiIsSlow) => self.api.delay(Duration::ZERO),
            (Victim::Api, _) => self.api.behave(|_, _| Conduct::Answer(200)),
            _ => {
                if let Some(network) = self.network(victim) {
                    network.set(Network::WELL);
                }
            }
        }
    }

    async fn restart(&mut self, fault: &str) {
        self.node.plant(fault);
        self.node.signal("KILL");
        self.node.ended(PATIENCE).await;
        self.node.start_again().await;
    }
}

async fn run(seed: u64, time: Duration, with_pubsub: bool) {
    println!("seed {seed}, {} s of faults", time.as_secs());
    let Some(mut arena) = Arena::new(with_pubsub).await else {
        return;
    };
    let strikes = schedule(seed, time);
    let mut events: Vec<_> = strikes
        .iter()
        .flat_map(|&strike| {
            [
                (strike.at, true, strike),
                (strike.at + strike.lasts, false, strike),
            ]
        })
        .collect();
    events.sort_by_key(|&(at, begins, _)| (at, begins));
    let mut load = Load::start_with(&arena.node, 8, Duration::from_millis(2));
    let mut now = Duration::ZERO;
    for (at, begins, strike) in events {
        let until = at.as_secs_f64();
        println!("until {until:.1} s: the load goes on");
        // Time that a restart takes does not count, so that each fault lasts.
        sleep(at.saturating_sub(now)).await;
        now = at;
        if begins {
            println!("{strike}");
            arena.begin(strike).await;
        } else {
            println!("over: {strike}");
            arena.end(strike).await;
        }
    }
    println!("the faults are over: waiting for all lanes, then for all records");
    arena.lanes_are_up().await;
    load.take(100).await;
    load.end().await;
    let verdict = load.verdict(&arena.node, &arena.api, REDELIVERY).await;
    println!("seed {seed}, {} faults: {verdict}", strikes.len());
    assert_eq!(
        (verdict.lost, verdict.unexpected),
        (0, 0),
        "seed {seed}: {verdict}"
    );
    let ledger = arena.node.at_rest(PATIENCE).await;
    println!("ledger: {ledger}");
}

#[actix_rt::test]
async fn a_short_schedule_of_faults() {
    run(wanted("FAULTS_SEED", 1), SHORT, false).await;
}

#[actix_rt::test]
#[ignore = "runs for minutes: tests/run faults --seed S --minutes M"]
async fn a_long_schedule_of_faults() {
    let minutes = wanted("FAULTS_MINUTES", 10);
    run(
        wanted("FAULTS_SEED", fastrand::u64(..)),
        Duration::from_secs(60 * minutes),
        true,
    )
    .await;
}

#[test]
fn the_same_seed_gives_the_same_schedule() {
    let hour = Duration::from_hours(1);
    assert_eq!(schedule(7, hour), schedule(7, hour));
    assert_ne!(schedule(7, hour), schedule(8, hour));
    for victim in VICTIMS {
        let mut strikes = schedule(7, hour)
            .into_iter()
            .filter(|strike| strike.victim == victim)
            .collect::<Vec<_>>();
        assert!(strikes.len() > 100, "{victim:?}");
        strikes.sort_by_key(|strike| strike.at);
        assert!(
            strikes
                .windows(2)
                .all(|two| two[0].at + two[0].lasts < two[1].at),
            "{victim:?} twice at once"
        );
    }
}
