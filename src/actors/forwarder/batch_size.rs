//! How many records the next batch has.

/// After this many times the usual gap without a split, the bad records are over: bad records at
/// random leave such a gap once in `e⁴ ≈ 55`, and then one batch is split for nothing.
const GAPS: usize = 4;

/// Follows how many records go well between two batches that must be split. A batch of `k` records
/// is `1 / k` POSTs for each of them. If a split comes once in `n` records, it costs each of them
/// about `k / n` POSTs more. The sum is least with `k = √n`, whether single records are bad or the
/// API takes no batch of that size.
#[derive(Debug)]
pub struct BatchSize {
    max: usize,
    /// Records that are usually delivered between two splits, and those since the last.
    gap: usize,
    since: usize,
}

impl BatchSize {
    /// No batch has more than `max` records.
    pub const fn new(max: usize) -> Self {
        Self {
            max,
            gap: usize::MAX,
            since: 0,
        }
    }

    pub fn get(&self) -> usize {
        // One more: the gap of bad records in a row is none, and four times that as well.
        if self.since > self.gap.saturating_add(1).saturating_mul(GAPS) {
            return self.max;
        }
        self.gap.max(self.since).isqrt().clamp(1, self.max)
    }

    pub const fn delivered(&mut self, records: usize) {
        self.since = self.since.saturating_add(records);
    }

    /// A batch must be split. Its parts do not count.
    pub fn split(&mut self) {
        // A short gap counts at once, longer ones only bit by bit.
        self.gap = self.since.min(self.gap.midpoint(self.since));
        self.since = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// POSTs of `records` until each is taken or is alone, if the API refuses a batch that `fails`.
    fn posts(records: &[bool], fails: &impl Fn(&[bool]) -> bool, delivered: &mut usize) -> usize {
        if !fails(records) {
            *delivered += records.len();
            return 1;
        }
        let parts = records.chunks(records.len().isqrt());
        let of_part = |part| posts(part, fails, delivered);
        1 + if records.len() == 1 {
            0
        } else {
            parts.map(of_part).sum()
        }
    }

    /// POSTs for each record of a stream.
    fn posts_per_record(records: &[bool], fails: impl Fn(&[bool]) -> bool) -> f64 {
        let mut size = BatchSize::new(50);
        let mut rest = records;
        let mut all = 0;
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(size.get().min(rest.len()));
            rest = others;
            if batch.len() > 1 && fails(batch) {
                size.split();
            }
            let mut delivered = 0;
            all += posts(batch, &fails, &mut delivered);
            size.delivered(delivered);
        }
        f64::from(u32::try_from(all).unwrap()) / f64::from(u32::try_from(records.len()).unwrap())
    }

    #[test]
    fn batches_are_as_large_as_is_cheapest_beside_bad_records() {
        fastrand::seed(1);
        let is_bad = |records: &[bool]| records.contains(&true);
        // One in so many is bad, and the most POSTs per record.
        for (one_in, most) in [
            (2, 1.3),
            (11, 0.7),
            (100, 0.2),
            (1000, 0.05),
            (100_000, 0.022),
        ] {
            let at_random: Vec<_> = (0..100_000)
                .map(|_| fastrand::usize(0..one_in) == 0)
                .collect();
            let spread: Vec<_> = (0..100_000).map(|at| at % one_in == one_in / 2).collect();
            for records in [at_random, spread] {
                let all = posts_per_record(&records, is_bad);
                assert!(all <= most, "one in {one_in}: {all}");
            }
        }
        // Bad records at the start cost those behind them a few POSTs.
        let first: Vec<_> = (0..11_000).map(|at| at < 1000).collect();
        let all = posts_per_record(&first, is_bad) * 11_000.0;
        assert!(all <= 1000.0 + 200.0 + 50.0, "{all}");
    }

    #[test]
    fn batches_grow_to_what_the_api_takes() {
        for (limit, most) in [(1, 1.3), (3, 0.5), (10, 0.15), (40, 0.04), (50, 0.02)] {
            let all = posts_per_record(&vec![false; 100_000], |records| records.len() > limit);
            assert!(all <= most, "up to {limit}: {all}");
        }
    }
}
