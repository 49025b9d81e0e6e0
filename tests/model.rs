//! Random sequences of what can happen to a node, against a model of what it owes.
//!
//! Admission, the router, the lanes, the supervisor, the feeder and the spool are the real ones,
//! and so are the spool's files; the test plays brokers and clients, on a paused clock. Two of the
//! brokers forget in a power cut what they have confirmed: one all of it, one the last of it. After
//! each step the node must be where the model says, and when all is drained, each record that got a
//! receipt must have been delivered, or lie in the dead letters, or have been dropped by the
//! operator, and no copy is left.
//!
//! `MODEL_SEQUENCES` says how many sequences. Each has a seed of its own, which a failure names:
//! `MODEL_SEED=SEED MODEL_SEQUENCES=1` runs that one again, the threads' timing aside.

mod node;
mod reference;

use std::{
    env,
    panic::resume_unwind,
    process::Stdio,
    rc::Rc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    thread::{self, available_parallelism},
    time::Duration,
};

use proptest::{
    collection::vec,
    prelude::{Just, Strategy, TestCaseError, any},
    prop_oneof,
    test_runner::{Config, RngSeed, TestRunner},
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;
use tokio::{runtime::Runtime, time::Instant};
use waypost::spool::{DeathReason, Entry, Queue, Undelivered, Which};

use self::{
    node::{Brokers, COMPARED, LANES, Node, PUBLISH_TIMEOUT, RETRY, number},
    reference::{Check, DiskWork, Doubt, Excuse, Model},
};
use crate::support::process;

/// An event. A number picks one of the records or publishes that are there, if there are any.
#[derive(Clone, Copy, Debug)]
enum Step {
    Ingest {
        count: usize,
        pinned: Option<usize>,
    },
    /// The broker has the record and says so.
    Confirm(usize),
    /// The broker has the record and says that it has not.
    Lose(usize),
    /// The broker has the record and says nothing.
    Silence(usize),
    /// The broker has not got the record.
    GiveBack(usize),
    Lane {
        lane: usize,
        up: bool,
    },
    /// A power cut of a broker.
    Forget {
        lane: usize,
        up: bool,
    },
    /// The API takes a record, and its ack reaches the broker or does not.
    Deliver {
        at: usize,
        acked: bool,
    },
    /// The API will never take a record.
    Refuse(usize),
    /// Another node takes a record from its broker.
    Take(usize),
    /// An operator purges a broker.
    Purge(usize),
    /// The other nodes of a broker leave.
    Leave(usize),
    Replay(Option<usize>),
    Drop(Option<usize>),
    /// With the next record that it is sent.
    RouterDies,
    Disk(Disk),
    Pass(Duration),
    /// The process is killed and started again.
    Crash,
    /// A power cut of the node and all brokers, which are up again or not.
    PowerCut {
        up: bool,
    },
    /// The node drains, ends and is started again.
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    Works,
    FailsToWrite,
    FailsToSync,
    /// The next write takes until the disk does something else.
    Hangs,
    /// The process is killed at the write or sync after so many others.
    Kills {
        after: usize,
        /// By a power cut of the brokers, too.
        cut: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let lane = 0..LANES.len();
    let one = || any::<u8>().prop_map(usize::from);
    let some = || prop_oneof![2 => Just(None), 1 => one().prop_map(Some)];
    let pinned = prop_oneof![2 => Just(None), 1 => lane.clone().prop_map(Some)];
    let disk = prop_oneof![
        3 => Just(Disk::Works),
        1 => Just(Disk::FailsToWrite),
        1 => Just(Disk::FailsToSync),
        1 => Just(Disk::Hangs),
        4 => (0usize..5, any::<bool>()).prop_map(|(after, cut)| Disk::Kills { after, cut }),
    ];
    prop_oneof![
        12 => (1usize..4, pinned).prop_map(|(count, pinned)| Step::Ingest { count, pinned }),
        8 => one().prop_map(Step::Confirm),
        2 => one().prop_map(Step::Lose),
        2 => one().prop_map(Step::Silence),
        4 => one().prop_map(Step::GiveBack),
        6 => (lane.clone(), any::<bool>()).prop_map(|(lane, up)| Step::Lane { lane, up }),
        3 => (lane, any::<bool>()).prop_map(|(lane, up)| Step::Forget { lane, up }),
        6 => (one(), any::<bool>()).prop_map(|(at, acked)| Step::Deliver { at, acked }),
        5 => one().prop_map(Step::Refuse),
        2 => one().prop_map(Step::Take),
        1 => (0..LANES.len()).prop_map(Step::Purge),
        1 => (0..LANES.len()).prop_map(Step::Leave),
        2 => some().prop_map(Step::Replay),
        1 => some().prop_map(Step::Drop),
        2 => Just(Step::RouterDies),
        4 => disk.prop_map(Step::Disk),
        3 => prop_oneof![Just(RETRY), Just(PUBLISH_TIMEOUT + RETRY)].prop_map(Step::Pass),
        2 => Just(Step::Crash),
        1 => any::<bool>().prop_map(|up| Step::PowerCut { up }),
        1 => Just(Step::Stop),
    ]
}

/// How much room the spool has: segments of an entry or two, or one for all.
fn room() -> impl Strategy<Value = u64> {
    prop_oneof![Just(SMALL), Just(1 << 30)]
}

/// Set in the processes that run sequences.
const CHILD: &str = "MODEL_CHILD";
const SMALL: u64 = 4 << 10;
/// So often the actors and the disk may take turns until all rest.
const TURNS_MAX: usize = 50;
/// Panics that a supervisor forgives an actor within a minute.
const DEATHS_MAX: usize = 4;

static ROUTER_DIES: AtomicBool = AtomicBool::new(false);
static KILLED: AtomicBool = AtomicBool::new(false);
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// No panic hook speaks of it.
fn die() {
    resume_unwind(Box::new("planted"));
}

fn set_disk(disk: Disk) {
    for (point, fails) in [
        ("spool-write", Disk::FailsToWrite),
        ("spool-sync", Disk::FailsToSync),
    ] {
        if let Disk::Kills { after, .. } = disk {
            LEFT.store(after, SeqCst);
            let kill = || {
                if LEFT
                    .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1))
                    .is_err()
                {
                    KILLED.store(true, SeqCst);
                    die();
                }
            };
            fail::cfg_callback(point, kill).expect("a name");
        } else {
            let action = match disk {
                Disk::Hangs if point == "spool-write" => "pause",
                _ if disk == fails => "return",
                _ => "off",
            };
            fail::cfg(point, action).expect("an action");
        }
    }
}

