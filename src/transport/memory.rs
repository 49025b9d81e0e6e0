//! The contract in memory, with faults to switch: for tests of lanes, where a broker of its own would hide the subject.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{Broker as Description, Kind, Transport, TransportError};
use crate::{
    delivery::{Delivery, Verdict},
    lane_id::LaneId,
    record::Record,
};

/// How long a message that nobody settled rests before it comes again.
const REDELIVERY: Duration = Duration::from_millis(1);

/// The message system. Clones are one system; it outlives all connections.
#[derive(Clone, Default)]
pub struct Broker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A message has come, or a fault was switched.
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Messages that wait, with the time from which they may be delivered.
    waiting: VecDeque<(Instant, Record, bool)>,
    held: usize,
    faults: Faults,
    connects: usize,
    redelivered: usize,
    /// Which connection is the present one; a lost one never delivers or settles again.
    generation: u64,
}

/// What goes wrong, until it is switched off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub refuse_connects: bool,
    /// Publishes fail, and the message is not stored.
    pub fail_publishes: bool,
    /// The message is stored, and the confirm never comes.
    pub swallow_confirms: bool,
}

impl Broker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches faults.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Breaks the present connection; what it held comes again.
    pub fn drop_connection(&self) {
        self.state().generation += 1;
        self.0.changed.notify_waiters();
    }

    /// Messages that are in the system, delivered or not, until they are acked or rejected.
    #[must_use]
    pub fn stored(&self) -> usize {
        let state = self.state();
        state.waiting.len() + state.held
    }

    /// How often someone tried to connect.
    #[must_use]
    pub fn connects(&self) -> usize {
        self.state().connects
    }

    /// How often a message was given back.
    #[must_use]
    pub fn redelivered(&self) -> usize {
        self.state().redelivered
    }

    fn put_back(&self, record: Record, after: Duration) {
        let mut state = self.state();
        state.redelivered += 1;
        state
            .waiting
            .push_back((Instant::now() + after, record, true));
        drop(state);
        self.0.changed.notify_waiters();
    }
}

/// One connection.
pub struct Memory {
    broker: Broker,
    generation: u64,
}

impl Memory {
    fn check(&self) -> Result<(), TransportError> {
        if self.broker.state().generation == self.generation {
            Ok(())
        } else {
            Err(TransportError::Lost("dropped".into()))
        }
    }
}

impl Transport for Memory {
    const LANE: LaneId = LaneId::Memory;
    type Settings = Broker;

    async fn connect(broker: &Broker) -> Result<Self, TransportError> {
        let mut state = broker.state();
        state.connects += 1;
        if state.faults.refuse_connects {
            return Err(TransportError::Connect("refused".into()));
        }
        state.generation += 1;
        Ok(Self {
            broker: broker.clone(),
            generation: state.generation,
        })
    }

    async fn publish_as(&self, record: &Record, _: Kind) -> Result<(), TransportError> {
        self.check()?;
        let faults = self.broker.state().faults;
        if faults.fail_publishes {
            return Err(TransportError::Publish("refused".into()));
        }
        self.broker
            .state()
            .waiting
            .push_back((Instant::now(), record.clone(), false));
        self.broker.0.changed.notify_waiters();
        if faults.swallow_confirms {
            // No confirm comes before the connection breaks.
            return Err(self.lost().await);
        }
        Ok(())
    }

    async fn next(&self) -> Result<Delivery, TransportError> {
        loop {
            let changed = self.broker.0.changed.notified();
            self.check()?;
            let earliest = {
                let mut state = self.broker.state();
                let now = Instant::now();
                if let Some(at) = state.waiting.iter().position(|(from, ..)| *from <= now)
                    && let Some((_, record, redelivered)) = state.waiting.remove(at)
                {
                    state.held += 1;
                    drop(state);
                    return Ok(self.deliver(record, redelivered));
                }
                state.waiting.iter().map(|(from, ..)| *from).min()
            };
            match earliest {
                Some(from) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(from) => {}
                },
                None => changed.await,
            }
        }
    }

    async fn lost(&self) -> TransportError {
        loop {
            let changed = self.broker.0.changed.notified();
            if let Err(lost) = self.check() {
                return lost;
            }
            changed.await;
        }
    }

    async fn close(&self) {
        if self.check().is_ok() {
            self.broker.drop_connection();
        }
    }

    fn broker(&self) -> Description {
        Description {
            version: Some("in memory".into()),
            warnings: vec!["nothing outlives the process".into()],
        }
    }
}

impl Memory {
    fn deliver(&self, record: Record, redelivered: bool) -> Delivery {
        let (broker, generation, kept) = (self.broker.clone(), self.generation, record.clone());
        Delivery::new(record, redelivered, move |verdict| {
            let connected = {
                let mut state = broker.state();
                state.held -= 1;
                state.generation == generation
            };
            match verdict {
                Verdict::Ack | Verdict::Reject if connected => {}
                Verdict::RetryAfter(delay) => broker.put_back(kept, delay),
                // An ack on a lost connection does not arrive.
                Verdict::Ack | Verdict::Reject | Verdict::Unsettled => {
                    broker.put_back(kept, REDELIVERY)
                }
            }
        })
    }
}
