//! How many POSTs may be in flight to an API: as many as raise the rate at which it takes records.
//!
//! Trials find it. Each changes the limit and compares what a record costs before and after: the
//! time of POSTs in flight for each record that the API has taken or refused. By Little's law, the
//! *gain*, the part of a change in flight by which the rate changes too, follows from it: 1 for an
//! API that has room, 0 for one that is full, less for one that suffers. The limit moves as far
//! between the two as the gain says. What a POST takes is no evidence alone: an API that is slow for
//! another reason than the load needs more POSTs in flight, not fewer.
//!
//! - More are tried only while the limit binds: most POSTs take the last place.
//! - 429 and 503 make the API's share of the time smaller, and are the size of the next trial with
//!   fewer. If fewer only lower the rate, they stay: those answers are about records.
//! - If most POSTs time out while the API settles none, the limit falls at once, and comes back in
//!   large steps when the API does. A time-out says nothing about what a record costs.
//! - Nothing is tried while POSTs hang: with fewer places, those that hang would take all.

mod post_time;
#[cfg(test)]
mod simulation;
mod window;

use std::time::Duration;

use tokio::time::Instant;

use self::{
    post_time::PostTime,
    window::{Measured, Window},
};

/// The limit at the start, unless its bound is lower: the default of the bound.
const START: u32 = 64;
/// Most trials change the limit by this part of it.
const STEP: f64 = 0.2;
/// The largest steps: to twice the limit, and to half of it.
const STEP_UP_MAX: f64 = 1.0;
const STEP_DOWN_MAX: f64 = 0.5;
/// The standard error of a gain: a measurement goes on until it is smaller, or for `TIME_MAX`.
const GAIN_ERROR: f64 = 0.2;
const TIME_MAX: Duration = Duration::from_secs(2);
/// A trial has failed if the limit then goes less of its way than this.
const WAY_MIN: f64 = 0.75;
/// The limit has moved if it changed by this part.
const MOVE_MIN: f64 = 0.05;
/// 429 and 503 count from this part of the time on.
const OVERLOAD_MIN: f64 = 0.05;
/// More than this part of it halves the limit without a trial.
const OVERLOAD_MAX: f64 = 0.5;
/// Time-outs divide the limit by this: three times make the highest bound 1. Afterwards it grows by
/// the same factor up to the last limit that was good.
const TIME_OUT_CUT: u32 = 16;
/// The pause between two trials in one direction: at least, and at most.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(20);
/// The pause before trials with fewer POSTs after the API has stopped.
const STOP_PAUSE: Duration = Duration::from_secs(10);

/// The end of a POST, as the limit counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PostResult {
    /// The API has taken or refused so many records.
    Settled(u32),
    /// 429 or 503.
    Overloaded,
    TimedOut,
    /// Any other failure, which says nothing about the load.
    Failed,
}

/// The limit of one API. It reads no clock: the caller passes the time, which never goes back.
#[derive(Debug)]
pub struct AdaptiveLimit {
    max: u32,
    limit: u32,
    in_flight: u32,
    window: Window,
    /// There while a limit is tried.
    trial: Option<LimitTrial>,
    up: Direction,
    down: Direction,
    /// The last limit that was good: it comes back to that in large steps.
    good: u32,
    /// POSTs that began before this ended after the API had stopped: they do not count.
    resumed_at: Instant,
    settled_at: Option<Instant>,
    post_time: PostTime,
}

#[derive(Debug)]
struct LimitTrial {
    from: u32,
    before: Measured,
}

/// The trials with more POSTs in flight, or those with fewer.
#[derive(Debug)]
struct Direction {
    next_at: Instant,
    /// Trials in a row that have failed.
    failures: u32,
    step: f64,
}

impl AdaptiveLimit {
    /// A limit of at most `max`, and at least 1.
    pub fn new(max: usize, now: Instant) -> Self {
        let max = u32::try_from(max).unwrap_or(u32::MAX);
        let limit = max.clamp(1, START);
        let direction = |step| Direction {
            next_at: now,
            failures: 0,
            step,
        };
        Self {
            max,
            limit,
            in_flight: 0,
            window: Window::new(now, Duration::ZERO),
            trial: None,
            up: direction(STEP_UP_MAX),
            down: direction(STEP),
            good: limit,
            resumed_at: now,
            settled_at: None,
            post_time: PostTime::default(),
        }
    }

    /// The time that a POST takes; `None` if none has ended lately.
    pub fn post_time(&self, now: Instant) -> Option<Duration> {
        self.post_time.get(now)
    }