struct Run {
    clock: Rc<Runtime>,
    brokers: Brokers,
    model: Model,
    node: Option<Node>,
    folder: TempDir,
    room: u64,
    runs: usize,
    disk: Disk,
    /// Since it last rested.
    disk_hung: bool,
    /// If the process is killed, so are the brokers, which are up again or not.
    cut: Option<bool>,
    /// Of the router, in this run.
    deaths: usize,
}

impl Run {
    fn new(clock: Rc<Runtime>, room: u64) -> Self {
        let folder = TempDir::new_in(node::folder()).expect("a temporary folder");
        let mut run = Self {
            clock,
            brokers: Brokers::new(),
            model: Model::default(),
            node: None,
            folder,
            room,
            runs: 0,
            disk: Disk::Works,
            disk_hung: false,
            cut: None,
            deaths: 0,
        };
        run.start();
        run
    }

    fn start(&mut self) {
        self.set_disk(Disk::Works);
        KILLED.store(false, SeqCst);
        ROUTER_DIES.store(false, SeqCst);
        self.runs += 1;
        self.deaths = 0;
        for lane in 0..LANES.len() {
            self.brokers.share(lane, false);
        }
        let clock = Rc::clone(&self.clock);
        self.node = Some(Node::start(
            clock,
            &self.brokers,
            self.folder.path(),
            self.room,
            self.runs,
        ));
    }

