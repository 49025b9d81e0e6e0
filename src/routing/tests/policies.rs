use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn round_robin_takes_each_lane_in_its_turn_and_skips_those_that_cannot(
        ups in prop::collection::vec(0_u8..16, 1..100)
    ) {
        let scores = warm([1; 4]);
        let mut chooser = chooser(Policy::RoundRobin, 0);
        let mut turn = 0;
        for up in ups {
            let is_up = |at: usize| up & (1 << at) != 0;
            let expected = (turn..turn + 4).map(|at| at % 4).find(|&at| is_up(at));
            turn = expected.map_or(turn, |at| at + 1);
            let place = |lane| LANES.iter().position(|known| *known == lane).unwrap();
            let lane = choose(&mut chooser, "", &scores, WARM, |lane| is_up(place(lane)));
            prop_assert_eq!(lane, expected.map(|at| LANES[at]));
        }
    }

    #[test]
    fn weighted_is_within_one_percent(
        weights in prop::array::uniform4(1_u32..1000),
        batches in prop::collection::vec(1_u32..64, 10),
    ) {
        let scores = warm(weights);
        let all: u32 = weights.iter().sum();
        let RouteChooser { mut chooser, route } = chooser(Policy::Weighted, 0);
        let mut counts = PerLane::<u32>::default();
        let mut sent = 0;
        for batch in batches.into_iter().cycle() {
            let candidates = Candidates {
                may_take: &|_| true,
                scores: &scores,
                undelivered: &|_| 0,
                now: WARM,
            };
            let choice = chooser.choose(&route, KeyHash::default(), batch, &candidates);
            let lane = choice.unwrap().lane;
            counts[lane as usize] += batch;
            sent += batch;
            if sent >= 100_000 {
                break;
            }
        }
        for (lane, weight) in LANES.into_iter().zip(weights) {
            let expected = f64::from(sent) * f64::from(weight) / f64::from(all);
            let count = f64::from(counts[lane as usize]);
            prop_assert!((count - expected).abs() <= 0.01 * f64::from(sent), "{count} {expected}");
        }
    }

    /// A job goes from lane to lane until one takes it.
    #[test]
    fn every_policy_tries_each_lane_that_may_take_a_record_once(
        policy in prop::sample::select(vec![
            Policy::RoundRobin, Policy::Weighted, Policy::Failover, Policy::Hash, Policy::Adaptive,
        ]),
        up in 0_u8..16,
        weights in prop::array::uniform4(0_u32..3),
        failures in prop::collection::vec(0_usize..4, 0..40),
        key in any::<u64>(),
        now in 0_u64..100,
    ) {
        let scores = warm(weights);
        for at in failures {
            scores.failed(LANES[at], 1, s(now));
        }
        let mut chooser = chooser(policy, key);
        let mut left: Vec<_> = LANES.into_iter().filter(|lane| up & (1 << *lane as u8) != 0).collect();
        while let Some(lane) = choose(
            &mut chooser, &key.to_string(), &scores, s(now), |lane| left.contains(&lane),
        ) {
            prop_assert!(left.contains(&lane));
            left.retain(|other| *other != lane);
        }
        prop_assert!(left.is_empty());
    }
}

#[test]
fn weighted_spreads_a_lanes_records_among_the_others() {
    let scores = warm([5, 1, 1, 0]);
    let mut chooser = chooser(Policy::Weighted, 0);
    let mut choose =
        |may_take: fn(LaneId) -> bool| choose(&mut chooser, "", &scores, WARM, may_take).unwrap();
    let order = [(); 14].map(|()| choose(|_| true));
    let once = [NATS, NATS, RABBITMQ, NATS, PUBSUB, NATS, NATS];
    assert_eq!(order, [once, once].concat()[..]);
    let only = choose(|lane| lane == GRPC);
    assert_eq!(only, GRPC, "a lane of weight 0 is better than none");
}

#[test]
fn weighted_gives_the_share_of_a_lane_that_is_away_to_the_others_by_their_weights() {
    let scores = warm([4, 3, 2, 1]);
    let mut chooser = chooser(Policy::Weighted, 0);
    let mut counts = PerLane::<u32>::default();
    for number in 0..200 {
        let up = |lane| number < 100 || lane != NATS;
        let lane = choose(&mut chooser, "", &scores, WARM, up).unwrap();
        counts[lane as usize] += u32::from(number >= 100);
    }
    assert_eq!(LANES.map(|lane| counts[lane as usize]), [0, 50, 33, 17]);
}

