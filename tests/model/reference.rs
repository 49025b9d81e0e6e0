//! The model: where the copies of each record can be, and what its client was promised. It shares
//! no state with the node.

use waypost::{
    actors::receipts::Refused,
    delivery::Receipt,
    record::Record,
    spool::{NotSafe, Queue, SpoolStats},
};

use super::node::{Brokers, LANES, Node, body, number};

/// The violated rule, in words.
pub type Check = Result<(), String>;

macro_rules! ensure {
    ($holds:expr, $($why:tt)*) => {
        if !$holds {
            return Err(format!($($why)*));
        }
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Waits,
    HasReceipt,
    /// Told that nothing is promised, or cut off by a crash.
    HasNone,
}

/// One record that was posted.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts that do not depend on each other"
)]
struct Case {
    /// As its client posted it.
    record: Record,
    pinned: Option<usize>,
    client: Client,
    /// The lane whose broker has confirmed it to its client.
    confirmed: Option<usize>,
    /// How many entries of it wait on disk, at least and at most: a crash may leave it open.
    waiting: (usize, usize),
    /// It was a dead letter, and was let go to any lane.
    replayed: bool,
    delivered: usize,
    dropped: usize,
    /// How often it may be delivered more than once.
    excuses: usize,
    /// Delivered or dead in this run.
    is_settled: bool,
    /// A lane has confirmed it to its client or to the feeder in this run.
    is_confirmed: bool,
    /// A broker has lost a copy of it, or given one to another node.
    is_gone: bool,
}

impl Case {
    /// How many publishes of it there may be at a time.
    fn carriers(&self) -> usize {
        usize::from(self.client == Client::Waits) + self.waiting.1
    }
}

/// The work of the disk when the process was killed: it may be done or not.
#[derive(Debug)]
pub enum Doubt {
    DeadLetter(usize),
    Replayed(Vec<usize>),
    Dropped(Vec<usize>),
}

/// Whether and why the disk may refuse a record.
#[derive(Clone, Copy, Debug)]
pub struct Excuse {
    pub disk_fails: bool,
    pub room_is_small: bool,
    pub is_killed: bool,
}

/// All records, and the dead letters on disk.
#[derive(Default)]
pub struct Model {
    cases: Vec<Case>,
    /// Dead letters on disk, sorted.
    dead: Vec<usize>,
    /// Entries that a lane has confirmed since the last rest: the disk may not know it yet.
    unsettled: Vec<usize>,
    doubt: Option<Doubt>,
    /// The copies that brokers have lost or given to other nodes in this run.
    gone: Vec<usize>,
    /// Another node has consumed in this run.
    is_shared: bool,
}

impl Model {
    pub fn owes_an_answer(&self) -> bool {
        self.cases.iter().any(|case| case.client == Client::Waits)
    }

    /// How many records were posted.
    pub fn posted(&self) -> usize {
        self.cases.len()
    }

    pub fn ingest(&mut self, record: Record, pinned: Option<usize>) {
        self.cases.push(Case {
            record,
            pinned,
            client: Client::Waits,
            confirmed: None,
            waiting: (0, 0),
            replayed: false,
            delivered: 0,
            dropped: 0,
            excuses: 0,
            is_settled: false,
            is_confirmed: false,
            is_gone: false,
        });
    }

    pub fn answered(
        &mut self,
        number: usize,
        answer: &Result<Receipt, Refused>,
        excuse: Excuse,
    ) -> Check {
        let case = &mut self.cases[number];
        ensure!(case.client == Client::Waits, "r{number} is answered twice");
        case.client = if answer.is_ok() {
            Client::HasReceipt
        } else {
            Client::HasNone
        };
        match answer {
            Ok(Receipt::Lane(lane)) => {
                let confirmed = case.confirmed.map(|lane| LANES[lane]);
                ensure!(
                    confirmed == Some(*lane),
                    "r{number} has a receipt of {lane}, which did not confirm it"
                );
                case.is_confirmed = true;
            }
            Ok(Receipt::Spool) => {
                ensure!(
                    case.confirmed.is_none(),
                    "r{number} was confirmed by a lane, and went to disk"
                );
                case.waiting = (case.waiting.0 + 1, case.waiting.1 + 1);
            }
            Err(Refused::NotSafe(NotSafe::Closed)) if excuse.is_killed => case.waiting.1 += 1,
            Err(Refused::NotSafe(NotSafe::Disk(_))) if excuse.disk_fails => {}
            Err(Refused::NotSafe(NotSafe::Full)) if excuse.room_is_small => {}
            Err(why) => return Err(format!("r{number} is refused for no reason: {why}")),
        }
        Ok(())
    }

    pub fn confirmed(&mut self, lane: usize, record: &Record) {
        let number = number(record);
        let case = &mut self.cases[number];
        // A dead letter that was let go is another record to the ledger: its client may still wait
        // for the first.
        if case.client == Client::Waits && case.record.origin == record.origin {
            case.confirmed = Some(lane);
        } else {
            case.waiting = (case.waiting.0.saturating_sub(1), case.waiting.1 - 1);
            case.is_confirmed = true;
            self.unsettled.push(number);
        }
    }

