//! How soon the disk is full, by the pace at which it fills.
//!
//! A disk that works and does not fill goes up and down all the same: files go as a whole, once all
//! that they had is gone, and a lane's copies go together once their confirms are durable. So there are
//! two looks, and the faster pace counts. The quick one follows the entries that are there, whatever
//! files have them. The slow one follows the files, which a few entries can hold, and sees a disk that
//! fills in bursts; it counts no more than comes and goes with a file. Both go by the least amounts of
//! their parts. Copies level off once as many go as come: they count only if the disk is full before
//! that.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::{
    lane_id::PerLane,
    spool::{SpoolStats, segment_max},
};

/// The least amount of each of these times counts, so that there is no pace before the last of them
/// has nearly ended.
const QUICK_PART: Duration = Duration::from_secs(10);
const SLOW_PART: Duration = Duration::from_mins(2);
const PARTS: u32 = 3;
/// The disk is looked at once a second.
const LOOK: Duration = Duration::from_secs(1);
/// Nobody needs to know of a later time.
const FORESEEN_MAX: f64 = 86_400.0;

/// Bytes on the disk at a time.
#[derive(Clone, Copy, Default)]
pub struct DiskUse {
    /// All files together.
    pub files: u64,
    /// Entries that stay until they are delivered, or somebody removes them.
    pub staying: u64,
    /// The copies of each lane.
    pub kept: PerLane<u64>,
}

impl From<SpoolStats> for DiskUse {
    fn from(stats: SpoolStats) -> Self {
        Self {
            files: stats.bytes,
            staying: stats.live_bytes,
            kept: stats.kept_bytes,
        }
    }
}

/// The use of the disk in the last minutes.
#[derive(Default)]
pub struct DiskPace(VecDeque<(Instant, DiskUse)>);

impl DiskPace {
    /// Notes what there is now.
    pub fn look(&mut self, now: Instant, disk: DiskUse) {
        self.0.push_back((now, disk));
        let over = SLOW_PART * PARTS;
        // The first one is as old as the pace needs.
        while self.0.get(1).is_some_and(|(at, _)| now - *at >= over) {
            self.0.pop_front();
        }
    }

    /// The seconds until the files have `max` bytes, in coarse steps, if each lane's copies stay for
    /// at most `copies_stay`; `None` if the disk does not fill, its pace is not known yet, or there is
    /// more than a day.
    #[expect(clippy::cast_precision_loss, reason = "no disk has 2^52 bytes")]
    pub fn full_in_s(&self, max: u64, copies_stay: &PerLane<Duration>) -> Option<f64> {
        let (_, now) = self.0.back()?;
        let left = max.saturating_sub(now.files) as f64;
        let quick = self.pace(QUICK_PART, |disk| disk.staying);
        let mut pace = quick.max(self.slow_pace(max));
        for (lane, stay) in copies_stay.iter().enumerate() {
            let own = self.pace(QUICK_PART, |disk| disk.kept[lane]);
            let most = own * stay.as_secs_f64();
            if most > now.kept[lane] as f64 + left {
                pace += own;
            }
        }
        let seconds = left / pace;
        (pace > 0.0 && seconds <= FORESEEN_MAX).then(|| coarse(seconds))
    }

    /// The pace of the files, without that of the copies, if it is more than comes and goes with a file.
    #[expect(clippy::cast_precision_loss, reason = "no disk has 2^52 bytes")]
    fn slow_pace(&self, max: u64) -> f64 {
        let copies = |disk: &DiskUse| disk.kept.iter().sum::<u64>();
        let pace = self.pace(SLOW_PART, |disk| disk.files.saturating_sub(copies(disk)));
        if pace * SLOW_PART.as_secs_f64() > segment_max(max) as f64 {
            pace
        } else {
            0.0
        }
    }

