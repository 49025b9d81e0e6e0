//! A load on an HTTP server: users that post records, each record exactly once a pass, and what they were answered.
//!
//! Closed loop, a user posts its next record when the last one was answered and it has waited. Open loop, at a fixed rate,
//! records are due at their times whatever the server does, and a record's latency counts from when it was due, so that a
//! server that stalls is charged for all that it kept waiting (no coordinated omission).
//!
//! All users share one thread; each has one connection.

mod connection;
mod reactor;
pub mod report;

use std::{
    cell::{Cell, Ref, RefCell},
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use serde_json::{Value, json, value::RawValue};

use self::{
    connection::{Answer, Connection, Server},
    reactor::Reactor,
};
use crate::{api::client::Target, record::Record};

/// The grain of a timer. Whoever slept until a record was due is not late by that much.
const TIMER_GRAIN: Duration = Duration::from_millis(2);
/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a user that got no answer waits at least: who cannot connect would not let others run.
const PAUSE: Duration = Duration::from_millis(1);
/// How many kinds of failure are told apart; the rest is one more.
const KINDS_MAX: usize = 20;
/// How long a user whose wait is over stays at most for another's answer.
const SLACK_MAX: Duration = Duration::from_millis(20);
/// And at most so small a part of the range of waits: a twentieth.
const SLACK_PART: u32 = 20;
/// Where users make more records a second than this, as if answers took no time, each is on time: records meet at the server, and how
/// they do makes its latency.
const SLACK_RATE_MAX: f64 = 200.0;
const SAMPLE_PERIOD: Duration = Duration::from_secs(1);
/// Latencies are kept in µs up to an hour, to three digits.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// What is posted, by how many, how fast.
pub struct Plan {
    pub records: Vec<Bytes>,
    /// How often all records are posted.
    pub passes: usize,
    pub users: usize,
    /// How many users begin each second.
    pub spawn_rate: f64,
    /// How long a user waits after each answer. Where users are few for their waits, the last part of a wait, 20 ms at most, may end
    /// early, with another's answer: woken less often, the load leaves more of the processor to the server.
    pub wait: Range<Duration>,
    /// Records a second that are due, in an open loop.
    pub rate: Option<f64>,
    /// Each record has an `Idempotency-Key` of its own, under which it may be posted again when its connection breaks.
    pub keyed: bool,
    /// Is told the number of each record that was answered, from 0, and since when its latency counts.
    pub watch: Option<Box<dyn Fn(usize, Instant)>>,
}

/// What a second of the load was like. Latencies in ms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// When it ended, since the begin of the load.
    pub at: Duration,
    pub per_second: f64,
    pub failures_per_second: f64,
    pub p50: f64,
    pub p99: f64,
    pub users: usize,
}

/// The counts so far.
pub struct Tally {
    pub requests: u64,
    /// Answers other than a 2xx, and requests that got none.
    pub failures: u64,
    pub users: usize,
    pub elapsed: Duration,
    /// How often each kind of failure was met.
    pub kinds: BTreeMap<String, u64>,
    pub statuses: BTreeMap<u16, u64>,
    pub samples: Vec<Sample>,
    latency: Histogram<u64>,
    /// Since the last sample.
    recent: Recent,
}

struct Recent {
    since: Duration,
    failures: u64,
    /// The most at a time.
    users: usize,
    latency: Histogram<u64>,
}

/// A load, and its counts while it runs and after it has ended.
pub struct Load {
    target: Target,
    plan: Plan,
    /// Makes each record's key unique among all loads.
    run: String,
    next: Cell<usize>,
    stopped: Arc<AtomicBool>,
    tally: RefCell<Tally>,
}

/// A record that is to be posted next.
struct Turn {
    number: usize,
    due: Option<Instant>,
}

