//! All spools of a node.

use std::sync::Arc;

use tokio::sync::watch;

use super::{BusySince, Spool, SpoolStats};

/// The spool of a node, and those of its APIs. Clones share them.
#[derive(Clone)]
pub struct Spools(Arc<[Spool]>);

impl Spools {
    pub fn new(own: Spool, of_apis: impl IntoIterator<Item = Spool>) -> Self {
        Self([own].into_iter().chain(of_apis).collect())
    }

    /// The node's own comes first.
    pub fn iter(&self) -> impl Iterator<Item = &Spool> {
        self.0.iter()
    }

    /// The counts of all of them together. It refuses if the node's own does: that of an API costs
    /// only that one.
    pub fn stats(&self) -> SpoolStats {
        let stats = self
            .0
            .iter()
            .map(Spool::stats)
            .reduce(|sum, of| SpoolStats {
                refuses: sum.refuses,
                ..sum + of
            });
        stats.unwrap_or_default()
    }

    /// The contents of each, as they change.
    pub fn watch_stats(&self) -> Vec<watch::Receiver<SpoolStats>> {
        self.0.iter().map(Spool::watch_stats).collect()
    }

    /// How long the thread of each has been at what it does.
    pub fn busy_since(&self) -> Vec<BusySince> {
        self.0.iter().map(Spool::busy_since).collect()
    }

    /// Closes all: see [`Spool::close`].
    pub async fn close(&self) {
        for spool in self.iter() {
            spool.close().await;
        }
    }
}
