//! The records that nodes on one broker have taken of each other.

use prometheus_client::{metrics::gauge::ConstGauge, registry::Registry};

use super::{Samples, Scrape};
use crate::ledger::LaneLedger;

pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    for (name, help, samples) in [
        (
            "waypost_ledger_handed_over",
            "Records of this run that another node took from the broker",
            by_run(scrape, |lane| vec![(None, lane.counts.handed_over())]),
        ),
        (
            "waypost_ledger_taken_over",
            "Records of other runs, by run, that ended at this node",
            by_run(scrape, |lane| {
                let runs = lane.taken_over.by_run();
                runs.map(|(run, taken)| (Some(run.to_owned()), taken.records))
                    .collect()
            }),
        ),
        (
            "waypost_ledger_uncounted_max",
            "Records that may have been taken over and not counted as such, by run: a node was killed",
            by_run(scrape, |lane| {
                let runs = lane.taken_over.by_run();
                let runs = runs.filter(|(_, taken)| taken.uncounted_max > 0);
                runs.map(|(run, taken)| (Some(run.to_owned()), taken.uncounted_max))
                    .chain([(None, lane.readopted)])
                    .collect()
            }),
        ),
    ] {
        registry.register(name, help, samples);
    }
}

/// Counts of records by the run that accepted them; `None` is this run.
fn by_run(
    scrape: &Scrape<'_>,
    counts: impl Fn(&LaneLedger) -> Vec<(Option<String>, u64)>,
) -> Samples<ConstGauge<u64>> {
    let mut samples = Vec::new();
    for lane in &scrape.lanes {
        let counted = counts(&scrape.ledger.lane(lane.lane));
        for (run, records) in counted {
            let run = run.unwrap_or_else(|| scrape.ledger.run.to_string());
            let labels = vec![("path", lane.tag.to_owned()), ("run", run)];
            samples.push((labels, ConstGauge::new(records)));
        }
    }
    Samples(samples)
}