impl Plan {
    /// How long a user whose wait is over may stay until another is answered.
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 users")]
    fn slack(&self) -> Duration {
        let Range { start, end } = self.wait;
        let is_sparse = self.users as f64 <= ((start + end) / 2).as_secs_f64() * SLACK_RATE_MAX;
        if self.users == 1 || self.rate.is_some() || !is_sparse {
            return Duration::ZERO;
        }
        SLACK_MAX.min(end.saturating_sub(start) / SLACK_PART)
    }

    /// The wait that is drawn by a `chance` from 0 to 1: with the slack it is in its range.
    fn draw_wait(&self, chance: f64) -> Duration {
        let Range { start, end } = self.wait;
        start + end.saturating_sub(start + self.slack()).mul_f64(chance)
    }
}

impl Load {
    #[must_use]
    pub fn new(target: Target, plan: Plan) -> Self {
        Self {
            target,
            plan,
            run: Record::new_id().to_string(),
            next: Cell::default(),
            stopped: Arc::default(),
            tally: RefCell::new(Tally::new()),
        }
    }

    /// How many records are posted if nothing stops it.
    #[must_use]
    pub fn total(&self) -> usize {
        self.plan.records.len() * self.plan.passes
    }

    #[must_use]
    pub fn tally(&self) -> Ref<'_, Tally> {
        self.tally.borrow()
    }

    /// Once it is set, no user posts another record. Those under way are answered first.
    #[must_use]
    pub fn stopped(&self) -> &Arc<AtomicBool> {
        &self.stopped
    }

    /// Ends when each record was posted, or the load was stopped. `tick` is given the counts each second.
    ///
    /// # Errors
    /// When the server's name is not known, or the kernel has no descriptor left.
    pub fn run(&self, mut tick: impl FnMut(&Tally)) -> io::Result<()> {
        let reactor = Reactor::new(
            self.plan.users,
            self.plan.slack(),
            Arc::clone(&self.stopped),
        )?;
        let server = Server::find(&self.target, &reactor)?;
        let began = Instant::now();
        let users = (0..self.plan.users)
            .map(|number| Box::pin(self.user(number, began, &reactor, &server)) as _);
        reactor.run(users.collect(), SAMPLE_PERIOD, || {
            self.tally.borrow_mut().sample(began.elapsed());
            tick(&self.tally());
        })?;
        self.tally.borrow_mut().sample(began.elapsed());
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 users")]
    async fn user<'l>(
        &'l self,
        number: usize,
        began: Instant,
        reactor: &'l Reactor,
        server: &'l Server<'l>,
    ) {
        reactor
            .rest(began + Duration::from_secs_f64(number as f64 / self.plan.spawn_rate))
            .await;
        if self.stopped.load(Relaxed) {
            return;
        }
        self.tally.borrow_mut().begin_user();
        let mut connection = Connection::new(server, number);
        let mut rested = Instant::now();
        while let Some(Turn { number, due }) = self.turn(began) {
            let record = &self.plan.records[number % self.plan.records.len()];
            connection.prepare(self.plan.keyed.then_some((&*self.run, number)), record);
            reactor.rest(rested).await;
            let from = match due {
                Some(due) if due > Instant::now() => {
                    reactor.rest(due).await;
                    let now = Instant::now();
                    if now.saturating_duration_since(due) < TIMER_GRAIN {
                        now
                    } else {
                        due
                    }
                }
                Some(due) => due,
                None => Instant::now(),
            };
            if self.stopped.load(Relaxed) {
                break;
            }
            let answer = tokio::select! {
                biased;
                answer = connection.post() => answer,
                () = reactor.until(Instant::now() + TIMEOUT) => Err(format!("no answer within {TIMEOUT:?}")),
            };
            if let Some(watch) = &self.plan.watch {
                watch(number, from);
            }
            let wait = self.plan.draw_wait(fastrand::f64());
            let least = if answer.is_err() {
                PAUSE
            } else {
                Duration::ZERO
            };
            let answered = Instant::now();
            rested = answered + wait.max(least);
            self.tally.borrow_mut().count(answered - from, answer);
        }
        self.tally.borrow_mut().users -= 1;
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody posts 2^52 records")]
    fn turn(&self, began: Instant) -> Option<Turn> {
        let number = self.next.get();
        if self.stopped.load(Relaxed) || number == self.total() {
            return None;
        }
        self.next.set(number + 1);
        let due = self
            .plan
            .rate
            .map(|rate| began + Duration::from_secs_f64(number as f64 / rate));
        Some(Turn { number, due })
    }
}

