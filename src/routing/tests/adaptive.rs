use super::*;

/// Latency, in flight, success ratio and slow start.
fn factors(scores: &Scores, lane: LaneId, now: Duration) -> (f64, u64, f64, f64) {
    let factors = scores.factors(lane, 0, now);
    let round = |value: f64| (value * 1e6).round() / 1e6;
    (
        factors.latency.map_or(0.0, round),
        factors.in_flight,
        round(factors.success_ratio),
        round(factors.slow_start),
    )
}

/// The lane in the status, as JSON.
fn status(scores: &Scores, lane: LaneId, now: Duration) -> serde_json::Value {
    serde_json::to_value(scores.status(lane, 0, now)).unwrap()
}

#[test]
fn the_score_is_latency_by_load_over_weight_successes_and_slow_start() {
    let scores = warm([2, 1, 1, 1]);
    let sent = scores.sent(NATS, 3, WARM);
    scores.confirmed(NATS, 2, ms(1), WARM);
    for took in [ms(4), ms(8)] {
        scores.delivered(NATS, took, WARM);
    }
    assert_eq!(factors(&scores, NATS, WARM), (0.008, 3, 1.0, 1.0));
    let score = scores.factors(NATS, 2, WARM).score(1.0);
    assert!((score - 0.008 * 6.0 / 2.0).abs() < 1e-9, "{score}");
    drop(sent);
    assert_eq!(factors(&scores, NATS, WARM).1, 0);

    // A failure is a sample of the publish time-out.
    scores.failed(NATS, 1, WARM);
    assert_eq!(factors(&scores, NATS, WARM), (2.0, 0, 0.75, 1.0));
    let score = scores.factors(NATS, 1, WARM).score(1.0);
    assert!((score - 2.0 * 2.0 / (2.0 * 0.75)).abs() < 1e-9, "{score}");

    // The failure is forgotten ten seconds later, the latency only by further samples.
    assert_eq!(factors(&scores, NATS, WARM + s(10)), (2.0, 0, 1.0, 1.0));
}

#[test]
fn on_a_shared_broker_time_and_load_end_at_the_confirm() {
    let scores = warm([1; 4]);
    for (is_shared, latency, in_flight) in [(false, 0.007, 9), (true, 0.003, 0)] {
        scores.lane_up(NATS, s(0));
        scores.set_shared(NATS, is_shared);
        scores.confirmed(NATS, 1, ms(3), WARM);
        scores.delivered(NATS, ms(7), WARM);
        let factors = scores.factors(NATS, 9, WARM);
        assert_eq!(
            (factors.latency, factors.in_flight),
            (Some(latency), in_flight)
        );
    }
}

#[test]
fn a_lane_that_comes_up_begins_with_a_tenth_of_its_weight() {
    let scores = Scores::new(true, PUBLISH_TIMEOUT);
    scores.lane_up(NATS, s(100));
    for (age, expected) in [
        (0, 0.1),
        (500, 0.1),
        (1000, 0.1),
        (2500, 0.25),
        (10_000, 1.0),
        (60_000, 1.0),
    ] {
        let (.., slow_start) = factors(&scores, NATS, s(100) + ms(age));
        assert!(
            (slow_start - expected).abs() < 1e-6,
            "{age} ms: {slow_start}"
        );
    }
    scores.delivered(NATS, ms(3), s(120));
    scores.lane_down(NATS, s(120));
    scores.lane_up(NATS, s(130));
    let (latency, _, _, slow_start) = factors(&scores, NATS, s(131));
    assert_eq!(
        (latency, slow_start),
        (0.0, 0.1),
        "its last connection is forgotten"
    );
}

