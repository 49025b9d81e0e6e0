use std::{cell::Cell, rc::Rc};

use actix_web::{ResponseError as _, http::header};
use futures_util::FutureExt as _;
use tokio::time::{pause, sleep};

use super::*;
use crate::changes::{CHANGES_MAX, Change};

const RUN: &str = "run";

fn hub() -> Arc<EventHub> {
    Arc::new(EventHub::new(ChangeLog::new(RUN.into())))
}

/// A reader of statuses that never fail.
fn reader(hub: &Arc<EventHub>, last_id: Option<&str>) -> EventReader {
    let mut reader = hub.join(last_id, async || Some("{}".into())).unwrap();
    assert!(now(&mut reader).starts_with(RETRY));
    reader
}

fn change(hub: &EventHub) {
    hub.changes.add(Change::Spool { refuses: true });
}

/// The event that it has to read at this moment.
fn now(reader: &mut EventReader) -> String {
    let text = reader.next().now_or_never().expect("there is an event");
    let text = text.expect("it has not ended");
    String::from_utf8(text.to_vec()).unwrap()
}

fn nothing(reader: &mut EventReader) -> bool {
    reader.next().now_or_never().is_none()
}

/// The next event's name, and its number or the reason why it was missed.
async fn next(reader: &mut EventReader) -> (String, String) {
    let text = reader.next().await.expect("it has not ended");
    let text = String::from_utf8(text.to_vec()).unwrap();
    let line = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name));
        value.map(str::to_owned)
    };
    let name = line("event: ").unwrap();
    let number = line("id: run-").or_else(|| line("data: ")).unwrap();
    (name, number)
}

fn is((name, number): (String, String), expected: (&str, &str)) {
    assert_eq!((&*name, &*number), expected);
}

#[actix_rt::test]
async fn a_status_is_rendered_once_for_all_readers_and_never_without_one() {
    pause();
    let (hub, rendered) = (hub(), Rc::new(Cell::new(0)));
    let status = || {
        let rendered = Rc::clone(&rendered);
        move || {
            rendered.set(rendered.get() + 1);
            async { Some("{}".to_owned()) }
        }
    };
    for round in 1..3 {
        let mut readers: Vec<_> = (0..3).map(|_| hub.join(None, status()).unwrap()).collect();
        for reader in &mut readers {
            now(reader);
        }
        for second in 1..4 {
            let mut texts = Vec::new();
            for reader in &mut readers {
                texts.push(reader.next().await.unwrap());
            }
            assert_eq!(rendered.get(), 3 * (round - 1) + second);
            assert!(texts.iter().all(|text| text.as_ptr() == texts[0].as_ptr()));
        }
        drop(readers);
        sleep(5 * STATUS_EVERY).await;
        assert_eq!(rendered.get(), 3 * round);
    }
}

#[actix_rt::test]
async fn a_reader_hears_of_each_change_at_once_and_of_a_status_each_second() {
    pause();
    let hub = hub();
    let mut reader = reader(&hub, None);
    is(next(&mut reader).await, ("status", "0"));
    change(&hub);
    change(&hub);
    assert!(now(&mut reader).contains("id: run-1\n"));
    assert!(now(&mut reader).contains("id: run-2\n"));
    assert!(nothing(&mut reader));
    is(next(&mut reader).await, ("status", "2"));
    // A second reader need not wait for its first status.
    let mut other = self::reader(&hub, None);
    assert!(now(&mut other).contains("event: status\nid: run-2\n"));
}

