use futures_util::FutureExt as _;

use super::{
    failures::{FAILURES_MAX, REACHED_PATIENCE},
    trial::TRIES,
    *,
};
use crate::api::answer::FailureClass;

fn none(why: &str) -> Answer {
    Answer::NoAnswer {
        class: FailureClass::Connect,
        why: why.into(),
    }
}

fn status(status: u16) -> Answer {
    Answer::Status {
        status,
        is_retryable: true,
        retry_after: None,
        excerpt: String::new(),
    }
}

/// The pass of a record that has not failed yet.
async fn pass(breaker: &Breaker) -> Pass<'_> {
    breaker.pass(&Trial::default()).await
}

/// A POST of such a record.
async fn post(breaker: &Breaker, answer: &Answer) {
    pass(breaker).await.failed(answer, &mut Trial::default());
}

async fn take(breaker: &Breaker) {
    pass(breaker).await.succeeded(|| 0);
}

async fn fail(breaker: &Breaker, times: u32) {
    for _ in 0..times {
        post(breaker, &none("500")).await;
    }
}

#[tokio::test(start_paused = true)]
async fn it_opens_after_failures_in_a_row_and_lets_one_probe_through_at_a_time() {
    let breaker = Breaker::default();
    fail(&breaker, FAILURES_MAX - 1).await;
    take(&breaker).await;
    fail(&breaker, FAILURES_MAX - 1).await;
    assert!(!breaker.is_open(), "a success in between counts");
    post(&breaker, &none("500")).await;
    assert!(breaker.is_open());
    assert!(pass(&breaker).now_or_never().is_none());

    let began = Instant::now();
    let probe = pass(&breaker).await;
    assert!(began.elapsed() <= PROBE_FIRST);
    assert!(
        tokio::time::timeout(PROBE_CAP * 10, pass(&breaker))
            .await
            .is_err(),
        "a second probe"
    );
    probe.succeeded(|| 0);
    assert!(!breaker.is_open());
    assert!(pass(&breaker).now_or_never().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_or_vanishes_is_followed_by_another() {
    let breaker = Breaker::default();
    fail(&breaker, FAILURES_MAX).await;
    for _ in 0..10 {
        let began = Instant::now();
        post(&breaker, &none("500")).await;
        assert!(began.elapsed() <= PROBE_CAP);
    }
    drop(pass(&breaker).await);
    let asked = Duration::from_secs(30);
    let overloaded = Answer::Status {
        status: 503,
        is_retryable: true,
        retry_after: Some(asked),
        excerpt: String::new(),
    };
    post(&breaker, &overloaded).await;
    let began = Instant::now();
    take(&breaker).await;
    assert!(began.elapsed() >= asked, "Retry-After is honoured");
    assert!(!breaker.is_open());
}

#[tokio::test(start_paused = true)]
async fn new_records_are_the_first_to_probe_and_proven_ones_the_last() {
    let ranks = [(false, false), (true, false), (true, true)];
    let trials = ranks.map(|(is_parked, is_proven)| {
        if is_parked {
            Trial::parked(is_proven, Duration::ZERO)
        } else {
            Trial::default()
        }
    });
    for first in 0..trials.len() {
        let breaker = Breaker::default();
        fail(&breaker, FAILURES_MAX).await;
        // Many of each, those that are to wait before the others.
        let waiting = trials[first..].iter().rev().flat_map(|trial| [trial; 64]);
        let waiting = waiting.map(async |trial| (breaker.pass(trial).await, trial.rank()));
        let ((probe, rank), ..) = futures_util::future::select_all(waiting.map(Box::pin)).await;
        assert_eq!(rank as usize, first);
        probe.succeeded(|| 0);
        assert!(!breaker.is_open());
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_goes_on_when_it_closes() {
    let breaker = Breaker::default();
    fail(&breaker, FAILURES_MAX).await;
    let probe = pass(&breaker).await;
    let wait = async {
        futures_util::future::join_all((0..100).map(|_| pass(&breaker)))
            .await
            .len()
    };
    let (waited, ()) = tokio::join!(wait, async { probe.succeeded(|| 0) });
    assert_eq!(waited, 100);
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_an_old_post_does_not_close_it() {
    let breaker = Breaker::default();
    let old = pass(&breaker).await;
    fail(&breaker, FAILURES_MAX).await;
    old.succeeded(|| 0);
    assert!(breaker.is_open());
}

/// `times` denials at once: what each of their records is told.
async fn deny(breaker: &Breaker, times: u32) -> Vec<Denied> {
    let denied = (0..times).map(async |_| pass(breaker).await.denied("status 401").await);
    futures_util::future::join_all(denied).await
}

#[tokio::test(start_paused = true)]
async fn an_api_that_denies_everything_counts_as_down_and_condemns_no_record() {
    let breaker = Breaker::default();
    let told = deny(&breaker, DENIALS_MAX).await;
    assert!(
        told.iter().all(|told| *told == Denied::Everything),
        "{told:?}"
    );
    let health = breaker.health();
    let reason = health.last_error.unwrap();
    assert!(!health.is_up && health.retry_in.is_some());
    assert!(
        reason.contains("401") && reason.contains("token_file"),
        "{reason}"
    );
    // A probe is denied, too, and condemns no record either.
    assert_eq!(deny(&breaker, 3).await, [Denied::Everything; 3]);
    take(&breaker).await;
    assert!(breaker.health().is_up);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_denied_while_the_api_takes_another_is_to_blame() {
    let breaker = Breaker::default();
    let began = Instant::now();
    let another = async { take(&breaker).await };
    let (told, ()) = tokio::join!(deny(&breaker, DENIALS_MAX - 1), another);
    assert!(
        told.iter().all(|told| *told == Denied::TheRecord),
        "{told:?}"
    );
    assert!(began.elapsed() < VERDICT_WAIT, "the success is the verdict");
    assert_eq!(deny(&breaker, 1).await, [Denied::TheRecord]);
    assert!(began.elapsed() >= VERDICT_WAIT, "nothing else is POSTed");
    assert!(breaker.health().is_up);
}

#[tokio::test(start_paused = true)]
async fn a_slow_stream_of_denials_condemns_no_record() {
    let breaker = Breaker::default();
    let told = (1..=DENIALS_MAX).map(async |at| {
        tokio::time::sleep(at * VERDICT_WAIT / 2).await;
        pass(&breaker).await.denied("status 403").await
    });
    let told = futures_util::future::join_all(told).await;
    assert!(
        told.iter().all(|told| *told == Denied::Everything),
        "{told:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_outage_has_one_beginning_and_its_last_reason() {
    let breaker = Breaker::default();
    post(&breaker, &none("one record's fault")).await;
    assert_eq!(breaker.health().last_error, None, "it is no outage");
    fail(&breaker, FAILURES_MAX).await;
    let began = breaker.health().since;
    for _ in 0..5 {
        post(&breaker, &none("refused")).await;
    }
    let health = breaker.health();
    assert_eq!(health.since, began);
    assert_eq!(health.last_error.as_deref(), Some("refused"));
    assert!(health.retry_in.is_some_and(|time| time <= PROBE_CAP));
    take(&breaker).await;
    assert!(breaker.health().is_up && breaker.health().since > began);
}

#[tokio::test(start_paused = true)]
async fn each_outage_is_two_changes_in_the_log() {
    let log = ChangeLog::default();
    let breaker = Breaker::new("http://api/".into()).with_change_log(log.clone());
    for outage in 1..3 {
        fail(&breaker, FAILURES_MAX).await;
        post(&breaker, &none("refused")).await;
        assert_eq!(log.last(), 2 * outage - 1);
        take(&breaker).await;
        take(&breaker).await;
        assert_eq!(log.last(), 2 * outage);
    }
}

/// Answers may be about the records. Only time tells that the API takes none.
#[tokio::test(start_paused = true)]
async fn failures_that_reach_the_api_open_it_once_nothing_was_taken_for_a_while() {
    let breaker = Breaker::default();
    let step = REACHED_PATIENCE / 5;
    for _ in 0..3000 {
        post(&breaker, &status(500)).await;
    }
    assert!(!breaker.is_open());
    tokio::time::advance(4 * step).await;
    take(&breaker).await;
    for _ in 0..5 {
        post(&breaker, &status(500)).await;
        assert!(!breaker.is_open(), "it has taken one");
        tokio::time::advance(step).await;
    }
    post(&breaker, &status(503)).await;
    assert!(breaker.is_open());
}

#[tokio::test(start_paused = true)]
async fn failures_before_a_time_without_posts_are_forgotten() {
    let breaker = Breaker::default();
    for _ in 0..3 {
        for _ in 0..100 {
            post(&breaker, &status(500)).await;
        }
        tokio::time::advance(REACHED_PATIENCE).await;
    }
    assert!(!breaker.is_open());
}

#[tokio::test(start_paused = true)]
async fn a_post_that_fails_while_others_succeed_does_not_open_it() {
    let breaker = Breaker::default();
    let mut hanging = Vec::new();
    for _ in 0..64 {
        hanging.push(pass(&breaker).await);
    }
    take(&breaker).await;
    for pass in hanging {
        let mut trial = Trial::default();
        pass.failed(&none("refused"), &mut trial);
        assert!(trial.is_api_up());
    }
    assert!(!breaker.is_open());
}

/// POSTs of others between two failures of a record.
#[derive(Clone, Copy, Debug)]
enum Others {
    None,
    Fail,
    /// They fail, and are known to be bad.
    FailAsEver,
    Succeed,
}

#[tokio::test(start_paused = true)]
async fn a_record_is_to_blame_if_it_fails_three_times_while_others_are_answered() {
    for (others, failures, guilty, succeeded) in [
        (Others::None, 4, false, false),
        (Others::Fail, 2, false, false),
        (Others::Fail, 3, true, false),
        (Others::FailAsEver, 3, true, false),
        (Others::Succeed, 2, false, true),
        (Others::Succeed, 3, true, true),
    ] {
        let breaker = Breaker::default();
        let mut trial = Trial::default();
        for number in 0..failures {
            match others {
                _ if number == 0 => {}
                Others::None => {}
                Others::Fail => post(&breaker, &status(500)).await,
                Others::FailAsEver => {
                    let mut trial = Trial::parked(true, Duration::ZERO);
                    breaker.pass(&trial).await.failed(&status(500), &mut trial);
                }
                Others::Succeed => take(&breaker).await,
            }
            breaker.pass(&trial).await.failed(&status(500), &mut trial);
        }
        let judged = (trial.is_guilty(), trial.others_succeeded());
        assert_eq!(
            judged,
            (guilty, succeeded),
            "{others:?}, {failures} failures"
        );
    }
    // With the API down, no record is to blame.
    let breaker = Breaker::default();
    let mut trial = Trial::default();
    for _ in 0..TRIES + FAILURES_MAX {
        fail(&breaker, 1).await;
        breaker
            .pass(&trial)
            .await
            .failed(&none("refused"), &mut trial);
    }
    assert!(breaker.is_open() && !trial.is_guilty());
    // Nor is one while no connection can be opened, though the API still counts as up.
    for (answer, guilty) in [(none("refused"), false), (status(500), true)] {
        let breaker = Breaker::default();
        let mut trial = Trial::default();
        for number in 0..TRIES {
            if number == 1 {
                fail(&breaker, 1).await;
            }
            breaker.pass(&trial).await.failed(&answer, &mut trial);
        }
        assert_eq!(
            (breaker.is_open(), trial.is_guilty()),
            (false, guilty),
            "{answer}"
        );
    }
}

/// The fate of a parked record and of others, in this order, a second apart.
#[derive(Clone, Copy, Debug)]
enum ParkedEvent {
    /// It fails.
    Fails,
    /// The API takes another.
    Takes,
    /// The API goes down.
    Outage,
}

#[tokio::test(start_paused = true)]
async fn a_record_is_proven_bad_once_the_api_has_taken_another_between_two_of_its_failures() {
    use ParkedEvent::{Fails, Outage, Takes};
    for (events, proven) in [
        (&[Fails, Fails, Fails][..], false),
        (&[Takes, Fails, Fails], false),
        (&[Fails, Takes], false),
        (&[Fails, Takes, Fails], true),
        (&[Fails, Takes, Fails, Outage, Fails], true),
        (&[Fails, Outage, Fails], false),
        (&[Fails, Takes, Outage, Fails], false),
        (&[Fails, Outage, Fails, Takes, Fails], true),
    ] {
        for is_parked in [false, true] {
            let breaker = Breaker::default();
            let mut trial = Trial::default();
            let mut failed_at = None;
            for event in events {
                tokio::time::advance(Duration::from_secs(1)).await;
                match event {
                    Fails => {
                        if let Some(at) = failed_at.filter(|_| is_parked) {
                            trial = Trial::parked(trial.is_proven(), Instant::now() - at);
                        }
                        breaker.pass(&trial).await.failed(&status(500), &mut trial);
                        failed_at = Some(Instant::now());
                    }
                    Takes => take(&breaker).await,
                    Outage => {
                        fail(&breaker, FAILURES_MAX).await;
                        assert!(breaker.is_open());
                    }
                }
            }
            assert_eq!(trial.is_proven(), proven, "{events:?}, parked: {is_parked}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_records_that_are_not_proven_bad_say_something_about_the_api() {
    let minute = Duration::from_mins(1);
    for (proven, answer, opens) in [
        (false, status(500), true),
        (false, none("refused"), true),
        (true, status(500), false),
        // No record is to blame for a connection that is refused.
        (true, none("refused"), true),
    ] {
        let breaker = Breaker::default();
        for _ in 0..FAILURES_MAX {
            assert!(!breaker.is_open());
            let mut trial = Trial::parked(proven, minute);
            breaker.pass(&trial).await.failed(&answer, &mut trial);
            tokio::time::advance(minute).await;
        }
        assert_eq!(breaker.is_open(), opens, "{proven}, {answer:?}");
    }
}

/// The API asks each for a pause of a minute, and nothing else is POSTed.
#[tokio::test(start_paused = true)]
async fn records_that_wait_long_between_their_failures_open_it() {
    let breaker = Breaker::default();
    let mut trials = [Trial::default(), Trial::default(), Trial::default()];
    for is_open in [false, true] {
        for trial in &mut trials {
            let pass = breaker.pass(trial).now_or_never();
            pass.expect("it is closed").failed(&status(503), trial);
            if breaker.is_open() {
                break;
            }
        }
        assert_eq!(breaker.is_open(), is_open);
        tokio::time::advance(Duration::from_mins(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_proven_record_that_is_the_probe_keeps_it_open() {
    let breaker = Breaker::default();
    fail(&breaker, FAILURES_MAX).await;
    let mut trial = Trial::parked(true, Duration::ZERO);
    breaker.pass(&trial).await.failed(&status(500), &mut trial);
    assert!(
        pass(&breaker).now_or_never().is_none(),
        "the next probe waits"
    );
    take(&breaker).await;
    assert!(!breaker.is_open());
}