#[test]
fn weighted_goes_by_new_weights_from_the_next_record_on() {
    let scores = warm([1000, 1, 0, 0]);
    let mut chooser = chooser(Policy::Weighted, 0);
    let mut choose = || choose(&mut chooser, "", &scores, WARM, |_| true).unwrap();
    for _ in 0..400 {
        choose();
    }
    scores.set_weight(NATS, 1);
    let mut taken = [(); 10].map(|()| choose());
    taken.sort_unstable();
    let mut half_each = [[NATS; 5], [RABBITMQ; 5]].concat();
    half_each.sort_unstable();
    assert_eq!(taken[..], half_each);
}

/// The lane that failover takes at `now`, of those that are up.
fn failover(scores: &Scores, now: Duration) -> Option<LaneId> {
    let is_up = |lane| scores.up_since(lane) != u64::MAX;
    choose(&mut chooser(Policy::Failover, 0), "", scores, now, is_up)
}

/// The lanes that failover takes, one after the other, while these lanes flap: each is down from
/// `down` to `up` in each period.
fn changes(flapping: &[(LaneId, u64, u64)], period_ms: u64) -> Vec<(u64, LaneId)> {
    let scores = warm([1; 4]);
    let mut taken = Vec::new();
    for now in 0..60_000 {
        for &(lane, down, up) in flapping {
            match now % period_ms {
                at if at == down => scores.lane_down(lane, ms(now)),
                at if at == up => scores.lane_up(lane, ms(now)),
                _ => {}
            }
        }
        let lane = failover(&scores, ms(now)).unwrap();
        if taken.last().is_none_or(|(_, last)| *last != lane) {
            taken.push((now, lane));
        }
    }
    taken
}

#[test]
fn failover_changes_once_while_a_lane_flaps_every_200_ms() {
    let changes = changes(&[(NATS, 100, 300)], 400);
    assert_eq!(changes, [(0, NATS), (100, RABBITMQ)]);
}

#[test]
fn failover_goes_back_once_per_back_off_to_a_lane_that_flaps_slowly() {
    // Up for 6 s, down for 1 s.
    let changes = changes(&[(NATS, 6000, 6999)], 7000);
    let is_return = |(at, lane): &&(u64, LaneId)| *at > 0 && *lane == NATS;
    let returns = changes.iter().filter(is_return);
    // 1 s, 2 s and 4 s after it is up again; 8 s never come.
    let after: Vec<_> = returns.map(|(at, _)| (at - 6999) % 7000).collect();
    assert_eq!(after, [1000, 2000, 4000], "{changes:?}");
}

#[test]
fn two_lanes_that_flap_do_not_take_turns_while_a_third_is_steady() {
    let changes = changes(&[(NATS, 100, 300), (RABBITMQ, 200, 350)], 400);
    assert_eq!(changes, [(0, NATS), (100, RABBITMQ), (200, PUBSUB)]);
}

#[test]
fn while_no_lane_is_steady_failover_stays_with_the_one_that_is_up_longest() {
    let scores = warm([1; 4]);
    for lane in LANES {
        scores.lane_down(lane, s(1));
    }
    scores.lane_up(RABBITMQ, ms(2000));
    scores.lane_up(NATS, ms(2500));
    assert_eq!(failover(&scores, ms(2999)), Some(RABBITMQ));
    scores.lane_down(RABBITMQ, ms(2999));
    assert_eq!(failover(&scores, ms(2999)), Some(NATS));
}

#[test]
fn failover_returns_to_the_first_once_it_is_steady_and_skips_one_that_is_ejected() {
    let scores = warm([1; 4]);
    assert_eq!(failover(&scores, s(1)), Some(NATS));
    scores.lane_down(NATS, s(2));
    scores.lane_up(NATS, s(3));
    assert_eq!(failover(&scores, ms(3999)), Some(RABBITMQ));
    assert_eq!(failover(&scores, s(4)), Some(NATS));
    scores.failed(NATS, 5, s(5));
    assert_eq!(failover(&scores, s(5)), Some(RABBITMQ));
    let after = failover(&scores, s(7));
    assert_eq!(after, Some(NATS), "2 s: it is its second setback");
    for lane in [RABBITMQ, PUBSUB, GRPC] {
        scores.lane_paused(lane, s(8));
    }
    scores.lane_down(NATS, s(8));
    scores.lane_up(NATS, s(8));
    assert_eq!(failover(&scores, s(8)), Some(NATS), "it is the only one");
    scores.lane_up(GRPC, s(9));
    assert_eq!(failover(&scores, s(9)), Some(GRPC), "a pause is no setback");
    scores.lane_paused(NATS, s(9));
    scores.lane_paused(GRPC, s(9));
    assert_eq!(failover(&scores, s(9)), None);
}
