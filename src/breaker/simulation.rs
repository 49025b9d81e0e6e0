//! Records that are POSTed, retried and parked beside a breaker, in simulated time: which mixtures
//! of bad records and outages make an API count as down.

use std::cell::{Cell, RefCell};

use futures_util::future::join_all;
use tokio::{sync::Semaphore, time::sleep};

use super::{
    failures::{FAILURES_MAX, PARKED_PATIENCE},
    *,
};
use crate::api::answer::FailureClass;

const SEEDS: u64 = 10;
/// POSTs in flight.
const SLOTS: usize = 64;
/// The time-out of a POST.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Parked records pause for these seconds, or for up to half less.
const PAUSES: [u64; 6] = [1, 4, 16, 64, 256, 600];
/// A few records that are answered have been parked and tried for the third time by then.
const DOWN_WITHIN: Duration = Duration::from_secs(22);
const DAY: Duration = Duration::from_hours(24);
const SECOND: Duration = Duration::from_secs(1);

/// The conduct of an API that takes no record.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Answers500,
    Hangs,
    Refuses,
}

impl Fault {
    const ALL: [Self; 3] = [Self::Answers500, Self::Hangs, Self::Refuses];

    /// The time in which it is noticed at the latest.
    fn down_within(self) -> Duration {
        match self {
            Self::Answers500 => DOWN_WITHIN,
            Self::Hangs => TIMEOUT * FAILURES_MAX + SECOND,
            Self::Refuses => SECOND,
        }
    }
}

/// A record that comes at this time. The API never takes a bad one.
#[derive(Clone, Copy, Debug)]
struct Coming {
    at: Duration,
    is_bad: bool,
}

const fn good(at: Duration) -> Coming {
    Coming { at, is_bad: false }
}

/// `count` records from `at` on, a millisecond apart.
fn stream(at: Duration, count: u32, is_bad: impl Fn(u32) -> bool) -> impl Iterator<Item = Coming> {
    (0..count).map(move |number| Coming {
        at: at + Duration::from_millis(1) * number,
        is_bad: is_bad(number),
    })
}

struct ApiSimulation {
    breaker: Breaker,
    began: Instant,
    fault: Fault,
    /// The API takes nothing from the first until the second. At other times it answers 500 to bad
    /// records.
    outage: [Duration; 2],
    slots: Semaphore,
    /// Bad records are given up when they are as old.
    give_up_after: Duration,
    /// When each good record was taken, and how long after it came.
    taken: RefCell<Vec<(Duration, Duration)>>,
    parked: Cell<usize>,
    /// The times at which the API went down, up again, and so on.
    changes: RefCell<Vec<Duration>>,
}

/// The times at which the API went down, and was up again.
#[derive(Debug)]
struct Seen {
    downs: Vec<Duration>,
    ups: Vec<Duration>,
    taken: Vec<(Duration, Duration)>,
    parked: usize,
}

impl ApiSimulation {
    /// Simulates `records` until `end`.
    async fn run(
        fault: Fault,
        outage: [Duration; 2],
        give_up_after: Duration,
        records: Vec<Coming>,
        end: Duration,
    ) -> Seen {
        let simulation = Self {
            breaker: Breaker::default(),
            began: Instant::now(),
            fault,
            outage,
            slots: Semaphore::new(SLOTS),
            give_up_after,
            taken: RefCell::default(),
            parked: Cell::default(),
            changes: RefCell::default(),
        };
        let all = records.into_iter().map(|record| simulation.live(record));
        // Bad records may have no end.
        drop(timeout(end, join_all(all)).await);
        let changes = simulation.changes.take();
        let every_other = |from| changes.iter().skip(from).step_by(2).copied().collect();
        Seen {
            downs: every_other(0),
            ups: every_other(1),
            taken: simulation.taken.take(),
            parked: simulation.parked.get(),
        }
    }

