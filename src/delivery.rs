//! Both ends of a lane: the [`Receipt`] that proves that a record is safe, and the [`Delivery`]
//! that must be settled.

use std::{fmt, time::Duration};

use tokio::time::Instant;

use crate::{
    lane_id::LaneId,
    record::{Record, Tag},
    spool::EntryKey,
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
pub struct Acker(Option<Box<dyn FnOnce(Verdict) + Send>>);

impl Acker {
    /// `settle` is called exactly once. It must not block; the transport's `close` waits for the
    /// acks that it has to send.
    pub fn new(settle: impl FnOnce(Verdict) + Send + 'static) -> Self {
        Self(Some(Box::new(settle)))
    }

    pub fn settle(mut self, verdict: Verdict) {
        if let Some(settle) = self.0.take() {
            settle(verdict);
        }
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        if let Some(settle) = self.0.take() {
            settle(Verdict::Unsettled);
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
    /// Settles it: the API's 2xx is here.
    pub fn ack(self) {
        self.acker.settle(Verdict::Ack);
    }

    /// Gives it back to the broker for another try after `delay`.
    pub fn retry_after(self, delay: Duration) {
        self.acker.settle(Verdict::RetryAfter(delay));
    }

    /// Settles it without the API: its dead letter is on disk.
    pub fn reject(self) {
        self.acker.settle(Verdict::Reject);
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
mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;

    use super::*;

    fn delivery() -> (Delivery, Arc<Mutex<Vec<Verdict>>>) {
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&verdicts);
        let record = Record {
            id: Arc::from("1"),
            body: Bytes::from_static(b"{}"),
            traceparent: None,
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
}
