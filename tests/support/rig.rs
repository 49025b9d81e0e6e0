//! The interface of a message system under test.

use std::cell::RefCell;

use waypost::{
    actors::lane::bundle::{BundleSize, Packed, SettledRecords, Unbundler},
    delivery::Delivery,
    record::Record,
    transport::{Message, Transport, TransportError},
};

/// A message system under test.
pub trait Rig: Sized {
    type T: Transport;
    /// A confirmed message outlives a SIGKILL of the system.
    const SURVIVES_KILL: bool;
    /// `publish` resolves only when the delivery is acked or rejected: there is no broker in
    /// between.
    const CONFIRMS_ON_SETTLE: bool = false;
    /// A message may be a bundle.
    const CARRIES_BUNDLES: bool = true;

    /// A running system. `None`, after a line that names the missing program, if this machine lacks
    /// it. Panics instead with `CI=true`.
    async fn start() -> Option<Self>;

    /// Settings that name a stream, queue, subscription … that nobody has used yet.
    fn settings(&mut self) -> <Self::T as Transport>::Settings;

    /// SIGKILL.
    async fn kill(&mut self);

    /// On the same ports, with the same data. Returns once it answers its protocol.
    async fn revive(&mut self);
}

/// A transport whose messages are one record each.
pub trait Records: Transport {
    async fn send(&self, record: &Record) -> Result<(), TransportError> {
        let mut confirm = Err(TransportError::Publish("no outcome".into()));
        self.publish(&[Message::from(record)], |_, outcome| confirm = outcome)
            .await;
        confirm
    }

    async fn next(&self) -> Result<Delivery, TransportError> {
        let mut messages = Vec::new();
        self.receive(&mut messages, 1).await?;
        assert_eq!(messages.len(), 1);
        Ok(messages.remove(0).into())
    }
}

impl<T: Transport> Records for T {}

/// A transport whose messages are bundles of up to `most` records.
pub struct Bundles<'a, T> {
    transport: &'a T,
    most: usize,
    unbundler: RefCell<Unbundler>,
}

impl<'a, T: Transport> Bundles<'a, T> {
    pub fn new(transport: &'a T, most: usize, settled: &SettledRecords) -> Self {
        Self {
            transport,
            most,
            unbundler: RefCell::new(Unbundler::new(settled.clone())),
        }
    }

    /// Publishes each, and tells which were confirmed.
    pub async fn send(&self, records: &[Record]) -> Vec<bool> {
        let largest = self.transport.info().largest_message;
        let size = BundleSize::new(self.most, largest.unwrap_or(usize::MAX));
        let packed = Packed::new(records, size);
        let mut confirmed = vec![false; records.len()];
        self.transport
            .publish(&packed.messages, |index, outcome| {
                confirmed[packed.records(index)].fill(outcome.is_ok());
            })
            .await;
        confirmed
    }

    pub async fn next(&self) -> Result<Delivery, TransportError> {
        loop {
            if let Some(delivery) = self.unbundler.borrow_mut().next() {
                return Ok(delivery);
            }
            let mut messages = Vec::new();
            self.transport.receive(&mut messages, 8).await?;
            self.unbundler.borrow_mut().add(&mut messages);
        }
    }
}