#[test]
fn reading_a_score_never_changes_it() {
    let read = warm([1; 4]);
    let unread = warm([1; 4]);
    let mut random = fastrand::Rng::with_seed(1);
    for step in 0..2000_u64 {
        let now = WARM + ms(step * 17);
        let lane = LANES[random.usize(..4)];
        let took = ms(random.u64(1..300));
        for scores in [&read, &unread] {
            drop(scores.sent(lane, 1, now));
            if took > ms(250) {
                scores.failed(lane, 1, now);
            } else {
                scores.confirmed(lane, 1, took, now);
                scores.delivered(lane, took, now);
            }
        }
        for later in [0, 5, 1000, 100_000] {
            for lane in LANES {
                let _ = read.factors(lane, 0, now + ms(later));
                let _ = read.is_steady(lane, now + ms(later));
                let _ = read.is_ejected(lane, now + ms(later));
                let _ = status(&read, lane, now + ms(later));
            }
        }
        for lane in LANES {
            assert_eq!(status(&read, lane, now), status(&unread, lane, now));
        }
    }
}

#[test]
fn many_routers_read_while_lanes_write() {
    let scores = warm([1; 4]);
    std::thread::scope(|threads| {
        for reader in 0..3 {
            let scores = &scores;
            threads.spawn(move || {
                let mut chooser = chooser(Policy::Adaptive, reader);
                for step in 0..20_000 {
                    let now = WARM + ms(step);
                    let lane = choose(&mut chooser, "", scores, now, |_| true).unwrap();
                    let _sent = scores.sent(lane, 1, now);
                    if step % 7 == 0 {
                        scores.failed(lane, 1, now);
                    } else {
                        scores.confirmed(lane, 1, ms(1), now);
                        scores.delivered(lane, ms(3), now);
                    }
                }
            });
        }
    });
    let in_flight = LANES.map(|lane| factors(&scores, lane, WARM).1);
    assert_eq!(in_flight, [0; 4]);
}

#[test]
fn a_lane_is_ejected_longer_each_time_and_the_last_one_never() {
    let scores = warm([1; 4]);
    let fail = |lane, now| {
        let ejections = (0..20).filter_map(|_| scores.failed(lane, 1, now));
        let ejections: Vec<_> = ejections.collect();
        ejections.last().map(|ejection| ejection.length)
    };
    assert_eq!(fail(NATS, WARM), Some(s(1)));
    assert_eq!(fail(NATS, WARM), None, "it is ejected");
    assert_eq!(fail(NATS, WARM + s(1)), Some(s(2)));
    assert_eq!(fail(NATS, WARM + s(3)), Some(s(4)));
    let now = WARM + s(4);
    assert_eq!(fail(RABBITMQ, now), Some(s(1)));
    scores.lane_paused(PUBSUB, now);
    let last = fail(GRPC, now);
    assert_eq!(last, None, "it is the last one that is up and not ejected");
    let reason = "61 of 61 records failed within ten seconds, while 100.0 % succeeded in the ten \
                  minutes before; ejected for 4 s";
    assert_eq!(
        status(&scores, NATS, now)["ejected"],
        serde_json::json!({"retry_in_s": 3.0, "reason": reason})
    );
    assert_eq!(scores.status(NATS, 0, now).ejections, 3);
    assert!(status(&scores, GRPC, now)["ejected"].is_null());
}

#[test]
fn with_every_lane_ejected_the_best_of_them_takes_the_record() {
    let scores = warm([1; 4]);
    for lane in [NATS, RABBITMQ, PUBSUB] {
        scores.failed(lane, 5, WARM);
    }
    for policy in [Policy::Adaptive, Policy::Failover] {
        let ejected = |lane| scores.is_ejected(lane, WARM);
        let lane = choose(&mut chooser(policy, 0), "", &scores, WARM, ejected);
        assert!(lane.is_some_and(ejected));
        let lane = choose(&mut chooser(policy, 0), "", &scores, WARM, |_| true);
        assert_eq!(lane, Some(GRPC));
    }
}

#[test]
fn a_policy_that_reads_no_score_has_none_and_ejects_no_lane() {
    for policy in [Policy::RoundRobin, Policy::Weighted, Policy::Hash] {
        let scores = Arc::new(Scores::new(policy.measures(), PUBLISH_TIMEOUT));
        for lane in LANES {
            scores.lane_up(lane, s(0));
        }
        assert!(scores.sent(NATS, 2, WARM).is_none());
        assert_eq!(scores.failed(NATS, 9, WARM), None);
        scores.confirmed(NATS, 9, ms(3), WARM);
        scores.delivered(NATS, ms(3), WARM);
        let expected = serde_json::json!(
            {"weight": 1, "score": null, "share": 1.0, "ejected": null}
        );
        assert_eq!(status(&scores, NATS, WARM), expected);
    }
}

