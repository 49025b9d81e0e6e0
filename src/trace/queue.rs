//! The spans that wait for the exporter. There is a bound: a span that finds no room is counted, and
//! gone.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use tokio::sync::Notify;
use tracing_mutex::parkinglot::Mutex;

use super::span::Span;

/// Why spans did not reach the collector, as the metrics count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossReason {
    /// The collector is slower than the spans come.
    QueueFull,
    /// The collector cannot be reached, or does not answer with a 2xx.
    NotExported,
    /// The collector has taken others of the same POST.
    Rejected,
}

impl LossReason {
    pub const ALL: [Self; 3] = [Self::QueueFull, Self::NotExported, Self::Rejected];

    /// The label in the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::NotExported => "not_exported",
            Self::Rejected => "rejected",
        }
    }
}

/// The spans, and what became of those before.
pub struct SpanQueue {
    spans: Mutex<VecDeque<Span>>,
    max: usize,
    batch: usize,
    /// A POST's worth of spans is there.
    pub is_due: Notify,
    pub exported: AtomicU64,
    lost: [AtomicU64; LossReason::ALL.len()],
}

impl SpanQueue {
    pub fn new(max: usize, batch: usize) -> Self {
        Self {
            spans: Mutex::default(),
            max,
            batch,
            is_due: Notify::new(),
            exported: AtomicU64::new(0),
            lost: Default::default(),
        }
    }

    /// Adds a span, if there is room. The exporter is woken for a whole batch only.
    pub fn add(&self, span: Span) {
        let mut spans = self.spans.lock();
        let length = spans.len();
        if length < self.max {
            spans.push_back(span);
        }
        drop(spans);
        if length >= self.max {
            self.lose(LossReason::QueueFull, 1);
        } else if length + 1 == self.batch {
            self.is_due.notify_one();
        }
    }

    /// The spans of the next POST, which has fewer than a batch only if `takes_all`.
    pub fn take(&self, takes_all: bool) -> Vec<Span> {
        let mut spans = self.spans.lock();
        let count = spans.len().min(self.batch);
        if count < self.batch && !takes_all {
            return Vec::new();
        }
        spans.drain(..count).collect()
    }

    pub fn lose(&self, why: LossReason, count: u64) {
        self.lost[why as usize].fetch_add(count, Relaxed);
    }

    /// The spans that were lost for this reason.
    pub fn lost(&self, why: LossReason) -> u64 {
        self.lost[why as usize].load(Relaxed)
    }
}
