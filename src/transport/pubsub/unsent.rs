//! How many messages of this node the subscription can have. Pub/Sub has no count of them, but it
//! soon sends each message to a node that has room for it. So a message that was published longer
//! ago is settled, in this node's hands, or in another's.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// Longer than a message stays in the subscription while a node has room. The emulator needs up to
/// 30 s after a reconnect.
const SENT_AFTER: Duration = Duration::from_secs(45);

/// The messages of one connection that may not have been sent to any node.
#[derive(Default)]
pub(super) struct Unsent {
    /// Messages that were published so far.
    pub published: u64,
    /// The same at earlier times, for as long as this node has had room.
    earlier: VecDeque<(Instant, u64)>,
}

impl Unsent {
    /// The most messages that were not sent yet; `None` if this node has not had room for long
    /// enough. To be called every few seconds.
    pub fn count(&mut self, now: Instant, has_room: bool) -> Option<u64> {
        if !has_room {
            self.earlier.clear();
            return None;
        }
        self.earlier.push_back((now, self.published));
        let is_old = |(at, _): &(Instant, u64)| now - *at >= SENT_AFTER;
        while self.earlier.get(1).is_some_and(is_old) {
            self.earlier.pop_front();
        }
        let oldest = self.earlier.front().filter(|oldest| is_old(oldest));
        oldest.map(|(_, published)| self.published - published)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_was_sent_once_there_was_room_for_long_enough() {
        let mut unsent = Unsent::default();
        let start = Instant::now();
        let mut second = 0;
        let mut after = |unsent: &mut Unsent, seconds, has_room| {
            second += seconds;
            unsent.count(start + Duration::from_secs(second), has_room)
        };
        unsent.published += 3;
        assert_eq!(after(&mut unsent, 0, true), None, "it is young");
        assert_eq!(after(&mut unsent, 44, true), None);
        unsent.published += 2;
        assert_eq!(after(&mut unsent, 1, true), Some(2));
        assert_eq!(after(&mut unsent, 43, true), Some(2));
        assert_eq!(after(&mut unsent, 2, true), Some(0));
        unsent.published += 1;
        assert_eq!(after(&mut unsent, 2, false), None, "no room");
        assert_eq!(after(&mut unsent, 44, true), None);
        assert_eq!(after(&mut unsent, 44, true), None);
        assert_eq!(after(&mut unsent, 2, true), Some(0));
    }
}