    /// The bytes a second by which the least amount has grown from each part to the next.
    #[expect(clippy::cast_precision_loss, reason = "no disk has 2^52 bytes")]
    fn pace(&self, part: Duration, of: impl Fn(&DiskUse) -> u64) -> f64 {
        let ends = self.0.front().zip(self.0.back());
        let known = ends.filter(|((began, _), (now, _))| *now - *began + LOOK >= part * PARTS);
        let Some((_, (now, _))) = known else {
            return 0.0;
        };
        // The latest part first.
        let mut least = [u64::MAX; PARTS as usize];
        for (at, disk) in self.0.iter().rev() {
            let before = (*now - *at).as_secs() / part.as_secs();
            let before = usize::try_from(before).unwrap_or(usize::MAX);
            let Some(least) = least.get_mut(before) else {
                break;
            };
            *least = of(disk).min(*least);
        }
        let growth = least.windows(2).map(|pair| pair[0].saturating_sub(pair[1]));
        growth.min().unwrap_or_default() as f64 / part.as_secs_f64()
    }
}

/// The time by steps, so that it changes seldom, rounded down but for the last minute.
fn coarse(seconds: f64) -> f64 {
    let step = match seconds {
        s if s < 600.0 => 60.0,
        s if s < 3_600.0 => 300.0,
        _ => 3_600.0,
    };
    ((seconds / step).floor() * step).max(60.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane_id::LaneId;

    const MIB: u64 = 1 << 20;
    const LANE: usize = LaneId::Nats as usize;
    const SYNC: Duration = Duration::from_mins(2);

    /// The longest stay of copies whose confirms are durable after [`SYNC`].
    fn stay() -> PerLane<Duration> {
        let mut stay = PerLane::default();
        stay[LANE] = SYNC + SYNC / 4;
        stay
    }

    fn staying(bytes: u64) -> DiskUse {
        DiskUse {
            files: bytes,
            staying: bytes,
            kept: PerLane::default(),
        }
    }

    /// The forecast in each second for a disk of `max` bytes with this use.
    fn told(max: u64, uses: impl IntoIterator<Item = DiskUse>) -> Vec<Option<f64>> {
        let (began, mut pace) = (Instant::now(), DiskPace::default());
        let uses = (0..).zip(uses);
        let told = uses.map(|(second, disk)| {
            pace.look(began + Duration::from_secs(second), disk);
            pace.full_in_s(max, &stay())
        });
        told.collect()
    }

    fn last(max: u64, bytes: impl IntoIterator<Item = u64>) -> Option<f64> {
        told(max, bytes.into_iter().map(staying)).pop().flatten()
    }

    #[test]
    fn a_disk_that_fills_is_foreseen() {
        let filling = || (0..=30).map(|at| at * 500);
        assert_eq!(last(100_000, filling()), Some(120.0));
        assert_eq!(last(15_500, filling()), Some(60.0), "a second");
        assert_eq!(last(1_000_000_000_000, filling()), None, "in years");
        assert_eq!(last(100_000, filling().take(29)), None, "not yet");
        assert_eq!(last(100_000, [50_000; 31]), None);
        assert_eq!(last(100_000, filling().rev()), None);
    }

    #[test]
    fn the_pace_is_that_of_the_last_seconds() {
        let bytes = (0..100).map(|at| at * 7_000);
        let slower = (1..=40).map(|at| 99 * 7_000 + at * 10);
        let left = last(99 * 7_000 + 400 + 1_234, bytes.chain(slower));
        assert_eq!(left, Some(120.0));
        // Bytes that come at once, and no more, are no pace.
        let step = |at: u64| if at < 50 { 0 } else { 90_000 };
        let told = told(100_000, (0..100).map(|at| staying(step(at))));
        assert!(told.iter().all(Option::is_none), "{told:?}");
    }

    #[test]
    fn a_time_is_told_in_coarse_steps() {
        for (seconds, told) in [
            (1.0, 60.0),
            (179.0, 120.0),
            (599.0, 540.0),
            (1_380.0, 1_200.0),
            (3_601.0, 3_600.0),
            (86_400.0, 86_400.0),
        ] {
            assert!((coarse(seconds) - told).abs() < 0.1, "{seconds}");
        }
    }

    /// The use of a disk with files of 4 MiB that takes `rate` bytes a second. They go after `seconds`,
    /// and in steps of `step` seconds; a file goes once all of it is gone.
    fn coming_and_going(
        rate: u64,
        (seconds, step): (u64, u64),
        pick: fn(u64, u64) -> DiskUse,
    ) -> impl Iterator<Item = DiskUse> {
        (0..3_600_u64).map(move |at| {
            let gone = at.saturating_sub(seconds) / step * step * rate;
            let came = at * rate;
            let files = came - gone / (4 * MIB) * 4 * MIB;
            pick(files, came - gone)
        })
    }

    fn copies(files: u64, kept: u64) -> DiskUse {
        let mut disk = DiskUse {
            files,
            ..DiskUse::default()
        };
        disk.kept[LANE] = kept;
        disk
    }

    #[test]
    fn a_disk_that_only_comes_and_goes_is_never_foreseen_to_be_full() {
        let other = |files, live| DiskUse {
            files,
            ..staying(live)
        };
        // Files of records that go at once, in a second, or together every some seconds.
        for rate in [1 << 10, 20 << 10, 100 << 10, 300 << 10, 2 * MIB] {
            for goes in [(0, 1), (1, 1), (1, 5), (3, 7)] {
                for pick in [other, copies] {
                    let told = told(64 * MIB, coming_and_going(rate, goes, pick));
                    assert!(
                        told.iter().all(Option::is_none),
                        "{rate} {goes:?}: {told:?}"
                    );
                }
            }
        }
        // Copies that stay until their broker has synced, as far as they have room.
        for rate in [1 << 10, 20 << 10, 100 << 10, 300 << 10] {
            let kept = coming_and_going(rate, (SYNC.as_secs(), 15), copies);
            let told = told(64 * MIB, kept);
            assert!(told.iter().all(Option::is_none), "{rate}: {told:?}");
        }
    }

    #[test]
    fn a_disk_that_fills_is_foreseen_in_time_whatever_comes_and_goes_there() {
        const MAX: u64 = 64 * MIB;
        let full_at = |uses: &[DiskUse]| uses.iter().position(|disk| disk.files >= MAX);
        for (name, uses) in [
            // Beside files that come and go.
            (
                "filling",
                coming_and_going(100 << 10, (1, 1), |files, live| DiskUse {
                    files,
                    ..staying(live)
                })
                .zip(0..)
                .map(|(disk, at)| DiskUse {
                    files: disk.files + at * (100 << 10),
                    staying: disk.staying + at * (100 << 10),
                    ..disk
                })
                .collect::<Vec<_>>(),
            ),
            // More copies than have room until they may go.
            (
                "copies",
                coming_and_going(MIB, (SYNC.as_secs(), 15), copies).collect(),
            ),
        ] {
            let full_at = full_at(&uses).expect("it fills");
            let told = told(MAX, uses);
            let first = told.iter().position(Option::is_some).expect(name);
            assert!(first <= 40, "{name}: full at {full_at}, told at {first}");
            let said = &told[first..full_at];
            assert!(said.iter().all(Option::is_some), "{name}: {said:?}");
            // Never by half too late or too early, but for the last minutes.
            for (at, full_in) in (first..).zip(said) {
                let left = f64::from(u32::try_from(full_at - at).expect("an hour"));
                let full_in = full_in.expect("it is told");
                let is_near = full_in <= left * 1.5 + 60.0 && full_in >= left / 2.0 - 60.0;
                assert!(is_near, "{name}: {full_in} at {at} of {full_at}");
            }
        }
        // A burst of a minute's records each minute, and files that a hundredth of their entries hold.
        let bursts = |at: u64| staying(at / 60 * 60 * MIB);
        let held = |at: u64| DiskUse {
            files: at * MIB,
            ..staying(at * MIB / 100)
        };
        for use_at in [&bursts as &dyn Fn(u64) -> DiskUse, &held] {
            let told = told(4096 * MIB, (0..2048).map(use_at));
            let is_near = |full_in: &Option<f64>| {
                full_in.is_some_and(|seconds| (1024.0..=4096.0).contains(&seconds))
            };
            assert!(told[420..].iter().all(is_near), "{told:?}");
        }
        // Copies that never go, as those of a broker that syncs never.
        let (began, mut pace) = (Instant::now(), DiskPace::default());
        for (second, disk) in (0..).zip(coming_and_going(1 << 10, (9_999, 1), copies).take(60)) {
            pace.look(began + Duration::from_secs(second), disk);
        }
        let mut never = PerLane::default();
        never[LANE] = Duration::MAX;
        assert_eq!(pace.full_in_s(MIB, &never), Some(900.0));
        assert_eq!(pace.full_in_s(MIB, &stay()), None);
    }
}