    fn set_disk(&mut self, disk: Disk) {
        self.disk_hung |= disk == Disk::Hangs;
        self.cut = matches!(disk, Disk::Kills { cut: true, .. }).then_some(true);
        self.disk = disk;
        set_disk(disk);
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("a node runs between the steps")
    }

    fn excuse(&self) -> Excuse {
        Excuse {
            disk_fails: matches!(self.disk, Disk::FailsToWrite | Disk::FailsToSync),
            disk_hangs: self.disk_hung,
            room_is_small: self.room == SMALL,
            is_killed: KILLED.load(SeqCst),
        }
    }

    fn now(&self) -> Instant {
        let _entered = self.clock.enter();
        Instant::now()
    }

    fn check_answers(&mut self) -> Check {
        let (excuse, now) = (self.excuse(), self.now());
        for (number, answer) in self.node().answers() {
            self.model.answered(number, &answer, excuse, now)?;
        }
        Ok(())
    }

    /// Lets all actors and the disk work until they rest, and compares the node with the model.
    fn settle(&mut self) -> Check {
        let mut turns = 0;
        loop {
            self.node().turn();
            if self.disk != Disk::Hangs {
                self.node().disk_works();
            }
            self.check_answers()?;
            self.model.passed(self.now());
            if KILLED.load(SeqCst) {
                self.restart(true, Node::crash)?;
                turns = 0;
                continue;
            }
            turns += 1;
            if self.disk == Disk::Hangs {
                // What the disk owes cannot be known.
                self.model.stepped(&self.brokers, self.excuse());
                return Ok(());
            }
            match self.model.agrees(self.node(), &self.brokers) {
                // An answer of the disk may have led to more work for it.
                Ok(()) if turns > 1 => {
                    let dead = dead(self.node());
                    // The disk also works by itself: it may have been killed just now.
                    if !KILLED.load(SeqCst) {
                        self.model.lists(dead)?;
                        break;
                    }
                }
                Err(why) if turns > TURNS_MAX => return Err(why),
                _ => {}
            }
        }
        let stats = self.node().spool_stats();
        let copies = LANES.iter().map(|&lane| stats.kept(lane)).sum();
        self.model.rested(copies);
        self.model.stepped(&self.brokers, self.excuse());
        self.disk_hung = false;
        Ok(())
    }

    /// Ends the process by `end`, and starts another.
    fn restart(&mut self, is_midst: bool, end: impl FnOnce(Node)) -> Check {
        let publishing = self.brokers.publishing();
        end(self.node.take().expect("a node runs"));
        let is_midst = is_midst || KILLED.load(SeqCst);
        // An orderly end takes its time.
        self.model.passed(self.now());
        let disk = match (self.disk_hung, is_midst) {
            (true, _) => DiskWork::Unbounded,
            (false, true) => DiskWork::Some,
            (false, false) => DiskWork::None,
        };
        self.model.crashed(&self.brokers, &publishing, disk);
        if let Some(up) = self.cut {
            for lane in 0..LANES.len() {
                self.forget(lane, up);
            }
        }
        self.start();
        let node = self.node();
        let found = node.found;
        let dead = dead(node);
        self.model.restarted(&found, dead)
    }

    /// The process is killed between two steps, and the brokers as `cut` says.
    fn crash(&mut self, cut: Option<bool>) -> Check {
        if self.disk == Disk::Hangs {
            let cut = cut.is_some();
            self.set_disk(Disk::Kills { after: 0, cut });
            self.node().disk_works();
        } else {
            self.set_disk(Disk::Works);
        }
        self.cut = cut;
        self.restart(false, Node::crash)
    }

    fn forget(&mut self, lane: usize, up: bool) {
        let lost = self.brokers.forget(lane, up, self.now());
        self.model.forgot(lane, lost.iter().map(number).collect());
    }

    fn publish(&self, at: usize) -> Option<usize> {
        pick(at, self.brokers.publishing().len())
    }

