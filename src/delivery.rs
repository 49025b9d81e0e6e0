//! Both ends of a lane: the [`Receipt`] that proves that a record is safe, and the [`Delivery`]
//! that must be settled.

use std::{fmt, mem, sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing_mutex::parkinglot::Mutex;

use crate::{
    lane_id::LaneId,
    record::{Record, Tag},
    spool::EntryKey,
    trace::{MoveMark, OpenSpan},
};

/// The proof that a record is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// The lane's broker has confirmed it.
    Lane(LaneId),
    /// It is on this node's disk.
    Spool,
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The API has it: the broker may forget it.
    Ack,
    /// Not delivered: the broker sends it again, not before this time has passed.
    RetryAfter(Duration),
    /// It will never be delivered, and it is kept elsewhere: the broker may forget it.
    Reject,
    /// Nobody decided (a panic, a dropped task, a drain): not delivered, the broker sends it again.
    Unsettled,
}

/// Settles one message, once. Dropped, it means *not delivered*.
pub struct Acker(Settle);

enum Settle {
    Done,
    Call(Box<dyn FnOnce(Verdict) + Send>),
    Movable(Arc<MovableMessage>),
}

impl Acker {
    /// `settle` is called exactly once. It must not block; the transport's `close` waits for the
    /// acks that it has to send.
    pub fn new(settle: impl FnOnce(Verdict) + Send + 'static) -> Self {
        Self(Settle::Call(Box::new(settle)))
    }

    pub fn settle(mut self, verdict: Verdict) {
        self.settle_now(verdict);
    }

    fn settle_now(&mut self, verdict: Verdict) {
        match mem::replace(&mut self.0, Settle::Done) {
            Settle::Done => {}
            Settle::Call(settle) => settle(verdict),
            Settle::Movable(message) => message.settle(verdict),
        }
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        self.settle_now(Verdict::Unsettled);
    }
}

/// A message that may move from its broker to this node's disk until its record has reached its end.
pub struct MovableMessage {
    pub record: Record,
    place: Mutex<MessagePlace>,
    /// Set when it moves, if its trace is recorded.
    mark: Option<MoveMark>,
}

enum MessagePlace {
    Broker(Acker),
    /// It is too late to move it.
    BrokerOnly(Acker),
    Disk(HeldEntry, Acker),
    Settled,
}

impl MovableMessage {
    fn settle(&self, verdict: Verdict) {
        let place = mem::replace(&mut *self.place.lock(), MessagePlace::Settled);
        match place {
            MessagePlace::Settled => {}
            MessagePlace::Broker(acker)
            | MessagePlace::BrokerOnly(acker)
            | MessagePlace::Disk(_, acker) => acker.settle(verdict),
        }
    }

    pub fn is_movable(&self) -> bool {
        matches!(*self.place.lock(), MessagePlace::Broker(_))
    }

    /// Makes `entry` its place, and `acker` the one that gets its verdict. Returns the one that
    /// settles it in its broker; `None` if its record has reached its end: then it does not move.
    pub fn move_to(&self, entry: HeldEntry, acker: Acker) -> Option<Acker> {
        let mut place = self.place.lock();
        match mem::replace(&mut *place, MessagePlace::Settled) {
            MessagePlace::Broker(in_broker) => {
                *place = MessagePlace::Disk(entry, acker);
                if let Some(mark) = &self.mark {
                    mark.set();
                }
                Some(in_broker)
            }
            other => {
                *place = other;
                None
            }
        }
    }

    fn stay(&self) -> Option<HeldEntry> {
        let mut place = self.place.lock();
        match mem::replace(&mut *place, MessagePlace::Settled) {
            MessagePlace::Broker(acker) => {
                *place = MessagePlace::BrokerOnly(acker);
                None
            }
            other => {
                *place = other;
                match &*place {
                    MessagePlace::Disk(entry, _) => Some(entry.clone()),
                    _ => None,
                }
            }
        }
    }
}

/// A record that came out of a transport, which holds its message until it is settled. Dropped, it
/// is *not delivered*. While it lives the transport keeps the broker's hold on the message, however
/// long that takes.
pub struct Delivery {
    pub record: Record,
    /// The broker says that it has sent this message before.
    pub redelivered: bool,
    /// When the client crate handed the message over, at the latest.
    pub since: Instant,
    /// The place on this node's disk, if it comes from there and not from a broker.
    pub held: Option<HeldEntry>,
    /// Its span until it is settled, if its trace is recorded.
    pub span: Option<OpenSpan>,
    pub acker: Acker,
}

/// A record on disk that waits for a place of its API.
#[derive(Clone, Debug)]
pub struct HeldEntry {
    pub key: EntryKey,
    /// The tag of the lane that it came out of.
    pub tag: Tag,
}