#[test]
fn the_status_tells_weight_score_and_share() {
    let scores = warm([1, 1, 3, 0]);
    drop(scores.sent(NATS, 4, WARM));
    drop(scores.sent(PUBSUB, 12, WARM + s(5)));
    scores.delivered(PUBSUB, ms(6), WARM + s(5));
    scores.delivered(GRPC, ms(6), WARM + s(5));
    let told = |lane, now| {
        let status = status(&scores, lane, now);
        let score = status["score"].as_f64().map(|score| (score * 1e6).round());
        (status["weight"].as_u64(), score, status["share"].as_f64())
    };
    let now = WARM + s(9);
    assert_eq!(told(NATS, now), (Some(1), None, Some(0.25)));
    assert_eq!(told(PUBSUB, now), (Some(3), Some(2000.0), Some(0.75)));
    assert_eq!(told(GRPC, now), (Some(0), None, Some(0.0)));
    assert_eq!(told(PUBSUB, now + s(1)).2, Some(1.0), "ten seconds");
}

#[test]
fn ties_are_broken_at_random() {
    let counts = chosen(Policy::Adaptive, &warm([1; 4]), 10_000);
    assert!(
        counts.iter().all(|count| (2200..2800).contains(count)),
        "{counts:?}"
    );
}

/// Offers `rate` records a second for `seconds`. Lanes take `took` by the number of the second.
/// Returns the lanes that took the records of each second.
fn offer(
    rate: u64,
    routers: u64,
    seconds: u64,
    took: impl Fn(LaneId, u64) -> Duration,
) -> Vec<Vec<LaneId>> {
    let scores = warm([1; 4]);
    for lane in LANES {
        scores.delivered(lane, took(lane, 0), WARM);
    }
    let mut choosers: Vec<_> = (0..routers)
        .map(|seed| chooser(Policy::Adaptive, seed))
        .collect();
    let mut taken = vec![Vec::new(); usize::try_from(seconds).unwrap()];
    for number in 0..rate * seconds {
        let now = WARM + Duration::from_micros(number * 1_000_000 / rate);
        let chooser = &mut choosers[usize::try_from(number % routers).unwrap()];
        let lane = choose(chooser, "", &scores, now, |_| true).unwrap();
        drop(scores.sent(lane, 1, now));
        scores.confirmed(lane, 1, ms(1), now);
        scores.delivered(lane, took(lane, number / rate), now);
        taken[usize::try_from(number / rate).unwrap()].push(lane);
    }
    taken
}

#[test]
fn probes_are_one_percent_or_one_a_second_whichever_is_less() {
    for (rate, routers, expected) in [
        (10, 1, 3..=5),
        (50, 1, 15..=25),
        (1000, 1, 45..=50),
        (3000, 2, 45..=50),
    ] {
        for slow in [&[NATS][..], &[NATS, PUBSUB]] {
            let took = |lane, _| if slow.contains(&lane) { s(1) } else { ms(2) };
            let taken = offer(rate, routers, 50, took);
            let probes = taken.iter().map(|second| {
                let probes = second.iter().filter(|lane| slow.contains(lane));
                probes.count()
            });
            let probes: Vec<_> = probes.collect();
            let of_all: usize = probes.iter().sum();
            assert!(expected.contains(&of_all), "{rate}/s, {slow:?}: {probes:?}");
            assert!(
                probes.iter().all(|probes| *probes <= 1),
                "{rate}/s, {slow:?}: {probes:?}"
            );
        }
    }
}

#[test]
fn a_lane_that_was_slow_has_its_share_back_within_ten_seconds() {
    let took = |lane, second| {
        if lane == NATS && second < 20 {
            ms(200)
        } else {
            ms(2)
        }
    };
    let taken = offer(300, 1, 40, took);
    let count = |second: usize| taken[second].iter().filter(|lane| **lane == NATS).count();
    assert!((5..20).all(|second| count(second) <= 1), "it is slow");
    assert!(
        (30..40).all(|second| count(second) >= 50),
        "a quarter is 75"
    );
}
