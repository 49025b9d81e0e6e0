//! The work of the disk, and how soon it is full.

use prometheus_client::{
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{Samples, Scrape};

pub(super) fn register(scrape: &Scrape<'_>, registry: &mut Registry) {
    registry.register(
        "waypost_spool_commits",
        "Syncs of the disk that made records safe",
        ConstCounter::new(scrape.stats.commits),
    );
    registry.register(
        "waypost_spool_committed_records",
        "Records that these syncs made safe",
        ConstCounter::new(scrape.stats.committed),
    );
    registry.register(
        "waypost_spool_commit_seconds",
        "Time that these syncs took",
        ConstCounter::new(scrape.stats.commit_time.as_secs_f64()),
    );
    let full_in_s = scrape.full_in_s.into_iter();
    registry.register(
        "waypost_spool_full_in_seconds",
        "Time until the node's own spool is full, in coarse steps, if it goes on filling; without a \
         sample if it does not fill",
        Samples(full_in_s.map(|seconds| (Vec::new(), ConstGauge::new(seconds))).collect()),
    );
}
