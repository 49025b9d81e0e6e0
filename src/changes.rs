//! The last changes of the node, for `GET /api/events`. Each is added at the one place where it is
//! made. What changes with every record (counts, latencies, shares) is in the status instead.
//!
//! A change is rendered once, as a server-sent event, and all readers share its bytes.

use std::{collections::VecDeque, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Serialize, Serializer};
use tokio::{sync::watch, time::sleep};
use tracing_mutex::parkinglot::Mutex;

use crate::{clock::unix_us, lane_id::LaneId};

/// Changes that are kept for readers that come back.
pub const CHANGES_MAX: usize = 1024;

/// The most bytes of a reason. The status has all of it.
const REASON_MAX: usize = 512;

/// A change of the node.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Change<'c> {
    /// A lane's state, or whether it drains.
    Lane {
        lane: LaneId,
        state: &'static str,
        draining: bool,
        last_error: Option<ShortReason<'c>>,
        retry_in_s: Option<f64>,
    },
    /// The state of an actor that is no lane.
    Actor {
        actor: &'c str,
        state: &'static str,
        last_error: Option<ShortReason<'c>>,
    },
    Api {
        url: &'c str,
        state: &'static str,
        last_error: Option<ShortReason<'c>>,
        retry_in_s: Option<f64>,
    },
    /// The broker of a lane that is up refuses records, or takes them again.
    Refusal {
        lane: LaneId,
        refusing: Option<ShortReason<'c>>,
    },
    Ejection {
        lane: LaneId,
        reason: ShortReason<'c>,
        retry_in_s: f64,
    },
    Order {
        lanes: &'c [LaneId],
        action: &'static str,
        by: &'c str,
    },
    Weight {
        lane: LaneId,
        weight: u32,
        by: &'c str,
    },
    Reload {
        outcome: &'static str,
        by: &'c str,
    },
    /// The spool takes no records, or takes them again.
    Spool {
        refuses: bool,
    },
    /// The ledger does not balance at rest, or does again.
    Ledger {
        balanced: bool,
    },
    /// The node is stopping.
    Node {
        draining: bool,
    },
}

/// Why something has changed. A long one is cut.
#[derive(Clone, Copy, Debug)]
pub struct ShortReason<'r>(pub &'r str);

impl Serialize for ShortReason<'_> {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        let Self(text) = self;
        output.serialize_str(&text[..text.floor_char_boundary(REASON_MAX)])
    }
}

/// A change and its time.
#[derive(Serialize)]
struct Dated<'c> {
    at_ms: u64,
    #[serde(flatten)]
    change: Change<'c>,
}

/// The number of a change of one run of the node, as the `id` of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventId<'i> {
    pub run: &'i str,
    /// The changes up to this one.
    pub number: u64,
}

impl<'i> EventId<'i> {
    /// `None` for a text that is no id.
    pub fn parse(text: &'i str) -> Option<Self> {
        let (run, number) = text.rsplit_once('-')?;
        // `parse` would take a sign.
        let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
        let number = number.parse().ok().filter(|_| is_plain)?;
        (!run.is_empty()).then_some(Self { run, number })
    }
}

impl fmt::Display for EventId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.run, self.number)
    }
}

/// A server-sent event. `data` is one line.
pub fn event(name: &str, id: EventId<'_>, data: &str) -> Bytes {
    format!("event: {name}\nid: {id}\ndata: {data}\n\n").into()
}

/// The events behind a change.
#[derive(Debug, PartialEq, Eq)]
pub enum NextChange {
    None,
    /// The next change, as an event.
    Event(Bytes),
    /// So many changes are not kept any more.
    Missed(u64),
}

/// The last [`CHANGES_MAX`] changes. Clones share them.
#[derive(Clone, Default)]
pub struct ChangeLog(Arc<ChangeRing>);

#[derive(Default)]
struct ChangeRing {
    run: Arc<str>,
    events: Mutex<VecDeque<Bytes>>,
    /// Changes since the start. Changed while `events` is locked.
    last: watch::Sender<u64>,
}

impl ChangeLog {
    /// The changes of this run of the node.
    pub fn new(run: Arc<str>) -> Self {
        Self(Arc::new(ChangeRing {
            run,
            ..ChangeRing::default()
        }))
    }

    pub fn add(&self, change: Change<'_>) {
        let at_ms = unix_us() / 1000;
        // These types always serialise: their keys are text.
        let Ok(data) = serde_json::to_string(&Dated { at_ms, change }) else {
            return;
        };
        let mut events = self.0.events.lock();
        let number = self.last() + 1;
        if events.len() == CHANGES_MAX {
            events.pop_front();
        }
        events.push_back(event("change", self.id(number), &data));
        self.0.last.send_replace(number);
    }

    /// The number of the last change.
    pub fn last(&self) -> u64 {
        *self.0.last.borrow()
    }

