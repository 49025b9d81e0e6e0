use super::*;

const KEYS: usize = 100_000;

/// The lane of each key, among those that `may_take` it.
fn map(scores: &Scores, may_take: impl Fn(LaneId) -> bool) -> Vec<LaneId> {
    let mut chooser = chooser(Policy::Hash, 0);
    let mut lane = |number| choose(&mut chooser, &id(number), scores, WARM, &may_take).unwrap();
    (0..KEYS).map(&mut lane).collect()
}

/// The order in which a key tries the lanes.
fn ranking(key: &str, weights: [u32; 4]) -> [LaneId; 4] {
    let scores = warm(weights);
    let mut left = LANES.to_vec();
    LANES.map(|_| {
        let mut chooser = chooser(Policy::Hash, 0);
        let lane = choose(&mut chooser, key, &scores, WARM, |lane| {
            left.contains(&lane)
        })
        .unwrap();
        left.retain(|other| *other != lane);
        lane
    })
}

/// From a second program, by the paper of `SipHash`. They hold in every version: a change moves
/// keys at an upgrade.
#[test]
fn golden_vectors() {
    for (key, even, uneven) in [
        (
            "",
            [RABBITMQ, NATS, PUBSUB, GRPC],
            [RABBITMQ, GRPC, PUBSUB, NATS],
        ),
        (
            "San Marcos",
            [RABBITMQ, PUBSUB, GRPC, NATS],
            [RABBITMQ, GRPC, PUBSUB, NATS],
        ),
        (
            "é😀",
            [NATS, RABBITMQ, PUBSUB, GRPC],
            [NATS, PUBSUB, RABBITMQ, GRPC],
        ),
        (
            "record-1",
            [NATS, GRPC, PUBSUB, RABBITMQ],
            [GRPC, NATS, PUBSUB, RABBITMQ],
        ),
        (
            "record-2",
            [GRPC, NATS, PUBSUB, RABBITMQ],
            [GRPC, NATS, PUBSUB, RABBITMQ],
        ),
    ] {
        assert_eq!(ranking(key, [1; 4]), even, "{key}");
        assert_eq!(ranking(key, [1, 2, 3, 4]), uneven, "{key}");
    }
}

#[test]
#[expect(clippy::cast_precision_loss, reason = "a hundred thousand")]
fn keys_are_spread_by_the_weights() {
    for weights in [[1, 1, 1, 1], [1, 2, 3, 4], [0, 1, 0, 9]] {
        let all: u32 = weights.iter().sum();
        let map = map(&warm(weights), |_| true);
        for (lane, weight) in LANES.into_iter().zip(weights) {
            let count = map.iter().filter(|taken| **taken == lane).count();
            let share = count as f64 / KEYS as f64;
            let expected = f64::from(weight) / f64::from(all);
            assert!(
                (share - expected).abs() < 0.01,
                "{lane}: {share}, not {expected}"
            );
        }
    }
}

#[test]
fn a_lost_lane_moves_only_its_own_keys_and_its_return_restores_the_map() {
    let scores = warm([1, 2, 3, 4]);
    let before = map(&scores, |_| true);
    for lost in LANES {
        let after = map(&scores, |lane| lane != lost);
        for (before, after) in before.iter().zip(&after) {
            assert!(before == after || *before == lost);
            assert_ne!(*after, lost);
        }
        let pairs = before.iter().zip(&after);
        let moved: Vec<_> = pairs.filter(|(before, _)| **before == lost).collect();
        for lane in LANES.into_iter().filter(|lane| *lane != lost) {
            assert!(
                moved.iter().any(|(_, after)| **after == lane),
                "they are spread"
            );
        }
    }
    assert_eq!(map(&scores, |_| true), before);
}

#[test]
fn the_map_is_the_same_on_another_node_whatever_that_has_seen() {
    let scores = warm([1, 2, 3, 4]);
    let before = map(&scores, |_| true);
    let other = Arc::new(Scores::new(Policy::Failover, s(9)));
    for (lane, weight) in LANES.into_iter().zip([1, 2, 3, 4]).rev() {
        other.set_weight(lane, weight);
        other.lane_up(lane, WARM);
        drop(other.sent(lane, weight, WARM));
    }
    other.failed(NATS, 9, WARM);
    assert!(other.is_ejected(NATS, WARM));
    assert_eq!(map(&other, |_| true), before);
}

#[test]
fn a_new_weight_moves_keys_to_or_from_that_lane_only() {
    let before = map(&warm([1, 2, 3, 4]), |_| true);
    let after = map(&warm([1, 4, 3, 4]), |_| true);
    let pairs = before.iter().zip(&after);
    let moved = pairs.filter(|(before, after)| before != after);
    assert!(moved.clone().all(|(_, after)| *after == RABBITMQ));
    assert!(moved.count() > KEYS / 20);
}
