//! Warnings of an API that is slow, or a lane that is slower than the others.

use std::time::Duration;

use super::{ApiStatus, LaneStatus, Status, WarningList};
use crate::lane_id::LaneId;

/// A text says that a time is over one of these, so that it changes seldom.
const STEPS: [(Duration, &str); 7] = [
    (Duration::from_mins(1), "1 min"),
    (Duration::from_secs(30), "30 s"),
    (Duration::from_secs(10), "10 s"),
    (Duration::from_secs(5), "5 s"),
    (Duration::from_secs(2), "2 s"),
    (Duration::from_secs(1), "1 s"),
    (Duration::from_millis(250), "0.25 s"),
];
/// A POST that takes longer is slow.
const POST_MAX: Duration = Duration::from_secs(1);
/// Confirms that take longer are slow if those of another lane take this part of it, or less.
const CONFIRM_MAX: Duration = Duration::from_millis(250);
const QUICKER: u32 = 5;
/// Without another lane to compare it with.
const LONE_CONFIRM_MAX: Duration = Duration::from_secs(1);

/// Adds the warnings about slow APIs and lanes.
pub(super) fn add(list: &mut WarningList, status: &Status<'_>) {
    if status.apis.is_empty() {
        api(list, "api", &status.api);
    }
    for (name, named) in &status.apis {
        api(list, &format!("api {name}"), &named.api);
    }
    let up = status.lanes.iter().filter(|lane| lane.state == "up");
    let times: Vec<_> = up.map(|lane| (lane, confirm_time(lane, status))).collect();
    for (at, (lane, time)) in times.iter().enumerate() {
        let others = times.iter().enumerate().filter(|(other, _)| *other != at);
        let others = others.map(|(_, (_, time))| *time);
        let quickest = others.filter(|time| !time.is_zero()).min();
        let is_slow = match quickest {
            Some(quickest) => *time >= CONFIRM_MAX && *time >= quickest * QUICKER,
            None => *time >= LONE_CONFIRM_MAX,
        };
        if is_slow {
            let what = format!("Slow: half of its confirms take over {}", step(*time));
            let remedy = "Look at its broker and the way to it; pause the lane, or let the policy \
                          adaptive avoid it";
            list.warn(lane.lane.name(), what, remedy);
        }
    }
}

fn api(list: &mut WarningList, about: &str, api: &ApiStatus<'_>) {
    let time = seconds(api.post_ms.unwrap_or_default() / 1000.0);
    if api.state == "up" && time >= POST_MAX {
        let what = format!("Slow: a POST takes over {}, and records wait", step(time));
        let remedy = "Make the API quicker; the node finds by itself how many POSTs at a time help";
        list.warn(about, what, remedy);
    }
}

/// The time that the lane's own confirms take. That of the gRPC lane is the answer to the POST.
fn confirm_time(lane: &LaneStatus<'_>, status: &Status<'_>) -> Duration {
    let apis = status.apis.values().map(|named| &named.api);
    let posts = apis.chain([&status.api]).filter_map(|api| api.post_ms);
    let is_grpc = lane.lane == LaneId::Grpc;
    let post = posts.fold(0.0, f64::max) / 1000.0;
    let post = if is_grpc {
        seconds(post)
    } else {
        Duration::ZERO
    };
    // A POST of another time may have been as much longer.
    lane.recent_publish.saturating_sub(post * 2)
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn step(time: Duration) -> &'static str {
    let passed = STEPS.iter().find(|(step, _)| time >= *step);
    passed.map_or("0 s", |(_, text)| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_said_in_coarse_steps() {
        for (ms, text) in [
            (250, "0.25 s"),
            (999, "0.25 s"),
            (1000, "1 s"),
            (90_000, "1 min"),
        ] {
            assert_eq!(step(Duration::from_millis(ms)), text);
        }
    }
}