    /// The number of the last change, as it changes.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.last.subscribe()
    }

    pub fn id(&self, number: u64) -> EventId<'_> {
        EventId {
            run: &self.0.run,
            number,
        }
    }

    /// The events behind the change `number`.
    pub fn after(&self, number: u64) -> NextChange {
        let events = self.0.events.lock();
        let last = self.last();
        let kept = events.len() as u64;
        let missed = (last - kept).saturating_sub(number);
        if missed > 0 {
            return NextChange::Missed(missed);
        }
        // From the end, since the first one that is kept has any number.
        let behind = usize::try_from(last.saturating_sub(number)).unwrap_or(usize::MAX);
        let at = events.len().checked_sub(behind);
        let next = at.and_then(|at| events.get(at));
        next.map_or(NextChange::None, |event| NextChange::Event(event.clone()))
    }
}

/// The least time between two changes of the spool: at its limit, it may refuse and take in turns.
const SPOOL_PACE: Duration = Duration::from_secs(1);

/// Adds to the log whether the spool takes records, until the spool has ended.
pub async fn log_spool(log: ChangeLog, mut refuses: watch::Receiver<bool>) {
    let mut logged = false;
    loop {
        let now = *refuses.borrow_and_update();
        if now != logged {
            logged = now;
            log.add(Change::Spool { refuses: now });
            sleep(SPOOL_PACE).await;
        }
        if refuses.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn data(log: &ChangeLog, after: u64) -> (String, Value) {
        let NextChange::Event(event) = log.after(after) else {
            panic!("{:?}", log.after(after));
        };
        let text = String::from_utf8(event.to_vec()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let [name, id, data, ""] = lines[..] else {
            panic!("{text:?}");
        };
        assert_eq!(name, "event: change");
        let data = data.strip_prefix("data: ").unwrap();
        let id = id.strip_prefix("id: ").unwrap();
        (id.into(), serde_json::from_str(data).unwrap())
    }

    #[test]
    fn changes_have_numbers_and_the_oldest_are_counted_as_missed() {
        let log = ChangeLog::new("a-run".into());
        assert_eq!((log.last(), log.after(0)), (0, NextChange::None));
        for weight in (1..).take(CHANGES_MAX) {
            let (lane, by) = (LaneId::Nats, "me");
            log.add(Change::Weight { lane, weight, by });
        }
        let (id, first) = data(&log, 0);
        assert_eq!((&*id, &first["weight"]), ("a-run-1", &json!(1)));
        log.add(Change::Spool { refuses: true });
        log.add(Change::Spool { refuses: false });
        assert_eq!(log.after(0), NextChange::Missed(2));
        assert_eq!(log.after(1), NextChange::Missed(1));
        let (id, third) = data(&log, 2);
        assert_eq!((&*id, &third["weight"]), ("a-run-3", &json!(3)));
        let last = CHANGES_MAX as u64 + 2;
        assert_eq!(data(&log, last - 1).0, format!("a-run-{last}"));
        assert_eq!(log.after(last), NextChange::None);
        assert_eq!(log.after(last + 1), NextChange::None, "none of this log");
    }

    #[test]
    fn a_change_is_one_line_of_bounded_size() {
        let log = ChangeLog::new("run".into());
        let reason = "\n€".repeat(1000);
        log.add(Change::Lane {
            lane: LaneId::Grpc,
            state: "backoff",
            draining: false,
            last_error: Some(ShortReason(&reason)),
            retry_in_s: Some(0.5),
        });
        let (_, mut change) = data(&log, 0);
        let told = change["last_error"].take();
        let told = told.as_str().unwrap();
        assert!(
            reason.starts_with(told) && told.len() > REASON_MAX - 4 && told.len() <= REASON_MAX
        );
        assert!(change["at_ms"].take().as_u64() > Some(1_700_000_000_000));
        let rest = json!({
            "at_ms": null, "what": "lane", "lane": "grpc", "state": "backoff", "draining": false,
            "last_error": null, "retry_in_s": 0.5
        });
        assert_eq!(change, rest);
    }

    #[tokio::test(start_paused = true)]
    async fn a_spool_at_its_limit_is_one_change_a_second() {
        let log = ChangeLog::default();
        let (refuses, watched) = watch::channel(false);
        let ended = tokio::spawn(log_spool(log.clone(), watched));
        sleep(SPOOL_PACE).await;
        assert_eq!(log.last(), 0, "nothing has changed");
        for number in 1..100 {
            refuses.send_replace(number % 2 == 1);
            sleep(SPOOL_PACE / 10).await;
        }
        assert!((5..=11).contains(&log.last()), "{}", log.last());
        sleep(2 * SPOOL_PACE).await;
        assert!(data(&log, log.last() - 1).1["refuses"].as_bool().unwrap());
        drop(refuses);
        ended.await.unwrap();
    }

    #[test]
    fn an_id_is_a_run_and_a_number() {
        let log = ChangeLog::new("0198-7a".into());
        let text = log.id(7).to_string();
        assert_eq!(EventId::parse(&text), Some(log.id(7)));
        for (text, number) in [
            ("a-0", 0),
            ("a-00", 0),
            ("a-18446744073709551615", u64::MAX),
        ] {
            let id = EventId { run: "a", number };
            assert_eq!(EventId::parse(text), Some(id), "{text}");
        }
        for wrong in [
            "",
            "-",
            "7",
            "-7",
            "a-",
            "a-+7",
            "a-7 ",
            "a-x",
            "a--",
            "a-18446744073709551616",
            "a-٣",
        ] {
            assert_eq!(EventId::parse(wrong), None, "{wrong}");
        }
    }
}
