use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use tokio::{sync::watch, time::sleep};

use super::{balance::REST, *};
use crate::{record::Origin, spool::SpoolStats};

fn record(id: &str, run: &str) -> Record {
    let origin = Some(Origin {
        run: Arc::from(run),
        at_us: 1,
    });
    Record {
        id: Arc::from(id),
        body: Bytes::from_static(b"{}"),
        trace: None,
        origin,
        api: None,
        event: None,
    }
}

#[test]
fn each_record_counts_once_however_often_it_comes() {
    let ledger = Ledger::new(Arc::from("run"));
    ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
    assert_eq!(ledger.totals().in_flight(), 1);
    assert!(!ledger.is_delivered(&record("a", "run")));
    ledger.delivered(LaneId::Nats, [&record("a", "run")]);
    assert!(ledger.is_delivered(&record("a", "run")));
    ledger.delivered(LaneId::Grpc, [&record("a", "run")]);
    assert_eq!(
        ledger.totals(),
        Counts {
            accepted: 1,
            recovered: 0,
            delivered: 1,
            redelivered: 1,
            ..Counts::default()
        }
    );
}

#[test]
fn the_records_of_a_post_count_one_by_one() {
    let ledger = Ledger::new(Arc::from("run"));
    let [known, refused, earlier] = [
        record("a", "run"),
        record("b", "run"),
        record("c", "earlier"),
    ];
    ledger.refused(&refused);
    ledger.delivered(LaneId::Grpc, [&known, &refused, &earlier, &known]);
    let expected = Counts {
        recovered: 2,
        delivered: 3,
        redelivered: 1,
        ..Counts::default()
    };
    assert_eq!(ledger.lane(LaneId::Grpc).counts, expected);
}

#[test]
fn an_id_that_is_taken_in_twice_is_settled_twice() {
    let ledger = Ledger::new(Arc::from("run"));
    let first = record("a", "run");
    let mut second = first.clone();
    second.origin = Some(Origin {
        run: Arc::from("run"),
        at_us: 2,
    });
    ledger.delivered(LaneId::Nats, [&first]);
    assert!(!ledger.is_delivered(&second));
}

#[test]
fn a_copy_of_a_dead_letter_is_posted_and_balances() {
    let ledger = Ledger::new(Arc::from("run"));
    ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
    ledger.dead(LaneId::Nats, &record("a", "run"));
    assert!(
        !ledger.is_delivered(&record("a", "run")),
        "a replay may have become that copy"
    );
    ledger.dead(LaneId::Grpc, &record("a", "run"));
    ledger.delivered(LaneId::Grpc, [&record("a", "run")]);
    let counts = ledger.totals();
    let expected = Counts {
        accepted: 1,
        recovered: 2,
        delivered: 1,
        dead: 2,
        ..Counts::default()
    };
    assert_eq!((counts, counts.in_flight()), (expected, 0));
}

/// Parks records, and counts their copies by `copy`. Each number is a term of the equation.
#[track_caller]
fn parked(records: u64, count: impl FnOnce(&Ledger)) -> (u64, u64, u64, u64) {
    let ledger = Ledger::new(Arc::from("run"));
    count(&ledger);
    let balance = ledger.balance(&SpoolStats::default());
    let sum = balance.delivered + balance.dead + balance.dropped + records + balance.in_flight;
    assert_eq!(balance.accepted + balance.recovered, sum, "{balance:?}");
    (
        balance.recovered,
        balance.delivered,
        records,
        balance.in_flight,
    )
}

