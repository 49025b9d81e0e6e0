//! The transport contract in memory, with faults to switch, and its rig. Tests of a lane use it
//! where a broker of its own would hide the subject.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use waypost::{
    delivery::Verdict,
    transport::{
        BrokerInfo, Durability, Incoming, Inspection, Message, Transport, TransportError,
        publish_each,
    },
};

use super::rig::Rig;

/// The delay before a message that was not settled is redelivered.
const REDELIVERY: Duration = Duration::from_millis(1);

/// The message system. Clones share it, and it outlives all connections.
#[derive(Clone, Default)]
pub struct Broker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A message has come, or a fault was switched.
    changed: Notify,
}

struct Waiting {
    message: Message,
    redelivered: bool,
    /// Not delivered before this time.
    due: Instant,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Messages that are delivered and not settled.
    unsettled: usize,
    faults: Faults,
    connects: usize,
    redelivered: usize,
    /// The number of the present connection. A lost one never delivers or settles again.
    generation: u64,
}

/// Each fault stays until it is switched off.
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

    /// Breaks the present connection. Its unsettled messages are redelivered.
    pub fn drop_connection(&self) {
        self.state().generation += 1;
        self.0.changed.notify_waiters();
    }

    /// Messages that are in the system, delivered or not, until they are acked or rejected.
    pub fn stored(&self) -> usize {
        let state = self.state();
        state.waiting.len() + state.unsettled
    }

    /// The number of attempts to connect.
    pub fn connects(&self) -> usize {
        self.state().connects
    }

    /// The number of messages that came back unacked.
    pub fn redelivered(&self) -> usize {
        self.state().redelivered
    }

    fn take_due(&self) -> Option<Waiting> {
        let mut state = self.state();
        let now = Instant::now();
        let index = state
            .waiting
            .iter()
            .position(|waiting| waiting.due <= now)?;
        let waiting = state.waiting.remove(index)?;
        state.unsettled += 1;
        Some(waiting)
    }

    fn put_back(&self, message: Message, delay: Duration) {
        let mut state = self.state();
        state.redelivered += 1;
        state.waiting.push_back(Waiting {
            message,
            redelivered: true,
            due: Instant::now() + delay,
        });
        drop(state);
        self.0.changed.notify_waiters();
    }
}

/// One connection.
pub struct Memory {
    broker: Broker,
    generation: u64,
}

impl Transport for Memory {
    type Settings = Broker;

    fn address(_: &Broker) -> String {
        "memory".into()
    }

    async fn inspect(_: &Broker) -> Result<Inspection, TransportError> {
        Ok(Inspection::default())
    }

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

    async fn publish(
        &self,
        messages: &[Message],
        settled: impl FnMut(usize, Result<(), TransportError>),
    ) {
        publish_each(messages, settled, async |message| self.store(message).await).await;
    }

    async fn receive(&self, into: &mut Vec<Incoming>, max: usize) -> Result<(), TransportError> {
        loop {
            let changed = self.broker.0.changed.notified();
            self.check()?;
            let received = into.len();
            while into.len() < received + max
                && let Some(waiting) = self.broker.take_due()
            {
                into.push(self.deliver(waiting));
            }
            if into.len() > received {
                return Ok(());
            }
            let next_due = {
                let state = self.broker.state();
                state.waiting.iter().map(|waiting| waiting.due).min()
            };
            match next_due {
                Some(due) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(due) => {}
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

    fn info(&self) -> BrokerInfo {
        BrokerInfo {
            version: Some("in memory".into()),
            warnings: vec!["nothing outlives the process".into()],
            outlives_power_cut: Durability::Yes,
            ..BrokerInfo::default()
        }
    }
}

impl Memory {
    fn check(&self) -> Result<(), TransportError> {
        if self.broker.state().generation == self.generation {
            Ok(())
        } else {
            Err(TransportError::Lost("dropped".into()))
        }
    }

    async fn store(&self, message: &Message) -> Result<(), TransportError> {
        self.check()?;
        let faults = self.broker.state().faults;
        if faults.fail_publishes {
            return Err(TransportError::Publish("refused".into()));
        }
        self.broker.state().waiting.push_back(Waiting {
            message: message.clone(),
            redelivered: false,
            due: Instant::now(),
        });
        self.broker.0.changed.notify_waiters();
        if faults.swallow_confirms {
            // No confirm comes before the connection breaks.
            return Err(self.lost().await);
        }
        Ok(())
    }

    fn deliver(&self, waiting: Waiting) -> Incoming {
        let Waiting {
            message,
            redelivered,
            ..
        } = waiting;
        let broker = self.broker.clone();
        let generation = self.generation;
        let stored = message.clone();
        Incoming::new(message, redelivered, move |verdict| {
            let connected = {
                let mut state = broker.state();
                state.unsettled -= 1;
                state.generation == generation
            };
            match verdict {
                Verdict::Ack | Verdict::Reject if connected => {}
                Verdict::RetryAfter(delay) => broker.put_back(stored, delay),
                // An ack on a lost connection does not arrive.
                Verdict::Ack | Verdict::Reject | Verdict::Unsettled => {
                    broker.put_back(stored, REDELIVERY);
                }
            }
        })
    }
}

#[derive(Default)]
pub struct InMemory {
    brokers: Vec<Broker>,
}

impl InMemory {
    fn all(&self, faults: Faults) {
        for broker in &self.brokers {
            broker.set_faults(faults);
            broker.drop_connection();
        }
    }
}

impl Rig for InMemory {
    type T = Memory;
    /// The broker outlives its connections, and a kill is no more than their end.
    const SURVIVES_KILL: bool = true;

    async fn start() -> Option<Self> {
        Some(Self::default())
    }

    fn settings(&mut self) -> Broker {
        let broker = Broker::default();
        self.brokers.push(broker.clone());
        broker
    }

    async fn kill(&mut self) {
        self.all(Faults {
            refuse_connects: true,
            ..Faults::default()
        });
    }

    async fn revive(&mut self) {
        self.all(Faults::default());
    }
}
