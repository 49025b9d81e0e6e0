//! The axis of a chart: from 0 to a round number, with a few round numbers between.

/// An axis.
pub(super) struct Axis {
    pub end: f64,
    step: f64,
    decimals: usize,
}

impl Axis {
    /// The shortest one that has `highest` on it, with at most `parts` steps.
    pub fn new(highest: f64, parts: u32) -> Self {
        let highest = if highest > 0.0 { highest } else { 1.0 };
        let least = highest / f64::from(parts);
        let power = 10_f64.powf(least.log10().floor());
        // The last one is long enough, whatever is lost in the logarithm.
        let step = [1.0, 2.0, 5.0, 10.0, 20.0]
            .map(|step| step * power)
            .into_iter()
            .find(|step| *step >= least * 0.999_999)
            .unwrap_or(20.0 * power);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a number of digits"
        )]
        let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
        Self {
            end: (highest / step * 0.999_999).ceil() * step,
            step,
            decimals,
        }
    }

    /// The numbers on it, each as text.
    pub fn ticks(&self) -> impl Iterator<Item = (f64, String)> {
        let values = (0..).map(|number| f64::from(number) * self.step);
        values
            .take_while(|value| *value <= self.end * 1.000_001)
            .map(|value| (value, format!("{value:.*}", self.decimals)))
    }
}

#[cfg(test)]
mod tests {
    use super::Axis;

    #[test]
    fn the_numbers_of_an_axis_are_round_and_end_beyond_the_highest_value() {
        let labels = |highest, parts| {
            let axis = Axis::new(highest, parts);
            let labels: Vec<_> = axis.ticks().map(|(_, label)| label).collect();
            assert!(axis.end >= highest && labels.len() <= parts as usize + 1);
            labels.join(" ")
        };
        assert_eq!(labels(0.0, 4), "0.0 0.5 1.0");
        assert_eq!(labels(1.0, 4), "0.0 0.5 1.0");
        assert_eq!(labels(10.0, 4), "0 5 10");
        assert_eq!(labels(11_873.4, 4), "0 5000 10000 15000");
        assert_eq!(labels(3.7, 4), "0 1 2 3 4");
        assert_eq!(labels(61.0, 8), "0 10 20 30 40 50 60 70");
        assert_eq!(labels(0.31, 8), "0.00 0.05 0.10 0.15 0.20 0.25 0.30 0.35");
    }
}
