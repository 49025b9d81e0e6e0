use std::time::Duration;

use super::*;
use crate::routing::{
    policy::Policy,
    tests::{GRPC, LANES, NATS, PUBSUB, RABBITMQ, routes},
};

const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A plan in which the lanes behave so, and each other lane takes 5 ms.
fn plan(records_per_second: u32, seconds: u64, lanes: &str) -> SimulationPlan {
    let mut text =
        format!("records_per_second = {records_per_second}\nduration = \"{seconds}s\"\n");
    for lane in LANES {
        let section = format!("[lanes.{lane}]");
        if !lanes.contains(&section) {
            text += &section;
            text += "\nlatency = \"5ms\"\n";
        }
    }
    text.push_str(lanes);
    let plan: SimulationPlan = toml::from_str(&text).unwrap();
    assert_eq!(plan.mistake(&LANES), None);
    plan
}

fn played(routes: &Routes, weights: [u32; 4], plan: &SimulationPlan) -> SimulationReport {
    let lanes: Vec<_> = LANES.into_iter().zip(weights).collect();
    let node = RoutedNode {
        routes,
        lanes: &lanes,
        publish_timeout: PUBLISH_TIMEOUT,
    };
    simulate(&node, plan, &[Values::default()])
}

fn play(policy: Policy, plan: &SimulationPlan) -> SimulationReport {
    played(&routes(policy, ""), [4, 3, 2, 1], plan)
}

fn tally(report: &SimulationReport, lane: LaneId) -> &LaneTally {
    let found = report.lanes.iter().find(|tally| tally.lane == lane);
    found.unwrap()
}

fn share(report: &SimulationReport, lane: LaneId) -> f64 {
    report.share(tally(report, lane).delivered)
}

#[track_caller]
fn assert_near(found: f64, expected: f64, by: f64) {
    assert!((found - expected).abs() <= by, "{found} is not {expected}");
}

#[test]
fn weights_are_the_shares_and_latencies_those_of_the_plan() {
    let plan = plan(
        1000,
        60,
        "[lanes.nats]\nlatency = { p50 = \"20ms\", p99 = \"100ms\" }\n",
    );
    let report = play(Policy::Weighted, &plan);
    for (lane, weight) in LANES.into_iter().zip([0.4, 0.3, 0.2, 0.1]) {
        assert_near(share(&report, lane), weight, 0.001);
    }
    let nats = tally(&report, NATS);
    let quantile = |quantile| nats.latency(quantile).unwrap().as_secs_f64();
    assert_near(quantile(0.5), 0.020, 0.001);
    assert_near(quantile(0.99), 0.100, 0.010);
    let grpc = tally(&report, GRPC).latency(0.99).unwrap();
    assert!(grpc >= ms(5) && grpc < ms(6), "{grpc:?}");
    assert_eq!(report.spooled, 0);
}

#[test]
fn the_same_seed_is_the_same_run_and_another_is_another() {
    let lanes = "[lanes.nats]\nlatency = { p50 = \"4ms\", p99 = \"50ms\" }\nfailures = 0.1\n";
    let mut plan = plan(500, 20, lanes);
    for policy in [Policy::Adaptive, Policy::Weighted] {
        plan.seed = 0;
        let lanes = |plan: &SimulationPlan| format!("{:?}", play(policy, plan).lanes);
        let first = lanes(&plan);
        assert_eq!(lanes(&plan), first);
        plan.seed = 7;
        assert_ne!(lanes(&plan), first);
    }
}

#[test]
fn a_slow_lane_gets_little_of_adaptive_and_its_turn_of_round_robin() {
    let slow = plan(10, 60, "[lanes.rabbitmq]\nlatency = \"205ms\"\n");
    let adaptive = played(&routes(Policy::Adaptive, ""), [1; 4], &slow);
    assert!(share(&adaptive, RABBITMQ) < 0.03, "{adaptive}");
    let turns = play(Policy::RoundRobin, &slow);
    assert_near(share(&turns, RABBITMQ), 0.25, 0.01);
}

#[test]
fn failover_takes_the_next_lane_during_an_outage_and_no_record_is_lost() {
    let outage = plan(
        100,
        60,
        "[lanes.nats]\nlatency = \"15ms\"\noutages = [{ from = \"20s\", to = \"39s\" }]\n",
    );
    let report = play(Policy::Failover, &outage);
    // It comes back within a second, and is steady a second later.
    let seconds = share(&report, NATS) * 60.0;
    assert!((38.9..=40.05).contains(&seconds), "{seconds}");
    assert_near(share(&report, NATS) + share(&report, RABBITMQ), 1.0, 1e-9);
    assert_eq!(tally(&report, NATS).failed, 1, "one was on its way");
}

#[test]
fn outages_close_together_are_one() {
    let outages =
        (20..39).map(|second| format!("{{ from = \"{second}s\", to = \"{second}s 990ms\" }}"));
    let outages = outages.collect::<Vec<_>>().join(", ");
    let lanes = format!("[lanes.nats]\nlatency = \"15ms\"\noutages = [{outages}]\n");
    let report = play(Policy::RoundRobin, &plan(100, 60, &lanes));
    // A quarter of the other 41 seconds, and little of the moments between.
    assert_near(share(&report, NATS), 10.25 / 60.0, 0.35 / 60.0);
}

