//! Notices that a stream has lost its last messages, though its server and the time of its creation
//! are the same: somebody has restored it from a backup, or a cluster goes on with an older copy.
//!
//! What an earlier run has seen is known with the copies of its records alone: see
//! [`crate::actors::copies`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tracing_mutex::parkinglot::Mutex;

use super::confirm::{Confirm, Stored};
use crate::transport::TransportError;

/// Stands for the last message after some were lost. No stream has so many.
const LOST: u64 = u64::MAX;

/// The last message that the stream is known to have had, over all connections of this run.
#[derive(Default)]
pub struct SeenStream {
    last: AtomicU64,
    incarnation: Mutex<Incarnation>,
}

#[derive(Default)]
struct Incarnation {
    name: String,
    losses: u64,
}

impl SeenStream {
    pub fn last(&self) -> u64 {
        self.last.load(Relaxed)
    }

    /// The last message, unless it is known to be lost.
    pub fn last_present(&self) -> u64 {
        match self.last() {
            LOST => 0,
            last => last,
        }
    }

    /// The stream has lost its last message. The next [`SeenStream::found`] tells it.
    pub fn lose(&self) {
        self.last.store(LOST, Relaxed);
    }

    /// A connection has found stream `name`, whose last message is `last`. Returns a name that
    /// changes when the stream has lost messages.
    pub fn found(&self, name: String, last: u64) -> String {
        let mut incarnation = self.incarnation.lock();
        let seen = self.last.swap(last, Relaxed);
        if incarnation.name != name {
            *incarnation = Incarnation { name, losses: 0 };
        } else if last < seen {
            incarnation.losses += 1;
        }
        format!("{} {}", incarnation.name, incarnation.losses)
    }

    /// Checks the confirm of a message that was published when the last one was `last`.
    ///
    /// # Errors
    /// If the stream has lost that one since. The next [`SeenStream::found`] tells it, too.
    pub fn confirmed(&self, stored: Stored, last: u64) -> Confirm {
        let Stored {
            sequence,
            duplicate,
        } = stored;
        if !duplicate && sequence <= last {
            self.lose();
            let why = format!(
                "the stream has lost messages: a new one has the number {sequence}, and {last} \
                 was there before"
            );
            return Err(TransportError::Lost(why));
        }
        self.last.fetch_max(sequence, Relaxed);
        Ok(stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn stored(sequence: u64) -> Stored {
        Stored {
            sequence,
            duplicate: false,
        }
    }

    #[test]
    fn a_stream_that_is_found_without_its_last_message_is_another() {
        let seen = SeenStream::default();
        let found = |last| seen.found("S".into(), last);
        let first = found(5);
        assert_eq!(found(5), first);
        seen.confirmed(stored(7), seen.last()).unwrap();
        // Of two that were under way at the same time, the first may be confirmed last.
        seen.confirmed(stored(6), 5).unwrap();
        assert_eq!(found(9), first, "others publish, too");
        let second = found(8);
        assert_ne!(second, first);
        assert_eq!(found(8), second);
        let third = seen.found("T".into(), 3);
        assert_ne!(third, second);
        seen.lose();
        assert_eq!(seen.last_present(), 0);
        // By then others may have published more than it has lost.
        assert_ne!(seen.found("T".into(), 9), third);
    }

    #[test]
    fn a_new_message_with_the_number_of_an_older_one_is_no_confirm() {
        let seen = SeenStream::default();
        let first = seen.found("S".into(), 5);
        let twice = Stored {
            duplicate: true,
            ..stored(4)
        };
        assert_eq!(seen.confirmed(twice, 5), Ok(twice));
        assert_eq!(seen.found("S".into(), 5), first);
        for sequence in [4, 5] {
            let lost = seen.confirmed(stored(sequence), 5);
            assert!(matches!(lost, Err(TransportError::Lost(_))), "{lost:?}");
        }
        // By then it may have more messages than it has lost.
        assert_ne!(seen.found("S".into(), 20), first);
    }
}
