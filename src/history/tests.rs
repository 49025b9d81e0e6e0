use std::sync::Arc;

use bytes::Bytes;

use super::*;
use crate::{
    clock::unix_us,
    record::{Origin, Record},
};

const LANE: LaneId = LaneId::Nats;

fn record(number: u64) -> Record {
    let at_us = unix_us() - 5000;
    Record {
        id: number.to_string().into(),
        body: Bytes::from_static(b"{}"),
        trace: None,
        origin: Some(Origin {
            run: Arc::from("run"),
            at_us,
        }),
        api: None,
        event: None,
    }
}

/// Each second, so many records pass, each of which is confirmed after so many milliseconds.
fn seconds(history: &History, ledger: &Ledger, passing: impl IntoIterator<Item = (u64, u64)>) {
    let mut number = ledger.totals().accepted;
    for (records, ms) in passing {
        for _ in 0..records {
            number += 1;
            ledger.accepted(LANE, &record(number), Duration::from_millis(ms));
            ledger.delivered(LANE, [&record(number)]);
        }
        let mut kept = history.0.lock();
        let second = kept.of_lanes(ledger, SECOND);
        kept.add(second);
    }
}

fn close(value: f64, to: f64) -> bool {
    (value - to).abs() <= to * 0.01
}

#[test]
fn counts_and_times_are_of_the_interval_and_not_since_the_start() {
    let history = History::new([LaneId::Grpc, LANE].into_iter());
    let ledger = Ledger::new(Arc::from("run"));
    seconds(&history, &ledger, [(1000, 1), (2, 50), (0, 0), (3, 7)]);
    let kept = history.0.lock();
    let lanes: Vec<_> = kept
        .seconds
        .intervals()
        .map(|second| second.lanes[LANE as usize])
        .collect();
    let counts: Vec<_> = lanes
        .iter()
        .map(|lane| (lane.accepted, lane.delivered))
        .collect();
    assert_eq!(counts, [(1000, 1000), (2, 2), (0, 0), (3, 3)]);
    for (lane, ms) in lanes.iter().zip([1.0, 50.0, 0.0, 7.0]) {
        assert!(
            close(lane.publish.p50, ms) && close(lane.publish.p99, ms),
            "{lane:?}"
        );
    }
    assert!(lanes[1].delivery.p50 >= 5.0, "{lanes:?}");
    assert_eq!(lanes[2], LaneInterval::default());
}

#[test]
fn ten_seconds_are_one_interval_with_its_own_quantiles() {
    let history = History::new([LANE].into_iter());
    let ledger = Ledger::new(Arc::from("run"));
    // 100 slow ones among 10,000: the p99 of the seconds tells nothing about that of all.
    let passing = (0..10).map(|second| if second == 0 { (100, 80) } else { (1100, 2) });
    seconds(&history, &ledger, passing);
    seconds(&history, &ledger, [(10, 30); 9]);
    let kept = history.0.lock();
    let tens: Vec<_> = kept
        .tens
        .intervals()
        .map(|ten| ten.lanes[LANE as usize])
        .collect();
    assert_eq!(tens.len(), 1);
    assert_eq!(tens[0].accepted, 10_000);
    assert!(close(tens[0].publish.p50, 2.0), "{tens:?}");
    assert!(close(tens[0].publish.p99, 2.0), "{tens:?}");
    drop(kept);
    seconds(&history, &ledger, [(10, 30)]);
    let kept = history.0.lock();
    let last = kept.tens.intervals().next_back().unwrap().lanes[LANE as usize];
    assert_eq!(last.accepted, 100);
    assert!(close(last.publish.p50, 30.0), "{last:?}");
}

#[test]
fn a_day_needs_no_more_room_than_an_hour() {
    let history = History::new([LANE].into_iter());
    let ledger = Ledger::new(Arc::from("run"));
    for hour in 1..=24 {
        seconds(
            &history,
            &ledger,
            [(1, 1)].into_iter().chain((1..3600).map(|_| (0, 0))),
        );
        let kept = history.0.lock();
        assert_eq!(kept.seconds.intervals().len(), SECONDS_KEPT);
        assert_eq!(kept.tens.intervals().len(), TENS_KEPT);
        assert!(kept.all.intervals().len() <= ALL_KEPT);
        let all: u64 = kept
            .all
            .intervals()
            .map(|of| of.lanes[LANE as usize].accepted)
            .sum();
        assert!(all + 1 >= hour, "{all} of {hour}");
    }
}
