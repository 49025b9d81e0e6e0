use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::routing::{
    choose::Reason,
    explain::{EXPLAINED_MAX, Explanation, Explanations, trace_lines},
};

proptest! {
    #[test]
    fn the_runner_up_takes_it_without_the_chosen_lane(
        policy in prop::sample::select(vec![
            Policy::RoundRobin, Policy::Weighted, Policy::Failover, Policy::Hash, Policy::Adaptive,
        ]),
        up in 1_u8..16,
        weights in prop::array::uniform4(1_u32..9),
        latencies in prop::array::uniform4(1_u64..1000),
        failures in prop::collection::vec(0_usize..4, 0..20),
        choices in 1..9,
    ) {
        let scores = warm(weights);
        for (lane, latency) in LANES.into_iter().zip(latencies) {
            // Each has its own, so that none are equal.
            scores.delivered(lane, Duration::from_micros(4 * latency + lane as u64), WARM);
        }
        for at in failures {
            scores.failed(LANES[at], 1, WARM);
        }
        let is_up = |lane: LaneId| up & (1 << lane as u8) != 0;
        let mut chooser = chooser(policy, 0);
        for number in 0..choices {
            let id = format!("{number}");
            let mut other = chooser.clone();
            let choice = choose_and_explain(&mut chooser, &id, &scores, WARM, is_up).unwrap();
            if let Some(weighed) = &choice.weighed {
                let weighed = weighed.iter().flatten();
                let mut scores: Vec<_> = weighed.map(|factors| factors.score(1.0)).collect();
                scores.sort_by(f64::total_cmp);
                // Equal ones are chosen at random.
                prop_assume!(scores.windows(2).all(|pair| pair[0] < pair[1]));
            }
            let without = choose(&mut other, &id, &scores, WARM, |lane| {
                is_up(lane) && lane != choice.lane
            });
            prop_assert_eq!(choice.runner_up, without);
        }
    }
}

fn explanation(choice: Option<Choice>) -> Explanation {
    Explanation {
        at_us: 5_000,
        route: chooser(Policy::Adaptive, 0).route,
        choice,
        is_first: true,
    }
}

/// An adaptive choice between a lane that is measured, one that is loaded, and one of weight 0.
fn adaptive_choice() -> Choice {
    let scores = warm([1, 1, 0, 2]);
    scores.delivered(NATS, ms(4), WARM);
    scores.delivered(GRPC, ms(4), WARM);
    let sent = scores.sent(NATS, 1, WARM);
    let mut chooser = chooser(Policy::Adaptive, 3);
    let choice = choose_and_explain(&mut chooser, "", &scores, WARM, |lane| lane != RABBITMQ);
    drop(sent);
    choice.unwrap()
}

#[test]
fn an_explanation_is_text_of_80_columns() {
    let text = explanation(Some(adaptive_choice())).to_string();
    assert_eq!(
        text,
        "rule       default\n\
         policy     adaptive\n\
         lane       grpc: the lowest score\n\
         runner-up  nats\n\
         API        [api]\n\n\
         lane          score   latency ms  in flight  weight  success  slow start\n\
         grpc       0.002000        4.000          0       2    1.000        1.00\n\
         nats       0.008000        4.000          1       1    1.000        1.00\n\
         pubsub     infinite      unknown          0       0    1.000        1.00"
    );
    let none = explanation(None).to_string();
    assert_eq!(
        none.lines().skip(2).collect::<Vec<_>>(),
        [
            "lane       none: no lane could take it in time: the spool did",
            "runner-up  none",
            "API        [api]"
        ]
    );
}

#[test]
fn an_explanation_is_json_with_the_four_factors_of_each_score() {
    let told = serde_json::to_value(explanation(Some(adaptive_choice()))).unwrap();
    assert_eq!(
        told,
        json!({
            "at_ms": 5, "rule": "default", "when": null, "policy": "adaptive", "lane": "grpc",
            "reason": "the lowest score", "runner_up": "nats", "api": "api",
            "lanes": [
                {"lane": "grpc", "score": 0.002, "latency_ms": 4.0, "in_flight": 0, "weight": 2,
                 "success_ratio": 1.0, "slow_start": 1.0},
                {"lane": "nats", "score": 0.008, "latency_ms": 4.0, "in_flight": 1, "weight": 1,
                 "success_ratio": 1.0, "slow_start": 1.0},
                {"lane": "pubsub", "score": null, "latency_ms": null, "in_flight": 0, "weight": 0,
                 "success_ratio": 1.0, "slow_start": 1.0},
            ],
        })
    );
    let none = serde_json::to_value(explanation(None)).unwrap();
    assert_eq!((&none["lane"], &none["lanes"]), (&Value::Null, &json!([])));
}

