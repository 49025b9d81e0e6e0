//! The output of a run: medians, and the medians of the ratios within each round.

use super::{Contest, Measured, Round};

/// The value that so large a part of `sorted` does not exceed.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "an index"
)]
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).copied().unwrap_or_default()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    quantile(&values, 0.5)
}

/// A figure's name, whether less of it is better, and its value.
pub type Figure = (&'static str, bool, fn(&Measured) -> f64);

pub const FIGURES: [Figure; 11] = [
    ("ingest records/s", false, |measured| measured.ingest_per_s),
    ("end to end records/s", false, |measured| {
        measured.end_to_end_per_s
    }),
    ("CPU µs/record", true, |measured| {
        measured.cpu_us_per_record
    }),
    ("ingest p50 ms", true, |measured| measured.ingest_ms[0]),
    ("ingest p99 ms", true, |measured| measured.ingest_ms[1]),
    ("ingest p99.9 ms", true, |measured| measured.ingest_ms[2]),
    ("delivery p50 ms", true, |measured| measured.delivery_ms[0]),
    ("delivery p99 ms", true, |measured| measured.delivery_ms[1]),
    ("delivery p99.9 ms", true, |measured| {
        measured.delivery_ms[2]
    }),
    ("CPU µs/record at the rate", true, |measured| {
        measured.rate_cpu_us_per_record
    }),
    ("peak memory MiB", true, |measured| measured.memory_mib),
];
/// From here on the figures are of the fixed rate.
pub const AT_RATE: usize = 3;

/// Medians of both sides, and of the ratio.
pub fn medians(rounds: &[Round], figure: fn(&Measured) -> f64) -> [f64; 3] {
    let of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    [
        of(&|round| figure(&round.base)),
        of(&|round| figure(&round.other)),
        of(&|round| figure(&round.other) / figure(&round.base)),
    ]
}

/// Sums over the rounds of what must not happen.
pub fn faults(rounds: &[Round]) -> [(&'static str, [u64; 2]); 2] {
    let sums = |count: fn(&Measured) -> u64| {
        [
            rounds.iter().map(|round| count(&round.base)).sum(),
            rounds.iter().map(|round| count(&round.other)).sum(),
        ]
    };
    [
        ("lost", sums(|measured| measured.lost)),
        ("duplicated", sums(|measured| measured.duplicated)),
    ]
}

/// Medians of the records that share a sync of the disk, and of its duration, on the other side.
pub fn syncs(rounds: &[Round]) -> impl Iterator<Item = (&'static str, f64)> {
    let of = |figure: fn(&Measured) -> Option<f64>| {
        let values: Vec<_> = rounds
            .iter()
            .filter_map(|round| figure(&round.other))
            .collect();
        (!values.is_empty()).then(|| median(values))
    };
    let figures = [
        ("records/sync", of(|measured| measured.records_per_sync)),
        ("sync ms at the rate", of(|measured| measured.sync_ms)),
    ];
    figures
        .into_iter()
        .filter_map(|(name, figure)| Some((name, figure?)))
}

pub fn print(contest: &Contest) {
    let Contest {
        lane,
        base,
        other,
        rounds,
    } = contest;
    println!("\n{lane:<26} {base:>12} {other:>12} {:>8}", "ratio");
    for (at, (name, _, figure)) in FIGURES.into_iter().enumerate() {
        if at == AT_RATE {
            println!(
                "at {:.0} records/s:",
                rounds.first().map_or(0.0, |round| round.rate)
            );
        }
        let [base, other, ratio] = medians(rounds, figure);
        println!("{name:<26} {base:>12.2} {other:>12.2} {ratio:>8.2}");
    }
    for (name, [base, other]) in faults(rounds) {
        println!("{name:<26} {base:>12} {other:>12}");
    }
    for (name, figure) in syncs(rounds) {
        println!("{name:<26} {:>12} {figure:>12.2}", "");
    }
}
