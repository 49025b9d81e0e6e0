//! Connections that the server has ended because their clients held them without a request, and the
//! streams that it has refused.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::sleep;
use tracing::warn;

/// At most one line of the log in this time.
const TOLD_EACH: Duration = Duration::from_mins(1);
/// So many late clients in that time are worth a line. Browsers open connections that they may never
/// use, and scanners come by.
const LATE_TOLD: u64 = 100;

/// Why a connection was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EarlyEnd {
    /// There were too many TLS handshakes at a time, and this was the oldest.
    HandshakeEvicted,
    /// The TLS handshake was not over in time.
    HandshakeLate,
    /// The head of a request was not complete in time.
    HeadLate,
    /// The client broke off too many streams of HTTP/2.
    StreamsBroken,
    /// The client went on opening streams of HTTP/2 that were refused.
    StreamsRefused,
}

impl EarlyEnd {
    pub const ALL: [Self; 5] = [
        Self::HandshakeEvicted,
        Self::HandshakeLate,
        Self::HeadLate,
        Self::StreamsBroken,
        Self::StreamsRefused,
    ];

    /// The label of the metric.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HandshakeEvicted => "handshake_evicted",
            Self::HandshakeLate => "handshake_late",
            Self::HeadLate => "head_late",
            Self::StreamsBroken => "streams_broken",
            Self::StreamsRefused => "streams_refused",
        }
    }
}

/// Why a stream of HTTP/2 was refused. Its client may send the request again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedStream {
    /// The connection was to take no other.
    Ending,
    /// The heads of the connection's requests took too much memory.
    LargeHeads,
    /// The thread had too many streams for another one of this connection.
    NoPlace,
}

impl RefusedStream {
    pub const ALL: [Self; 3] = [Self::Ending, Self::LargeHeads, Self::NoPlace];

    /// The label of the metric.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ending => "connection_ends",
            Self::LargeHeads => "large_heads",
            Self::NoPlace => "no_place",
        }
    }
}

/// The ends of one server's connections, and the streams that it has refused. Clones share them.
#[derive(Clone, Default)]
pub struct EarlyEnds(Arc<EarlyCounts>);

#[derive(Default)]
struct EarlyCounts {
    ends: [AtomicU64; EarlyEnd::ALL.len()],
    refused: [AtomicU64; RefusedStream::ALL.len()],
}

impl EarlyEnds {
    pub fn count(&self, end: EarlyEnd) {
        self.0.ends[end as usize].fetch_add(1, Relaxed);
    }

    pub fn counted(&self, end: EarlyEnd) -> u64 {
        self.0.ends[end as usize].load(Relaxed)
    }

    pub fn count_refused(&self, why: RefusedStream) {
        self.0.refused[why as usize].fetch_add(1, Relaxed);
    }

    pub fn refused(&self, why: RefusedStream) -> u64 {
        self.0.refused[why as usize].load(Relaxed)
    }

    fn all(&self) -> [u64; EarlyEnd::ALL.len()] {
        EarlyEnd::ALL.map(|end| self.counted(end))
    }

    /// Tells the operator, for ever: `section` of the configuration has the limits of the server.
    pub async fn keep_telling(self, section: &'static str) {
        let told = [RefusedStream::NoPlace, RefusedStream::LargeHeads];
        let mut before = self.all();
        let mut refused_before = told.map(|why| self.refused(why));
        loop {
            sleep(TOLD_EACH).await;
            let now = self.all();
            let new = [0, 1, 2, 3, 4].map(|at| now[at] - before[at]);
            before = now;
            if is_worth_a_line(new) {
                let [
                    handshakes_evicted,
                    handshakes_late,
                    heads_late,
                    streams_broken,
                    streams_refused,
                ] = new;
                warn!(
                    section,
                    handshakes_evicted,
                    handshakes_late,
                    heads_late,
                    streams_broken,
                    streams_refused,
                    "clients hold connections without requests, and were disconnected; see \
                     waypost_connections_ended_total"
                );
            }
            // Nobody is at fault where a connection ends.
            let refused = told.map(|why| self.refused(why));
            let [without_place, with_large_heads] =
                [0, 1].map(|at| refused[at] - refused_before[at]);
            refused_before = refused;
            if without_place + with_large_heads > 0 {
                warn!(
                    section,
                    without_place,
                    with_large_heads,
                    "HTTP/2 streams were refused; see waypost_streams_refused_total"
                );
            }
        }
    }
}

/// Honest clients neither hold handshakes by the hundred nor break off all their streams, and they end a
/// connection that the node ends.
const fn is_worth_a_line([evicted, handshakes, heads, broken, refused]: [u64; 5]) -> bool {
    evicted + broken + refused > 0 || handshakes + heads >= LATE_TOLD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_count() {
        let ends = EarlyEnds::default();
        for (number, end) in EarlyEnd::ALL.into_iter().enumerate() {
            assert_eq!(end as usize, number, "each is in the list");
            for _ in 0..=number {
                ends.clone().count(end);
            }
        }
        assert_eq!(ends.all(), [1, 2, 3, 4, 5]);
        for (number, why) in RefusedStream::ALL.into_iter().enumerate() {
            assert_eq!(why as usize, number, "each is in the list");
            ends.count_refused(why);
            assert_eq!(ends.refused(why), 1);
        }
    }

    #[test]
    fn a_few_late_clients_are_not_worth_a_line() {
        for (new, expected) in [
            ([0, 0, 0, 0, 0], false),
            ([0, 50, 49, 0, 0], false),
            ([0, 50, 50, 0, 0], true),
            ([1, 0, 0, 0, 0], true),
            ([0, 0, 0, 1, 0], true),
            ([0, 0, 0, 0, 1], true),
        ] {
            assert_eq!(is_worth_a_line(new), expected, "{new:?}");
        }
    }
}