impl Delivery {
    /// The same delivery, and its message, which may move from now on.
    pub fn movable(mut self) -> (Self, Arc<MovableMessage>) {
        let message = Arc::new(MovableMessage {
            record: self.record.clone(),
            place: Mutex::new(MessagePlace::Broker(self.acker)),
            mark: self.span.as_mut().map(OpenSpan::move_mark),
        });
        let acker = Acker(Settle::Movable(Arc::clone(&message)));
        (Self { acker, ..self }, message)
    }

    /// Its place on disk, if it has one. It does not move any more.
    pub fn last_place(&self) -> Option<HeldEntry> {
        match (&self.held, &self.acker.0) {
            (Some(held), _) => Some(held.clone()),
            (None, Settle::Movable(message)) => message.stay(),
            (None, _) => None,
        }
    }

    /// Settles it: the API's 2xx is here.
    pub fn ack(self) {
        self.settle(Verdict::Ack);
    }

    /// Gives it back to the broker for another try after `delay`.
    pub fn retry_after(self, delay: Duration) {
        self.settle(Verdict::RetryAfter(delay));
    }

    /// Settles it without the API: its dead letter is on disk.
    pub fn reject(self) {
        self.settle(Verdict::Reject);
    }

    fn settle(self, verdict: Verdict) {
        if self.held.is_some() {
            self.acker.settle(verdict);
            if let Some(span) = self.span {
                span.ended(verdict);
            }
            return;
        }
        let settling = self.span.and_then(|span| span.settle(verdict));
        self.acker.settle(verdict);
        drop(settling);
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("id", &self.record.id)
            .field("redelivered", &self.redelivered)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;

    use super::*;
    use crate::spool::{Position, Queue};

    /// A delivery, and the verdicts that it gets.
    pub fn delivery() -> (Delivery, Arc<Mutex<Vec<Verdict>>>) {
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&verdicts);
        let record = Record {
            id: Arc::from("1"),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: None,
            api: None,
            event: None,
        };
        (
            Delivery {
                record,
                redelivered: false,
                since: Instant::now(),
                held: None,
                span: None,
                acker: Acker::new(move |verdict| kept.lock().unwrap().push(verdict)),
            },
            verdicts,
        )
    }

    #[test]
    fn a_delivery_is_settled_exactly_once_and_dropped_means_not_delivered() {
        let (delivery, verdicts) = self::delivery();
        delivery.ack();
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Ack]);
        let (delivery, verdicts) = self::delivery();
        delivery.retry_after(Duration::from_secs(3));
        assert_eq!(
            *verdicts.lock().unwrap(),
            [Verdict::RetryAfter(Duration::from_secs(3))]
        );
        let (delivery, verdicts) = self::delivery();
        delivery.reject();
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Reject]);
        let (delivery, verdicts) = self::delivery();
        drop(delivery);
        assert_eq!(*verdicts.lock().unwrap(), [Verdict::Unsettled]);
    }
    #[test]
    fn a_message_moves_to_disk_once_and_not_after_its_end() {
        let held = || HeldEntry {
            key: EntryKey::new(Queue::Held(LaneId::Nats), Position::of(1, 7)),
            tag: Tag::new("T"),
        };
        let acker = |verdicts: &Arc<Mutex<Vec<Verdict>>>| {
            let kept = Arc::clone(verdicts);
            Acker::new(move |verdict| kept.lock().unwrap().push(verdict))
        };
        let (on_disk, unused) = (Arc::default(), Arc::default());

        let (delivery, in_broker) = self::delivery();
        let (delivery, message) = delivery.movable();
        assert!(message.is_movable());
        let broker = message.move_to(held(), acker(&on_disk)).unwrap();
        broker.settle(Verdict::Ack);
        assert!(!message.is_movable());
        assert!(message.move_to(held(), acker(&unused)).is_none());
        assert_eq!(delivery.last_place().unwrap().key, held().key);
        delivery.retry_after(Duration::from_secs(1));
        assert_eq!(*in_broker.lock().unwrap(), [Verdict::Ack]);
        let again = [Verdict::RetryAfter(Duration::from_secs(1))];
        assert_eq!(*on_disk.lock().unwrap(), again);

        let (delivery, in_broker) = self::delivery();
        let (delivery, message) = delivery.movable();
        assert!(delivery.last_place().is_none(), "its record is at its end");
        assert!(!message.is_movable());
        assert!(message.move_to(held(), acker(&unused)).is_none());
        delivery.ack();
        assert_eq!(*in_broker.lock().unwrap(), [Verdict::Ack]);

        let (delivery, in_broker) = self::delivery();
        let (delivery, message) = delivery.movable();
        drop(delivery);
        assert_eq!(*in_broker.lock().unwrap(), [Verdict::Unsettled]);
        assert!(message.move_to(held(), acker(&unused)).is_none());
    }
}
