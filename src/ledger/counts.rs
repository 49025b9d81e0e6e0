//! The counts of a lane, and of POSTs in flight.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The counts of one lane, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answered with a receipt.
    pub accepted: u64,
    /// Resent from the spool, where they were counted before.
    pub resent: u64,
    /// Found without a receipt of this run: of an earlier run, of another node, or never confirmed to its client.
    pub recovered: u64,
    /// The API's 2xx.
    pub delivered: u64,
    /// Became dead letters.
    pub dead: u64,
    /// Came out of a broker again after the API's 2xx, and was not POSTed again.
    pub redelivered: u64,
}

impl Counts {
    /// Safe and not yet delivered.
    pub const fn in_flight(&self) -> u64 {
        // A record may be delivered a moment before its confirm has come back.
        (self.accepted + self.resent + self.recovered).saturating_sub(self.delivered + self.dead)
    }
}

/// The number of POSTs in flight.
#[derive(Default)]
pub struct ApiGauge(AtomicU64);

/// One POST in flight.
pub struct Posting<'a>(&'a ApiGauge);

impl ApiGauge {
    /// A POST begins. It ends when the returned value is dropped.
    pub fn begin(&self) -> Posting<'_> {
        self.0.fetch_add(1, Relaxed);
        Posting(self)
    }

    pub fn in_flight(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Drop for Posting<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}
