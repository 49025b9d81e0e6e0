//! The messages of deliveries that take long.
//!
//! A broker pays for an old message that is not settled with each later one: RabbitMQ gets an ack
//! for each instead of one for many. So, if there are several APIs, the message of a record whose
//! POST takes long moves to the disk of its API, and sooner once the API is known to be behind. The
//! POST goes on.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, sleep},
};

use crate::delivery::{Delivery, MovableMessage};

/// A message stays in its broker for this long.
const PATIENCE: Duration = Duration::from_millis(500);
/// The same once records of its API are held on disk.
const PATIENCE_BEHIND: Duration = Duration::from_millis(100);
/// The messages of this time move together, and share syncs.
const TICK: Duration = Duration::from_millis(100);

/// The messages of one outlet, in the order in which they came.
pub struct Mover {
    /// Each is here for about [`PATIENCE`], and is small once its record has reached its end.
    watched: mpsc::UnboundedSender<WatchedMessage>,
    due: Mutex<mpsc::UnboundedReceiver<WatchedMessage>>,
}

struct WatchedMessage {
    since: Instant,
    message: Weak<MovableMessage>,
}

impl Default for Mover {
    fn default() -> Self {
        let (watched, due) = mpsc::unbounded_channel();
        Self {
            watched,
            due: Mutex::new(due),
        }
    }
}

impl Mover {
    /// The same delivery, whose message moves if its record reaches no end soon.
    pub fn watch(&self, delivery: Delivery) -> Delivery {
        if stays() {
            return delivery;
        }
        let (delivery, message) = delivery.movable();
        let watched = WatchedMessage {
            since: Instant::now(),
            message: Arc::downgrade(&message),
        };
        // The receiver is in the same place.
        self.watched.send(watched).ok();
        delivery
    }

    /// The next message that is to move. `is_behind` says whether records of its API are held on disk.
    pub async fn next(&self, is_behind: impl Fn() -> bool) -> Arc<MovableMessage> {
        let patience = || {
            if is_behind() {
                PATIENCE_BEHIND
            } else {
                PATIENCE
            }
        };
        let mut due = self.due.lock().await;
        loop {
            let Some(watched) = due.recv().await else {
                // The sender is in the same place.
                std::future::pending().await
            };
            while watched.since.elapsed() < patience() {
                sleep(TICK).await;
            }
            let message = watched.message.upgrade();
            if let Some(message) = message.filter(|message| message.is_movable()) {
                return message;
            }
        }
    }
}

/// A test may keep all messages in their brokers.
fn stays() -> bool {
    fail::fail_point!("messages-stay", |_| true);
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::tests::delivery;

    #[actix_rt::test]
    async fn a_message_moves_sooner_while_later_records_are_held() {
        tokio::time::pause();
        let mover = Mover::default();
        for (is_behind, patience) in [(false, PATIENCE), (true, PATIENCE_BEHIND)] {
            let began = Instant::now();
            drop(mover.watch(delivery().0));
            let held: Vec<_> = (0..3).map(|_| mover.watch(delivery().0)).collect();
            for _ in &held {
                mover.next(|| is_behind).await;
            }
            let after = began.elapsed();
            assert!(
                after >= patience && after <= patience + 2 * TICK,
                "{after:?}"
            );
        }
    }
}