    /// A broker has the record, and the confirm did not come.
    pub fn lost(&mut self, number: usize) {
        self.cases[number].excuses += 1;
    }

    /// A broker has lost a copy of a record, or given it to another node.
    pub fn gone(&mut self, number: usize, is_taken: bool) {
        self.cases[number].is_gone = true;
        self.gone.push(number);
        self.is_shared |= is_taken;
    }

    pub fn delivered(&mut self, number: usize) -> Check {
        let case = &mut self.cases[number];
        case.delivered += 1;
        case.is_settled = true;
        ensure!(
            case.delivered <= 1 + case.excuses,
            "r{number} is delivered {} times, {} excused",
            case.delivered,
            case.excuses
        );
        Ok(())
    }

    pub fn dead_letter(&mut self, number: usize) {
        self.cases[number].is_settled = true;
        self.dead.push(number);
        self.dead.sort_unstable();
    }

    /// The records of the dead letters on disk.
    pub fn dead(&self) -> &[usize] {
        &self.dead
    }

    /// The disk has done all that it was asked to.
    pub fn rested(&mut self) {
        self.unsettled.clear();
    }

    fn take_dead(&mut self, numbers: &[usize]) {
        self.dead.retain(|number| !numbers.contains(number));
    }

    pub fn replayed(&mut self, numbers: &[usize]) {
        self.take_dead(numbers);
        for &number in numbers {
            let case = &mut self.cases[number];
            case.waiting = (case.waiting.0 + 1, case.waiting.1 + 1);
            case.excuses += 1;
            case.replayed = true;
        }
    }

    pub fn dropped(&mut self, numbers: &[usize]) {
        self.take_dead(numbers);
        for &number in numbers {
            self.cases[number].dropped += 1;
        }
    }

    pub fn doubts(&mut self, doubt: Doubt) {
        self.doubt = Some(doubt);
    }

    /// The process has been killed, in the midst of the disk's work or at rest.
    pub fn crashed(&mut self, brokers: &Brokers, is_midst: bool) {
        for number in self.unsettled.drain(..) {
            self.cases[number].waiting.1 += usize::from(is_midst);
        }
        let stored: Vec<_> = (0..LANES.len())
            .flat_map(|lane| brokers.records(lane).clone())
            .collect();
        for case in &mut self.cases {
            if case.client == Client::Waits {
                case.client = Client::HasNone;
                case.confirmed = None;
                case.waiting.1 += usize::from(is_midst);
            }
            case.is_settled = false;
            case.is_confirmed = false;
            case.excuses += case.waiting.1;
        }
        self.gone.clear();
        self.is_shared = false;
        // The new process has an empty ledger.
        for record in stored {
            self.cases[number(&record)].excuses += 1;
        }
    }

    /// A new process has found this on disk.
    pub fn restarted(&mut self, stats: &SpoolStats, mut found: Vec<usize>) -> Check {
        found.sort_unstable();
        let count =
            |numbers: &[usize], number| numbers.iter().filter(|&&other| other == number).count();
        let mut left = self.dead.clone();
        let doubt = self.doubt.take();
        match &doubt {
            Some(Doubt::DeadLetter(number)) if count(&found, *number) > count(&left, *number) => {
                left.push(*number);
            }
            Some(Doubt::Replayed(numbers) | Doubt::Dropped(numbers)) => {
                let mut gone = numbers.clone();
                for number in &found {
                    if let Some(at) = gone.iter().position(|other| other == number) {
                        gone.swap_remove(at);
                    }
                }
                for number in &gone {
                    let at = left
                        .iter()
                        .position(|other| other == number)
                        .expect("it was dead");
                    left.remove(at);
                    if let Some(Doubt::Dropped(_)) = doubt {
                        self.cases[*number].dropped += 1;
                    } else {
                        self.cases[*number].waiting.0 += 1;
                    }
                }
                if let Some(Doubt::Replayed(_)) = doubt {
                    for &number in numbers {
                        let case = &mut self.cases[number];
                        case.waiting.1 += 1;
                        case.excuses += 1;
                        case.replayed = true;
                    }
                }
            }
            _ => {}
        }
        left.sort_unstable();
        ensure!(left == found, "dead letters found: {found:?}, not {left:?}");
        self.dead = found;
        self.waits(stats)
    }

    fn waits(&self, stats: &SpoolStats) -> Check {
        let (least, most) = self.cases.iter().fold((0, 0), |sum, case| {
            (sum.0 + case.waiting.0, sum.1 + case.waiting.1)
        });
        let waiting = usize::try_from(stats.waiting()).expect("few");
        ensure!(
            (least..=most).contains(&waiting),
            "{waiting} records wait on disk, not {least} to {most}"
        );
        for (lane, id) in LANES.into_iter().enumerate() {
            let pinned = usize::try_from(stats.records(Queue::Pinned(id))).expect("few");
            let most: usize = self
                .cases
                .iter()
                .filter(|case| case.pinned == Some(lane))
                .map(|case| case.waiting.1)
                .sum();
            ensure!(
                pinned <= most,
                "{pinned} records wait on disk for {id}, more than {most}"
            );
        }
        ensure!(stats.records(Queue::Carried) == 0, "something is carried");
        Ok(())
    }

