use std::{collections::BTreeMap, time::Duration};

use super::*;
use crate::{
    config::ConfigError,
    control::ReloadReport,
    http::status::{OrderStatus, SpoolStatus, apis::ApiStatus, apis::NamedApiStatus},
    lane_id::LaneId,
    ledger::{Balance, Quantiles},
    log::LogStatus,
    routing::scores::Scores,
    secrets::FileStatus,
    transport::BrokerInfo,
};

const NO_TIME: Quantiles = Quantiles { p50: 0.0, p99: 0.0 };

fn durable() -> &'static BrokerInfo {
    Box::leak(Box::new(BrokerInfo {
        outlives_power_cut: Durability::Yes,
        ..BrokerInfo::default()
    }))
}

fn lane() -> LaneStatus<'static> {
    let scores = Scores::new(false, Duration::from_secs(1));
    LaneStatus {
        lane: LaneId::Nats,
        tag: "NATS",
        state: "up",
        draining: false,
        takes_records: true,
        since_s: 1.0,
        restarts: 0,
        attempts: 1,
        last_error: None,
        retry_in_s: None,
        routing: scores.status(LaneId::Nats, 0, Duration::ZERO),
        weight_set: None,
        ordered: None,
        accepted: 0,
        delivered: 0,
        dead: 0,
        in_flight: 0,
        lag_s: None,
        handed_over: 0,
        missing: 0,
        redelivered: 0,
        kept: 0,
        publish_ms: NO_TIME,
        delivery_ms: NO_TIME,
        recent_publish: Duration::ZERO,
        broker: durable(),
        refusing: None,
    }
}

fn api() -> ApiStatus<'static> {
    ApiStatus {
        url: "http://api/",
        state: "up",
        since_s: 1.0,
        last_error: None,
        retry_in_s: None,
        in_flight: 0,
        limit: 64,
        post_ms: None,
        rate: None,
    }
}

/// A node at which nothing is wrong.
fn well() -> Status<'static> {
    Status {
        version: "0",
        node: "node",
        uptime_s: 1.0,
        draining: false,
        ledger: Balance::default(),
        balanced: true,
        lanes: vec![lane()],
        api: api(),
        apis: BTreeMap::new(),
        unclaimed: 0,
        oldest_s: None,
        spool: SpoolStatus {
            bytes: 0,
            max: 1000,
            refuses: false,
            full_in_s: None,
            oldest_s: None,
        },
        router_restarts: 0,
        policy: "round-robin",
        recent: crate::history::History::new([].into_iter()).last_second(),
        reload: None,
        files: Vec::new(),
        traces: None,
        log: LogStatus::default(),
        warnings: Vec::new(),
    }
}