#[test]
fn a_parked_record_balances_and_so_does_its_end() {
    let lane = LaneId::Nats;
    let [own, earlier] = [record("a", "run"), record("a", "earlier")];
    let accept = |ledger: &Ledger| ledger.accepted(lane, &own, Duration::ZERO);
    assert_eq!(
        parked(1, |ledger| {
            accept(ledger);
            ledger.parked(lane, &own);
        }),
        (0, 0, 1, 0)
    );
    assert_eq!(
        parked(0, |ledger| {
            accept(ledger);
            ledger.parked(lane, &own);
            ledger.delivered_parked(lane, &own);
            assert!(ledger.is_delivered(&own));
        }),
        (0, 1, 0, 0)
    );
    // Another node took it in, or an earlier run.
    assert_eq!(
        parked(0, |ledger| {
            ledger.parked(lane, &earlier);
            ledger.delivered_parked(lane, &earlier);
        }),
        (1, 1, 0, 0)
    );
    // An earlier run parked it.
    assert_eq!(
        parked(0, |ledger| {
            ledger.recovered_from_disk(1);
            ledger.delivered_parked(lane, &earlier);
        }),
        (1, 1, 0, 0)
    );
    // The broker sends it again, and the copy arrives first.
    assert_eq!(
        parked(0, |ledger| {
            accept(ledger);
            ledger.parked(lane, &own);
            ledger.delivered(lane, [&own]);
            ledger.parked_twice();
        }),
        (0, 1, 0, 0)
    );
    // An operator replays or drops it while it is POSTed.
    assert_eq!(
        parked(0, |ledger| {
            accept(ledger);
            ledger.parked(lane, &own);
            ledger.dropped(1);
            ledger.delivered(lane, [&own]);
        }),
        (1, 1, 0, 0)
    );
}

#[test]
fn a_record_of_an_earlier_run_balances_as_recovered() {
    let ledger = Ledger::new(Arc::from("run"));
    ledger.delivered(LaneId::Nats, [&record("a", "earlier")]);
    let mut foreign = record("b", "run");
    foreign.origin = None;
    ledger.delivered(LaneId::Nats, [&foreign]);
    assert!(!ledger.is_delivered(&foreign));
    let counts = ledger.lane(LaneId::Nats).counts;
    assert_eq!(
        counts,
        Counts {
            accepted: 0,
            recovered: 2,
            delivered: 2,
            redelivered: 0,
            ..Counts::default()
        }
    );
    assert_eq!(counts.in_flight(), 0);
}

#[test]
fn a_record_that_was_found_on_disk_and_lies_in_a_lane_too_is_one() {
    let ledger = Ledger::new(Arc::from("run"));
    // The first twice.
    ledger.recovered_from_disk(4);
    let balance = || {
        let Balance {
            recovered,
            delivered,
            in_flight,
            redelivered,
            ..
        } = ledger.balance(&SpoolStats::default());
        (recovered, delivered, in_flight, redelivered)
    };
    // The lane takes the second for what it has already: only the first comes out.
    let found = record("a", "earlier");
    let given = ledger.adopt(found.clone()).unwrap();
    assert_eq!(given, record("a", "run"));
    ledger.resent(LaneId::Nats, &given, Duration::ZERO);
    assert!(!ledger.is_delivered(&found));
    ledger.delivered(LaneId::Nats, [&found]);
    assert!(ledger.is_delivered(&found) && ledger.is_delivered(&given));
    assert_eq!(balance(), (4, 1, 0, 0));
    // A power cut has left a second entry of it.
    assert_eq!(ledger.adopt(found), None);
    assert_eq!(balance(), (3, 1, 0, 0));

    // Both come out, the one in the name of a third run.
    let found = record("b", "replay");
    let given = ledger.adopt(found.clone()).unwrap();
    ledger.resent(LaneId::Nats, &given, Duration::ZERO);
    ledger.delivered(LaneId::Nats, [&given]);
    ledger.delivered(LaneId::Nats, [&record("b", "earlier")]);
    assert_eq!(balance(), (3, 2, 0, 1));

    // It comes out before it is found.
    let found = record("c", "earlier");
    ledger.delivered(LaneId::Nats, [&found]);
    assert_eq!(ledger.adopt(found), None);
    assert_eq!(balance(), (3, 3, 0, 1));

    // A record that this run accepted, or that no node accepted, stays unchanged.
    for own in [
        record("d", "run"),
        Record {
            origin: None,
            ..record("e", "run")
        },
    ] {
        assert_eq!(ledger.adopt(own.clone()), Some(own));
    }
}

