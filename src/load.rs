//! A load on an HTTP server: users that POST records, each record exactly once per pass, and a
//! count of the answers.
//!
//! In a closed loop, a user POSTs its next record when the last one was answered and its wait is
//! over. In an open loop, at a fixed rate, each record is due at its time however fast the server
//! answers. The latency of a record then counts from the time that it was due, so a server that
//! stalls is charged for all records that it kept waiting (no coordinated omission).
//!
//! All users share one thread. There are as many connections as users.

mod axis;
pub mod report;
mod tally;

use std::{
    cell::{Cell, Ref, RefCell},
    future::pending,
    ops::Range,
    pin::pin,
    time::{Duration, Instant},
};

use awc::{
    ClientResponse,
    http::{StatusCode, header::HeaderMap},
};
use bytes::Bytes;
use futures_util::future::join_all;
use serde_json::value::RawValue;
use tokio::{
    sync::watch,
    time::{interval_at, sleep_until, timeout},
};

pub use self::tally::{Refusal, Sample, Tally};
use crate::{
    api::client::{Endpoint, HttpClient, read},
    record::Record,
};

/// A timer is late by up to this much. A user that slept until its record was due is not charged
/// for that.
const TIMER_GRAIN: Duration = Duration::from_millis(2);
/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a user that got no answer waits at least, so that users that cannot connect let others
/// run.
const PAUSE: Duration = Duration::from_millis(1);
/// The longest answer that is read: it names each record of a batch.
const ANSWER_MAX: usize = 16 << 20;
/// Room for the reason of a refusal.
const REASON_MAX: usize = 4 << 10;
const SAMPLE_PERIOD: Duration = Duration::from_secs(1);

/// The records to POST, the number of users, and their speed.
pub struct Plan {
    pub records: Vec<Bytes>,
    /// How often all records are posted; with a `duration`, as often as there is time for.
    pub passes: usize,
    /// No record is posted after this time.
    pub duration: Option<Duration>,
    pub users: usize,
    /// How many users begin each second.
    pub spawn_rate: f64,
    /// How long a user waits after each answer.
    pub wait: Range<Duration>,
    /// Records per second that are due, in an open loop.
    pub rate: Option<f64>,
    /// Each record has an `Idempotency-Key` of its own, so it is POSTed again when its connection
    /// breaks.
    pub keyed: bool,
    /// Called with each record that was answered.
    pub watch: Option<Box<OnAnswer>>,
}

/// Gets the number of a record, from 0, the time from which its latency counts, and its answer.
pub type OnAnswer = dyn Fn(usize, Instant, &Result<StatusCode, Refusal>);

impl Plan {
    /// Each record once, by `users` that begin at once and do not wait.
    pub fn new(records: Vec<Bytes>, users: usize) -> Self {
        Self {
            records,
            passes: 1,
            duration: None,
            users,
            spawn_rate: f64::INFINITY,
            wait: Duration::ZERO..Duration::ZERO,
            rate: None,
            keyed: true,
            watch: None,
        }
    }
}

/// A load, and its counts while it runs and after it has ended.
pub struct Load {
    client: HttpClient,
    plan: Plan,
    /// Makes each record's key unique among all loads.
    run: String,
    next: Cell<usize>,
    stopped: watch::Sender<bool>,
    tally: RefCell<Tally>,
}

/// The record that a user POSTs next.
struct Turn {
    number: usize,
    due: Option<Instant>,
}

impl Load {
    pub fn new(endpoint: Endpoint, plan: Plan) -> Self {
        Self {
            client: HttpClient::new(endpoint, plan.users, TIMEOUT),
            plan,
            run: Record::new_id().to_string(),
            next: Cell::default(),
            stopped: watch::Sender::new(false),
            tally: RefCell::new(Tally::new()),
        }
    }

    /// How many records are POSTed if nothing stops the load; `None` if its duration ends it.
    pub fn total(&self) -> Option<usize> {
        let is_counted = self.plan.duration.is_none();
        is_counted.then_some(self.plan.records.len() * self.plan.passes)
    }