#[test]
fn a_rule_is_explained_with_its_condition_and_the_values_that_the_rules_tested() {
    let routes = routes(
        Policy::Weighted,
        r#"
        [[routes]]
        when = { pointer = "/state", equals = "symptomatic" }
        [[routes]]
        when = { pointer = "/state", in = ["a state with a very long name", "another"] }
        [[routes]]
        when = { pointer = "/age", range = { max = 17 } }
        "#,
    );
    let values = routes.pointers().read(r#"{"age":7}"#).unwrap();
    let explanation = Explanation {
        route: routes.assign("", &values, |_| None).route,
        ..explanation(None)
    };
    let text = explanation.to_string();
    assert_eq!(
        text.lines().next(),
        Some("rule       routes[3]: /age is at most 17")
    );
    assert_eq!(
        trace_lines(&routes.trace(&values, |_| None)),
        [
            r#"routes[1]  does not: /state equals "symptomatic"; the value is missing"#,
            "routes[2]  does not: /state is in [\"a state with a very long name\", \"another\"]\n           \
             the value is missing",
            "routes[3]  takes it: /age is at most 17; the value is 7",
        ]
    );
    let told = serde_json::to_value(&explanation).unwrap();
    assert_eq!(
        (&told["rule"], &told["when"]),
        (&json!("routes[3]"), &json!("/age is at most 17"))
    );
}

#[test]
fn the_reason_is_that_of_the_moment() {
    let reason = |policy, scores: &Scores, now| {
        let choice = choose_and_explain(&mut chooser(policy, 0), "", scores, now, |_| true);
        choice.unwrap().reason
    };
    let scores = warm([0; 4]);
    assert_eq!(reason(Policy::Weighted, &scores, WARM), Reason::WeightZero);
    let scores = warm([1; 4]);
    assert_eq!(
        reason(Policy::Weighted, &scores, WARM),
        Reason::WeightedTurn
    );
    assert_eq!(reason(Policy::Failover, &scores, WARM), Reason::FirstSteady);
    for lane in LANES {
        scores.lane_down(lane, WARM);
        scores.lane_up(lane, WARM);
    }
    assert_eq!(reason(Policy::Failover, &scores, WARM), Reason::UpLongest);

    let scores = warm([1; 4]);
    let mut adaptive = chooser(Policy::Adaptive, 0);
    let mut reasons = (0..200).map(|_| {
        let choice = choose_and_explain(&mut adaptive, "", &scores, WARM, |_| true).unwrap();
        (choice.reason, choice.lane, choice.runner_up)
    });
    let probe = reasons
        .find(|(reason, ..)| *reason == Reason::Probe)
        .unwrap();
    assert!(probe.2.is_some_and(|best| best != probe.1));
}

#[test]
fn the_last_ten_thousand_records_are_explained_with_each_of_their_tries() {
    let explanations = Explanations::default();
    let push = |id: &str, at_us, is_first| {
        let explanation = Explanation {
            at_us,
            is_first,
            ..explanation(None)
        };
        explanations.push([Arc::from(id)].iter(), explanation);
    };
    let times = |id: &str| {
        let of_id = explanations.of(id);
        of_id.iter().map(|choice| choice.at_us).collect::<Vec<_>>()
    };
    for number in 0..EXPLAINED_MAX as u64 {
        push(&number.to_string(), number, true);
        push(&number.to_string(), number + 1, false);
    }
    assert_eq!(times("0"), [0, 1], "tries are not counted as records");
    push("new", 0, true);
    assert_eq!((times("0").len(), times("1")), (0, vec![1, 2]));
    push("1", 99, true);
    assert_eq!(times("1").last(), Some(&99));

    // A record that every lane gives back again and again does not fill the memory.
    for again in 0..6 * EXPLAINED_MAX as u64 {
        push("again", again, false);
    }
    assert!(times("again").len() <= 5 * EXPLAINED_MAX);
}
