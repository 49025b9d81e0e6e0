//! The model: where the copies of each record can be, and what its client was promised. It shares
//! no state with the node.

use tokio::time::Instant;
use waypost::{
    actors::receipts::Refused,
    delivery::Receipt,
    record::Record,
    spool::{NotSafe, Queue, SpoolStats},
};

use super::node::{Brokers, LANES, Node, becomes_durable, body, forgets, is_durable, number};

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
    /// Each time that a broker has confirmed it to its waiting client.
    confirmed: Vec<Confirm>,
    /// How many entries of it wait on disk, at least and at most: a crash may leave it open.
    waiting: (usize, usize),
    /// Copies that must be on disk.
    kept: Vec<Kept>,
    /// How many more copies may be there.
    loose: usize,
    /// The disk may have refused the copy of a publish that is under way.
    lacks_copy: bool,
    /// Since the disk last rested it may have had something of it to write or to remove.
    is_busy: bool,
    /// It was a dead letter, and was let go to any lane.
    replayed: bool,
    delivered: usize,
    dropped: usize,
    /// How often it may be delivered more than once.
    excuses: usize,
    /// When what was delivered or dead in this run was taken in: a dead letter that was let go is
    /// another record.
    ended: Vec<u64>,
    /// A lane has confirmed it to its client in this run, or a record that waited.
    is_confirmed: bool,
    /// A lane has confirmed a record that waited, or a copy.
    may_be_confirmed: bool,
    /// A broker has lost a copy of it, or given one to another node.
    is_gone: bool,
}

#[derive(Debug)]
struct Confirm {
    lane: usize,
    /// The receipt needs nothing more.
    is_enough: bool,
    /// The broker may have lost it since.
    is_forgotten: bool,
}

/// A copy on disk of a record that a lane has confirmed.
#[derive(Debug)]
struct Kept {
    lane: usize,
    at_us: u64,
    /// The time of the confirm, unless the broker has forgotten it.
    since: Option<Instant>,
    /// It may be published again.
    again: bool,
    /// An earlier run has kept it. It may stay when its record ends.
    found: bool,
}

impl Case {
    /// How many publishes of it there may be at a time.
    fn carriers(&self) -> usize {
        let again = self.kept.iter().filter(|copy| copy.again).count();
        usize::from(self.client == Client::Waits) + self.waiting.1 + again + self.loose
    }

    fn waits_as(&self, record: &Record) -> bool {
        self.client == Client::Waits && self.record.origin == record.origin
    }

    /// `lane` has confirmed it as of `at_us`, and its copy is on disk.
    fn keep(&mut self, lane: usize, at_us: u64, since: Option<Instant>) {
        self.kept
            .retain(|copy| (copy.lane, copy.at_us) != (lane, at_us));
        if forgets(lane) && !self.ended.contains(&at_us) {
            self.kept.push(Kept {
                lane,
                at_us,
                since,
                again: since.is_none(),
                found: false,
            });
        }
    }

    /// Copies that match must not be on disk any more, and may be.
    fn loosen(&mut self, which: impl Fn(&Kept) -> bool) {
        self.loose += self.kept.extract_if(.., |copy| which(copy)).count();
    }

    /// It has come out of `lane`, and has ended.
    fn ends(&mut self, lane: usize, at_us: u64) {
        self.ended.push(at_us);
        self.loosen(|copy| copy.at_us == at_us && (copy.again || copy.found));
        self.kept
            .retain(|copy| (copy.lane, copy.at_us) != (lane, at_us));
    }
}

fn at_us(record: &Record) -> u64 {
    record.origin.as_ref().expect("each has an origin").at_us
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
#[expect(
    clippy::struct_excessive_bools,
    reason = "facts that do not depend on each other"
)]
pub struct Excuse {
    pub disk_fails: bool,
    pub disk_hangs: bool,
    pub room_is_small: bool,
    pub is_killed: bool,
}