    /// Notes a change of the breaker.
    fn look(&self) {
        let mut changes = self.changes.borrow_mut();
        if self.breaker.is_open() != (changes.len() % 2 == 1) {
            changes.push(self.now());
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A record in its lane, and then on disk.
    async fn live(&self, record: Coming) {
        sleep(record.at).await;
        let mut trial = Trial::default();
        let slot = self.slots.acquire().await.unwrap();
        let mut backoff = Backoff::new(Duration::from_millis(10), SECOND * 3);
        while !trial.is_guilty() {
            if self.post(record, &mut trial).await {
                return;
            }
            sleep(backoff.next_delay()).await;
        }
        drop(slot);
        self.parked.update(|parked| parked + 1);
        let mut pauses = 0;
        loop {
            let left = (record.at + self.give_up_after).saturating_sub(self.now());
            if left.is_zero() {
                return;
            }
            let failed_at = Instant::now();
            let pause = Duration::from_secs(PAUSES[pauses]).mul_f64(0.5 + fastrand::f64() / 2.0);
            sleep(pause.min(left)).await;
            trial = Trial::parked(trial.is_proven(), failed_at.elapsed());
            if self.post(record, &mut trial).await {
                return;
            }
            if trial.is_api_up() {
                pauses = (pauses + 1).min(PAUSES.len() - 1);
            }
        }
    }

    /// Returns whether the API takes the record.
    async fn post(&self, record: Coming, trial: &mut Trial) -> bool {
        let pass = self.breaker.pass(trial).await;
        let is_away = (self.outage[0]..self.outage[1]).contains(&self.now());
        if !is_away && !record.is_bad {
            sleep(Duration::from_millis(fastrand::u64(1..5))).await;
            pass.succeeded(|| 0);
            self.look();
            let now = self.now();
            self.taken
                .borrow_mut()
                .push((now, now.saturating_sub(record.at)));
            return true;
        }
        let no_answer = |class| Answer::NoAnswer {
            class,
            why: "away".into(),
        };
        let fault = if is_away {
            self.fault
        } else {
            Fault::Answers500
        };
        let (takes, answer) = match fault {
            Fault::Answers500 => {
                let answer = Answer::Status {
                    status: 500,
                    is_retryable: true,
                    retry_after: None,
                    excerpt: String::new(),
                };
                (Duration::from_millis(fastrand::u64(1..5)), answer)
            }
            Fault::Hangs => (TIMEOUT, no_answer(FailureClass::Timeout)),
            Fault::Refuses => (Duration::ZERO, no_answer(FailureClass::Connect)),
        };
        sleep(takes).await;
        pass.failed(&answer, trial);
        self.look();
        false
    }
}

const NEVER: [Duration; 2] = [Duration::MAX; 2];

#[tokio::test(start_paused = true)]
async fn an_api_that_fails_at_a_few_records_is_down_within_a_bound_and_once() {
    for seed in 0..SEEDS {
        fastrand::seed(seed);
        for fault in Fault::ALL {
            // Others may have been taken before.
            let begins = SECOND * fastrand::u32(0..20);
            let ends = begins + fault.down_within() + SECOND * fastrand::u32(0..60);
            let before = fastrand::u32(0..2000);
            let few = fastrand::u32(1..=20);
            let spread = fastrand::u64(1..5000);
            let records = stream(Duration::ZERO, before, |_| false).filter(|r| r.at < begins);
            let in_outage =
                (0..few).map(|_| good(begins + Duration::from_millis(fastrand::u64(0..spread))));
            let records: Vec<_> = records.chain(in_outage).collect();
            let all = records.len();
            let seen = ApiSimulation::run(fault, [begins, ends], DAY, records, ends + SECOND * 90);
            let seen = seen.await;
            let case = format!(
                "seed {seed}, {fault:?}, {few} records, from {begins:?} to {ends:?}: {:?} {:?}",
                seen.downs, seen.ups
            );
            let [down] = *seen.downs else {
                panic!("{case}");
            };
            let latest = begins + Duration::from_millis(spread) + fault.down_within();
            assert!(down >= begins && down <= latest, "{case}");
            // A parked record is the probe when its pause of up to 16 s is over.
            let longest = TIMEOUT + SECOND * 17;
            assert!(matches!(*seen.ups, [up] if up <= ends + longest), "{case}");
            assert_eq!(seen.taken.len(), all, "{case}");
        }
    }
}

/// There are good records after each bad one, with less than 5 s between them.
#[tokio::test(start_paused = true)]
async fn bad_records_at_the_start_or_among_others_never_make_the_api_count_as_down() {
    for seed in 0..SEEDS / 3 {
        fastrand::seed(seed);
        let part = fastrand::u32(1..20);
        let places: [&dyn Fn(u32) -> bool; 3] =
            [&|number| number < 1000, &|number| number % 11 == 5, &|_| {
                fastrand::u32(0..20) < part
            }];
        for (place, is_bad) in places.into_iter().enumerate() {
            let mut records: Vec<_> = stream(Duration::ZERO, 2200, is_bad).collect();
            let good_ones = (0..3).map(|number| good(SECOND * (3 + 4 * number)));
            records.extend(good_ones);
            let bad_ones = records.iter().filter(|record| record.is_bad).count();
            let all_good = records.len() - bad_ones;
            let hour = Duration::from_hours(1);
            let seen = ApiSimulation::run(Fault::Answers500, NEVER, DAY, records, hour).await;
            assert!(
                seen.downs.is_empty(),
                "seed {seed}, place {place}: {:?}",
                seen.downs
            );
            assert_eq!((seen.taken.len(), seen.parked), (all_good, bad_ones));
            let longest = seen.taken.iter().map(|(_, took)| *took).max();
            assert!(longest < Some(SECOND), "{longest:?}");
        }
    }
}

/// Nobody can tell bad records at the end of a stream from an outage, until another comes.
#[tokio::test(start_paused = true)]
async fn bad_records_at_the_end_make_it_count_as_down_after_a_while_until_another_comes() {
    for seed in 0..SEEDS / 3 {
        fastrand::seed(seed);
        for before in [0, 1000] {
            for count in [5, 70, 300] {
                let ten_minutes = Duration::from_mins(10);
                let stream = stream(Duration::ZERO, before + count, |number| number >= before);
                let mut records: Vec<_> = stream.collect();
                let last = records.last().unwrap().at;
                records.push(good(ten_minutes));
                let end = ten_minutes + Duration::from_hours(1);
                let fault = Fault::Answers500;
                let seen = ApiSimulation::run(fault, NEVER, DAY, records.clone(), end).await;
                let case = format!("seed {seed}, {before} and {count}: {:?}", seen.downs);
                assert!(
                    matches!(*seen.downs, [down] if down >= PARKED_PATIENCE
                    && down <= last + DOWN_WITHIN),
                    "{case}"
                );
                let (up, took) = *seen.taken.last().unwrap();
                assert!(took <= PROBE_CAP + SECOND / 10, "{case}, {took:?}");
                assert!(seen.ups[0] < up + SECOND, "{case}");
                // If they are given up before, nothing else is said.
                let given_up = Duration::from_secs(6);
                let seen = ApiSimulation::run(fault, NEVER, given_up, records, end).await;
                assert!(seen.downs.is_empty(), "{case}: {seen:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_shows_beside_records_that_are_known_to_be_bad_and_ends_with_the_first_good_one()
{
    for seed in 0..SEEDS / 3 {
        fastrand::seed(seed);
        for fault in [Fault::Answers500, Fault::Refuses] {
            let begins = Duration::from_secs(fastrand::u64(20..200));
            let ends = begins + Duration::from_mins(1);
            let mut records: Vec<_> = stream(Duration::ZERO, 1000, |n| n % 11 == 5).collect();
            records.extend([good(SECOND * 2), good(SECOND * 6)]);
            records.extend(stream(begins, 20, |_| false));
            let end = ends + Duration::from_hours(1);
            let seen = ApiSimulation::run(fault, [begins, ends], DAY, records, end).await;
            let case = format!("seed {seed}, {fault:?}: {:?} {:?}", seen.downs, seen.ups);
            assert!(
                matches!(*seen.downs, [down] if down >= begins && down <= begins + DOWN_WITHIN),
                "{case}"
            );
            assert!(
                matches!(*seen.ups, [up] if up <= ends + SECOND * 3),
                "{case}"
            );
        }
    }
}