    /// The lane and place of a record that a broker may hand out.
    fn stored(&self, at: usize) -> Option<(usize, usize)> {
        let lanes = (0..LANES.len()).filter(|&lane| self.brokers.is_up(lane));
        let all: Vec<_> = lanes
            .flat_map(|lane| (0..self.brokers.records(lane).len()).map(move |at| (lane, at)))
            .collect();
        pick(at, all.len()).map(|at| all[at])
    }

    fn confirm(&mut self, at: usize) {
        let now = self.now();
        let publish = self.brokers.end(at, true, now);
        self.model.confirmed(publish.lane, &publish.record, now);
        publish.confirm();
    }

    /// The broker says that it has not the record of a publish, whether it has it or not.
    fn deny(&mut self, at: usize, is_stored: bool) {
        let Some(at) = self.publish(at) else {
            return;
        };
        let publish = self.brokers.end(at, is_stored, self.now());
        if is_stored {
            self.model.lost(number(&publish.record));
        }
        publish.refuse();
    }

    /// Stops the node and starts another, once each client has its answer.
    fn stop(&mut self) -> Check {
        for _ in 0..TURNS_MAX {
            self.node().pass(PUBLISH_TIMEOUT + RETRY);
            self.settle()?;
            if !self.model.owes_an_answer() {
                break;
            }
        }
        self.restart(false, Node::stop)
    }

    /// Does what a forwarder does after a 2xx.
    fn deliver(&mut self, lane: usize, at: usize, acked: bool) -> Check {
        let record = self.brokers.records(lane)[at].record.clone();
        let node = self.node();
        if node.ledger.is_delivered(&record) {
            node.ledger.redelivered(LANES[lane]);
            self.model.ended(lane, &record);
        } else {
            node.ledger.delivered(LANES[lane], [&record]);
            self.model.delivered(lane, &record)?;
        }
        self.node().copies[lane].release(&record);
        if acked {
            self.brokers.records(lane).remove(at);
        }
        Ok(())
    }

    fn take(&mut self, lane: usize, at: usize) {
        self.brokers.share(lane, true);
        let stored = self.brokers.records(lane).remove(at);
        self.model.gone(lane, number(&stored.record), true);
    }

    fn purge(&mut self, lane: usize) {
        for stored in self.brokers.records(lane).drain(..) {
            self.model.gone(lane, number(&stored.record), false);
        }
    }

    /// Does what a forwarder does with a record that the API will never take.
    fn refuse(&mut self, lane: usize, at: usize) -> Check {
        let record = self.brokers.records(lane)[at].record.clone();
        let node = self.node();
        if node.ledger.is_delivered(&record) {
            return self.deliver(lane, at, true);
        }
        let letter = DeathReason {
            lane: LANES[lane].to_string(),
            status: 422,
            ..DeathReason::default()
        };
        let entry = Entry::new(&record, Some(letter));
        match node.ask(node.spool.put(Queue::Dead, &entry)) {
            Ok(_) => {
                node.ledger.dead(LANES[lane], &record);
                node.copies[lane].release(&record);
                self.brokers.records(lane).remove(at);
                self.model.dead_letter(lane, &record);
            }
            Err(_) if KILLED.load(SeqCst) => self.model.doubts(Doubt::DeadLetter(number(&record))),
            Err(_) => {}
        }
        Ok(())
    }

    /// Replays or drops all dead letters, or those of one record, as an operator does.
    fn empty(&mut self, at: Option<usize>, replay: bool) -> Check {
        let dead = self.model.dead();
        let only = at.and_then(|at| pick(at, dead.len())).map(|at| dead[at]);
        let numbers: Vec<_> = dead
            .iter()
            .copied()
            .filter(|number| only.is_none_or(|only| only == *number))
            .collect();
        let which = only.map_or(Which::All, |number| Which::Ids {
            ids: [node::id(number).to_string()].into(),
            api: None,
        });
        let node = self.node();
        let count = node.ask(async {
            if replay {
                node.spool.replay(Undelivered::Dead, which).await
            } else {
                node.spool.forget(Undelivered::Dead, which).await
            }
        });
        match count {
            Ok(count) if count != numbers.len() as u64 => {
                Err(format!("{count} dead letters are gone, not {numbers:?}"))
            }
            Ok(_) if replay => {
                self.model.replayed(&numbers);
                Ok(())
            }
            Ok(count) => {
                node.ledger.dropped(count);
                self.model.dropped(&numbers);
                Ok(())
            }
            Err(_) if KILLED.load(SeqCst) => {
                self.model.doubts(if replay {
                    Doubt::Replayed(numbers)
                } else {
                    Doubt::Dropped(numbers)
                });
                Ok(())
            }
            // Nothing has happened then.
            Err(_) => Ok(()),
        }
    }