#[actix_rt::test]
async fn a_reader_that_comes_back_hears_what_it_has_missed_and_then_a_status() {
    pause();
    let hub = hub();
    let _other = reader(&hub, None);
    for _ in 0..3 {
        change(&hub);
    }
    for (last_id, numbers) in [
        ("run-1", &["2", "3"][..]),
        ("run-3", &[]),
        ("run-0", &["1", "2", "3"]),
    ] {
        let mut reader = reader(&hub, Some(last_id));
        for number in numbers {
            is(next(&mut reader).await, ("change", number));
        }
        is(next(&mut reader).await, ("status", "3"));
    }
    for (last_id, reason, numbers) in [
        ("another-run-7", "restart", &["1", "2", "3"][..]),
        ("run-4", "unknown-id", &[]),
        ("run-x", "unknown-id", &[]),
        ("", "unknown-id", &[]),
    ] {
        let mut reader = hub.join(Some(last_id), async || Some("{}".into())).unwrap();
        let greeting = now(&mut reader);
        let told = format!("event: missed\ndata: {{\"changes\":null,\"reason\":\"{reason}\"}}\n\n");
        assert_eq!(greeting, format!("{RETRY}{told}"), "{last_id}");
        for number in numbers {
            is(next(&mut reader).await, ("change", number));
        }
        is(next(&mut reader).await, ("status", "3"));
    }
}

#[actix_rt::test]
async fn a_reader_that_was_away_for_too_long_or_is_too_slow_hears_how_much_it_has_missed() {
    pause();
    let hub = hub();
    let mut slow = reader(&hub, None);
    is(next(&mut slow).await, ("status", "0"));
    for _ in 0..CHANGES_MAX + 5 {
        change(&hub);
    }
    for mut reader in [slow, reader(&hub, Some("run-0"))] {
        let told = r#"{"changes":5,"reason":"too-old"}"#;
        is(next(&mut reader).await, ("missed", told));
        for number in 6..CHANGES_MAX + 6 {
            is(next(&mut reader).await, ("change", &number.to_string()));
        }
        is(
            next(&mut reader).await,
            ("status", &(CHANGES_MAX + 5).to_string()),
        );
    }
}

#[actix_rt::test]
async fn a_slow_reader_skips_statuses() {
    pause();
    let hub = hub();
    let mut reader = reader(&hub, None);
    is(next(&mut reader).await, ("status", "0"));
    for _ in 0..20 {
        sleep(STATUS_EVERY / 2).await;
    }
    assert!(now(&mut reader).starts_with("event: status\n"));
    assert!(nothing(&mut reader));
}

#[actix_rt::test]
async fn a_ping_is_sent_while_no_status_can_be_made() {
    pause();
    let hub = hub();
    // The supervisor has ended, or it does not answer.
    for is_stuck in [false, true] {
        let status = move || async move {
            if is_stuck {
                sleep(PING_EVERY * 9).await;
            }
            None
        };
        let mut reader = hub.join(None, status).unwrap();
        now(&mut reader);
        for _ in 0..2 {
            let began = Instant::now();
            assert_eq!(reader.next().await.unwrap(), PING);
            let after = began.elapsed();
            assert!(
                after >= PING_EVERY && after <= PING_EVERY + 2 * STATUS_EVERY,
                "{after:?}"
            );
        }
        change(&hub);
        assert!(now(&mut reader).contains("event: change\n"));
    }
}

#[actix_rt::test]
async fn beyond_the_most_readers_the_answer_is_a_problem_until_one_leaves() {
    let hub = hub();
    let join = || hub.join(None, async || Some("{}".into()));
    let mut readers: Vec<_> = (0..READERS_MAX).map(|_| join().unwrap()).collect();
    let refused = join().err().expect("the most are there");
    let answer = refused.error_response();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key(header::RETRY_AFTER));
    assert!(refused.body().contains("urn:waypost:problem:streams"));
    readers.pop();
    assert!(join().is_ok());
}

#[actix_rt::test]
async fn each_reader_hears_the_last_change_before_the_end_and_one_that_takes_nothing_is_left() {
    pause();
    let hub = hub();
    let early = reader(&hub, None);
    change(&hub);
    let readers = [early, reader(&hub, Some("run-0"))];
    let ending = hub.end(PING_EVERY);
    let reading = async {
        for mut reader in readers {
            is(next(&mut reader).await, ("change", "1"));
            assert_eq!(reader.next().await, None);
        }
    };
    let began = Instant::now();
    futures_util::join!(ending, reading);
    assert_eq!(began.elapsed(), Duration::ZERO);

    let _takes_nothing = hub.join(None, async || None).unwrap();
    hub.end(PING_EVERY).await;
    assert!(began.elapsed() >= PING_EVERY);
}