const ENDS: [fn(&Ledger, LaneId, &Record); 2] = [
    |ledger, lane, record| {
        ledger.delivered(lane, [record]);
    },
    Ledger::dead,
];

/// One lane may have the record, and the other has confirmed it. Both copies come out.
#[test]
fn a_record_that_lies_in_two_lanes_is_in_flight_in_none_once_it_has_ended() {
    let [silent, other] = [LaneId::Nats, LaneId::Rabbitmq];
    for end in ENDS {
        for is_confirmed_first in [true, false] {
            let ledger = Ledger::new(Arc::from("run"));
            let record = record("a", "run");
            ledger.maybe_published(&record);
            if !is_confirmed_first {
                end(&ledger, silent, &record);
            }
            ledger.accepted(other, &record, Duration::ZERO);
            if is_confirmed_first {
                assert_eq!(ledger.lane(other).counts.in_flight(), 1);
                end(&ledger, silent, &record);
            }
            end(&ledger, other, &record);
            for lane in [silent, other] {
                let counts = ledger.lane(lane).counts;
                let (came, ended) = counts.moves();
                assert_eq!(came, ended, "{lane} {is_confirmed_first}");
            }
        }
    }
}

/// Two lanes may have the record, and it comes out of both before a third confirms it.
#[test]
fn a_record_that_has_ended_twice_before_its_confirm_is_in_flight_in_no_lane() {
    let lanes = [LaneId::Nats, LaneId::Rabbitmq, LaneId::Pubsub];
    for (first, second) in ENDS
        .into_iter()
        .flat_map(|end| ENDS.map(|other| (end, other)))
    {
        let ledger = Ledger::new(Arc::from("run"));
        let record = record("a", "run");
        ledger.maybe_published(&record);
        first(&ledger, lanes[0], &record);
        second(&ledger, lanes[1], &record);
        ledger.accepted(lanes[2], &record, Duration::ZERO);
        for lane in lanes {
            let (came, ended) = ledger.lane(lane).counts.moves();
            assert_eq!(came, ended, "{lane}");
        }
    }
}

#[test]
fn a_record_of_another_run_is_taken_over() {
    let ledger = Ledger::new(Arc::from("run"));
    let foreign = Record {
        origin: None,
        ..record("c", "run")
    };
    ledger.delivered(LaneId::Nats, [&record("a", "other"), &foreign]);
    ledger.delivered(LaneId::Nats, [&record("a", "other"), &record("d", "run")]);
    ledger.dead(LaneId::Nats, &record("b", "other"));
    let lane = ledger.lane(LaneId::Nats);
    let taken = lane.taken_over.by_run();
    let taken: Vec<_> = taken.map(|(run, taken)| (run, taken.records)).collect();
    assert_eq!(taken, [("other", 2)]);
}

#[test]
fn two_entries_of_a_record_that_are_resent_at_once_are_one_record() {
    let ledger = Ledger::new(Arc::from("run"));
    ledger.recovered_from_disk(2);
    let given = [0, 1].map(|_| ledger.adopt(record("a", "earlier")).unwrap());
    for given in &given {
        ledger.resent(LaneId::Nats, given, Duration::ZERO);
    }
    ledger.delivered(LaneId::Nats, [&given[0]]);
    let balance = ledger.balance(&SpoolStats::default());
    assert_eq!((balance.recovered, balance.in_flight), (1, 0));
    assert!(balance.holds());
}