    /// Whether the node, at rest, is where the model says.
    pub fn agrees(&self, node: &Node, brokers: &Brokers) -> Check {
        let stats = node.spool_stats();
        self.waits(&stats)?;
        let dead = usize::try_from(stats.records(Queue::Dead)).expect("few");
        ensure!(
            dead == self.dead.len(),
            "{dead} dead letters are counted, not {:?}",
            self.dead
        );
        let mut publishes = vec![0; self.cases.len()];
        for (lane, record) in brokers.publishing() {
            let number = number(&record);
            let case = self
                .cases
                .get(number)
                .ok_or_else(|| format!("{} was never posted", record.id))?;
            ensure!(
                record.body == body(number),
                "r{number} is {:?}",
                record.body
            );
            ensure!(
                case.pinned.is_none_or(|pinned| pinned == lane) || case.replayed,
                "r{number} is pinned to {:?} and goes out by lane {lane}",
                case.pinned
            );
            publishes[number] += 1;
        }
        for (number, (case, publishes)) in self.cases.iter().zip(publishes).enumerate() {
            ensure!(
                publishes <= case.carriers(),
                "r{number} is published without need"
            );
            let waits = case.client == Client::Waits && node.has_router();
            ensure!(
                !waits || publishes > 0,
                "nobody works for r{number}, and its client waits"
            );
        }
        self.balances(node, &stats)
    }

    fn balances(&self, node: &Node, stats: &SpoolStats) -> Check {
        let balance = node.ledger.balance(stats);
        let lanes = node.ledger.totals();
        // Nothing is gone that no broker has lost.
        ensure!(
            balance.handed_over + balance.missing <= self.gone.len() as u64,
            "more is gone than {:?}: {balance:?}",
            self.gone
        );
        ensure!(
            self.is_shared || balance.handed_over == 0,
            "nobody took it: {balance:?}"
        );
        // A record may be delivered before its confirm arrives, or without one.
        let came = lanes.accepted + lanes.resent + lanes.recovered;
        if came < lanes.delivered + lanes.dead + lanes.moved {
            let is_early = |case: &Case| case.is_settled && case.carriers() > 0;
            ensure!(
                self.cases.iter().any(is_early),
                "more ends than records: {balance:?}"
            );
            return Ok(());
        }
        ensure!(balance.holds(), "the ledger does not balance: {balance:?}");
        Ok(())
    }

    /// Whether the dead letters are those that the model knows.
    pub fn lists(&self, mut found: Vec<usize>) -> Check {
        found.sort_unstable();
        ensure!(
            found == self.dead,
            "dead letters: {found:?}, not {:?}",
            self.dead
        );
        Ok(())
    }

    /// The brokers are empty, and the lanes have compared: the ledger must know what is gone.
    pub fn knows_gone(&self, node: &Node) -> Check {
        for lane in LANES {
            let counts = node.ledger.lane(lane).counts;
            ensure!(counts.in_flight() == 0, "{lane} is empty: {counts:?}");
        }
        let balance = node.ledger.balance(&node.spool_stats());
        let gone = usize::try_from(balance.handed_over + balance.missing).expect("few");
        let mut cases = self.gone.clone();
        cases.sort_unstable();
        cases.dedup();
        cases.retain(|&number| self.cases[number].is_confirmed);
        // A dead letter that was let go is another record to the ledger.
        let (replayed, once): (Vec<_>, Vec<_>) = cases
            .into_iter()
            .partition(|&number| self.cases[number].replayed);
        let unsettled = |number: &&usize| !self.cases[**number].is_settled;
        let least = once.iter().filter(unsettled).count();
        let most = least
            + self
                .gone
                .iter()
                .filter(|number| replayed.contains(number))
                .count();
        ensure!(
            (least..=most).contains(&gone),
            "{gone} records are gone, not {least} to {most}: {balance:?}"
        );
        Ok(())
    }

    /// Everything has come to its end: each promise must be kept.
    pub fn ends(&self, stats: &SpoolStats) -> Check {
        for (number, case) in self.cases.iter().enumerate() {
            ensure!(
                case.client != Client::Waits,
                "the client of r{number} still waits"
            );
            let is_kept = case.delivered > 0
                || case.dropped > 0
                || case.is_gone
                || self.dead.contains(&number);
            ensure!(
                case.client != Client::HasReceipt || is_kept,
                "r{number} is lost: {case:?}"
            );
        }
        ensure!(
            stats.waiting() == 0,
            "{} records still wait on disk",
            stats.waiting()
        );
        Ok(())
    }
}