    /// Whether there is nothing that the step could act on.
    fn is_vacuous(&self, step: Step) -> bool {
        match step {
            Step::Confirm(_) | Step::Lose(_) | Step::Silence(_) | Step::GiveBack(_) => {
                self.brokers.publishing().is_empty()
            }
            Step::Lane { lane, up } => self.brokers.is_up(lane) == up,
            Step::Refuse(_) | Step::Replay(_) | Step::Drop(_) | Step::Stop
                if self.disk == Disk::Hangs =>
            {
                true
            }
            Step::Deliver { .. } | Step::Refuse(_) | Step::Take(_) => self.stored(0).is_none(),
            _ => false,
        }
    }

    fn apply(&mut self, step: Step) -> Check {
        if self.is_vacuous(step) {
            return Ok(());
        }
        match step {
            Step::Ingest { count, pinned } => {
                for _ in 0..count {
                    let record = self.node().record(self.model.posted());
                    self.node().ingest(record.clone(), pinned);
                    self.model.ingest(record, pinned);
                }
            }
            Step::Confirm(at) => {
                if let Some(at) = self.publish(at) {
                    self.confirm(at);
                }
            }
            Step::Lose(at) => self.deny(at, true),
            Step::GiveBack(at) => self.deny(at, false),
            Step::Silence(at) => {
                if let Some(at) = self.publish(at) {
                    let record = self.brokers.store(at, self.now());
                    self.model.lost(number(&record));
                }
            }
            Step::Lane { lane, up } => {
                self.brokers.switch(lane, up);
                self.node().pass(RETRY);
            }
            Step::Forget { lane, up } => {
                self.forget(lane, up);
                self.node().pass(RETRY);
            }
            Step::Deliver { at, acked } => {
                if let Some((lane, at)) = self.stored(at) {
                    self.deliver(lane, at, acked)?;
                }
            }
            Step::Refuse(at) => {
                if let Some((lane, at)) = self.stored(at) {
                    self.refuse(lane, at)?;
                }
            }
            Step::Take(at) => {
                if let Some((lane, at)) = self.stored(at) {
                    self.take(lane, at);
                }
            }
            Step::Purge(lane) => self.purge(lane),
            // They stay until the lane has seen them.
            Step::Leave(lane) => {
                self.node().pass(COMPARED);
                self.brokers.share(lane, false);
            }
            Step::Replay(at) => self.empty(at, true)?,
            Step::Drop(at) => self.empty(at, false)?,
            Step::RouterDies => {
                if self.deaths < DEATHS_MAX && !ROUTER_DIES.swap(true, SeqCst) {
                    self.deaths += 1;
                }
            }
            Step::Disk(disk) => self.set_disk(disk),
            Step::Pass(time) => self.node().pass(time),
            Step::Crash => self.crash(None)?,
            Step::PowerCut { up } => self.crash(Some(up))?,
            Step::Stop => self.stop()?,
        }
        self.settle()
    }

    /// Nothing fails any more, and everything goes its way to the end.
    fn finish(&mut self) -> Check {
        self.set_disk(Disk::Works);
        ROUTER_DIES.store(false, SeqCst);
        for lane in 0..LANES.len() {
            self.brokers.switch(lane, true);
        }
        for _ in 0..TURNS_MAX {
            self.empty_lanes()?;
            if self.model.ends(&self.node().spool_stats()).is_err() {
                self.node().pass(RETRY);
                continue;
            }
            // A comparison may find that records are missing, and let their copies out.
            self.node().pass(COMPARED);
            self.settle()?;
            if self.brokers.publishing().is_empty() {
                break;
            }
        }
        self.model.ends(&self.node().spool_stats())?;
        self.model.knows_gone(self.node())
    }