/// What the warnings of the node are about, with their levels, and the text of the first.
fn found(
    ack: Ack,
    spoil: impl FnOnce(&mut Status<'static>),
) -> (Vec<(WarningLevel, String)>, String) {
    let mut status = well();
    spoil(&mut status);
    let list = warnings(&status, ack);
    let text = list.first().map(|warning| {
        assert!(!warning.remedy.is_empty(), "{warning:?}");
        warning.what.clone()
    });
    let about = list
        .into_iter()
        .map(|warning| (warning.level, warning.about));
    (about.collect(), text.unwrap_or_default())
}

fn order(action: Action) -> OrderStatus {
    OrderStatus {
        action: Some(action),
        by: "10.0.0.7".into(),
        since_s: 1.0,
        kept: false,
    }
}

fn rejected() -> ReloadReport {
    ReloadReport {
        by: "SIGHUP".into(),
        at_us: 0,
        outcome: ReloadOutcome::Rejected,
        applied: Vec::new(),
        needs_restart: Vec::new(),
        reasons: vec![ConfigError {
            place: "file:3".into(),
            key: "api.url".into(),
            what: "is no URL".into(),
        }],
    }
}

#[test]
fn a_node_that_is_well_has_no_warning() {
    assert_eq!(found(Ack::Durable, |_| {}).0, []);
}

type Spoil = fn(&mut Status<'static>);

/// The node that each one spoils has one warning, of that level, about that, with that text.
fn are_one_warning_each(cases: &[(WarningLevel, &str, &str, Spoil)]) {
    for (level, about, text, spoil) in cases {
        let (about_found, what) = found(Ack::Durable, spoil);
        assert_eq!(about_found, [(*level, (*about).to_owned())], "{what}");
        assert!(what.contains(text), "{what}");
    }
}

#[test]
fn each_trouble_of_the_records_and_the_disk_is_one_warning() {
    use WarningLevel::{Error, Notice, Warning};
    are_one_warning_each(&[
        (
            Error,
            "ledger",
            "missing: the broker of nats had",
            |status| {
                (status.ledger.missing, status.balanced) = (1, false);
                status.lanes[0].missing = 1;
            },
        ),
        (Error, "ledger", "does not balance", |status| {
            status.balanced = false;
        }),
        (Error, "dead letters", "dead letters", |status| {
            status.ledger.dead = 1;
        }),
        (Warning, "disk", "not configured", |status| {
            status.unclaimed = 1;
        }),
        (Notice, "parked", "parked", |status| {
            status.ledger.parked = 1;
        }),
        (Warning, "disk", "not configured", |status| {
            // The ledger counts them.
            (status.unclaimed, status.ledger.parked) = (2, 2);
        }),
        (Warning, "disk", "takes no records", |status| {
            status.spool.refuses = true;
        }),
        (Warning, "disk", "nine tenths", |status| {
            status.spool.bytes = 900;
        }),
    ]);
}

#[test]
fn each_trouble_of_a_lane_is_one_warning() {
    use WarningLevel::{Notice, Warning};
    are_one_warning_each(&[
        (Warning, "nats", "crashes: boom", |status| {
            let lane = &mut status.lanes[0];
            (lane.state, lane.last_error) = ("down", Some("boom"));
        }),
        (Warning, "nats", "by itself: refused", |status| {
            let lane = &mut status.lanes[0];
            (lane.state, lane.last_error) = ("backoff", Some("refused"));
        }),
        (Notice, "nats", "Paused by 10.0.0.7", |status| {
            let lane = &mut status.lanes[0];
            (lane.state, lane.ordered) = ("paused", Some(order(Action::Pause)));
        }),
        (Notice, "nats", "Drained by 10.0.0.7", |status| {
            let lane = &mut status.lanes[0];
            (lane.draining, lane.ordered) = (true, Some(order(Action::Drain)));
        }),
        (Warning, "nats", "refuses records: full", |status| {
            status.lanes[0].refusing = Some("full".into());
        }),
        (Warning, "lanes", "No lane", |status| {
            status.lanes[0].takes_records = false;
        }),
        (
            Warning,
            "nats",
            "Slow: half of its confirms take over 2 s",
            |status| {
                status.lanes[0].recent_publish = Duration::from_millis(4_900);
            },
        ),
        (
            Warning,
            "grpc",
            "Slow: half of its confirms take over 0.25 s",
            |status| {
                status.lanes[0].recent_publish = Duration::from_millis(60);
                status.lanes.push(other(300));
            },
        ),
    ]);
}

/// A lane to itself, half of whose confirms take so long.
fn other(ms: u64) -> LaneStatus<'static> {
    LaneStatus {
        lane: LaneId::Grpc,
        recent_publish: Duration::from_millis(ms),
        ..lane()
    }
}

#[test]
fn a_lane_that_is_no_slower_than_the_others_or_waits_for_the_api_has_no_warning() {
    let (about, _) = found(Ack::Durable, |status| {
        status.lanes[0].recent_publish = Duration::from_millis(900);
        status.lanes.push(other(2_000));
    });
    assert_eq!(about, []);
    // The time of its API is no fault of the lane.
    let (about, _) = found(Ack::Durable, |status| {
        status.lanes[0].recent_publish = Duration::from_millis(5);
        status.api.post_ms = Some(900.0);
        status.lanes.push(other(1_700));
    });
    assert_eq!(about, []);
}

#[test]
fn each_trouble_of_the_api_and_the_node_is_one_warning() {
    use WarningLevel::{Notice, Warning};
    are_one_warning_each(&[
        (
            Warning,
            "api",
            "http://api/ is down, its records wait: 503",
            |status| {
                (status.api.state, status.api.last_error) = ("down", Some("503".into()));
            },
        ),
        (Warning, "api", "a POST takes over 5 s", |status| {
            status.api.post_ms = Some(9_000.0);
        }),
        (
            Warning,
            "configuration",
            "file:3: api.url: is no URL",
            |status| {
                status.reload = Some(rejected());
            },
        ),
        (Notice, "configuration", "next start: api.url", |status| {
            status.reload = Some(ReloadReport {
                outcome: ReloadOutcome::Applied,
                needs_restart: vec!["api.url".into()],
                reasons: Vec::new(),
                ..rejected()
            });
        }),
        (
            Warning,
            "files",
            "admin.token_file cannot be used",
            |status| {
                status.files.push(FileStatus {
                    key: "admin.token_file",
                    count: Some(1),
                    last_error: Some("no such file".into()),
                });
            },
        ),
        (Warning, "log", "the standard error does not", |status| {
            status.log = LogStatus {
                lost: 1,
                refuses: true,
            };
        }),
        (Notice, "node", "is stopping", |status| {
            status.draining = true;
        }),
    ]);
}

#[test]
fn each_of_several_apis_is_named() {
    let (about, what) = found(Ack::Durable, |status| {
        let down = ApiStatus {
            state: "down",
            ..api()
        };
        // With several, the first of them is `api` too.
        status.api.state = "down";
        for (name, api, refuses) in [("default", api(), false), ("other", down, true)] {
            let named = NamedApiStatus {
                api,
                held: 0,
                parked: 0,
                dead: 0,
                disk_bytes: 0,
                refuses,
            };
            status.apis.insert(name, named);
        }
    });
    let expected = (WarningLevel::Warning, "api other".to_owned());
    assert_eq!(about, [expected.clone(), expected], "{what}");
}

#[test]
fn a_confirm_that_a_power_cut_can_take_is_covered_or_a_warning() {
    for (ack, level) in [
        (Ack::Durable, Some(WarningLevel::Notice)),
        (Ack::Lane, Some(WarningLevel::Warning)),
        (Ack::Disk, None),
    ] {
        let (about, _) = found(ack, |status| {
            status.lanes[0].broker = Box::leak(Box::default());
        });
        let levels: Vec<_> = about.iter().map(|(level, _)| *level).collect();
        assert_eq!(levels, Vec::from_iter(level), "{ack:?}");
    }
}

#[test]
fn the_worst_comes_first_and_a_first_attempt_is_no_trouble() {
    let (about, _) = found(Ack::Durable, |status| {
        status.ledger.parked = 1;
        status.spool.refuses = true;
        status.balanced = false;
        status.lanes[0].state = "connecting";
    });
    let about: Vec<_> = about.iter().map(|(_, about)| &**about).collect();
    assert_eq!(about, ["ledger", "disk", "parked"]);
}

#[test]
fn a_disk_that_is_full_soon_is_a_warning() {
    for (full_in_s, expected) in [
        (None, ""),
        (Some(7_200.0), ""),
        (Some(1_500.0), "At this pace it is full in 25 min"),
        (Some(60.0), "At this pace it is full in 60 s"),
    ] {
        let (_, what) = found(Ack::Durable, |status| status.spool.full_in_s = full_in_s);
        assert_eq!(what, expected);
    }
}