    /// The most POSTs that may be in flight now.
    pub fn get(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(usize::MAX)
    }

    /// A POST begins. `is_last` if it takes the last place.
    pub fn begin(&mut self, now: Instant, is_last: bool) {
        self.window.begin(now, self.in_flight, is_last);
        self.in_flight += 1;
    }

    /// The POST that began at `began` has ended; `None` if its end is not known.
    pub fn end(&mut self, began: Instant, now: Instant, result: Option<PostResult>) {
        let has_stopped = self.window.pass(now, self.in_flight);
        self.in_flight = self.in_flight.saturating_sub(1);
        let Some(result) = result else { return };
        if result != PostResult::Failed {
            self.post_time
                .add(now.saturating_duration_since(began), now);
        }
        if has_stopped && result != PostResult::TimedOut {
            let limit = self.trial.as_ref().map_or(self.limit, |trial| trial.from);
            self.change(limit, now);
            // It may be another than before.
            self.window = Window::new(now, Duration::ZERO);
            self.resume(now);
        }
        match result {
            PostResult::Settled(_) => self.settled_at = Some(now),
            // The API answered others meanwhile: this may be about the record.
            PostResult::TimedOut if self.settled_at >= Some(began) => return,
            _ => {}
        }
        if began < self.resumed_at {
            return;
        }
        self.window.end(began, now, result);
        if self.window.is_enough(now, self.limit) {
            self.decide(now);
        }
    }

    fn decide(&mut self, now: Instant) {
        if self.window.mostly_timed_out() {
            return self.fall(now);
        }
        if self.window.is_first() {
            // It tells how long the API takes. Now POSTs are spread over that time.
            return self.change(self.limit, now);
        }
        let measured = self.window.measure(now);
        if measured.overload > OVERLOAD_MAX && self.window.has_many() {
            self.good = scaled(self.limit, 0.5).max(1);
            self.up.fail(now, self.window.changed_at);
            return self.change(self.good, now);
        }
        let is_overloaded = measured.overload > OVERLOAD_MIN;
        let recovers = self.limit < self.good;
        if self.trial.is_none() && is_overloaded && !recovers && self.may_go_down(now) {
            return self.try_fewer(measured.overload.min(STEP_DOWN_MAX), measured, now);
        }
        let planned = match &self.trial {
            Some(trial) => ratio(trial.from, self.limit),
            None if recovers => ratio(self.limit, self.recovery()),
            None if self.may_go_up(now) => self.up.step.ln_1p(),
            None => self.down.step.ln_1p(),
        };
        let is_precise = measured.error(measured) < GAIN_ERROR * planned;
        if !is_precise && self.window.elapsed(now) < TIME_MAX {
            return;
        }
        match self.trial.take() {
            None => self.try_next(measured, now),
            Some(trial) => self.conclude(trial, measured, now),
        }
    }

    /// The next limit on the way back after time-outs.
    fn recovery(&self) -> u32 {
        self.limit.saturating_mul(TIME_OUT_CUT).min(self.good)
    }

    fn may_go_up(&self, now: Instant) -> bool {
        self.limit < self.max && now >= self.up.next_at
    }

    fn may_go_down(&self, now: Instant) -> bool {
        self.limit > 1 && now >= self.down.next_at
    }

    /// Tries another limit beside what was measured just now, if it is time for that.
    fn try_next(&mut self, measured: Measured, now: Instant) {
        if !measured.is_bound || !measured.is_moving {
            self.window.restart(now);
        } else if self.limit < self.good {
            self.try_limit(self.recovery(), measured, now);
        } else if self.may_go_up(now) {
            let to = scaled(self.limit, 1.0 + self.up.step);
            self.try_limit(to.clamp(self.limit + 1, self.max), measured, now);
        } else if self.may_go_down(now) {
            self.try_fewer(self.down.step, measured, now);
        } else {
            self.window.restart(now);
        }
    }

    fn try_fewer(&mut self, step: f64, measured: Measured, now: Instant) {
        let to = scaled(self.limit, 1.0 - step);
        self.try_limit(to.clamp(1, self.limit - 1), measured, now);
    }

    fn try_limit(&mut self, to: u32, before: Measured, now: Instant) {
        let from = self.limit;
        self.change(to, now);
        self.trial = Some(LimitTrial { from, before });
    }

