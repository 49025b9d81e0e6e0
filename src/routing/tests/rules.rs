use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::routing::rules::{Condition, Number, Predicate, Scalar, Subject};

const FIVE: &str = r#"
[[routes]]
when = { pointer = "/state", equals = "symptomatic" }
policy = "failover"
lanes = ["rabbitmq", "grpc"]

[[routes]]
when = { pointer = "/age", range = { max = 17 } }

[[routes]]
when = { header = "CE-Type", prefix = "org.example." }
lanes = ["pubsub"]

[[routes]]
when = { header = "content-type", equals = "application/vnd.case+json" }

[[routes]]
when = { pointer = "/age", in = [18, 19] }
"#;

/// The route that a record takes.
fn taken(routes: &Routes, record: &str, headers: &[(&str, &'static str)]) -> String {
    let values = routes.pointers().read(record).unwrap();
    let headers: BTreeMap<_, _> = headers.iter().copied().collect();
    let header = |name: &str| headers.get(name).copied();
    let assignment = routes.assign("id", &values, header);
    let traced = routes.trace(&values, header);
    assert_eq!(traced.last().unwrap().0.index, assignment.route.index);
    assert_eq!(traced.len(), assignment.route.index + 1);
    assignment.route.name.clone()
}

#[test]
fn the_first_route_that_matches_takes_the_record() {
    let routes = routes(Policy::Adaptive, FIVE);
    let taken = |record, headers: &[_]| taken(&routes, record, headers);
    assert_eq!(
        taken(r#"{"age":7,"state":"symptomatic"}"#, &[]),
        "routes[1]"
    );
    assert_eq!(taken(r#"{"age":7,"state":"well"}"#, &[]), "routes[2]");
    assert_eq!(
        taken(r#"{"age":70}"#, &[("ce-type", "org.example.case")]),
        "routes[3]"
    );
    let media_type = "Application/VND.case+json; charset=utf-8";
    assert_eq!(
        taken(r#"{"age":18}"#, &[("content-type", media_type)]),
        "routes[4]"
    );
    assert_eq!(taken(r#"{"age":18}"#, &[]), "routes[5]");
    assert_eq!(
        taken(r#"{"age":20}"#, &[("ce-type", "com.example")]),
        "default"
    );
    assert_eq!(
        taken(r#"{"age":"7","state":null}"#, &[]),
        "default",
        "types count"
    );
    let [first, second, .., default] = routes.all() else {
        unreachable!()
    };
    assert_eq!(
        (first.policy, &*first.lanes),
        (Policy::Failover, &[RABBITMQ, GRPC][..])
    );
    assert_eq!(
        (second.policy, &*second.lanes),
        (Policy::Adaptive, &LANES[..])
    );
    assert_eq!(
        (default.policy, &*default.lanes),
        (Policy::Adaptive, &LANES[..])
    );
    assert!(first.names_lanes && !second.names_lanes && !default.names_lanes);
}

#[test]
fn a_route_without_a_condition_is_the_default() {
    let routes = routes(Policy::RoundRobin, "[[routes]]\npolicy = \"hash\"");
    assert_eq!(
        (routes.all().len(), routes.all()[0].policy),
        (1, Policy::Hash)
    );
    assert!(routes.pointers().is_empty());
    assert_eq!(taken(&routes, "not JSON, and not read", &[]), "routes[1]");
}

#[test]
fn every_mistake_is_told_with_its_route_and_key() {
    let toml = r#"
        [[routes]]
        when = { pointer = "/a", exists = true }
        lanes = ["nats", "kafka"]
        [[routes]]
        when = { pointer = "/b", exists = true }
        lanes = []
        [[routes]]
        lanes = ["grpc", "grpc"]
    "#;
    let errors = try_routes(Policy::RoundRobin, toml).unwrap_err();
    let told: Vec<_> = errors
        .iter()
        .map(|error| (&*error.key, &*error.what))
        .collect();
    let lanes = "nats, rabbitmq, pubsub, grpc";
    assert_eq!(
        told,
        [
            (
                "routes[1].lanes",
                &*format!("\"kafka\" is no lane that is on; allowed are {lanes}")
            ),
            (
                "routes[2].lanes",
                &*format!("is empty; allowed are lanes that are on: {lanes}")
            ),
            (
                "routes[3].lanes",
                "\"grpc\" is there twice; allowed is each lane once"
            ),
        ]
    );
}

/// The routes that can never match, with the reason.
fn never(whens: &[&str]) -> Vec<String> {
    let table = |when: &&str| match *when {
        "" => "[[routes]]\n".to_owned(),
        when => format!("[[routes]]\nwhen = {{ {when} }}\n"),
    };
    let toml: String = whens.iter().map(table).collect();
    let never = routes(Policy::RoundRobin, &toml).unreachable();
    never
        .into_iter()
        .map(|(route, why)| format!("{}: {why}", route.name))
        .collect()
}

/// Over 60 lines: most are one case each.
#[test]
fn rules_that_can_never_match_are_named_with_what_takes_their_records() {
    let x = |test: &str| format!("pointer = \"/x\", {test}");
    let after = |tests: &[&str]| {
        let whens: Vec<_> = tests.iter().map(|test| x(test)).collect();
        never(&whens.iter().map(|when| &**when).collect::<Vec<_>>())
    };
    let second = "routes[2]: routes[1] takes all of its records before it";
    for (first, other) in [
        ("equals = 1", "equals = 1.0"),
        ("in = [1, \"a\", true]", "in = [\"a\", true]"),
        ("prefix = \"a\"", "prefix = \"ab\""),
        ("prefix = \"a\"", "in = [\"ab\", \"ac\"]"),
        (
            "range = { min = 1, max = 9 }",
            "range = { min = 2, max = 9 }",
        ),
        ("range = { min = 1 }", "range = { min = 2, max = 9 }"),
        ("range = { max = 9 }", "in = [1, 2.5]"),
        ("matches = \"a+\"", "matches = \"a+\""),
        ("matches = \"a+\"", "equals = \"caab\""),
        ("exists = true", "range = { min = 1 }"),
        ("exists = false", "exists = false"),
    ] {
        assert_eq!(after(&[first, other]), [second], "{first}, {other}");
        assert_eq!(after(&[other]), [""; 0], "{other}");
    }
    for (first, other) in [
        ("equals = 1", "equals = \"1\""),
        ("prefix = \"ab\"", "prefix = \"a\""),
        ("range = { min = 1, max = 9 }", "range = { min = 1 }"),
        ("range = { min = 1 }", "range = { max = 9 }"),
        ("exists = true", "exists = false"),
        ("equals = 1", "exists = true"),
        ("matches = \"a\"", "prefix = \"a\""),
    ] {
        assert_eq!(after(&[first, other]), [""; 0], "{first}, {other}");
    }
    let two = "routes[3]: routes[1] and routes[2] take all of its records before it";
    let ranges = [
        "range = { max = 10 }",
        "range = { min = 10, max = 20 }",
        "range = { min = 0, max = 20 }",
    ];
    assert_eq!(after(&ranges), [two]);
    let gap = [
        "range = { max = 10 }",
        "range = { min = 11 }",
        "range = { min = 0, max = 20 }",
    ];
    assert_eq!(after(&gap), [""; 0], "10.5");
    assert_eq!(
        after(&["equals = \"a\"", "prefix = \"b\"", "in = [\"bc\", \"a\"]"]).len(),
        1
    );
    let y = "pointer = \"/y\", equals = 1";
    assert_eq!(
        never(&[&x("exists = true"), &x("exists = false"), y]),
        [two]
    );
    assert_eq!(never(&["", y]), [second]);
    assert_eq!(never(&[y, ""]), [""; 0]);
    assert_eq!(
        never(&["pointer = \"/path/a\", exists = true"]),
        ["routes[1]: a record has no member `path`: the node removes it"]
    );
    assert_eq!(
        never(&["header = \"content-type\", equals = \"application/json; charset=utf-8\""]),
        ["routes[1]: content-type is compared in lower case and without parameters"]
    );
}

fn predicate() -> impl Strategy<Value = Predicate> {
    let number = || (0_i64..5).prop_map(|half| Number::from(half_of(half)));
    let text = || prop_oneof![Just(""), Just("a"), Just("ab"), Just("b"), Just("1")];
    let scalar = prop_oneof![
        number().prop_map(Scalar::Number),
        text().prop_map(|text| Scalar::Text(text.into())),
        any::<bool>().prop_map(Scalar::Bool),
    ];
    prop_oneof![
        prop::collection::vec(scalar, 1..3).prop_map(Predicate::OneOf),
        text().prop_map(|text| Predicate::Prefix(text.into())),
        (prop::option::of(number()), prop::option::of(number())).prop_map(|(one, other)| {
            match (one, other) {
                (Some(one), Some(other)) => Predicate::Range {
                    min: Some(one.min(other)),
                    max: Some(one.max(other)),
                },
                (min, max) => Predicate::Range { min, max },
            }
        }),
        any::<bool>().prop_map(Predicate::Exists),
        prop_oneof![Just("a"), Just("^b"), Just("")]
            .prop_map(|text| Predicate::Matches(text.parse().unwrap())),
    ]
}

fn half_of(number: i64) -> f64 {
    f64::from(i32::try_from(number).unwrap()) / 2.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_record_takes_a_route_that_is_called_unreachable(
        conditions in prop::collection::vec((0..3, predicate()), 1..6)
    ) {
        let subject = |at| match at {
            0 => Subject::Pointer("/x".parse().unwrap()),
            1 => Subject::Pointer("/y".parse().unwrap()),
            _ => Subject::Header("x".into()),
        };
        let rules: Vec<_> = conditions
            .into_iter()
            .map(|(at, predicate)| RouteRule {
                when: Some(Condition { subject: subject(at), predicate }),
                ..RouteRule::default()
            })
            .collect();
        let defaults = RouteDefaults {
            policy: Policy::RoundRobin,
            hash_on: &HashOn::Id,
            lanes: &LANES,
            apis: &[],
        };
        let routes = Routes::new(&rules, &defaults).unwrap();
        let never: Vec<_> =
            routes.unreachable().into_iter().map(|(route, _)| route.index).collect();
        let values = [
            "", "null", "true", "0", "0.25", "0.5", "1", "1.0", "1.5", "2", "-3", "9", "{}",
            r#""""#, r#""a""#, r#""ab""#, r#""b""#, r#""ba""#, r#""1""#, r#""c""#,
        ];
        let headers = ["", "a", "ab", "1", "1.0", "true", "c"].map(Some);
        let headers = headers.into_iter().chain([None]);
        for x in values {
            for y in ["", "null", "0.5", r#""ab""#] {
                let member = |name, value: &str| {
                    (!value.is_empty()).then(|| format!("\"{name}\":{value}"))
                };
                let members: Vec<_> = member("x", x).into_iter().chain(member("y", y)).collect();
                let record = format!("{{{}}}", members.join(","));
                let values = routes.pointers().read(&record).unwrap();
                for header in headers.clone() {
                    let route = routes.assign("id", &values, |_| header).route;
                    let name = &route.name;
                    prop_assert!(!never.contains(&route.index), "{record} {header:?} {name}");
                }
            }
        }
    }
}

#[test]
fn a_route_that_was_taken_before_is_found_again_or_keeps_its_promise() {
    let before = routes(Policy::Adaptive, FIVE);
    let [first, second, third, ..] = before.all() else {
        unreachable!()
    };
    let lanes = |route: &CompiledRoute| route.names_lanes.then(|| route.lanes.clone());
    let again = |routes: &Routes, route: &CompiledRoute| {
        routes.taken_before(&route.name, route.policy, lanes(route), None)
    };
    assert!(Arc::ptr_eq(&again(&before, first), first));
    assert!(Arc::ptr_eq(&again(&before, second), second));

    let after = routes(Policy::Weighted, "[[routes]]\nlanes = [\"nats\"]");
    let kept = again(&after, first);
    assert_eq!(
        (kept.policy, &*kept.lanes, kept.names_lanes),
        (Policy::Failover, &[RABBITMQ, GRPC][..], true)
    );
    let kept = again(&after, third);
    assert_eq!(
        (kept.policy, &*kept.lanes),
        (Policy::Adaptive, &[PUBSUB][..])
    );
    assert!(kept.index >= after.all().len(), "no turn of another route");
}

#[test]
fn each_mistake_of_a_rule_is_told() {
    let rule = "[[routes]]\nlanes = [\"kafka\"]\napi = \"nobody\"";
    let mistakes = try_routes(Policy::RoundRobin, rule).unwrap_err();
    let keys: Vec<_> = mistakes.iter().map(|mistake| &*mistake.key).collect();
    assert_eq!(keys, ["routes[1].lanes", "routes[1].api"]);
}