    fn empty_lanes(&mut self) -> Check {
        self.settle()?;
        while self.publish(0).is_some() {
            self.confirm(0);
        }
        self.settle()?;
        while let Some((lane, at)) = self.stored(0) {
            self.deliver(lane, at, true)?;
        }
        self.settle()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.set_disk(Disk::Works);
        if let Some(node) = self.node.take() {
            node.crash();
        }
    }
}

fn pick(at: usize, count: usize) -> Option<usize> {
    at.checked_rem(count)
}

fn dead(node: &Node) -> Vec<usize> {
    let ids = node.dead().unwrap_or_default();
    ids.iter()
        .map(|id| id[1..].parse().expect("an id of ours"))
        .collect()
}

/// Runs the sequences of so many seeds from `first` on.
fn run(first: u64, sequences: u64) {
    fail::cfg_callback("router", || {
        if ROUTER_DIES.swap(false, SeqCst) {
            die();
        }
    })
    .expect("a name");
    let clock = node::clock();
    let steps = (room(), vec(step(), 1..=30));
    for seed in first..first + sequences {
        let rng_seed = RngSeed::Fixed(seed);
        let config = Config {
            cases: 1,
            rng_seed,
            failure_persistence: None,
            max_shrink_iters: 4096,
            ..Config::default()
        };
        let outcome = TestRunner::new(config).run(&steps, |(room, steps)| {
            // The back-offs' jitter.
            fastrand::seed(seed);
            let mut run = Run::new(Rc::clone(&clock), room);
            steps
                .iter()
                .try_for_each(|&step| run.apply(step))
                .and_then(|()| run.finish())
                .map_err(TestCaseError::fail)
        });
        if let Err(why) = outcome {
            panic!("MODEL_SEED={seed}: {why}");
        }
    }
}

fn number_of(variable: &str) -> Option<u64> {
    env::var(variable)
        .ok()
        .map(|number| number.parse().expect("a number"))
}

/// The spool's thread and this one only ever wait for each other: on one core they wake each other
/// for less.
fn stay_on_one_core(nth: usize) {
    let allowed = sched_getaffinity(None).expect("Linux");
    let cores: Vec<_> = (0..CpuSet::MAX_CPU)
        .filter(|&core| allowed.is_set(core))
        .collect();
    let mut one = CpuSet::new();
    one.set(cores[nth % cores.len()]);
    sched_setaffinity(None, &one).expect("a core of those that are allowed");
}

/// The points at which disk and router fail are global to a process, so each core has one of its
/// own, with this test alone.
#[test]
fn every_receipt_is_kept_whatever_is_lost_refused_or_killed() {
    let sequences = number_of("MODEL_SEQUENCES").unwrap_or(2000);
    let first = number_of("MODEL_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    if let Some(nth) = number_of(CHILD) {
        stay_on_one_core(usize::try_from(nth).expect("few children"));
        return run(first, sequences);
    }
    let processes = available_parallelism()
        .map_or(1, |cores| cores.get() as u64)
        .min(sequences);
    let children: Vec<_> = (0..processes)
        .map(|at| {
            let from = sequences * at / processes;
            let to = sequences * (at + 1) / processes;
            let test = thread::current()
                .name()
                .expect("tests have names")
                .to_owned();
            let child = process::start(
                env::current_exe().expect("a path").to_str().expect("UTF-8"),
                |command| {
                    command
                        .args([&test, "--exact", "--nocapture"])
                        .env(CHILD, at.to_string())
                        .stdout(Stdio::null())
                        .stderr(Stdio::piped());
                    command.env("MODEL_SEED", (first + from).to_string());
                    command.env("MODEL_SEQUENCES", (to - from).to_string());
                },
            );
            child.expect("this binary starts again")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("a child ends");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
