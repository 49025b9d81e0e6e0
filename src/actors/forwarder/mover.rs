//! The messages of deliveries that take long.
//!
//! A broker pays for an old message that is not settled with each later one: RabbitMQ gets an ack
//! for each instead of one for many. So, if there are several APIs, the message of a record whose
//! POST takes long moves to the disk of its API. The POST goes on.

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
/// The messages of this time move together, and share syncs.
const TICK: Duration = Duration::from_millis(100);

/// The messages of one outlet, in the order in which they came.
pub struct Mover {
    /// Each is here for about [`PATIENCE`], and is small once its record has reached its end.
    watched: mpsc::UnboundedSender<WatchedMessage>,
    due: Mutex<mpsc::UnboundedReceiver<WatchedMessage>>,
}

struct WatchedMessage {
    due: Instant,
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
            due: Instant::now() + PATIENCE,
            message: Arc::downgrade(&message),
        };
        // The receiver is in the same place.
        self.watched.send(watched).ok();
        delivery
    }

    /// The next message that is to move.
    pub async fn next(&self) -> Arc<MovableMessage> {
        let mut due = self.due.lock().await;
        loop {
            let Some(watched) = due.recv().await else {
                // The sender is in the same place.
                std::future::pending().await
            };
            let left = watched.due.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                sleep(left.max(TICK)).await;
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