impl Tally {
    fn new() -> Self {
        // It grows as far as it is needed: the recent one is read and emptied each second.
        let empty = Histogram::new(3).expect("three digits are legal, so this cannot fail");
        Self {
            requests: 0,
            failures: 0,
            users: 0,
            elapsed: Duration::ZERO,
            kinds: BTreeMap::new(),
            statuses: BTreeMap::new(),
            samples: Vec::new(),
            recent: Recent {
                since: Duration::ZERO,
                failures: 0,
                users: 0,
                latency: empty.clone(),
            },
            latency: empty,
        }
    }

    fn begin_user(&mut self) {
        self.users += 1;
        self.recent.users = self.recent.users.max(self.users);
    }

    fn count(&mut self, latency: Duration, answer: Answer) {
        let us =
            u64::try_from(latency.as_micros()).map_or(LATENCY_MAX_US, |us| us.min(LATENCY_MAX_US));
        for histogram in [&mut self.latency, &mut self.recent.latency] {
            histogram
                .record(us)
                .expect("a histogram that grows takes an hour");
        }
        self.requests += 1;
        let failure = match answer {
            Ok(status) => {
                *self.statuses.entry(status.as_u16()).or_default() += 1;
                if status.is_success() {
                    return;
                }
                format!("answered {status}")
            }
            Err(why) => why,
        };
        self.failures += 1;
        self.recent.failures += 1;
        let kind = if self.kinds.len() < KINDS_MAX || self.kinds.contains_key(&failure) {
            failure
        } else {
            "others".into()
        };
        *self.kinds.entry(kind).or_default() += 1;
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of a second")]
    fn sample(&mut self, at: Duration) {
        self.elapsed = at;
        let Recent {
            since,
            failures,
            users,
            latency,
        } = &mut self.recent;
        let seconds = at.saturating_sub(*since).as_secs_f64();
        if latency.is_empty() || seconds <= 0.0 {
            return;
        }
        self.samples.push(Sample {
            at,
            per_second: latency.len() as f64 / seconds,
            failures_per_second: *failures as f64 / seconds,
            p50: ms(latency.value_at_quantile(0.5)),
            p99: ms(latency.value_at_quantile(0.99)),
            users: *users,
        });
        latency.reset();
        (*since, *failures, *users) = (at, 0, self.users);
    }

    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "nobody posts 2^52 records")]
    pub fn per_second(&self) -> f64 {
        if self.elapsed.is_zero() {
            0.0
        } else {
            self.requests as f64 / self.elapsed.as_secs_f64()
        }
    }

    /// The latency in ms that so large a part of the requests did not exceed.
    #[must_use]
    pub fn latency_ms(&self, quantile: f64) -> f64 {
        ms(self.latency.value_at_quantile(quantile))
    }

    #[must_use]
    pub fn latency_max_ms(&self) -> f64 {
        ms(self.latency.max())
    }

    /// For machines.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "requests": self.requests,
            "failures": self.failures,
            "elapsed_s": self.elapsed.as_secs_f64(),
            "requests_per_s": self.per_second(),
            "latency_ms": {
                "p50": self.latency_ms(0.5),
                "p90": self.latency_ms(0.9),
                "p99": self.latency_ms(0.99),
                "p99.9": self.latency_ms(0.999),
                "max": self.latency_max_ms(),
            },
            "statuses": self.statuses,
            "kinds_of_failure": self.kinds,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are true")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// The records of a JSON array or of NDJSON, byte for byte.