    /// Moves the limit as far as the trial shows that POSTs in flight raise the rate.
    fn conclude(&mut self, trial: LimitTrial, measured: Measured, now: Instant) {
        let LimitTrial { from, before } = trial;
        let is_up = from < self.limit;
        if is_up && !measured.is_moving {
            // With fewer places, those that hang would take more of them.
            return self.window.restart(now);
        }
        let [few, many] = if is_up {
            [before, measured]
        } else {
            [measured, before]
        };
        let change = (many.in_flight / few.in_flight).ln();
        let has_followed = change > ratio(from, self.limit) / 2.0;
        if !has_followed || !measured.is_bound || !measured.is_moving {
            // Something else bound.
            return self.change(from, now);
        }
        let gain = 1.0 - (many.cost / few.cost).ln() / change;
        let error = many.error(few) / change;
        let is_large = ratio(from, self.limit) > 2.0 * STEP.ln_1p();
        let way = if !is_up {
            // In doubt, more: the bound is the operator's.
            1.0 - (gain + error).clamp(0.0, 1.0)
        } else if is_large && gain > 0.5 {
            // The knee is passed. Small steps down find it.
            1.0
        } else {
            // Squared: nodes that share a full API all have some gain, and must not drive each
            // other up.
            gain.clamp(0.0, 1.0).powi(2)
        };
        let to = between(from, self.limit, way);
        let recovers = is_up && from < self.good;
        let is_kept = to == self.limit || way > WAY_MIN;
        let began = self.window.changed_at;
        let direction = if is_up { &mut self.up } else { &mut self.down };
        if f64::from(to.abs_diff(from)) >= MOVE_MIN * f64::from(from) {
            direction.failures = 0;
        }
        if is_kept {
            direction.succeed(now);
        } else {
            direction.fail(now, began);
        }
        match (is_up, is_kept) {
            (true, true) => {
                self.up.step = (self.up.step * 2.0).min(STEP_UP_MAX);
                self.down.next_at = self.down.next_at.max(now + PAUSE_MIN);
            }
            (true, false) if !recovers => {
                self.down.next_at = self.down.next_at.min(now + PAUSE_MIN);
            }
            (false, true) => {
                // The API suffers: it is far from its knee.
                let suffers = gain + 2.0 * error < 0.0;
                self.down.step = if suffers {
                    (self.down.step * 2.0).min(STEP_DOWN_MAX)
                } else {
                    STEP
                };
                self.up.next_at = now + PAUSE_MIN;
                self.up.failures = 0;
            }
            (_, false) => {}
        }
        if !(recovers && is_kept) {
            self.good = to;
        }
        if to == self.limit {
            self.try_next(measured, now);
        } else {
            self.change(to, now);
        }
    }

    fn fall(&mut self, now: Instant) {
        self.good = match &self.trial {
            Some(trial) => trial.from,
            None => self.good.max(self.limit),
        };
        self.up.next_at = now;
        self.change((self.limit / TIME_OUT_CUT).max(1), now);
        self.resume(now);
    }

    /// POSTs that began before say nothing. An API that comes back has no time for trials with fewer.
    fn resume(&mut self, now: Instant) {
        self.resumed_at = now;
        self.down.next_at = now + STOP_PAUSE;
    }

    fn change(&mut self, to: u32, now: Instant) {
        self.limit = to;
        self.trial = None;
        self.window = Window::new(now, self.window.usual());
    }
}

impl Direction {
    fn succeed(&mut self, now: Instant) {
        self.failures = 0;
        self.next_at = now;
    }

    /// A trial that began at `began` has failed. The longer it took, and the more have failed, the
    /// longer is the pause: trials must cost little.
    fn fail(&mut self, now: Instant, began: Instant) {
        let took = now - began;
        let pause = PAUSE_MIN.max(took * 4) * 2_u32.pow(self.failures);
        self.next_at = self.next_at.max(now + pause.min(PAUSE_MAX));
        self.failures = (self.failures + 1).min(8);
        // A small step takes more time to measure.
        let is_fast = took < PAUSE_MIN;
        self.step = if self.step > STEP || !is_fast {
            STEP
        } else {
            STEP / 2.0
        };
    }
}

/// The logarithm of the ratio between two limits.
fn ratio(one: u32, other: u32) -> f64 {
    (f64::from(one) / f64::from(other)).ln().abs()
}

/// The limit at a part of the way from one to another.
fn between(from: u32, to: u32, way: f64) -> u32 {
    scaled(from, (f64::from(to) / f64::from(from)).powf(way))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a limit of thousands times a factor that is never negative"
)]
fn scaled(limit: u32, factor: f64) -> u32 {
    (f64::from(limit) * factor).round() as u32
}
