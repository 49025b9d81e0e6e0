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
    let other = Arc::new(Scores::new(true, s(9)));
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

#[test]
fn the_key_is_a_value_a_header_or_the_id() {
    let of = |hash_on: &str, record: &str| {
        let toml = format!("[[routes]]\npolicy = \"hash\"\nhash_on = \"{hash_on}\"");
        let routes = routes(Policy::RoundRobin, &toml);
        let values = routes.pointers().read(record).unwrap();
        let header = |name: &str| (name == "ce-subject").then_some("a");
        routes.assign("id", &values, header).key
    };
    let key = |text: &str| KeyHash::of(text.as_bytes());
    assert_eq!(of("id", "{}"), key("id"));
    assert_eq!(of("/x", r#"{"x":"\u0061"}"#), key("a"));
    assert_eq!(of("/x", r#"{"x":1.0}"#), key("1.0"));
    assert_eq!(of("/x/y", r#"{"x":{"y":[1, 2]}}"#), key("[1, 2]"));
    assert_eq!(of("/x", r#"{"y":1}"#), key("id"), "it has no such value");
    assert_eq!(of("header:CE-Subject", "{}"), key("a"));
    assert_eq!(of("header:other", "{}"), key("id"));
    let other = routes(Policy::Adaptive, "").assign("id", &Values::default(), |_| None);
    assert_eq!(other.key, KeyHash::default(), "no other policy hashes");
}

/// The lane of each of 100,000 places, each the key of a record with an id of its own.
fn map_of_places(lost: Option<LaneId>) -> Vec<LaneId> {
    let rule = "[[routes]]\npolicy = \"hash\"\nhash_on = \"/place\"";
    let routes = routes(Policy::RoundRobin, rule);
    let scores = warm([1, 2, 3, 4]);
    let may_take = |lane| Some(lane) != lost;
    let candidates = Candidates {
        may_take: &may_take,
        scores: &scores,
        undelivered: &|_| 0,
        now: WARM,
    };
    let mut chooser = Chooser::new(0);
    let lanes = (0..KEYS).map(|number| {
        let record = format!("{{\"place\":\"{}\"}}", id(number));
        let values = routes.pointers().read(&record).unwrap();
        let own_id = format!("{number}");
        let Assignment { route, key, .. } = routes.assign(&own_id, &values, |_| None);
        let choice = chooser.choose(&route, key, 1, &candidates);
        choice.unwrap().lane
    });
    lanes.collect()
}

#[test]
fn records_of_one_value_share_a_lane_and_a_lost_lane_moves_only_its_own_values() {
    let before = map_of_places(None);
    let by_id = map(&warm([1, 2, 3, 4]), |_| true);
    assert_eq!(
        before, by_id,
        "a place maps as an id of its characters does"
    );
    let after = map_of_places(Some(NATS));
    for (before, after) in before.iter().zip(&after) {
        assert!(before == after || *before == NATS);
    }
}