/// What the disk had to do when the process was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskWork {
    None,
    Some,
    /// It hung before.
    Unbounded,
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
    /// The records that a power cut has taken from brokers in this run.
    forgotten: Vec<usize>,
    /// Whether the broker of each lane has forgotten or lost records in this run, or may have: then
    /// all of its copies may be published again, those of publishes under way included.
    is_doubted: [bool; LANES.len()],
    /// Another node has consumed in this run.
    is_shared: bool,
    /// The disk has failed or hung in this run: it may not name the brokers of all copies.
    has_failed: bool,
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
            confirmed: Vec::new(),
            waiting: (0, 0),
            kept: Vec::new(),
            loose: 0,
            lacks_copy: false,
            is_busy: true,
            replayed: false,
            delivered: 0,
            dropped: 0,
            excuses: 0,
            ended: Vec::new(),
            is_confirmed: false,
            may_be_confirmed: false,
            is_gone: false,
        });
    }

    pub fn answered(
        &mut self,
        number: usize,
        answer: &Result<Receipt, Refused>,
        excuse: Excuse,
        now: Instant,
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
                let of_lane = |confirm: &&Confirm| LANES[confirm.lane] == *lane;
                let mut confirms = case.confirmed.iter().filter(of_lane);
                // Of two, it is the later one.
                let Some(confirm) = confirms.next_back() else {
                    return Err(format!(
                        "r{number} has a receipt of {lane}, which did not confirm it"
                    ));
                };
                let (lane, is_forgotten) = (confirm.lane, confirm.is_forgotten);
                case.keep(lane, at_us(&case.record), (!is_forgotten).then_some(now));
                case.is_confirmed = true;
            }
            Ok(Receipt::Spool) => {
                ensure!(
                    !case.confirmed.iter().any(|confirm| confirm.is_enough),
                    "r{number} was confirmed by a lane, and went to disk"
                );
                case.waiting = (case.waiting.0 + 1, case.waiting.1 + 1);
            }
            // The disk may do later what it was asked to.
            Err(Refused::NoLane) if excuse.disk_hangs => case.waiting.1 += 1,
            Err(Refused::NotSafe(NotSafe::Closed)) if excuse.is_killed => case.waiting.1 += 1,
            Err(Refused::NotSafe(NotSafe::Disk(_))) if excuse.disk_fails => {}
            Err(Refused::NotSafe(NotSafe::Full)) if excuse.room_is_small => {}
            Err(why) => return Err(format!("r{number} is refused for no reason: {why}")),
        }
        Ok(())
    }

    pub fn confirmed(&mut self, lane: usize, record: &Record, now: Instant) {
        let number = number(record);
        let case = &mut self.cases[number];
        // A copy that is published again may have the confirm.
        let is_doubted = forgets(lane) && self.is_doubted[lane];
        let is_enough = !(is_doubted || forgets(lane) && case.lacks_copy);
        case.loose += usize::from(is_doubted);
        // A dead letter that was let go is another record to the ledger: its client may still wait
        // for the first.
        if case.waits_as(record) {
            case.confirmed.push(Confirm {
                lane,
                is_enough,
                is_forgotten: false,
            });
            return;
        }
        self.unsettled.push(number);
        let may_be_copy = |copy: &Kept| copy.again && copy.lane == lane;
        let may_be_copy = forgets(lane) && (case.loose > 0 || case.kept.iter().any(may_be_copy));
        let may_be_entry = case.waiting.1 > 0;
        // The run that accepted it counts a copy.
        case.is_confirmed |= may_be_entry && !may_be_copy;
        case.may_be_confirmed |= may_be_entry;
        if may_be_entry {
            case.waiting.0 = case.waiting.0.saturating_sub(1);
        }
        if !is_enough || may_be_entry && may_be_copy {
            // If it was the copy, a new one is in its place, which may go earlier.
            let at_us = at_us(record);
            case.loosen(|copy| copy.again && (copy.lane, copy.at_us) == (lane, at_us));
            case.loose += 1;
            return;
        }
        if may_be_entry {
            case.waiting.1 -= 1;
        }
        case.keep(lane, at_us(record), Some(now));
    }

    /// The broker of `lane` has forgotten `forgotten`, which it had, in a power cut.
    pub fn forgot(&mut self, lane: usize, forgotten: Vec<usize>) {
        self.is_doubted[lane] = true;
        self.forgotten.extend(forgotten);
        for case in &mut self.cases {
            let ended = std::mem::take(&mut case.ended);
            case.loosen(|copy| copy.lane == lane && ended.contains(&copy.at_us));
            case.ended = ended;
            for copy in case.kept.iter_mut().filter(|copy| copy.lane == lane) {
                copy.since = None;
                copy.again = true;
            }
            for confirm in case.confirmed.iter_mut().filter(|it| it.lane == lane) {
                confirm.is_forgotten = true;
                confirm.is_enough = false;
            }
        }
    }

    /// A broker has the record, and the confirm did not come.
    pub fn lost(&mut self, number: usize) {
        self.cases[number].excuses += 1;
    }

    /// The broker of `lane` has lost a copy of a record, or given it to another node.
    pub fn gone(&mut self, lane: usize, number: usize, is_taken: bool) {
        self.cases[number].is_gone = true;
        self.gone.push(number);
        self.is_doubted[lane] = true;
        self.is_shared |= is_taken;
    }

    pub fn delivered(&mut self, lane: usize, record: &Record) -> Check {
        let number = number(record);
        self.ended(lane, record);
        let case = &mut self.cases[number];
        case.delivered += 1;
        ensure!(
            case.delivered <= 1 + case.excuses,
            "r{number} is delivered {} times, {} excused",
            case.delivered,
            case.excuses
        );
        Ok(())
    }

    /// A record has come out of `lane`, and has ended: its copy goes.
    pub fn ended(&mut self, lane: usize, record: &Record) {
        let number = number(record);
        self.unsettled.push(number);
        self.cases[number].ends(lane, at_us(record));
    }

    pub fn dead_letter(&mut self, lane: usize, record: &Record) {
        self.ended(lane, record);
        self.dead.push(number(record));
        self.dead.sort_unstable();
    }

    /// The records of the dead letters on disk.
    pub fn dead(&self) -> &[usize] {
        &self.dead
    }

    /// The disk has done all that it was asked to, and has so many copies.
    pub fn rested(&mut self, copies: u64) {
        self.unsettled.clear();
        for case in &mut self.cases {
            if copies == 0 {
                case.loose = 0;
            }
            case.is_busy = case.carriers() + case.kept.len() > 0;
        }
    }

    /// It is `now`: confirms may have become durable.
    pub fn passed(&mut self, now: Instant) {
        let is_durable = |copy: &Kept| copy.since.is_some_and(|at| is_durable(copy.lane, at, now));
        for case in &mut self.cases {
            case.loosen(is_durable);
        }
    }

    /// A step is over. What is being published by now began with this disk, or before.
    pub fn stepped(&mut self, brokers: &Brokers, excuse: Excuse) {
        self.has_failed |= excuse.disk_fails || excuse.disk_hangs;
        let is_doubtful = excuse.disk_fails || excuse.disk_hangs || excuse.room_is_small;
        let mut published = vec![false; self.cases.len()];
        for (lane, record) in brokers.publishing() {
            published[number(&record)] |= forgets(lane);
        }
        for (case, is_published) in self.cases.iter_mut().zip(published) {
            case.lacks_copy = is_published && (case.lacks_copy || is_doubtful);
            for copy in &mut case.kept {
                copy.again |= self.is_doubted[copy.lane];
            }
            // Such a copy of a record that has ended, by another lane, goes once it is read.
            let ended = std::mem::take(&mut case.ended);
            case.loosen(|copy| copy.again && ended.contains(&copy.at_us));
            case.ended = ended;
        }
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

    /// The process has been killed, in the midst of the disk's work or at rest, while these records
    /// were being published.
    pub fn crashed(&mut self, brokers: &Brokers, publishing: &[(usize, Record)], disk: DiskWork) {
        let in_midst = usize::from(disk != DiskWork::None);
        let is_again = self.copies_come_again(disk);
        for number in self.unsettled.drain(..) {
            self.cases[number].waiting.1 += in_midst;
            self.cases[number].loose += in_midst;
        }
        for (lane, record) in publishing {
            self.cases[number(record)].loose += usize::from(forgets(*lane));
        }
        for case in &mut self.cases {
            if case.is_busy {
                // Each that tries it leaves a copy for each lane, and may have begun anew. While
                // the disk hangs, it does so again and again.
                let tries = 2 * LANES.len() * (1 + case.carriers());
                case.loose += match disk {
                    DiskWork::None => 0,
                    DiskWork::Some => tries,
                    DiskWork::Unbounded => 100 * tries,
                };
            }
            if case.client == Client::Waits {
                case.client = Client::HasNone;
                case.waiting.1 += in_midst;
            }
            for copy in &mut case.kept {
                copy.found = true;
                copy.again |= is_again[copy.lane];
            }
            case.confirmed.clear();
            case.lacks_copy = false;
            case.ended.clear();
            case.is_confirmed = false;
            case.may_be_confirmed = false;
            let again = case.kept.iter().filter(|copy| copy.again).count();
            case.excuses += case.waiting.1 + case.loose + again;
        }
        self.gone.clear();
        self.forgotten.clear();
        self.is_doubted = Default::default();
        self.is_shared = false;
        self.has_failed = false;
        // The new process has an empty ledger.
        for lane in 0..LANES.len() {
            for stored in &*brokers.records(lane) {
                self.cases[number(&stored.record)].excuses += 1;
            }
        }
    }

    /// Whether the next run may publish the copies of each lane again, though its broker is the
    /// same.
    fn copies_come_again(&self, disk: DiskWork) -> [bool; LANES.len()] {
        let is_unsure = self.has_failed
            || disk != DiskWork::None
            || self.cases.iter().any(|case| case.loose > 0);
        let copies = self.cases.iter().flat_map(|case| &case.kept);
        std::array::from_fn(|lane| {
            is_unsure
                || !becomes_durable(lane)
                || self.is_doubted[lane]
                || copies.clone().any(|copy| copy.lane == lane && copy.again)
        })
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

    /// Compares the copies on disk with those that must be there, and with those that may.
    fn copies(&self, stats: &SpoolStats, publishing: &[(usize, Record)]) -> Check {
        let mut own = 0;
        let mut most = publishing.iter().filter(|(lane, _)| forgets(*lane)).count();
        most += self.cases.iter().map(|case| case.loose).sum::<usize>();
        for (lane, id) in LANES.into_iter().enumerate() {
            let kept = usize::try_from(stats.kept(id)).expect("few");
            let copies = self.cases.iter().flat_map(|case| &case.kept);
            let least = copies.filter(|copy| copy.lane == lane).count();
            ensure!(kept >= least, "{id} has {kept} copies, less than {least}");
            ensure!(kept == 0 || forgets(lane), "{id} has {kept} copies");
            own += kept;
            most += least;
        }
        ensure!(own <= most, "there are {own} copies, more than {most}");
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
        let publishing = brokers.publishing();
        self.copies(&stats, &publishing)?;
        let mut publishes = vec![0; self.cases.len()];
        let mut needless = publishes.clone();
        for (lane, record) in publishing {
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
            // The copy of a publish that is under way may be published again.
            needless[number] += usize::from(self.is_doubted[lane] && forgets(lane));
        }
        let publishes = publishes.into_iter().zip(needless);
        for (number, (case, (publishes, needless))) in self.cases.iter().zip(publishes).enumerate()
        {
            ensure!(
                publishes <= case.carriers() + needless,
                "r{number} is published {publishes} times without need: {case:?}"
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
            balance.handed_over + balance.missing
                <= (self.gone.len() + self.forgotten.len()) as u64,
            "more is gone than {:?} and {:?}: {balance:?}",
            self.gone,
            self.forgotten
        );
        ensure!(
            self.is_shared || balance.handed_over == 0,
            "nobody took it: {balance:?}"
        );
        // A record may be delivered before its confirm arrives, or without one.
        let came = lanes.accepted + lanes.resent + lanes.recovered;
        if came < lanes.delivered + lanes.dead + lanes.moved {
            let is_early = |case: &Case| !case.ended.is_empty() && case.carriers() > 0;
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
        let is_counted = |number: &usize| self.cases[*number].is_confirmed;
        let may_be = cases
            .iter()
            .filter(|number| self.cases[**number].may_be_confirmed && !is_counted(number));
        let may_be = may_be.count();
        cases.retain(is_counted);
        // A dead letter that was let go is another record to the ledger.
        let (replayed, once): (Vec<_>, Vec<_>) = cases
            .into_iter()
            .partition(|&number| self.cases[number].replayed);
        let unsettled = |number: &&usize| self.cases[**number].ended.is_empty();
        let least = once.iter().filter(unsettled).count();
        let most = least
            + may_be
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
        // A node does not know of each record that another one takes.
        let kept: u64 = LANES.iter().map(|&lane| stats.kept(lane)).sum();
        ensure!(
            kept <= self.gone.len() as u64,
            "{kept} copies are left, and {:?} are gone",
            self.gone
        );
        Ok(())
    }
}
