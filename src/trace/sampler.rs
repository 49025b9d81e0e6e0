//! The traces that are recorded, by `OTEL_TRACES_SAMPLER`. The choice by ratio is by the trace id, so
//! that all programs with one ratio choose the same traces.

use super::context::SpanContext;

/// One more than the largest number that a choice by ratio looks at.
const RANGE: f64 = 9_223_372_036_854_775_808.0;

#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// The name in `OTEL_TRACES_SAMPLER`.
    pub name: &'static str,
    /// A trace that comes from elsewhere is recorded if it is recorded there.
    follows_parent: bool,
    /// The part of the other traces.
    pub ratio: f64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            name: "parentbased_always_on",
            follows_parent: true,
            ratio: 1.0,
        }
    }
}

impl Sampler {
    /// The sampler of that name, if there is one. `ratio` is for those by ratio.
    pub fn named(name: &str, ratio: f64) -> Option<Self> {
        let (name, follows_parent, ratio) = match name {
            "always_on" => ("always_on", false, 1.0),
            "always_off" => ("always_off", false, 0.0),
            "traceidratio" => ("traceidratio", false, ratio),
            "parentbased_always_on" => ("parentbased_always_on", true, 1.0),
            "parentbased_always_off" => ("parentbased_always_off", true, 0.0),
            "parentbased_traceidratio" => ("parentbased_traceidratio", true, ratio),
            _ => return None,
        };
        Some(Self {
            name,
            follows_parent,
            ratio,
        })
    }

    /// The context of a span in the trace of `parent`, or in a new one, and whether it is recorded.
    pub fn next(&self, parent: Option<SpanContext>) -> SpanContext {
        match parent {
            Some(parent) if self.follows_parent => parent.child(parent.is_sampled()),
            Some(parent) => parent.child(self.chooses(parent.trace)),
            None => {
                let root = SpanContext::root(false);
                root.child(self.chooses(root.trace))
            }
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the last 63 bits; the ratio is between 0 and 1"
    )]
    fn chooses(&self, trace: u128) -> bool {
        (trace as u64 >> 1) < (self.ratio * RANGE) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sampler_follows_the_parent_or_the_ratio() {
        let context = |flags| {
            Some(SpanContext {
                trace: 1 << 127 | 1 << 63,
                span: 7,
                flags,
            })
        };
        // The last 63 bits of the trace id are half of their range.
        for (name, ratio, none, unsampled, sampled) in [
            ("always_on", 0.1, true, true, true),
            ("always_off", 0.9, false, false, false),
            ("traceidratio", 0.6, true, true, true),
            ("traceidratio", 0.5, true, false, false),
            ("parentbased_always_on", 0.1, true, false, true),
            ("parentbased_always_off", 0.9, false, false, true),
            ("parentbased_traceidratio", 0.1, true, false, true),
        ] {
            let sampler = Sampler::named(name, ratio).unwrap();
            let is_sampled = |parent| sampler.next(parent).is_sampled();
            assert_eq!(is_sampled(context(0)), unsampled, "{name} {ratio}");
            assert_eq!(is_sampled(context(1)), sampled, "{name} {ratio}");
            let roots = (0..2000).map(|_| f64::from(u8::from(is_sampled(None))));
            let part = roots.sum::<f64>() / 2000.0;
            let expected = if none { sampler.ratio } else { 0.0 };
            let slack = if expected.fract() > 0.0 { 0.1 } else { 0.0 };
            assert!((part - expected).abs() <= slack, "{name} {ratio}: {part}");
        }
        assert_eq!(Sampler::named("jaeger_remote", 1.0), None);
    }
}
