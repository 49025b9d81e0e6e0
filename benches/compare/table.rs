//! What a run prints: medians, and the medians of the ratios within each round.

use super::{Measured, Round};

/// The value that so large a part of `sorted` does not exceed.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "an index")]
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or_default()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5)
}

type Figure = (&'static str, fn(&Measured) -> f64);

const FIGURES: [Figure; 11] = [
    ("ingest records/s", |measured| measured.ingest_per_s),
    ("end to end records/s", |measured| measured.end_to_end_per_s),
    ("CPU µs/record", |measured| measured.cpu_us_per_record),
    ("ingest p50 ms", |measured| measured.ingest_ms[0]),
    ("ingest p99 ms", |measured| measured.ingest_ms[1]),
    ("ingest p99.9 ms", |measured| measured.ingest_ms[2]),
    ("delivery p50 ms", |measured| measured.delivery_ms[0]),
    ("delivery p99 ms", |measured| measured.delivery_ms[1]),
    ("delivery p99.9 ms", |measured| measured.delivery_ms[2]),
    ("CPU µs/record at the rate", |measured| measured.rate_cpu_us_per_record),
    ("peak memory MiB", |measured| measured.memory_mib),
];

pub fn print(lane: &str, note: &str, rounds: &[Round]) {
    let rate = rounds.first().map_or(0.0, |round| round.rate);
    println!("\n{lane} {note}\n{:<26} {:>12} {:>12} {:>8}", "", "floor", "waypost", "ratio");
    for (at, (name, figure)) in FIGURES.into_iter().enumerate() {
        if at == 3 {
            println!("at {rate:.0} records/s:");
        }
        let floor = median(rounds.iter().map(|round| figure(&round.floor)).collect());
        let waypost = median(rounds.iter().map(|round| figure(&round.waypost)).collect());
        let ratio = median(rounds.iter().map(|round| figure(&round.waypost) / figure(&round.floor)).collect());
        println!("{name:<26} {floor:>12.2} {waypost:>12.2} {ratio:>8.2}");
    }
    let sum = |count: fn(&Measured) -> u64, of: fn(&Round) -> &Measured| -> u64 {
        rounds.iter().map(|round| count(of(round))).sum()
    };
    for (name, count) in [("lost", (|m| m.lost) as fn(&Measured) -> u64), ("duplicated", |m| m.duplicated)] {
        println!("{name:<26} {:>12} {:>12}", sum(count, |round| &round.floor), sum(count, |round| &round.waypost));
    }
}