#[test]
fn a_lane_that_fails_is_ejected_and_its_records_go_by_others() {
    let failing = plan(200, 60, "[lanes.nats]\nlatency = \"5ms\"\nfailures = 1.0\n");
    let report = play(Policy::Failover, &failing);
    let nats = tally(&report, NATS);
    assert!(
        nats.ejections >= 3 && nats.failed > nats.ejections,
        "{report}"
    );
    assert_eq!((nats.delivered, nats.latency(0.5)), (0, None));
    assert_eq!(tally(&report, RABBITMQ).delivered, 12_000, "{report}");
}

#[test]
fn a_record_tries_each_lane_once() {
    let lanes = LANES.map(|lane| format!("[lanes.{lane}]\nlatency = \"5ms\"\nfailures = 1.0\n"));
    let report = play(Policy::RoundRobin, &plan(10, 10, &lanes.concat()));
    let failed: Vec<_> = report.lanes.iter().map(|tally| tally.failed).collect();
    assert_eq!((failed, report.spooled), (vec![100; 4], 100));
}

#[test]
fn what_no_lane_takes_in_time_waits_on_disk() {
    let lanes = LANES.map(|lane| {
        let outages = "outages = [{ from = \"5s\", to = \"8s\" }]";
        format!("[lanes.{lane}]\nlatency = \"3s\"\n{outages}\n")
    });
    let report = play(Policy::RoundRobin, &plan(10, 10, &lanes.concat()));
    assert_eq!(report.spooled, 100);
    assert_near(report.share(report.spooled), 1.0, 1e-9);
}

#[test]
fn a_lane_with_a_rate_lets_records_wait_before_it() {
    let slow = "[lanes.nats]\nlatency = \"1ms\"\nrecords_per_second = 100\n";
    let rule = "[[routes]]\nlanes = [\"nats\"]\n";
    let report = played(
        &routes(Policy::RoundRobin, rule),
        [1; 4],
        &plan(110, 10, slow),
    );
    // The last of 1,100 comes when 100 are before it.
    let p99 = tally(&report, NATS).latency(1.0).unwrap().as_secs_f64();
    assert_near(p99, 1.0, 0.05);
}

#[test]
fn each_lane_takes_a_copy_of_a_broadcast_and_rules_are_counted() {
    let rule = "[[routes]]\nwhen = { header = \"a\", exists = true }\nlanes = [\"pubsub\"]\n";
    let report = played(&routes(Policy::Broadcast, rule), [1; 4], &plan(100, 1, ""));
    for lane in LANES {
        assert_eq!(tally(&report, lane).delivered, 100, "{report}");
    }
    let expected = [("routes[1]".to_owned(), 0), ("default".to_owned(), 100)];
    assert_eq!(report.routes, expected);
    assert!(report.to_string().lines().all(|line| line.len() <= 80));
    assert_eq!(tally(&report, PUBSUB).failed, 0);
}

#[test]
fn mistakes_in_a_plan_are_named() {
    let lanes = "[lanes.nats]\nlatency = \"5ms\"\n[lanes.grpc]\nlatency = \"5ms\"\n";
    let head = "records_per_second = 10\nduration = \"10s\"\n";
    let read = |head: &str, lanes: &str| {
        let plan = toml::from_str::<SimulationPlan>(&format!("{head}{lanes}"));
        match plan {
            Ok(plan) => plan.mistake(&[NATS, GRPC]),
            Err(why) => Some(why.message().to_owned()),
        }
    };
    assert_eq!(read(head, lanes), None);
    for (head, lanes, part) in [
        (
            "records_per_second = 0\nduration = \"10s\"\n",
            lanes,
            "0 records come",
        ),
        (
            "records_per_second = 1000\nduration = \"1h\"\n",
            lanes,
            "3600000 records come",
        ),
        (
            "records_per_second = 10\nduration = \"fast\"\n",
            lanes,
            "\"fast\" is no time",
        ),
        (
            "records_per_second = 10\nduration = \"18446744073709551615s\"\n",
            lanes,
            "no time up to 24 hours",
        ),
        (
            head,
            "[lanes.nats]\nlatency = \"25h\"\n[lanes.grpc]\nlatency = \"5ms\"\n",
            "allowed is a time",
        ),
        (
            head,
            "[lanes.nats]\nlatency = { p50 = \"1ms\", p99 = \"2ms\", p10 = \"1ms\" }\n[lanes.grpc]\nlatency = \"5ms\"\n",
            "allowed is a time",
        ),
        (
            head,
            "[lanes.nats]\nlatency = \"5ms\"\n",
            "lanes.grpc: is missing",
        ),
        (
            head,
            "[lanes.kafka]\nlatency = \"5ms\"\n",
            "lanes.kafka: the configuration has no",
        ),
        (head, "[lanes.nats]\nlatency = 5\n", "allowed is a time"),
        (head, "[lanes.nats]\nlatencies = 5\n", "latencies"),
        (
            head,
            &lanes.replace("\"5ms\"", "{ p50 = \"5ms\", p99 = \"4ms\" }"),
            "p99 is not under",
        ),
        (
            head,
            &format!("{lanes}failures = 1.5\n"),
            "lanes.grpc.failures: 1.5",
        ),
        (
            head,
            &format!("{lanes}records_per_second = 0\n"),
            "at least 1",
        ),
        (
            head,
            &format!("{lanes}outages = [{{ from = \"5s\", to = \"5s\" }}]\n"),
            "lanes.grpc.outages",
        ),
    ] {
        let mistake = read(head, lanes).unwrap_or_default();
        assert!(mistake.contains(part), "{part}: {mistake}");
    }
}