#[test]
fn a_record_that_is_delivered_though_its_client_was_refused_balances() {
    let ledger = Ledger::new(Arc::from("run"));
    ledger.refused(&record("a", "run"));
    ledger.delivered(LaneId::Nats, [&record("a", "run")]);
    ledger.delivered(LaneId::Nats, [&record("b", "run")]);
    ledger.refused(&record("b", "run"));
    ledger.refused(&record("c", "run"));
    assert_eq!(
        ledger.totals(),
        Counts {
            accepted: 0,
            recovered: 2,
            delivered: 2,
            redelivered: 0,
            ..Counts::default()
        }
    );
}

#[test]
fn a_refused_record_that_a_disk_that_hung_has_written_balances() {
    let ledger = Ledger::new(Arc::from("run"));
    let [a, b] = ["a", "b"].map(|id| record(id, "run"));
    ledger.refused(&a);
    ledger.delivered(LaneId::Nats, [&b]);
    ledger.refused(&b);
    // The feeder has read them before they were removed again.
    for refused in [&a, &b] {
        ledger.resent(LaneId::Nats, refused, Duration::ZERO);
    }
    ledger.delivered(LaneId::Nats, [&a, &b]);
    let balance = ledger.balance(&SpoolStats::default());
    assert_eq!(
        (balance.recovered, balance.delivered, balance.in_flight),
        (2, 2, 0)
    );
}

#[test]
fn refusals_are_a_change_when_they_begin() {
    let ledger = Ledger::new(Arc::from("run"));
    for _ in 0..3 {
        ledger.refused_by(LaneId::Nats, "full", 1);
        ledger.accepted(LaneId::Nats, &record("a", "run"), Duration::ZERO);
    }
    assert_eq!(ledger.change_log.last(), 1);
    ledger.refused_by(LaneId::Grpc, "full", 1);
    assert_eq!(ledger.change_log.last(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_imbalance_at_rest_is_reported_until_it_is_over() {
    let ledger = Arc::new(Ledger::new(Arc::from("run")));
    let (_spool, stats) = watch::channel(SpoolStats::default());
    tokio::spawn(audit(Arc::clone(&ledger), vec![stats], || false));
    ledger.dropped(1);
    sleep(3 * REST).await;
    assert!(ledger.is_imbalanced());
    assert_eq!(ledger.change_log.last(), 1);
    ledger.spooled(&record("c", "run"));
    sleep(3 * REST).await;
    assert!(!ledger.is_imbalanced());
    assert_eq!(ledger.change_log.last(), 2);
}

#[tokio::test(start_paused = true)]
async fn records_that_take_turns_on_disk_are_no_imbalance_at_rest() {
    let ledger = Arc::new(Ledger::new(Arc::from("run")));
    let (spool, stats) = watch::channel(SpoolStats::default());
    tokio::spawn(audit(Arc::clone(&ledger), vec![stats], || false));
    // It is one too many whenever somebody looks.
    ledger.dropped(1);
    for _ in 0..8 {
        spool.send_modify(|stats| stats.committed += 1);
        sleep(REST / 2).await;
        assert!(!ledger.is_imbalanced());
    }
    sleep(3 * REST).await;
    assert!(ledger.is_imbalanced());
}

/// The lanes' counts go on while the disk stalls, and those of the disk do not.
#[tokio::test(start_paused = true)]
async fn nothing_is_compared_while_a_disk_is_behind() {
    let ledger = Arc::new(Ledger::new(Arc::from("run")));
    let (_spool, stats) = watch::channel(SpoolStats::default());
    let is_behind = Arc::new(AtomicBool::new(true));
    let behind = Arc::clone(&is_behind);
    let audit = audit(Arc::clone(&ledger), vec![stats], move || {
        behind.load(Relaxed)
    });
    tokio::spawn(audit);
    ledger.dropped(1);
    sleep(5 * REST + REST / 2).await;
    assert!(!ledger.is_imbalanced());
    is_behind.store(false, Relaxed);
    sleep(REST).await;
    assert!(
        !ledger.is_imbalanced(),
        "compared with what was read before"
    );
    sleep(2 * REST).await;
    assert!(ledger.is_imbalanced());
}