    pub fn tally(&self) -> Ref<'_, Tally> {
        self.tally.borrow()
    }

    /// The `Idempotency-Key` of the record with this number, if records have keys.
    pub fn key(&self, number: usize) -> String {
        format!("{}-{number}", self.run)
    }

    /// No user POSTs another record. The load ends when the requests under way are answered.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
    }

    /// Ends when each record was POSTed, its duration is over, or it was stopped. `tick` is called with the counts
    /// each second.
    pub async fn run(&self, mut tick: impl FnMut(&Tally)) {
        let began = Instant::now();
        let mut users = pin!(join_all(
            (0..self.plan.users).map(|number| self.user(number, began))
        ));
        let mut seconds = interval_at((began + SAMPLE_PERIOD).into(), SAMPLE_PERIOD);
        let mut end = pin!(async {
            match self.plan.duration {
                Some(duration) => sleep_until((began + duration).into()).await,
                None => pending().await,
            }
        });
        let mut is_over = false;
        loop {
            tokio::select! {
                _ = &mut users => break,
                () = &mut end, if !is_over => {
                    is_over = true;
                    self.stop();
                }
                _ = seconds.tick() => {
                    self.tally.borrow_mut().sample(began.elapsed());
                    tick(&self.tally());
                }
            }
        }
        self.tally.borrow_mut().sample(began.elapsed());
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 users")]
    async fn user(&self, number: usize, began: Instant) {
        let start = began + Duration::from_secs_f64(number as f64 / self.plan.spawn_rate);
        if !self.wait_until(start).await {
            return;
        }
        self.tally.borrow_mut().begin_user();
        let mut free_at = Instant::now();
        while let Some(Turn { number, due }) = self.turn(began) {
            if !self.wait_until(due.unwrap_or(free_at).max(free_at)).await {
                break;
            }
            let now = Instant::now();
            let from = due.filter(|due| *due + TIMER_GRAIN <= now).unwrap_or(now);
            let answer = timeout(TIMEOUT, self.post(number)).await;
            let answer = answer.unwrap_or_else(|_| {
                let why = format!("no answer within {TIMEOUT:?}");
                Err(Refusal { status: None, why })
            });
            if let Some(watch) = &self.plan.watch {
                watch(number, from, &answer);
            }
            let Range { start, end } = self.plan.wait;
            let wait = start + end.saturating_sub(start).mul_f64(fastrand::f64());
            let got_none = answer.as_ref().is_err_and(|why| why.status.is_none());
            let answered = Instant::now();
            free_at = answered + if got_none { wait.max(PAUSE) } else { wait };
            self.tally.borrow_mut().count(answered - from, answer);
        }
        self.tally.borrow_mut().end_user();
    }

    /// Returns whether the load goes on then; if it is stopped, at once.
    async fn wait_until(&self, time: Instant) -> bool {
        let mut stopped = self.stopped.subscribe();
        if time <= Instant::now() {
            return !*stopped.borrow();
        }
        tokio::select! {
            biased;
            _ = stopped.wait_for(|is_stopped| *is_stopped) => false,
            () = sleep_until(time.into()) => true,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "nobody posts 2^52 records")]
    fn turn(&self, began: Instant) -> Option<Turn> {
        let number = self.next.get();
        if *self.stopped.borrow() || self.total() == Some(number) {
            return None;
        }
        let after = self
            .plan
            .rate
            .map(|rate| Duration::from_secs_f64(number as f64 / rate));
        // One that is due at the end comes too late: two timers would decide on it.
        if after
            .zip(self.plan.duration)
            .is_some_and(|(after, end)| after >= end)
        {
            return None;
        }
        self.next.set(number + 1);
        let due = after.map(|after| began + after);
        Some(Turn { number, due })
    }

    /// POSTs a record and reads the whole answer.
    async fn post(&self, number: usize) -> Result<StatusCode, Refusal> {
        let record = &self.plan.records[number % self.plan.records.len()];
        let key = self.plan.keyed.then(|| self.key(number));
        let mut reason = Vec::new();
        let finish = async |response: ClientResponse| {
            let status = response.status();
            reason.clear();
            let keep = if status.is_success() { 0 } else { REASON_MAX };
            read(response, ANSWER_MAX, |piece| {
                reason.extend_from_slice(&piece[..piece.len().min(keep - reason.len())]);
            })
            .await?;
            Ok(status)
        };
        match self
            .client
            .post(record, key.as_deref(), None, &HeaderMap::new(), finish)
            .await
        {
            Ok(status) if status.is_success() => Ok(status),
            Ok(status) => Err(Refusal::answered(status, &reason)),
            Err(failure) => Err(Refusal {
                status: None,
                why: failure.to_string(),
            }),
        }
    }
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

    #[actix_rt::test]
    async fn users_that_cannot_connect_let_others_try() {
        // A connection to this address fails at once.
        let endpoint = Endpoint::with_public_roots("http://255.255.255.255:9/").unwrap();
        let plan = Plan {
            passes: 10,
            ..Plan::new(vec![Bytes::from_static(b"{}")], 2)
        };
        let load = Load::new(endpoint, plan);
        load.run(|_| ()).await;
        let tally = load.tally();
        assert_eq!((tally.failures, tally.samples[0].users), (10, 2));
    }
}