///
/// # Errors
/// Says what is wrong, and in NDJSON in which line.
pub fn records(text: &str) -> Result<Vec<Bytes>, String> {
    let bytes = |record: &RawValue| Bytes::copy_from_slice(record.get().as_bytes());
    let records: Vec<_> = if text.trim_start().starts_with('[') {
        let records: Vec<&RawValue> = serde_json::from_str(text).map_err(|why| why.to_string())?;
        records.into_iter().map(bytes).collect()
    } else {
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        let record = |(at, line): (usize, &str)| {
            let record =
                serde_json::from_str(line).map_err(|why| format!("line {}: {why}", at + 1))?;
            Ok::<_, String>(bytes(record))
        };
        lines.map(record).collect::<Result<_, _>>()?
    };
    if records.is_empty() {
        Err("holds no record".into())
    } else {
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_from_an_array_or_from_lines_byte_for_byte() {
        let wanted = [Bytes::from("{\"a\": 1}"), Bytes::from("{\"b\":[ ]}")];
        for text in [
            "[{\"a\": 1},\n {\"b\":[ ]}]",
            "{\"a\": 1}\n\n  {\"b\":[ ]}\r\n",
        ] {
            assert_eq!(records(text).as_deref(), Ok(&wanted[..]), "{text}");
        }
    }

    #[test]
    fn what_holds_no_records_is_refused_with_the_place() {
        for (text, why) in [
            ("", "no record"),
            ("[]", "no record"),
            ("{}\n{\"a\":", "line 2"),
            ("[{}", "line 1"),
        ] {
            let told = records(text).expect_err(text);
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn only_who_waits_in_a_closed_loop_with_few_others_may_be_late() {
        let ms = Duration::from_millis;
        for (wait, users, rate, slack) in [
            (200..900, 10, None, 20),
            (200..900, 110, None, 20),
            (200..900, 111, None, 0),
            (200..900, 1, None, 0),
            (0..100, 2, None, 5),
            (500..500, 2, None, 0),
            (0..0, 2, None, 0),
            (200..900, 10, Some(1.0), 0),
        ] {
            let plan = Plan {
                wait: ms(wait.start)..ms(wait.end),
                rate,
                ..plan(users)
            };
            let case = format!("{wait:?} ms, {users} users, {rate:?}");
            assert_eq!(plan.slack(), ms(slack), "{case}");
            let [shortest, longest] = [0.0, 1.0].map(|chance| plan.draw_wait(chance).as_micros());
            assert_eq!(shortest, ms(wait.start).as_micros(), "{case}");
            assert_eq!(
                longest,
                ms(wait.end).saturating_sub(plan.slack()).as_micros(),
                "{case}"
            );
        }
    }

    /// Without waits.
    fn plan(users: usize) -> Plan {
        Plan {
            records: vec![Bytes::from_static(b"{}")],
            passes: 10,
            users,
            spawn_rate: f64::INFINITY,
            wait: Duration::ZERO..Duration::ZERO,
            rate: None,
            keyed: true,
            watch: None,
        }
    }

    #[test]
    fn users_that_cannot_connect_let_others_try() {
        // Whoever connects there fails at once.
        let load = Load::new(
            Target::with_public_roots("http://255.255.255.255:9/").unwrap(),
            plan(2),
        );
        load.run(|_| ()).unwrap();
        let tally = load.tally();
        assert_eq!((tally.failures, tally.samples[0].users), (10, 2));
    }

    #[test]
    fn kinds_of_failure_are_bounded() {
        let mut tally = Tally::new();
        for number in 0..100 {
            tally.count(Duration::from_millis(1), Err(format!("failure {number}")));
        }
        tally.count(Duration::from_millis(1), Err("failure 3".into()));
        assert_eq!(
            (tally.requests, tally.failures, tally.kinds.len()),
            (101, 101, KINDS_MAX + 1)
        );
        assert_eq!((tally.kinds["failure 3"], tally.kinds["others"]), (2, 80));
    }
}
